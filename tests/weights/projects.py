"""The parameters of other projects' models by the names that those projects give them, written down for the tests."""

import numpy as np
import torch

STATISTICS = ("weight", "bias", "running_mean", "running_var")
COUNTS = (3, 4, 6, 3)  # blocks of R-50


def tensors(names):
    """name -> shape, or names alone (shape [2]), as a state dict of random numbers."""
    shapes = names if isinstance(names, dict) else dict.fromkeys(names, (2,))
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def benchmark_stage(prefix, stage, norm=STATISTICS):
    """maskrcnn-benchmark's names of a residual stage."""
    out = []
    for block in range(COUNTS[stage - 1]):
        layers = [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")]
        layers += [("downsample.0", "downsample.1")] if block == 0 else []
        for conv, bn in layers:
            name = f"{prefix}layer{stage}.{block}."
            out += [f"{name}{conv}.weight", *(f"{name}{bn}.{part}" for part in norm)]
    return out


def benchmark_stem(norm=STATISTICS):
    return ["backbone.body.stem.conv1.weight", *(f"backbone.body.stem.bn1.{part}" for part in norm)]


def detectron2_stage(prefix, stage, norm=STATISTICS):
    """detectron2's names of the stage that maskrcnn-benchmark calls layer{stage}, in the same order."""
    out = []
    for block in range(COUNTS[stage - 1]):
        for conv in ("conv1", "conv2", "conv3", *(["shortcut"] if block == 0 else [])):
            name = f"{prefix}res{stage + 1}.{block}.{conv}"
            out += [f"{name}.weight", *(f"{name}.norm.{part}" for part in norm)]
    return out


def detectron2_stem(prefix, norm=STATISTICS):
    return [f"{prefix}stem.conv1.weight", *(f"{prefix}stem.conv1.norm.{part}" for part in norm)]


def weight_bias(*layers):
    return [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]


def blob_name(name, group_norm=False):
    """Detectron's name of a parameter of maskrcnn-benchmark's R-50 models; None for what Detectron does not store."""
    last = {1: 2, 2: 3, 3: 5, 4: 2}  # block of R-50's stages that feeds the pyramid
    layer, part = name.rsplit(".", 1)
    if part in ("running_mean", "running_var"):
        return None
    end = {"weight": "w", "bias": "b"}[part]
    affine = {"weight": "s", "bias": "b"}[part]
    words = layer.split(".")

    def normed(conv, kind="gn"):
        return f"{conv}_{kind}_{affine}"

    norm = "gn" if group_norm else "bn"
    if "stem" in words:
        if words[-1] == "conv1":
            return f"conv1_{end}"
        return normed("conv1") if group_norm else normed("res_conv1", "bn")
    if any(word.startswith("layer") and word[5:].isdigit() for word in words):
        at = next(i for i, word in enumerate(words) if word.startswith("layer"))
        stem = f"res{int(words[at][5:]) + 1}_{words[at + 1]}_branch"
        rest = ".".join(words[at + 2 :])
        branch = {"1": "2a", "2": "2b", "3": "2c"}
        if rest == "downsample.0":
            return f"{stem}1_{end}"
        if rest == "downsample.1":
            return normed(f"{stem}1", norm)
        return (
            f"{stem}{branch[rest[-1]]}_{end}" if rest.startswith("conv") else normed(f"{stem}{branch[rest[-1]]}", norm)
        )
    if layer.startswith("backbone.fpn.top_blocks."):
        return f"fpn_{layer[-1]}_{end}"
    if layer.startswith("backbone.fpn."):
        stage = int(words[2][-1])
        blob = f"res{stage + 1}_{last[stage]}_sum"
        if words[2].startswith("fpn_inner"):
            blob = f"inner_{blob}" + ("_lateral" if stage < 4 else "")
        return normed(f"fpn_{blob}") if words[3:] == ["1"] else f"fpn_{blob}_{end}"
    if layer.startswith("rpn.head."):
        return {
            "conv": f"conv_rpn_fpn2_{end}",
            "cls_logits": f"rpn_cls_logits_fpn2_{end}",
            "bbox_pred": f"rpn_bbox_pred_fpn2_{end}",
        }[words[2]]
    if "xconvs" in words:
        number = int(words[-1])
        return f"head_conv{number // 3 + 1}_{end}" if number % 3 == 0 else normed(f"head_conv{number // 3 + 1}")
    if words[-1].startswith("mask_fcn") and words[-1][8:].isdigit():
        return f"_[mask]_fcn{words[-1][8:]}_{end}"
    if words[-2].startswith("mask_fcn"):
        blob = f"_[mask]_fcn{words[-2][8:]}"
        return normed(blob) if words[-1] == "1" else f"{blob}_{end}"
    return f"{words[-1]}_{end}"


def detectron_file(state, group_norm):
    """What Detectron's training would have written for a state dict under maskrcnn-benchmark's names."""
    named = {blob_name(name, group_norm): value for name, value in state.items()}
    named.pop(None, None)
    blobs = {name: value.numpy() for name, value in named.items()}
    momentum = {f"{name}_momentum": np.zeros_like(value) for name, value in blobs.items()}
    return {"cfg": "MODEL: {}\n", "blobs": blobs | momentum}
