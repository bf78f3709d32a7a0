"""What several commands share."""

import argparse
from pathlib import Path

from fastrcnn.config import Config, load_config
from fastrcnn.engine import find_model, output_folder

QUICK_START = "quick_start"


def add_config_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """--config-file and the trailing KEY VALUE pairs, as maskrcnn-benchmark has them."""
    parser.add_argument("--config-file", metavar="NAME", help=f"recipe, YAML file or folder of a run ({default})")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="keys of the configuration to set, in pairs")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--config-file, --weights and the trailing KEY VALUE pairs: what `model_of` needs."""
    parser.add_argument(
        "--weights",
        metavar="PATH",
        help="file, folder or address of weights (default: the newest checkpoint in OUTPUT_DIR, else MODEL.WEIGHT)",
    )
    add_config_arguments(parser, "default: the weights' own, without any the last quick start")


def model_of(args: argparse.Namespace) -> tuple[Config, str | Path]:
    """The configuration and the weights that the arguments mean."""
    weights = args.weights
    if args.config_file is None and weights is None:
        started = load_config(QUICK_START, args.opts)
        weights = output_folder(started.OUTPUT_DIR, resume=True, numbered="OUTPUT_DIR" not in args.opts[::2])
    return find_model(args.config_file, weights, args.opts)
