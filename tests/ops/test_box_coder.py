import math

import pytest
import torch
from support import DEVICE, TOLERANCES, assert_accurate
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torchvision.models.detection._utils import BoxCoder as TorchvisionCoder

from fastrcnn.ops import _library
from fastrcnn.ops.box_coder import (
    DECODE,
    DECODE_BACKWARD,
    ENCODE,
    ENCODE_BACKWARD,
    BoxCoder,
    decode_boxes,
    encode_boxes,
)

WEIGHTS = (10.0, 8.0, 5.0, 4.0)
# on the CPU the same operations as torchvision's; the kernels divide and exponentiate in their own way
EXACT = DEVICE == "cpu" and _library.MODE != "interpret"
LIMITS = {"rtol": 0, "atol": 0} if EXACT else {"rtol": 1e-5, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _on_device():
    with torch.device(DEVICE):
        yield


def random_boxes(*shape, dtype=torch.float32):
    corner = torch.rand(*shape, 2, dtype=torch.float64) * 100
    return torch.cat((corner, corner + 4 + torch.rand(*shape, 2, dtype=torch.float64) * 60), -1).to(dtype)


def by_hand(delta, anchor, weights, size, last=0):
    """One box in plain Python; last: 1 for inclusive boxes."""
    dx, dy, dw, dh = (d / w for d, w in zip(delta, weights, strict=True))
    w, h = anchor[2] - anchor[0] + last, anchor[3] - anchor[1] + last
    x, y = (anchor[0] + anchor[2] + last) / 2 + dx * w, (anchor[1] + anchor[3] + last) / 2 + dy * h
    w, h = w * math.exp(min(dw, math.log(62.5))) / 2, h * math.exp(min(dh, math.log(62.5))) / 2
    corners = [x - w, y - h, x + w - last, y + h - last]
    return [min(max(c, 0), size[1 - i % 2] - last) for i, c in enumerate(corners)] if size else corners


def test_equals_torchvision():
    boxes, anchors = random_boxes(50), random_boxes(50)
    coder = TorchvisionCoder(WEIGHTS)
    deltas = encode_boxes(boxes, anchors, WEIGHTS)
    torch.testing.assert_close(deltas, coder.encode_single(boxes, anchors), **LIMITS)
    deltas = torch.randn(50, 4 * 3) * 8  # some over the limit of dw, dh
    got = decode_boxes(deltas.view(50, 3, 4), anchors[:, None], WEIGHTS)
    torch.testing.assert_close(got, coder.decode_single(deltas, anchors).view(50, 3, 4), **LIMITS)


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("clip", [None, (70, 90)])
def test_decode_by_hand(clip, inclusive):
    deltas, anchors = torch.randn(20, 4, dtype=torch.float64) * 10, random_boxes(20, dtype=torch.float64)
    want = [
        by_hand(d, a, WEIGHTS, clip, int(inclusive)) for d, a in zip(deltas.tolist(), anchors.tolist(), strict=True)
    ]
    got = decode_boxes(deltas, anchors, WEIGHTS, clip, inclusive)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(decode_boxes(deltas.float(), anchors.float(), WEIGHTS, clip, inclusive), got.float())


def test_inclusive_golden_values():
    """The boxes that maskrcnn-benchmark and Caffe2 hold their decoders to, and a pair worked out by hand."""
    anchors = torch.tensor(
        [[175.62031555, 20.91103172, 253.352005, 155.0145874], [181.77426147, 199.82876587, 192.88427734, 214.0255127]]
    )
    deltas = torch.tensor(
        [[0.47861834, 0.13992102, 0.14961673, 0.71495209], [-0.03852064, 0.44466892, 0.49492538, 0.71409376]]
    )
    want = torch.tensor(
        [[206.949539, -30.715202, 297.387665, 244.448486], [177.430283, 198.666245, 196.295273, 228.703079]]
    )
    torch.testing.assert_close(decode_boxes(deltas, anchors, inclusive=True), want, rtol=0, atol=1e-4)
    torch.testing.assert_close(encode_boxes(want, anchors, inclusive=True), deltas, rtol=0, atol=1e-5)
    coder = BoxCoder((1.0,) * 4, inclusive=True)
    torch.testing.assert_close(coder.decode(deltas, anchors), want, rtol=0, atol=1e-4)
    torch.testing.assert_close(coder.encode(want, anchors), deltas, rtol=0, atol=1e-5)
    anchor, box = torch.tensor([[0.0, 0, 9, 19]]), torch.tensor([[5.0, 0, 24, 9]])  # 10 × 20 and 20 × 10 pixels
    deltas = torch.tensor([[1.0, -0.25, math.log(2), -math.log(2)]])  # centres (5, 10) and (15, 5)
    torch.testing.assert_close(encode_boxes(box, anchor, inclusive=True), deltas)
    torch.testing.assert_close(decode_boxes(deltas, anchor, inclusive=True), box)
    inside = decode_boxes(deltas * 2, anchor, clip_to=(15, 30), inclusive=True)  # 40 × 5 around (25, 0)
    torch.testing.assert_close(inside, torch.tensor([[5.0, 0, 29, 1.5]]))


def test_clip_to_tensor_broadcasts():
    deltas, anchors = torch.randn(2, 5, 3, 4), random_boxes(2, 5, 1)
    sizes = torch.tensor([[60, 80], [50, 120]], dtype=torch.int32)
    got = decode_boxes(deltas, anchors, clip_to=sizes[:, None, None])
    for image, size in enumerate(sizes.tolist()):
        torch.testing.assert_close(got[image], decode_boxes(deltas[image], anchors[image], clip_to=tuple(size)))
    assert got[0, ..., 1::2].max() == 60
    assert got[1, ..., 0::2].max() <= 120
    assert got.min() == 0


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_accuracy(dtype):
    boxes, anchors, deltas = (
        random_boxes(200, dtype=dtype),
        random_boxes(200, dtype=dtype),
        torch.randn(200, 4).to(dtype),
    )
    encoded = encode_boxes(boxes, anchors, WEIGHTS)
    decoded = decode_boxes(deltas, anchors, WEIGHTS, (80, 90))
    assert encoded.dtype == decoded.dtype == dtype
    assert_accurate(encoded, encode_boxes(boxes.double(), anchors.double(), WEIGHTS), dtype)
    assert_accurate(decoded, decode_boxes(deltas.double(), anchors.double(), WEIGHTS, (80, 90)), dtype)


def test_half_deltas_with_float_anchors():
    deltas, anchors = torch.randn(30, 4).half(), random_boxes(30)
    got = decode_boxes(deltas, anchors)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, decode_boxes(deltas.float(), anchors), rtol=0, atol=0)
    assert encode_boxes(anchors, anchors.half()).dtype == torch.float32


