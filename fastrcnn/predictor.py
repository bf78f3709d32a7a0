"""Image in, detections out."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastrcnn import weights as weight_files
from fastrcnn.config import conventions_of
from fastrcnn.data import read_image as read_image_file
from fastrcnn.engine.inference import autocast
from fastrcnn.engine.tta import detect_augmented
from fastrcnn.evaluation import encode_masks
from fastrcnn.models import build_model
from fastrcnn.structures import BoxList, ImageBatch

Picture = str | Path | Image.Image | np.ndarray | Tensor


def read_image(image: Picture) -> Tensor:
    """A path, a PIL image, an RGB array [h, w, 3] or an RGB tensor [3, h, w], uint8 -> uint8 RGB tensor [3, h, w].

    DataError for a file that cannot be read, ValueError for an array of another kind.
    """
    if isinstance(image, Tensor):
        return image
    if isinstance(image, (str, Path)):
        image = read_image_file(Path(image))
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB"))
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"the array is {image.shape} {image.dtype}; wanted uint8 RGB [height, width, 3]")
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


class Predictor:
    """A trained model that takes images as they come; ValueError unless the weights fill it.

    cfg: from `fastrcnn.load_config`; MODEL.CONVENTIONS gives way to that of the weights. weights: a path, address, name
    or state dict of any family that `fastrcnn.weights` reads; None takes MODEL.WEIGHT. batch_size: images per forward
    pass when a list is given.
    """

    def __init__(self, cfg: Any, weights: str | Path | Mapping[str, Tensor] | None = None, batch_size: int = 1):
        source = weights if weights is not None else cfg.MODEL.WEIGHT
        if not source:
            raise ValueError("a predictor needs weights: pass `weights`, or set MODEL.WEIGHT")
        self.cfg = copy.deepcopy(cfg)
        weight_files.adopt_conventions(self.cfg, source)
        self.batch_size = batch_size
        self.model = build_model(self.cfg).eval()
        report = weight_files.load(self.model, source)
        if report.missing:
            raise ValueError(f"the weights do not fill the model\n{report}")

    def __call__(self, images: Picture | Iterable[Picture]) -> BoxList | list[BoxList]:
        """One image gives a BoxList in its own frame, several a list: fields scores, labels and, with MODEL.MASK_ON,
        rle (COCO run lengths of the pasted masks), with MODEL.KEYPOINT_ON keypoints and keypoint_scores."""
        single = isinstance(images, (str, Path, Image.Image, np.ndarray, Tensor))
        tensors = [read_image(i) for i in ([images] if single else images)]
        out: list[BoxList] = []
        for first in range(0, len(tensors), self.batch_size):
            out += self._predict(tensors[first : first + self.batch_size])
        return out[0] if single else out

    @torch.inference_mode()
    def _predict(self, images: list[Tensor]) -> list[BoxList]:
        device = next(self.model.parameters()).device
        with autocast(self.cfg, device):
            if self.cfg.TEST.BBOX_AUG.ENABLED:
                detections = detect_augmented(self.model, images, self.cfg)
            else:
                detections = self.model(ImageBatch.from_images(images, self.cfg).to(device))
        boxlists = detections.to_boxlists()
        if not self.cfg.MODEL.MASK_ON:
            return boxlists
        conventions = conventions_of(self.cfg)
        return [encode_masks(b, conventions) for b in boxlists]
