"""The tree of keys against maskrcnn-benchmark's, written down here a second time."""

import copy
import pickle

import pytest

from fastrcnn.config.reference import reference
from fastrcnn.config.schema import Config, coerce, leaves, type_name

# maskrcnn_benchmark/config/defaults.py, one line per key
ORIGINAL = """
MODEL.RPN_ONLY False
MODEL.MASK_ON False
MODEL.RETINANET_ON False
MODEL.KEYPOINT_ON False
MODEL.DEVICE "cuda"
MODEL.META_ARCHITECTURE "GeneralizedRCNN"
MODEL.CLS_AGNOSTIC_BBOX_REG False
MODEL.WEIGHT ""
INPUT.MIN_SIZE_TRAIN (800,)
INPUT.MAX_SIZE_TRAIN 1333
INPUT.MIN_SIZE_TEST 800
INPUT.MAX_SIZE_TEST 1333
INPUT.PIXEL_MEAN (102.9801, 115.9465, 122.7717)
INPUT.PIXEL_STD (1., 1., 1.)
INPUT.TO_BGR255 True
INPUT.BRIGHTNESS 0.0
INPUT.CONTRAST 0.0
INPUT.SATURATION 0.0
INPUT.HUE 0.0
INPUT.HORIZONTAL_FLIP_PROB_TRAIN 0.5
INPUT.VERTICAL_FLIP_PROB_TRAIN 0.0
DATASETS.TRAIN ()
DATASETS.TEST ()
DATALOADER.NUM_WORKERS 4
DATALOADER.SIZE_DIVISIBILITY 0
DATALOADER.ASPECT_RATIO_GROUPING True
MODEL.BACKBONE.CONV_BODY "R-50-C4"
MODEL.BACKBONE.FREEZE_CONV_BODY_AT 2
MODEL.FPN.USE_GN False
MODEL.FPN.USE_RELU False
MODEL.GROUP_NORM.DIM_PER_GP -1
MODEL.GROUP_NORM.NUM_GROUPS 32
MODEL.GROUP_NORM.EPSILON 1e-5
MODEL.RPN.USE_FPN False
MODEL.RPN.ANCHOR_SIZES (32, 64, 128, 256, 512)
MODEL.RPN.ANCHOR_STRIDE (16,)
MODEL.RPN.ASPECT_RATIOS (0.5, 1.0, 2.0)
MODEL.RPN.STRADDLE_THRESH 0
MODEL.RPN.FG_IOU_THRESHOLD 0.7
MODEL.RPN.BG_IOU_THRESHOLD 0.3
MODEL.RPN.BATCH_SIZE_PER_IMAGE 256
MODEL.RPN.POSITIVE_FRACTION 0.5
MODEL.RPN.PRE_NMS_TOP_N_TRAIN 12000
MODEL.RPN.PRE_NMS_TOP_N_TEST 6000
MODEL.RPN.POST_NMS_TOP_N_TRAIN 2000
MODEL.RPN.POST_NMS_TOP_N_TEST 1000
MODEL.RPN.NMS_THRESH 0.7
MODEL.RPN.MIN_SIZE 0
MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN 2000
MODEL.RPN.FPN_POST_NMS_TOP_N_TEST 2000
MODEL.RPN.FPN_POST_NMS_PER_BATCH True
MODEL.RPN.RPN_HEAD "SingleConvRPNHead"
MODEL.ROI_HEADS.USE_FPN False
MODEL.ROI_HEADS.FG_IOU_THRESHOLD 0.5
MODEL.ROI_HEADS.BG_IOU_THRESHOLD 0.5
MODEL.ROI_HEADS.BBOX_REG_WEIGHTS (10., 10., 5., 5.)
MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 512
MODEL.ROI_HEADS.POSITIVE_FRACTION 0.25
MODEL.ROI_HEADS.SCORE_THRESH 0.05
MODEL.ROI_HEADS.NMS 0.5
MODEL.ROI_HEADS.DETECTIONS_PER_IMG 100
MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR "ResNet50Conv5ROIFeatureExtractor"
MODEL.ROI_BOX_HEAD.PREDICTOR "FastRCNNPredictor"
MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 14
MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO 0
MODEL.ROI_BOX_HEAD.POOLER_SCALES (1.0 / 16,)
MODEL.ROI_BOX_HEAD.NUM_CLASSES 81
MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 1024
MODEL.ROI_BOX_HEAD.USE_GN False
MODEL.ROI_BOX_HEAD.DILATION 1
MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM 256
MODEL.ROI_BOX_HEAD.NUM_STACKED_CONVS 4
MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR "ResNet50Conv5ROIFeatureExtractor"
MODEL.ROI_MASK_HEAD.PREDICTOR "MaskRCNNC4Predictor"
MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION 14
MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO 0
MODEL.ROI_MASK_HEAD.POOLER_SCALES (1.0 / 16,)
MODEL.ROI_MASK_HEAD.MLP_HEAD_DIM 1024
MODEL.ROI_MASK_HEAD.CONV_LAYERS (256, 256, 256, 256)
MODEL.ROI_MASK_HEAD.RESOLUTION 14
MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR True
MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS False
MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS_THRESHOLD 0.5
MODEL.ROI_MASK_HEAD.DILATION 1
MODEL.ROI_MASK_HEAD.USE_GN False
MODEL.ROI_KEYPOINT_HEAD.FEATURE_EXTRACTOR "KeypointRCNNFeatureExtractor"
MODEL.ROI_KEYPOINT_HEAD.PREDICTOR "KeypointRCNNPredictor"
MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION 14
MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO 0
MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES (1.0 / 16,)
MODEL.ROI_KEYPOINT_HEAD.MLP_HEAD_DIM 1024
MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS (512, 512, 512, 512, 512, 512, 512, 512)
MODEL.ROI_KEYPOINT_HEAD.RESOLUTION 14
MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES 17
MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR True
MODEL.RESNETS.NUM_GROUPS 1
MODEL.RESNETS.WIDTH_PER_GROUP 64
MODEL.RESNETS.STRIDE_IN_1X1 True
MODEL.RESNETS.TRANS_FUNC "BottleneckWithFixedBatchNorm"
MODEL.RESNETS.STEM_FUNC "StemWithFixedBatchNorm"
MODEL.RESNETS.RES5_DILATION 1
MODEL.RESNETS.BACKBONE_OUT_CHANNELS 256 * 4
MODEL.RESNETS.RES2_OUT_CHANNELS 256
MODEL.RESNETS.STEM_OUT_CHANNELS 64
MODEL.RESNETS.STAGE_WITH_DCN (False, False, False, False)
MODEL.RESNETS.WITH_MODULATED_DCN False
MODEL.RESNETS.DEFORMABLE_GROUPS 1
MODEL.RETINANET.NUM_CLASSES 81
MODEL.RETINANET.ANCHOR_SIZES (32, 64, 128, 256, 512)
MODEL.RETINANET.ASPECT_RATIOS (0.5, 1.0, 2.0)
MODEL.RETINANET.ANCHOR_STRIDES (8, 16, 32, 64, 128)
MODEL.RETINANET.STRADDLE_THRESH 0
MODEL.RETINANET.OCTAVE 2.0
MODEL.RETINANET.SCALES_PER_OCTAVE 3
MODEL.RETINANET.USE_C5 True
MODEL.RETINANET.NUM_CONVS 4
MODEL.RETINANET.BBOX_REG_WEIGHT 4.0
MODEL.RETINANET.BBOX_REG_BETA 0.11
MODEL.RETINANET.PRE_NMS_TOP_N 1000
MODEL.RETINANET.FG_IOU_THRESHOLD 0.5
MODEL.RETINANET.BG_IOU_THRESHOLD 0.4
MODEL.RETINANET.LOSS_ALPHA 0.25
MODEL.RETINANET.LOSS_GAMMA 2.0
MODEL.RETINANET.PRIOR_PROB 0.01
MODEL.RETINANET.INFERENCE_TH 0.05
MODEL.RETINANET.NMS_TH 0.4
MODEL.FBNET.ARCH "default"
MODEL.FBNET.ARCH_DEF ""
MODEL.FBNET.BN_TYPE "bn"
MODEL.FBNET.SCALE_FACTOR 1.0
MODEL.FBNET.WIDTH_DIVISOR 1
MODEL.FBNET.DW_CONV_SKIP_BN True
MODEL.FBNET.DW_CONV_SKIP_RELU True
MODEL.FBNET.DET_HEAD_LAST_SCALE 1.0
MODEL.FBNET.DET_HEAD_BLOCKS ()
MODEL.FBNET.DET_HEAD_STRIDE 0
MODEL.FBNET.KPTS_HEAD_LAST_SCALE 0.0
MODEL.FBNET.KPTS_HEAD_BLOCKS ()
MODEL.FBNET.KPTS_HEAD_STRIDE 0
MODEL.FBNET.MASK_HEAD_LAST_SCALE 0.0
MODEL.FBNET.MASK_HEAD_BLOCKS ()
MODEL.FBNET.MASK_HEAD_STRIDE 0
MODEL.FBNET.RPN_HEAD_BLOCKS 0
MODEL.FBNET.RPN_BN_TYPE ""
SOLVER.MAX_ITER 40000
SOLVER.BASE_LR 0.001
SOLVER.BIAS_LR_FACTOR 2
SOLVER.MOMENTUM 0.9
SOLVER.WEIGHT_DECAY 0.0005
SOLVER.WEIGHT_DECAY_BIAS 0
SOLVER.GAMMA 0.1
SOLVER.STEPS (30000,)
SOLVER.WARMUP_FACTOR 1.0 / 3
SOLVER.WARMUP_ITERS 500
SOLVER.WARMUP_METHOD "linear"
SOLVER.CHECKPOINT_PERIOD 2500
SOLVER.TEST_PERIOD 0
SOLVER.IMS_PER_BATCH 16
TEST.EXPECTED_RESULTS ()
TEST.EXPECTED_RESULTS_SIGMA_TOL 4
TEST.IMS_PER_BATCH 8
TEST.DETECTIONS_PER_IMG 100
TEST.BBOX_AUG.ENABLED False
TEST.BBOX_AUG.H_FLIP False
TEST.BBOX_AUG.SCALES ()
TEST.BBOX_AUG.MAX_SIZE 4000
TEST.BBOX_AUG.SCALE_H_FLIP False
OUTPUT_DIR "."
PATHS_CATALOG ""
DTYPE "float32"
AMP_VERBOSE False
"""

