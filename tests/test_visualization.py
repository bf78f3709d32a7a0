import json
import math
import re
from xml.etree import ElementTree

import matplotlib.figure
import numpy as np
import pycocotools.mask
import pytest
import torch
from PIL import Image, ImageDraw

from fastrcnn import visualization
from fastrcnn.data import COCODataset
from fastrcnn.structures import BoxList, Keypoints, SegmentationMask
from fastrcnn.visualization import (
    class_colour,
    contact_sheet,
    draw_comparison,
    draw_detections,
    labels,
    plot_metrics,
    read_metrics,
    readable_scale,
)
from fastrcnn.visualization.labels import place_labels
from fastrcnn.visualization.svg import Series, line_chart

CATEGORIES = {1: "circle", 2: "square", 3: "a class with a name much longer than the picture is wide"}
GREY = 100


def detections(boxes, labels, scores=None, size=(120, 100)):
    boxlist = BoxList(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), size)
    boxlist.add_field("labels", torch.tensor(labels, dtype=torch.int64))
    if scores is not None:
        boxlist.add_field("scores", torch.tensor(scores, dtype=torch.float32))
    return boxlist


def grey(size=(120, 100)):
    return Image.new("RGB", size, (GREY, GREY, GREY))


def test_box_is_drawn_on_its_border_pixels():
    image = grey()
    got = np.asarray(draw_detections(image, detections([[20, 40, 70, 90]], [1], [0.9]), CATEGORIES))
    for y, x in ((40, 50), (89, 50), (65, 20), (65, 69)):
        assert tuple(got[y, x]) == class_colour(1)
    for y, x in ((91, 50), (65, 70), (65, 18), (65, 45)):
        assert tuple(got[y, x]) == (GREY, GREY, GREY)
    assert image.getextrema() == ((GREY, GREY),) * 3  # the caller's picture stays as it was


@pytest.mark.parametrize("field", ["rle", "masks"])
def test_mask_is_translucent_with_an_outline(field):
    mask = np.zeros((100, 120), np.uint8)
    mask[45:85, 30:60] = 1
    boxlist = detections([[20, 40, 70, 90]], [2], [0.9])
    if field == "rle":
        boxlist.add_field("rle", [pycocotools.mask.encode(np.asfortranarray(mask))])
    else:
        boxlist.add_field("masks", SegmentationMask(torch.from_numpy(mask)[None], (120, 100), mode="mask"))
    got = np.asarray(draw_detections(grey(), boxlist, CATEGORIES)).astype(int)
    inside = (1 - visualization.MASK_OPACITY) * GREY + visualization.MASK_OPACITY * np.array(class_colour(2))
    assert abs(got[50:80, 35:55] - inside).max() <= 1
    for y, x in ((45, 40), (84, 40), (60, 30), (60, 59)):
        assert tuple(got[y, x]) == class_colour(2)
    assert tuple(got[60, 65]) == (GREY, GREY, GREY)  # in the box, outside the mask


def test_threshold_and_ground_truth():
    boxes, labels = [[5, 30, 35, 60], [60, 60, 110, 95]], [1, 2]
    got = np.asarray(draw_detections(grey(), detections(boxes, labels, [0.4, 0.6]), CATEGORIES, threshold=0.5))
    assert tuple(got[45, 5]) == (GREY, GREY, GREY)
    assert tuple(got[80, 60]) == class_colour(2)
    got = np.asarray(draw_detections(grey(), detections(boxes, labels), CATEGORIES))
    assert tuple(got[45, 5]) == class_colour(1)
    assert tuple(got[80, 60]) == class_colour(2)


def test_the_best_box_lies_on_top():
    boxes = [[20, 40, 70, 90], [20, 40, 70, 90]]
    for scores, top in (([0.9, 0.6], 1), ([0.6, 0.9], 2)):
        got = np.asarray(draw_detections(grey(), detections(boxes, [1, 2], scores), CATEGORIES))
        assert tuple(got[70, 20]) == class_colour(top)


