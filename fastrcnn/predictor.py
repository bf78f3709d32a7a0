"""Image in, detections out."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastrcnn import weights as weight_files
from fastrcnn.config import Config, conventions_of
from fastrcnn.data import read_image as read_image_file
from fastrcnn.engine import category_names, find_model
from fastrcnn.engine.inference import autocast
from fastrcnn.engine.tta import detect_augmented
from fastrcnn.evaluation import encode_masks
from fastrcnn.models import build_model
from fastrcnn.structures import BoxList, ImageBatch
from fastrcnn.visualization import draw_detections

Picture = str | Path | Image.Image | np.ndarray | Tensor


def read_image(image: Picture, bgr: bool = False) -> Tensor:
    """A path, a PIL image, an RGB (or with `bgr` a BGR) array [h, w, 3] or an RGB tensor [3, h, w], uint8 -> uint8 RGB
    tensor [3, h, w].

    Paths and PIL images are turned upright as their EXIF orientation says. DataError for a file that cannot be read,
    ValueError for an array or tensor of another kind.
    """
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            raise ValueError(f"the tensor is {list(image.shape)} {image.dtype}; wanted uint8 RGB [3, height, width]")
        return image
    if isinstance(image, (str, Path)):
        image = read_image_file(Path(image))
    if isinstance(image, Image.Image):
        image, bgr = np.array(ImageOps.exif_transpose(image).convert("RGB")), False
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"the array is {image.shape} {image.dtype}; wanted uint8 RGB [height, width, 3]")
    return torch.from_numpy(np.ascontiguousarray(image[..., ::-1] if bgr else image)).permute(2, 0, 1)


class Predictor:
    """A trained model that takes images as they come.

    config: a recipe's name, a YAML file, a run's folder, a checkpoint or a Config, see `fastrcnn.engine.find_model`;
    MODEL.CONVENTIONS gives way to that of the weights. weights: a path, address, name or state dict of any family that
    `fastrcnn.weights` reads; None takes the run's newest checkpoint, else MODEL.WEIGHT. device: MODEL.DEVICE, such as
    "cpu". min_image_size: INPUT.MIN_SIZE_TEST, pixels. confidence_threshold: detections of a lower score are left out;
    None keeps all that the model gives. batch_size: images per forward pass when several are given. bgr: arrays are
    BGR, as OpenCV has them. keep_masks: detections keep field `mask`, the head's probabilities (with test-time
    augmentation the pasted masks, bool [N, h, w]).
    ValueError unless the weights fill the model; FileNotFoundError where there are none.
    """

    def __init__(
        self,
        config: Config | str | Path | None = None,
        weights: str | Path | Mapping[str, Tensor] | None = None,
        *,
        device: str | torch.device | None = None,
        min_image_size: int | None = None,
        confidence_threshold: float | None = None,
        batch_size: int = 1,
        bgr: bool = False,
        keep_masks: bool = False,
    ):
        self.cfg, source = find_model(config, weights)
        if device is not None:
            self.cfg.MODEL.DEVICE = str(device)
        if min_image_size is not None:
            self.cfg.INPUT.MIN_SIZE_TEST = min_image_size
        weight_files.adopt_conventions(self.cfg, source)
        self.confidence_threshold = confidence_threshold
        self.batch_size = batch_size
        self.bgr = bgr
        self.keep_masks = keep_masks
        self.model = build_model(self.cfg).eval()
        self.device = next(self.model.parameters()).device
        report = weight_files.load(self.model, source)
        if report.missing:
            raise ValueError(f"the weights do not fill the model\n{report}")
        self.categories = category_names(source, self.cfg)

    @overload
    def __call__(self, images: Picture) -> BoxList: ...

    @overload
    def __call__(self, images: Iterable[Picture]) -> list[BoxList]: ...

    def __call__(self, images: Picture | Iterable[Picture]) -> BoxList | list[BoxList]:
        """One image gives a BoxList in its own frame, several a list, in falling order of the score.

        Fields: scores float32 [N], labels int64 [N], names (list of N str); with MODEL.MASK_ON rle, COCO run lengths of
        the pasted masks, and with keep_masks mask, float32 [N, M, M]; with MODEL.KEYPOINT_ON keypoints and
        keypoint_scores [N, K]. Proposals of an RPN alone have objectness only.
        """
        if isinstance(images, (str, Path, Image.Image, np.ndarray, Tensor)):
            return next(self.stream([images]))
        return list(self.stream(images))

    def stream(self, images: Iterable[Picture]) -> Iterator[BoxList]:
        """The detections of images one after another, of which only a batch is in memory at a time."""
        rest = iter(images)
        while some := list(islice(rest, self.batch_size)):
            yield from self._predict([read_image(image, self.bgr) for image in some])

    def draw(self, image: Picture, detections: BoxList, **options: Any) -> Image.Image:
        """A picture of the detections; options as of `fastrcnn.visualization.draw_detections`.

        Without a confidence_threshold here, or a `threshold` among the options, scores of 0.5 and more are drawn.
        """
        options.setdefault("threshold", 0.5 if self.confidence_threshold is None else self.confidence_threshold)
        return draw_detections(read_image(image, self.bgr), detections, self.categories, **options)

    @torch.inference_mode()
    def _predict(self, images: list[Tensor]) -> list[BoxList]:
        with autocast(self.cfg, self.device):
            if self.cfg.TEST.BBOX_AUG.ENABLED:
                detections = detect_augmented(self.model, images, self.cfg)
            else:
                detections = self.model(ImageBatch.from_images(images, self.cfg).to(self.device))
        return [self._finish(boxlist) for boxlist in detections.to_boxlists()]

    def _finish(self, boxlist: BoxList) -> BoxList:
        proposals = not boxlist.has_field("labels")  # of a region proposal network alone
        if self.confidence_threshold is not None:
            scores = boxlist.get_field("objectness" if proposals else "scores")
            boxlist = boxlist[scores >= self.confidence_threshold]
        if not proposals:
            labels = boxlist.get_field("labels").tolist()
            boxlist.add_field("names", [self.categories.get(label, str(label)) for label in labels])
        if not boxlist.has_field("mask"):
            return boxlist
        encoded = encode_masks(boxlist, conventions_of(self.cfg))
        if self.keep_masks:
            masks = boxlist.get_field("mask")
            encoded.add_field("mask", masks.reshape(len(masks), *masks.shape[-2:]))
        return encoded
