"""FBNet against its tables, torchvision's MobileNetV2 and compositions of plain functions."""

import itertools
import json
import math
import re
from dataclasses import fields

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import fastrcnn
from fastrcnn.config import ConfigError
from fastrcnn.config.schema import FBNetConfig
from fastrcnn.models import registry
from fastrcnn.models.backbones import build_backbone
from fastrcnn.models.backbones.fbnet import ARCHITECTURES
from fastrcnn.models.backbones.fbnet_blocks import PRIMITIVES, InvertedResidual, Style, make_block, round_channels

# first, stages of (expansion, channels, repeats, stride), kernels, and the stage of each part
TABLE = {
    "default": (
        "32",
        "1,16,1,1 / 6,24,2,2 / 6,32,3,2 / 6,64,4,2 + 6,96,3,1 / 4,160,1,2 + 6,160,2,1 + 6,240,1,1 / 6,96,3,1 / "
        "4,160,1,1 + 6,160,3,1 + 3,80,1,-2",
        "3x1 / 3x2 / 3x3 / 3x7 / 3x4 / 3x3 / 3x5",
        {"bbox": 4, "rpn": 5, "mask": 6},
    ),
    "xirb16d_dsmask": (
        "16",
        "1,16,1,1 / 6,32,2,2 / 6,48,3,2 / 6,96,4,2 + 6,128,3,1 / 4,128,1,2 + 6,128,2,1 + 6,160,1,1 / "
        "4,128,1,2 + 6,128,2,1 + 6,128,1,-2 + 3,64,1,-2 / 6,128,3,1",
        "3x1 / 3x2 / 3x3 / 3x7 / 3x4 / 3x5 / 3x3",
        {"bbox": 4, "mask": 5, "rpn": 6},
    ),
    "mobilenet_v2": (
        "32",
        "1,16,1,1 / 6,24,2,2 / 6,32,3,2 / 6,64,4,2 + 6,96,3,1 / 6,160,3,1 + 6,320,1,1",
        "3x1 / 3x2 / 3x3 / 3x7 / 3x4",
        {"bbox": 4},
    ),
    "cham_v1a": (
        "32",
        "1,24,1,1 / 4,48,2,2 / 7,64,5,2 / 12,56,7,2 + 8,88,5,1 / 7,152,4,2 + 10,104,1,1 / 8,88,3,1",
        "3x1 / 7x2 / 3x5 / 5x7 + 3x5 / 3x5 / 3x3",
        {"bbox": 4, "rpn": 5},
    ),
    "cham_v2": (
        "32",
        "1,24,1,1 / 8,32,4,2 / 5,48,6,2 / 9,56,3,2 + 6,56,6,1 / 2,160,6,2 + 6,112,1,1 / 6,56,1,1",
        "3x1 / 5x4 / 7x6 / 5x3 + 3x6 / 3x7 / 3x1",
        {"bbox": 4, "rpn": 5},
    ),
}
HEADS = {
    "bbox": registry.ROI_BOX_FEATURE_EXTRACTORS["FBNet.roi_head"],
    "mask": registry.ROI_MASK_FEATURE_EXTRACTORS["FBNet.roi_head_mask"],
    "kpts": registry.ROI_KEYPOINT_FEATURE_EXTRACTORS["FBNet.roi_head_keypoints"],
}
RPNHead = registry.RPN_HEADS["FBNet.rpn_head"]
# what maskrcnn-benchmark's files set
COMMON = (
    "MODEL.BACKBONE.CONV_BODY FBNet MODEL.FBNET.BN_TYPE bn MODEL.FBNET.WIDTH_DIVISOR 8 "
    "MODEL.FBNET.DW_CONV_SKIP_BN True MODEL.FBNET.DW_CONV_SKIP_RELU True MODEL.RPN.ANCHOR_STRIDE (16,) "
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE 256 MODEL.RPN.PRE_NMS_TOP_N_TRAIN 6000 MODEL.RPN.PRE_NMS_TOP_N_TEST 6000 "
    "MODEL.RPN.POST_NMS_TOP_N_TRAIN 2000 MODEL.RPN.RPN_HEAD FBNet.rpn_head MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 6 "
    "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR FBNet.roi_head MODEL.ROI_BOX_HEAD.NUM_CLASSES 81 "
    'DATASETS.TRAIN ("coco_2014_train","coco_2014_valminusminival") DATASETS.TEST ("coco_2014_minival",) '
    "SOLVER.WARMUP_FACTOR 0.1 SOLVER.WEIGHT_DECAY 0.0001 INPUT.PIXEL_MEAN [103.53,116.28,123.675] "
    "INPUT.PIXEL_STD [57.375,57.12,58.395] "
)
SCHEDULE = "SOLVER.BASE_LR 0.06 SOLVER.STEPS (60000,80000) SOLVER.MAX_ITER 90000 SOLVER.IMS_PER_BATCH 128 "
AT_320 = (
    "MODEL.RPN.ANCHOR_SIZES (16,32,64,128,256) MODEL.RPN.POST_NMS_TOP_N_TEST 100 INPUT.MIN_SIZE_TRAIN (320,) "
    "INPUT.MAX_SIZE_TRAIN 640 INPUT.MIN_SIZE_TEST 320 INPUT.MAX_SIZE_TEST 640 "
)
AT_600 = (
    "MODEL.RPN.ANCHOR_SIZES (32,64,128,256,512) MODEL.RPN.POST_NMS_TOP_N_TEST 200 INPUT.MIN_SIZE_TRAIN (600,) "
    "INPUT.MAX_SIZE_TRAIN 1000 INPUT.MIN_SIZE_TEST 600 INPUT.MAX_SIZE_TEST 1000 "
)
MASK = (
    "MODEL.MASK_ON True MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION 6 MODEL.ROI_MASK_HEAD.RESOLUTION 12 "
    "MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR FBNet.roi_head_mask MODEL.ROI_MASK_HEAD.PREDICTOR MaskRCNNConv1x1Predictor "
    "MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR False "
)
ARCH, REGIONS, LAST = "MODEL.FBNET.ARCH", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "MODEL.FBNET.DET_HEAD_LAST_SCALE"
CONFIGS = {
    "e2e_faster_rcnn_fbnet": f"{SCHEDULE} {AT_320} {ARCH} default {REGIONS} 512",
    "e2e_faster_rcnn_fbnet_600": f"{SCHEDULE} {AT_600} {ARCH} default {REGIONS} 256",
    "e2e_faster_rcnn_fbnet_chamv1a_600": f"{AT_600} {ARCH} cham_v1a {REGIONS} 128 SOLVER.BASE_LR 0.045 "
    "SOLVER.STEPS (90000,120000) SOLVER.MAX_ITER 135000 SOLVER.IMS_PER_BATCH 96",
    "e2e_mask_rcnn_fbnet": f"{SCHEDULE} {AT_320} {MASK} {ARCH} default {REGIONS} 256 {LAST} 0.0",
    "e2e_mask_rcnn_fbnet_600": f"{SCHEDULE} {AT_600} {MASK} {ARCH} default {REGIONS} 256 {LAST} 0.0",
    "e2e_mask_rcnn_fbnet_xirb16d_dsmask": f"{SCHEDULE} {AT_320} {MASK} {ARCH} xirb16d_dsmask {REGIONS} 512 {LAST} -1.0",
    "e2e_mask_rcnn_fbnet_xirb16d_dsmask_600": f"{SCHEDULE} {AT_600} {MASK} {ARCH} xirb16d_dsmask {REGIONS} 256 "
    f"{LAST} 0.0",
}


