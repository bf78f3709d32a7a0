"""Trains a detector, evaluates it, and leaves weights, metrics and pictures in OUTPUT_DIR."""

import argparse

from fastrcnn.cli.common import QUICK_START, add_config_arguments
from fastrcnn.config import Config, load_config
from fastrcnn.data import build_dataset
from fastrcnn.engine import Run, load_predictions, train
from fastrcnn.engine.distributed import is_main
from fastrcnn.report import write_report
from fastrcnn.visualization import contact_sheet, draw_comparison, plot_metrics, readable_scale

EXAMPLES = """  fastrcnn train
      the quick start: makes a dataset of shapes and trains a small Mask R-CNN on it, in minutes on a CPU,
      in output/quick_start (the next time in output/quick_start-2, …)
  fastrcnn train --config-file e2e_mask_rcnn_R_50_FPN_1x OUTPUT_DIR output/mask_r50 \\
      SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.0025 SOLVER.MAX_ITER 720000 SOLVER.STEPS "(480000, 640000)"
      a recipe, changed for one GPU: an eighth of the images, an eighth of the learning rate, 8 times the iterations
  torchrun --nproc_per_node=2 -m fastrcnn train --config-file my.yaml
      two processes, each on its own GPU, or on the CPU where there is none; SOLVER.IMS_PER_BATCH is shared among them
  fastrcnn train --config-file my.yaml --resume
      go on from the newest checkpoint in OUTPUT_DIR

Ctrl-C and SIGTERM stop after the iteration that is running and save a checkpoint for --resume.
Every key is explained in docs/config.md. Datasets lie in ./datasets, or in the folder that FASTRCNN_DATASETS names.
"""

WRITTEN = {
    "model_final.pth": "the weights, and all that --resume needs to train on",
    "config.yml": "every key of the configuration, as it was used",
    "labels.json": "the names of the classes",
    "metrics.jsonl": "losses, learning rate, speed and evaluations, one JSON object per line",
    "log.txt": "all messages",
    "loss_curves.png": "picture of the losses and evaluations",
    "val_detections.png": "images of the first test dataset: ground truth and detections",
    "report.html": "all of this on one page, with the best and the worst images",
    "inference": "detections and results per test dataset",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in OUTPUT_DIR")
    parser.add_argument("--skip-test", action="store_true", help="do not evaluate after training")
    add_config_arguments(parser, "default: the quick start")


def run(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file or QUICK_START, args.opts)
    numbered = args.config_file is None and "OUTPUT_DIR" not in args.opts[::2]
    done = train(cfg, resume=args.resume, skip_test=args.skip_test, numbered=numbered)
    if is_main():
        if done.iteration > 0:
            plot_metrics(done.output / "metrics.jsonl", done.output / "loss_curves.png")
        if done.results:
            draw_examples(cfg, done)
        write_report(done.output)
        print_summary(done, args.config_file)


def draw_examples(cfg: Config, run: Run, count: int = 12) -> None:
    """val_detections.png: up to `count` images, spread over the first test dataset, ground truth beside detections."""
    name = cfg.DATASETS.TEST[0]
    dataset = build_dataset(cfg, name, is_train=False, transforms=lambda image, target: (image, target))
    predictions = load_predictions(run.output / "inference" / name / "predictions.pth")
    pictures = []
    for index in range(0, len(dataset), max(len(dataset) // count, 1))[:count]:
        (image, target, _), boxlist = dataset[index], predictions[index]
        scale = readable_scale(boxlist.size, 512)
        pictures.append(draw_comparison(image, target, boxlist, getattr(dataset, "categories", {}), scale=scale))
    contact_sheet(pictures, 2, run.output / "val_detections.png")


def print_summary(run: Run, config_file: str | None) -> None:
    print(f"\nwritten to {run.output}:")
    for name, meaning in WRITTEN.items():
        if (run.output / name).exists():
            print(f"  {name:<20}{meaning}")
    for dataset, results in run.results.items():
        for task, values in results.items():
            figures = ", ".join(f"{metric} {values[metric]:.4f}" for metric in ("AP", "AP50") if metric in values)
            print(f"{dataset}: {task} {figures}")
    print("\nwhat to run next:")
    print(f"  use it on photos   fastrcnn demo --weights {run.output} photo.jpg")
    print(f"  evaluate again     fastrcnn test --weights {run.output}")
    print(
        f"  train longer       fastrcnn train --config-file {run.output}/config.yml --resume "
        f"SOLVER.MAX_ITER {2 * run.iteration}"
    )
    if config_file is None:
        print("  train on COCO      fastrcnn train --config-file e2e_mask_rcnn_R_50_FPN_1x")
