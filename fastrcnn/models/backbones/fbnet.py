"""FBNet (Wu et al., 2019), ChamNet (Dai et al., 2019) and MobileNetV2 (Sandler et al., 2018): small backbones together
with the RPN and region heads that belong to them."""

import json
from collections import OrderedDict
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastrcnn.config import ConfigError
from fastrcnn.models.backbones.fbnet_blocks import ConvNorm, Style, make_block, round_channels, style_of
from fastrcnn.models.layers import conv
from fastrcnn.models.registry import (
    BACKBONES,
    ROI_BOX_FEATURE_EXTRACTORS,
    ROI_KEYPOINT_FEATURE_EXTRACTORS,
    ROI_MASK_FEATURE_EXTRACTORS,
    RPN_HEADS,
)


def _ops(*stages: str) -> list[list[str]]:
    """["k5 3 k3 6", …] -> the names of the blocks of each stage: three ir_k5 and six ir_k3, …"""
    found = []
    for stage in stages:
        words = stage.split()
        found.append([f"ir_{op}" for op, count in zip(words[::2], words[1::2], strict=True) for _ in range(int(count))])
    return found


# As maskrcnn-benchmark writes them, and as MODEL.FBNET.ARCH_DEF takes them, in JSON. block_op_type: the name of each
# block, stage by stage. block_cfg: "first" is [channels, stride, kernel, 3 if it is left out], "stages" have lists of
# [expansion, channels, repeats, stride of the first], the others the stages that make up each part. Further keys, which
# none here has: "kpts" and "head" (for region heads without a part of their own), "last" (its first number are the
# channels of the region heads' last convolution), "rpn_stride" (that MODEL.RPN.ANCHOR_STRIDE must have).
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "default": {
        "block_op_type": _ops("k3 1", "k3 2", "k3 3", "k3 7", "k3 4", "k3 3", "k3 5"),
        "block_cfg": {
            "first": [32, 2],
            "stages": [
                [[1, 16, 1, 1]],
                [[6, 24, 2, 2]],
                [[6, 32, 3, 2]],
                [[6, 64, 4, 2], [6, 96, 3, 1]],
                [[4, 160, 1, 2], [6, 160, 2, 1], [6, 240, 1, 1]],
                [[6, 96, 3, 1]],
                [[4, 160, 1, 1], [6, 160, 3, 1], [3, 80, 1, -2]],
            ],
            "backbone": [0, 1, 2, 3],
            "rpn": [5],
            "bbox": [4],
            "mask": [6],
        },
    },
    "xirb16d_dsmask": {
        "block_op_type": _ops("k3 1", "k3 2", "k3 3", "k3 7", "k3 4", "k3 5", "k3 3"),
        "block_cfg": {
            "first": [16, 2],
            "stages": [
                [[1, 16, 1, 1]],
                [[6, 32, 2, 2]],
                [[6, 48, 3, 2]],
                [[6, 96, 4, 2], [6, 128, 3, 1]],
                [[4, 128, 1, 2], [6, 128, 2, 1], [6, 160, 1, 1]],
                [[4, 128, 1, 2], [6, 128, 2, 1], [6, 128, 1, -2], [3, 64, 1, -2]],
                [[6, 128, 3, 1]],
            ],
            "backbone": [0, 1, 2, 3],
            "rpn": [6],
            "bbox": [4],
            "mask": [5],
        },
    },
    "mobilenet_v2": {
        "block_op_type": _ops("k3 1", "k3 2", "k3 3", "k3 7", "k3 4"),
        "block_cfg": {
            "first": [32, 2],
            "stages": [
                [[1, 16, 1, 1]],
                [[6, 24, 2, 2]],
                [[6, 32, 3, 2]],
                [[6, 64, 4, 2], [6, 96, 3, 1]],
                [[6, 160, 3, 1], [6, 320, 1, 1]],
            ],
            "backbone": [0, 1, 2, 3],
            "bbox": [4],
        },
    },
    "cham_v1a": {
        "block_op_type": _ops("k3 1", "k7 2", "k3 5", "k5 7 k3 5", "k3 5", "k3 3"),
        "block_cfg": {
            "first": [32, 2],
            "stages": [
                [[1, 24, 1, 1]],
                [[4, 48, 2, 2]],
                [[7, 64, 5, 2]],
                [[12, 56, 7, 2], [8, 88, 5, 1]],
                [[7, 152, 4, 2], [10, 104, 1, 1]],
                [[8, 88, 3, 1]],
            ],
            "backbone": [0, 1, 2, 3],
            "rpn": [5],
            "bbox": [4],
        },
    },
    "cham_v2": {
        "block_op_type": _ops("k3 1", "k5 4", "k7 6", "k5 3 k3 6", "k3 7", "k3 1"),
        "block_cfg": {
            "first": [32, 2],
            "stages": [
                [[1, 24, 1, 1]],
                [[8, 32, 4, 2]],
                [[5, 48, 6, 2]],
                [[9, 56, 3, 2], [6, 56, 6, 1]],
                [[2, 160, 6, 2], [6, 112, 1, 1]],
                [[6, 56, 1, 1]],
            ],
            "backbone": [0, 1, 2, 3],
            "rpn": [5],
            "bbox": [4],
        },
    },
}


