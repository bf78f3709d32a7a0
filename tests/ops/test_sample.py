import pytest
import torch
from support import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from fastrcnn.ops.sample import SAMPLE, sample_balanced


def random_labels(*shape):
    return torch.randint(-1, 2, shape, device=DEVICE)


def check(labels, count, fraction, indices, weights):
    """The rule, image by image."""
    slots = min(count, labels.shape[1])
    assert indices.shape == weights.shape == (labels.shape[0], slots)
    assert indices.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert ((indices >= 0) & (indices < labels.shape[1])).all()
    for label, index, weight in zip(labels, indices, weights, strict=True):
        positives = min(int((label > 0).sum()), int(count * fraction))
        negatives = min(int((label == 0).sum()), count - positives)
        chosen = label[index[weight == 1]].sign().tolist()
        assert chosen == ([1] * positives + [0] * negatives)[:slots]
        assert weight.tolist() == [1.0] * len(chosen) + [0.0] * (slots - len(chosen))
        assert len(set(index[weight == 1].tolist())) == len(chosen)


@pytest.mark.parametrize("count", [0, 1, 8, 40, 1000])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8])
def test_rule(count, fraction, dtype):
    labels = random_labels(6, 40)
    labels[0], labels[1], labels[2] = 1, 0, -1
    labels[3] = torch.tensor([5, 1, 0, -2, *[-1] * 36], device=DEVICE)
    labels = labels.to(dtype)
    check(labels, count, fraction, *sample_balanced(labels, count, fraction))


def test_exhaustive():
    labels = random_labels(3, 50)
    indices, weights = sample_balanced(labels, 10**6, 0.5)
    for label, index, weight in zip(labels, indices, weights, strict=True):
        want = (label >= 0).nonzero()[:, 0]
        torch.testing.assert_close(index[weight == 1].sort().values, want)


def test_every_choice_is_equally_likely():
    labels = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0, 0, -1]], device=DEVICE).expand(20000, -1)
    indices, weights = sample_balanced(labels, 4, 0.5)
    assert (weights == 1).all()
    frequency = torch.bincount(indices.flatten(), minlength=10) / 20000
    want = torch.tensor([2 / 4] * 4 + [2 / 5] * 5 + [0], device=DEVICE)
    torch.testing.assert_close(frequency.float(), want, atol=0.02, rtol=0)


def test_generator_decides():
    labels = random_labels(2, 300)
    draw = [sample_balanced(labels, 32, 0.5, torch.Generator(DEVICE).manual_seed(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_zero_sizes(shape):
    indices, weights = sample_balanced(torch.zeros(shape, dtype=torch.int64, device=DEVICE), 4, 0.5)
    assert indices.shape == weights.shape == (shape[0], min(4, shape[1]))


def test_opcheck_compile_and_fake():
    labels, noise = random_labels(3, 30), torch.rand(3, 30, device=DEVICE)
    for count, fraction in ((8, 0.25), (64, 0.5), (5, 0.0)):
        opcheck(SAMPLE, (labels, noise, count, fraction))
    opcheck(SAMPLE, (random_labels(30, 3).t(), noise, 8, 0.25))
    compiled = torch.compile(sample_balanced, fullgraph=True, backend="aot_eager")
    check(labels, 8, 0.25, *compiled(labels, 8, 0.25))
    # a generator breaks the graph, but changes nothing else
    compiled = torch.compile(sample_balanced, backend="aot_eager")
    got, want = (f(labels, 8, 0.25, torch.Generator(DEVICE).manual_seed(1)) for f in (compiled, sample_balanced))
    assert all(map(torch.equal, got, want))
    with FakeTensorMode():
        indices, _ = sample_balanced(torch.empty(3, 30, dtype=torch.int64), 8, 0.25)
        assert indices.shape == (3, 8)


def test_errors():
    with pytest.raises(ValueError, match="labels"):
        sample_balanced(torch.zeros(3), 4, 0.5)
    with pytest.raises(ValueError, match="positive_fraction"):
        sample_balanced(torch.zeros(3, 4, dtype=torch.int64), 4, 1.5)
