"""Bodies of torchvision and timm by name, such as torchvision:swin_t-FPN and timm:convnext_tiny-FPN, and MobileNetV3.

Their parameters have the library's names: torchvision's behind "backbone.body.", without "features." and with the stem
of a ResNet gathered under "stem.", as in our own; timm's behind "backbone.body.net.".
"""

import copy
import difflib
import importlib
import itertools
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from fastrcnn.config import ConfigError
from fastrcnn.models.backbones.backbone import TOPS, Backbone
from fastrcnn.models.layers import SyncBatchNorm
from fastrcnn.models.registry import BACKBONES

Parts = list[list[nn.Module]]


class _Map(NamedTuple):
    """What a layer gives; channels_last: as [B, h, w, C]."""

    stride: int
    channels: int
    channels_last: bool


class Chain(nn.ModuleDict):
    """Layers one after the other; [B, 3, H, W] -> the maps after the layers that `taps` names, each [B, C, h, w]."""

    def __init__(self, layers: dict[str, nn.Module], taps: dict[str, _Map]):
        super().__init__(layers)
        self.taps = taps
        self.channels = [tap.channels for tap in taps.values()]

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for name, layer in self.items():
            x = layer(x)
            if name in self.taps:
                maps.append(x.permute(0, 3, 1, 2) if self.taps[name].channels_last else x)
        return maps