# On purpose different: a machine without a GPU works as well, and the catalogue is part of the package.
CHANGED = {"MODEL.DEVICE": "auto", "PATHS_CATALOG": ""}

NEW = {
    "MODEL.CONVENTIONS": "modern",
    "MODEL.IMPORT": (),
    "MODEL.FPN.NORM": "",
    "MODEL.WEIGHT_SKIP_MISMATCH": False,
    "MODEL.RPN.HEAD_CHANNELS": 0,
    "MODEL.RPN.NUM_CONVS": 1,
    "MODEL.RPN.SMOOTH_L1_BETA": 1 / 9,
    "MODEL.RPN.SCORE_THRESH": 0.0,
    "MODEL.RETINANET.NORM": "",
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
    "MODEL.RETINANET.BOX_REG_LOSS": "smooth_l1",
    "MODEL.RETINANET.LOSS_PER_IMAGE": False,
    "MODEL.ROI_HEADS.PRE_NMS_TOP_N": 4096,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 1.0,
    "MODEL.ROI_BOX_HEAD.BOX_REG_LOSS": "smooth_l1",
    "MODEL.ROI_BOX_HEAD.BOX_REG_LOSS_WEIGHT": 1.0,
    "MODEL.ROI_BOX_HEAD.NORM": "",
    "MODEL.ROI_MASK_HEAD.NORM": "",
    "MODEL.ROI_HEADS.SOFT_NMS": "",
    "MODEL.ROI_HEADS.SOFT_NMS_SIGMA": 0.5,
    "MODEL.ROI_HEADS.SOFT_NMS_MIN_SCORE": 0.001,
    "MODEL.CASCADE_ON": False,
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": (0.5, 0.6, 0.7),
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": (
        (10.0, 10.0, 5.0, 5.0),
        (20.0, 20.0, 10.0, 10.0),
        (30.0, 30.0, 15.0, 15.0),
    ),
    "MODEL.RESNETS.FROZEN_BN_EPS": -1.0,
    "INPUT.ANTIALIAS": True,
    "INPUT.LSJ_SIZE": 0,
    "INPUT.LSJ_SCALE": (0.1, 2.0),
    "INPUT.LSJ_MIN_AREA": 1.0,
    "DATASETS.REGISTER": {},
    "DATASETS.JSON_CATEGORY_IDS": False,
    "SOLVER.OPTIMIZER": "SGD",
    "SOLVER.BETAS": (0.9, 0.999),
    "SOLVER.EPSILON": 1e-8,
    "SOLVER.WEIGHT_DECAY_NORM": -1.0,
    "SOLVER.LR_SCHEDULER": "multistep",
    "SOLVER.ACCUMULATE_STEPS": 1,
    "SOLVER.EMA_DECAY": 0.0,
    "SOLVER.CLIP_GRADIENTS": 0.0,
    "SOLVER.LOG_PERIOD": 20,
    "TEST.USE_07_METRIC": False,
    "SEED": -1,
}

