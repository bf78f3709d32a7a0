"""maskrcnn-benchmark's COCODemo: its name, arguments and methods, on Predictor and its drawing."""

from typing import Any

import numpy as np
import pycocotools.mask
import torch
from matplotlib import colormaps
from torch import Tensor
from torch.nn.functional import interpolate

from fastrcnn.config import Config
from fastrcnn.data.datasets import COCO_CATEGORIES
from fastrcnn.ops import paste_masks
from fastrcnn.predictor import Predictor
from fastrcnn.structures import BoxList
from fastrcnn.visualization import class_colour, draw_detections


class COCODemo:
    """Detections of one image at a time, drawn on it. Images are uint8 BGR arrays [h, w, 3], as OpenCV has them.

    cfg: copied, so that the global one may change later. Detections with a score above confidence_threshold are drawn;
    with show_mask_heatmaps their mask probabilities, masks_per_dim × masks_per_dim of them, are drawn instead.
    min_image_size: shorter side of the image that the model sees, in pixels, with INPUT.MAX_SIZE_TEST as its limit.

    The weights are the newest checkpoint in OUTPUT_DIR, else MODEL.WEIGHT, as there. CATEGORIES are the names by label,
    the background first: those of the weights, where they carry some, unless a subclass names its own.
    """

    CATEGORIES = ("__background", *COCO_CATEGORIES.values())

    def __init__(
        self,
        cfg: Config,
        confidence_threshold: float = 0.7,
        show_mask_heatmaps: bool = False,
        masks_per_dim: int = 2,
        min_image_size: int = 224,
    ):
        self.predictor = Predictor(cfg, min_image_size=min_image_size, bgr=True, keep_masks=True)
        self.cfg = self.predictor.cfg
        self.model = self.predictor.model
        self.device = self.predictor.device
        self.confidence_threshold = confidence_threshold
        self.show_mask_heatmaps = show_mask_heatmaps
        self.masks_per_dim = masks_per_dim
        self.min_image_size = min_image_size
        names = self.predictor.categories
        if names and type(self).CATEGORIES is COCODemo.CATEGORIES:
            self.CATEGORIES = tuple(names.get(label, "__background") for label in range(max(names) + 1))

    def run_on_opencv_image(self, image: np.ndarray) -> np.ndarray:
        """A copy of the image with the detections, or the heat maps in the size of the image."""
        top = self.select_top_predictions(self.compute_prediction(image))
        if self.show_mask_heatmaps:
            return self.create_mask_montage(image, top)
        return self._draw(image, top, ("masks", "boxes", "keypoints", "labels"))

    def compute_prediction(self, original_image: np.ndarray) -> BoxList:
        """All detections, in pixels of the image.

        Fields: scores, labels, and with MODEL.MASK_ON mask uint8 [N, 1, h, w], 0 or 1, mask_probabilities float32
        [N, M, M] of the box, and rle, with MODEL.KEYPOINT_ON keypoints and keypoint_scores.
        """
        prediction = self.predictor(original_image)
        if prediction.has_field("mask"):
            prediction.add_field("mask_probabilities", prediction.get_field("mask"))
            masks = np.zeros((len(prediction), 1, *original_image.shape[:2]), np.uint8)
            for mask, code in zip(masks, prediction.get_field("rle"), strict=True):
                mask[0] = pycocotools.mask.decode(code)
            prediction.add_field("mask", torch.from_numpy(masks))
        return prediction

    def select_top_predictions(self, predictions: BoxList) -> BoxList:
        """Those with a score above the threshold, the best first."""
        predictions = predictions[predictions.get_field("scores") > self.confidence_threshold]
        return predictions[predictions.get_field("scores").argsort(descending=True, stable=True)]

    def compute_colors_for_labels(self, labels: Tensor) -> np.ndarray:
        """uint8 BGR [N, 3] of labels [N]: a class has the same colour in every image."""
        return np.array([class_colour(label)[::-1] for label in labels.tolist()], np.uint8).reshape(-1, 3)

    def overlay_boxes(self, image: np.ndarray, predictions: BoxList) -> np.ndarray:
        """A copy of the image with the boxes."""
        return self._draw(image, predictions, ("boxes",))

    def overlay_mask(self, image: np.ndarray, predictions: BoxList) -> np.ndarray:
        """A copy of the image with the masks, filled and outlined."""
        return self._draw(image, predictions, ("masks",))

    def overlay_keypoints(self, image: np.ndarray, predictions: BoxList) -> np.ndarray:
        """A copy of the image with the keypoints whose score is above 2, and lines between them."""
        return self._draw(image, predictions, ("keypoints",))

    def overlay_class_names(self, image: np.ndarray, predictions: BoxList) -> np.ndarray:
        """A copy of the image with names and scores at the boxes."""
        return self._draw(image, predictions, ("labels",))

    def create_mask_montage(self, image: np.ndarray, predictions: BoxList) -> np.ndarray:
        """Heat maps of the mask probabilities of the first masks_per_dim² predictions, BGR in the size of the image."""
        montage = mask_montage(predictions, predictions.get_field("mask_probabilities"), self.masks_per_dim)
        return np.ascontiguousarray(montage[..., ::-1])

    def _draw(self, image: np.ndarray, predictions: BoxList, parts: tuple[str, ...]) -> np.ndarray:
        rgb = torch.from_numpy(np.ascontiguousarray(image[..., ::-1])).permute(2, 0, 1)
        names = dict(enumerate(self.CATEGORIES))
        picture = draw_detections(rgb, predictions, names, threshold=0, parts=parts)
        return np.ascontiguousarray(np.asarray(picture)[..., ::-1])


def mask_montage(detections: BoxList, masks: Tensor, masks_per_dim: int) -> np.ndarray:
    """Heat maps of the first masks_per_dim² detections, row by row, uint8 RGB [h, w, 3] in the size of the image.

    masks: probabilities [N, M, M] of the boxes, or bool [N, h, w], as test-time augmentation gives them. Each cell is
    the whole image; black is 0 and outside the box, yellow is 1. ValueError for masks_per_dim below 1.
    """
    if masks_per_dim < 1:
        raise ValueError(f"masks_per_dim is {masks_per_dim}; it must be at least 1")
    width, height = detections.size
    columns, rows = (np.linspace(0, side, masks_per_dim + 1).round().astype(int) for side in (width, height))
    result = np.zeros((height, width, 3), np.uint8)
    for number in range(min(len(detections), masks_per_dim**2)):
        row, column = divmod(number, masks_per_dim)
        top, bottom, left, right = rows[row], rows[row + 1], columns[column], columns[column + 1]
        size = (int(bottom - top), int(right - left))
        if min(size) == 0:
            continue
        mask: Any = masks[number][None]
        if mask.dtype == torch.bool:
            values = interpolate(mask[None].float(), size, mode="area")[0, 0]
        else:
            scale = torch.tensor([size[1] / width, size[0] / height]).repeat(2)
            box = detections.convert("xyxy").bbox[number].cpu() * scale
            values = paste_masks(mask.float().cpu(), box[None], size, threshold=None, continuous=True)[0]
        result[top:bottom, left:right] = (colormaps["inferno"](values.numpy())[..., :3] * 255).round().astype(np.uint8)
    return result
