"""Detections and ground truth drawn on images, side by side, and sheets of pictures."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pycocotools.mask
import torch
from PIL import Image, ImageDraw

from fastrcnn.evaluation import match_detections, scores_of
from fastrcnn.structures import BoxList
from fastrcnn.visualization.colours import class_colour
from fastrcnn.visualization.labels import Box, draw_labels, font, font_points, place_labels

MASK_OPACITY = 0.45
KEYPOINT_LOGIT = 2.0  # maskrcnn-benchmark's threshold
# COCO's, from 0: legs, hips and trunk, arms, head
PERSON_SKELETON = (
    (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10),
    (0, 1), (0, 2), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6),
)  # fmt: skip
PARTS = ("masks", "boxes", "keypoints", "labels")
_RIGHT, _WRONG = "✓ ", "✗ "

Colour = tuple[int, int, int]


def draw_detections(
    image: Image.Image | torch.Tensor,
    boxlist: BoxList,
    categories: Mapping[int, str],
    threshold: float = 0.5,
    *,
    scale: float = 1,
    skeleton: Sequence[tuple[int, int]] = (),
    parts: Collection[str] = PARTS,
) -> Image.Image:
    """A copy of the image, PIL or uint8 RGB [3,h,w], with the boxes, masks, keypoints and labels of `boxlist`, or those
    of them that `parts` names.

    Boxes whose score is below `threshold` are left out; without field `scores`, as in ground truth, all are drawn,
    those of crowds (field iscrowd) and difficult objects dashed. Masks come from field `rle` or `masks`, keypoints
    [N,K,3] from `keypoints`: those hidden (visibility 1) are hollow, and the pairs (from 0) of `skeleton` are joined,
    by default PERSON_SKELETON where there are 17. Of a model's keypoints those with `keypoint_scores` above
    KEYPOINT_LOGIT are drawn. Labels never overlap: where there is no place, those of lower scores are left out. `scale`
    is the size of the picture to that of the image. ValueError if the box list is of another image size.
    """
    boxlist = _above(boxlist, threshold)
    aside = [bool(note) for note in _notes(boxlist)]
    return _draw(image, boxlist, _texts(boxlist, categories), aside, scale, skeleton, parts)


def draw_comparison(
    image: Image.Image | torch.Tensor,
    target: BoxList,
    detections: BoxList,
    categories: Mapping[int, str],
    threshold: float = 0.5,
    *,
    iou_threshold: float = 0.5,
    scale: float = 1,
    skeleton: Sequence[tuple[int, int]] = (),
    titles: tuple[str, str] = ("ground truth", "prediction"),
) -> Image.Image:
    """The ground truth, left, beside the detections with scores from `threshold` on, each as `draw_detections` does it.

    Objects that are found and detections that find one (see `match_detections`) have solid boxes and a tick before
    their names; missed objects and false detections have dashed boxes and a cross. Crowds, difficult objects and what
    is detected there have dashed boxes and neither. The titles tell the numbers of each. Masks and keypoints of the
    ground truth are drawn where the detections have some.
    """
    shown = ("masks", "rle") if detections.has_field("masks") or detections.has_field("rle") else ()
    shown += ("keypoints",) if detections.has_field("keypoints") else ()
    target = target.copy_with_fields(["labels", "iscrowd", "difficult", *shown], skip_missing=True)
    target, detections = _above(target, threshold), _above(detections, threshold)
    found, ignored = match_detections(target, detections, iou_threshold)
    aside = np.array([bool(note) for note in _notes(target)], dtype=bool)
    hit = np.isin(np.arange(len(target)), found[found >= 0]) & ~aside
    right = (found >= 0) & ~ignored
    panels = []
    for boxlist, good, neither, name, words in (
        (target, hit, aside, titles[0], ("found", "missed")),
        (detections, right, ignored, titles[1], ("right", "wrong")),
    ):
        marks = np.where(neither, "", np.where(good, _RIGHT, _WRONG))
        texts = [mark + text for mark, text in zip(marks, _texts(boxlist, categories), strict=True)]
        picture = _draw(image, boxlist, texts, (~good).tolist(), scale, skeleton)
        good_count, bad_count = int(good.sum()), int((~good & ~neither).sum())
        panels.append(_titled(picture, f"{name}: {_RIGHT}{good_count} {words[0]}, {_WRONG}{bad_count} {words[1]}"))
    return _sheet(panels, 2, gap=4)


def readable_scale(size: tuple[int, int], side: int) -> float:
    """The scale at which the longer side of an image of this (width, height) is `side` pixels; for smaller images the
    largest whole one that keeps it below."""
    longer = max(size)
    return side / longer if longer > side else side // longer


def contact_sheet(pictures: Sequence[Image.Image], columns: int, path: Path | str) -> None:
    """Saves the pictures, `columns` to a row, each in the middle of its cell, on white."""
    if not pictures or columns < 1:
        raise ValueError(
            f"contact_sheet got {len(pictures)} pictures and {columns} columns, wanted at least one of both"
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    _sheet(pictures, columns, gap=4, border=4).save(path)


def _sheet(pictures: Sequence[Image.Image], columns: int, gap: int, border: int = 0) -> Image.Image:
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    width = max(picture.width for picture in pictures)
    heights = [max(picture.height for picture in row) for row in rows]
    size = (len(rows[0]) * (width + gap) - gap + 2 * border, sum(heights) + (len(rows) - 1) * gap + 2 * border)
    sheet = Image.new("RGB", size, (255, 255, 255))
    top = border
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            x = border + column * (width + gap) + (width - picture.width) // 2
            sheet.paste(picture.convert("RGB"), (x, top + (height - picture.height) // 2))
        top += height + gap
    return sheet


def _titled(picture: Image.Image, title: str) -> Image.Image:
    """The picture below its title, which is cut where the picture ends."""
    points = font_points(picture.size)
    while points > 8 and font(points).getlength(title) > picture.width - 4:
        points -= 1
    bar = points + points // 2 + 2
    result = Image.new("RGB", (picture.width, picture.height + bar), (255, 255, 255))
    ImageDraw.Draw(result).text((2, bar // 2), title, font=font(points), fill=(0, 0, 0), anchor="lm")
    result.paste(picture, (0, bar))
    return result


def _above(boxlist: BoxList, threshold: float) -> BoxList:
    """The boxes with scores from the threshold on, the best first; all, as they come, where there are no scores."""
    boxlist = boxlist.convert("xyxy").to("cpu")
    if not (boxlist.has_field("scores") or boxlist.has_field("objectness")):
        return boxlist
    scores = scores_of(boxlist)
    return boxlist[((-scores).argsort(stable=True))[: int((scores >= threshold).sum())]]


def _notes(boxlist: BoxList) -> list[str]:
    """What is told of objects that do not count."""
    notes = [""] * len(boxlist)
    for field, note in (("difficult", " (difficult)"), ("iscrowd", " (crowd)")):
        if boxlist.has_field(field):
            flags = torch.as_tensor(boxlist.get_field(field)).tolist()
            notes = [note if flag else before for flag, before in zip(flags, notes, strict=True)]
    return notes


def _labels(boxlist: BoxList) -> list[int]:
    """Those of proposals, which have none, are 0."""
    return boxlist.get_field("labels").tolist() if boxlist.has_field("labels") else [0] * len(boxlist)


def _texts(boxlist: BoxList, categories: Mapping[int, str]) -> list[str]:
    names = [str(categories.get(label, label or "object")) for label in _labels(boxlist)]
    texts = [name + note for name, note in zip(names, _notes(boxlist), strict=True)]
    if boxlist.has_field("scores") or boxlist.has_field("objectness"):
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores_of(boxlist).tolist(), strict=True)]
    return texts


def _draw(
    image: Image.Image | torch.Tensor,
    boxlist: BoxList,
    texts: Sequence[str],
    dashed: Sequence[bool],
    scale: float,
    skeleton: Sequence[tuple[int, int]],
    parts: Collection[str] = PARTS,
) -> Image.Image:
    """A copy of the image with all boxes of `boxlist`, the first on top."""
    picture = _to_pil(image)
    if tuple(boxlist.size) != picture.size:
        raise ValueError(
            f"the boxes are of an image of {tuple(boxlist.size)} (width, height), the picture is {picture.size}"
        )
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    colours = [class_colour(label) for label in _labels(boxlist)]
    line = max(1, round(min(size) / 180))
    if "masks" in parts:
        picture = _blend(picture, boxlist, colours, line)
    draw = ImageDraw.Draw(picture)
    boxes = [_inside(box, size) for box in (boxlist.bbox * scale).tolist()]
    outlines = list(zip(boxes, colours, dashed, strict=True)) if "boxes" in parts else []
    for box, colour, dashes in reversed(outlines):
        if dashes:
            _dashed_rectangle(draw, box, colour, line)
        else:
            draw.rectangle(box, outline=colour, width=line)
    if "keypoints" in parts and boxlist.has_field("keypoints"):
        keypoints = boxlist.get_field("keypoints")
        points = keypoints if isinstance(keypoints, torch.Tensor) else keypoints.keypoints
        if boxlist.has_field("keypoint_scores"):
            sure = boxlist.get_field("keypoint_scores") > KEYPOINT_LOGIT
            points = torch.cat([points[..., :2], 2.0 * sure[..., None]], 2)
        pairs = skeleton or (PERSON_SKELETON if points.shape[1] == 17 else ())
        for instance, colour in zip(points.tolist(), colours, strict=True):
            _draw_keypoints(draw, [(x * scale, y * scale, v) for x, y, v in instance], pairs, colour, line)
    if "labels" in parts:
        draw_labels(picture, place_labels(texts, boxes, size), colours)
    return picture


def _to_pil(image: Image.Image | torch.Tensor) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB") if image.mode != "RGB" else image.copy()
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image is {image.dtype} {list(image.shape)}, wanted a PIL image or uint8 [3, h, w]")
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def _inside(box: Sequence[float], size: tuple[int, int]) -> Box:
    """The pixels, both ends inclusive, that a continuous box covers of a picture of this (width, height)."""
    x1, y1 = (min(max(int(value), 0), side - 1) for value, side in zip(box[:2], size, strict=True))
    x2, y2 = (min(max(round(value) - 1, 0), side - 1) for value, side in zip(box[2:], size, strict=True))
    return x1, y1, max(x1, x2), max(y1, y2)


def _masks(boxlist: BoxList) -> Iterator[np.ndarray]:
    """uint8 [h,w], 0 or 1, of each object from field `rle` or `masks`, the last object first; nothing without them."""
    if boxlist.has_field("rle"):
        yield from (pycocotools.mask.decode(code) for code in reversed(boxlist.get_field("rle")))
    elif boxlist.has_field("masks") and len(boxlist):
        yield from boxlist.get_field("masks").convert("mask").get_mask_tensor().to(torch.uint8).numpy()[::-1]


def _blend(picture: Image.Image, boxlist: BoxList, colours: Sequence[Colour], line: int) -> Image.Image:
    """Masks of falling score, in the frame before scaling: the best on top, all outlines above all fillings."""
    pixels = np.array(picture)
    outlines = np.zeros(pixels.shape[:2], np.int32)  # number of the object, from 1
    number = len(boxlist)
    for mask in _masks(boxlist):
        colour = colours[number - 1]
        if mask.shape != pixels.shape[:2]:
            mask = np.asarray(Image.fromarray(mask * 255).resize(picture.size, Image.Resampling.BILINEAR)) > 127
        inner = mask = mask.astype(bool)
        mixed = (1 - MASK_OPACITY) * pixels[mask] + MASK_OPACITY * np.array(colour)
        pixels[mask] = mixed.round().astype(np.uint8)
        for _ in range(line):
            padded = np.pad(inner, 1)
            inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        outlines[mask & ~inner] = number
        number -= 1
    drawn = outlines > 0
    pixels[drawn] = np.array([(0, 0, 0), *colours], np.uint8)[outlines[drawn]]
    return Image.fromarray(pixels)


def _dashed_rectangle(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, line: int) -> None:
    """Dashes from each corner on, so that small boxes keep their corners."""
    x1, y1, x2, y2 = box
    for low, high, across in ((x1, x2, False), (y1, y2, True)):
        length = high - low + 1
        parts = max(2 * round(length / (8 * line)) + 1, 3)  # dash, gap, dash, …, dash
        ends = [low + round(part * length / parts) for part in range(parts + 1)]
        for start, end in list(pairwise(ends))[::2]:
            end = max(end - 1, start)
            if across:
                draw.rectangle((x1, start, min(x1 + line - 1, x2), end), fill=colour)
                draw.rectangle((max(x2 - line + 1, x1), start, x2, end), fill=colour)
            else:
                draw.rectangle((start, y1, end, min(y1 + line - 1, y2)), fill=colour)
                draw.rectangle((start, max(y2 - line + 1, y1), end, y2), fill=colour)


def _draw_keypoints(
    draw: ImageDraw.ImageDraw,
    points: Sequence[tuple[float, float, float]],
    pairs: Sequence[tuple[int, int]],
    colour: Colour,
    line: int,
) -> None:
    black, white = (0, 0, 0), (255, 255, 255)
    limbs = [[points[a][:2], points[b][:2]] for a, b in pairs if points[a][2] > 0 and points[b][2] > 0]
    for colour_of_limb, width in ((black, line + 2), (white, line)):  # white alone would vanish on white shirts
        for limb in limbs:
            draw.line(limb, fill=colour_of_limb, width=width)
    for x, y, visibility in points:
        if visibility > 0:
            hidden = visibility == 1
            for radius, ring in ((line + 2, black), (line + 1, white)):
                corners = (x - radius, y - radius, x + radius, y + radius)
                draw.ellipse(corners, fill=None if hidden else colour, outline=ring, width=max(1, line // 2))
