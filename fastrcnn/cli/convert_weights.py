"""Converts weights of Detectron, maskrcnn-benchmark, detectron2, torchvision and fastrcnn, whichever they are."""

import argparse
import pickle
from pathlib import Path

import torch

from fastrcnn import weights
from fastrcnn.engine.checkpoint import write_atomically

EXAMPLES = """  fastrcnn convert-weights e2e_mask_rcnn_R_50_FPN_1x.pth mask_rcnn.pth
      any known file under our names, with the name of its conventions
  fastrcnn convert-weights torchvision://maskrcnn_resnet50_fpn mask_rcnn.pth --classes 1=1 2=3
      the same, fetched, with heads for two classes: our 1 is their 1, our 2 is their 3
  fastrcnn convert-weights output/run/model_final.pth mask_rcnn.pkl --to detectron2
      a model of ours for detectron2 (.pkl or .pth)
  fastrcnn convert-weights output/run/model_final.pth mask_rcnn.pth --to torchvision
      the state dict of torchvision's model

INPUT is a path, an address or a name: see docs/weights.md.
"""
GEOMETRY = {"torchvision": "torchvision", "detectron2": "modern"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", help="file, address or name of weights")
    parser.add_argument("output", type=Path, help="file to write")
    parser.add_argument(
        "--to", choices=("fastrcnn", *GEOMETRY), default="fastrcnn", help="whose names (default: %(default)s)"
    )
    parser.add_argument(
        "--classes", nargs="+", type=pair, metavar="OURS=THEIRS", help="heads for these classes, ours being 1, 2, 3 …"
    )


def run(args: argparse.Namespace) -> None:
    convert(args.input, args.output, args.to, dict(args.classes) if args.classes else None)


def pair(text: str) -> tuple[int, int]:
    ours, _, theirs = text.partition("=")
    return int(ours), int(theirs)


def convert(source: str, output: Path, to: str, classes: dict[int, int] | None) -> None:
    """Reads, converts, writes, and says what it found."""
    state, family, conventions = weights.read_state(source)
    if classes is not None:
        state = weights.select_classes(state, classes)
    print(f"{source}: {len(state)} tensors, {family} names, conventions {conventions or 'not told'}")
    if to == "fastrcnn":
        content = {"model": state, "conventions": conventions} if conventions else {"model": state}
    else:
        state = weights.export(state, to)
        content = (
            state if to == "torchvision" else {"model": state, "__author__": "fastrcnn", "matching_heuristics": True}
        )
        if conventions not in (None, GEOMETRY[to]):
            print(f"{to} has the geometry {GEOMETRY[to]!r}: expect worse detections there")
    if output.suffix == ".pkl" and to == "detectron2":
        content["model"] = {name: value.numpy() for name, value in state.items()}
        write_atomically(output, lambda file: pickle.dump(content, file))
    else:
        write_atomically(output, lambda file: torch.save(content, file))
    print(f"wrote {output}")