DEAD = {
    "MODEL.ROI_MASK_HEAD.MLP_HEAD_DIM",
    "MODEL.ROI_KEYPOINT_HEAD.MLP_HEAD_DIM",
    "MODEL.ROI_HEADS.USE_FPN",
    "AMP_VERBOSE",
}


def test_keys_and_defaults_are_the_originals():
    original = {}
    for line in ORIGINAL.strip().splitlines():
        path, value = line.split(" ", 1)
        original[path] = eval(value)
    assert len(original) == 171
    assert {leaf.path: leaf.default for leaf in leaves(Config())} == {**original, **CHANGED, **NEW}


def test_every_key_has_a_meaning_and_the_dead_ones_are_marked():
    keys = list(leaves(Config()))
    assert all(len(leaf.meaning) > 5 for leaf in keys if not leaf.path.endswith("BBOX_AUG.ENABLED"))
    assert {leaf.path for leaf in keys if leaf.dead} == DEAD


def test_committed_reference_is_the_generated_one(repository):
    text = (repository / "docs" / "config.md").read_text(encoding="utf-8")
    assert text == reference(), "run: python -m fastrcnn.config.reference > docs/config.md"
    assert all(f"| `{leaf.path}` |" in text for leaf in leaves(Config()))


@pytest.mark.parametrize(
    ("kind", "value", "result"),
    [
        (float, 3, 3.0),
        (float, "1e-4", 1e-4),  # what YAML 1.1 gives for 1e-4
        (int, "7", 7),
        (bool, "True", True),
        (str, "7", "7"),
        (tuple[int, ...], [1, 2], (1, 2)),
        (tuple[int, ...], "(480000, 640000)", (480000, 640000)),
        (tuple[float, ...], "[1, 2.5]", (1.0, 2.5)),
        (tuple[float | tuple[float, ...], ...], [[16, 32], 64], ((16.0, 32.0), 64.0)),
        (dict[str, dict[str, str]], "{'a': {'b': 'c'}}", {"a": {"b": "c"}}),
    ],
)
def test_values_are_coerced(kind, value, result):
    got = coerce(value, kind)
    assert got == result
    assert repr(got) == repr(result)  # 3.0, not 3


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, 1.0),
        (int, True),
        (float, False),
        (float, None),
        (bool, 1),
        (bool, "yes"),
        (str, 5),
        (tuple[int, ...], 800),
        (tuple[int, ...], [1, 2.5]),
        (tuple[float, float, float], [1.0, 2.0]),
        (tuple[str, ...], "coco_2014_train"),
        (dict[str, dict[str, str]], {"a": "b"}),
    ],
)
def test_values_of_the_wrong_type_are_refused(kind, value):
    with pytest.raises(TypeError, match=r"wanted .*, got"):
        coerce(value, kind)