@pytest.mark.parametrize("inclusive", [False, True])
def test_gradcheck(inclusive):
    boxes, anchors = random_boxes(3, 4, dtype=torch.float64), random_boxes(4, dtype=torch.float64)
    deltas = torch.randn(3, 4, 4, dtype=torch.float64)
    for x in (boxes, anchors, deltas):
        x.requires_grad_()
    sizes = torch.tensor([[70, 80], [60, 90], [90, 50]])[:, None]
    check = torch.autograd.gradcheck
    check(lambda b, a: encode_boxes(b, a, WEIGHTS, inclusive), (boxes, anchors))
    check(lambda d, a: decode_boxes(d, a, WEIGHTS, None, inclusive), (deltas, anchors))
    check(lambda d, a: decode_boxes(d, a, WEIGHTS, (70, 80), inclusive), (deltas, anchors))
    check(lambda d, a: decode_boxes(d, a, WEIGHTS, sizes, inclusive), (deltas[:, :1], anchors))
    check(lambda d: decode_boxes(d, anchors.detach(), WEIGHTS, sizes, inclusive), (deltas,))
    check(lambda a: encode_boxes(boxes.detach(), a, WEIGHTS, inclusive), (anchors[:1],))


def test_no_gradient_through_clamps():
    anchors = torch.tensor([[10.0, 10, 30, 30]])
    deltas = torch.tensor([[0.0, 0, 5, 1]], requires_grad=True)  # dw over log(62.5)
    decode_boxes(deltas, anchors)[..., 2:].sum().backward()
    assert deltas.grad[0, 2] == 0
    assert deltas.grad[0, 3] > 0
    deltas = torch.zeros(1, 4, requires_grad=True)
    decode_boxes(deltas, anchors, clip_to=(100, 25))[:, 2].sum().backward()  # x2 = 30 is cut at 25
    assert deltas.grad.abs().max() == 0


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    weights, sizes = list(WEIGHTS), torch.full((2, 1, 2), 90, dtype=torch.int32)
    boxes, anchors, deltas = random_boxes(2, 7), random_boxes(7), torch.randn(2, 7, 4)
    halves = deltas.half()
    for x in (boxes, anchors, deltas, halves):
        x.requires_grad_(requires_grad)
    for inclusive in (False, True):
        opcheck(ENCODE, (boxes, anchors, weights, inclusive))
        opcheck(DECODE, (deltas, anchors, None, weights, 4.0, None, inclusive))
        opcheck(DECODE, (deltas, anchors.detach(), None, weights, 4.0, [60, 80], inclusive))
        opcheck(DECODE, (halves, anchors, sizes, weights, 4.0, None, inclusive))
    grad = torch.randn(2, 7, 4)
    boxes, anchors, deltas, halves = (x.detach() for x in (boxes, anchors, deltas, halves))
    for of_anchors in (False, True):
        opcheck(ENCODE_BACKWARD, (grad, boxes, anchors, weights, False, of_anchors))
        opcheck(DECODE_BACKWARD, (grad, halves, anchors, sizes, weights, 4.0, None, True, of_anchors))
        opcheck(DECODE_BACKWARD, (grad, deltas, anchors, None, weights, 4.0, [60, 80], False, of_anchors))


