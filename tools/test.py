"""Evaluates trained weights on the datasets of DATASETS.TEST: COCO's or PASCAL VOC's measures, boxes and masks."""

import argparse
import sys
from pathlib import Path

from fastrcnn.config import Config, load_config
from fastrcnn.engine import config_of, find, output_folder, test
from fastrcnn.engine.distributed import is_main
from fastrcnn.engine.logging import exit_on_user_error

QUICK_START = Path(__file__).resolve().parent.parent / "configs" / "quick_start.yaml"

EXAMPLES = """examples:
  python tools/test.py --weights output/quick_start
      the newest checkpoint of a folder, with the configuration that it carries; without arguments, of the last quick
      start
  python tools/test.py --weights output/quick_start/model_0000250.pth MODEL.ROI_HEADS.SCORE_THRESH 0.5
      one checkpoint, with a key changed
  python tools/test.py --config-file configs/torchvision/mask_rcnn_R_50_FPN.yaml \
          --weights torchvision://maskrcnn_resnet50_fpn
      weights from elsewhere, which carry no configuration
  torchrun --nproc_per_node=2 tools/test.py --weights output/quick_start
      two processes share the images

The detections and the results go to OUTPUT_DIR/inference/<dataset>.
Every key is explained in docs/config.md. Datasets lie in ./datasets, or in the folder that FASTRCNN_DATASETS names.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", type=Path, metavar="FILE", help="YAML recipe (default: the checkpoint's own)")
    parser.add_argument(
        "--weights",
        metavar="PATH",
        help="file, folder or address of weights (default: the newest checkpoint in OUTPUT_DIR, else MODEL.WEIGHT)",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="keys of the configuration to set, in pairs")
    args = parser.parse_intermixed_args()
    with exit_on_user_error():
        cfg, weights = choose(args.config_file, args.weights, args.opts)
        results = test(cfg, weights)
        if is_main():
            for dataset, tasks in results.items():
                for task, values in tasks.items():
                    figures = ", ".join(
                        f"{metric} {values[metric]:.4f}" for metric in ("AP", "AP50") if metric in values
                    )
                    print(f"{dataset}: {task} {figures}")
            print(f"written to {Path(cfg.OUTPUT_DIR) / 'inference'}")


def choose(config_file: Path | None, weights: str | Path | None, opts: list[str]) -> tuple[Config, str | Path]:
    """The config and the checkpoint that the arguments mean: see --help."""
    if config_file is None and weights is None:
        started = load_config(QUICK_START, opts)
        weights = output_folder(started.OUTPUT_DIR, resume=True, numbered="OUTPUT_DIR" not in opts[::2])
    if config_file is None:
        weights = find(weights)
        return config_of(weights, opts), weights
    cfg = load_config(config_file, opts)
    if weights is None:
        try:
            weights = find(cfg.OUTPUT_DIR)
        except FileNotFoundError:
            if not cfg.MODEL.WEIGHT:
                raise
            weights = cfg.MODEL.WEIGHT
    return cfg, weights


if __name__ == "__main__":
    sys.exit(main())
