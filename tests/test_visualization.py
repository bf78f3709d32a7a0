import json
import math

import numpy as np
import pycocotools.mask
import pytest
import torch
from PIL import Image, ImageDraw

from fastrcnn import visualization
from fastrcnn.structures import BoxList, Keypoints, SegmentationMask
from fastrcnn.visualization import class_colour, contact_sheet, draw_detections, plot_metrics, read_metrics

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


def test_labels_of_one_place_do_not_cover_each_other():
    got = np.asarray(draw_detections(grey(), detections([[20, 40, 70, 90]] * 2, [1, 2], [0.9, 0.8]), CATEGORIES))
    for label in (1, 2):
        assert (got == class_colour(label)).all(2).sum() > 150  # both plates are seen, and not only a border


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
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)


def test_plot_shows_losses_rate_and_precision(tmp_path, monkeypatch):
    drawn = []
    save = visualization.Figure.savefig
    monkeypatch.setattr(visualization.Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k))[1])
    write_metrics(tmp_path / "metrics.jsonl", cut='{"iteration": 110, "lo')
    plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) >= 800
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    losses, rate, precision = drawn[0].axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in losses.lines}
    assert set(curves) == {"loss (total)", "loss_mask", "loss_classifier"}
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
    assert read_metrics(path)[0] == {10: {"loss": 3.0}, 20: {"loss": 1.5}}
    path.write_text('{"iteration": 10, "loss"\n{"iteration": 20, "loss": 2.0}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1: not JSON"):
        read_metrics(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no line"):
        plot_metrics(path, tmp_path / "curves.png")
