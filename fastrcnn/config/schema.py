"""Every configuration key: its type, its default and what it means.

The tree is maskrcnn-benchmark's (`maskrcnn_benchmark/config/defaults.py`) with a few keys more. `_TRAIN` and `_TEST` at
the end of a name say when the key counts. Numbers of classes include the background, class 0.
"""

import ast
import contextlib
import copy
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self


def key(default: Any, meaning: str, *, dead: bool = False) -> Any:
    """A leaf of the tree. A dead key is accepted, because old files set it, and does nothing."""
    return field(default=default, metadata={"meaning": meaning, "dead": dead})


class Section:
    """A node of the tree. Assigning an unknown key raises AttributeError, a value of the wrong type TypeError."""

    def __setattr__(self, name: str, value: Any) -> None:
        wanted = key_types(type(self)).get(name)
        if wanted is None:
            near = nearest(name, key_types(type(self)))
            raise AttributeError(f"{type(self).__name__} has no key {name!r}; the nearest is {near!r}")
        object.__setattr__(self, name, coerce(value, wanted))

    def clone(self) -> Self:
        return copy.deepcopy(self)


@dataclass
class BackboneConfig(Section):
    """The network that turns pixels into feature maps."""

    CONV_BODY: str = key(
        "R-50-C4",
        "name of the backbone: R-50-FPN, MobileNetV3-Large-FPN, torchvision:swin_t-FPN, timm:convnext_tiny-FPN …",
    )
    FREEZE_CONV_BODY_AT: int = key(
        2,
        "number of parts that do not train, of: stem, layer1 to layer4; in other bodies a part begins where the "
        "resolution falls; 0 = all train, as FBNet always does",
    )


@dataclass
class FPNConfig(Section):
    """Feature pyramid on top of the backbone."""

    USE_GN: bool = key(False, "group norm after each convolution of the pyramid, as NORM GN")
    NORM: str = key("", "norm after each convolution of the pyramid: BatchNorm, SyncBatchNorm, GN; empty = none")
    USE_RELU: bool = key(False, "ReLU after each convolution of the pyramid")


@dataclass
class GroupNormConfig(Section):
    """Group norm, wherever a USE_GN key or a name with GN asks for it."""

    DIM_PER_GP: int = key(-1, "channels per group; −1 = NUM_GROUPS decides")
    NUM_GROUPS: int = key(32, "number of groups; −1 = DIM_PER_GP decides")
    EPSILON: float = key(1e-5, "added to the variance")


@dataclass
class RPNConfig(Section):
    """Region proposal network."""

    USE_FPN: bool = key(False, "one set of anchors per level of a feature pyramid; False allows one ANCHOR_STRIDE only")
    HEAD_CHANNELS: int = key(0, "channels of the head's 3×3 convolutions; 0 = as many as the feature maps have")
    NUM_CONVS: int = key(1, "3×3 convolutions of SingleConvRPNHead")
    ANCHOR_SIZES: tuple[float | tuple[float, ...], ...] = key(
        (32, 64, 128, 256, 512),
        "square root of an anchor's area, pixels; with one stride all sizes are on that level, else one size, "
        "or a tuple of sizes, per level",
    )
    ANCHOR_STRIDE: tuple[int, ...] = key((16,), "pixels between neighbouring anchors, per level")
    ASPECT_RATIOS: tuple[float, ...] = key((0.5, 1.0, 2.0), "height / width of the anchors, used for every size")
    STRADDLE_THRESH: float = key(
        0.0, "anchors that leave the image by more pixels are ignored in training; −1 = all anchors train"
    )
    FG_IOU_THRESHOLD: float = key(0.7, "an anchor is positive from this IoU with a ground-truth box")
    BG_IOU_THRESHOLD: float = key(0.3, "an anchor is negative below this IoU with every ground-truth box")
    BATCH_SIZE_PER_IMAGE: int = key(256, "anchors sampled per image for the loss")
    POSITIVE_FRACTION: float = key(0.5, "largest share of positives among the sampled anchors")
    SMOOTH_L1_BETA: float = key(1 / 9, "where the box loss turns from quadratic to linear, in units of the box deltas")
    PRE_NMS_TOP_N_TRAIN: int = key(12000, "best anchors that go into NMS, per image and level")
    PRE_NMS_TOP_N_TEST: int = key(6000, "best anchors that go into NMS, per image and level")
    POST_NMS_TOP_N_TRAIN: int = key(2000, "proposals kept after NMS, per image and level")
    POST_NMS_TOP_N_TEST: int = key(1000, "proposals kept after NMS, per image and level")
    NMS_THRESH: float = key(0.7, "a proposal is dropped when its IoU with a better one is above this")
    MIN_SIZE: float = key(0.0, "proposals with a shorter side are dropped, pixels of the resized image")
    SCORE_THRESH: float = key(0.0, "proposals of a lower objectness are dropped, 0 to 1")
    FPN_POST_NMS_TOP_N_TRAIN: int = key(
        2000, "proposals kept over all levels of a pyramid: per batch or per image, see FPN_POST_NMS_PER_BATCH"
    )
    FPN_POST_NMS_TOP_N_TEST: int = key(2000, "proposals kept over all levels of a pyramid, per image")
    FPN_POST_NMS_PER_BATCH: bool = key(
        True,
        "in training the best FPN_POST_NMS_TOP_N_TRAIN are taken over the whole batch of a process, not per image; "
        "results then depend on the images per process",
    )
    RPN_HEAD: str = key("SingleConvRPNHead", "name of the head")


