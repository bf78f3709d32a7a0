"""Detectors in ONNX find what the model finds; their operators compute what `fastrcnn.ops` computes."""

import json
import subprocess
import sys

import onnx
import pytest
import torch
from export.detectors import assert_same, detector, photos
from torch import nn
from torchvision.transforms.functional import to_pil_image

import fastrcnn
from fastrcnn import ops
from fastrcnn.export import METADATA, metadata
from fastrcnn.export import onnx as onnx_files
from fastrcnn.export.operators import PortableOperators

NAMES = {1: "circle", 2: "square", 3: "triangle", 4: "star", 5: "bars", 6: "figure"}
SIDES = [[(128, 128)], [(96, 140), (60, 200), (130, 70)], [(33, 20), (64, 64)]]  # of three batches
EMPTY = torch.full((3, 64, 96), 127, dtype=torch.uint8)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def run(function, inputs, dynamic, tmp_path):
    """The function's translation to ONNX, of the inputs. dynamic: free axes of each input."""
    shapes = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in dynamic)
    program = torch.onnx.export(
        Function(function).eval(),
        tuple(inputs),
        dynamo=True,
        verbose=False,
        dynamic_shapes=(shapes,),
        opset_version=onnx_files.OPSET,
        custom_translation_table=onnx_files.TRANSLATIONS,
    )
    file = program.model_proto
    del file.graph.value_info[:]
    onnx.save(file, tmp_path / "function.onnx")
    session = onnx_files.onnxruntime.InferenceSession(tmp_path / "function.onnx", providers=["CPUExecutionProvider"])
    feed = {value.name: given.numpy() for value, given in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, feed)]


def random_boxes(*shape, places=100, sides=60):
    corner = torch.rand(*shape, 2) * places
    return torch.cat([corner, corner + torch.rand(*shape, 2) * sides], -1)


@pytest.mark.parametrize(("most", "with_labels"), [(20, True), (300, True), (150, False)])
def test_nms(most, with_labels, tmp_path):
    boxes, scores = random_boxes(3, 200), torch.rand(3, 200)
    scores[:, ::7] = 0.5  # equal scores
    boxes[0, 3, 1], boxes[1, 5, 2] = torch.nan, torch.inf
    scores[2, 9:12] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    labels = torch.randint(0, 6, (3, 200)) if with_labels else None
    inputs = [boxes, scores, torch.rand(3, 200) > 0.2]

    def suppress(boxes, scores, valid):
        return ops.nms_padded(boxes, scores, 0.4, most, labels, valid)

    found, count = run(suppress, inputs, [()] * 3, tmp_path)
    wanted, wanted_count = suppress(*inputs)
    assert torch.equal(found, wanted)
    assert torch.equal(count, wanted_count)
    assert count.min() > 15


@pytest.mark.parametrize(("ratio", "aligned", "last_pixel"), [(2, True, False), (0, False, True), (0, True, False)])
def test_roi_align(ratio, aligned, last_pixel, tmp_path):
    features = [torch.randn(2, 8, 64 >> level, 96 >> level) for level in range(4)]
    boxes = random_boxes(2, 50, places=200, sides=400)
    boxes[0, 0, 0], boxes[1, 1] = torch.nan, torch.tensor([30.0, 20, 30, 20])

    def align(*inputs):
        *maps, boxes, valid = inputs
        scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
        return ops.multilevel_roi_align(
            maps, boxes, (7, 5), scales, ratio, aligned, canonical_size=100, valid=valid, last_pixel=last_pixel
        )

    inputs = [*features, boxes, torch.rand(2, 50) > 0.2]
    (found,) = run(align, inputs, [(2, 3)] * 4 + [()] * 2, tmp_path)
    torch.testing.assert_close(found, align(*inputs), rtol=1e-5, atol=1e-5)