def test_compiles():
    def step(deltas, anchors, boxes, sizes):
        return encode_boxes(boxes, decode_boxes(deltas, anchors[None], WEIGHTS, sizes[:, None])).square().sum()

    sizes = torch.tensor([[500, 600], [400, 300]])
    deltas, anchors, boxes = torch.randn(2, 9, 4), random_boxes(9), random_boxes(2, 9)
    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = deltas.clone().requires_grad_()
        function(leaf, anchors, boxes, sizes).backward()
        grads.append(leaf.grad)
    assert grads[0].abs().min() > 0
    torch.testing.assert_close(*grads)


def test_box_coder_compiles():
    def there_and_back(coder, boxes, anchors):
        return coder.decode(coder.encode(boxes, anchors), anchors)

    coder, boxes, anchors = BoxCoder(WEIGHTS), random_boxes(9), random_boxes(9)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(coder, boxes, anchors), boxes)
    coder = BoxCoder(WEIGHTS, bbox_xform_clip=-1.0)
    torch.testing.assert_close(compiled(coder, boxes, anchors), there_and_back(coder, boxes, anchors))


def test_dynamic_shapes_do_not_recompile():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decode_boxes, fullgraph=True, backend=counter, dynamic=True)
    captures = []
    for rows, size in ((5, (40, 50)), (8, (30, 70)), (11, (90, 60))):
        deltas, anchors = torch.randn(rows, 4), random_boxes(rows)
        got = compiled(deltas, anchors, WEIGHTS, size)
        torch.testing.assert_close(got, decode_boxes(deltas, anchors, WEIGHTS, size))
        captures.append(counter.frame_count)
    assert captures[0] == captures[2] > 0


def test_fake_tensors():
    with FakeTensorMode():
        deltas = torch.empty(2, 9, 3, 4, dtype=torch.bfloat16, requires_grad=True)
        out = decode_boxes(deltas, torch.empty(9, 1, 4), WEIGHTS, torch.empty(2, 1, 1, 2, dtype=torch.int32))
        assert out.shape == (2, 9, 3, 4)
        assert out.dtype == torch.float32
        out.sum().backward()
        assert deltas.grad.dtype == torch.bfloat16


def test_empty_and_non_contiguous():
    assert encode_boxes(torch.empty(0, 4), torch.empty(0, 4)).shape == (0, 4)
    assert decode_boxes(torch.empty(2, 0, 4), torch.empty(0, 4), clip_to=(5, 5)).shape == (2, 0, 4)
    assert BoxCoder(WEIGHTS).decode(torch.empty(0, 12), torch.empty(0, 4)).shape == (0, 12)
    leaf = torch.randn(4, 6).requires_grad_()
    anchors = random_boxes(6)
    decode_boxes(leaf.t(), anchors).sum().backward()  # the gradient of a sum is an expanded tensor
    copy = leaf.detach().t().contiguous().requires_grad_()
    torch.testing.assert_close(decode_boxes(leaf.t(), anchors), decode_boxes(copy, anchors))
    decode_boxes(copy, anchors).sum().backward()
    torch.testing.assert_close(leaf.grad, copy.grad.t())


