"""The report's figures against pycocotools, brute force and hand-made runs; its HTML as a browser without network
would read it."""

import base64
import contextlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fastrcnn.config import dump_config, load_config
from fastrcnn.data import build_dataset
from fastrcnn.data.datasets.shapes import ensure_shapes
from fastrcnn.engine.inference import save_predictions
from fastrcnn.evaluation import Judged, best_threshold, evaluate, evaluate_coco, evaluate_voc, match_detections
from fastrcnn.report import write_report
from fastrcnn.structures import BoxList

# ------------------------------------------------------------------------------------------------------------- figures


def run_cocoeval(folder, task, crowds=0, **parameters):
    """The fixture by pycocotools; every `crowds`-th object made a crowd."""
    files = folder / "eval_fixtures/coco_bbox_segm"
    truth = json.loads((files / "instances_val2014_100.json").read_text())
    for annotation in truth["annotations"][::crowds] if crowds else ():
        annotation["iscrowd"] = 1
    results = json.loads((files / f"instances_val2014_fake{task}100_results.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes([dict(result) for result in results]), task)
        for name, value in parameters.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
    return coco, results, evaluation


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_curves_are_those_of_pycocotools(test_data, tmp_path, task):
    coco, results, evaluation = run_cocoeval(test_data, task)
    measures = evaluate_coco(coco, results, task, curves=tmp_path / "curves.npz")
    file = np.load(tmp_path / "curves.npz")
    want = evaluation.eval["precision"][:, :, :, 0, -1]
    np.testing.assert_allclose(file["precision"], want, atol=1e-6)
    np.testing.assert_allclose(file["recall"], evaluation.params.recThrs, atol=1e-6)
    np.testing.assert_allclose(file["thresholds"], evaluation.params.iouThrs, atol=1e-6)
    assert file["classes"].tolist() == [coco.cats[k]["name"] for k in sorted(coco.cats)]
    known = file["precision"][:, :, (file["precision"] > -1).any((0, 1))]
    assert known.mean() == pytest.approx(measures["AP"], abs=1e-6)
    assert known[0].mean() == pytest.approx(measures["AP50"], abs=1e-6)


def test_matches_are_those_of_pycocotools(test_data):
    coco, results, evaluation = run_cocoeval(test_data, "bbox", crowds=5, iouThrs=np.array([0.5]))
    compared = ignored_ones = 0
    for image_id in coco.getImgIds():
        image = coco.imgs[image_id]
        size = (image["width"], image["height"])
        objects = coco.imgToAnns[image_id]
        found = [result for result in results if result["image_id"] == image_id]
        target = BoxList([o["bbox"] for o in objects], size, "xywh")
        target.add_field("labels", torch.tensor([o["category_id"] for o in objects], dtype=torch.int64))
        target.add_field("iscrowd", torch.tensor([bool(o["iscrowd"]) for o in objects], dtype=torch.bool))
        boxlist = BoxList([f["bbox"] for f in found], size, "xywh")
        boxlist.add_field("labels", torch.tensor([f["category_id"] for f in found], dtype=torch.int64))
        boxlist.add_field("scores", torch.tensor([f["score"] for f in found], dtype=torch.float64))
        matched, ignored = match_detections(target, boxlist)
        verdicts = {}
        everything = evaluation.params.areaRng[0]
        for entry in evaluation.evalImgs:
            if entry is not None and entry["image_id"] == image_id and entry["aRng"] == everything:
                for k, number in enumerate(entry["dtIds"]):
                    verdicts[number] = (entry["dtMatches"][0, k] > 0, bool(entry["dtIgnore"][0, k]))
        ids = [number for number, result in enumerate(results, 1) if result["image_id"] == image_id]
        for row, number in enumerate(ids):
            if number in verdicts:  # beyond 100 per class they are not evaluated
                assert (matched[row] >= 0, bool(ignored[row])) == verdicts[number]
                compared += 1
                ignored_ones += bool(ignored[row])
    assert compared > 500
    assert ignored_ones > 20


def test_curves_of_voc(tmp_path):
    """Cats: right, wrong, right of three, so precision 1 to recall 1/3, 2/3 to 2/3, then 0; no bird exists."""

    class Cats:
        categories = {1: "cat", 2: "bird"}  # noqa: RUF012

        def __len__(self):
            return 1

        def get_groundtruth(self, index):
            target = BoxList([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], (100, 100))
            target.add_field("labels", torch.tensor([1, 1, 1]))
            return target

    found = BoxList([[0, 0, 10, 10], [60, 60, 70, 70], [20, 0, 30, 10]], (100, 100))
    found.add_field("labels", torch.tensor([1, 1, 1]))
    found.add_field("scores", torch.tensor([0.9, 0.8, 0.7]))
    measures = evaluate_voc(Cats(), {0: found}, tmp_path)
    file = np.load(tmp_path / "bbox_curves.npz")
    assert file["classes"].tolist() == ["cat", "bird"]
    assert file["thresholds"].tolist() == [0.5]
    cat, bird = file["precision"][0].T
    recall = file["recall"]
    np.testing.assert_allclose(cat, np.where(recall <= 1 / 3, 1, np.where(recall <= 2 / 3, 2 / 3, 0)), atol=1e-6)
    assert (bird == -1).all()
    assert measures["AP50/cat"] == pytest.approx(cat.mean(), abs=0.01)  # area, and 101 samples of it


def test_best_threshold_by_brute_force():
    generator = np.random.default_rng(0)
    for _ in range(300):
        judged = []
        for index in range(5):
            right, wrong = (generator.integers(0, 10, generator.integers(0, 6)) / 10 for _ in range(2))
            judged.append(Judged(index, right, wrong, len(right) + int(generator.integers(0, 3))))

        def f1(threshold, judged=judged):
            right, wrong, missed = np.sum([j.counts(threshold) for j in judged], 0)
            return 2 * right / max(2 * right + wrong + missed, 1)

        scores = [score for j in judged for score in (*j.right, *j.wrong)]
        assert f1(best_threshold(judged)) == pytest.approx(max(map(f1, scores)))
    assert best_threshold([]) == best_threshold([Judged(0, np.zeros(0), np.ones(3), 2)]) == 0.5


# -------------------------------------------------------------------------------------------------------------- report


class Page(HTMLParser):
    """What a browser would make of a file: rows of tables, addresses, tags, pictures, text."""

    VOID = ("meta", "img")

    def __init__(self, path):
        super().__init__()
        self.rows, self.addresses, self.tags, self.open, self.words = [], [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == [], "tags that are not closed"
        self.text = " ".join(" ".join(self.words).split())
        self.pictures = re.findall(r'alt="([^"]*)" src="data:image/jpeg;base64,([^"]+)"', self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "xlink:href")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if self.rows and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data


def check_self_contained(page):
    assert "script" not in page.tags
    for address in page.addresses:
        assert address.startswith(("#", "data:image/jpeg;base64,"))
    assert "http" not in page.source.replace("https", "http").lower().split("<body>")[0]
    assert "@import" not in page.source
    assert "url(" not in page.source
    assert "prefers-color-scheme:dark" in page.source
    targets = set(re.findall(r' id="([^"]+)"', page.source))
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= targets
    assert len(page.source) < 3e6


def predicted(size, boxes, labels, scores):
    boxlist = BoxList(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), size)
    boxlist.add_field("labels", torch.tensor(labels, dtype=torch.int64))
    boxlist.add_field("scores", torch.tensor(scores, dtype=torch.float32))
    return boxlist


def write_run(folder, cfg, metrics=(), log=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yml").write_text(dump_config(cfg))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / "log.txt").write_text(log)
    return folder


TRAINING = [
    {"iteration": k, "lr": 0.01, "loss": 3.0 / k, "loss_a": 2.0 / k, "loss_<b>": 1.0 / k, "time": 2.0, "data_time": 0.5,
     "images_per_second": 4.0, "max_mem_mb": 2048.0} for k in range(10, 101, 10)
]  # fmt: skip
LOG = """2026-01-02 03:04:05,678 INFO python 3.11.7, torch 2.11.0, 1 process(es) on cpu, seed 1
2026-01-02 03:04:06,000 WARNING 3 bad annotations skipped: <b>bold</b>
2026-01-02 03:04:06,000 WARNING 3 bad annotations skipped: <b>bold</b>
2026-01-02 03:05:00,000 INFO resumed out/model_0000050.pth at iteration 50
2026-01-02 03:06:00,000 INFO shapes: 4 images in 10.0 s, 2.5 s / img per device, on 1 device(s)
2026-01-02 03:07:00,000 INFO shapes: 4 images in 12.5 s, 3.1 s / img per device, on 1 device(s)
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """COCO's form, with a class name that is HTML: (folder, the keys that register the data)."""
    folder = tmp_path_factory.mktemp("report")
    ensure_shapes(folder / "shapes", train=8, val=8)
    file = folder / "shapes/annotations/instances_val.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "<script>alert(1)</script>"
    file.write_text(json.dumps(content))
    entry = {"img_dir": str(folder / "shapes/val"), "ann_file": str(file)}
    keys = ["DATASETS.REGISTER", str({"shapes": entry}), "DATASETS.TEST", "('shapes',)", "MODEL.DEVICE", "cpu"]
    return folder, keys


def test_report_of_a_run(shapes, tmp_path):
    _, keys = shapes
    cfg = load_config("quick_start", [*keys, "SOLVER.BASE_LR", "0.0123"])
    dataset = build_dataset(cfg, "shapes", False)
    predictions = {}
    for index in range(8):  # image k has k false detections; the first finds nothing
        truth = dataset.get_groundtruth(index)
        boxes, labels = truth.bbox.tolist(), truth.get_field("labels").tolist()
        if index == 0:
            boxes, labels = [[0, 0, 3, 3]], labels[:1]
        else:
            boxes, labels = boxes + [[0, 0, 3, 3]] * index, labels + [labels[0]] * index
        scores = [0.9] * len(labels)
        predictions[index] = predicted(truth.size, boxes, labels, scores)
    run = write_run(
        tmp_path / "a <run>", cfg, [*TRAINING, {"iteration": 50, "eval": {"shapes": {"bbox": {"AP": 0.1}}}}], LOG
    )
    folder = run / "inference/shapes"
    measures = evaluate(dataset, predictions, folder)["bbox"]
    save_predictions(predictions, folder / "predictions.pth")
    with (run / "metrics.jsonl").open("a") as file:
        entry = {"eval": {"shapes": {"bbox": measures}}, "validation": {"loss": 1.5, "loss_a": 1.0, "loss_<b>": 0.5}}
        file.write(json.dumps({"iteration": 100, **entry}) + "\n")

    assert write_report(run) == run / "report.html"
    page = Page(run / "report.html")
    check_self_contained(page)
    rows = {row[0].strip(): row[1:] for row in page.rows if row}
    for metric in ("AP", "AP50", "AP75", "APs", "APm", "AR100"):
        assert rows[metric][0] == f"{measures[metric]:.3f}"
    labels = torch.cat([dataset.get_groundtruth(i).get_field("labels") for i in range(8)]).tolist()
    for label, name in dataset.categories.items():
        assert rows[name] == [str(labels.count(label)), f"{measures[f'AP/{name}']:.3f}"]
    assert rows["SOLVER.BASE_LR"] == ["0.0123", str(load_config().SOLVER.BASE_LR)]
    assert "SOLVER.MOMENTUM" not in rows
    # 100 iterations of 2 s, of which 0.5 s waited
    assert rows["training: forward, backward, update"] == ["0:02:30", "67.4 %"]
    assert rows["training: waiting for images"] == ["50.0 s", "22.5 %"]
    assert rows["detecting on shapes"] == ["22.5 s", "10.1 %"]
    assert rows["2×"] == ["3 bad annotations skipped: <b>bold</b>"]
    assert rows["2026-01-02 03:05:00"] == ["resumed out/model_0000050.pth at iteration 50"]
    assert "2.0 GiB GPU memory" in page.text
    assert "100 of 800 iterations" in page.text
    assert "a <run>" in page.text
    titles = re.findall(r"<title>([^<]*)</title>", page.source)
    for name in ("loss (total)", "validation loss (total)", "loss_a", "loss_&lt;b&gt;", "shapes: bbox AP"):
        assert name in titles
    best_class = max((k for k in measures if "/" in k), key=measures.get).removeprefix(
        "AP/"
    )  # nothing else was found below IoU 0.95
    assert f"{best_class} (AP50 {measures['AP/' + best_class]:.3f})" in page.text

    # images from the worst to the best, by hand
    f1 = {0: 0.0}
    for index in range(1, 8):
        right = len(dataset.get_groundtruth(index))
        f1[index] = 2 * right / (2 * right + index)
    order = sorted(f1, key=f1.get)
    told = [re.match(r"image (\S+): F1 (\S+)", alt).groups() for alt, _ in page.pictures]
    assert [float(value) for _, value in told[:4]] == [pytest.approx(f1[k], abs=0.005) for k in order[:4]]
    assert [float(value) for _, value in told[4:]] == [pytest.approx(f1[k], abs=0.005) for k in order[:3:-1]]
    assert told[0][0] == dataset.get_img_info(0)["file_name"]
    for _, data in page.pictures:
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.width == 2 * 384 + 4


def test_pictures_stay_small(shapes, tmp_path, monkeypatch):
    """Images of noise, which JPEG cannot make small."""
    folder, keys = shapes
    generator = np.random.default_rng(0)
    (tmp_path / "noise").mkdir()
    for path in (folder / "shapes/val").iterdir():
        noise = generator.integers(0, 256, (400, 400, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "noise" / path.name, compress_level=0)
    content = json.loads((folder / "shapes/annotations/instances_val.json").read_text())
    for image in content["images"]:
        image["width"] = image["height"] = 400
    (tmp_path / "noise.json").write_text(json.dumps(content))
    entry = {"img_dir": str(tmp_path / "noise"), "ann_file": str(tmp_path / "noise.json")}
    cfg = load_config("quick_start", [*keys, "DATASETS.REGISTER", str({"shapes": entry})])
    run = write_run(tmp_path / "run", cfg, [{"iteration": 1, "eval": {"shapes": {"bbox": {"AP": 0.0}}}}])
    (run / "inference/shapes").mkdir(parents=True)
    nothing = {index: predicted((400, 400), [], [], []) for index in range(8)}
    save_predictions(nothing, run / "inference/shapes/predictions.pth")
    page = Page(write_report(run))
    check_self_contained(page)
    assert len(page.pictures) == 8
    assert max(len(base64.b64decode(data)) for _, data in page.pictures) <= 150_000


def run_of_proposals(keys, folder):
    cfg = load_config("quick_start", [*keys, "MODEL.RPN_ONLY", "True", "MODEL.MASK_ON", "False"])
    dataset = build_dataset(cfg, "shapes", False)
    predictions = {}
    for index in range(len(dataset)):
        boxes = dataset.get_groundtruth(index)
        predictions[index] = BoxList(boxes.bbox, boxes.size)
        predictions[index].add_field("objectness", torch.linspace(1, 0.5, len(boxes)))
    run = write_run(folder, cfg, TRAINING)
    evaluate(dataset, predictions, run / "inference/shapes", box_only=True)
    save_predictions(predictions, run / "inference/shapes/predictions.pth")
    return run


def test_report_of_proposals(shapes, tmp_path):
    page = Page(write_report(run_of_proposals(shapes[1], tmp_path / "run"), tmp_path / "new" / "page.html"))
    check_self_contained(page)
    rows = {row[0].strip(): row[1:] for row in page.rows if row}
    assert rows["AR@1000"] == ["1.000", "average recall of the best 1000 boxes"]
    assert rows["AR96-128@100"] == ["–", "average recall of the best 100 boxes, objects of 96-128 pixels square"]
    assert all(alt.endswith("F1 1.00") for alt, _ in page.pictures)
    assert len(page.pictures) == 8
    assert not (tmp_path / "run/report.html").exists()


def test_report_of_voc_boxes(test_data, tmp_path):
    entry = {"data_dir": str(test_data / "bccd"), "split": "test", "classes": "RBC,WBC,Platelets"}
    keys = ["DATASETS.REGISTER", str({"bccd": entry}), "DATASETS.TEST", "('bccd',)", "MODEL.DEVICE", "cpu"]
    cfg = load_config("quick_start", keys)
    dataset = build_dataset(cfg, "bccd", False)
    predictions = {}
    for index in range(len(dataset)):
        truth = dataset.get_groundtruth(index)[: index % 5 + 1]
        scores = [0.8] * len(truth)
        predictions[index] = predicted(truth.size, truth.bbox.tolist(), truth.get_field("labels").tolist(), scores)
    run = write_run(tmp_path / "run", cfg)
    measures = evaluate(dataset, predictions, run / "inference/bccd")["bbox"]
    save_predictions(predictions, run / "inference/bccd/predictions.pth")
    page = Page(write_report(run))
    check_self_contained(page)
    rows = {row[0].strip(): row[1:] for row in page.rows if row}
    assert rows["AP50"][0] == f"{measures['AP50']:.3f}"
    assert rows["WBC"][1] == f"{measures['AP50/WBC']:.3f}"
    assert f"RBC (AP50 {measures['AP50/RBC']:.3f})" in page.text
    assert len(page.pictures) == 12
    assert "No iteration was logged" in page.text


def test_report_of_half_a_run(shapes, tmp_path):
    """Nothing trained; not evaluated; datasets that are gone; predictions without images; metrics cut short."""
    _, keys = shapes
    cfg = load_config("quick_start", keys)
    page = Page(write_report(write_run(tmp_path / "nothing", cfg)))
    check_self_contained(page)
    for told in ("0 of 800 iterations", "was not evaluated", "No iteration was logged", "No time was logged"):
        assert told in page.text

    gone = load_config(
        "quick_start", [*keys, "DATASETS.REGISTER", "{'shapes': {'img_dir': 'x', 'ann_file': 'gone.json'}}"]
    )
    run = write_run(
        tmp_path / "gone", gone, [*TRAINING[:1], {"iteration": 10, "eval": {"shapes": {"keypoints": {"AP": 0.5}}}}]
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 20, "lo')
    page = Page(write_report(run))
    check_self_contained(page)
    assert "gone.json does not exist" in page.text
    assert "0.500 AP of keypoints, shapes" in page.text

    run = write_run(tmp_path / "unlike", cfg, [{"iteration": 10, "eval": {"shapes": {"bbox": {"AP": 0.5}}}}])
    (run / "inference/shapes").mkdir(parents=True)
    save_predictions({99: predicted((128, 128), [], [], [])}, run / "inference/shapes/predictions.pth")
    assert "a prediction of image 99, the dataset has 8 images" in Page(write_report(run)).text


def test_folder_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.yml"):
        write_report(tmp_path)
