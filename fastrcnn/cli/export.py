"""Writes a trained model as a file that runs without fastrcnn: torch.export, AOTInductor, ONNX, or ONNX in INT8."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrcnn import weights as weight_files
from fastrcnn.cli.common import add_model_arguments, model_of
from fastrcnn.engine import category_names
from fastrcnn.models import build_model

EXAMPLES = """  fastrcnn export --weights output/quick_start --output quick_start.pt2
      torch.export: runs with PyTorch and torchvision alone, for any number and size of images
  fastrcnn export --format aoti --weights output/quick_start --output quick_start_aoti.pt2
      AOTInductor: the same, compiled for MODEL.DEVICE and this processor; needs a C++ compiler and minutes
  fastrcnn export --format onnx --weights output/quick_start --output quick_start.onnx
      ONNX: runs in onnxruntime
  fastrcnn export --format int8 --weights output/quick_start --output quick_start_int8.onnx --calibration-images 100
      ONNX in 8 bits, with ranges from images of DATASETS.TRAIN; tells the AP on DATASETS.TEST before and after
  fastrcnn export --config-file torchvision/mask_rcnn_R_50_FPN --weights torchvision://maskrcnn_resnet50_fpn \\
      --output mask_rcnn.pt2 MODEL.DEVICE cpu MODEL.ROI_HEADS.SCORE_THRESH 0.5
      weights from elsewhere, which carry no configuration, with keys changed

The file is run once and compared with the model, int8 on whole datasets. examples/run_exported.py shows how to use a
.pt2, examples/run_onnx.py an .onnx.
"""

Run = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=FORMATS, default="pt2", help="what to write (default: pt2)")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="the file to write")
    parser.add_argument(
        "--calibration-images",
        metavar="N",
        type=int,
        default=100,
        help="images that int8 is calibrated with (default: 100)",
    )
    parser.add_argument(
        "--evaluation-images",
        metavar="N",
        type=int,
        default=0,
        help="images of each dataset that int8 is evaluated on (default: 0, all of them)",
    )
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    cfg, weights = model_of(args)
    weight_files.adopt_conventions(cfg, weights)
    if args.format in ("onnx", "int8"):
        cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    report = weight_files.load(model, weights)
    if report.missing:
        raise ValueError(f"{weights} does not fill the whole model:\n{report}")
    written = FORMATS[args.format](cfg, model, category_names(weights, cfg), args)
    print(f"written to {args.output}, {args.output.stat().st_size / 2**20:.1f} MiB")
    if args.format != "int8":  # which differs by design; its report tells how much
        print(compared(cfg, model, written))


@torch.no_grad()
def compared(cfg: Any, model: nn.Module, written: Run) -> str:
    """The largest differences between what was written and the model, on two images of noise, as a sentence."""
    from fastrcnn.export import ExportModule, outputs
    from fastrcnn.export.operators import DEFINITIONS
    from fastrcnn.export.program import example_inputs

    inputs = example_inputs(cfg, next(model.parameters()).device)
    eager = ExportModule(cfg, model, keep=list(DEFINITIONS))
    want, got = (dict(zip(outputs(cfg), each(*inputs), strict=True)) for each in (eager, written))
    counts = [each["count"].tolist() for each in (want, got)]
    if counts[0] != counts[1]:
        return f"on two images of noise it finds {counts[1]} objects, where the model finds {counts[0]}"
    filled = torch.arange(want["scores"].shape[1]) < want["count"].cpu()[:, None]
    parts = []
    for name in want:
        if name != "count":
            difference = (got[name].cpu()[filled].double() - want[name].cpu()[filled].double()).abs()
            parts.append(f"{name} {difference.max() if len(difference) else 0:.1e}")
    return f"largest differences from the model, {sum(counts[0])} detections in two images of noise: {', '.join(parts)}"


def _pt2(cfg: Any, model: nn.Module, categories: dict[int, str], args: argparse.Namespace) -> Run:
    from fastrcnn.export import export_pt2, load_pt2

    export_pt2(cfg, model, categories, args.output)
    return load_pt2(args.output)


def _aoti(cfg: Any, model: nn.Module, categories: dict[int, str], args: argparse.Namespace) -> Run:
    from fastrcnn.export import export_aoti, load_aoti

    export_aoti(cfg, model, categories, args.output)
    return load_aoti(args.output)


def _onnx(cfg: Any, model: nn.Module, categories: dict[int, str], args: argparse.Namespace) -> Run:
    from fastrcnn.export.onnx import export_onnx, load

    export_onnx(cfg, model, categories, args.output)
    return load(args.output)


def _int8(cfg: Any, model: nn.Module, categories: dict[int, str], args: argparse.Namespace) -> Run:
    from fastrcnn.export.onnx import load
    from fastrcnn.quantization import quantize

    counts = {"calibration_images": args.calibration_images, "evaluate_images": args.evaluation_images}
    print(quantize(cfg, model, categories, args.output, **counts))
    return load(args.output)


FORMATS = {"pt2": _pt2, "aoti": _aoti, "onnx": _onnx, "int8": _int8}
