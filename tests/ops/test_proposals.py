"""Proposal selection: torchvision's RegionProposalNetwork, the per-image definition, bad numbers, compilers."""

import pytest
import torch
from support import DEVICE
from torch._subclasses import FakeTensorMode
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork

from fastrcnn.ops import decode_boxes, grid_anchors, select_proposals
from fastrcnn.ops.reference import proposals as reference

SIZES = [(12, 15), (6, 8), (2, 3)]
STRIDES = [(8.0, 8.0), (16.0, 15.0), (32.0, 40.0)]
IMAGE_SIZES = [(96, 120), (70, 100)]
OPTIONS = {"pre_nms_top_n": 60, "post_nms_top_n": 40, "max_proposals": 50, "nms_threshold": 0.6, "min_size": 1e-3}


def outputs(batch: int = 2, dtype: torch.dtype = torch.float32) -> dict:
    """What a region proposal network hands over, for three levels with 3, 3 and 1 anchors per position."""
    counts = (3, 3, 1)
    cells = [
        torch.tensor([[-1, -1, 1, 1], [-2, -1, 2, 1], [-1, -2, 1, 2]])[:a] * 8.0 * 2**i for i, a in enumerate(counts)
    ]
    return {
        "logits": [torch.randn(batch, a, *s, dtype=dtype).to(DEVICE) for a, s in zip(counts, SIZES, strict=True)],
        "deltas": [
            0.5 * torch.randn(batch, 4 * a, *s, dtype=dtype).to(DEVICE) for a, s in zip(counts, SIZES, strict=True)
        ],
        "cell_anchors": [c.to(DEVICE, dtype) for c in cells],
        "strides": STRIDES,
        "image_sizes": torch.tensor(IMAGE_SIZES, device=DEVICE)[:batch],
    }


def by_definition(logits, deltas, cell_anchors, strides, image_sizes, weights=(1.0,) * 4, per_batch=False, **options):
    flat = [s for stride in strides for s in stride]
    options = [options[name] for name in OPTIONS]
    return reference.select_proposals(
        logits, deltas, cell_anchors, image_sizes, flat, *options, list(weights), per_batch
    )


def assert_same(got, want):
    assert got[2].equal(want[2])
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"max_proposals": 500}, {"post_nms_top_n": 7}, {"pre_nms_top_n": 2000}, {"min_size": 20.0}],
    ids=str,
)
def test_equal_to_the_definition(changes, per_batch):
    options = OPTIONS | changes
    network = outputs()
    got = select_proposals(**network, **options, weights=(10.0, 10.0, 5.0, 5.0), per_batch=per_batch)
    want = by_definition(**network, **options, weights=(10.0, 10.0, 5.0, 5.0), per_batch=per_batch)
    per_level = [min(options["post_nms_top_n"], options["pre_nms_top_n"], n) for n in (540, 144, 6)]
    total = min(options["max_proposals"], sum(per_level))
    assert [tuple(x.shape) for x in got] == [(2, total, 4), (2, total), (2, total)]
    assert got[2].any()
    assert_same(got, want)


