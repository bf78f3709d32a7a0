"""Trains a detector, evaluates it, and leaves weights, metrics and pictures in OUTPUT_DIR."""

import argparse
import sys
from pathlib import Path

from fastrcnn.config import Config, load_config
from fastrcnn.data import build_dataset
from fastrcnn.engine import Run, load_predictions, train
from fastrcnn.engine.distributed import is_main
from fastrcnn.engine.logging import exit_on_user_error
from fastrcnn.visualization import contact_sheet, draw_detections, plot_metrics

QUICK_START = Path(__file__).resolve().parent.parent / "configs" / "quick_start.yaml"

EXAMPLES = """examples:
  python tools/train.py
      the quick start: makes a dataset of shapes and trains a small Mask R-CNN on it, in minutes on a CPU,
      in output/quick_start (the next time in output/quick_start-2, …)
  python tools/train.py --config-file configs/e2e_mask_rcnn_R_50_FPN_1x.yaml OUTPUT_DIR output/mask_r50 \\
      SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.0025 SOLVER.MAX_ITER 720000 SOLVER.STEPS "(480000, 640000)"
      a recipe, changed for one GPU: an eighth of the images, an eighth of the learning rate, 8 times the iterations
  torchrun --nproc_per_node=2 tools/train.py --config-file my.yaml
      two processes, each on its own GPU, or on the CPU where there is none; SOLVER.IMS_PER_BATCH is shared among them
  python tools/train.py --config-file my.yaml --resume
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
    "val_detections.png": "images of the first test dataset with the detections",
    "inference": "detections and results per test dataset",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", type=Path, metavar="FILE", help="YAML recipe (default: the quick start)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in OUTPUT_DIR")
    parser.add_argument("--skip-test", action="store_true", help="do not evaluate after training")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="keys of the configuration to set, in pairs")
    args = parser.parse_intermixed_args()
    with exit_on_user_error():
        cfg = load_config(args.config_file or QUICK_START, args.opts)
        numbered = args.config_file is None and "OUTPUT_DIR" not in args.opts[::2]
        run = train(cfg, resume=args.resume, skip_test=args.skip_test, numbered=numbered)
        if is_main():
            if run.iteration > 0:
                plot_metrics(run.output / "metrics.jsonl", run.output / "loss_curves.png")
            if run.results:
                draw_examples(cfg, run)
            print_summary(run, args.config_file)


def draw_examples(cfg: Config, run: Run, count: int = 12) -> None:
    """val_detections.png: up to `count` images, spread over the first test dataset, with their detections."""
    name = cfg.DATASETS.TEST[0]
    dataset = build_dataset(cfg, name, is_train=False)
    predictions = load_predictions(run.output / "inference" / name / "predictions.pth")
    pictures = []
    for index in range(0, len(dataset), max(len(dataset) // count, 1))[:count]:
        boxlist = predictions[index]
        scale = max(1, 384 // max(boxlist.size))  # so that labels on small images can be read
        pictures.append(draw_detections(dataset[index][0], boxlist, getattr(dataset, "categories", {}), scale=scale))
    contact_sheet(pictures, 4, run.output / "val_detections.png")


def print_summary(run: Run, config_file: Path | None) -> None:
    print(f"\nwritten to {run.output}:")
    for name, meaning in WRITTEN.items():
        if (run.output / name).exists():
            print(f"  {name:<20}{meaning}")
    for dataset, results in run.results.items():
        for task, values in results.items():
            figures = ", ".join(f"{metric} {values[metric]:.4f}" for metric in ("AP", "AP50") if metric in values)
            print(f"{dataset}: {task} {figures}")
    print("\nwhat to run next:")
    print(f"  evaluate again     python tools/test.py --weights {run.output}")
    print(
        f"  train longer       python tools/train.py --config-file {run.output}/config.yml --resume "
        f"SOLVER.MAX_ITER {2 * run.iteration}"
    )
    if config_file is None:
        recipes = QUICK_START.parent
        print(f"  train on COCO      python tools/train.py --config-file {recipes}/e2e_mask_rcnn_R_50_FPN_1x.yaml")
        print("  use it, and train on your own images: see README.md")


if __name__ == "__main__":
    sys.exit(main())
