"""Labels that do not overlap: where each text goes, in which size, and which are left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastrcnn.visualization.colours import readable_on

# matplotlib's own: it has ticks and crosses, Greek and Cyrillic, which Pillow's has not
_FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
_SMALLEST = 8  # points
_MARGIN = 2  # between the text and the border of its plate
_SHARE = 0.2  # of the picture, that labels may hide before their letters become smaller
_NEAR = 0.5  # what a place near its object costs, in objects hidden
_REACH = 4  # how far from its box a plate may be, in plate heights

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Plate:
    """A text, shortened where the picture is too narrow, and its place: pixels x1, y1, x2, y2, the last ones exclusive.
    leader: the ends of a line between the plate and the object's box, where the two do not touch."""

    text: str
    points: int
    box: Box
    leader: tuple[tuple[int, int], tuple[int, int]] | None


def place_labels(texts: Sequence[str], boxes: Sequence[Box], size: tuple[int, int]) -> list[Plate | None]:
    """A place for each text in a picture of this (width, height), the first being the most important.

    boxes: pixels of the objects, both ends inclusive, inside the picture. A text goes to a free place at its box or,
    with a line, near it, where it hides little of the objects; else the same in smaller letters, else nowhere: None.
    No two plates overlap, all lie inside the picture. Where there are many, all letters are smaller.
    """
    points = font_points(size)
    while points > _SMALLEST and sum(map(_area, texts, repeat(points))) > _SHARE * size[0] * size[1]:
        points -= 1
    objects = np.array(boxes, dtype=np.float64).reshape(-1, 4) + np.array([0, 0, 1, 1])
    taken = np.zeros((0, 4))
    plates: list[Plate | None] = []
    for text, box in zip(texts, objects, strict=True):
        plate = None
        for smaller in sorted({points, max(round(0.75 * points), _SMALLEST), _SMALLEST}, reverse=True):
            plate = _place(text, smaller, box, size, taken, objects)
            if plate is not None:
                taken = np.concatenate([taken, [plate.box]])
                break
        plates.append(plate)
    return plates


def draw_labels(picture: Image.Image, plates: Sequence[Plate | None], colours: Sequence[tuple[int, int, int]]) -> None:
    """Plates of these colours on the picture, all lines below all plates."""
    draw = ImageDraw.Draw(picture)
    placed = [(plate, colour) for plate, colour in zip(plates, colours, strict=True) if plate is not None]
    for plate, colour in placed:
        if plate.leader is not None:
            draw.line(plate.leader, fill=readable_on(colour), width=3)
            draw.line(plate.leader, fill=colour, width=1)
    for plate, colour in placed:
        x1, y1, x2, y2 = plate.box
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=colour)
        left, top, _, _ = _extent(plate.text, plate.points)
        spot = (x1 + _MARGIN - left, y1 + _MARGIN - top)
        draw.text(spot, plate.text, font=font(plate.points), fill=readable_on(colour))


@cache
def font(points: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_FONT), points)


def font_points(size: tuple[int, int]) -> int:
    """The usual size of letters in a picture of this (width, height)."""
    return max(_SMALLEST + 3, min(size) // 36)


def _extent(text: str, points: int) -> Box:
    """Left, top, right and bottom of the text from its origin; top and bottom are the same for all texts of a font."""
    left, _, right, _ = font(points).getbbox(text)
    _, top, _, bottom = font(points).getbbox("Ág✓")
    return int(left), int(top), int(np.ceil(right)), int(np.ceil(bottom))


def _area(text: str, points: int) -> int:
    left, top, right, bottom = _extent(text, points)
    return (right - left + 2 * _MARGIN) * (bottom - top + 2 * _MARGIN)


def _place(
    text: str, points: int, box: np.ndarray, size: tuple[int, int], taken: np.ndarray, objects: np.ndarray
) -> Plate | None:
    """box [4] and objects [N, 4]: corners, the second exclusive; taken [P, 4]: plates that stand."""
    whole = text
    while True:
        left, top, right, bottom = _extent(text, points)
        sides = np.array([right - left, bottom - top]) + 2 * _MARGIN
        if sides[0] <= size[0]:
            break
        if points > _SMALLEST or len(whole) <= 1:
            return None  # whole in smaller letters, rather than cut in large ones
        whole = whole[:-1]
        text = whole + "…"
    if sides[1] > size[1]:
        return None
    least, place = np.inf, None
    for spots_of in (_spots_at, _spots_near):
        if least <= _NEAR:  # what follows costs more
            break
        spots, cost = spots_of(box, sides)
        spots = spots.clip(0, np.array(size) - sides)
        plates = np.concatenate([spots, spots + sides], 1)
        free = ~(_shared(plates, taken) > -1).all(2).any(1)  # with a pixel between them
        plates, cost = plates[free], cost[free]
        hidden = _shared(plates, objects).clip(min=0).prod(2) / (objects[:, 2:] - objects[:, :2]).prod(1)
        cost = cost + hidden.sum(1)
        if len(cost) and cost.min() < least:
            least, place = cost.min(), plates[cost.argmin()]
    return None if place is None else Plate(text, points, tuple(place.astype(int).tolist()), _leader(place, box))


def _shared(plates: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[C, P, 2]: width and height of what each of the plates [C, 4] shares with others [P, 4]; negative is a gap."""
    low = np.maximum(plates[:, None, :2], others[None, :, :2])
    return np.minimum(plates[:, None, 2:], others[None, :, 2:]) - low


def _spots_at(box: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Upper left corners [C, 2] of plates of these (width, height) at the box, and what each costs, in objects hidden:
    above it, in it at the top, below, in it at the bottom, from the left on; beside it."""
    (x1, y1, x2, y2), (width, height) = box.astype(int).tolist(), sides.tolist()
    columns = [x1, x2 - width, *range(x1 + height, x2 - width, height)]
    spots = [(x, y) for y in (y1 - height, y1, y2, y2 - height) for x in columns]
    spots += [(x, y) for y in (y1, y2 - height) for x in (x1 - width, x2)]
    return np.array(spots, dtype=np.float64), np.linspace(0, 0.3, len(spots))


def _spots_near(box: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of plates near the box, within _REACH."""
    reach, step = _REACH * sides[1], max(sides[1] // 2, 1)
    low, high = box[:2] - sides - reach, box[2:] + reach + 1
    spots = np.stack(np.meshgrid(*(np.arange(*ends, step) for ends in zip(low, high, strict=True))), -1).reshape(-1, 2)
    gap = np.linalg.norm(np.maximum(np.maximum(box[:2] - (spots + sides), spots - box[2:]), 0), axis=1)
    near = (gap > 0) & (gap <= reach)
    return spots[near], _NEAR + gap[near] / reach


def _leader(plate: np.ndarray, box: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]] | None:
    if (_shared(plate[None], box[None]) >= 0).all():
        return None
    end = ((plate[:2] + plate[2:]) / 2).clip(box[:2], box[2:] - 1)
    start = end.clip(plate[:2], plate[2:] - 1)
    return tuple(start.astype(int).tolist()), tuple(end.astype(int).tolist())
