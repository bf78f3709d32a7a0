"""What every operator promises, in one table: schemas, opcheck, compilers, strides, empty inputs, errors, graphs."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from support import DEVICE
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastrcnn import ops
from fastrcnn.ops.reference import box_coder as box_coder_reference


@dataclass(frozen=True)
class Entry:
    """A public function and arguments for it.

    sample: (images, boxes) -> keyword arguments. gradients: arguments that have one. any_dtype: arguments that take
    integers as well as floating point. ragged: the shape of the result depends on the data.
    """

    name: str
    sample: Callable[[int, int], dict[str, Any]]
    gradients: tuple[str, ...] = ()
    any_dtype: tuple[str, ...] = ()
    ragged: bool = False

    def inputs(self, images: int = 2, boxes: int = 5, gradients: bool = False) -> dict[str, Any]:
        inputs = tree_map_only(Tensor, lambda x: x.to(DEVICE), self.sample(images, boxes))
        return self.track(inputs) if gradients else inputs

    def track(self, inputs: dict[str, Any]) -> dict[str, Any]:
        tracked = {name: tree_map_only(Tensor, Tensor.requires_grad_, inputs[name]) for name in self.gradients}
        return inputs | tracked

    def run(self, inputs: dict[str, Any], function: Callable | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Results, and the gradients of the arguments that require one."""
        results = tree_leaves((function or getattr(ops, self.name))(**inputs))
        tracked = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
        if not tracked:
            return results, []
        loss = sum(x.square().sum() for x in results if x.is_floating_point())
        return results, list(torch.autograd.grad(loss, tracked))


def boxes_of(*shape: int) -> Tensor:
    corner = torch.rand(*shape, 2) * 30
    return torch.cat((corner, corner + 2 + torch.rand(*shape, 2) * 30), -1)


def rois(images: int, count: int) -> Tensor:
    return torch.cat((torch.arange(count)[:, None] % max(images, 1), boxes_of(count)), 1)


def pyramid(images: int, channels: int, width: int = 12) -> list[Tensor]:
    return [torch.randn(images, channels, 8, width), torch.randn(images, channels, 4, 6)]