class Block(NamedTuple):
    """One block of an architecture, the index-th of its stage."""

    stage: int
    index: int
    op: str
    expansion: float
    channels: int
    stride: int


class Architecture:
    """What MODEL.FBNET.ARCH or ARCH_DEF describes; ConfigError, which names the key, if it describes nothing."""

    def __init__(self, cfg: Any):
        spec = cfg.MODEL.FBNET
        self.name = "MODEL.FBNET.ARCH_DEF" if spec.ARCH_DEF else spec.ARCH
        if not spec.ARCH_DEF and spec.ARCH not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ConfigError(f"MODEL.FBNET.ARCH is {spec.ARCH!r}; it must be one of {known}, or set ARCH_DEF")
        try:
            definition = json.loads(spec.ARCH_DEF) if spec.ARCH_DEF else ARCHITECTURES[spec.ARCH]
            layers = definition["block_cfg"]
            self.parts: dict[str, Any] = {"backbone": range(len(layers["stages"]) - 1), **definition, **layers}
            channels, stride, *kernel = layers["first"]
            self.first = channels, stride, kernel[0] if kernel else 3
            self.blocks: list[Block] = []
            for stage, (ops, rows) in enumerate(zip(definition["block_op_type"], layers["stages"], strict=True)):
                repeated = [(t, c, s if i == 0 else 1) for t, c, n, s in rows for i in range(n)]
                for index, (op, row) in enumerate(zip(ops, repeated, strict=True)):
                    self.blocks.append(Block(stage, index, op, *row))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.name} is no architecture: {type(error).__name__}: {error}") from error
        stride = self.parts.get("rpn_stride")
        if stride is not None and cfg.MODEL.RPN.ANCHOR_STRIDE[0] != stride:
            raise ConfigError(
                f"MODEL.RPN.ANCHOR_STRIDE is {cfg.MODEL.RPN.ANCHOR_STRIDE}; the architecture {self.name} needs {stride}"
            )

    def part(self, *names: str) -> list[Block]:
        """The blocks of the first of those parts that there is."""
        for name in names:
            if self.parts.get(name):
                return [block for block in self.blocks if block.stage in self.parts[name]]
        raise ConfigError(f"the architecture {self.name} has no part {' or '.join(names)}; choose another head")


def _scaled(cfg: Any, channels: int) -> int:
    return round_channels(int(channels * cfg.MODEL.FBNET.SCALE_FACTOR), cfg.MODEL.FBNET.WIDTH_DIVISOR)


def _chain(cfg: Any, blocks: list[Block], channels: int, style: Style) -> tuple[nn.Sequential, int]:
    """The blocks one after the other, named xif{stage}_{index}, and the channels of the result."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for block in blocks:
        width = _scaled(cfg, block.channels)
        layers[f"xif{block.stage}_{block.index}"] = make_block(
            block.op, channels, width, expansion=block.expansion, stride=block.stride, style=style
        )
        channels = width
    return nn.Sequential(layers), channels


@BACKBONES.register("FBNet")
class FBNet(nn.Module):
    """[B, 3, H, W] -> one map [B, out_channels, H / 16, W / 16] in the architectures that there are.

    All of it trains: MODEL.BACKBONE.FREEZE_CONV_BODY_AT plays no part.
    """

    def __init__(self, cfg: Any):
        super().__init__()
        architecture, style = Architecture(cfg), style_of(cfg)
        channels, stride, kernel = architecture.first
        width = _scaled(cfg, channels)
        first = ConvNorm(3, width, kernel, style.norm, stride=stride)
        stages, self.out_channels = _chain(cfg, architecture.part("backbone"), width, style)
        self.body = nn.Sequential(OrderedDict(first=first, stages=stages))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return [self.body(pixels)]


class _RPNFeatures(nn.Module):
    """The last MODEL.FBNET.RPN_HEAD_BLOCKS blocks of the RPN's part, or all of them, on each map."""

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        spec = cfg.MODEL.FBNET
        blocks = Architecture(cfg).part("rpn")
        if not 0 <= spec.RPN_HEAD_BLOCKS <= len(blocks):
            raise ConfigError(f"MODEL.FBNET.RPN_HEAD_BLOCKS is {spec.RPN_HEAD_BLOCKS} of {len(blocks)} blocks")
        style = style_of(cfg, "RPN_BN_TYPE" if spec.RPN_BN_TYPE else "BN_TYPE")
        self.head, self.out_channels = _chain(cfg, blocks[-spec.RPN_HEAD_BLOCKS :], in_channels, style)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [self.head(x) for x in features]


