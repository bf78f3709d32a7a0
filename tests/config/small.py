"""Recipes made small: narrow layers, few proposals, images of 128 pixels."""

from pathlib import Path

import torch

import fastrcnn
from fastrcnn.config import Config, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "fastrcnn" / "configs"


def small(name: str) -> Config:
    """The recipe, small; what makes it that recipe stays."""
    cfg = load_config(CONFIGS / f"{name}.yaml", ["MODEL.DEVICE", "cpu", "MODEL.WEIGHT", ""])
    model = cfg.MODEL
    if model.BACKBONE.CONV_BODY.startswith("R-"):
        basic = model.BACKBONE.CONV_BODY.startswith(("R-18", "R-34"))
        model.RESNETS.STEM_OUT_CHANNELS = 8
        model.RESNETS.WIDTH_PER_GROUP = 8 if model.RESNETS.NUM_GROUPS == 1 else 2
        model.RESNETS.RES2_OUT_CHANNELS = 8 if basic else 32
        model.RESNETS.BACKBONE_OUT_CHANNELS = 16
        model.GROUP_NORM.NUM_GROUPS = 4
        model.BACKBONE.CONV_BODY = model.BACKBONE.CONV_BODY.replace("R-101", "R-50").replace("R-152", "R-50")
    for mode in ("TRAIN", "TEST"):
        for key in ("PRE_NMS_TOP_N", "POST_NMS_TOP_N", "FPN_POST_NMS_TOP_N"):
            setattr(model.RPN, f"{key}_{mode}", 50)
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE, model.ROI_HEADS.DETECTIONS_PER_IMG = 16, 8
    model.ROI_HEADS.SCORE_THRESH = 0.0
    model.ROI_BOX_HEAD.MLP_HEAD_DIM = model.ROI_BOX_HEAD.CONV_HEAD_DIM = 16
    model.ROI_MASK_HEAD.CONV_LAYERS = (16,) * len(model.ROI_MASK_HEAD.CONV_LAYERS)
    model.ROI_KEYPOINT_HEAD.CONV_LAYERS = (16,) * len(model.ROI_KEYPOINT_HEAD.CONV_LAYERS)
    model.RETINANET.PRE_NMS_TOP_N = 50
    cfg.TEST.BBOX_AUG.SCALES = tuple(96 for _ in cfg.TEST.BBOX_AUG.SCALES[:1])
    cfg.TEST.DETECTIONS_PER_IMG = 8
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = 128
    return cfg


def batch(cfg: Config) -> tuple[fastrcnn.ImageBatch, fastrcnn.TargetBatch]:
    """Two images of noise with three objects, as a model of that config learns from."""
    images = fastrcnn.ImageBatch.from_images(
        [torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8) for _ in range(2)], cfg
    )
    boxes = torch.tensor([[[10.0, 10, 70, 90], [30, 40, 120, 120]], [[20, 20, 100, 60], [0, 0, 0, 0]]])
    labels = torch.tensor([[1, 1], [1, 0]])
    targets = fastrcnn.TargetBatch(boxes, labels, torch.zeros(2, 2, dtype=torch.bool))
    if cfg.MODEL.MASK_ON:
        targets.masks = torch.zeros(2, 2, *images.pixels.shape[-2:], dtype=torch.uint8)
        for masks, image in zip(targets.masks, boxes.int().tolist(), strict=True):
            for mask, (x1, y1, x2, y2) in zip(masks, image, strict=True):
                mask[y1:y2, x1:x2] = 1
    if cfg.MODEL.KEYPOINT_ON:
        middle = (boxes[:, :, None, :2] + boxes[:, :, None, 2:]) / 2
        targets.keypoints = torch.cat([middle, torch.full_like(middle[..., :1], 2)], -1).repeat(
            1, 1, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES, 1
        )
    return images, targets