@pytest.mark.parametrize("box", [[0, 0, 30, 20], [100, 0, 120, 10], [110, 80, 120, 100], [-20, -20, 200, 200]])
@pytest.mark.parametrize("label", [1, 3])
def test_labels_stay_inside_the_picture(box, label, monkeypatch):
    plates, texts = [], []
    rectangle, text = ImageDraw.ImageDraw.rectangle, ImageDraw.ImageDraw.text

    def record_plate(self, xy, fill=None, **options):
        if fill is not None:
            plates.append(xy)
        return rectangle(self, xy, fill=fill, **options)

    def record_text(self, xy, string, **options):
        texts.append((self.textbbox(xy, string, font=options["font"]), options["fill"]))
        return text(self, xy, string, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", record_plate)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record_text)
    got = draw_detections(grey(), detections([box], [label], [0.87]), CATEGORIES)
    [(x1, y1, x2, y2)], [((tx1, ty1, tx2, ty2), fill)] = plates, texts
    assert 0 <= x1 < x2 < 120
    assert 0 <= y1 < y2 < 100
    assert x1 <= tx1 < tx2 <= x2 + 1
    assert y1 <= ty1 < ty2 <= y2 + 1
    plate = np.asarray(got)[y1 : y2 + 1, x1 : x2 + 1].reshape(-1, 3).astype(float)
    assert tuple(plate[0]) == class_colour(label)
    assert abs(plate - fill).sum(1).min() < 60  # letters are there


def test_text_can_be_read_on_every_colour():
    def luminance(colour):  # WCAG 2's
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    for label, colour in enumerate(visualization.PALETTE, 1):
        boxlist = detections([[100, 300, 500, 600]], [label], size=(640, 640))
        plate = np.asarray(draw_detections(grey((640, 640)), boxlist, {label: "MMMM"}))[285:298, 102:150].reshape(-1, 3)
        lights = np.array([luminance(pixel) for pixel in plate]) + 0.05
        own = luminance(colour) + 0.05
        assert np.maximum(lights / own, own / lights).max() >= 4.5  # WCAG 2's contrast for text


def test_colours_differ_for_everybody():
    """In CIELAB, as people with normal sight and with each kind of colour blindness see them."""
    machado_2009 = [  # severity 1: protanopia, deuteranopia, tritanopia; for linear RGB
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    colours = np.array(visualization.PALETTE) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    differences = []
    for matrix in [np.eye(3), *map(np.array, machado_2009)]:
        xyz = (linear @ matrix.T).clip(0, 1) @ to_xyz.T / to_xyz.sum(1)
        root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
        lab = np.stack([116 * root[:, 1], 500 * (root[:, 0] - root[:, 1]), 200 * (root[:, 1] - root[:, 2])], 1)
        differences.append(np.linalg.norm(lab[:, None] - lab[None], axis=2))
    least = np.min(differences, 0) + 1000 * np.eye(len(colours))
    assert len(colours) == 40
    assert least[:7, :7].min() > 15  # what Okabe and Ito's own colours reach
    assert least[:12, :12].min() > 15
    assert least[:20, :20].min() > 11
    assert least.min() > 6.5
    assert np.diag(least, 1).min() > 10  # classes that follow each other


def test_colour_of_a_class_never_changes():
    assert [class_colour(label) for label in range(1, 81)] == 2 * list(visualization.PALETTE)
    assert class_colour(0) == class_colour(1)


def crowd(count, size, generator, place=None):
    sides = torch.rand(count, 2, generator=generator) * 0.2 * min(size) + 4
    corner = torch.rand(count, 2, generator=generator) * (torch.tensor(size) - sides)
    if place is not None:
        corner = torch.tensor(place) + torch.rand(count, 2, generator=generator) * 20
    return torch.cat([corner, corner + sides], 1)


def overlapping(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("size", [(640, 480), (160, 120), (60, 300)])
@pytest.mark.parametrize("place", [None, (10.0, 10.0)])
def test_labels_in_a_crowd_never_overlap(size, place, monkeypatch):
    """100 detections, spread or heaped: what is drawn, read from the calls that draw it."""
    plates = []
    rectangle = ImageDraw.ImageDraw.rectangle

    def record(self, xy, fill=None, **options):
        if fill is not None:
            plates.append((*xy[:2], xy[2] + 1, xy[3] + 1))
        return rectangle(self, xy, fill=fill, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", record)
    generator = torch.Generator().manual_seed(3)
    boxes = crowd(100, size, generator, place)
    scores = torch.rand(100, generator=generator)
    best = int(scores.argmax())
    classes = torch.randint(1, 21, (100,), generator=generator)
    classes[best] = 25  # with a colour of its own
    boxlist = detections(boxes.tolist(), classes.tolist(), scores.tolist(), size)
    got = np.asarray(draw_detections(grey(size), boxlist, {n: f"class {n}" for n in range(30)}, threshold=0.0))
    for number, plate in enumerate(plates):
        assert 0 <= plate[0] < plate[2] <= size[0]
        assert 0 <= plate[1] < plate[3] <= size[1]
        assert not any(overlapping(plate, other) for other in plates[:number])
    assert len(plates) >= {(640, 480): 90, (160, 120): 5, (60, 300): 5}[size] / (1 if place is None else 4)
    first = plates[0]
    assert tuple(got[first[1], first[0]]) == class_colour(25)  # the best score's


def test_letters_become_smaller_where_there_are_many(monkeypatch):
    size = (640, 480)
    boxes = [tuple(map(int, box)) for box in crowd(100, size, torch.Generator().manual_seed(3)).tolist()]

    def points(count):
        return {plate.points for plate in place_labels(["person 0.87"] * count, boxes[:count], size) if plate}

    usual = points(10)
    assert max(points(100)) < min(usual)
    monkeypatch.setattr(labels, "_SHARE", 1.0)  # large ones first: only those that find no place become smaller
    assert max(usual) in (crowded := points(100))
    assert len(crowded) > 1


def test_place_of_labels():
    size = (640, 480)
    boxes = [(300, 200, 340, 230)] * 40
    plates = place_labels(["person 0.87"] * 40, boxes, size)
    placed = [plate for plate in plates if plate is not None]
    assert plates[0].box[3] == 200  # on top of its box
    assert plates[0].leader is None
    joined = [plate for plate in placed if plate.leader is not None]
    assert joined
    for plate in joined:
        (x, y), end = plate.leader
        assert plate.box[0] <= x < plate.box[2]
        assert plate.box[1] <= y < plate.box[3]
        assert 300 <= end[0] <= 340
        assert 200 <= end[1] <= 230
        assert max(end[1] - plate.box[3], plate.box[1] - end[1]) <= 6 * (plate.box[3] - plate.box[1])
    # what does not fit is left out, and never one of a better score for it
    full = place_labels(["person 0.87"] * 40, [(0, 0, 19, 19)] * 40, (120, 60))
    assert full[0] is not None
    assert None in full
    assert place_labels(["person"], [(0, 0, 3, 3)], (4, 4)) == [None]  # no room for a letter
    # a label does not hide another object while there is room
    [plate] = place_labels(["cat"], [(100, 100, 180, 180)], size)
    small = plate.box
    plates = place_labels(
        ["cat", "dog"], [(100, 100, 180, 180), (small[0], small[1], small[2] - 1, small[3] - 1)], size
    )
    assert not overlapping(plates[0].box, small)


def test_labels_of_a_real_crowd(test_data):
    folder = test_data / "coco_open"
    dataset = COCODataset(folder / "annotations/instances_val2017.json", folder / "val2017", keep_crowd=True)
    image, target, _ = dataset[dataset.ids.index(166918)]  # 45 people, glasses and bottles
    boxes = [tuple(int(v) for v in (*box[:2], box[2] - 1, box[3] - 1)) for box in target.bbox.tolist()]
    names = [dataset.categories[label] + " 0.99" for label in target.get_field("labels").tolist()]
    placed = [plate.box for plate in place_labels(names, boxes, image.size) if plate is not None]
    assert len(placed) == 45
    assert not any(overlapping(a, b) for number, a in enumerate(placed) for b in placed[:number])


def solid(picture, box):
    """The share of a box's upper border that has another colour than the grey of the image."""
    x1, y1, x2, _ = box
    row = np.asarray(picture)[y1, x1:x2].astype(int)
    return float((abs(row - GREY).sum(1) > 30).mean())


def test_comparison_tells_hits_misses_and_false_alarms(monkeypatch):
    written = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda d, xy, s, **o: (written.append(s), text(d, xy, s, **o))[1])
    size = (300, 240)
    found, missed, crowd_box = [20, 40, 100, 120], [180, 40, 260, 120], [20, 160, 200, 220]
    target = detections([found, missed, crowd_box], [1, 2, 1], size=size)
    target.add_field("iscrowd", torch.tensor([False, False, True]))
    shifted, false, in_crowd, unsure = [22, 42, 102, 122], [180, 160, 260, 220], [30, 170, 70, 210], [0, 0, 9, 9]
    given = detections([shifted, false, in_crowd, unsure], [1, 2, 1, 2], [0.9, 0.8, 0.7, 0.2], size)
    picture = draw_comparison(grey(size), target, given, CATEGORIES, titles=("truth", "found"))
    assert set(written) == {
        "truth: ✓ 1 found, ✗ 1 missed", "✓ circle", "✗ square", "circle (crowd)",
        "found: ✓ 1 right, ✗ 1 wrong", "✓ circle 0.90", "✗ square 0.80", "circle 0.70",
    }  # fmt: skip
    bar = picture.height - size[1]
    left, right = (picture.crop((x, bar, x + size[0], picture.height)) for x in (0, picture.width - size[0]))
    for panel, boxes in ((left, [found, missed, crowd_box]), (right, [shifted, false, in_crowd])):
        whole, *broken = [solid(panel, box) for box in boxes]
        assert whole == 1
        for share in broken:
            assert 0.3 < share < 0.8  # dashed


def test_comparison_shows_the_same_of_both():
    """A model of boxes is not compared with masks."""
    target = detections([[20, 40, 70, 90]], [1])
    target.add_field("masks", SegmentationMask(torch.ones(1, 100, 120, dtype=torch.uint8), (120, 100), mode="mask"))
    target.add_field("keypoints", Keypoints([[[60.0, 60, 2]]], (120, 100)))
    given = detections([[20, 40, 70, 90]], [1], [0.9])
    picture = draw_comparison(grey(), target, given, {})
    assert picture.getpixel((60, picture.height - 40)) == (GREY, GREY, GREY)
    given.add_field("rle", [pycocotools.mask.encode(np.zeros((100, 120), np.uint8, order="F"))])
    picture = draw_comparison(grey(), target, given, {})
    assert picture.getpixel((60, picture.height - 40)) != (GREY, GREY, GREY)


def test_comparison_of_proposals_and_of_nothing():
    proposals = BoxList([[20, 40, 70, 90], [0, 0, 9, 9]], (120, 100))
    proposals.add_field("objectness", torch.tensor([0.9, 0.1]))
    picture = draw_comparison(grey(), detections([[20, 40, 70, 90]], [1]), proposals, {})
    bar = picture.height - 100
    assert solid(picture.crop((124, bar, 244, picture.height)), [20, 40, 70, 90]) == 1
    empty = draw_comparison(grey(), detections([], []), detections([], [], []), {})
    assert empty.crop((0, bar, 120, empty.height)).getextrema() == ((GREY, GREY),) * 3


def test_keys_to_scales():
    assert [readable_scale(size, 400) for size in ((800, 300), (400, 2), (100, 150), (1, 1))] == [0.5, 1, 2, 400]


def test_keypoints_and_skeleton():
    boxlist = detections([[10, 10, 110, 90]], [2], [1.0])
    boxlist.add_field("keypoints", torch.tensor([[[30.0, 50, 2], [80, 50, 2], [60, 80, 1], [0, 0, 0]]]))
    got = np.asarray(draw_detections(grey(), boxlist, CATEGORIES, skeleton=[(0, 1), (1, 3)]))
    assert tuple(got[50, 30]) == tuple(got[50, 80]) == class_colour(2)
    assert tuple(got[80, 60]) == (GREY, GREY, GREY)  # hidden: a ring
    assert (got[76:85, 56:65] == 255).all(2).any()
    assert tuple(got[50, 55]) == (255, 255, 255)  # the limb
    assert tuple(got[2, 2]) == (GREY, GREY, GREY)  # not labelled


def test_only_sure_keypoints_of_a_model_are_drawn():
    boxlist = detections([[10, 10, 110, 90]], [2], [1.0])
    boxlist.add_field("keypoints", Keypoints([[[30.0, 50, 1], [80, 50, 1]]], (120, 100)))
    boxlist.add_field("keypoint_scores", torch.tensor([[2.5, 1.5]]))
    got = np.asarray(draw_detections(grey(), boxlist, CATEGORIES))
    assert tuple(got[50, 30]) == class_colour(2)
    assert tuple(got[50, 80]) == (GREY, GREY, GREY)


def test_scale_and_tensor_images():
    image = torch.full((3, 100, 120), GREY, dtype=torch.uint8)
    got = draw_detections(image, detections([[20, 40, 70, 90]], [1]), CATEGORIES, scale=2)
    assert got.size == (240, 200)
    assert tuple(np.asarray(got)[130, 40]) == class_colour(1)
    boxlist = detections([[20, 40, 70, 90]], [2])
    mask = np.zeros((100, 120), np.uint8)
    mask[40:90, 20:70] = 1
    boxlist.add_field("rle", [pycocotools.mask.encode(np.asfortranarray(mask))])
    got = np.asarray(draw_detections(image, boxlist, CATEGORIES, scale=0.5))
    assert got.shape == (50, 60, 3)
    assert tuple(got[40, 10]) == class_colour(2)
    assert tuple(got[30, 40]) == (GREY, GREY, GREY)
    inside = (1 - visualization.MASK_OPACITY) * GREY + visualization.MASK_OPACITY * np.array(class_colour(2))
    assert abs(got[30:43, 15:30] - inside).max() <= 1
    with pytest.raises(ValueError, match="float32"):
        draw_detections(image.float(), detections([], []), CATEGORIES)


def test_nothing_detected_and_wrong_frame():
    boxlist = detections([], [], [])
    boxlist.add_field("rle", [])
    assert draw_detections(grey(), boxlist, CATEGORIES).getextrema() == ((GREY, GREY),) * 3
    with pytest.raises(ValueError, match=r"\(120, 100\).*\(64, 64\)"):
        draw_detections(grey((64, 64)), boxlist, CATEGORIES)


def test_contact_sheet(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    pictures = [Image.new("RGB", size, c) for size, c in zip([(40, 20), (10, 30), (40, 30)], colours, strict=True)]
    contact_sheet(pictures, 2, tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        got = np.asarray(sheet)
    assert got.shape == (2 * 34 + 4, 2 * 44 + 4, 3)
    for colour, picture, (y, x) in zip(colours, pictures, [(19, 24), (19, 68), (53, 24)], strict=True):
        assert tuple(got[y, x]) == colour
        assert (got == colour).all(2).sum() == math.prod(picture.size)
    with pytest.raises(ValueError, match="0 pictures"):
        contact_sheet([], 2, tmp_path / "none.png")


def write_metrics(path, cut=""):
    lines = [
        {
            "iteration": i,
            "lr": 0.01 * (0.1 if i > 60 else 1),
            "loss": 8 / i,
            "loss_mask": 3 / i,
            "loss_classifier": 5 / i,
        }
        for i in range(10, 101, 10)
    ]
    lines.insert(5, {"iteration": 50, "eval": {"shapes_val": {"bbox": {"AP": 0.3, "AP50": 0.5, "AP/star": 0.1}}}})
    lines.append({"iteration": 100, "eval": {"shapes_val": {"bbox": {"AP": 0.4, "AP50": 0.75, "APl": -1.0}}}})
    lines[-1]["validation"] = {"loss": 2.5, "loss_mask": 1.5, "loss_classifier": 1.0}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)


def test_plot_shows_losses_rate_and_precision(tmp_path, monkeypatch):
    drawn = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k))[1])
    write_metrics(tmp_path / "metrics.jsonl", cut='{"iteration": 110, "lo')
    plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) >= 800
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    losses, rate, precision = drawn[0].axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in losses.lines}
    assert set(curves) == {"loss (total)", "validation loss (total)", "loss_mask", "loss_classifier"}
    assert curves["validation loss (total)"] == [[100, 2.5]]
    assert curves["loss_mask"] == [[i, 3 / i] for i in range(10, 101, 10)]
    assert rate.lines[0].get_ydata()[-1] == pytest.approx(0.001)
    curves = {line.get_label(): line.get_xydata().tolist() for line in precision.lines}
    assert curves == {
        "shapes_val: bbox AP = 0.400": [[50, 0.3], [100, 0.4]],
        "shapes_val: bbox AP50 = 0.750": [[50, 0.5], [100, 0.75]],
    }