ENTRIES = [
    Entry("box_area", lambda _, n: {"boxes": boxes_of(n)}, ("boxes",), ("boxes",)),
    Entry(
        "box_iou",
        lambda _, n: {"boxes1": boxes_of(n), "boxes2": boxes_of(3)},
        ("boxes1", "boxes2"),
        ("boxes1", "boxes2"),
    ),
    Entry(
        "box_convert",
        lambda _, n: {"boxes": boxes_of(n), "in_fmt": "xyxy", "out_fmt": "cxcywh"},
        ("boxes",),
        ("boxes",),
    ),
    Entry("clip_boxes_to_image", lambda _, n: {"boxes": boxes_of(n), "size": (33, 44)}, ("boxes",), ("boxes",)),
    Entry(
        "remove_small_boxes",
        lambda _, n: {"boxes": boxes_of(n), "min_size": 12.0},
        any_dtype=("boxes",),
        ragged=True,
    ),
    Entry(
        "nms",
        lambda _, n: {"boxes": boxes_of(n), "scores": torch.rand(n), "iou_threshold": 0.2},
        ragged=True,
    ),
    Entry(
        "batched_nms",
        lambda _, n: {
            "boxes": boxes_of(n),
            "scores": torch.rand(n),
            "idxs": torch.arange(n) % 2,
            "iou_threshold": 0.2,
        },
        any_dtype=("idxs",),
        ragged=True,
    ),
    Entry(
        "nms_padded",
        lambda b, n: {
            "boxes": boxes_of(b, n),
            "scores": torch.rand(b, n),
            "iou_threshold": 0.2,
            "max_output": 4,
            "labels": torch.arange(b * n).view(b, n) % 2,
            "valid": torch.rand(b, n) < 0.8,
        },
    ),
    Entry(
        "soft_nms_padded",
        lambda b, n: {
            "boxes": boxes_of(b, n),
            "scores": torch.rand(b, n),
            "max_output": 4,
            "method": "gaussian",
            "labels": torch.arange(b * n).view(b, n) % 2,
            "valid": torch.rand(b, n) < 0.8,
        },
    ),
    Entry(
        "grid_anchors",
        lambda _, n: {
            "grid_sizes": [(4, n), (2, 3)],
            "strides": [(4, 4), (8.5, 8)],
            "cell_anchors": [boxes_of(3), boxes_of(3)],
        },
    ),
    Entry(
        "encode_boxes",
        lambda b, n: {"boxes": boxes_of(b, n), "anchors": boxes_of(b, n), "weights": (10.0, 10.0, 5.0, 5.0)},
        ("boxes", "anchors"),
    ),
    Entry(
        "decode_boxes",
        lambda b, n: {
            "deltas": torch.randn(b, n, 4),
            "anchors": boxes_of(b, n),
            "clip_to": torch.tensor([33, 44]).repeat(b, 1, 1),
        },
        ("deltas", "anchors"),
        any_dtype=("clip_to",),
    ),
    Entry(
        "match_boxes",
        lambda b, n: {
            "boxes": boxes_of(b, n),
            "gt_boxes": boxes_of(b, 3),
            "gt_valid": torch.rand(b, 3) < 0.7,
            "high": 0.5,
            "low": 0.3,
            "allow_low_quality": True,
        },
    ),
    Entry(
        "select_proposals",
        lambda b, n: {
            "logits": pyramid(b, 3, n),
            "deltas": pyramid(b, 12, n),
            "cell_anchors": [boxes_of(3) - 30, boxes_of(3) - 30],
            "strides": [(4, 4), (8, 8)],
            "image_sizes": torch.tensor([33, 44]).repeat(b, 1),
            "pre_nms_top_n": 9,
            "post_nms_top_n": 6,
            "max_proposals": 8,
            "nms_threshold": 0.7,
            "min_size": 1.0,
        },
    ),
    Entry(
        "multilevel_roi_align",
        lambda b, n: {
            "features": pyramid(b, 4),
            "boxes": boxes_of(b, n),
            "output_size": (3, 2),
            "scales": [0.25, 0.125],
            "sampling_ratio": 2,
            "aligned": True,
            "canonical_size": 24,
            "canonical_level": 3,
            "valid": torch.rand(b, n) < 0.8,
        },
        ("features",),
    ),
    Entry(
        "roi_align",
        lambda b, n: {
            "input": torch.randn(b, 4, 8, 12),
            "boxes": rois(b, n),
            "output_size": (3, 2),
            "spatial_scale": 0.25,
            "sampling_ratio": 2,
        },
        ("input",),
    ),
    Entry(
        "paste_masks",
        lambda _, n: {
            "masks": torch.rand(n, 7, 7),
            "boxes": boxes_of(n),
            "image_size": (33, 44),
            "threshold": None,
        },
    ),
    Entry(
        "heatmaps_to_keypoints",
        lambda _, n: {"heatmaps": torch.randn(n, 3, 8, 8), "boxes": boxes_of(n), "max_size": (33, 44)},
    ),
    Entry(
        "rasterize_polygons",
        lambda b, n: {
            "edges": torch.cat([x := torch.rand(b, 3, 7, 2) * 40, x.roll(-1, 2)], -1),
            "parts": torch.zeros(b, 3, 7, dtype=torch.int64),
            "num_parts": 1,
            "boxes": boxes_of(b, n),
            "matched": torch.arange(b * n).view(b, n) % 4 - 1,
            "side": 14,
        },
    ),
    Entry(
        "sample_balanced",
        lambda b, n: {"labels": torch.randint(-1, 2, (b, n)), "count": 4, "positive_fraction": 0.5},
    ),
    Entry(
        "focal_loss",
        lambda b, n: {"logits": torch.randn(b, n, 3), "labels": torch.randint(-1, 4, (b, n)), "gamma": 1.5},
        ("logits",),
    ),
    Entry(
        "sigmoid_focal_loss",
        lambda _, n: {"inputs": torch.randn(n, 3), "targets": torch.rand(n, 3)},
        ("inputs", "targets"),
    ),
]
FIXED = [entry for entry in ENTRIES if not entry.ragged]


