"""Random choice of boxes to learn from, with a bounded share of positives."""

import torch
from torch import Tensor

from fastrcnn.ops import _library
from fastrcnn.ops.reference import sample as reference


def _fake(labels, noise, count, positive_fraction):
    shape = labels.shape[0], min(count, labels.shape[1])
    return labels.new_empty(shape, dtype=torch.int64), labels.new_empty(shape, dtype=torch.float32)


SAMPLE = _library.register(
    "sample_balanced(Tensor labels, Tensor noise, int count, float positive_fraction) -> (Tensor, Tensor)",
    reference=reference.sample_balanced,
    fake=_fake,
)


def sample_balanced(
    labels: Tensor, count: int, positive_fraction: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Sample count boxes per image without replacement, positives first (Fast R-CNN, Girshick 2015, §2.3).

    labels: integers [B, A], > 0 positive, 0 negative, < 0 ignored. At most int(count · positive_fraction) positives are
    taken, and negatives fill up. Returns indices int64 [B, K] and weights float32 [B, K], K = min(count, A): weight 1
    is a sample, 0 an empty slot, whose index is in range but means nothing. If count suffices for all and its share for
    the positives, every positive and every negative is returned. generator: on the device of labels;
    torch.compile breaks the graph at it, so fullgraph=True needs None. ValueError if labels are not integers [B, A],
    count is negative or positive_fraction not from 0 to 1.
    """
    if labels.dim() != 2:
        raise ValueError(f"labels must have the shape [B, A], got {list(labels.shape)}")
    if labels.is_floating_point():
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if count < 0 or not 0 <= positive_fraction <= 1:
        raise ValueError(f"count ({count}) must be ≥ 0 and positive_fraction ({positive_fraction}) from 0 to 1")
    # torch.rand with a generator takes no symbolic shapes
    noise = torch.empty(labels.shape, device=labels.device).uniform_(generator=generator)
    return SAMPLE(labels, noise, count, positive_fraction)
