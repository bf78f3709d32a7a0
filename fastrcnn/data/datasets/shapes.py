"""A procedural dataset in COCO's layout: learnable in minutes, with what makes real data hard.

Textured backgrounds, shapes that occlude each other, instances in several parts, a stick figure with keypoints. Only
visible pixels are annotated. An image depends on (seed, split, number) alone: the same parameters give the same bytes.
"""

import colorsys
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

FIGURE_KEYPOINTS = (
    "head", "neck", "left_elbow", "right_elbow", "left_hand", "right_hand",
    "hip", "left_knee", "right_knee", "left_foot", "right_foot",
)  # fmt: skip
# numbered from 1, as COCO does
FIGURE_SKELETON = ((1, 2), (2, 3), (2, 4), (3, 5), (4, 6), (2, 7), (7, 8), (7, 9), (8, 10), (9, 11))
CATEGORIES = ("circle", "square", "triangle", "star", "bars", "figure")

MIN_VISIBLE = 0.5  # of its pixels; a shape that would leave less of another, or of itself, is not placed
_FORMAT = 1  # raise it when the pictures or the annotations change
_MARKER = "shapes.json"
_FLATNESS = 0.6  # pixels by which a polygon may leave the outline that it simplifies


def ensure_shapes(root: Path, *, train: int = 1200, val: int = 200, size: int = 128, seed: int = 0) -> None:
    """Makes `root/{train,val}/*.png` (RGB, size × size) and `root/annotations/instances_{train,val}.json` if absent.

    Built in a temporary folder beside `root` and renamed, so `root` is complete or absent; when two processes make it
    at once, one wins and both return. FileExistsError if `root` holds something else, or images of other parameters.
    """
    root = Path(root)
    parameters = {"format": _FORMAT, "train": train, "val": val, "size": size, "seed": seed}
    if _exists(root, parameters):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        building.chmod(0o755)  # mkdtemp's own mode locks other users out
        first_id = 1
        for split, count in (("train", train), ("val", val)):
            _write_split(building, split, count, size, seed, first_id)
            first_id += count
        (building / _MARKER).write_text(json.dumps(parameters) + "\n")
        try:
            os.rename(building, root)
        except OSError:
            if not _exists(root, parameters):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _exists(root: Path, parameters: dict[str, int]) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    marker = root / _MARKER
    found = json.loads(marker.read_text()) if marker.is_file() else "another content"
    if found != parameters:
        raise FileExistsError(
            f"{root} holds {found}, wanted the shapes dataset {parameters}: move or delete the folder"
        )
    return True


