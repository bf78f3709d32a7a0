"""What is installed, and what importing it needs."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import fastrcnn
import triton_kernels


def test_kernels_are_ours(repository):
    """An upstream package has the same import name."""
    assert Path(triton_kernels.__file__).parent.parent == Path(fastrcnn.__file__).parent.parent == repository


@pytest.mark.parametrize(
    ("words", "home"),
    [
        ("torch.library", "fastrcnn/ops/_library.py"),
        ("torch.distributed", "fastrcnn/engine/distributed.py"),
        ("@triton.jit", "triton_kernels/"),
    ],
)
def test_some_things_have_one_home(words, home, repository):
    sources = [
        path for folder in ("fastrcnn", "triton_kernels", "tools") for path in (repository / folder).rglob("*.py")
    ]
    users = [str(path.relative_to(repository)) for path in sources if words in path.read_text()]
    assert users
    assert all(user.startswith(home) for user in users), users


def test_version():
    assert metadata.version("fastrcnn") == fastrcnn.__version__


def test_imports_and_runs_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastrcnn, fastrcnn.ops as ops\n"
        "boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])\n"
        "assert ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]\n"
        "assert ops.roi_align(torch.ones(1, 1, 8, 8), [boxes[:1] / 2], 2).eq(1).all()\n"
        "assert not any(name.startswith('triton_kernels') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_kernels_setting_is_checked():
    done = subprocess.run(
        [sys.executable, "-c", "import fastrcnn.ops"],
        env={"FASTRCNN_KERNELS": "cuda", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "FASTRCNN_KERNELS is 'cuda'; it must be one of auto, triton, reference, interpret" in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, repository):
    """The names of the files in the wheel that `python -m build` makes of a copy of the repository."""
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source") / "fastrcnn", tmp_path_factory.mktemp("dist")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    for name in ("fastrcnn", "triton_kernels"):
        shutil.copytree(repository / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_has_code_recipes_and_types_and_nothing_else(wheel, repository):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(repository).as_posix()
        for folder in ("fastrcnn", "triton_kernels")
        for path in (repository / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == wanted
    assert {"fastrcnn/py.typed", "fastrcnn/configs/quick_start.yaml", "triton_kernels/launch_table.json"} < names
    assert all(name.endswith((".py", ".yaml", "py.typed", "launch_table.json")) for name in names)


def test_wheel_is_pure_and_names_command_licence_and_needs(wheel):
    [info] = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    read = {name: wheel.read(f"{info}/{name}").decode() for name in ("METADATA", "WHEEL", "entry_points.txt")}
    assert "Root-Is-Purelib: true" in read["WHEEL"]
    assert "fastrcnn = fastrcnn.cli:main" in read["entry_points.txt"]
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    needs = set(re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", read["METADATA"], re.M))
    assert needs == set("torch torchvision triton numpy pillow pycocotools pyyaml tqdm matplotlib".split())
