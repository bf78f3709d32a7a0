"""Pictures: detections drawn on images, sheets of them, and the curves of a training run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from PIL import Image, ImageDraw, ImageFont

from fastrcnn.structures import BoxList

# Okabe and Ito's colours, which people with any kind of colour blindness can tell apart
PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
_YELLOW = 3  # too pale for lines on white
MASK_OPACITY = 0.45
KEYPOINT_LOGIT = 2.0  # maskrcnn-benchmark's threshold
# COCO's, from 0: legs, hips and trunk, arms, head
PERSON_SKELETON = (
    (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10),
    (0, 1), (0, 2), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6),
)  # fmt: skip
_SMALLEST_FONT = 8


def class_colour(label: int) -> tuple[int, int, int]:
    """The RGB colour of a class, 1..K: the same in every picture; it repeats after len(PALETTE) classes."""
    return PALETTE[(label - 1) % len(PALETTE)]


def draw_detections(
    image: Image.Image | torch.Tensor,
    boxlist: BoxList,
    categories: Mapping[int, str],
    threshold: float = 0.5,
    *,
    scale: int = 1,
    skeleton: Sequence[tuple[int, int]] = (),
) -> Image.Image:
    """A copy of the image, PIL or uint8 RGB [3,h,w], with the boxes, masks, keypoints and labels of `boxlist`.

    Boxes whose score is below `threshold` are left out; without field `scores`, as in ground truth, all are drawn.
    Masks come from field `rle` or `masks`, keypoints [N,K,3] from `keypoints`: those hidden (visibility 1) are hollow,
    and the pairs (from 0) of `skeleton` are joined, by default PERSON_SKELETON where there are 17. Of a model's
    keypoints those with `keypoint_scores` above KEYPOINT_LOGIT are drawn. `scale` enlarges small images, so that labels
    can be read. ValueError if the box list is of another image size.
    """
    picture = _to_pil(image)
    if tuple(boxlist.size) != picture.size:
        raise ValueError(
            f"the boxes are of an image of {tuple(boxlist.size)} (width, height), the picture is {picture.size}"
        )
    boxlist = boxlist.convert("xyxy").to("cpu")
    if boxlist.has_field("scores"):
        scores = boxlist.get_field("scores")
        boxlist = boxlist[((-scores).argsort(stable=True))[: int((scores >= threshold).sum())]]
    size = (picture.width * scale, picture.height * scale)
    picture = picture.resize(size, Image.Resampling.BICUBIC) if scale > 1 else picture
    # proposals have none
    labels = boxlist.get_field("labels").tolist() if boxlist.has_field("labels") else [0] * len(boxlist)
    colours = [class_colour(label) for label in labels]
    line = max(1, round(min(size) / 250))

    if (masks := _masks(boxlist)) is not None:
        picture = _blend(picture, masks, colours, line)
    draw = ImageDraw.Draw(picture)
    boxes = [_inside(box, size) for box in (boxlist.bbox * scale).tolist()]
    for box, colour in reversed(list(zip(boxes, colours, strict=True))):  # the best score last, on top
        draw.rectangle(box, outline=colour, width=line)
    if boxlist.has_field("keypoints"):
        keypoints = boxlist.get_field("keypoints")
        points = keypoints if isinstance(keypoints, torch.Tensor) else keypoints.keypoints
        if boxlist.has_field("keypoint_scores"):
            sure = boxlist.get_field("keypoint_scores") > KEYPOINT_LOGIT
            points = torch.cat([points[..., :2], 2.0 * sure[..., None]], 2)
        pairs = skeleton or (PERSON_SKELETON if points.shape[1] == 17 else ())
        for instance, colour in zip(points.tolist(), colours, strict=True):
            _draw_keypoints(draw, [(x * scale, y * scale, v) for x, y, v in instance], pairs, colour, line)
    texts = [str(categories.get(label, label or "object")) for label in labels]
    if boxlist.has_field("scores"):
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, boxlist.get_field("scores").tolist(), strict=True)]
    _draw_labels(draw, texts, boxes, colours, size)
    return picture


def _to_pil(image: Image.Image | torch.Tensor) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB") if image.mode != "RGB" else image.copy()
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image is {image.dtype} {list(image.shape)}, wanted a PIL image or uint8 [3, h, w]")
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def _inside(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The pixels, both ends inclusive, that a continuous box covers of a picture of this (width, height)."""
    x1, y1 = (min(max(int(value), 0), side - 1) for value, side in zip(box[:2], size, strict=True))
    x2, y2 = (min(max(round(value) - 1, 0), side - 1) for value, side in zip(box[2:], size, strict=True))
    return x1, y1, max(x1, x2), max(y1, y2)


