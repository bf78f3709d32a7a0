"""torchvision's own operator tests, run on `fastrcnn.ops` in the place of what it replaces.

torchvision's wheels bring no tests: `TORCHVISION_TESTS` names the folder `test` of its source (tried: 0.21.0's).
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

CLASSES = """
    TestRoIAlign TestMultiScaleRoIAlign TestNMS TestBoxConversionToRoi TestBoxConvert TestBoxArea TestBoxIou
""".split()

NOT_APPLICABLE = {
    # TorchScript is deprecated, and ours do not support it
    "test_jit_boxes_list": "scripts the module",
    "test_bbox_convert_jit": "scripts the function",
    "test_box_area_jit": "scripts the function",
    "test_iou_jit": "scripts the function",
    # quantised tensors: torchvision has CPU kernels of their own for them
    "test_qroialign": "quantised maps",
    "test_qroi_align_multiple_images": "an error of quantised maps",
    "test_qnms": "quantised boxes",
}

PROGRAM = """
import sys

import pytest
import torch
import torch.testing._internal.optests as optests
import torchvision.ops as theirs
from torchvision.ops import boxes, poolers

from fastrcnn import ops as ours

replaced = [name for name in ours.__all__ if hasattr(theirs, name)]
for name in replaced:
    setattr(theirs, name, getattr(ours, name))
    for module in (boxes, poolers):
        if hasattr(module, name):
            setattr(module, name, getattr(ours, name))
assert {"nms", "batched_nms", "roi_align", "RoIAlign", "MultiScaleRoIAlign", "box_area", "box_iou"} <= set(replaced)

# test_backward repeats its gradcheck on the scripted function: on the plain one instead
torch.jit.script = lambda function: function

# the generated opchecks are of our operators, and without torchvision's list of known failures
generate = optests.generate_opcheck_tests
def generate_ours(testcase, namespaces, failures_dict_path, **options):
    generate(testcase=testcase, namespaces=["fastrcnn"], failures_dict_path=failures, **options)
optests.generate_opcheck_tests = generate_ours
failures = sys.argv.pop(1)
optests.generate_tests.FailuresDict(failures, {}).save()

sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Class -> test -> "passed", "skipped" or the message of its failure."""
    folder = os.environ.get("TORCHVISION_TESTS")
    if not folder:
        pytest.skip("set TORCHVISION_TESTS to the folder `test` of a checkout of github.com/pytorch/vision")
    path = Path(folder) / "test_ops.py"
    out = tmp_path_factory.mktemp("torchvision")
    report = out / "results.xml"
    options = ["-c", os.devnull, "--rootdir", folder, "-p", "no:cacheprovider", f"--junitxml={report}"]
    chosen = [*(f"{path}::{name}" for name in CLASSES), "-k", f"not ({' or '.join(NOT_APPLICABLE)})"]
    command = [sys.executable, "-c", PROGRAM, str(out / "failures.json"), *options, *chosen]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    output = done.stdout[-4000:] + done.stderr[-4000:]
    assert done.returncode in (0, 1), output
    assert report.is_file(), output
    found = {name: {} for name in CLASSES}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("classname").rsplit(".", 1)[-1]
        outcome = [child for child in case if child.tag in ("failure", "error", "skipped")]
        message = outcome[0].get("message") or outcome[0].tag if outcome else "passed"
        found[name][case.get("name")] = "skipped" if outcome and outcome[0].tag == "skipped" else message
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_torchvisions(results, name):
    outcomes = list(results[name].values())
    failed = {test: outcome for test, outcome in results[name].items() if outcome not in ("passed", "skipped")}
    assert not failed, "\n".join(f"{test}: {message}" for test, message in failed.items())
    assert "passed" in outcomes