def config(*overrides, **keys):
    """With MODEL.FBNET.* from the keywords."""
    for key, value in keys.items():
        overrides += (f"MODEL.FBNET.{key}", value if isinstance(value, str) else repr(value))
    return fastrcnn.load_config(None, ["MODEL.BACKBONE.CONV_BODY", "FBNet", "MODEL.DEVICE", "cpu", *overrides])


def stages(name):
    """[(kernel, expansion, channels, stride) of each block] of each stage of TABLE."""
    found = []
    for rows, kernels in zip(*(text.split(" / ") for text in TABLE[name][1:3]), strict=True):
        blocks = []
        for row in rows.split(" + "):
            t, c, n, s = map(int, row.split(","))
            blocks += [(t, c, s if i == 0 else 1) for i in range(n)]
        sizes = [int(k) for part in kernels.split(" + ") for k in [part.split("x")[0]] * int(part.split("x")[1])]
        found.append([(k, *block) for k, block in zip(sizes, blocks, strict=True)])
    return found


def count(blocks, channels):
    """Parameters of blocks, batch norms included, none after depthwise convolutions."""
    total = 0
    for kernel, expansion, out, _ in blocks:
        middle = channels * expansion
        total += channels * middle + 2 * middle + kernel**2 * middle + middle * out + 2 * out
        channels = out
    return total


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", TABLE)
def test_architectures_are_their_tables(name):
    assert set(ARCHITECTURES) == set(TABLE)
    first, parts, table = int(TABLE[name][0]), TABLE[name][3], stages(name)
    trunk = [block for stage in table[:4] for block in stage]
    for divisor in (1, 8):
        cfg = config(ARCH=name, WIDTH_DIVISOR=divisor)
        backbone = build_backbone(cfg).eval()
        assert backbone.out_channels == trunk[-1][2]
        assert size(backbone) == 27 * first + 2 * first + count(trunk, first)
        (found,) = backbone(torch.randn(1, 3, 64, 96))
        assert found.shape == (1, backbone.out_channels, 4, 6)
        for part, stage in parts.items():
            blocks, channels = table[stage], backbone.out_channels
            if part == "rpn":
                head = RPNHead(cfg, channels, 15)
                assert size(head) == count(blocks, channels) + 75 * (blocks[-1][2] + 1)
                assert [[x.shape for x in maps] for maps in head([found])] == [[(1, 15, 4, 6)], [(1, 60, 4, 6)]]
                continue
            head = HEADS[part](cfg, channels).eval()
            assert size(head) == count(blocks, channels)
            assert head.out_channels == blocks[-1][2]
            side = 6 * math.prod(-s if s < 0 else 1 / s for _, _, _, s in blocks)
            assert head(torch.randn(2, channels, 6, 6)).shape == (2, head.out_channels, side, side)


