"""Tells what a model costs: parameters, operations and memory by part; how fast it is, and the loading of its data."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastrcnn.analysis import Analysis, Cost, Loading, Part, Rate, analyze, time_data, time_model
from fastrcnn.cli.common import QUICK_START, add_config_arguments
from fastrcnn.config import load_config
from fastrcnn.models import resolve_device

EXAMPLES = """  fastrcnn analyze --config-file e2e_mask_rcnn_R_101_FPN_1x --train
      parameters, operations and memory of an inference and of a training step, without computing either
  fastrcnn analyze --config-file torchvision/faster_rcnn_R_50_FPN --size 800x800 --batch 2 --depth 1
      for a batch of two square images, with the modules of each part
  fastrcnn analyze --train --speed --data --workers 0,2 --json analysis.json
      of the quick start, also the speed of the model, of a training step and of loading, and which limits training

An operation is a multiplication or an addition, so a multiply-add is 2: docs/analysis.md says what is counted.
Weights are random: shapes are fixed, so they hardly matter. --speed uses MODEL.DEVICE; --data needs the datasets.
"""


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; want HEIGHTxWIDTH, as 800x1333")
    return int(height), int(width)


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers; want 0 or 0,2,4")
    return [int(part) for part in parts]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time (1)")
    parser.add_argument(
        "--size", type=_size, metavar="HxW", help="of the images (default: INPUT.MIN_SIZE_TEST x INPUT.MAX_SIZE_TEST)"
    )
    parser.add_argument("--depth", type=int, default=0, metavar="N", help="levels of modules below the parts (0)")
    parser.add_argument("--train", action="store_true", help="also a training step")
    parser.add_argument("--speed", action="store_true", help="also time the model on a fixed batch")
    parser.add_argument("--data", action="store_true", help="also time the loading of DATASETS.TRAIN")
    parser.add_argument(
        "--workers", type=_numbers, default=[], metavar="N,N,…", help="loading processes to time --data with, as 0,2,4"
    )
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of each timing (10)")
    parser.add_argument("--json", metavar="FILE", help="write everything there too")
    add_config_arguments(parser, "default: the quick start")


def run(args: argparse.Namespace) -> None:
    name, batch = args.config_file or QUICK_START, args.batch
    cfg = load_config(name, args.opts)
    analysis = analyze(cfg, batch, args.size, args.train, args.depth)
    report: dict[str, Any] = {"config": name, **asdict(analysis)}
    print(table(analysis))
    if args.speed:
        modes = ("inference", "training step") if args.train else ("inference",)
        report["speed"] = {}
        print(f"\nmodel alone on {resolve_device(cfg.MODEL.DEVICE)}, batch of {batch}:")
        for mode in modes:
            rate = time_model(cfg, batch, args.size, mode != "inference", args.seconds)
            report["speed"][mode] = asdict(rate)
            print(f"  {mode:<16}{_told(rate)}")
    if args.data:
        loading = time_data(cfg, args.workers, args.seconds)
        report["loading"] = asdict(loading)
        print(told_loading(loading))
        if args.speed and args.train:
            report["limit"] = limit(report["speed"]["training step"]["images_per_second"], loading)
            print(f"\n{report['limit']}")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"\nwritten to {args.json}")


def table(analysis: Analysis) -> str:
    """For the terminal: a line for each part."""
    (height, width), (high, wide) = analysis.size, analysis.padded
    heading = f"{analysis.batch} × {height}×{width}, {analysis.dtype}"
    if analysis.size != analysis.padded:
        heading += f" (padded to {high}×{wide})"
    rows = [["part", "parameters", "trainable", "GFLOP", "MiB alive"]]
    trained = analysis.total.training is not None
    if trained:
        rows[0] += ["GFLOP training", "MiB saved"]
    rows += [_row(part) for part in (*analysis.parts, analysis.total)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    rule = "-" * len(lines[0])
    total = analysis.total
    notes = [
        f"{total.bytes / 2**20:.1f} MiB of parameters and buffers",
        f"inference: at most {_mib(total.inference.peak)} MiB alive at once",
    ]
    if trained:
        notes.append(f"training step: at most {_mib(total.training.peak)} MiB alive at once, with the gradients")
    return "\n".join([heading, "", lines[0], rule, *lines[1:-1], rule, lines[-1], "", *notes])


def _row(part: Part) -> list[str]:
    def told(cost: Cost) -> list[str]:
        return [f"{cost.flops / 1e9:.2f}", _mib(cost.memory)]

    row = [part.name, f"{part.parameters:,}", f"{part.trainable:,}", *told(part.inference)]
    return row if part.training is None else row + told(part.training)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def _told(rate: Rate) -> str:
    return f"{rate.images_per_second:.4g} images/s ({rate.p20:.4g} to {rate.p80:.4g}, {rate.count} steps)"


def _workers(count: int) -> str:
    return f"{count} worker" if count == 1 else f"{count} workers"


def told_loading(loading: Loading) -> str:
    """For the terminal: the stages of loading and the speed by number of workers."""
    stages = "  ".join(f"{name} {1000 * getattr(loading, name):.2f}" for name in ("read", "transform", "collate"))
    lines = ["", f"loading of DATASETS.TRAIN alone, batch of {loading.batch}:", f"  ms an image     {stages}"]
    lines += [f"  {_workers(count):<16}{_told(rate)}" for count, rate in loading.rates.items()]
    return "\n".join(lines)


def limit(training: float, loading: Loading) -> str:
    """Which limits training, at the number of workers that loads fastest; training in images/s of the model alone."""
    workers, rate = max(loading.rates.items(), key=lambda item: item[1].images_per_second)
    speeds = {"the model": training, f"loading with {_workers(workers)}": rate.images_per_second}
    slower, faster = sorted(speeds, key=speeds.__getitem__)
    return f"{slower} limits training: {speeds[slower]:.4g} images/s, {faster} {speeds[faster]:.4g}"