def test_type_names():
    assert type_name(tuple[int, ...]) == "tuple of int"
    assert type_name(tuple[float, float, float]) == "tuple of 3 float"
    assert type_name(float | tuple[float, ...]) == "float or tuple of float"


def test_assignment_in_python_is_checked():
    cfg = Config()
    cfg.INPUT.MIN_SIZE_TRAIN = [640, 800]
    cfg.SOLVER.BASE_LR = 1
    assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 800)
    assert isinstance(cfg.SOLVER.BASE_LR, float)
    with pytest.raises(AttributeError, match="SolverConfig has no key 'BASE_LRR'; the nearest is 'BASE_LR'"):
        cfg.SOLVER.BASE_LRR = 0.1
    with pytest.raises(TypeError, match="wanted int, got str 'many'"):
        cfg.SOLVER.MAX_ITER = "many"
    with pytest.raises(TypeError, match="wanted SolverConfig, got float"):
        cfg.SOLVER = 0.1


@pytest.mark.parametrize("duplicate", [Config.clone, copy.deepcopy, lambda cfg: pickle.loads(pickle.dumps(cfg))])
def test_copies_are_equal_and_independent(duplicate):
    cfg = Config()
    cfg.DATASETS.REGISTER = {"a": {"img_dir": "b", "ann_file": "c"}}
    other = duplicate(cfg)
    assert other == cfg
    other.MODEL.RPN.NMS_THRESH = 0.6
    other.DATASETS.REGISTER["a"]["img_dir"] = "d"
    assert cfg.MODEL.RPN.NMS_THRESH == 0.7
    assert cfg.DATASETS.REGISTER["a"]["img_dir"] == "b"
    assert Config().DATASETS.REGISTER == {}