def _write_split(root: Path, split: str, count: int, size: int, seed: int, first_id: int) -> None:
    (root / split).mkdir()
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        rng = np.random.default_rng([seed, ("train", "val").index(split), number])
        pixels, objects = draw_scene(rng, size)
        name = f"{number:06d}.png"
        Image.fromarray(pixels).save(root / split / name, compress_level=1)  # noise does not compress
        image_id = first_id + number
        images.append({"id": image_id, "file_name": name, "width": size, "height": size})
        annotations += [{"id": len(annotations) + n, "image_id": image_id, **o} for n, o in enumerate(objects, 1)]
    categories: list[dict] = [{"id": n, "name": name, "supercategory": "shape"} for n, name in enumerate(CATEGORIES, 1)]
    categories[-1] |= {"keypoints": list(FIGURE_KEYPOINTS), "skeleton": [list(pair) for pair in FIGURE_SKELETON]}
    content = {
        "info": {"description": f"shapes, format {_FORMAT}, seed {seed}"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@dataclass
class _Shape:
    category: int
    mask: np.ndarray  # bool [size, size]: what is still visible
    full_area: int  # pixels, also those outside the image or covered
    keypoints: np.ndarray | None  # [K, 2] (x, y)


def draw_scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[dict]]:
    """One image, uint8 RGB [size, size, 3], and its COCO annotations without `id` and `image_id`.

    2 to 6 objects of 18 to 55 % of the image in diameter (23 to 70 pixels of 128); a later one covers an earlier one.
    """
    pixels = _background(rng, size)
    shapes: list[_Shape] = []
    first_hue, wanted = rng.random(), rng.integers(2, 7)
    for _ in range(8 * wanted):
        if len(shapes) == wanted:
            break
        shape = _candidate(rng, size)
        if shape.mask.sum() < MIN_VISIBLE * shape.full_area or any(
            (other.mask & ~shape.mask).sum() < MIN_VISIBLE * other.full_area for other in shapes
        ):
            continue
        for other in shapes:
            other.mask &= ~shape.mask
        # golden-ratio steps keep the hues of one image apart, so that outlines of overlapping shapes can be seen
        _paint(rng, pixels, shape.mask, hue=(first_hue + 0.618 * len(shapes)) % 1)
        shapes.append(shape)
    noise = rng.normal(0, 5, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8), [_annotation(shape) for shape in shapes]


def _annotation(shape: _Shape) -> dict:
    rows, columns = np.flatnonzero(shape.mask.any(1)), np.flatnonzero(shape.mask.any(0))
    x, y, w, h = columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]
    annotation = {
        "category_id": shape.category,
        "segmentation": [polygon.ravel().round(2).tolist() for polygon in mask_to_polygons(shape.mask)],
        "area": int(shape.mask.sum()),
        "bbox": [int(x), int(y), int(w), int(h)],
        "iscrowd": 0,
    }
    if shape.keypoints is not None:
        values: list[float] = []
        for x, y in shape.keypoints:
            visibility = 2 if shape.mask[int(y), int(x)] else 1
            # COCO's keypoints count from the middle of the first pixel, its boxes and polygons from the corner
            values += [round(float(x) - 0.5, 2), round(float(y) - 0.5, 2), visibility]
        annotation |= {"keypoints": values, "num_keypoints": len(shape.keypoints)}
    return annotation


