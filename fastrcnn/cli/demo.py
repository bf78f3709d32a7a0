"""Detects in images, folders, videos and cameras; writes pictures and videos of the detections, and their JSON."""

import argparse
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path, PurePath

import numpy as np
from torch import Tensor
from tqdm import tqdm

from fastrcnn.cli.common import add_model_arguments, model_of
from fastrcnn.cli.demo_inputs import JSON_NAME, Input, Item, count_frames, files_of, read_items
from fastrcnn.cli.demo_outputs import Results, output_path
from fastrcnn.config import Config
from fastrcnn.engine import find_model
from fastrcnn.engine.logging import has_terminal
from fastrcnn.extras import MissingExtra
from fastrcnn.predictor import Predictor
from fastrcnn.structures import BoxList
from fastrcnn.video import VideoError, VideoReader, Window, ahead, behind, newest

EXAMPLES = """  fastrcnn demo photo.jpg
      with the last quick start, without one with torchvision's Mask R-CNN, whose weights are downloaded once
  fastrcnn demo photos "holiday/*.jpg" --weights output/my_run --output found MODEL.DEVICE cpu
      a folder with its folders and all files of a pattern, with your own model; pictures and detections.json in found
  fastrcnn demo clip.mp4 --output clip_found.mp4 --config-file torchvision/keypoint_rcnn_R_50_FPN
      a video becomes a video
  fastrcnn demo --webcam 0 --min-image-size 224
      the first camera in a window, until q or Esc; with --output camera.mp4 recorded without a window, until Ctrl-C
  fastrcnn demo photos --show-mask-heatmaps --masks-per-dim 3
      in place of the detections, the mask probabilities of the nine best of each image

Exit code: 0, or 1 if some images could not be read (the rest is done, and the end tells which and why), or 2 if none
could be read, or the arguments are wrong.
"""

FALLBACK = "torchvision/mask_rcnn_R_50_FPN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="image or video file, folder (searched with its folders) or pattern"
    )
    add_model_arguments(parser)
    parser.add_argument("--webcam", type=int, metavar="N", help="camera number N, 0 being the first, in place of INPUT")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="folder, empty or new, or for one image or video the file to write (default: output/demo, the next time "
        "output/demo-2, …)",
    )
    parser.add_argument(
        "--window", action="store_true", help="show the pictures too: any key for the next image, q or Esc to end"
    )
    parser.add_argument("--no-pictures", action="store_true", help=f"write {JSON_NAME} only")
    parser.add_argument("--confidence-threshold", type=float, default=0.7, metavar="SCORE", help="(default: 0.7)")
    parser.add_argument(
        "--min-image-size",
        type=int,
        metavar="PIXELS",
        help="shorter side of the images that the model sees: less is faster (default: INPUT.MIN_SIZE_TEST)",
    )
    parser.add_argument(
        "--show-mask-heatmaps", action="store_true", help="pictures of the mask probabilities of the best detections"
    )
    parser.add_argument("--masks-per-dim", type=int, default=2, metavar="N", help="N × N heat maps (default: 2)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images per forward pass (default: 1)")


