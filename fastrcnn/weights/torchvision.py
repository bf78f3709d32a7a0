"""torchvision's `fasterrcnn_resnet50_fpn` and `maskrcnn_resnet50_fpn`, and its ResNets as bodies of a detector."""

import re
from collections.abc import Mapping

from torch import Tensor

# their names, as regular expressions, and ours; those of torchvision before 0.14 lack the inner ".0"
_RENAMES = (
    (r"backbone\.body\.(conv1|bn1)\.", r"backbone.body.stem.\1."),
    (r"rpn\.head\.conv\.(?:0\.0\.)?(weight|bias)", r"rpn.head.conv.\1"),
    (r"roi_heads\.box_head\.(fc6|fc7)\.", r"roi_heads.box.feature_extractor.\1."),
    (r"roi_heads\.box_predictor\.", "roi_heads.box.predictor."),
    (r"roi_heads\.mask_predictor\.", "roi_heads.mask.predictor."),
)
# numbered from 0 there and from 1 here
_NUMBERED = (
    (r"backbone\.fpn\.inner_blocks\.(\d+)\.(?:0\.)?", "backbone.fpn.fpn_inner{}."),
    (r"backbone\.fpn\.layer_blocks\.(\d+)\.(?:0\.)?", "backbone.fpn.fpn_layer{}."),
    (r"roi_heads\.mask_head\.(?:mask_fcn)?(\d+)\.(?:0\.)?", "roi_heads.mask.feature_extractor.mask_fcn{}."),
)


def is_body(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the parameters of a torchvision ResNet, trained to classify."""
    return "conv1.weight" in state and "layer1.0.conv1.weight" in state


def convert_body(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as the body of a backbone, without the classifier."""
    return convert({f"backbone.body.{name}": value for name, value in state.items() if not name.startswith("fc.")})


def matches(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the parameters of a torchvision detector."""
    return "roi_heads.box_head.fc6.weight" in state and any(k.startswith("backbone.fpn.inner_blocks.") for k in state)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under our names."""
    return {_rename(name): value for name, value in state.items()}


def _rename(name: str) -> str:
    for pattern, template in _NUMBERED:
        match = re.match(pattern, name)
        if match:
            # before 0.14 the mask head counted from mask_fcn1
            number = int(match[1]) + (0 if "mask_fcn" in match[0] else 1)
            return template.format(number) + name[match.end() :]
    for pattern, replacement in _RENAMES:
        name = re.sub(f"^{pattern}", replacement, name)
    return name
