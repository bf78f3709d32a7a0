"""Definition of the focal loss of independent classes (Lin et al. 2017, arXiv 1708.02002), and its gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _terms(logits: Tensor, labels: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Per element whether the class is the object's, the logit of being wrong, and the weight (0 if ignored)."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    label = labels[..., None]
    present = label == torch.arange(1, logits.shape[-1] + 1, device=logits.device)
    weight = torch.where(label >= 0, torch.where(present, alpha, 1 - alpha), 0.0).to(x.dtype)
    # whatever stands in a row that is ignored
    return present, torch.where(label >= 0, torch.where(present, -x, x), 0), weight


def focal_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """See `fastrcnn.ops.focal_loss`."""
    _, wrong, weight = _terms(logits, labels, alpha)
    # −log(1 − sigmoid(wrong)), without rounding 1 − sigmoid to 0
    return (weight * wrong.sigmoid() ** gamma * -F.logsigmoid(-wrong)).sum((-2, -1))


def focal_loss_backward(grad: Tensor, logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """grad [...] -> the gradient with respect to logits, in their dtype, contiguous."""
    present, wrong, weight = _terms(logits, labels, alpha)
    q = wrong.sigmoid()
    slope = weight * q**gamma * (q - gamma * (-wrong).sigmoid() * F.logsigmoid(-wrong))
    return (torch.where(present, -slope, slope) * grad[..., None, None]).to(logits.dtype).contiguous()
