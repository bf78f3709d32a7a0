"""What is installed, and what importing it needs."""

import subprocess
import sys
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