class _RPNPredictor(nn.Module):
    def __init__(self, in_channels: int, num_anchors: int):
        super().__init__()
        self.cls_logits = conv(in_channels, num_anchors, 1, init="small")
        self.bbox_pred = conv(in_channels, num_anchors * 4, 1, init="small")

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [self.cls_logits(x) for x in features], [self.bbox_pred(x) for x in features]


@RPN_HEADS.register("FBNet.rpn_head")
class FBNetRPNHead(nn.Sequential):
    """L maps [B, C, H, W] -> logits L × [B, A, H, W], deltas L × [B, 4A, H, W], the four of an anchor adjacent."""

    def __init__(self, cfg: Any, in_channels: int, num_anchors: int):
        features = _RPNFeatures(cfg, in_channels)
        super().__init__(features, _RPNPredictor(features.out_channels, num_anchors))


class _RegionHead(nn.Module):
    """[N, in_channels, side, side] -> the blocks of a part of the architecture, and perhaps a 1×1 convolution to the
    channels that the LAST_SCALE key says -> [N, out_channels, side', side'].

    prefix: of the keys {prefix}_HEAD_BLOCKS, _STRIDE and _LAST_SCALE. parts: which part, the first that there is.
    """

    prefix: str
    parts: tuple[str, ...]

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        spec = cfg.MODEL.FBNET
        architecture, style, key = Architecture(cfg), style_of(cfg), f"MODEL.FBNET.{self.prefix}_HEAD"
        blocks = architecture.part(*self.parts)
        chosen = getattr(spec, f"{self.prefix}_HEAD_BLOCKS")
        if chosen:
            there = {block.index for block in blocks}
            if not set(chosen) <= there:
                raise ConfigError(f"{key}_BLOCKS is {chosen}; {architecture.name} has the blocks {sorted(there)}")
            blocks = [block for block in blocks if block.index in chosen]
        stride = getattr(spec, f"{self.prefix}_HEAD_STRIDE")
        if stride not in (0, 1, 2):
            raise ConfigError(f"{key}_STRIDE is {stride}; it must be 0, 1 or 2")
        if stride:
            blocks = [blocks[0]._replace(stride=stride), *blocks[1:]]
        chain, channels = _chain(cfg, blocks, in_channels, style)
        scale = getattr(spec, f"{self.prefix}_HEAD_LAST_SCALE")
        if scale > 0:
            wide = architecture.parts.get("last", [0])[0]
            width = int(int(wide * max(spec.SCALE_FACTOR, 1.0)) * scale)
        else:
            width = int(channels * -scale)
        last: nn.Module = nn.Identity()
        if width:
            width = round_channels(width, spec.WIDTH_DIVISOR)
            last = ConvNorm(channels, width, 1, style.norm)
            channels = width
        self.head = nn.Sequential(OrderedDict(blocks=chain, last=last))
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


@ROI_BOX_FEATURE_EXTRACTORS.register("FBNet.roi_head")
class FBNetBoxHead(_RegionHead):
    prefix, parts = "DET", ("bbox", "head")


@ROI_MASK_FEATURE_EXTRACTORS.register("FBNet.roi_head_mask")
class FBNetMaskHead(_RegionHead):
    prefix, parts = "MASK", ("mask", "head")


@ROI_KEYPOINT_FEATURE_EXTRACTORS.register("FBNet.roi_head_keypoints")
class FBNetKeypointHead(_RegionHead):
    """The part for masks serves for keypoints too: no architecture here has one of its own."""

    prefix, parts = "KPTS", ("kpts", "head", "mask")