@dataclass
class ROIHeadsConfig(Section):
    """What the heads on regions of interest share: matching, sampling and the final detections."""

    USE_FPN: bool = key(False, "the scales of the poolers decide instead", dead=True)
    FG_IOU_THRESHOLD: float = key(0.5, "a proposal is foreground from this IoU with a ground-truth box")
    BG_IOU_THRESHOLD: float = key(0.5, "a proposal is background below this IoU with every ground-truth box")
    BBOX_REG_WEIGHTS: tuple[float, float, float, float] = key(
        (10.0, 10.0, 5.0, 5.0), "factors of the box deltas (dx, dy, dw, dh) that the head learns"
    )
    BATCH_SIZE_PER_IMAGE: int = key(512, "proposals sampled per image for the loss")
    POSITIVE_FRACTION: float = key(0.25, "largest share of foreground among the sampled proposals")
    SCORE_THRESH: float = key(0.05, "detections with a lower score are dropped, 0 to 1")
    PRE_NMS_TOP_N: int = key(4096, "best (box, class) pairs that go into NMS, per image")
    NMS: float = key(0.5, "a detection is dropped when its IoU with a better one of its class is above this")
    SOFT_NMS: Literal["", "linear", "gaussian"] = key(
        "", "overlapped detections lose score by this rule instead of being dropped; empty = NMS"
    )
    SOFT_NMS_SIGMA: float = key(0.5, 'with SOFT_NMS "gaussian": how gently; the factor is exp(−IoU² / sigma)')
    SOFT_NMS_MIN_SCORE: float = key(0.001, "with SOFT_NMS: detections whose score falls below it are dropped")
    DETECTIONS_PER_IMG: int = key(
        100, "detections kept per image by the heads on regions; RetinaNet has TEST.DETECTIONS_PER_IMG"
    )


@dataclass
class BoxHeadConfig(Section):
    """Class and box of each proposal."""

    FEATURE_EXTRACTOR: str = key("ResNet50Conv5ROIFeatureExtractor", "name of the part between pooler and predictor")
    PREDICTOR: str = key("FastRCNNPredictor", "name of the part that gives class logits and box deltas")
    POOLER_RESOLUTION: int = key(14, "side of the pooled features, bins")
    POOLER_SAMPLING_RATIO: int = key(0, "samples per bin and axis; 0 = as many as the bin has pixels, rounded up")
    POOLER_SCALES: tuple[float, ...] = key((1.0 / 16,), "1 / stride of each feature map that is pooled from")
    NUM_CLASSES: int = key(81, "classes including the background")
    MLP_HEAD_DIM: int = key(1024, "width of the fully connected layers")
    SMOOTH_L1_BETA: float = key(1.0, "where the box loss turns from quadratic to linear, in units of the box deltas")
    BOX_REG_LOSS: Literal["smooth_l1", "giou", "diou", "ciou"] = key(
        "smooth_l1", "box loss: of the box deltas, or one of the generalised IoUs of the boxes"
    )
    BOX_REG_LOSS_WEIGHT: float = key(1.0, "factor of the box loss")
    USE_GN: bool = key(False, "group norm in the feature extractor, as NORM GN")
    NORM: str = key("", "norm in the feature extractor: GN, BatchNorm, SyncBatchNorm; empty = none")
    DILATION: int = key(1, "dilation of the convolutions of FPNXconv1fcFeatureExtractor")
    CONV_HEAD_DIM: int = key(256, "channels of the convolutions of FPNXconv1fcFeatureExtractor")
    NUM_STACKED_CONVS: int = key(4, "number of convolutions of FPNXconv1fcFeatureExtractor")


