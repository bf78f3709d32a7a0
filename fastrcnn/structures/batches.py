"""The padded middle: batches whose shapes follow from the input shapes alone.

Letters: B images, G ground-truth slots, P proposals, R sampled regions, D detections, E polygon edges, M mask side, K
keypoints. Boxes are xyxy float32 pixels of the padded batch image. What varies is a label, a mask or a count on the
device, never a shape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn.structures.boxlist import BoxList
from fastrcnn.structures.keypoint import Keypoints, PersonKeypoints


class _Batch:
    """Moves all tensors of a dataclass together."""

    def _map(self, function) -> Self:
        changes = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, _Batch)):
                changes[field.name] = function(value) if isinstance(value, Tensor) else value._map(function)
        return replace(self, **changes)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._map(lambda t: t.pin_memory())


def scaled_size(height: int, width: int, min_size: int, max_size: int, exact: bool = True) -> tuple[int, int]:
    """The (height, width) at which an image is used: shorter side min_size, unless the longer would pass max_size.

    exact: maskrcnn-benchmark's rule, by which only the longer side is truncated; else torchvision's, by which both are.
    """
    short, long = min(height, width), max(height, width)
    if not exact:
        scale = min(min_size / short, max_size / long)
        return max(int(height * scale), 1), max(int(width * scale), 1)
    if long / short * min_size > max_size:
        min_size = max(round(max_size * short / long), 1)
    other = int(min_size * long / short)
    return (min_size, other) if height <= width else (other, min_size)


@dataclass
class ImageBatch(_Batch):
    """pixels [B, 3, H, W] float32 channels_last, normalised and zero-padded at the bottom and right;
    sizes int32 [B, 2], (h, w) before padding; original_sizes int32 [B, 2], (h, w) before resizing."""

    pixels: Tensor
    sizes: Tensor
    original_sizes: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    @classmethod
    def from_images(cls, images: Sequence[Tensor], cfg: Any) -> Self:
        """Resize, normalise and pad uint8 RGB images [3, h, w] as `cfg.INPUT` says for testing.

        INPUT.ANTIALIAS False is torchvision's way: normalise, then interpolate without antialiasing, both sides
        truncated (`torchvision.models.detection.transform.GeneralizedRCNNTransform`). ValueError for other images.
        """
        _check_images(images)
        low, high = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        resized = []
        for image in images:
            height, width = image.shape[-2:]
            size = scaled_size(height, width, low, high, exact=cfg.INPUT.ANTIALIAS)
            if cfg.INPUT.ANTIALIAS:
                exact = image if image.device.type == "cpu" else image.float()  # uint8 kernels exist for the CPU only
                out = F.interpolate(exact[None], size=size, mode="bilinear", antialias=True)[0]
                resized.append(_normalise(out.round() if out.is_floating_point() else out, cfg))
            else:
                resized.append(F.interpolate(_normalise(image, cfg)[None], size=size, mode="bilinear")[0])
        return cls._pad(resized, [tuple(i.shape[-2:]) for i in images], cfg)

    @classmethod
    def from_tensors(cls, images: Sequence[Tensor], original_sizes: Sequence[tuple[int, int]], cfg: Any) -> Self:
        """Normalise and pad uint8 RGB images [3, h, w] that have their final size already."""
        _check_images(images)
        return cls._pad([_normalise(i, cfg) for i in images], original_sizes, cfg)

    def to_uint8(self, cfg: Any) -> Tensor:
        """The pixels before normalisation, uint8 RGB [B, 3, H, W], rounded; what the padding holds means nothing."""
        mean, std = _mean_and_std(cfg, self.pixels.device)
        pixels = self.pixels * std + mean
        pixels = pixels.flip(1) if cfg.INPUT.TO_BGR255 else pixels * 255
        return pixels.round().clamp(0, 255).byte()

    @classmethod
    def _pad(cls, images: Sequence[Tensor], original_sizes: Sequence[tuple[int, int]], cfg: Any) -> Self:
        divisor = max(cfg.DATALOADER.SIZE_DIVISIBILITY, 1)
        height, width = (-(-max(i.shape[k] for i in images) // divisor) * divisor for k in (1, 2))
        device = images[0].device
        pixels = torch.zeros(len(images), height, width, 3, device=device).permute(0, 3, 1, 2)  # channels_last
        for slot, image in zip(pixels, images, strict=True):
            slot[:, : image.shape[1], : image.shape[2]] = image
        sizes = torch.tensor([i.shape[-2:] for i in images], dtype=torch.int32, device=device)
        return cls(pixels, sizes, torch.tensor(original_sizes, dtype=torch.int32, device=device))


def _check_images(images: Sequence[Tensor]) -> None:
    if len(images) == 0:
        raise ValueError("an image batch needs at least one image")
    for index, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8 or 0 in image.shape:
            found = f"{tuple(image.shape)} {image.dtype}"
            raise ValueError(f"image {index} is {found}; wanted a uint8 RGB tensor [3, height, width]")


def _normalise(image: Tensor, cfg: Any) -> Tensor:
    """uint8 RGB [3, h, w] -> float32, in the channel order, range, mean and deviation that the weights expect."""
    image = image.float()
    image = image.flip(0) if cfg.INPUT.TO_BGR255 else image / 255
    mean, std = _mean_and_std(cfg, image.device)
    return (image - mean) / std


def _mean_and_std(cfg: Any, device: torch.device) -> list[Tensor]:
    """[3, 1, 1] each, in the channel order that the weights expect."""
    return [torch.tensor(v, device=device)[:, None, None] for v in (cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD)]


@dataclass
class PolygonBatch(_Batch):
    """The outlines of all objects, edge by edge: edges float32 [B, G, E, 4] (x, y of the start, x, y of the end) in
    pixels of the padded image; parts int64 [B, G, E], the part of the object that an edge belongs to, −1 in empty
    slots; num_parts, an upper bound of parts per object known on the host."""

    edges: Tensor
    parts: Tensor
    num_parts: int

    @classmethod
    def from_polygons(cls, polygons: Sequence[Sequence[Sequence[Tensor]]], slots: int) -> Self:
        """polygons: image -> object -> part, each a closed polygon [V, 2]; slots = G."""
        counts = [sum(len(part) for part in parts) for image in polygons for parts in image]
        num_parts = max((len(parts) for image in polygons for parts in image), default=0)
        length = _power_of_two(max(counts, default=0))
        edges = torch.zeros(len(polygons), slots, length, 4)
        index = torch.full((len(polygons), slots, length), -1)
        for b, image in enumerate(polygons):
            for g, parts in enumerate(image):
                if parts:
                    rows = torch.cat([torch.cat([part, part.roll(-1, 0)], 1) for part in parts])
                    owner = torch.repeat_interleave(torch.tensor([len(part) for part in parts]))
                    edges[b, g, : len(rows)] = rows
                    index[b, g, : len(rows)] = owner
        return cls(edges, index, _power_of_two(num_parts))


@dataclass
class TargetBatch(_Batch):
    """Ground truth: boxes [B, G, 4]; labels int64 [B, G], 0 in empty slots; crowd bool [B, G]; outlines as `polygons`
    or as `masks` uint8 [B, G, H, W] of the padded image, each bitmap's border repeated once into the padding;
    keypoints [B, G, K, 3] (x, y, visibility), K = 0 for a batch without objects."""

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    polygons: PolygonBatch | None = None
    masks: Tensor | None = None
    keypoints: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def valid(self) -> Tensor:
        """bool [B, G]: slots that hold an object to be learnt."""
        return (self.labels > 0) & ~self.crowd

    @property
    def outlined(self) -> Tensor:
        """bool [B, G]: slots whose object has a mask to be learnt; one without a polygon or a pixel has none."""
        if self.polygons is not None:
            return self.valid & (self.polygons.parts >= 0).any(2)
        return self.valid if self.masks is None else self.valid & (self.masks.flatten(2).amax(2) > 0)

    @classmethod
    def from_boxlists(cls, boxlists: Sequence[BoxList], batch: ImageBatch) -> Self:
        """Pad ground truth to a power of two of slots, in the frame of `batch` (each BoxList has its own image_size).

        Fields: labels (needed), masks (SegmentationMask), keypoints (Keypoints), iscrowd. When the masks of one
        object are bitmaps, the bitmaps of all are used; else the polygons. ValueError for targets that do not fit the
        images or each other, and for boxes that are not finite or have no area.
        """
        if len(boxlists) != len(batch):
            raise ValueError(f"{len(boxlists)} targets for {len(batch)} images")
        sizes = [(w, h) for h, w in batch.sizes.tolist()]
        boxlists = [b.to("cpu") for b in boxlists]
        boxlists = [b if tuple(b.size) == s else b.resize(s) for b, s in zip(boxlists, sizes, strict=True)]
        slots = _power_of_two(max(len(b) for b in boxlists))
        boxes = torch.zeros(len(boxlists), slots, 4)
        labels = torch.zeros(len(boxlists), slots, dtype=torch.int64)
        crowd = torch.zeros(len(boxlists), slots, dtype=torch.bool)
        for i, target in enumerate(boxlists):
            corners = target.convert("xyxy").bbox
            good = corners.isfinite().all(1) & (corners[:, 2:] > corners[:, :2]).all(1)
            if not good.all():
                raise ValueError(f"target {i} has a box without area: {corners[~good][0].tolist()} (xyxy)")
            boxes[i, : len(target)] = corners
            labels[i, : len(target)] = torch.as_tensor(target.get_field("labels"))
            if target.has_field("iscrowd"):
                crowd[i, : len(target)] = torch.as_tensor(target.get_field("iscrowd")).bool()
        polygons, masks = _outlines(boxlists, slots, batch.pixels.shape[-2:])
        keypoints = _keypoints(boxlists, slots)
        return cls(boxes, labels, crowd, polygons, masks, keypoints).to(batch.pixels.device)


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least count, and at least 1: few distinct shapes in a run."""
    return 1 << max(count - 1, 0).bit_length()