@pytest.mark.parametrize(("pre", "maximum"), [(60, 50), (200, 1000), (200, 120)])
def test_equal_to_torchvision(pre, maximum):
    network = outputs()
    shared = {"training": maximum, "testing": maximum}
    theirs = RegionProposalNetwork(
        AnchorGenerator(), torch.nn.Identity(), 0.7, 0.3, 256, 0.5, {"training": pre, "testing": pre}, shared, 0.7
    )
    anchors = grid_anchors(SIZES, STRIDES, network["cell_anchors"])
    counts = [a * h * w for a, (h, w) in zip((3, 3, 1), SIZES, strict=True)]
    logits = torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in network["logits"]], 1)
    deltas = torch.cat([x.permute(0, 2, 3, 1).reshape(2, -1, 4) for x in network["deltas"]], 1)
    proposals = theirs.box_coder.decode(deltas.reshape(-1, 4), [anchors, anchors]).view(2, -1, 4)
    boxes, scores = theirs.filter_proposals(proposals, logits, IMAGE_SIZES, counts)

    options = OPTIONS | {
        "pre_nms_top_n": pre,
        "post_nms_top_n": maximum,
        "max_proposals": maximum,
        "nms_threshold": 0.7,
    }
    got_boxes, got_scores, valid = select_proposals(**network, **options)
    for image in range(2):
        assert valid[image].sum() == len(boxes[image]) > 10
        torch.testing.assert_close(got_boxes[image][valid[image]], boxes[image], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(got_scores[image][valid[image]], scores[image])


def test_one_box_by_hand():
    """The best anchor of a 2 × 3 grid, moved by half its width and clipped."""
    logits = torch.full((1, 2, 2, 3), -9.0, device=DEVICE)
    deltas = torch.zeros(1, 8, 2, 3, device=DEVICE)
    logits[0, 1, 1, 2] = 2.0
    deltas[0, 4, 1, 2] = 0.5
    cells = torch.tensor([[-4.0, -4, 4, 4], [-10, -5, 10, 5]], device=DEVICE)
    boxes, scores, valid = select_proposals(
        [logits],
        [deltas],
        [cells],
        [(16, 20)],
        torch.tensor([[18, 52]], device=DEVICE),
        **OPTIONS | {"max_proposals": 1},
    )
    assert boxes.tolist() == [[[40.0, 11.0, 52.0, 18.0]]]  # centre (40 + 10, 16), sides 20 × 10, in an image of 52 × 18
    torch.testing.assert_close(scores, torch.sigmoid(torch.tensor([[2.0]], device=DEVICE)))
    assert valid.all()


def test_sorted_and_zero_where_invalid():
    boxes, scores, valid = select_proposals(**outputs(), **OPTIONS | {"max_proposals": 1000, "min_size": 14.0})
    assert valid.any()
    assert not valid.all()
    assert (scores.diff(dim=1) <= 0).all()
    assert (boxes[~valid] == 0).all()
    assert (scores[~valid] == 0).all()
    sides = (boxes[..., 2:] - boxes[..., :2])[valid]
    assert (sides >= 14.0).all()


def test_per_batch_keeps_the_best_of_all_images():
    network = outputs()
    network["logits"] = [x + torch.tensor([3.0, 0.0], device=DEVICE)[:, None, None, None] for x in network["logits"]]
    _, scores, valid = select_proposals(**network, **OPTIONS)
    _, batch_scores, batch_valid = select_proposals(**network, **OPTIONS, per_batch=True)
    assert valid.sum() == 100
    assert batch_valid.sum() == 50
    assert batch_valid[0].sum() > batch_valid[1].sum()
    assert batch_scores[batch_valid].sort().values.equal(scores[valid].sort().values[-50:])


def test_numbers_that_are_not_finite_are_dropped():
    network = outputs()
    clean = select_proposals(**network, **OPTIONS)
    bad = {"logits": [x.clone() for x in network["logits"]], "deltas": [x.clone() for x in network["deltas"]]}
    for value, x in ((float("nan"), 1), (float("inf"), 2), (float("-inf"), 3)):
        bad["logits"][0][:, :, 3, x] = value
        for channel in range(4):
            bad["deltas"][1][:, channel::4, 2 + channel % 2, x] = value
    boxes, scores, valid = select_proposals(**network | bad, **OPTIONS)
    assert boxes.isfinite().all()
    assert scores.isfinite().all()
    assert_same((boxes, scores, valid), by_definition(**network | bad, **OPTIONS))
    assert not boxes.equal(clean[0])

    nothing = [torch.full_like(x, float("nan")) for x in network["logits"]]
    boxes, scores, valid = select_proposals(**network | {"logits": nothing}, **OPTIONS)
    assert not valid.any()
    assert (boxes == 0).all()


def operator_arguments(network, per_batch=False) -> tuple:
    strides = [s for stride in STRIDES for s in stride]
    tensors = [network[name] for name in ("logits", "deltas", "cell_anchors", "image_sizes")]
    return *tensors, strides, *OPTIONS.values(), [1.0, 1.0, 1.0, 1.0], per_batch


@pytest.mark.filterwarnings("error")
def test_no_gradient():
    network = outputs()
    for x in network["logits"] + network["deltas"] + network["cell_anchors"]:
        x.requires_grad_()
    for found in (
        select_proposals(**network, **OPTIONS),
        torch.ops.fastrcnn.select_proposals(*operator_arguments(network)),
    ):
        assert not any(x.requires_grad for x in found)


def test_memory_format_does_not_matter():
    network = outputs()
    nhwc = {
        name: [x.contiguous(memory_format=torch.channels_last) for x in network[name]] for name in ("logits", "deltas")
    }
    for got, want in zip(
        select_proposals(**network | nhwc, **OPTIONS), select_proposals(**network, **OPTIONS), strict=True
    ):
        assert got.equal(want)


def test_precisions():
    network = outputs(dtype=torch.float64)
    assert select_proposals(**network, **OPTIONS)[0].dtype == torch.float64
    low = {n: [x.half() for x in network[n]] for n in ("logits", "deltas")}
    low["cell_anchors"] = [x.float() for x in network["cell_anchors"]]
    wide = {n: [x.float() for x in low[n]] for n in ("logits", "deltas")} | {"cell_anchors": low["cell_anchors"]}
    got = select_proposals(**network | low, **OPTIONS)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert_same(got, select_proposals(**network | wide, **OPTIONS))


def test_empty_batch_and_empty_level():
    network = outputs()
    none = {n: [x[:0] for x in network[n]] for n in ("logits", "deltas")} | {"image_sizes": network["image_sizes"][:0]}
    assert [tuple(x.shape) for x in select_proposals(**network | none, **OPTIONS)] == [(0, 50, 4), (0, 50), (0, 50)]
    empty = {n: [*network[n][:2], network[n][2][:, :, :0]] for n in ("logits", "deltas")}
    short = {n: network[n][:2] for n in ("logits", "deltas", "cell_anchors", "strides")}
    assert_same(select_proposals(**network | empty, **OPTIONS), select_proposals(**network | short, **OPTIONS))


def test_errors():
    network = outputs()
    with pytest.raises(ValueError, match="got 3, 3, 2 and 3"):
        select_proposals(**network | {"cell_anchors": network["cell_anchors"][:2]}, **OPTIONS)
    cells = [c[:2] if i == 1 else c for i, c in enumerate(network["cell_anchors"])]
    with pytest.raises(ValueError, match="level 1: 2 cell anchors"):
        select_proposals(**network | {"cell_anchors": cells}, **OPTIONS)
    with pytest.raises(ValueError, match=r"level 2: 1 cell anchors want logits \[2, 1, h, w\] .* got \[1, 1, 2, 3\]"):
        select_proposals(**network | {"logits": [*network["logits"][:2], network["logits"][2][:1]]}, **OPTIONS)
    for name, change, wanted in (
        ("image_sizes", lambda x: x[:1], r"image_sizes must be \[B, 2\] = \[2, 2\], got \[1, 2\]"),
        ("image_sizes", lambda x: x.float(), "image_sizes must be integers, got torch.float32"),
        ("image_sizes", lambda x: x.to("meta"), r"image_sizes must be on the device of logits\[0\], .*, got meta"),
        ("deltas", lambda x: [*x[:2], x[2].long()], r"deltas\[2\] must be of floating point, got torch.int64"),
        ("cell_anchors", lambda x: [x[0].to("meta"), *x[1:]], r"cell_anchors\[0\] must be on the device of logits"),
        ("cell_anchors", lambda x: [x[0][:, :3], *x[1:]], r"cell_anchors\[0\] must be \[A, 4\], got \[3, 3\]"),
        ("logits", lambda x: [x[0][0], *x[1:]], "level 0: 3 cell anchors want logits"),
    ):
        with pytest.raises(ValueError, match=wanted):
            select_proposals(**network | {name: change(network[name])}, **OPTIONS)
    with pytest.raises(ValueError, match="weights must be 4 numbers"):
        select_proposals(**network, **OPTIONS, weights=(1.0, 1.0))
    with pytest.raises(ValueError, match="post_nms_top_n must not be negative, got -1"):
        select_proposals(**network, **OPTIONS | {"post_nms_top_n": -1})


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(gradient):
    network = outputs()
    for x in network["logits"] + network["deltas"]:
        x.requires_grad_(gradient)
    torch.library.opcheck(torch.ops.fastrcnn.select_proposals.default, operator_arguments(network, per_batch=True))


def test_exports_to_one_node():
    class Model(torch.nn.Module):
        def forward(self, network):
            return select_proposals(**network, strides=STRIDES, **OPTIONS)

    network = outputs()
    del network["strides"]
    program = torch.export.export(Model(), (network,))
    ours = [node for node in program.graph.nodes if "fastrcnn" in str(node.target)]
    assert [node.target for node in ours] == [torch.ops.fastrcnn.select_proposals.default]
    assert all(map(torch.equal, program.module()(network), Model()(network)))


def test_order_does_not_end_where_the_score_is_one():
    """Logits beyond 17 have float32 score 1: the greater still comes first."""
    network = outputs()
    network["logits"] = [x + 100 * (level + 1) for level, x in enumerate(network["logits"])]
    boxes, scores, valid = select_proposals(**network, **OPTIONS)
    assert scores[valid].eq(1).all()
    last = {name: network[name][2:] for name in ("logits", "deltas", "cell_anchors", "strides")}
    want, _, of_last = select_proposals(**network | last, **OPTIONS)
    count = int(of_last[0].sum())
    assert boxes[0, :count].equal(want[0, :count])


def test_compiles():
    network = outputs()
    compiled = torch.compile(select_proposals, fullgraph=True, backend="aot_eager", dynamic=True)
    smaller = network | {name: [x[..., 1:] for x in network[name]] for name in ("logits", "deltas")}
    for inputs in (network, smaller):
        for got, want in zip(compiled(**inputs, **OPTIONS), select_proposals(**inputs, **OPTIONS), strict=True):
            assert got.equal(want)


def test_traces_without_data():
    with FakeTensorMode(allow_non_fake_inputs=False):
        got = select_proposals(**outputs(), **OPTIONS)
        assert [tuple(x.shape) for x in got] == [(2, 50, 4), (2, 50), (2, 50)]


def test_proposals_lie_in_their_image():
    boxes, _, valid = select_proposals(**outputs(), **OPTIONS)
    for image, (h, w) in enumerate(IMAGE_SIZES):
        inside = decode_boxes(torch.zeros_like(boxes[image]), boxes[image], clip_to=(h, w))
        torch.testing.assert_close(inside[valid[image]], boxes[image][valid[image]], rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_no_host_synchronisation():
    network = outputs()
    want = select_proposals(**network, **OPTIONS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = select_proposals(**network, **OPTIONS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(got, want)