class TimmBody(nn.Module):
    """A feature extractor of timm; [B, 3, H, W] -> its maps, each [B, C, h, w]."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.channels: list[int] = net.feature_info.channels()
        self.channels_last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.net(x)
        return [m.permute(0, 3, 1, 2) for m in maps] if self.channels_last else list(maps)


def torchvision_backbone(cfg: Any, model: nn.Module, top: str, taps: tuple[str, ...] = ()) -> Backbone:
    """A classifier of torchvision as a backbone. taps: the layers whose maps are wanted, instead of the last of each
    stride from 4 on."""
    name = cfg.MODEL.BACKBONE.CONV_BODY
    layers = _layers(model)
    maps = _measure(name, layers)
    if not taps:
        last = {found.stride: key for key, found in maps.items()}
        taps = tuple(last[stride] for stride in _strides(name, last, top))
    names = list(layers)
    used = names[: names.index(taps[-1]) + 1]
    body = Chain({key: layers[key] for key in used}, {key: maps[key] for key in taps})
    frozen = _set_norms(cfg, body)
    parts: Parts = [[] for _ in range(5)]
    for index, (key, layer) in enumerate(body.items()):
        # the first layer is a stem even if it reaches stride 4
        parts[max(maps[key].stride.bit_length() - 2, 0) if index else 0].append(layer)
    return Backbone(cfg, body, parts, top, frozen)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """A classifier's layers up to the pooling; they run one after the other in most of torchvision's models."""
    stage = getattr(model, "features", None) or getattr(model, "layers", None)
    if isinstance(stage, nn.Sequential):
        return dict(stage.named_children())
    ends = (nn.AdaptiveAvgPool2d, nn.Linear)
    layers = dict(itertools.takewhile(lambda item: not isinstance(item[1], ends), model.named_children()))
    if isinstance(model, torchvision.models.ResNet):
        stem = nn.Sequential()
        for name in ("conv1", "bn1", "relu", "maxpool"):
            stem.add_module(name, layers.pop(name))
        layers = {"stem": stem, **layers}
    if "trunk_output" in layers:  # RegNet
        layers.update(layers.pop("trunk_output").named_children())
    return layers


def _measure(name: str, layers: dict[str, nn.Module]) -> dict[str, _Map]:
    """What each layer gives, found with tensors that have no values."""
    height, width = 224, 352  # no map has its other sides in this ratio
    x = torch.empty(1, 3, height, width, device="meta")
    maps = {}
    for key, layer in layers.items():
        try:
            x = copy.deepcopy(layer).eval().to("meta")(x)
            _, a, b, c = x.shape
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ConfigError(f"{name} is no backbone for a detector: its layers are no chain ({error})") from error
        for channels_last, (channels, h, w) in ((False, (a, b, c)), (True, (c, a, b))):
            stride = height // h
            if (h * stride, w * stride) == (height, width):
                maps[key] = _Map(stride, channels, channels_last)
        if key not in maps:
            raise ConfigError(
                f"{name} is no backbone for a detector: a side of {height} becomes {b} in its layer {key}"
            )
    return maps


def timm_backbone(cfg: Any, model: str, top: str) -> Backbone:
    """The model of timm with that name as a backbone."""
    name = cfg.MODEL.BACKBONE.CONV_BODY
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError(f"{name} needs the package timm: pip install timm") from error
    try:
        info = timm.create_model(model, features_only=True).feature_info.info
    except (RuntimeError, AttributeError) as error:  # an unknown name; a model without features_only
        raise ConfigError(f"{name} is no backbone of timm: {error}") from error
    last = {row["reduction"]: index for index, row in enumerate(info)}
    indices = [last[stride] for stride in _strides(name, last, top)]
    body = TimmBody(timm.create_model(model, features_only=True, out_indices=indices))
    frozen = _set_norms(cfg, body)
    # the modules are registered in the order in which they run
    modules = dict(body.net.named_modules())
    names = list(modules)[1:]
    parts: Parts = []
    begin = 0
    for stride in (2, 4, 8, 16, 32):
        module = info[last[stride]]["module"] if stride in last else ""
        own = (f"{module}.", f"{module.replace('.', '_')}.")
        end = max((index for index, n in enumerate(names, 1) if f"{n}.".startswith(own)), default=begin)
        parts.append([modules[n] for n in names[begin:end]])
        begin = max(begin, end)
    return Backbone(cfg, body, parts, top, frozen)


def _strides(name: str, found: Any, top: str) -> list[int]:
    wanted = [2 ** (stage + 1) for stage in range(1, TOPS[top] + 1)]
    if not set(wanted) <= set(found):
        raise ConfigError(f"{name} has maps of the strides {sorted(found)}, but {wanted} are needed")
    return wanted


def _set_norms(cfg: Any, body: nn.Module) -> list[nn.Module]:
    """Batch norms as the ending of TRANS_FUNC says; gives the frozen ones.

    They stay the library's own, which may hold an activation too, with its epsilon unless FROZEN_BN_EPS is set.
    """
    name = cfg.MODEL.BACKBONE.CONV_BODY
    kind = cfg.MODEL.RESNETS.TRANS_FUNC.removeprefix("BottleneckWith")
    if kind not in ("FixedBatchNorm", "BatchNorm", "SyncBatchNorm"):
        raise ConfigError(
            f"MODEL.RESNETS.TRANS_FUNC asks for the norm {kind!r}; {name} takes FixedBatchNorm, BatchNorm or "
            "SyncBatchNorm"
        )
    norms = {path: module for path, module in body.named_modules() if isinstance(module, nn.BatchNorm2d)}
    if kind == "FixedBatchNorm":
        eps = cfg.MODEL.RESNETS.FROZEN_BN_EPS
        for norm in norms.values():
            norm.eps = norm.eps if eps < 0 else eps
        return list(norms.values())
    if kind == "SyncBatchNorm":
        for path, norm in norms.items():
            if type(norm) is not nn.BatchNorm2d:
                raise ConfigError(f"{name} has norms of its own, which SyncBatchNorm cannot replace")
            parent, _, child = path.rpartition(".")
            setattr(body.get_submodule(parent), child, SyncBatchNorm(norm.num_features, norm.eps, norm.momentum))
    return []


def library_backbone(cfg: Any) -> Backbone:
    """LIBRARY:MODEL-TOP, with the library torchvision or timm and a top of TOPS."""
    name = cfg.MODEL.BACKBONE.CONV_BODY
    library, _, rest = name.partition(":")
    model, _, top = rest.partition("-")
    if top not in TOPS or library not in ("torchvision", "timm"):
        raise ConfigError(
            f"MODEL.BACKBONE.CONV_BODY is {name!r}; wanted torchvision:NAME-TOP or timm:NAME-TOP with TOP one of "
            f"{', '.join(TOPS)}"
        )
    if library == "timm":
        return timm_backbone(cfg, model, top)
    names = torchvision.models.list_models(module=torchvision.models)
    if model not in names:
        near = difflib.get_close_matches(model, names, n=3, cutoff=0.0)
        raise ConfigError(f"MODEL.BACKBONE.CONV_BODY is {name!r}; the nearest of torchvision are {', '.join(near)}")
    return torchvision_backbone(cfg, torchvision.models.get_model(model, weights=None), top)


@BACKBONES.register("MobileNetV3-Large-FPN")
def mobilenet_v3(cfg: Any) -> Backbone:
    """The backbone of torchvision's fasterrcnn_mobilenet_v3_large_fpn: maps of the strides 32, 32 and 64."""
    # with the plain batch norm that its detectors have, not with that of its classifier
    model = torchvision.models.mobilenet_v3_large(weights=None, norm_layer=nn.BatchNorm2d)
    return torchvision_backbone(cfg, model, "FPN", taps=("13", "16"))