def test_known_numbers_of_parameters():
    """By hand: 864 + 64 of the first layer; 32·32 + 64 + 288 + 512 + 32 of the first block of MobileNetV2."""
    body = build_backbone(config(ARCH="mobilenet_v2")).body
    assert size(body.first) == 928
    assert size(body.stages[0]) == 1920
    # torchvision's, whose first block lacks the first convolution and which has norms after depthwise convolutions
    theirs = size(torchvision.models.mobilenet_v2().features[:14])
    middles = 32 + 96 + 2 * 144 + 3 * 192 + 4 * 384 + 2 * 576
    assert size(body) == theirs - 2 * middles + 32 * 32 + 2 * 32


def converted(state, first):
    """torchvision's names of features.{first} to ours, for the blocks after the stem."""
    new = {}
    for name, value in state.items():
        block, rest = re.fullmatch(r"(\d+)\.conv\.(.*)", name).groups()
        if int(block) < first:
            continue
        table = ["pw.conv", "pw.bn", "dw.conv", "dw.bn", "pwl.conv", "pwl.bn"]
        where = {"0.0": 0, "0.1": 1, "1.0": 2, "1.1": 3, "2": 4, "3": 5}
        if block == "1":  # without the 1×1 convolution at the beginning
            where = {"0.0": 2, "0.1": 3, "1": 4, "2": 5}
        key = next(k for k in sorted(where, key=len, reverse=True) if rest.startswith(f"{k}."))
        new[int(block) - first, f"{table[where[key]]}.{rest.removeprefix(key + '.')}"] = value
    return new