def each(entries: list[Entry]):
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    """Integers equal; floating point to the rounding of another order of adding."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---- which operators there are, and their schemas

REGISTERED = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastrcnn::"))


class Calls(TorchFunctionMode):
    """What is called by name: composites, and with gradients still to be tracked."""

    def __init__(self, found: dict):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "namespace", None) == "fastrcnn":
            self.found.setdefault(func, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    """What is left below autograd, in the backward pass too."""

    def __init__(self, found: dict):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastrcnn":
            self.found.setdefault(func, tree_map_only(Tensor, Tensor.detach, (args, kwargs or {})))
        return func(*args, **(kwargs or {}))


def operators(entry: Entry, gradients: bool) -> dict[torch._ops.OpOverload, tuple[tuple, dict]]:
    """The operators behind a public function and its gradient, each with the arguments of its first call."""
    found = {}
    with Calls(found), Dispatches(found):
        entry.run(entry.inputs(gradients=gradients))
    return tree_map_only(Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad), found)


def test_every_operator_and_function_is_in_the_table():
    called = {op.name() for entry in ENTRIES for op in operators(entry, bool(entry.gradients))}
    assert sorted(called) == REGISTERED
    functions = [name for name in ops.__all__ if not isinstance(getattr(ops, name), type)]
    assert sorted(entry.name for entry in ENTRIES) == sorted(functions)


@pytest.mark.parametrize("name", REGISTERED)
def test_no_operator_writes_or_returns_its_arguments(name):
    schema = getattr(torch.ops.fastrcnn, name.removeprefix("fastrcnn::")).default._schema
    assert not schema.is_mutable
    assert all(argument.alias_info is None for argument in (*schema.arguments, *schema.returns))


@pytest.mark.parametrize(
    ("entry", "gradients"),
    [pytest.param(e, g, id=f"{e.name}-{g}") for e in ENTRIES for g in ((False, True) if e.gradients else (False,))],
)
def test_opcheck(entry, gradients):
    for op, (args, kwargs) in operators(entry, gradients).items():
        torch.library.opcheck(op, args, kwargs)


# ---- compilers


@each(ENTRIES)
def test_compiles_once_for_all_sizes(entry):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(getattr(ops, entry.name), fullgraph=True, backend=counter)
    with dynamo_config.patch(capture_dynamic_output_shape_ops=entry.ragged):
        for images, boxes in ((2, 5), (3, 7), (4, 9), (5, 11)):
            inputs = entry.inputs(images, boxes, gradients=True)
            torch.manual_seed(1)
            got = entry.run(inputs, compiled)
            torch.manual_seed(1)
            for a, b in zip(got, entry.run(inputs), strict=True):
                assert_same(a, b)
    assert counter.frame_count <= 2  # the first sizes, then any


class Module(torch.nn.Module):
    def __init__(self, entry: Entry):
        super().__init__()
        self.entry = entry

    def forward(self, inputs: dict[str, Any]):
        return getattr(ops, self.entry.name)(**inputs)


# what is left of them where PyTorch takes composites apart
COMPOSITES = dict.fromkeys(
    ("box_area", "box_iou", "box_convert", "clip_boxes_to_image", "remove_small_boxes", "sigmoid_focal_loss")
)
COMPOSITES |= {"roi_align": "multilevel_roi_align"}


def ours_in(program: torch.export.ExportedProgram) -> list[str]:
    return [name for node in program.graph.nodes if (name := str(node.target)).startswith("fastrcnn.")]


@each(ENTRIES)
def test_export_keeps_one_node(entry):
    program = torch.export.export(Module(entry), (entry.inputs(),))
    assert ours_in(program) == [f"fastrcnn.{entry.name}.default"]
    left = COMPOSITES.get(entry.name, entry.name)
    assert ours_in(program.run_decompositions()) == ([f"fastrcnn.{left}.default"] if left else [])


def test_export_decomposes_into_the_reference():
    entry = next(entry for entry in ENTRIES if entry.name == "encode_boxes")
    inputs = entry.inputs()
    operator = torch.ops.fastrcnn.encode_boxes.default
    program = torch.export.export(Module(entry), (inputs,))
    lowered = program.run_decompositions({operator: box_coder_reference.encode_boxes})
    assert not ours_in(lowered)
    assert_same([lowered.module()(inputs)], entry.run(inputs)[0])


@pytest.mark.skipif(
    DEVICE == "cpu" and not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler"
)
def test_inductor():
    torch._dynamo.reset()
    entry = next(entry for entry in ENTRIES if entry.name == "decode_boxes")
    inputs = entry.inputs(gradients=True)
    for got, want in zip(
        entry.run(inputs, torch.compile(ops.decode_boxes, fullgraph=True)), entry.run(inputs), strict=True
    ):
        assert_same(got, want)


@each(ENTRIES)
def test_fake_tensors_have_the_shapes_of_real_ones(entry):
    inputs = entry.inputs(gradients=True)
    want = entry.run(inputs)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        got = entry.run(tree_map_only(Tensor, mode.from_tensor, inputs))
    for fakes, reals in zip(got, want, strict=True):
        for fake, real in zip(fakes, reals, strict=True):
            assert (fake.dtype, fake.device, fake.dim()) == (real.dtype, real.device, real.dim())
            if not entry.ragged:
                assert (fake.shape, fake.stride()) == (real.shape, real.stride())


# ---- inputs of any kind


@pytest.mark.parametrize(("images", "boxes"), [(2, 0), (0, 5), (0, 0)])
@each(ENTRIES)
def test_nothing_gives_nothing(entry, images, boxes):
    inputs = entry.inputs(images, boxes, gradients=True)
    results, gradients = entry.run(inputs)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fakes, _ = entry.run(tree_map_only(Tensor, mode.from_tensor, inputs))
    if not entry.ragged:
        assert [x.shape for x in results] == [x.shape for x in fakes]
    assert all(x.isfinite().all() for x in (*results, *gradients))


def stretched(x: Tensor) -> Tensor:
    """The same values, none beside the next."""
    return torch.stack([x, x], -1)[..., 0]


def channels_last(x: Tensor) -> Tensor:
    return (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.mT.contiguous().mT if x.dim() > 1 else x
    )


@pytest.mark.parametrize("layout", [stretched, channels_last])
@each(ENTRIES)
def test_strides_change_nothing(entry, layout):
    inputs = entry.inputs()
    others = entry.track(tree_map_only(Tensor, lambda x: layout(x).detach(), inputs))
    torch.manual_seed(1)
    want = entry.run(entry.track(inputs))
    torch.manual_seed(1)
    for a, b in zip(entry.run(others), want, strict=True):
        assert_same(a, b)


def wrong(kind: str):
    """(entry, argument) for every tensor argument that has a wrong dtype, or a device to differ from."""
    for entry in ENTRIES:
        inputs = entry.sample(2, 5)
        tensors = {name: leaves for name, x in inputs.items() if isinstance((leaves := tree_leaves(x))[0], Tensor)}
        for name, leaves in tensors.items():
            several = len(tensors) > 1 or len(leaves) > 1
            if several if kind == "device" else name not in entry.any_dtype:
                yield pytest.param(entry, name, id=f"{entry.name}-{name}")


def assert_names(entry: Entry, inputs: dict[str, Any], argument: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        entry.run(inputs)
    assert re.search(rf"\b{argument}\b", str(error.value)), f"{argument} is not named: {error.value}"


@pytest.mark.parametrize(("entry", "argument"), list(wrong("dtype")))
def test_wrong_dtype_is_named(entry, argument):
    inputs = entry.inputs()
    dtype = torch.int64 if tree_leaves(inputs[argument])[0].is_floating_point() else torch.float32
    inputs[argument] = tree_map_only(Tensor, lambda x: x.to(dtype), inputs[argument])
    assert_names(entry, inputs, argument)


@pytest.mark.parametrize(("entry", "argument"), list(wrong("device")))
def test_wrong_device_is_named(entry, argument):
    inputs = entry.inputs()
    *rest, last = leaves = tree_leaves(inputs[argument])
    inputs[argument] = [*rest, last.to("meta")] if isinstance(inputs[argument], list) else leaves[0].to("meta")
    assert_names(entry, inputs, argument)


# ---- CUDA


@pytest.mark.gpu
@each(FIXED)
def test_cuda_graph_replays_with_other_inputs(entry):
    inputs, others = entry.inputs(gradients=True), entry.inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile and allocate before the capture
        for _ in range(2):
            entry.run(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = entry.run(inputs)
    with torch.no_grad():
        for into, value in zip(tree_leaves(inputs), tree_leaves(others), strict=True):
            if isinstance(into, Tensor):
                into.copy_(value)
    torch.cuda.manual_seed(1)
    graph.replay()
    torch.cuda.manual_seed(1)
    for got, want in zip(captured, entry.run(inputs), strict=True):
        assert_same(got, want)


@pytest.mark.gpu
@each(FIXED)
def test_no_operator_waits_for_the_device(entry):
    inputs = entry.inputs(gradients=True)
    entry.run(inputs)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        entry.run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
