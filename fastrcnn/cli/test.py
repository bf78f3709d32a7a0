"""Evaluates trained weights on the datasets of DATASETS.TEST: COCO's or PASCAL VOC's measures, boxes and masks."""

import argparse
from pathlib import Path

from fastrcnn.cli.common import add_model_arguments, model_of
from fastrcnn.engine import test
from fastrcnn.engine.distributed import is_main

EXAMPLES = """  fastrcnn test --weights output/quick_start
      the newest checkpoint of a folder, with the configuration that it carries; without arguments, of the last quick
      start
  fastrcnn test --weights output/quick_start/model_0000250.pth MODEL.ROI_HEADS.SCORE_THRESH 0.5
      one checkpoint, with a key changed
  fastrcnn test --config-file torchvision/mask_rcnn_R_50_FPN --weights torchvision://maskrcnn_resnet50_fpn
      weights from elsewhere, which carry no configuration
  torchrun --nproc_per_node=2 -m fastrcnn test --weights output/quick_start
      two processes share the images

The detections and the results go to OUTPUT_DIR/inference/<dataset>.
Every key is explained in docs/config.md. Datasets lie in ./datasets, or in the folder that FASTRCNN_DATASETS names.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    cfg, weights = model_of(args)
    results = test(cfg, weights)
    if is_main():
        for dataset, tasks in results.items():
            for task, values in tasks.items():
                figures = ", ".join(f"{metric} {values[metric]:.4f}" for metric in ("AP", "AP50") if metric in values)
                print(f"{dataset}: {task} {figures}")
        print(f"written to {Path(cfg.OUTPUT_DIR) / 'inference'}")
