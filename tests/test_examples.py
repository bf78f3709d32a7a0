"""The examples and the script of the pictures run, and the pages about them are complete."""

import importlib.util
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrcnn import ops


def script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example(repository):
    return script(repository / "examples" / "torchvision_swap.py")


class Called(TorchDispatchMode):
    """The names of our operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastrcnn":
            self.names.add(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_torchvision_swap_tells_equal_detections_and_both_times(example, capsys):
    example.main(["--size", "64", "--rounds", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    assert int(re.match(r"(\d+) detections, the same from both", out)[1]) > 5
    theirs, ours = (float(re.search(rf"{name} +([\d.]+) ms", out)[1]) for name in ("torchvision", "with fastrcnn.ops"))
    assert float(re.search(r"ratio ([\d.]+)", out)[1]) == pytest.approx(theirs / ours, rel=0.02, abs=0.01)


@torch.no_grad()
def test_torchvision_swap_runs_our_operators_in_the_copy_alone(example):
    images = [torch.rand(3, 64, 96)]
    theirs = example.random_model(images, 64)
    ours = example.swap(theirs)
    with Called() as called, example.our_box_operators():
        found = ours(images)
    assert called.names == {"select_proposals", "multilevel_roi_align", "decode_boxes", "batched_nms"}
    with Called() as called:
        wanted = theirs(images)
    assert called.names == set()
    assert example.check(found, wanted) == len(wanted[0]["labels"]) > 5
    wanted[0]["boxes"][0, 0] += 0.1
    with pytest.raises(AssertionError):
        example.check(found, wanted)


def test_every_operator_is_in_the_table(repository):
    page = (repository / "docs" / "operators.md").read_text(encoding="utf-8")
    table = page[page.index("## All operators") : page.index("**Dtypes.**")]
    assert set(re.findall(r"`([A-Za-z_]+)[(`]", table)) >= set(ops.__all__)


def test_pictures_are_those_of_the_page(repository, tmp_path, monkeypatch):
    """The script draws what the page shows; it also asserts that the passes it draws end in greedy NMS."""
    pictures = script(repository / "docs" / "pictures.py")
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    pictures.main()
    page = (repository / "docs" / "kernels_explained.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^]]+\]\(pictures/(\w+)\.png\)", page)
    drawn = {path.stem for path in tmp_path.iterdir()}
    assert set(shown) == drawn == {path.stem for path in (repository / "docs" / "pictures").glob("*.png")}
    assert len(shown) == len(drawn)