@dataclass
class BoxCascadeHeadConfig(Section):
    """Cascade R-CNN: box heads one after another, each on the boxes of the one before."""

    IOUS: tuple[float, ...] = key((0.5, 0.6, 0.7), "IoU from which a region is foreground, per stage")
    BBOX_REG_WEIGHTS: tuple[tuple[float, float, float, float], ...] = key(
        ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)),
        "factors of the box deltas (dx, dy, dw, dh), per stage",
    )


@dataclass
class MaskHeadConfig(Section):
    """Mask of each detection."""

    FEATURE_EXTRACTOR: str = key("ResNet50Conv5ROIFeatureExtractor", "name of the part between pooler and predictor")
    PREDICTOR: str = key("MaskRCNNC4Predictor", "name of the part that gives mask logits")
    POOLER_RESOLUTION: int = key(14, "side of the pooled features, bins")
    POOLER_SAMPLING_RATIO: int = key(0, "samples per bin and axis; 0 = as many as the bin has pixels, rounded up")
    POOLER_SCALES: tuple[float, ...] = key((1.0 / 16,), "1 / stride of each feature map that is pooled from")
    MLP_HEAD_DIM: int = key(1024, "the head has no fully connected layer", dead=True)
    CONV_LAYERS: tuple[int, ...] = key((256, 256, 256, 256), "channels of each convolution of the feature extractor")
    RESOLUTION: int = key(14, "side of the predicted masks, cells; must be what extractor and predictor give")
    SHARE_BOX_FEATURE_EXTRACTOR: bool = key(True, "use the box head's pooler and feature extractor")
    POSTPROCESS_MASKS: bool = key(False, "detections come with masks of the whole image instead of M × M probabilities")
    POSTPROCESS_MASKS_THRESHOLD: float = key(0.5, "probability from which a pixel belongs to the pasted mask")
    DILATION: int = key(1, "dilation of the convolutions of the feature extractor")
    USE_GN: bool = key(False, "group norm in the feature extractor, as NORM GN")
    NORM: str = key("", "norm in the feature extractor: GN, BatchNorm, SyncBatchNorm; empty = none")


@dataclass
class KeypointHeadConfig(Section):
    """Keypoints of each detection."""

    FEATURE_EXTRACTOR: str = key("KeypointRCNNFeatureExtractor", "name of the part between pooler and predictor")
    PREDICTOR: str = key("KeypointRCNNPredictor", "name of the part that gives one heat map per keypoint")
    POOLER_RESOLUTION: int = key(14, "side of the pooled features, bins")
    POOLER_SAMPLING_RATIO: int = key(0, "samples per bin and axis; 0 = as many as the bin has pixels, rounded up")
    POOLER_SCALES: tuple[float, ...] = key((1.0 / 16,), "1 / stride of each feature map that is pooled from")
    MLP_HEAD_DIM: int = key(1024, "the head has no fully connected layer", dead=True)
    CONV_LAYERS: tuple[int, ...] = key((512,) * 8, "channels of each convolution of the feature extractor")
    RESOLUTION: int = key(14, "side of the heat maps, cells; must be what extractor and predictor give")
    NUM_CLASSES: int = key(17, "keypoints per object")
    SHARE_BOX_FEATURE_EXTRACTOR: bool = key(True, "use the box head's feature extractor")


