"""FASTRCNN_KERNELS chooses the implementation behind the public functions, also on the CPU."""

import os
import subprocess
import sys

import torch

PROGRAM = """
import sys, torch
from fastrcnn import ops

torch.manual_seed(0)
corner = torch.rand(2, 12, 2) * 20
boxes = torch.cat([corner, corner + 4 + torch.rand(2, 12, 2) * 9], -1)
scores, labels = torch.rand(2, 12), torch.randint(0, 2, (2, 12))
maps = torch.randn(2, 4, 8, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
rois = torch.cat([torch.tensor([[0.0], [1.0], [0.0]]), boxes[0, :3]], 1)
kept, counts = ops.nms_padded(boxes, scores, 0.2, 9, labels)
deltas = ops.encode_boxes(boxes[0], boxes[1], (10.0, 10.0, 5.0, 5.0))
pooled = ops.roi_align(maps, rois, 2, 0.25, 2, True)
pooled.square().sum().backward()
values = {"kept": kept, "counts": counts, "deltas": deltas, "pooled": pooled.detach(), "grad": maps.grad}
torch.save((values, [name for name in sys.modules if name.startswith("triton_kernels")]), sys.argv[1])
"""


def test_setting_reaches_the_public_functions(tmp_path):
    found = {}
    for setting in ("interpret", "reference"):
        path = tmp_path / setting
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(path)]
        done = subprocess.run(
            command, env=os.environ | {"FASTRCNN_KERNELS": setting}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found[setting] = torch.load(path, weights_only=True)
    values, modules = found["interpret"]
    want, none = found["reference"]
    assert none == []
    assert {f"triton_kernels.{name}" for name in ("nms", "box_coder", "roi_align")} <= set(modules)
    assert 0 < want["counts"].sum() < 24
    assert want["grad"].any()
    for name, value in want.items():
        torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-5)