def _outlines(
    boxlists: Sequence[BoxList], slots: int, size: Sequence[int]
) -> tuple[PolygonBatch | None, Tensor | None]:
    outlines = [b.get_field("masks") if b.has_field("masks") else None for b in boxlists]
    if all(o is None for o in outlines) and any(len(b) > 0 for b in boxlists):
        return None, None
    if any(o is None and len(b) > 0 for o, b in zip(outlines, boxlists, strict=True)):
        raise ValueError("some images of the batch have objects without masks: give all of them masks, or none")
    if all(o is None or o.mode == "poly" for o in outlines):
        return PolygonBatch.from_polygons([[] if o is None else o.polygons for o in outlines], slots), None
    masks = torch.zeros(len(boxlists), slots, *size, dtype=torch.uint8)
    for slot, outline in zip(masks, outlines, strict=True):
        if outline is not None and len(outline) > 0:
            bitmap = outline.get_mask_tensor()
            count, height, width = bitmap.shape
            slot[:count, :height, :width] = bitmap
            # the border is repeated once, so that sampling between it and the padding sees what clamping would give
            slot[:count, height : height + 1, :width] = bitmap[:, -1:]
            slot[:count, :, width : width + 1] = slot[:count, :, width - 1 : width]
    return None, masks


def _keypoints(boxlists: Sequence[BoxList], slots: int) -> Tensor | None:
    points = [b.get_field("keypoints").keypoints if b.has_field("keypoints") else None for b in boxlists]
    if all(p is None for p in points) and any(len(b) > 0 for b in boxlists):
        return None
    if any(p is None and len(b) > 0 for p, b in zip(points, boxlists, strict=True)):
        raise ValueError("some images of the batch have objects without keypoints: give all of them keypoints, or none")
    counts = {p.shape[1] for p in points if p is not None}
    if len(counts) > 1:
        raise ValueError(f"the images of the batch have objects of {sorted(counts)} keypoints: want one number")
    out = torch.zeros(len(boxlists), slots, max(counts, default=0), 3)
    for slot, p in zip(out, points, strict=True):
        if p is not None:
            slot[: len(p)] = p
    return out