@dataclass
class ResNetsConfig(Section):
    """ResNet and ResNeXt backbones."""

    NUM_GROUPS: int = key(1, "groups of the 3×3 convolutions; 1 = ResNet, more = ResNeXt")
    WIDTH_PER_GROUP: int = key(64, "channels per group in the first stage")
    STRIDE_IN_1X1: bool = key(True, "a block's stride is in its first 1×1 convolution, not in its 3×3 convolution")
    TRANS_FUNC: str = key(
        "BottleneckWithFixedBatchNorm",
        "name of the block: BottleneckWithFixedBatchNorm, BottleneckWithBatchNorm (trains), "
        "BottleneckWithSyncBatchNorm (trains with the statistics of all processes) or BottleneckWithGN; "
        "the norm counts for the basic blocks of R-18 and R-34 and for bodies of torchvision and timm too",
    )
    STEM_FUNC: str = key(
        "StemWithFixedBatchNorm",
        "name of the stem: StemWithFixedBatchNorm, StemWithBatchNorm, StemWithSyncBatchNorm or StemWithGN",
    )
    FROZEN_BN_EPS: float = key(-1.0, "added to the variance of frozen batch norm; below 0 = as MODEL.CONVENTIONS says")
    RES5_DILATION: int = key(
        1, "dilation of layer4, in the body and in the box head of a C4 model; above 1 it keeps its input's resolution"
    )
    BACKBONE_OUT_CHANNELS: int = key(
        1024, "channels of the maps of a pyramid; 256 in all recipes. C4 and C5 give the channels of their stage"
    )
    RES2_OUT_CHANNELS: int = key(256, "channels after the first stage; each later stage doubles them")
    STEM_OUT_CHANNELS: int = key(64, "channels of the stem")
    STAGE_WITH_DCN: tuple[bool, bool, bool, bool] = key(
        (False, False, False, False), "deformable 3×3 convolutions, per stage"
    )
    WITH_MODULATED_DCN: bool = key(False, "deformable convolutions of version 2, with a mask")
    DEFORMABLE_GROUPS: int = key(1, "groups of channels with their own offsets in deformable convolutions")


@dataclass
class RetinaNetConfig(Section):
    """RetinaNet: detection straight from the pyramid, without proposals."""

    NUM_CLASSES: int = key(81, "classes including the background")
    ANCHOR_SIZES: tuple[float, ...] = key(
        (32, 64, 128, 256, 512), "square root of the smallest anchor's area, pixels, per level"
    )
    ASPECT_RATIOS: tuple[float, ...] = key((0.5, 1.0, 2.0), "height / width of the anchors, used for every size")
    ANCHOR_STRIDES: tuple[int, ...] = key((8, 16, 32, 64, 128), "pixels between neighbouring anchors, per level")
    STRADDLE_THRESH: float = key(
        0.0, "anchors that leave the image by more pixels are ignored in training; −1 = all anchors train"
    )
    OCTAVE: float = key(2.0, "ratio of the anchor sizes of neighbouring levels")
    SCALES_PER_OCTAVE: int = key(3, "anchor sizes per level")
    USE_C5: bool = key(True, "level P6 is made of C5, not of P5")
    NUM_CONVS: int = key(4, "convolutions of each of the two towers")
    NORM: str = key("", "norm after each convolution of the towers: BatchNorm, SyncBatchNorm, GN; empty = none")
    BBOX_REG_WEIGHT: float = key(4.0, "the box loss is divided by this times the number of positive anchors")
    BBOX_REG_WEIGHTS: tuple[float, float, float, float] = key(
        (10.0, 10.0, 5.0, 5.0), "factors of the box deltas (dx, dy, dw, dh) that the head learns"
    )
    BBOX_REG_BETA: float = key(
        0.11, "where the smooth_l1 box loss turns from quadratic to linear, in units of the box deltas"
    )
    BOX_REG_LOSS: Literal["smooth_l1", "giou", "diou", "ciou"] = key(
        "smooth_l1", "box loss: of the box deltas, or 1 − an IoU of the boxes"
    )
    LOSS_PER_IMAGE: bool = key(
        False,
        "the losses of each image are divided by its positive anchors and averaged; else those of a process's batch by "
        "its positive anchors, the class loss by these and the images",
    )
    PRE_NMS_TOP_N: int = key(1000, "best (anchor, class) pairs that go into NMS, per image and level")
    FG_IOU_THRESHOLD: float = key(0.5, "an anchor is positive from this IoU with a ground-truth box")
    BG_IOU_THRESHOLD: float = key(0.4, "an anchor is negative below this IoU with every ground-truth box")
    LOSS_ALPHA: float = key(0.25, "weight of the positives in the focal loss")
    LOSS_GAMMA: float = key(2.0, "exponent of the focal loss")
    PRIOR_PROB: float = key(0.01, "score of every class before training")
    INFERENCE_TH: float = key(0.05, "scores below this are dropped before NMS, 0 to 1")
    NMS_TH: float = key(0.4, "a detection is dropped when its IoU with a better one of its class is above this")