def _masks(boxlist: BoxList) -> np.ndarray | None:
    """bool [N,h,w] from field `rle` or `masks`."""
    width, height = boxlist.size
    if boxlist.has_field("rle"):
        codes = boxlist.get_field("rle")
        if not codes:
            return np.zeros((0, height, width), bool)
        return np.stack([pycocotools.mask.decode(code) for code in codes]).astype(bool)
    if boxlist.has_field("masks"):
        return boxlist.get_field("masks").convert("mask").get_mask_tensor().numpy().astype(bool)
    return None


def _blend(picture: Image.Image, masks: np.ndarray, colours: Sequence[tuple[int, int, int]], line: int) -> Image.Image:
    """Masks of falling score, in the frame before scaling: the best on top, all outlines above all fillings."""
    pixels = np.asarray(picture).astype(np.float32)
    outlines = []
    for mask, colour in reversed(list(zip(masks, colours, strict=True))):
        large = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.BILINEAR))
        large = large > 127
        pixels[large] = (1 - MASK_OPACITY) * pixels[large] + MASK_OPACITY * np.array(colour, np.float32)
        inner = large
        for _ in range(line):
            padded = np.pad(inner, 1)
            inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        outlines.append((large & ~inner, colour))
    for outline, colour in outlines:
        pixels[outline] = colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def _draw_keypoints(
    draw: ImageDraw.ImageDraw,
    points: Sequence[tuple[float, float, float]],
    pairs: Sequence[tuple[int, int]],
    colour: tuple[int, int, int],
    line: int,
) -> None:
    for a, b in pairs:
        if points[a][2] > 0 and points[b][2] > 0:
            draw.line([points[a][:2], points[b][:2]], fill=(255, 255, 255), width=line)
    radius = line + 1
    for x, y, visibility in points:
        if visibility > 0:
            hidden = visibility == 1
            corners = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(corners, fill=None if hidden else colour, outline=(255, 255, 255), width=max(1, line // 2))


def _draw_labels(
    draw: ImageDraw.ImageDraw,
    texts: Sequence[str],
    boxes: Sequence[tuple[int, int, int, int]],
    colours: Sequence[tuple[int, int, int]],
    size: tuple[int, int],
) -> None:
    """Each text on a plate of its colour, at its box and inside the picture, where no plate of a better score is."""
    plates: list[tuple[int, int, int, int]] = []
    written = []
    for text, (x1, y1, _, y2) in zip(texts, boxes, strict=True):
        text, font, (left, top, right, bottom) = _fit(draw, text, size)
        width, height = right - left + 4, bottom - top + 4
        x = max(0, min(x1, size[0] - width))
        spots = [(x, max(0, min(y, size[1] - height))) for y in (y1 - height, y1, y2 + 1, y2 - height)]
        free = [
            spot for spot in spots if not any(_overlap((*spot, spot[0] + width, spot[1] + height), p) for p in plates)
        ]
        x, y = (free or spots)[0]
        plates.append((x, y, x + width, y + height))
        written.append(((x + 2 - left, y + 2 - top), text, font))
    for plate, (place, text, font), colour in reversed(list(zip(plates, written, colours, strict=True))):
        draw.rectangle((plate[0], plate[1], plate[2] - 1, plate[3] - 1), fill=colour)
        draw.text(place, text, font=font, fill=_readable_on(colour))


def _readable_on(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever has the higher contrast by WCAG 2: they are even at a luminance of 0.179."""
    light = np.array(colour) / 255
    linear = np.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
    return (0, 0, 0) if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else (255, 255, 255)


def _fit(draw: ImageDraw.ImageDraw, text: str, size: tuple[int, int]) -> tuple[str, Any, tuple[int, int, int, int]]:
    """Text and font that fit the picture's width, with the text's own box: a smaller font first, then fewer letters."""
    points = max(_SMALLEST_FONT + 2, min(size) // 32)
    while True:
        font = ImageFont.load_default(points)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        if right - left + 4 <= size[0] or len(text) <= 1:
            return text, font, (int(left), int(top), int(np.ceil(right)), int(np.ceil(bottom)))
        if points > _SMALLEST_FONT:
            points -= 1
        else:
            text = text[:-1]


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def contact_sheet(pictures: Sequence[Image.Image], columns: int, path: Path | str) -> None:
    """Saves the pictures, each in the middle of a cell that fits the largest, `columns` to a row, on white."""
    if not pictures or columns < 1:
        raise ValueError(
            f"contact_sheet got {len(pictures)} pictures and {columns} columns, wanted at least one of both"
        )
    gap = 4
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = (max(side) for side in zip(*(picture.size for picture in pictures), strict=True))
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (255, 255, 255))
    for number, picture in enumerate(pictures):
        x = gap + number % columns * (width + gap) + (width - picture.width) // 2
        y = gap + number // columns * (height + gap) + (height - picture.height) // 2
        sheet.paste(picture.convert("RGB"), (x, y))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def read_metrics(metrics_jsonl: Path | str) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, dict]]]:
    """Training lines and evaluation lines of a metrics file, each by iteration.

    After a resumed run the later line of an iteration counts. A last line cut short, as a killed run leaves it, is left
    out; another broken line is a ValueError with its number.
    """
    training: dict[int, dict[str, float]] = {}
    evaluations: dict[int, dict[str, dict]] = {}
    lines = Path(metrics_jsonl).read_text().splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{metrics_jsonl}, line {number}: not JSON ({error})") from None
        iteration = int(values.pop("iteration"))
        if "eval" in values:
            evaluations[iteration] = values["eval"]
        if "loss" in values:
            training[iteration] = values
    return dict(sorted(training.items())), dict(sorted(evaluations.items()))


def plot_metrics(metrics_jsonl: Path | str, path: Path | str) -> None:
    """Draws the losses, the learning rate and the evaluations (AP, AP50) of a metrics file over the iterations."""
    training, evaluations = read_metrics(metrics_jsonl)
    if not training and not evaluations:
        raise ValueError(f"{metrics_jsonl} has no line with a loss or an evaluation")
    figure = Figure(figsize=(9, 9), layout="constrained")
    losses, rate, precision = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 2))
    colours = [tuple(channel / 255 for channel in colour) for n, colour in enumerate(PALETTE) if n != _YELLOW]

    iterations = list(training)
    names = sorted({name for values in training.values() for name in values if name.startswith("loss_")})
    for number, name in enumerate(names):
        series = [values.get(name, float("nan")) for values in training.values()]
        style = ("-", "--", ":")[number // len(colours) % 3]
        losses.plot(iterations, series, style, color=colours[number % len(colours)], linewidth=1.2, label=name)
    total = [values["loss"] for values in training.values()]
    losses.plot(iterations, total, color="black", linewidth=1.8, label="loss (total)")
    if training and min(total) > 0:
        losses.set_yscale("log")
        losses.yaxis.set_major_formatter(ScalarFormatter())
    losses.set_ylabel("loss")
    losses.legend(loc="upper right", ncols=2, fontsize=9)

    rated = {iteration: values["lr"] for iteration, values in training.items() if "lr" in values}
    rate.plot(list(rated), list(rated.values()), color="black", linewidth=1.5)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)

    curves: dict[str, list[tuple[int, float]]] = {}
    for iteration, datasets in evaluations.items():
        for dataset, tasks in datasets.items():
            for task, values in tasks.items():
                for metric in ("AP", "AP50", "AR@1000"):
                    if values.get(metric, -1) >= 0:
                        curves.setdefault(f"{dataset}: {task} {metric}", []).append((iteration, values[metric]))
    for number, (name, points) in enumerate(curves.items()):
        x, y = zip(*points, strict=True)
        marker = "osD^v"[number // len(colours) % 5]
        precision.plot(x, y, marker=marker, color=colours[number % len(colours)], label=f"{name} = {y[-1]:.3f}")
    precision.set_ylim(0, 1)
    precision.set_ylabel("average precision")
    precision.set_xlabel("iteration")
    precision.xaxis.set_major_locator(MaxNLocator(integer=True))
    if curves:
        precision.legend(loc="best", fontsize=9)
    else:
        precision.text(0.5, 0.5, "not evaluated", ha="center", va="center", transform=precision.transAxes)
    for axes in (losses, rate, precision):
        axes.grid(alpha=0.3)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
