"""The notebooks: what is committed is clean and belongs to its sources, and a new run in an empty folder agrees.

Numbers that come from a training differ between machines. Cells tagged "varies" have them; what these show is compared
with the ground truth of the pictures and with pycocotools.
"""

import base64
import contextlib
import io
import json
import re
from collections import Counter

import nbformat
import numpy as np
import pytest
import torch
from nbclient.exceptions import CellExecutionError
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

from notebooks.run import FOLDER, NAMES, execute, fingerprint

TRAIN, DEMO = NAMES
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|tmp|opt|usr|work|mnt|Users|var)/|[A-Z]:\\")


def committed(name):
    return nbformat.read(FOLDER / name, as_version=4)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def executed(work):
    """{name: notebook} of a new run, in the folder `work`."""
    return {name: execute(FOLDER / name, work) for name in NAMES}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def cell_with(notebook, source):
    (cell,) = [cell for cell in code_cells(notebook) if source in cell.source]
    return cell


def pictures_of(cell):
    """float32 RGB [h, w, 3] of every picture among the outputs."""
    found = []
    for output in cell.outputs:
        for kind, content in output.get("data", {}).items():
            if kind.startswith("image/"):
                picture = Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")
                found.append(np.asarray(picture, np.float32))
    return found


def kinds_of(cell):
    """The outputs without their content: ["stdout", ("image/jpeg", "text/plain")]."""
    return [
        output.name if output.output_type == "stream" else tuple(sorted(output.get("data", {"error": ""})))
        for output in cell.outputs
    ]


def faults_of(notebook):
    """What is wrong with a committed notebook, in words."""
    cells = code_cells(notebook)
    faults = []
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        faults.append("the cells were not executed once each, in order")
    if notebook.metadata.get("sources") != fingerprint(notebook):
        faults.append("the outputs are of other sources")
    if set(notebook.metadata) != {"kernelspec", "language_info", "sources"}:
        faults.append("more metadata than kernel and sources")
    if any(set(cell.metadata) - {"tags"} for cell in notebook.cells):
        faults.append("metadata of cells, such as times")
    if any("stderr" in kinds_of(cell) or ("error",) in kinds_of(cell) for cell in cells):
        faults.append("errors or progress among the outputs")
    if any(MACHINE.search(text) for cell in cells for text in (text_of(cell), cell.source)):
        faults.append("a path of the machine")
    if any(picture.std() < 10 for cell in cells for picture in pictures_of(cell)):
        faults.append("a blank picture")
    return faults


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_files_are_clean_and_belong_to_their_sources(name):
    notebook = committed(name)
    nbformat.validate(notebook)
    assert faults_of(notebook) == [], "run: python notebooks/run.py"
    assert (FOLDER / name).stat().st_size < 1_000_000
    assert sum(len(pictures_of(cell)) for cell in code_cells(notebook)) >= 5


def _edit(notebook):
    code_cells(notebook)[1].source += "\n"


def _skip(notebook):
    code_cells(notebook)[1].execution_count = None


def _blank(notebook):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(file, "JPEG")
    output = next(o for cell in code_cells(notebook) for o in cell.outputs if "image/jpeg" in o.get("data", {}))
    output.data["image/jpeg"] = base64.b64encode(file.getvalue()).decode()


def _path(notebook):
    code_cells(notebook)[0].outputs.append(nbformat.v4.new_output("stream", name="stdout", text="in /tmp/run7/output"))


def _progress(notebook):
    code_cells(notebook)[0].outputs.append(nbformat.v4.new_output("stream", name="stderr", text="50%"))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (_edit, "the outputs are of other sources"),
        (_skip, "the cells were not executed once each, in order"),
        (_blank, "a blank picture"),
        (_path, "a path of the machine"),
        (_progress, "errors or progress among the outputs"),
    ],
)
def test_a_harmed_file_is_noticed(harm, told):
    notebook = committed(DEMO)
    harm(notebook)
    assert faults_of(notebook) == [told]