@dataclass
class FBNetConfig(Section):
    """FBNet: small mobile backbones and heads."""

    ARCH: str = key("default", "architecture: default, xirb16d_dsmask, mobilenet_v2, cham_v1a or cham_v2")
    ARCH_DEF: str = key("", "an architecture as JSON text, instead of ARCH")
    BN_TYPE: str = key("bn", "norm: bn (trains), af (frozen), gn or empty for none")
    SCALE_FACTOR: float = key(1.0, "factor of all numbers of channels")
    WIDTH_DIVISOR: int = key(1, "numbers of channels are rounded to multiples of this")
    DW_CONV_SKIP_BN: bool = key(True, "no norm after depthwise convolutions")
    DW_CONV_SKIP_RELU: bool = key(True, "no ReLU after depthwise convolutions")
    DET_HEAD_LAST_SCALE: float = key(
        1.0,
        "channels of the box head's last convolution: factor of what ARCH says, or, below 0, of those before it; "
        "−1 = as many, 0 = no such convolution",
    )
    DET_HEAD_BLOCKS: tuple[Any, ...] = key((), "blocks of the architecture for the box head; empty = as ARCH says")
    DET_HEAD_STRIDE: int = key(0, "stride of the box head's first block; 0 = as ARCH says")
    KPTS_HEAD_LAST_SCALE: float = key(0.0, "as DET_HEAD_LAST_SCALE, keypoint head")
    KPTS_HEAD_BLOCKS: tuple[Any, ...] = key((), "as DET_HEAD_BLOCKS, keypoint head")
    KPTS_HEAD_STRIDE: int = key(0, "as DET_HEAD_STRIDE, keypoint head")
    MASK_HEAD_LAST_SCALE: float = key(0.0, "as DET_HEAD_LAST_SCALE, mask head")
    MASK_HEAD_BLOCKS: tuple[Any, ...] = key((), "as DET_HEAD_BLOCKS, mask head")
    MASK_HEAD_STRIDE: int = key(0, "as DET_HEAD_STRIDE, mask head")
    RPN_HEAD_BLOCKS: int = key(0, "number of blocks of the RPN head; 0 = as ARCH says")
    RPN_BN_TYPE: str = key("", "norm of the RPN head; empty = BN_TYPE")


@dataclass
class ModelConfig(Section):
    """What is built, where it runs and from which weights it starts."""

    META_ARCHITECTURE: str = key("GeneralizedRCNN", "name of the whole model's class")
    CONVENTIONS: Literal["modern", "torchvision", "maskrcnn-benchmark", "detectron"] = key(
        "modern",
        "geometry (anchors, pooling, frozen batch norm, pasting); that of the weights, where they tell it, wins",
    )
    IMPORT: tuple[str, ...] = key((), "Python modules imported before building, which register parts of your own")
    DEVICE: str = key("auto", "cuda, cuda:1, cpu …; auto = cuda where there is one, else cpu")
    WEIGHT: str = key("", "weights to start from: a file, an address or a name (docs/weights.md); empty = random")
    WEIGHT_SKIP_MISMATCH: bool = key(
        False, "leave parameters of another shape at their first values, instead of an error (new classes)"
    )
    RPN_ONLY: bool = key(False, "proposals only, no heads on regions")
    MASK_ON: bool = key(False, "with the mask head")
    RETINANET_ON: bool = key(False, "RetinaNet instead of proposals")
    KEYPOINT_ON: bool = key(False, "with the keypoint head")
    CASCADE_ON: bool = key(False, "a cascade of box heads, see ROI_BOX_CASCADE_HEAD")
    CLS_AGNOSTIC_BBOX_REG: bool = key(False, "one box per proposal for all classes, not one per class")
    BACKBONE: BackboneConfig = field(default_factory=BackboneConfig)
    FPN: FPNConfig = field(default_factory=FPNConfig)
    GROUP_NORM: GroupNormConfig = field(default_factory=GroupNormConfig)
    RPN: RPNConfig = field(default_factory=RPNConfig)
    ROI_HEADS: ROIHeadsConfig = field(default_factory=ROIHeadsConfig)
    ROI_BOX_HEAD: BoxHeadConfig = field(default_factory=BoxHeadConfig)
    ROI_BOX_CASCADE_HEAD: BoxCascadeHeadConfig = field(default_factory=BoxCascadeHeadConfig)
    ROI_MASK_HEAD: MaskHeadConfig = field(default_factory=MaskHeadConfig)
    ROI_KEYPOINT_HEAD: KeypointHeadConfig = field(default_factory=KeypointHeadConfig)
    RESNETS: ResNetsConfig = field(default_factory=ResNetsConfig)
    RETINANET: RetinaNetConfig = field(default_factory=RetinaNetConfig)
    FBNET: FBNetConfig = field(default_factory=FBNetConfig)


