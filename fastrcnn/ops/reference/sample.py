"""Definition of balanced sampling."""

import torch
from torch import Tensor


def sample_balanced(labels: Tensor, noise: Tensor, count: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """labels, noise in [0, 1) [B, A] -> indices int64 [B, K], weights float32 [B, K], K = min(count, A).

    The highest noise wins: twice a top-k, of the positives and of the negatives, then the negatives move up to the
    end of the positives.
    """
    anchors = labels.shape[1]
    slots = min(count, anchors)
    quota = min(int(count * positive_fraction), slots)
    positive, positive_index = torch.where(labels > 0, noise, -1).topk(quota, dim=1)
    negative, negative_index = torch.where(labels == 0, noise, -1).topk(slots, dim=1)
    positives = (positive >= 0).sum(1, keepdim=True)
    negatives = (negative >= 0).sum(1, keepdim=True)
    slot = torch.arange(slots, device=labels.device)
    source = torch.where(slot < positives, slot, quota + slot - positives)  # [B, K]
    indices = torch.cat((positive_index, negative_index), 1).gather(1, source)
    return indices, (slot < positives + negatives).float()