def test_an_error_in_a_cell_stops_the_run(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import fastrcnn_absent")])
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    with pytest.raises(CellExecutionError, match="fastrcnn_absent"):
        execute(tmp_path / "broken.ipynb", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_run_shows_what_is_committed(executed, name):
    for old, new in zip(code_cells(committed(name)), code_cells(executed[name]), strict=True):
        assert new.execution_count == old.execution_count
        assert kinds_of(new) == kinds_of(old), new.source
        pairs = list(zip(pictures_of(old), pictures_of(new), strict=True))
        if "varies" in old.metadata.get("tags", ()):
            assert all(after.std() > 10 for _, after in pairs)
            continue
        assert text_of(new) == text_of(old)
        for before, after in pairs:
            assert before.shape == after.shape
            assert np.abs(before - after).mean() < 2  # of 255: fonts and JPEG's rounding


def test_the_shown_precision_is_that_of_pycocotools_and_high_enough(executed, work):
    """Of the files that the run has written, against the annotations; and the model has learnt something."""
    shown = text_of(cell_with(executed[TRAIN], "AP/{name}"))
    truth = work / "datasets/small_shapes/annotations/instances_val.json"
    for task in ("bbox", "segm"):
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(truth)
            found = coco.loadRes(str(work / f"output/shapes/inference/small_val/{task}.json"))
            measure = COCOeval(coco, found, task)
            measure.evaluate()
            measure.accumulate()
            measure.summarize()
        (line,) = [line for line in shown.splitlines() if line.startswith(task)]
        assert [float(value) for value in line.split()[1:]] == pytest.approx(measure.stats[:3], abs=5.1e-4)
        assert measure.stats[1] > {"bbox": 0.6, "segm": 0.4}[task]


def test_own_classes_are_learnt_from_the_weights(executed):
    """Two classes in 80 iterations, which begin with what the first training has learnt."""
    shown = text_of(cell_with(executed[TRAIN], 'my_run.results["my_val"]'))
    (boxes,) = re.findall(r"bbox +AP \S+ +AP50 (\S+)", shown)
    assert float(boxes) > 0.35


@pytest.fixture(scope="module")
def truth(work):
    """{file name: (names, boxes xyxy [N, 4])} of the pictures of the demo."""
    content = json.loads((work / "datasets/small_shapes/annotations/instances_val.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    found = {}
    for image in content["images"]:
        objects = [each for each in content["annotations"] if each["image_id"] == image["id"]]
        boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        found[image["file_name"]] = [names[each["category_id"]] for each in objects], boxes
    return found


def test_the_table_of_detections_agrees_with_the_ground_truth(executed, truth):
    names, boxes = truth["000005.png"]
    rows = [line.split() for line in text_of(cell_with(executed[DEMO], "detections = predictor")).splitlines()[1:]]
    scores = [float(row[1]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(0.5 <= score <= 1 for score in scores)
    overlap = box_iou(torch.tensor([[float(value) for value in row[2:]] for row in rows]), boxes)
    best, which = overlap.max(1)
    right = [bool(iou > 0.5) and row[0] == names[n] for row, iou, n in zip(rows, best, which, strict=True)]
    assert right[:2] == [True, True]
    found = {int(n) for good, n in zip(right, which, strict=True) if good}
    assert len(found) > len(names) / 2


def test_the_objects_of_several_pictures_are_those_that_are_there(executed, truth):
    """By name, as many as a model that has not seen which picture it is cannot have right."""
    lines = text_of(cell_with(executed[DEMO], "several = predictor")).splitlines()
    files = sorted(truth)[:6]
    assert [line.partition(":")[0] for line in lines] == files
    found = [Counter({name: int(count) for count, name in re.findall(r"(\d+) (\w+)", line[11:])}) for line in lines]
    there = [Counter(truth[file][0]) for file in files]
    shifted = [there[shift:] + there[:shift] for shift in range(6)]
    hits, *by_chance = [sum((a & b).total() for a, b in zip(found, other, strict=True)) for other in shifted]
    assert hits > 0.6 * sum(each.total() for each in there)
    assert hits > 1.25 * max(by_chance)


def test_fewer_detections_pass_a_higher_threshold(executed):
    counts = re.findall(r"from \S+: +(\d+) detections", text_of(cell_with(executed[DEMO], "everything")))
    counts = [int(count) for count in counts]
    assert counts == sorted(counts, reverse=True)
    assert len(counts) == 5
    assert counts[0] > counts[-1]


def test_detections_are_drawn_on_the_picture(executed, work, truth):
    """The drawing differs from its picture at the objects, and hardly elsewhere: labels lie at their boxes."""
    (drawn,) = pictures_of(cell_with(executed[DEMO], "output/found.jpg"))
    picture = Image.open(work / "datasets/small_shapes/val/000005.png").convert("RGB")
    picture = picture.resize((4 * picture.width, 4 * picture.height), Image.Resampling.BICUBIC)
    assert drawn.shape == np.asarray(picture).shape
    changed = np.abs(drawn - np.asarray(picture, np.float32)).max(2) > 40
    inside = np.zeros(changed.shape, bool)
    for x1, y1, x2, y2 in (truth["000005.png"][1] * 4).int().tolist():
        inside[max(y1 - 24, 0) : y2 + 24, max(x1 - 8, 0) : x2 + 60] = True
    assert changed[inside].mean() > 0.1
    assert changed[~inside].mean() < 0.05


def test_heat_maps_are_dark_outside_the_objects(executed):
    (both,) = pictures_of(cell_with(executed[DEMO], "coco_demo.show_mask_heatmaps"))
    maps = both[:, both.shape[1] // 2 + 4 : -4].max(2)
    assert (maps < 24).mean() > 0.4
    assert (maps > 200).mean() > 0.01