@dataclass
class ProposalBatch(_Batch):
    """boxes [B, P, 4]; scores [B, P]; valid bool [B, P]."""

    boxes: Tensor
    scores: Tensor
    valid: Tensor


@dataclass
class SampleBatch(_Batch):
    """Regions to learn from, positives first: boxes [B, R, 4]; labels int64 [B, R], 0 = background; matched int64
    [B, R], the ground-truth slot of a positive; weight float32 [B, R], 0 = empty slot; num_positive, how many of the
    R slots can be positive at most."""

    boxes: Tensor
    labels: Tensor
    matched: Tensor
    weight: Tensor
    num_positive: int


@dataclass
class DetectionBatch(_Batch):
    """boxes [B, D, 4] and scores [B, D], falling; labels int64 [B, D], None for proposals, which have no class; count
    int32 [B], the slots in use; masks [B, D, M, M], probabilities for the predicted class; keypoints [B, D, K, 3] (x,
    y, 1) and their logits keypoint_scores [B, D, K]; sizes and original_sizes as in ImageBatch; paste (masks [N, M, M],
    boxes [N, 4], (h, w)) -> bool [N, h, w], where box lists are to hold masks of the whole image."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor | None
    count: Tensor
    sizes: Tensor
    original_sizes: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None
    keypoint_scores: Tensor | None = None
    paste: Callable[[Tensor, Tensor, tuple[int, int]], Tensor] | None = None

    def to_boxlists(self) -> list[BoxList]:
        """One BoxList per image in the frame of the original image, sorted by score: of proposals with the field
        objectness, of detections with the fields scores, labels and, where there are masks, mask [N, M, M] (or bool
        [N, h, w], see `paste`), where there are keypoints, keypoints (PersonKeypoints if there are COCO's 17, else
        Keypoints) and keypoint_scores [N, K]. The one host sync of inference."""
        host = self._to_host()
        scale = (host.original_sizes / host.sizes).flip(1).repeat(1, 2)  # [B, 4]
        boxes = host.boxes * scale[:, None]
        out = []
        for i, n in enumerate(host.count.tolist()):
            height, width = host.original_sizes[i].tolist()
            # copies, so that what is kept of a data set does not hold the whole padded (and pinned) batches
            boxlist = BoxList(boxes[i, :n].clone(), (width, height))
            boxlist.add_field("objectness" if host.labels is None else "scores", host.scores[i, :n].clone())
            if host.labels is not None:
                boxlist.add_field("labels", host.labels[i, :n].clone())
            if host.masks is not None:
                masks = host.masks[i, :n].clone()
                boxlist.add_field(
                    "mask", masks if self.paste is None else self.paste(masks, boxlist.bbox, boxlist.size[::-1])
                )
            if host.keypoints is not None:
                points = host.keypoints[i, :n] * torch.cat([scale[i, :2], scale.new_ones(1)])
                kind = PersonKeypoints if points.shape[1] == len(PersonKeypoints.NAMES) else Keypoints
                boxlist.add_field("keypoints", kind(points, (width, height)))
                boxlist.add_field("keypoint_scores", host.keypoint_scores[i, :n].clone())
            out.append(boxlist)
        return out

    def _to_host(self) -> Self:
        if self.boxes.device.type != "cuda":
            return self.to("cpu")
        # all copies are queued, then waited for once
        host = self._map(lambda t: torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True))
        torch.cuda.current_stream(self.boxes.device).synchronize()
        return host