def test_trunk_and_head_equal_torchvisions_mobilenet_v2():
    """With norm and ReLU after depthwise convolutions, ReLU for its ReLU6, and the convolution that its first block
    lacks as identity."""
    theirs = torchvision.models.mobilenet_v2().features[:18]
    for module in theirs.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU())
            if isinstance(child, nn.BatchNorm2d):
                for value in (child.weight, child.bias, child.running_mean, child.running_var):
                    nn.init.uniform_(value, 0.5, 1.5)
    cfg = config(ARCH="mobilenet_v2", DW_CONV_SKIP_BN=False, DW_CONV_SKIP_RELU=False, DET_HEAD_STRIDE=2)
    backbone, head = build_backbone(cfg), HEADS["bbox"](cfg, 96)
    stem = {k: v for k, v in theirs.state_dict().items() if k.startswith("0.")}
    backbone.body.first.load_state_dict({k.replace("0.0.", "conv.").replace("0.1.", "bn."): v for k, v in stem.items()})
    state = {k: v for k, v in theirs.state_dict().items() if k not in stem}
    for chain, first in ((backbone.body.stages, 1), (head.head.blocks, 14)):
        names = [name for name, _ in chain.named_children()]
        found = {f"{names[i]}.{k}": v for (i, k), v in converted(state, first).items() if i < len(names)}
        if first == 1:
            missing, unexpected = chain.load_state_dict(found, strict=False)
            assert not unexpected
            assert all(name.startswith("xif0_0.pw.") for name in missing)
        else:
            chain.load_state_dict(found)
    block = backbone.body.stages.xif0_0.pw
    nn.init.dirac_(block.conv.weight)
    nn.init.constant_(block.bn.weight, math.sqrt(1 + block.bn.eps))
    x = torch.rand(2, 3, 64, 96).double()
    theirs, backbone, head = theirs.double().eval(), backbone.double().eval(), head.double().eval()
    (found,) = backbone(x)
    torch.testing.assert_close(found, theirs[:14](x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(head(found), theirs(x), rtol=1e-9, atol=1e-9)


def plain(state, name, x, stride, expansion, channels):
    """The primitive in functions of PyTorch alone."""

    def norm(y, key):
        mean, var, weight, bias = (state[f"{key}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, mean, var, weight, bias)

    def conv(y, key, stride=1, groups=1):
        weight = state[f"{key}.weight"]
        return F.conv2d(y, weight, None, stride, weight.shape[2] // 2, 1, groups)

    residual = x if stride == 1 and x.shape[1] == channels else 0
    if name == "skip":
        return x if "conv.conv.weight" not in state else norm(conv(x, "conv.conv", stride), "conv.bn").relu()
    if name == "basic_block":
        return norm(conv(norm(conv(x, "0", stride), "1").relu(), "3"), "4") + residual
    if name == "shift_5x5":
        middle = x.shape[1] * expansion
        y = norm(conv(x, "0"), "1").relu()
        padded, moved = F.pad(y, (2, 2, 2, 2)), torch.zeros_like(y)
        for channel in range(middle):
            share, rest = divmod(middle, 25)
            before, after = channel // share, (channel - rest) // share
            dy, dx = divmod(before if before < 12 else max(after, 12), 5)
            moved[:, channel] = padded[:, channel, dy : dy + y.shape[2], dx : dx + y.shape[3]]
        return norm(conv(moved[:, :, ::stride, ::stride], "4"), "5") + residual
    kernel = int(found[1]) if (found := re.search(r"k(\d)", name)) else 3
    cascade = "sep" in name or "k33" in name
    groups = 4 if name == "shuffle" else 1
    if found := re.search(r"_e(\d)", name):
        expansion = int(found[1])
    if found := re.search(r"_s(\d)", name):
        groups = int(found[1])
        expansion = {4: 4, 2: 1}[groups]
    middle = x.shape[1] * expansion
    assert state["pw.conv.weight"].shape == (middle, x.shape[1] // groups, 1, 1)
    y = norm(conv(x, "pw.conv", groups=groups), "pw.bn").relu()
    if groups > 1:
        y = F.channel_shuffle(y, groups)
    if stride < 0:
        y, stride = y.repeat_interleave(-stride, 2).repeat_interleave(-stride, 3), 1
    if cascade:
        y = norm(conv(y, "dw.dw1.conv", stride, middle), "dw.dw1.bn").relu()
        y = conv(y, "dw.dw2.conv", 1, middle)
    elif kernel > 1:
        assert state["dw.conv.weight"].shape == (middle, 1, kernel, kernel)
        y = conv(y, "dw.conv", stride, middle)
    y = norm(conv(y, "pwl.conv", groups=groups), "pwl.bn") + residual
    if name.endswith("_se"):
        mean = y.mean((2, 3), keepdim=True)
        mean = F.conv2d(mean, state["se4.op.1.weight"], state["se4.op.1.bias"]).relu()
        y = y * F.conv2d(mean, state["se4.op.3.weight"], state["se4.op.3.bias"]).sigmoid()
    return y


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitives_are_compositions_of_functions(name):
    assert len(PRIMITIVES) == 39
    style = Style(nn.BatchNorm2d, 1, True, True)
    strides = [1, 2, -2] if PRIMITIVES[name][0] is InvertedResidual else [1, 2]
    for stride, channels in itertools.product(strides, (16, 24)):
        if name == "ir_k1" and stride == 2:
            continue
        block = make_block(name, 16, channels, expansion=5, stride=stride, style=style).double().eval()
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                for value in (module.weight, module.bias, module.running_mean, module.running_var):
                    nn.init.uniform_(value, 0.5, 1.5)
        x = torch.randn(2, 16, 10, 12).double()
        want = plain(block.state_dict(), name, x, stride, 5, channels)
        torch.testing.assert_close(block(x), want, rtol=1e-9, atol=1e-9)
        assert want.shape[2:] == (tuple(s * -stride for s in (10, 12)) if stride < 0 else (10 // stride, 12 // stride))
        assert block(x[:0]).shape == (0, *want.shape[1:])
        if list(block.parameters()):
            block.train()(x).sum().backward()
            assert all(p.grad is not None for p in block.parameters())


def test_rounding():
    got = [round_channels(n, 8) for n in (1, 3, 4, 8, 11, 12, 19, 20, 28, 96)]
    assert got == [8, 8, 8, 8, 8, 16, 16, 24, 32, 96]
    assert [round_channels(n, 1) for n in (1, 7)] == [1, 7] == [round_channels(n, 0) for n in (1, 7)]
    for channels, divisor in itertools.product(range(8, 300), (2, 3, 8, 16)):
        assert round_channels(channels, divisor) == max(math.floor(channels / divisor + 0.5), 1) * divisor
    # 0.6 · (32, 16, 24, 32, 64, 96) = 19, 9, 14, 19, 38, 57; of those, the middle of a block is 6 times its input
    cfg = config(SCALE_FACTOR=0.6, WIDTH_DIVISOR=8)
    body = build_backbone(cfg).body
    assert body.first.conv.out_channels == 16
    outputs = [body.stages.get_submodule(f"xif{stage}_0.pwl.conv").out_channels for stage in range(4)]
    assert outputs == [8, 16, 16, 40]
    assert body.stages[-1].pwl.conv.out_channels == 56
    assert body.stages.xif1_0.pw.conv.out_channels == 48


FIVE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
KPTS = json.dumps({**ARCHITECTURES["default"], "kpts": [6], "last": [64, 0.0]})


def names(block, norms=("pw", "pwl")):
    found = {f"{block}.{part}.conv.weight" for part in ("pw", "dw", "pwl")}
    return found | {f"{block}.{part}.bn.{name}" for part in norms for name in FIVE}


def test_names_of_the_state_dict():
    cfg = config(DET_HEAD_LAST_SCALE=-1.0)
    blocks = [f"{s}_{i}" for s, n in enumerate((1, 2, 3, 7)) for i in range(n)]
    want = {"body.first.conv.weight"} | {f"body.first.bn.{name}" for name in FIVE}
    want |= set().union(*(names(f"body.stages.xif{block}") for block in blocks))
    assert set(build_backbone(cfg).state_dict()) == want
    want = set().union(*(names(f"head.blocks.xif4_{i}") for i in range(4)))
    want |= {"head.last.conv.weight"} | {f"head.last.bn.{name}" for name in FIVE}
    assert set(HEADS["bbox"](cfg, 96).state_dict()) == want
    want = set().union(*(names(f"0.head.xif5_{i}") for i in range(3)))
    want |= {f"1.{layer}.{kind}" for layer in ("cls_logits", "bbox_pred") for kind in ("weight", "bias")}
    assert set(RPNHead(cfg, 96, 15).state_dict()) == want
    cfg = config(DW_CONV_SKIP_BN=False)
    assert names("body.stages.xif0_0", ("pw", "dw", "pwl")) <= set(build_backbone(cfg).state_dict())


def parts(**keys):
    """The parts of a model, random but for their shapes the same each time."""
    torch.manual_seed(3)
    cfg = config("MODEL.GROUP_NORM.NUM_GROUPS", "4", **({"ARCH_DEF": KPTS} | keys))
    backbone = build_backbone(cfg)
    channels = backbone.out_channels
    heads = {"rpn": RPNHead(cfg, channels, 3)} | {name: make(cfg, channels) for name, make in HEADS.items()}
    return nn.ModuleDict({"backbone": backbone, **heads}).eval()


def structure(model):
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    frozen = {name for name, _ in model.named_buffers()}
    rest = [f"{name} {m.extra_repr()} {getattr(m, 'relu', '')}" for name, m in model.named_modules()]
    return shapes, frozen, rest


# key -> (value, parts that change)
EFFECTS = {
    "ARCH": ("xirb16d_dsmask", "backbone rpn bbox mask kpts"),
    "ARCH_DEF": (KPTS.replace("96", "88"), "backbone rpn bbox mask kpts"),
    "BN_TYPE": ("af", "backbone rpn bbox mask kpts"),
    "SCALE_FACTOR": (0.5, "backbone rpn bbox mask kpts"),
    "WIDTH_DIVISOR": (32, "backbone bbox mask kpts"),
    "DW_CONV_SKIP_BN": (False, "backbone rpn bbox mask kpts"),
    "DW_CONV_SKIP_RELU": (False, "backbone rpn bbox mask kpts"),
    "RPN_HEAD_BLOCKS": (1, "rpn"),
    "RPN_BN_TYPE": ("gn", "rpn"),
    **{
        f"{prefix}_HEAD_{key}": (value, part)
        for prefix, part in (("DET", "bbox"), ("MASK", "mask"), ("KPTS", "kpts"))
        for key, value in (("LAST_SCALE", 0.5), ("BLOCKS", (0, 2)), ("STRIDE", 1 if part == "bbox" else 2))
    },
}


def test_every_key_has_an_effect():
    assert set(EFFECTS) == {field.name for field in fields(FBNetConfig)}
    for key, (value, changed) in EFFECTS.items():
        base = {"ARCH_DEF": ""} if key == "ARCH" else {}
        with torch.device("meta"):
            before, after = parts(**base), parts(**base, **{key: value})
        found = [name for name in before if structure(before[name]) != structure(after[name])]
        assert found == changed.split(), key


def test_what_the_head_keys_do():
    def chain(part, **keys):
        head = parts(**keys)[part].head
        return [name for name, _ in head.blocks.named_children()], head

    blocks, head = chain("bbox", DET_HEAD_BLOCKS=(1, 3), DET_HEAD_STRIDE=1)
    assert blocks == ["xif4_1", "xif4_3"]
    assert head(torch.randn(1, 96, 6, 6)).shape == (1, 64, 6, 6)  # the last convolution has what ARCH_DEF says
    scales = {1.5: 96, 0.0: 240, -1.0: 240, -0.5: 120}
    for scale, channels in scales.items():
        head = parts(DET_HEAD_LAST_SCALE=scale)["bbox"]
        assert head.out_channels == channels == head.eval()(torch.randn(1, 96, 6, 6)).shape[1]
        assert isinstance(head.head.last, nn.Identity) == (scale == 0)
    # 64 · 1.25 · 1.5; a scale below 1 leaves it alone
    assert parts(SCALE_FACTOR=1.25, DET_HEAD_LAST_SCALE=1.5)["bbox"].out_channels == 120
    assert parts(SCALE_FACTOR=0.5)["bbox"].out_channels == 64
    # without such channels in the architecture there is none, whatever the factor
    assert HEADS["bbox"](config(DET_HEAD_LAST_SCALE=2.0), 96).out_channels == 240
    rpn = parts(RPN_HEAD_BLOCKS=2)["rpn"]
    assert [name for name, _ in rpn[0].head.named_children()] == ["xif5_1", "xif5_2"]
    # masks' part serves for keypoints where there is no other
    assert structure(HEADS["kpts"](config(), 96)) == structure(HEADS["mask"](config(), 96))
    assert set(HEADS["kpts"](config(ARCH_DEF=json.dumps({**ARCHITECTURES["cham_v2"], "head": [5]})), 56).state_dict())


def test_norms():
    kinds = {
        "bn": fastrcnn.models.layers.BatchNorm2d,
        "gn": nn.GroupNorm,
        "af": fastrcnn.models.layers.FrozenBatchNorm2d,
        "": nn.Identity,
    }
    for name, kind in kinds.items():
        model = parts(BN_TYPE=name)
        assert type(model["backbone"].body.first.bn) is kind
        assert type(model["rpn"][0].head.xif5_0.pw.bn) is kind
        if name == "gn":
            assert model["backbone"].body.first.bn.num_groups == 4
    assert type(parts(BN_TYPE="bn", RPN_BN_TYPE="gn")["rpn"][0].head.xif5_0.pw.bn) is nn.GroupNorm


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ARCH_DEF": "", "ARCH": "fbnet_a"}, r"MODEL\.FBNET\.ARCH is 'fbnet_a'.*cham_v2"),
        ({"ARCH_DEF": "{"}, r"MODEL\.FBNET\.ARCH_DEF is no architecture"),
        ({"ARCH_DEF": '{"block_cfg": {"first": [8, 2]}}'}, "is no architecture: KeyError: 'stages'"),
        ({"ARCH_DEF": KPTS.replace('["ir_k3"], ', "", 1)}, "is no architecture: ValueError"),
        ({"ARCH_DEF": KPTS.replace("ir_k3", "ir_k4", 1)}, "no block 'ir_k4'"),
        ({"ARCH_DEF": KPTS.replace("ir_k3", "ir_k1", 3)}, "takes no stride 2"),
        ({"ARCH_DEF": KPTS.replace("ir_k3", "skip").replace("-2", "-4")}, "skip takes no stride -4"),
        ({"ARCH_DEF": KPTS.replace("ir_k3", "shuffle").replace("[1, 16,", "[1, 18,")}, "block shuffle, 32 to 18"),
        ({"ARCH_DEF": json.dumps({**ARCHITECTURES["default"], "rpn_stride": 8})}, r"ANCHOR_STRIDE is \(16,\).*needs 8"),
        ({"ARCH_DEF": "", "ARCH": "mobilenet_v2"}, "mobilenet_v2 has no part rpn"),
        ({"ARCH_DEF": "", "ARCH": "cham_v2"}, "cham_v2 has no part mask or head"),
        ({"BN_TYPE": "batch"}, r"MODEL\.FBNET\.BN_TYPE is 'batch'"),
        ({"RPN_BN_TYPE": "batch"}, r"MODEL\.FBNET\.RPN_BN_TYPE is 'batch'"),
        ({"RPN_HEAD_BLOCKS": 4}, "RPN_HEAD_BLOCKS is 4 of 3"),
        ({"MASK_HEAD_BLOCKS": (1, 7)}, r"MASK_HEAD_BLOCKS is \(1, 7\); .*\[0, 1, 2, 3, 4\]"),
        ({"DET_HEAD_STRIDE": 4}, "DET_HEAD_STRIDE is 4"),
        ({"BN_TYPE": "gn", "WIDTH_DIVISOR": 5}, r"MODEL\.GROUP_NORM: 30 channels"),
    ],
)
def test_errors_name_the_key(keys, message):
    with pytest.raises(ConfigError, match=message):
        parts(**keys)


def test_a_trunk_without_a_list_is_all_but_the_last_stage():
    definition = json.loads(KPTS)
    del definition["block_cfg"]["backbone"]
    backbone = build_backbone(config(ARCH_DEF=json.dumps(definition)))
    assert [name for name, _ in backbone.body.stages.named_children()][-1] == "xif5_2"


SMALL = (
    "MODEL.DEVICE cpu MODEL.RPN.PRE_NMS_TOP_N_TRAIN 200 MODEL.RPN.POST_NMS_TOP_N_TRAIN 40 "
    "MODEL.RPN.POST_NMS_TOP_N_TEST 20 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 32 MODEL.ROI_HEADS.DETECTIONS_PER_IMG 5"
).split()


def inputs():
    sizes = torch.tensor([[96, 128], [96, 100]], dtype=torch.int32)
    images = fastrcnn.ImageBatch(torch.rand(2, 3, 96, 128), sizes, sizes)
    boxes = torch.tensor([[[10.0, 10, 60, 60], [0, 0, 0, 0]], [[30, 5, 90, 80], [0, 0, 0, 0]]])
    masks = torch.ones(2, 2, 96, 128, dtype=torch.uint8)
    labels = torch.tensor([[3, 0], [1, 0]])
    return images, fastrcnn.TargetBatch(boxes, labels, torch.zeros(2, 2, dtype=torch.bool), masks=masks)


@pytest.mark.parametrize("name", CONFIGS)
def test_recipes_give_what_the_original_files_gave(name, repository):
    ours = "MODEL.CONVENTIONS maskrcnn-benchmark MODEL.BACKBONE.FREEZE_CONV_BODY_AT 0"
    want = fastrcnn.load_config(None, f"{COMMON} {CONFIGS[name]} {ours}".split())
    assert fastrcnn.load_config(name) == want


def test_a_keypoint_model(repository):
    """The part for masks doubles the side of 14, the predictor makes it four times as large."""
    keys = "KEYPOINT_ON True MODEL.ROI_KEYPOINT_HEAD.FEATURE_EXTRACTOR FBNet.roi_head_keypoints "
    keys += "MODEL.ROI_KEYPOINT_HEAD.RESOLUTION 112 MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR False"
    path = "e2e_faster_rcnn_fbnet"
    model = fastrcnn.build_model(fastrcnn.load_config(path, [*SMALL, *f"MODEL.{keys}".split()]))
    images, targets = inputs()
    targets.masks, targets.keypoints = None, torch.full((2, 2, 17, 3), 50.0)
    losses = model.train()(images, targets)
    losses["loss_kp"].backward()
    assert all(p.grad.isfinite().all() for p in model.roi_heads.keypoint.parameters())
    assert model.eval()(images).keypoints.shape == (2, 5, 17, 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_recipes_build(name, repository):
    with torch.device("meta"):
        model = fastrcnn.build_model(fastrcnn.load_config(name))
    stems = ("backbone.body.first", "backbone.body.stages.xif", "rpn.head.0.head.xif", "rpn.head.1.")
    stems += ("roi_heads.box.feature_extractor.head.", "roi_heads.box.predictor.", "roi_heads.mask.")
    assert all(key.startswith(stems) for key, _ in model.named_parameters())


@pytest.mark.parametrize(
    "name", ["e2e_faster_rcnn_fbnet_chamv1a_600", "e2e_mask_rcnn_fbnet", "e2e_mask_rcnn_fbnet_xirb16d_dsmask"]
)
def test_steps_trace_without_values(name, repository):
    """No step between images and detections reads a value back."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    cfg = fastrcnn.load_config(name, SMALL)
    model = fastrcnn.build_model(cfg)
    images, targets = (batch._map(mode.from_tensor) for batch in inputs())
    if not cfg.MODEL.MASK_ON:
        targets.masks = None
    with mode:
        losses = model.train()(images, targets)
        assert all(loss.shape == () for loss in losses.values())
        assert len(losses) == 4 + cfg.MODEL.MASK_ON
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters())
        detections = model.eval()(images)
        assert detections.boxes.shape == (2, 5, 4)
        assert not cfg.MODEL.MASK_ON or detections.masks.shape == (2, 5, 12, 12)


@pytest.mark.parametrize("name", CONFIGS)
def test_recipes_learn(name, repository):
    """A few steps on one batch lower the loss, and every parameter has a part in it."""
    model = fastrcnn.build_model(fastrcnn.load_config(name, SMALL)).train()
    images, targets = inputs()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    totals = []
    for step in range(4):
        torch.manual_seed(1)
        losses = model(images, targets)
        total = sum(losses.values())
        assert total.isfinite()
        totals.append(total.item())
        optimizer.zero_grad()
        total.backward()
        if step == 0:
            assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert totals[-1] < totals[0]
    detections = model.eval()(images)
    assert detections.boxes.isfinite().all()
