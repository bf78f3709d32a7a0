"""A detector as a function of tensors, from uint8 pixels to padded detections."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrcnn.export.operators import PortableOperators
from fastrcnn.structures import ImageBatch


def outputs(cfg: Any) -> list[str]:
    """Names of what `ExportModule` returns, in that order; proposals, with MODEL.RPN_ONLY, have no labels."""
    model = cfg.MODEL
    labels = ["labels"] if model.RETINANET_ON or not model.RPN_ONLY else []
    masks = ["masks"] if model.MASK_ON else []
    keypoints = ["keypoints", "keypoint_scores"] if model.KEYPOINT_ON else []
    return ["boxes", "scores", *labels, "count", *masks, *keypoints]


class ExportModule(nn.Module):
    """A model and the normalisation of its images, made of PyTorch's and torchvision's operators.

    It shares the model's parameters and puts it into evaluation mode. float32, whatever DTYPE says. keep: operators
    that stay as they are, `torch.ops.fastrcnn.*.default`.
    """

    def __init__(self, cfg: Any, model: nn.Module, keep: Sequence[Any] = ()):
        super().__init__()
        self.model = model.eval()
        self.outputs = outputs(cfg)
        self.keep = keep
        self.bgr = cfg.INPUT.TO_BGR255
        device = next(model.parameters()).device
        for name, values in (("mean", cfg.INPUT.PIXEL_MEAN), ("std", cfg.INPUT.PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values, device=device)[:, None, None], persistent=False)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """images uint8 RGB [B, 3, H, W], at their final size, padded on the right and below with anything, H and W
        multiples of DATALOADER.SIZE_DIVISIBILITY; sizes int64 [B, 2], (h, w) before padding.

        Returns the `outputs`, in the frame of the images, best first; what lies behind `count` means nothing. boxes
        float32 [B, D, 4] xyxy, scores [B, D], labels int64 [B, D], count int64 [B], masks [B, D, M, M], probabilities
        in the box, keypoints [B, D, K, 3] (x, y, 1), keypoint_scores [B, D, K], logits.
        """
        with PortableOperators(self.keep):
            found = self.model(ImageBatch(self.normalised(images, sizes), sizes, sizes))
        found.count = found.count.long()
        return tuple(getattr(found, name) for name in self.outputs)

    def normalised(self, images: Tensor, sizes: Tensor) -> Tensor:
        """float32 [B, 3, H, W], channels_last, 0 outside the sizes: as `ImageBatch.from_images` makes it."""
        pixels = images.float()
        pixels = pixels.flip(1) if self.bgr else pixels / 255
        pixels = (pixels - self.mean) / self.std
        y = torch.arange(images.shape[2], device=images.device)[:, None] < sizes[:, :1, None]  # [B, H, 1]
        x = torch.arange(images.shape[3], device=images.device) < sizes[:, 1:, None]  # [B, 1, W]
        return torch.where((y & x)[:, None], pixels, 0).contiguous(memory_format=torch.channels_last)