def test_keypoints(tmp_path):
    boxes = random_boxes(6, places=40)
    boxes[0], boxes[1] = torch.tensor([1.0, 1, 1, 1]), torch.tensor([0.0, 0, 200, 200])
    inputs = [torch.randn(6, 5, 14, 14), boxes, torch.zeros(1, 96, 128)]

    def locate(heatmaps, boxes, image):
        return ops.heatmaps_to_keypoints(heatmaps, boxes, tuple(image.shape[1:]))

    for found, wanted in zip(run(locate, inputs, [(0,), (0,), (1, 2)], tmp_path), locate(*inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms(method, tmp_path):
    inputs = [random_boxes(2, 60), torch.rand(2, 60), torch.randint(1, 4, (2, 60)), torch.rand(2, 60) > 0.2]

    def suppress(boxes, scores, labels, valid):
        return ops.soft_nms_padded(boxes, scores, 6, method, labels=labels, valid=valid)

    def traced(*inputs):
        with PortableOperators():
            return suppress(*inputs)

    for found, wanted in zip(run(traced, inputs, [(0,)] * 4, tmp_path), suppress(*inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(cfg, model, path of its file)"""
    torch.manual_seed(0)
    cfg, model = detector("quick_start", "MODEL.ROI_HEADS.SCORE_THRESH", "0.9")
    path = tmp_path_factory.mktemp("onnx") / "new" / "model.onnx"
    onnx_files.export_onnx(cfg, model, NAMES, path)
    return cfg, model, path


def test_mask_rcnn_of_any_size(exported, test_data):
    cfg, model, path = exported
    run = onnx_files.load(path)
    counts = [assert_same(cfg, model, run, photos(test_data, sides)) for sides in SIDES]
    assert sum(map(sum, counts)) > 12
    assert assert_same(cfg, model, run, [EMPTY]) == [0]


def test_what_a_file_says(exported):
    cfg, _, path = exported
    file = onnx.load(path)
    axes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*file.graph.input, *file.graph.output)
    }
    assert axes == {
        "images": ["batch", 3, "height", "width"],
        "sizes": ["batch", 2],
        "boxes": ["batch", 8, 4],
        "scores": ["batch", 8],
        "labels": ["batch", 8],
        "count": ["batch"],
        "masks": ["batch", 8, 28, 28],
    }
    assert {prop.key: json.loads(prop.value) for prop in file.metadata_props if prop.key == METADATA} == {
        METADATA: metadata(cfg, NAMES)
    }
    assert {node.domain for node in file.graph.node} <= {"", "ai.onnx"}  # no operators but ONNX's own


def test_example_without_this_package(exported, test_data, repository, tmp_path):
    """A photo of another size, so both resize it: Pillow and PyTorch round differently in few pixels, by one."""
    cfg, model, path = exported
    (photo,) = photos(test_data, [(213, 317)])
    to_pil_image(photo).save(tmp_path / "photo.png")
    script = repository / "examples" / "run_onnx.py"
    check = (
        "import runpy, sys\n"
        f"sys.argv = ['run_onnx.py', {str(path)!r}, {str(tmp_path / 'photo.png')!r}]\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "assert not {'torch', 'fastrcnn'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    wanted = fastrcnn.Predictor(cfg, model.state_dict())(photo)
    assert len(lines) == len(wanted) > 3
    assert [line[0] for line in lines] == [NAMES[label] for label in wanted.get_field("labels").tolist()]
    numbers = torch.tensor([[float(number) for number in line[1:]] for line in lines])
    torch.testing.assert_close(numbers[:, 0], wanted.get_field("scores"), rtol=0, atol=0.01)
    torch.testing.assert_close(numbers[:, 1:], wanted.bbox, rtol=0, atol=0.5)


def test_mistakes_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"model\.pb: the name must end in \.onnx"):
        onnx_files.export_onnx(None, None, {}, tmp_path / "model.pb")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(onnx_files.ExportError, match=r"broken\.onnx: onnxruntime [0-9.]+ does not run it"):
        onnx_files.load(tmp_path / "broken.onnx")
    cfg = fastrcnn.load_config("quick_start")
    program = torch.export.export(Function(torch.special.bessel_j0), (torch.rand(2),))
    monkeypatch.setattr(onnx_files, "export_program", lambda *_: program)
    with pytest.raises(onnx_files.ExportError, match=r"ONNX cannot hold this model: .*bessel_j0"):
        onnx_files.export_onnx(cfg, None, {}, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.nightly
@pytest.mark.parametrize(
    "name",
    [
        "e2e_faster_rcnn_R_50_FPN_1x",
        "e2e_keypoint_rcnn_R_50_FPN_1x",
        "e2e_mask_rcnn_R_50_C4_1x",
        "caffe2/e2e_mask_rcnn_R_50_FPN_1x_caffe2",
        "rpn_R_50_FPN_1x",
        "retinanet/retinanet_R-50-FPN_1x",
        "modern/cascade_mask_rcnn_R_50_FPN_3x",
        "dcn/e2e_faster_rcnn_mdconv_R_50_FPN_1x",
        "torchvision/mask_rcnn_R_50_FPN",
        "torchvision/retinanet_R_50_FPN_V2",
    ],
)
def test_every_family(name, test_data, tmp_path):
    # Regions without area, and small ones in small images, see the same pixels and have exactly the same score; which
    # of them comes first is torch.topk's choice.
    cfg, model = detector(name, "MODEL.RPN.MIN_SIZE", "1")
    onnx_files.export_onnx(cfg, model, {}, tmp_path / "model.onnx")
    run = onnx_files.load(tmp_path / "model.onnx")
    counts = [assert_same(cfg, model, run, photos(test_data, sides)) for sides in SIDES[:2]]
    assert sum(map(sum, counts)) >= 12