def _inside_polygon(vertices: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The test "is this point inside" for vertices [V, 2], even-odd rule; units here are the radius of the shape."""

    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        result = np.zeros(x.shape, bool)
        for (xa, ya), (xb, yb) in zip(vertices, np.roll(vertices, -1, 0), strict=True):
            if ya != yb:
                result ^= ((ya > y) != (yb > y)) & (x < xa + (y - ya) * (xb - xa) / (yb - ya))
        return result

    return inside


def _regular(corners: int) -> np.ndarray:
    angles = 2 * np.pi * np.arange(corners) / corners
    return np.stack([np.sin(angles), -np.cos(angles)], 1)


def _square() -> np.ndarray:
    return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * np.sqrt(0.5)


def _star() -> np.ndarray:
    return _regular(10) * np.where(np.arange(10) % 2, 0.45, 1.0)[:, None]


def _inside_circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) <= 1


def _inside_bars(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.abs(x) <= 0.8) & (np.abs(y) >= 0.14) & (np.abs(y) <= 0.6)


def _figure(rng: np.random.Generator) -> np.ndarray:
    """Joints [11, 2] of a figure that faces us, so its left is at larger x; within 0.86 of the centre."""
    elbows = [(side * rng.uniform(0.28, 0.4), rng.uniform(-0.35, -0.05)) for side in (1, -1)]
    hands = [(side * rng.uniform(0.48, 0.63), rng.uniform(-0.58, 0.25)) for side in (1, -1)]
    knees = [(side * rng.uniform(0.16, 0.32), rng.uniform(0.45, 0.52)) for side in (1, -1)]
    feet = [(side * rng.uniform(0.24, 0.42), 0.75) for side in (1, -1)]
    return np.array([(0, -0.72), (0, -0.4), *elbows, *hands, (0, 0.15), *knees, *feet])


def _inside_figure(joints: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        result = np.hypot(x - joints[0, 0], y - joints[0, 1]) <= 0.26
        for a, b in FIGURE_SKELETON[1:]:
            start, along = joints[a - 1], joints[b - 1] - joints[a - 1]
            t = np.clip(((x - start[0]) * along[0] + (y - start[1]) * along[1]) / (along @ along), 0, 1)
            result |= np.hypot(x - start[0] - t * along[0], y - start[1] - t * along[1]) <= 0.14
        return result

    return inside


def _candidate(rng: np.random.Generator, size: int) -> _Shape:
    category = int(rng.integers(1, len(CATEGORIES) + 1))
    name, joints, turn = CATEGORIES[category - 1], None, rng.uniform(-0.35, 0.35)
    radius = size * rng.uniform(0.09, 0.275)
    if name == "circle":
        inside = _inside_circle
    elif name == "square":
        inside = _inside_polygon(_square())
    elif name == "triangle":
        inside = _inside_polygon(_regular(3))
    elif name == "star":
        inside = _inside_polygon(_star())
    elif name == "bars":
        inside, radius = _inside_bars, size * rng.uniform(0.12, 0.275)  # the gap stays open
    else:
        joints = _figure(rng)
        inside, radius = _inside_figure(joints), size * rng.uniform(0.18, 0.275)

    margin = radius if joints is not None else 0.85 * radius  # all keypoints lie in the image
    centre = rng.uniform(margin, size - margin, 2)
    cosine, sine = np.cos(turn), np.sin(turn)
    low, high = np.floor(centre - radius).astype(int), np.ceil(centre + radius).astype(int)
    y, x = np.mgrid[low[1] : high[1], low[0] : high[0]] + 0.5  # pixel centres
    x, y = (x - centre[0]) / radius, (y - centre[1]) / radius
    window = inside(x * cosine + y * sine, y * cosine - x * sine)

    mask = np.zeros((size, size), bool)
    start, stop = np.maximum(low, 0), np.minimum(high, size)
    cut = window[start[1] - low[1] : stop[1] - low[1], start[0] - low[0] : stop[0] - low[0]]
    mask[start[1] : stop[1], start[0] : stop[0]] = cut
    if joints is not None:
        joints = joints @ np.array([[cosine, sine], [-sine, cosine]]) * radius + centre
    return _Shape(category, mask, int(window.sum()), joints)


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """[size, size], about −1..1: a random grid of cells × cells, interpolated."""
    grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))


def _waves(rng: np.random.Generator, size: int, period: float) -> np.ndarray:
    """[size, size], −1..1: stripes in a random direction, `period` pixels apart."""
    turn, y, x = rng.uniform(0, np.pi), *np.mgrid[:size, :size]
    return np.sin((x * np.cos(turn) + y * np.sin(turn)) * 2 * np.pi / period + rng.uniform(0, 2 * np.pi))


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """float64 [size, size, 3], 0..255: dull colours, dark or bright, in blotches, some with stripes."""
    level = rng.choice([rng.uniform(45, 90), rng.uniform(165, 210)])
    tint = rng.uniform(-18, 18, 3)
    texture = 16 * _smooth_noise(rng, size, 5) + 10 * _smooth_noise(rng, size, 20)
    if rng.random() < 0.5:
        texture = texture + 9 * _waves(rng, size, rng.uniform(6, 20))
    blotches = np.stack([_smooth_noise(rng, size, 4) for _ in range(3)], -1)
    return level + tint + texture[..., None] + 12 * blotches


def _paint(rng: np.random.Generator, pixels: np.ndarray, mask: np.ndarray, hue: float) -> None:
    """Colours the pixels of the mask in place: a strong colour, lightly textured, with a dark or bright rim."""
    colour = 255 * np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.65, 0.95), rng.uniform(0.75, 1.0)))
    texture = (
        14 * _waves(rng, len(mask), rng.uniform(4, 12)) if rng.random() < 0.4 else 12 * _smooth_noise(rng, len(mask), 8)
    )
    pixels[mask] = colour + texture[mask][:, None]
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    rim = mask & ~inner
    pixels[rim] = 0.35 * pixels[rim] + (0 if rng.random() < 0.7 else 165)


def mask_to_polygons(mask: np.ndarray) -> list[np.ndarray]:
    """bool [H, W] → closed polygons, each float64 [V, 2] (x, y) in pixels, that cover the mask and nothing else.

    One polygon per 4-connected part; a part with a hole is cut in two, since COCO's polygons have no holes. Diagonal
    stairs become straight: the polygon stays within about a pixel of the outline.
    """
    loops = _outlines(mask)
    hole = next((loop for loop in loops if _signed_area(loop) < 0), None)
    if hole is not None:
        column = int(hole[:, 0].min() + hole[:, 0].max()) // 2
        left, right = mask.copy(), mask.copy()
        left[:, column:] = False
        right[:, :column] = False
        return mask_to_polygons(left) + mask_to_polygons(right)
    return [_simplify(loop) for loop in loops]


def _signed_area(loop: np.ndarray) -> float:
    x, y = loop[:, 0], loop[:, 1]
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Loops of pixel corners, int [V, 2] one pixel apart, clockwise on the screen; holes run the other way."""
    padded = np.pad(mask, 1).astype(np.int8)
    leaving: dict[tuple[int, int], list[tuple[int, int]]] = {}  # corner → directions of the edges that start there
    down, across = np.diff(padded, axis=0)[:, 1:-1], np.diff(padded, axis=1)[1:-1]
    for edges, dx, dy, sx, sy in (
        (down == 1, 1, 0, 0, 0),  # top edge of a pixel: to the right
        (across == -1, 0, 1, 0, 0),  # right edge: down
        (down == -1, -1, 0, 1, 0),  # bottom edge: to the left
        (across == 1, 0, -1, 0, 1),  # left edge: up
    ):
        for y, x in zip(*(axis.tolist() for axis in np.nonzero(edges)), strict=True):
            leaving.setdefault((x + sx, y + sy), []).append((dx, dy))
    loops = []
    while leaving:
        corner = start = next(iter(leaving))
        direction = leaving[start][0]
        loop = []
        while True:
            loop.append(corner)
            ways = leaving[corner]
            right_turn = (-direction[1], direction[0])  # where two pixels touch at a corner, stay with the own one
            direction = right_turn if right_turn in ways else ways[0]
            ways.remove(direction)
            if not ways:
                del leaving[corner]
            corner = (corner[0] + direction[0], corner[1] + direction[1])
            if corner == start:
                break
        loops.append(np.array(loop))
    return loops


def _simplify(loop: np.ndarray) -> np.ndarray:
    """Douglas and Peucker's rule on the middles of the edges, which lie on the line where corners make stairs of it."""
    corners = loop[(np.roll(loop, -1, 0) + np.roll(loop, 1, 0) != 2 * loop).any(1)].astype(float)
    if len(corners) <= 6:
        return corners
    points = (loop + np.roll(loop, -1, 0)) / 2
    far = int(((points - points[0]) ** 2).sum(1).argmax())
    closed = np.concatenate([points, points[:1]])
    kept, spans = {0, far}, [(0, far), (far, len(points))]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        chord = closed[last] - closed[first]
        offset = closed[first + 1 : last] - closed[first]
        distance = np.abs(offset[:, 0] * chord[1] - offset[:, 1] * chord[0]) / max(np.hypot(*chord), 1e-9)
        worst = int(distance.argmax())
        if distance[worst] > _FLATNESS:
            middle = first + 1 + worst
            kept.add(middle)
            spans += [(first, middle), (middle, last)]
    polygon = points[sorted(kept)]
    # a sliver, whose sides are nearer to each other than the tolerance, would collapse
    return polygon if _signed_area(polygon) > 0.85 * _signed_area(loop) else corners