def run(args: argparse.Namespace) -> None:
    names, opts = split_arguments([*args.inputs, *args.opts])
    _check(args, names)
    live = args.webcam is not None
    inputs = [Input(args.webcam, PurePath(f"webcam-{args.webcam}.mp4"))] if live else None
    if live:
        VideoReader(args.webcam).close()  # what is wrong with it is told before the model is loaded
    total = None if live else count_frames(files_of(names))
    cfg, weights = choose_model(argparse.Namespace(config_file=args.config_file, weights=args.weights, opts=opts))
    if cfg.MODEL.RPN_ONLY and not cfg.MODEL.RETINANET_ON:
        raise ValueError("MODEL.RPN_ONLY is True: this model gives proposals, not detections")
    if args.show_mask_heatmaps and not cfg.MODEL.MASK_ON:
        raise ValueError("--show-mask-heatmaps wants a model with masks, and MODEL.MASK_ON is False")
    with ExitStack() as stack:
        window = None
        if args.window or (live and args.output is None):
            try:
                window = stack.enter_context(Window("fastrcnn demo"))
            except (VideoError, MissingExtra) as error:
                if args.window:
                    raise
                print(f"no window, so this records until Ctrl-C: {error}")
        watch_only = live and window is not None and args.output is None
        output = None if watch_only else output_path(args.output, inputs or files_of(names))
        predictor = Predictor(
            cfg,
            weights,
            min_image_size=args.min_image_size,
            confidence_threshold=args.confidence_threshold,
            batch_size=args.batch_size,
            keep_masks=args.show_mask_heatmaps,
        )
        print(f"{weights} on {predictor.device}")
        failures: list[str] = []
        items = read_items(inputs or files_of(names), failures)
        results = stack.enter_context(
            Results(
                output,
                predictor,
                masks_per_dim=args.masks_per_dim if args.show_mask_heatmaps else None,
                write_pictures=not args.no_pictures,
                draw=window is not None,
            )
        )
        queue = 2 * args.batch_size
        source = stack.enter_context(newest(items) if live else ahead(items, queue))
        shown = stack.enter_context(
            closing(behind(results.add, detected(predictor, source), 0 if live and window else queue))
        )
        bar = stack.enter_context(tqdm(total=total, unit="image", dynamic_ncols=True, disable=not has_terminal()))
        began = time.perf_counter()
        interrupted = False
        try:
            for item, picture in shown:
                bar.update()
                if window and not window.show(picture, wait=item.number is None):
                    break
        except KeyboardInterrupt:
            interrupted = True
        seconds = time.perf_counter() - began
    summarise(results, failures, seconds)
    if interrupted and not live:
        raise KeyboardInterrupt("interrupted; what was done until then is written")
    if failures:
        if not results.count:
            raise ValueError("nothing could be read")
        raise SystemExit(1)


def summarise(results: "Results", failures: Sequence[str], seconds: float) -> None:
    found = ", ".join(f"{count} {name}" for name, count in results.labels.most_common())
    print(
        f"{results.count} images, {results.labels.total()} detections{f' ({found})' if found else ''}, "
        f"{results.count / max(seconds, 1e-9):.2f} images/s"
    )
    if results.json is not None:
        print(
            f"written to {results.output} and {results.json}"
            if results.wrote_pictures
            else f"written to {results.json}"
        )
    if failures:
        print(f"{len(failures)} could not be read:")
        for reason in failures:
            print(f"  {reason}")


def _check(args: argparse.Namespace, names: Sequence[str]) -> None:
    if (args.webcam is None) == (not names):
        raise ValueError("name images, folders, patterns or videos, or a camera with --webcam 0")
    for option, value in (("--batch-size", args.batch_size), ("--masks-per-dim", args.masks_per_dim)):
        if value < 1:
            raise ValueError(f"{option} is {value}; it must be at least 1")
    if not 0 <= args.confidence_threshold <= 1:
        raise ValueError(f"--confidence-threshold is {args.confidence_threshold}; it must be between 0 and 1")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is before and what is after the first argument that is, or is meant to be, a key of the configuration."""
    sections = vars(Config())
    for place, argument in enumerate(arguments):
        if argument.partition(".")[0] in sections and not Path(argument).exists():
            return list(arguments[:place]), list(arguments[place:])
    return list(arguments), []


def choose_model(args: argparse.Namespace) -> tuple[Config, str | Path]:
    """As `model_of`, but torchvision's Mask R-CNN where nothing is named and there is no quick start."""
    try:
        return model_of(args)
    except FileNotFoundError:
        if args.config_file is not None or args.weights is not None or "OUTPUT_DIR" in args.opts[::2]:
            raise
        print(f"there is no quick start in output/, so this takes {FALLBACK}; --weights names another model")
        return find_model(FALLBACK, overrides=args.opts)


def detected(predictor: Predictor, items: Iterable[Item]) -> Iterator[tuple[Item, BoxList]]:
    """Each item with its detections."""
    waiting: deque[Item] = deque()

    def images() -> Iterator[Tensor | np.ndarray]:
        for item in items:
            waiting.append(item)
            yield item.image

    for detections in predictor.stream(images()):
        yield waiting.popleft(), detections