def test_metrics_file_of_a_resumed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 10, "loss": 3.0}\n{"iteration": 20, "loss": 2.0}\n{"iteration": 20, "loss": 1.5}\n')
    assert read_metrics(path).training == {10: {"loss": 3.0}, 20: {"loss": 1.5}}
    path.write_text('{"iteration": 10, "loss"\n{"iteration": 20, "loss": 2.0}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1: not JSON"):
        read_metrics(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no line"):
        plot_metrics(path, tmp_path / "curves.png")


def test_chart_puts_values_where_its_ticks_say():
    values = [0.0, 1.0, float("nan"), 2.0]
    chart = line_chart([Series("a <b>", [0, 50, 75, 100], values, marked=True)], "x", "y")
    tree = ElementTree.fromstring(chart)
    assert "a <b>" in [title.text for title in tree.iter("title")]
    ticks = {(t.text, t.get("text-anchor")): t for t in tree.iter("text")}
    x = {k: float(ticks[k, "middle"].get("x")) for k in ("0", "100")}
    y = {k: float(ticks[k, "end"].get("y")) for k in ("0", "2")}
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in tree.iter("circle")]
    want = [(x["0"], y["0"]), ((x["0"] + x["100"]) / 2, (y["0"] + y["2"]) / 2), (x["100"], y["2"])]
    assert dots == [pytest.approx(point, abs=0.2) for point in want]
    assert line_chart([Series("empty", [], [])], "x", "y") == ""


def test_logarithmic_chart_of_many_points():
    x = np.arange(4000)
    tree = ElementTree.fromstring(line_chart([Series("a", x, 10.0 ** (-x / 1000))], "x", "y", log=True))
    path = next(p for p in tree.iter("path") if "line" in p.get("class"))
    points = np.array([part.split() for part in re.split("[ML]", path.get("d"))[1:]], dtype=float)
    assert len(points) == 400
    slope = np.diff(points[:, 1]) / np.diff(points[:, 0])
    assert slope == pytest.approx(slope.mean(), abs=0.2)  # a straight line
    ticks = {t.text: float(t.get("y")) for t in tree.iter("text") if t.get("text-anchor") == "end"}
    assert ticks["0.01"] - ticks["0.1"] == pytest.approx(ticks["0.1"] - ticks["1"], abs=0.2)