@dataclass
class InputConfig(Section):
    """From an image file to the model's input."""

    MIN_SIZE_TRAIN: tuple[int, ...] = key(
        (800,), "shorter side after resizing, pixels; one of the values is drawn for each image"
    )
    MAX_SIZE_TRAIN: int = key(1333, "longest side after resizing, pixels")
    MIN_SIZE_TEST: int = key(800, "shorter side after resizing, pixels")
    MAX_SIZE_TEST: int = key(1333, "longest side after resizing, pixels")
    PIXEL_MEAN: tuple[float, float, float] = key(
        (102.9801, 115.9465, 122.7717), "subtracted from each channel, in the order and scale of TO_BGR255"
    )
    PIXEL_STD: tuple[float, float, float] = key((1.0, 1.0, 1.0), "then each channel is divided by this")
    TO_BGR255: bool = key(True, "the model sees BGR, 0 to 255; else RGB, 0 to 1")
    ANTIALIAS: bool = key(True, "images are shrunk with antialiasing; False = plain bilinear, as torchvision does")
    BRIGHTNESS: float = key(0.0, "largest relative change of brightness in training")
    CONTRAST: float = key(0.0, "largest relative change of contrast in training")
    SATURATION: float = key(0.0, "largest relative change of saturation in training")
    HUE: float = key(0.0, "largest turn of the hue in training, in whole turns, 0 to 0.5")
    HORIZONTAL_FLIP_PROB_TRAIN: float = key(0.5, "probability that left and right are swapped")
    VERTICAL_FLIP_PROB_TRAIN: float = key(0.0, "probability that top and bottom are swapped")
    LSJ_SIZE: int = key(
        0,
        "side of the window of large-scale jitter in training, pixels, in the place of MIN_SIZE_TRAIN and "
        "MAX_SIZE_TRAIN; 0 = none. DATALOADER.SIZE_DIVISIBILITY of the same value pads every batch to that square",
    )
    LSJ_SCALE: tuple[float, float] = key(
        (0.1, 2.0), "least and largest side of the square that the image just fits into, relative to LSJ_SIZE"
    )
    LSJ_MIN_AREA: float = key(1.0, "objects of which less remains in the window are dropped, square pixels")


@dataclass
class DatasetsConfig(Section):
    """Which data."""

    TRAIN: tuple[str, ...] = key((), "names of the datasets to train on, one after another")
    TEST: tuple[str, ...] = key((), "names of the datasets to evaluate on, each by itself")
    JSON_CATEGORY_IDS: bool = key(
        False, "labels are the category ids of COCO's files, as in torchvision's models, not 1, 2, 3 …"
    )
    REGISTER: dict[str, dict[str, Any]] = field(
        default_factory=dict,
        metadata={
            "meaning": "your own datasets: name → {img_dir, ann_file} for COCO's layout, {data_dir, split, classes} "
            "for PASCAL VOC's, {factory: 'module:Class', args} for your own class; adds to the names of _BASE_",
            "dead": False,
        },
    )


@dataclass
class DataLoaderConfig(Section):
    """How batches are made."""

    NUM_WORKERS: int = key(4, "processes that load images, per training process; 0 = none")
    SIZE_DIVISIBILITY: int = key(
        0, "batches are padded to a multiple of this, pixels; 32 for a pyramid, 0 = no rounding"
    )
    ASPECT_RATIO_GROUPING: bool = key(True, "wide and tall images go into different batches, which saves padding")