def test_nan_and_infinity_stay_in_their_box():
    deltas = torch.zeros(4, 4)
    deltas[0, 0], deltas[1, 2], deltas[2, 3] = math.nan, math.nan, math.inf
    anchors = torch.tensor([8.0, 8, 16, 16]).expand(4, 4)
    got = decode_boxes(deltas, anchors, clip_to=(1000, 1000))
    assert got[0, 0::2].isnan().all()
    assert got[1, 0::2].isnan().all()
    torch.testing.assert_close(got[2], torch.tensor([8.0, 0, 16, 262]))
    torch.testing.assert_close(got[3], anchors[3])


def test_box_coder():
    boxes, anchors = random_boxes(6), random_boxes(6)
    coder = BoxCoder(WEIGHTS)
    deltas = coder.encode(boxes, anchors)
    torch.testing.assert_close(deltas, encode_boxes(boxes, anchors, WEIGHTS))
    both = coder.decode(torch.cat((deltas, torch.zeros(6, 4)), 1), anchors)
    torch.testing.assert_close(both, torch.cat((boxes, anchors), 1))
    growth = BoxCoder((1.0,) * 4, bbox_xform_clip=math.log(2)).decode(torch.full((1, 4), 9.0), anchors[:1])
    torch.testing.assert_close(growth[:, 2:] - growth[:, :2], 2 * (anchors[:1, 2:] - anchors[:1, :2]))


def test_errors():
    boxes = torch.rand(3, 4)
    with pytest.raises(ValueError, match=r"boxes and anchors .* \[3, 5\]"):
        encode_boxes(torch.rand(3, 5), boxes)
    with pytest.raises(ValueError, match=r"deltas and anchors .* \[2, 4\] and \[3, 4\]"):
        decode_boxes(boxes[:2], boxes)
    with pytest.raises(ValueError, match=r"anchors must be of floating point, got torch\.int64"):
        encode_boxes(boxes, boxes.long())
    with pytest.raises(ValueError, match="anchors must be on the device of deltas"):
        decode_boxes(boxes, boxes.to("meta"))
    with pytest.raises(ValueError, match="clip_to must be on the device of deltas"):
        decode_boxes(boxes, boxes, clip_to=torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="weights"):
        decode_boxes(boxes, boxes, (1.0, 1.0))
    with pytest.raises(ValueError, match=r"clip_to .* \[3, 2\], got \[3\]"):
        decode_boxes(boxes, boxes, clip_to=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"clip_to .* \[3, 2\], got \[5, 1, 2\]"):
        decode_boxes(boxes, boxes, clip_to=torch.ones(5, 1, 2))
    with pytest.raises(ValueError, match=r"clip_to .* got \(5,\)"):
        decode_boxes(boxes, boxes, clip_to=(5,))
    with pytest.raises(ValueError, match=r"rel_codes .* \[3, 6\]"):
        BoxCoder(WEIGHTS).decode(torch.rand(3, 6), boxes)


def step(deltas, anchors, boxes, sizes):
    """Both coders, both ways; -> losses and gradients."""
    leaf = deltas.detach().requires_grad_()
    decoded = decode_boxes(leaf, anchors, WEIGHTS, sizes[:, None])
    inside = decode_boxes(leaf, anchors, WEIGHTS, (50, 60), inclusive=True)
    encoded = encode_boxes(boxes, anchors, WEIGHTS)
    (grad,) = torch.autograd.grad(decoded.square().sum() + inside.sum(), leaf)
    return decoded, inside, encoded, grad


@pytest.mark.gpu
def test_no_host_synchronisation_and_graph():
    def inputs():
        sizes = torch.tensor([[60, 80], [90, 50]], dtype=torch.int32)
        return torch.randn(2, 999, 4), random_boxes(999), random_boxes(2, 999), sizes

    static = inputs()
    step(*static)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*static)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*static)
    for _ in range(2):
        changed = inputs()
        for old, new in zip(static, changed, strict=True):
            old.copy_(new)
        graph.replay()
        want = step(*(x.cpu() for x in changed))
        torch.testing.assert_close([x.cpu() for x in results], list(want), rtol=1e-5, atol=1e-4)
