"""Draws the pictures of kernels_explained.md: python docs/pictures.py. What can be computed is, by the operators."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fastrcnn import ops
from fastrcnn.ops.reference.roi_align import level_thresholds

FOLDER = Path(__file__).parent / "pictures"
# Okabe and Ito's colours, told apart with any colour vision; a white ground, which is readable on a dark page too
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, GREY, PALE = "#222222", "#8a8a8a", "#e6e6e6"
LEVELS = (BLUE, ORANGE, GREEN, RED)


def figure(width: float, height: float, *columns: float) -> tuple[Figure, list[Axes]]:
    """Panels side by side with these relative widths, without axes."""
    made, axes = plt.subplots(
        1, len(columns), figsize=(width, height), gridspec_kw={"width_ratios": columns}, layout="constrained"
    )
    panels = list(np.atleast_1d(axes))
    for panel in panels:
        panel.axis("off")
    return made, panels


def title(panel: Axes, text: str) -> None:
    panel.set_title(text, fontsize=11, color=INK, loc="left")


def note(panel: Axes, x: float, y: float, text: str, color: str = INK, size: float = 9, **how) -> None:
    panel.text(x, y, text, color=color, fontsize=size, **{"ha": "center", "va": "center"} | how)


def box(panel: Axes, x: float, y: float, width: float, height: float, **how) -> None:
    panel.add_patch(Rectangle((x, y), width, height, **{"facecolor": "none", "edgecolor": INK, "linewidth": 1} | how))


def grid(panel: Axes, columns: int, rows: int, step: float = 1) -> None:
    for x in np.arange(0, columns + step / 2, step):
        panel.plot([x, x], [0, rows], color=PALE, linewidth=0.8, zorder=0)
    for y in np.arange(0, rows + step / 2, step):
        panel.plot([0, columns], [y, y], color=PALE, linewidth=0.8, zorder=0)


def image_like(panel: Axes, width: float, height: float, margin: float = 0.5) -> None:
    panel.set_xlim(-margin, width + margin)
    panel.set_ylim(height + margin, -margin)
    panel.set_aspect("equal")


def save(made: Figure, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    made.savefig(FOLDER / f"{name}.png", dpi=110, facecolor="white", metadata={"Software": None})
    plt.close(made)


def shapes() -> None:
    """Ragged lists beside fixed shapes."""
    counts, slots = [3, 6, 1, 4], 6
    made, (left, right) = figure(9, 3.2, 1, 1)
    title(left, "Ragged: a list of tensors, sizes on the host")
    for row, count in enumerate(counts):
        for slot in range(count):
            box(left, slot * 1.1, row * 1.5, 1, 1, facecolor=SKY)
        note(left, -0.4, row * 1.5 + 0.5, f"image {row}", ha="right")
        note(left, 7.0, row * 1.5 + 0.5, "“how many?”", color=RED, ha="left")
        left.annotate(
            "",
            (count * 1.1 + 0.05, row * 1.5 + 0.5),
            (6.9, row * 1.5 + 0.5),
            arrowprops={"arrowstyle": "->", "color": RED},
        )
    note(left, 4.2, 6.4, "each question waits for the GPU, each answer is a new shape", size=9)
    title(right, "Padded: one tensor [B, 6, 4] and what is in use")
    for row, count in enumerate(counts):
        for slot in range(slots):
            filled = slot < count
            box(
                right,
                slot * 1.1,
                row * 1.5,
                1,
                1,
                facecolor=SKY if filled else "white",
                edgecolor=INK if filled else GREY,
                linestyle="-" if filled else ":",
            )
        box(right, 8.0, row * 1.5, 1, 1, facecolor=ORANGE)
        note(right, 8.5, row * 1.5 + 0.5, str(count))
        note(right, -0.4, row * 1.5 + 0.5, f"image {row}", ha="right")
    note(right, 8.5, -0.5, "count, on the device", size=9)
    note(right, 4.0, 6.4, "no question: the shape follows from the input shapes alone", size=9)
    for panel in (left, right):
        panel.set_xlim(-2.6, 10.4)
        panel.set_ylim(6.9, -0.9)
    save(made, "shapes")


def roi_align() -> None:
    """Levels by area, the samples of a box, the taps of a sample."""
    made, (left, middle, right) = figure(11, 3.9, 1.35, 1, 0.95)
    title(left, "1. The area chooses the level")
    image_like(left, 1333, 800, 20)
    box(left, 0, 0, 1333, 800, edgecolor=GREY)
    thresholds = level_thresholds([1 / 4, 1 / 8, 1 / 16, 1 / 32], 224, 4)
    for x, y, w, h in (
        (60, 80, 80, 90),
        (180, 420, 210, 120),
        (420, 90, 290, 300),
        (770, 120, 520, 620),
        (90, 640, 60, 80),
        (480, 500, 170, 240),
    ):
        level = sum(w * h >= t for t in thresholds)
        box(left, x, y, w, h, edgecolor=LEVELS[level], linewidth=2.5)
        note(left, x + 8, y - 8, f"P{level + 2}", color=LEVELS[level], ha="left", va="bottom", size=10)
    title(middle, "2. 2 × 2 samples in each bin")
    image_like(middle, 12, 12)
    grid(middle, 12, 12)
    x1, y1, side, bins = 1.6, 2.3, 9.1, 4
    for row in range(bins):
        for column in range(bins):
            step = side / bins
            corner = x1 + column * step, y1 + row * step
            box(middle, *corner, step, step, edgecolor=BLUE, linewidth=1.6)
            points = [
                (corner[0] + (i + 0.5) * step / 2, corner[1] + (j + 0.5) * step / 2) for j in (0, 1) for i in (0, 1)
            ]
            middle.scatter(*zip(*points, strict=True), s=14, color=RED, zorder=3)
    note(middle, 6, 12.45, "grey: pixels of the level; blue: bins (4 × 4 here)", size=8.5)
    title(right, "3. Four taps for each sample")
    image_like(right, 2, 2, 0.42)
    corners = [(0.3, 0.3), (1.7, 0.3), (0.3, 1.7), (1.7, 1.7)]
    x, y = 0.35, 0.65
    weights = [(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y]
    sample = 0.3 + 1.4 * x, 0.3 + 1.4 * y
    for (cx, cy), weight in zip(corners, weights, strict=True):
        right.plot([cx, sample[0]], [cy, sample[1]], color=GREY, linewidth=0.5 + 6 * weight, zorder=1)
        right.scatter(cx, cy, s=900, marker="s", color="white", edgecolor=INK, zorder=2)
        note(right, cx, cy, f"{weight:.2f}", zorder=3)
    right.scatter(*sample, s=60, color=RED, zorder=4)
    note(right, 1, 2.28, "a tap is a run of channels: 16 bytes a thread", size=8.5)
    save(made, "roi_align")


def backward() -> None:
    """Scatter: how many additions merging saves; gather: tiles and the boxes that touch them."""
    size, bins, ratio = 14, 7, 2
    region = torch.tensor([[2.2, 1.6, 12.3, 10.9]])
    taps = np.zeros((size, size), int)
    x1, y1, x2, y2 = region[0].tolist()
    for axis_y in np.arange(bins * ratio) + 0.5:
        for axis_x in np.arange(bins * ratio) + 0.5:
            y, x = y1 + axis_y * (y2 - y1) / (bins * ratio) - 0.5, x1 + axis_x * (x2 - x1) / (bins * ratio) - 0.5
            for row in (int(y), int(y) + 1):
                for column in (int(x), int(x) + 1):
                    taps[row, column] += 1
    made, (left, right) = figure(10, 4.4, 1, 1)
    title(left, f"Scatter: {taps.sum()} taps are {(taps > 0).sum()} pixels of this box")
    image_like(left, size, size)
    colours = matplotlib.colormaps["Blues"]
    for row, column in np.ndindex(taps.shape):
        count = taps[row, column]
        box(left, column, row, 1, 1, facecolor=colours(0.85 * count / taps.max()) if count else "white", edgecolor=PALE)
        if count:
            note(left, column + 0.5, row + 0.5, str(count), color="white" if count > taps.max() / 2 else INK, size=7.5)
    box(left, x1, y1, x2 - x1, y2 - y1, edgecolor=RED, linewidth=2)
    note(left, size / 2, size + 0.35, "taps on each pixel: summed in registers, then one atomic", size=9)
    title(right, "Gather: a program per tile, boxes in their order")
    image_like(right, 16, 16)
    grid(right, 16, 16)
    boxes = [
        (1.3, 1.2, 6.3, 5.4, BLUE, "box 0"),
        (5.1, 3.2, 13.5, 9.3, ORANGE, "box 1"),
        (2.4, 9.4, 9.8, 14.6, GREEN, "box 2"),
    ]
    for row in range(4):
        for column in range(4):
            word = "".join(
                "1"
                if bx1 - 1 < column * 4 + 4 and bx2 > column * 4 and by1 - 1 < row * 4 + 4 and by2 > row * 4
                else "0"
                for bx1, by1, bx2, by2, *_ in reversed(boxes)
            )
            box(right, column * 4, row * 4, 4, 4, edgecolor=GREY, linewidth=1.5)
            note(right, column * 4 + 3.85, row * 4 + 0.5, word, ha="right", color=INK if "1" in word else GREY)
    for bx1, by1, bx2, by2, color, name in boxes:
        box(right, bx1, by1, bx2 - bx1, by2 - by1, edgecolor=color, facecolor=color + "22", linewidth=2)
        note(right, bx1 + 0.2, by2 - 0.2, name, color=color, ha="left", va="bottom")
    note(right, 8, 16.4, "the word of a tile names the boxes that touch it: 001 is box 0", size=9)
    save(made, "roi_align_backward")


def nms_sets() -> None:
    """One program walks over a set, block by block."""
    made, (panel,) = figure(9, 2.9, 1)
    title(panel, "One set, one program: blocks by falling score")
    for block in range(8):
        done, now = block < 3, block == 3
        box(panel, block * 1.2, 3, 1.1, 0.8, facecolor=PALE if done else ORANGE if now else "white")
        note(panel, block * 1.2 + 0.55, 3.4, "done" if done else "64 boxes", size=8)
    kept = 4
    for slot in range(kept):
        box(panel, slot * 0.6, 0.6, 0.5, 0.7, facecolor=GREEN)
    note(panel, 0, 0.25, "boxes kept so far (L2)", ha="left", size=9)
    panel.annotate("", (1.2, 1.4), (4.0, 2.9), arrowprops={"arrowstyle": "<-", "color": INK})
    note(panel, 3.55, 1.75, "1. against all kept boxes", ha="left")
    box(panel, 6.9, 0.3, 1.9, 1.9, edgecolor=INK)
    panel.fill([6.9, 8.8, 6.9], [0.3, 0.3, 2.2], color=SKY)
    panel.annotate("", (7.3, 2.3), (4.4, 2.95), arrowprops={"arrowstyle": "->", "color": INK})
    note(
        panel,
        8.95,
        1.25,
        "2. within the block: a 64 × 64 tile\nin registers, iterated until\nnothing changes",
        ha="left",
    )
    panel.set_xlim(-0.1, 12)
    panel.set_ylim(0, 4)
    save(made, "nms_sets")


def nms_passes() -> None:
    """The bit matrix of real boxes, and how the passes settle them."""
    count, block = 256, 32
    generator = torch.Generator().manual_seed(3)
    centres = torch.rand(24, 2, generator=generator)[torch.randint(24, (count,), generator=generator)] * 100
    centres = centres + torch.randn(count, 2, generator=generator) * 4
    boxes = torch.cat([centres - 9, centres + 9 + torch.rand(count, 2, generator=generator) * 5], 1)  # by falling score
    before = torch.arange(count)[None, :] < torch.arange(count)[:, None]
    matrix = (ops.box_iou(boxes, boxes) > 0.5) & before  # [j, i]: i suppresses j
    states = [torch.ones(count, dtype=torch.bool)]
    while len(states) < 2 or not torch.equal(states[-1], states[-2]):
        states.append(~(matrix & states[-1][None]).any(1))
    kept = ops.nms(boxes, -torch.arange(count, dtype=torch.float32), 0.5)
    assert torch.equal(states[-1].nonzero()[:, 0], kept)  # the fixpoint is greedy NMS

    made, (left, right) = figure(10.5, 4.5, 1, 1.15)
    title(left, "The bit matrix: row j, the boxes that suppress it")
    image_like(left, count, count, 8)
    rows, columns = matrix.nonzero().unbind(1)
    for row in range(count // block):
        for column in range(row + 1):
            box(left, column * block, row * block, block, block, edgecolor=GREY, linewidth=0.7, facecolor="#f4f7fa")
    left.scatter(columns + 0.5, rows + 0.5, s=1.6, color=BLUE, linewidth=0)
    note(left, 172, 52, "never computed,\nnever written", color=GREY)
    note(left, 0, count + 12, "i, by falling score →", ha="left")
    title(right, f"The passes: {len(states) - 2} change something, one confirms")
    shown = torch.stack(states)
    final = torch.zeros_like(shown)
    for step in range(len(states)):
        wrong = (shown[step] != states[-1]).nonzero()
        final[step, : int(wrong[0]) if len(wrong) else count] = True
    picture = shown.int() + 2 * final.int()  # dropped, kept, dropped for good, kept for good
    right.imshow(
        picture,
        aspect="auto",
        cmap=ListedColormap(["#ffffff", SKY, PALE, BLUE]),
        vmin=0,
        vmax=3,
        interpolation="nearest",
    )
    for step in range(len(states)):
        note(right, -6, step, "start" if step == 0 else f"pass {step}", ha="right", size=9)
        right.axhline(step + 0.5, color="white", linewidth=3)
    for place, (color, text) in enumerate(
        ((BLUE, "kept, final"), (PALE, "dropped, final"), (SKY, "kept so far"), ("white", "dropped so far"))
    ):
        right.scatter(place * 70, len(states) - 0.1, marker="s", s=70, color=color, edgecolor=INK, linewidth=0.7)
        note(right, place * 70 + 7, len(states) - 0.1, text, ha="left", size=8.5)
    right.set_xlim(-34, count + 36)
    right.set_ylim(len(states) + 0.3, -0.6)
    save(made, "nms_passes")


def proposals() -> None:
    """The steps of proposal selection and what they read and write."""
    made, (panel,) = figure(10, 2.7, 1)
    steps = (
        ("logits", "all anchors,\nevery level", SKY, "keys kernel"),
        ("keys [S, length]", "−inf where not finite,\nand as padding", SKY, "torch.topk"),
        ("top-k [S, k]", "index and logit", ORANGE, "decode kernel"),
        ("boxes [S, k, 4]", "anchor from the index,\nonly k deltas read", ORANGE, "NMS kernel"),
        ("kept [S, n]", "padded with −1,\nand counts", GREEN, "merge kernel"),
        ("best P [B, P]", "ranks by search in\nsorted lists", GREEN, ""),
    )
    for place, (name, what, color, kernel) in enumerate(steps):
        x = place * 2.15
        box(panel, x, 1, 1.6, 0.7, facecolor=color + "66")
        note(panel, x + 0.8, 1.35, name, size=9)
        note(panel, x + 0.8, 0.55, what, size=8, color="#444444")
        if kernel:
            panel.annotate("", (x + 2.13, 1.35), (x + 1.62, 1.35), arrowprops={"arrowstyle": "->", "color": INK})
            note(panel, x + 1.88, 2.05, kernel, size=9, color=RED)
    panel.set_xlim(-0.1, 12.5)
    panel.set_ylim(0.1, 2.4)
    title(panel, "S = images × levels sets at once, every shape known beforehand")
    save(made, "proposals")


def bytes_moved() -> None:
    """Bytes of three operators at 8 images of 800 × 1333: by formula, not measured; atomics and repeated reads of
    gradients as `triton_kernels/roi_align.py` counts them."""
    images, levels, k = 8, 5, 1000
    maps = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
    anchors = 3 * sum(h * w for h, w in maps)
    longest = -(-3 * 200 * 336 // 16) * 16
    gt = 100
    pyramid = 256 * sum(h * w for h, w in maps[:4]) * images
    bars = [
        ("proposals: decode all anchors", images * anchors * (16 + 8 + 16), GREY),
        (
            "proposals: keys, then k boxes",
            images * (anchors * 2 + levels * longest * 2 * 2 + levels * k * (8 + 2 + 8 + 17)),
            BLUE,
        ),
        ("matching: write and read A×G once", images * anchors * gt * 4 * 2, GREY),
        ("matching: boxes in registers", images * anchors * (28 + 40), BLUE),
        ("ROIAlign gradient: scatter and cast", pyramid * (4 + 4 + 2) + 1.3e9, ORANGE),
        ("ROIAlign gradient: gather", pyramid * 2 + 0.24e9, BLUE),
    ]
    made, axes = plt.subplots(figsize=(9, 3.1), layout="constrained")
    for place, (_, size, color) in enumerate(bars):
        axes.barh(place + place // 2 * 0.4, size / 1e6, color=color, edgecolor=INK, linewidth=0.6)
        told = f"{size / 1e9:.2f} GB" if size > 1e9 else f"{size / 1e6:.0f} MB"
        axes.text(size / 1e6 * 1.08, place + place // 2 * 0.4, told, va="center", fontsize=9, color=INK)
    axes.set_yticks([place + place // 2 * 0.4 for place in range(len(bars))], [name for name, *_ in bars], fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(10, 2e4)
    axes.set_xlabel("megabytes, by formula: 8 images of 800 × 1333, bfloat16 maps (logarithmic)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    save(made, "bytes")


def rasterize() -> None:
    """A polygon, the crossings of its edges with the columns, and the operator's mask."""
    side = 14
    outline = torch.tensor([[1.2, 4.1], [5.3, 1.1], [11.9, 2.4], [12.7, 8.2], [9.1, 7.3], [7.4, 12.6], [2.6, 11.0]])
    edges = torch.cat([outline, outline.roll(-1, 0)], 1)[None, None]  # [1, 1, E, 4]
    parts = torch.zeros(edges.shape[:3], dtype=torch.int64)
    whole = torch.tensor([[[0.0, 0.0, side, side]]])
    mask = ops.rasterize_polygons(edges, parts, 1, whole, torch.zeros(1, 1, dtype=torch.int64), side)[0, 0].int()
    flips = torch.cat([mask[:1], mask[1:] ^ mask[:-1]])
    made, (left, right) = figure(9, 4.2, 1, 1)
    title(left, "Each crossing flips its column from here down")
    title(right, "Flips combined by XOR, column by column: the mask")
    for panel in (left, right):
        image_like(panel, side, side)
        grid(panel, side, side)
    for row, column in flips.nonzero().tolist():
        left.annotate("", (column + 0.5, row + 1.5), (column + 0.5, row), arrowprops={"arrowstyle": "->", "color": RED})
        left.plot([column + 0.1, column + 0.9], [row, row], color=RED, linewidth=2)
    for row, column in mask.nonzero().tolist():
        box(right, column, row, 1, 1, facecolor=SKY, edgecolor="white")
    for panel in (left, right):
        panel.plot(*torch.cat([outline, outline[:1]]).T, color=INK, linewidth=1.8)
    save(made, "rasterize")


def main() -> None:
    for draw in (shapes, roi_align, backward, nms_sets, nms_passes, proposals, bytes_moved, rasterize):
        draw()


if __name__ == "__main__":
    main()