@dataclass
class SolverConfig(Section):
    """Training."""

    MAX_ITER: int = key(40000, "iterations of the whole training")
    OPTIMIZER: Literal["SGD", "AdamW"] = key("SGD", "how gradients become steps")
    BASE_LR: float = key(0.001, "learning rate after warm-up, for IMS_PER_BATCH images")
    BIAS_LR_FACTOR: float = key(2.0, "factor of the learning rate for biases")
    MOMENTUM: float = key(0.9, "momentum of SGD")
    BETAS: tuple[float, float] = key((0.9, 0.999), "AdamW: decay of the means of the gradient and of its square")
    EPSILON: float = key(1e-8, "AdamW: added to the root of the mean square")
    WEIGHT_DECAY: float = key(0.0005, "weight decay of everything but biases; AdamW's is decoupled from the gradient")
    WEIGHT_DECAY_BIAS: float = key(0.0, "weight decay of biases")
    WEIGHT_DECAY_NORM: float = key(-1.0, "weight decay of the weights of norms; below 0 = WEIGHT_DECAY")
    LR_SCHEDULER: Literal["multistep", "cosine"] = key(
        "multistep", "how the learning rate falls: by GAMMA at each of STEPS, or as half a cosine to 0 at MAX_ITER"
    )
    GAMMA: float = key(0.1, "multistep: factor of the learning rate at each of STEPS")
    STEPS: tuple[int, ...] = key((30000,), "multistep: iterations at which the learning rate falls, in rising order")
    WARMUP_FACTOR: float = key(1.0 / 3, "share of the learning rate at the first iteration")
    WARMUP_ITERS: int = key(500, "iterations of warm-up")
    WARMUP_METHOD: Literal["linear", "constant"] = key(
        "linear", "how the learning rate goes from the share to the whole"
    )
    CLIP_GRADIENTS: float = key(0.0, "largest norm of the gradient of all parameters; 0 = no limit")
    ACCUMULATE_STEPS: int = key(
        1,
        "parts into which the images of an iteration are divided, one after another through the model, to save memory; "
        "must divide the images of a process",
    )
    EMA_DECAY: float = key(
        0.0,
        "exponential moving average of the weights, which is then evaluated and saved as the model: how much of it "
        "stays at each iteration, such as 0.9998; 0 = none",
    )
    CHECKPOINT_PERIOD: int = key(2500, "iterations between checkpoints")
    LOG_PERIOD: int = key(20, "iterations between lines of the log")
    TEST_PERIOD: int = key(
        0, "iterations between evaluations during training, with the losses on DATASETS.TEST; 0 = only at the end"
    )
    IMS_PER_BATCH: int = key(16, "images per iteration over all processes; must divide by their number")


@dataclass
class BBoxAugConfig(Section):
    """Test-time augmentation: each image several times, the boxes merged."""

    ENABLED: bool = key(False, "use it")
    H_FLIP: bool = key(False, "also the mirrored image")
    SCALES: tuple[int, ...] = key((), "also these shorter sides, pixels")
    MAX_SIZE: int = key(4000, "longest side at these scales, pixels")
    SCALE_H_FLIP: bool = key(False, "also the mirrored image at each scale")


@dataclass
class TestConfig(Section):
    """Evaluation."""

    EXPECTED_RESULTS: tuple[Any, ...] = key(
        (), "results to check, each (task, metric, (mean, standard deviation)), such as (bbox, AP, (36.8, 0.2))"
    )
    EXPECTED_RESULTS_SIGMA_TOL: float = key(4.0, "allowed distance from the mean, standard deviations")
    USE_07_METRIC: bool = key(
        False, "PASCAL VOC's 11-point average precision, as for VOC 2007, rather than the area under the curve"
    )
    IMS_PER_BATCH: int = key(8, "images per batch over all processes; must divide by their number")
    DETECTIONS_PER_IMG: int = key(
        100, "detections kept per image by RetinaNet; the heads on regions have MODEL.ROI_HEADS.DETECTIONS_PER_IMG"
    )
    BBOX_AUG: BBoxAugConfig = field(default_factory=BBoxAugConfig)


@dataclass
class Config(Section):
    """The whole tree."""

    MODEL: ModelConfig = field(default_factory=ModelConfig)
    INPUT: InputConfig = field(default_factory=InputConfig)
    DATASETS: DatasetsConfig = field(default_factory=DatasetsConfig)
    DATALOADER: DataLoaderConfig = field(default_factory=DataLoaderConfig)
    SOLVER: SolverConfig = field(default_factory=SolverConfig)
    TEST: TestConfig = field(default_factory=TestConfig)
    OUTPUT_DIR: str = key(".", "folder of everything that a run writes")
    PATHS_CATALOG: str = key(
        "", "file that names your datasets: YAML entries, or Python with a DatasetCatalog; empty = none"
    )
    DTYPE: Literal["float32", "float16", "bfloat16"] = key(
        "float32", "type of the matrix products and convolutions; parameters and losses stay float32"
    )
    SEED: int = key(-1, "seed of every random number; −1 = from the clock")
    AMP_VERBOSE: bool = key(False, "there is no apex to be verbose", dead=True)

    # maskrcnn-benchmark's way, on its global `cfg`; the floor above reads files, hence the imports
    def merge_from_file(self, path: str | Path) -> None:
        """Reads a YAML file or recipe over what is set. Raises ConfigError."""
        from fastrcnn.config.loading import merge_file

        merge_file(self, path)

    def merge_from_list(self, overrides: Sequence[Any]) -> None:
        """Sets the keys of a flat list KEY VALUE KEY VALUE … . Raises ConfigError."""
        from fastrcnn.config.loading import merge_overrides

        merge_overrides(self, overrides)


@dataclass(frozen=True)
class Leaf:
    """One key of the tree: where it is, and what it is."""

    path: str
    type: Any
    default: Any
    meaning: str
    dead: bool


def leaves(node: Section, prefix: str = "") -> Iterator[Leaf]:
    """All keys below `node`, in the order of the tree; `default` is the value that `node` holds."""
    for f in fields(node):
        value = getattr(node, f.name)
        if isinstance(value, Section):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            kind = key_types(type(node))[f.name]
            yield Leaf(prefix + f.name, kind, value, f.metadata["meaning"], f.metadata["dead"])


@functools.cache
def key_types(cls: type[Section]) -> dict[str, Any]:
    """Name → type of the keys and sections directly in `cls`."""
    return typing.get_type_hints(cls)


def nearest(name: str, names: Iterable[str]) -> str:
    upper = {known.upper(): known for known in names}
    return upper[difflib.get_close_matches(name.upper(), upper, n=1, cutoff=0.0)[0]]


def type_name(kind: Any) -> str:
    """The type as people write it: `tuple of int`, `tuple of 3 float`, `"linear" or "constant"`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return "anything"
    if origin is Literal:
        return " or ".join(f'"{a}"' for a in args)
    if origin is types.UnionType:
        return " or ".join(map(type_name, args))
    if origin is tuple:
        inner = type_name(args[0])
        count = "" if args[-1] is ... else f"{len(args)} "
        return f"tuple of {count}({inner})" if " or " in inner else f"tuple of {count}{inner}"
    if origin is dict:
        return f"mapping of {type_name(args[0])} to {type_name(args[1])}"
    return kind.__name__


def coerce(value: Any, kind: Any) -> Any:
    """`value` as `kind`: lists become tuples, int becomes float, text is a Python literal where text is not wanted.

    Raises TypeError, which says what is wanted and what came.
    """
    try:
        return _convert(value, kind)
    except TypeError:
        if isinstance(value, str):
            with contextlib.suppress(TypeError, ValueError, SyntaxError):  # of a text that is no literal
                return _convert(ast.literal_eval(value.strip()), kind)
        raise TypeError(f"wanted {type_name(kind)}, got {type(value).__name__} {value!r}") from None


def _convert(value: Any, kind: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return tuple(_convert(v, Any) for v in value) if isinstance(value, (list, tuple)) else value
    if origin is Literal and value in args:
        return value
    if origin is types.UnionType:
        for choice in args:
            with contextlib.suppress(TypeError):
                return coerce(value, choice)
    if origin is tuple and isinstance(value, (list, tuple)):
        if args[-1] is ...:
            return tuple(coerce(v, args[0]) for v in value)
        if len(args) == len(value):
            return tuple(coerce(v, a) for v, a in zip(value, args, strict=True))
    if origin is dict and isinstance(value, dict):
        return {coerce(k, args[0]): coerce(v, args[1]) for k, v in value.items()}
    if origin is None and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise TypeError
