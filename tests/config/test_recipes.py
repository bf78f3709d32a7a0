"""The recipes: maskrcnn-benchmark's give what its files gave; every one builds, trains and detects."""

import functools
import re

import pytest
import torch
import torchvision
from config.small import CONFIGS, batch, small

import fastrcnn
from fastrcnn.config import load_config
from fastrcnn.config.schema import leaves
from fastrcnn.engine import make_optimizer
from fastrcnn.weights.catalog import CATALOG, resolve
from fastrcnn.weights.torchvision import convert

# what the original files set, key by key, without the dead MODEL.ROI_HEADS.USE_FPN; the parts that many share by name
PARTS = {
    "R-50": "MODEL.WEIGHT catalog://ImageNetPretrained/MSRA/R-50",
    "R-101": "MODEL.WEIGHT catalog://ImageNetPretrained/MSRA/R-101",
    "R-50-FPN": "MODEL.BACKBONE.CONV_BODY R-50-FPN",
    "R-101-FPN": "MODEL.BACKBONE.CONV_BODY R-101-FPN",
    "X-101": "MODEL.WEIGHT catalog://ImageNetPretrained/FAIR/20171220/X-101-32x8d",
    "32x8d": "MODEL.RESNETS.STRIDE_IN_1X1 False MODEL.RESNETS.NUM_GROUPS 32 MODEL.RESNETS.WIDTH_PER_GROUP 8",
    "pyramid": "MODEL.RESNETS.BACKBONE_OUT_CHANNELS 256 MODEL.RPN.USE_FPN True MODEL.RPN.ANCHOR_STRIDE (4,8,16,32,64) "
    "MODEL.RPN.PRE_NMS_TOP_N_TEST 1000 DATALOADER.SIZE_DIVISIBILITY 32",
    "box": "MODEL.RPN.PRE_NMS_TOP_N_TRAIN 2000 MODEL.RPN.POST_NMS_TOP_N_TEST 1000 "
    "MODEL.RPN.FPN_POST_NMS_TOP_N_TEST 1000 MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 7 "
    "MODEL.ROI_BOX_HEAD.POOLER_SCALES (0.25,0.125,0.0625,0.03125) MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO 2 "
    "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR FPN2MLPFeatureExtractor MODEL.ROI_BOX_HEAD.PREDICTOR FPNPredictor",
    "mask": "MODEL.MASK_ON True MODEL.ROI_MASK_HEAD.POOLER_SCALES (0.25,0.125,0.0625,0.03125) "
    "MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR MaskRCNNFPNFeatureExtractor "
    "MODEL.ROI_MASK_HEAD.PREDICTOR MaskRCNNC4Predictor MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION 14 "
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO 2 MODEL.ROI_MASK_HEAD.RESOLUTION 28 "
    "MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR False",
    "mask C4": "MODEL.MASK_ON True MODEL.ROI_MASK_HEAD.PREDICTOR MaskRCNNC4Predictor "
    "MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR True",
    "keypoints": "MODEL.KEYPOINT_ON True MODEL.ROI_BOX_HEAD.NUM_CLASSES 2 "
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES (0.25,0.125,0.0625,0.03125) "
    "MODEL.ROI_KEYPOINT_HEAD.FEATURE_EXTRACTOR KeypointRCNNFeatureExtractor "
    "MODEL.ROI_KEYPOINT_HEAD.PREDICTOR KeypointRCNNPredictor MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION 14 "
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO 2 MODEL.ROI_KEYPOINT_HEAD.RESOLUTION 56 "
    "MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR False INPUT.MIN_SIZE_TRAIN (640,672,704,736,768,800)",
    "people": 'DATASETS.TRAIN ("keypoints_coco_2014_train","keypoints_coco_2014_valminusminival") '
    'DATASETS.TEST ("keypoints_coco_2014_minival",)',
    "proposals C4": "MODEL.RPN.PRE_NMS_TOP_N_TEST 6000 MODEL.RPN.POST_NMS_TOP_N_TEST 1000",
    "rpn C4": "MODEL.RPN_ONLY True MODEL.RPN.PRE_NMS_TOP_N_TEST 12000 MODEL.RPN.POST_NMS_TOP_N_TEST 2000",
    "rpn": "MODEL.RPN_ONLY True MODEL.RPN.POST_NMS_TOP_N_TEST 2000 MODEL.RPN.FPN_POST_NMS_TOP_N_TEST 2000",
    "coco": 'DATASETS.TRAIN ("coco_2014_train","coco_2014_valminusminival")',
    "minival": 'DATASETS.TEST ("coco_2014_minival",)',
    "1x": "SOLVER.BASE_LR 0.02 SOLVER.WEIGHT_DECAY 0.0001 SOLVER.STEPS (60000,80000) SOLVER.MAX_ITER 90000",
    "1x of 8": "SOLVER.BASE_LR 0.01 SOLVER.WEIGHT_DECAY 0.0001 SOLVER.STEPS (120000,160000) SOLVER.MAX_ITER 180000 "
    "SOLVER.IMS_PER_BATCH 8",
    "3x": "SOLVER.BASE_LR 0.02 SOLVER.WEIGHT_DECAY 0.0001 SOLVER.STEPS (210000,250000) SOLVER.MAX_ITER 270000",
    "24k": "SOLVER.BASE_LR 0.01 SOLVER.WEIGHT_DECAY 0.0001 SOLVER.STEPS (18000,) SOLVER.MAX_ITER 24000",
    "quick": "INPUT.MIN_SIZE_TRAIN (600,) INPUT.MAX_SIZE_TRAIN 1000 INPUT.MIN_SIZE_TEST 800 INPUT.MAX_SIZE_TEST 1000 "
    'DATASETS.TRAIN ("coco_2014_minival",) SOLVER.BASE_LR 0.005 SOLVER.WEIGHT_DECAY 0.0001 SOLVER.STEPS (1500,) '
    "SOLVER.MAX_ITER 2000 TEST.IMS_PER_BATCH 2",
    "256 regions": "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 256",
    "2 images": "SOLVER.IMS_PER_BATCH 2",
    "4 images": "SOLVER.IMS_PER_BATCH 4",
    "8 GPUs": "SOLVER.IMS_PER_BATCH 16 TEST.IMS_PER_BATCH 8 INPUT.MIN_SIZE_TRAIN (800,) INPUT.MAX_SIZE_TRAIN 1333 "
    "INPUT.MIN_SIZE_TEST 800 INPUT.MAX_SIZE_TEST 1333",
    "dcn": "MODEL.RESNETS.STAGE_WITH_DCN (False,True,True,True) MODEL.RESNETS.DEFORMABLE_GROUPS 1 "
    "MODEL.RESNETS.WITH_MODULATED_DCN False",
    "modulated": "MODEL.RESNETS.WITH_MODULATED_DCN True",
    "gn": "MODEL.WEIGHT catalog://ImageNetPretrained/MSRA/R-50-GN MODEL.RESNETS.STRIDE_IN_1X1 False "
    "MODEL.RESNETS.TRANS_FUNC BottleneckWithGN MODEL.RESNETS.STEM_FUNC StemWithGN MODEL.FPN.USE_GN True "
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 512 MODEL.ROI_HEADS.POSITIVE_FRACTION 0.25 MODEL.ROI_BOX_HEAD.USE_GN True",
    "gn mask": "MODEL.ROI_MASK_HEAD.USE_GN True MODEL.ROI_MASK_HEAD.CONV_LAYERS (256,256,256,256)",
    "Xconv": "MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM 256 MODEL.ROI_BOX_HEAD.NUM_STACKED_CONVS 4 "
    "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR FPNXconv1fcFeatureExtractor",
    "scratch": "MODEL.BACKBONE.FREEZE_CONV_BODY_AT 0",
    "retinanet": "MODEL.RPN_ONLY True MODEL.RETINANET_ON True MODEL.BACKBONE.CONV_BODY R-50-FPN-RETINANET "
    "MODEL.RPN.FG_IOU_THRESHOLD 0.5 MODEL.RPN.BG_IOU_THRESHOLD 0.4 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 256 "
    "MODEL.RETINANET.SCALES_PER_OCTAVE 3 MODEL.RETINANET.STRADDLE_THRESH -1 MODEL.RETINANET.FG_IOU_THRESHOLD 0.5 "
    "MODEL.RETINANET.BG_IOU_THRESHOLD 0.4 INPUT.MIN_SIZE_TRAIN (800,) INPUT.MAX_SIZE_TRAIN 1333 "
    "INPUT.MIN_SIZE_TEST 800 INPUT.MAX_SIZE_TEST 1333 SOLVER.BASE_LR 0.005 SOLVER.WEIGHT_DECAY 0.0001 "
    "SOLVER.STEPS (120000,160000) SOLVER.MAX_ITER 180000 SOLVER.IMS_PER_BATCH 8",
    "retinanet 101": "MODEL.BACKBONE.CONV_BODY R-101-FPN-RETINANET",
    "P5": "MODEL.RETINANET.USE_C5 False",
    "voc": "MODEL.RPN.ANCHOR_SIZES (128,256,512) MODEL.RPN.PRE_NMS_TOP_N_TEST 6000 MODEL.RPN.POST_NMS_TOP_N_TEST 300 "
    'MODEL.ROI_BOX_HEAD.NUM_CLASSES 21 DATASETS.TRAIN ("voc_2007_train","voc_2007_val") '
    'DATASETS.TEST ("voc_2007_test",) SOLVER.WEIGHT_DECAY 0.0001',
    "cityscapes": "MODEL.ROI_BOX_HEAD.NUM_CLASSES 9 "
    'DATASETS.TRAIN ("cityscapes_fine_instanceonly_seg_train_cocostyle",) '
    'DATASETS.TEST ("cityscapes_fine_instanceonly_seg_val_cocostyle",)',
    # the original's NUM_CLASSES is 9; its dataset has ten classes
    "cityscapes masks": "MODEL.ROI_BOX_HEAD.NUM_CLASSES 11 OUTPUT_DIR runs/cityscapes_mask "
    'DATASETS.TRAIN ("cityscapes_mask_instance_train",) DATASETS.TEST ("cityscapes_mask_instance_val",)',
    "cityscapes polygons": "MODEL.ROI_BOX_HEAD.NUM_CLASSES 11 OUTPUT_DIR runs/cityscapes_poly SOLVER.IMS_PER_BATCH 8 "
    "INPUT.MIN_SIZE_TRAIN (800,832,864,896,928,960,992,1024,1024) INPUT.MAX_SIZE_TRAIN 2048 "
    "INPUT.MIN_SIZE_TEST 1024 INPUT.MAX_SIZE_TEST 2048 "
    'DATASETS.TRAIN ("cityscapes_poly_instance_train",) DATASETS.TEST ("cityscapes_poly_instance_val",)',
    "augmentation": "TEST.BBOX_AUG.ENABLED True TEST.BBOX_AUG.H_FLIP True TEST.BBOX_AUG.MAX_SIZE 2000 "
    "TEST.BBOX_AUG.SCALES (400,500,600,700,900,1000,1100,1200) TEST.BBOX_AUG.SCALE_H_FLIP True",
}
FASTER = "R-50, R-50-FPN, pyramid, box, coco, minival, 1x"
MASK = f"{FASTER}, mask"
X101 = "X-101, R-101-FPN, 32x8d, 1x of 8"
C4 = "R-50, proposals C4, coco, minival, 1x of 8"
RPN = "R-50, R-50-FPN, pyramid, rpn, coco, minival, 1x"
KEYPOINTS = "R-50, R-50-FPN, pyramid, box, keypoints, people, 1x"
RETINANET = "R-50, pyramid, box, coco, minival, retinanet"
QUICK = "minival, quick, 256 regions"
EVALUATED = "pyramid, box, minival"
# name of the file: the parts, the later ones above the earlier, then keys of its own
ORIGINALS = {
    "e2e_faster_rcnn_R_50_C4_1x": C4,
    "e2e_faster_rcnn_R_50_FPN_1x": FASTER,
    "e2e_faster_rcnn_R_101_FPN_1x": f"{FASTER}, R-101, R-101-FPN",
    "e2e_faster_rcnn_X_101_32x8d_FPN_1x": f"{FASTER}, {X101}",
    "e2e_mask_rcnn_R_50_C4_1x": f"{C4}, mask C4",
    "e2e_mask_rcnn_R_50_FPN_1x": MASK,
    "e2e_mask_rcnn_R_50_FPN_1x_periodically_testing": f"{MASK}; SOLVER.TEST_PERIOD 2500",
    "e2e_mask_rcnn_R_101_FPN_1x": f"{MASK}, R-101, R-101-FPN",
    "e2e_mask_rcnn_X_101_32x8d_FPN_1x": f"{MASK}, {X101}",
    "e2e_keypoint_rcnn_R_50_FPN_1x": KEYPOINTS,
    "rpn_R_50_C4_1x": "R-50, rpn C4, coco, minival, 1x",
    "rpn_R_50_FPN_1x": RPN,
    "rpn_R_101_FPN_1x": f"{RPN}, R-101, R-101-FPN",
    "rpn_X_101_32x8d_FPN_1x": f"{RPN}, X-101, R-101-FPN, 32x8d",
    "cityscapes/e2e_faster_rcnn_R_50_FPN_1x_cocostyle": f"{FASTER}, cityscapes, 24k",
    "cityscapes/e2e_mask_rcnn_R_50_FPN_1x_cocostyle": f"{MASK}, cityscapes, 24k",
    "cityscapes/e2e_mask_rcnn_R_50_FPN_1x_binarymask": f"{MASK}, cityscapes masks, 24k",
    "cityscapes/e2e_mask_rcnn_R_50_FPN_1x_poly": f"{MASK}, cityscapes polygons, 24k",
    "dcn/e2e_faster_rcnn_dconv_R_50_FPN_1x": f"{FASTER}, 8 GPUs, dcn",
    "dcn/e2e_faster_rcnn_mdconv_R_50_FPN_1x": f"{FASTER}, 8 GPUs, dcn, modulated",
    "dcn/e2e_mask_rcnn_dconv_R_50_FPN_1x": f"{MASK}, 8 GPUs, dcn",
    "dcn/e2e_mask_rcnn_mdconv_R_50_FPN_1x": f"{MASK}, 8 GPUs, dcn, modulated",
    "gn_baselines/e2e_faster_rcnn_R_50_FPN_1x_gn": f"{FASTER}, 8 GPUs, gn",
    "gn_baselines/e2e_faster_rcnn_R_50_FPN_Xconv1fc_1x_gn": f"{FASTER}, 8 GPUs, gn, Xconv",
    "gn_baselines/e2e_mask_rcnn_R_50_FPN_1x_gn": f"{MASK}, 8 GPUs, gn, gn mask",
    "gn_baselines/e2e_mask_rcnn_R_50_FPN_Xconv1fc_1x_gn": f"{MASK}, 8 GPUs, gn, gn mask, Xconv",
    "gn_baselines/scratch_e2e_faster_rcnn_R_50_FPN_3x_gn": f"{FASTER}, 8 GPUs, gn, scratch, 3x; MODEL.WEIGHT ''",
    "gn_baselines/scratch_e2e_faster_rcnn_R_50_FPN_Xconv1fc_3x_gn": (
        f"{FASTER}, 8 GPUs, gn, Xconv, scratch, 3x; MODEL.WEIGHT ''"
    ),
    "gn_baselines/scratch_e2e_mask_rcnn_R_50_FPN_3x_gn": f"{MASK}, 8 GPUs, gn, gn mask, scratch, 3x; MODEL.WEIGHT ''",
    "gn_baselines/scratch_e2e_mask_rcnn_R_50_FPN_Xconv1fc_3x_gn": (
        f"{MASK}, 8 GPUs, gn, gn mask, Xconv, scratch, 3x; MODEL.WEIGHT ''"
    ),
    "pascal_voc/e2e_faster_rcnn_R_50_C4_1x_1_gpu_voc": (
        "R-50, voc; SOLVER.BASE_LR 0.001 SOLVER.STEPS (50000,) SOLVER.MAX_ITER 70000 SOLVER.IMS_PER_BATCH 1 "
        "TEST.IMS_PER_BATCH 1"
    ),
    "pascal_voc/e2e_faster_rcnn_R_50_C4_1x_4_gpu_voc": (
        "R-50, voc; SOLVER.BASE_LR 0.004 SOLVER.STEPS (12500,) SOLVER.MAX_ITER 17500 SOLVER.IMS_PER_BATCH 4 "
        "TEST.IMS_PER_BATCH 4"
    ),
    "pascal_voc/e2e_mask_rcnn_R_50_FPN_1x_cocostyle": (
        f"{MASK}, 24k; MODEL.ROI_BOX_HEAD.NUM_CLASSES 21 "
        'DATASETS.TRAIN ("voc_2012_train_cocostyle",) DATASETS.TEST ("voc_2012_val_cocostyle",)'
    ),
    "quick_schedules/e2e_faster_rcnn_R_50_C4_quick": f"R-50, proposals C4, {QUICK}, 2 images",
    "quick_schedules/e2e_faster_rcnn_R_50_FPN_quick": f"{FASTER}, {QUICK}, 4 images",
    "quick_schedules/e2e_faster_rcnn_X_101_32x8d_FPN_quick": f"{FASTER}, {X101}, {QUICK}, 2 images",
    "quick_schedules/e2e_mask_rcnn_R_50_C4_quick": f"R-50, proposals C4, mask C4, {QUICK}, 4 images",
    "quick_schedules/e2e_mask_rcnn_R_50_FPN_quick": f"{MASK}, {QUICK}, 4 images",
    "quick_schedules/e2e_mask_rcnn_X_101_32x8d_FPN_quick": f"{MASK}, {X101}, {QUICK}, 2 images",
    "quick_schedules/e2e_keypoint_rcnn_R_50_FPN_quick": (
        f"{KEYPOINTS}, quick, 256 regions, keypoints, 4 images; "
        'DATASETS.TRAIN ("keypoints_coco_2014_minival",) DATASETS.TEST ("keypoints_coco_2014_minival",)'
    ),
    "quick_schedules/rpn_R_50_C4_quick": "R-50, rpn C4, minival, quick, 4 images",
    "quick_schedules/rpn_R_50_FPN_quick": f"{RPN}, quick, 4 images",
    "retinanet/retinanet_R-50-FPN_1x": RETINANET,
    "retinanet/retinanet_R-50-FPN_P5_1x": f"{RETINANET}, P5",
    "retinanet/retinanet_R-101-FPN_1x": f"{RETINANET}, R-101, retinanet 101",
    "retinanet/retinanet_R-101-FPN_P5_1x": f"{RETINANET}, R-101, retinanet 101, P5",
    "retinanet/retinanet_X_101_32x8d_FPN_1x": (
        f"{RETINANET}, X-101, retinanet 101, 32x8d; SOLVER.BASE_LR 0.0025 SOLVER.STEPS (240000,320000) "
        "SOLVER.MAX_ITER 360000 SOLVER.IMS_PER_BATCH 4"
    ),
    "retinanet/retinanet_R-50-FPN_1x_quick": (
        f"{RETINANET}, quick, 4 images; SOLVER.STEPS (3500,) SOLVER.MAX_ITER 4000 TEST.IMS_PER_BATCH 8"
    ),
    "test_time_aug/e2e_mask_rcnn_R_50_FPN_1x": f"{MASK}, augmentation",
}
DETECTRON = {
    "e2e_faster_rcnn_R_50_C4_1x": ("35857197/e2e_faster_rcnn_R-50-C4_1x", "minival"),
    "e2e_faster_rcnn_R_50_FPN_1x": ("35857345/e2e_faster_rcnn_R-50-FPN_1x", f"{EVALUATED}, R-50-FPN"),
    "e2e_faster_rcnn_R_101_FPN_1x": ("35857890/e2e_faster_rcnn_R-101-FPN_1x", f"{EVALUATED}, R-101-FPN"),
    "e2e_faster_rcnn_X_101_32x8d_FPN_1x": (
        "36761737/e2e_faster_rcnn_X-101-32x8d-FPN_1x",
        f"{EVALUATED}, R-101-FPN, 32x8d",
    ),
    "e2e_mask_rcnn_R_50_C4_1x": ("35858791/e2e_mask_rcnn_R-50-C4_1x", "minival, mask C4"),
    "e2e_mask_rcnn_R_50_FPN_1x": ("35858933/e2e_mask_rcnn_R-50-FPN_1x", f"{EVALUATED}, R-50-FPN, mask"),
    "e2e_mask_rcnn_R_101_FPN_1x": ("35861795/e2e_mask_rcnn_R-101-FPN_1x", f"{EVALUATED}, R-101-FPN, mask"),
    "e2e_mask_rcnn_X_101_32x8d_FPN_1x": (
        "36761843/e2e_mask_rcnn_X-101-32x8d-FPN_1x",
        f"{EVALUATED}, R-101-FPN, 32x8d, mask",
    ),
    "e2e_mask_rcnn_X-152-32x8d-FPN-IN5k_1.44x": (
        "37129812/e2e_mask_rcnn_X-152-32x8d-FPN-IN5k_1.44x",
        f"{EVALUATED}, 32x8d, mask; MODEL.BACKBONE.CONV_BODY R-152-FPN",
    ),
    "e2e_keypoint_rcnn_R_50_FPN_1x": ("37697547/e2e_keypoint_rcnn_R-50-FPN_1x", KEYPOINTS),
}
FBNET = (
    *("e2e_faster_rcnn_fbnet", "e2e_faster_rcnn_fbnet_600", "e2e_faster_rcnn_fbnet_chamv1a_600", "e2e_mask_rcnn_fbnet"),
    *("e2e_mask_rcnn_fbnet_600", "e2e_mask_rcnn_fbnet_xirb16d_dsmask", "e2e_mask_rcnn_fbnet_xirb16d_dsmask_600"),
)


def keys(text: str) -> list[str]:
    """KEY VALUE … of parts and own keys."""
    parts, _, own = text.partition(";")
    words = [word for part in parts.split(", ") for word in PARTS[part].split()] + own.split()
    return ["" if word == "''" else word for word in words]


def expected() -> dict[str, list[str]]:
    wanted = {name: [*keys(text), "MODEL.CONVENTIONS", "maskrcnn-benchmark"] for name, text in ORIGINALS.items()}
    for name, (weight, text) in DETECTRON.items():
        own = ["MODEL.CONVENTIONS", "detectron", "MODEL.WEIGHT", f"catalog://Caffe2Detectron/COCO/{weight}"]
        wanted[f"caffe2/{name}_caffe2"] = keys(text) + own
    return wanted


@functools.cache
def recipes() -> list[str]:
    files = [path.relative_to(CONFIGS) for path in sorted(CONFIGS.rglob("*.yaml"))]
    return [str(path.with_suffix("")) for path in files if path.parts[0] != "base"]


def test_all_66_are_there():
    originals = {*expected(), *FBNET}
    assert len(originals) == 66
    assert originals <= set(recipes())


def test_weights_of_the_recipes_are_known():
    names = {load_config(CONFIGS / f"{name}.yaml").MODEL.WEIGHT for name in recipes()}
    assert {name.removeprefix("catalog://") for name in names if name.startswith("catalog://")} <= set(CATALOG)
    assert all(name == "" or resolve(name) for name in names)


@pytest.mark.parametrize("name", expected())
def test_recipe_gives_what_the_original_gave(name):
    """Every key, also those that the original does not set: they have their defaults."""
    cfg = load_config(CONFIGS / f"{name}.yaml")
    wanted = load_config(None, expected()[name])
    if cfg.MODEL.RPN_ONLY and not cfg.MODEL.RETINANET_ON:
        wanted.MODEL.ROI_HEADS = cfg.MODEL.ROI_HEADS  # there are none
    assert {leaf.path: leaf.default for leaf in leaves(cfg)} == {leaf.path: leaf.default for leaf in leaves(wanted)}


@pytest.mark.parametrize("name", recipes())
def test_builds_on_meta(name):
    with torch.device("meta"):
        model = fastrcnn.build_model(load_config(CONFIGS / f"{name}.yaml"))
    assert all(p.is_meta for p in model.parameters())
    make_optimizer(load_config(CONFIGS / f"{name}.yaml"), model)


def steps(name: str) -> None:
    cfg = small(name)
    model = fastrcnn.build_model(cfg)
    images, targets = batch(cfg)
    optimizer = make_optimizer(cfg, model)
    losses = model.train()(images, targets)
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values()), losses
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    optimizer.step()
    boxlists = model.eval()(images).to_boxlists()
    assert len(boxlists) == 2
    for boxlist in boxlists:
        assert boxlist.bbox.isfinite().all()
        assert len(boxlist) <= (50 if cfg.MODEL.RPN_ONLY and not cfg.MODEL.RETINANET_ON else 8)


TORCHVISION = {
    "faster_rcnn_R_50_FPN": "fasterrcnn_resnet50_fpn",
    "faster_rcnn_R_50_FPN_V2": "fasterrcnn_resnet50_fpn_v2",
    "faster_rcnn_MobileNetV3_FPN": "fasterrcnn_mobilenet_v3_large_fpn",
    "faster_rcnn_MobileNetV3_320_FPN": "fasterrcnn_mobilenet_v3_large_320_fpn",
    "mask_rcnn_R_50_FPN": "maskrcnn_resnet50_fpn",
    "mask_rcnn_R_50_FPN_V2": "maskrcnn_resnet50_fpn_v2",
    "keypoint_rcnn_R_50_FPN": "keypointrcnn_resnet50_fpn",
    "retinanet_R_50_FPN": "retinanet_resnet50_fpn",
    "retinanet_R_50_FPN_V2": "retinanet_resnet50_fpn_v2",
}


def test_there_is_a_recipe_for_each_of_torchvisions_detectors():
    assert {f"torchvision/{name}" for name in TORCHVISION} == {n for n in recipes() if n.startswith("torchvision/")}
    theirs = [name for name in torchvision.models.list_models(module=torchvision.models.detection) if "rcnn" in name]
    assert set(theirs) <= set(TORCHVISION.values())


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_weights_fit_their_recipe(name):
    """Every parameter, by name and shape."""
    with torch.device("meta"):
        ours = fastrcnn.build_model(load_config(CONFIGS / "torchvision" / f"{name}.yaml"))
        theirs = torchvision.models.get_model(TORCHVISION[name], weights=None, weights_backbone=None)

    def shapes(state):
        return {k: tuple(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")}

    assert shapes(ours.state_dict()) == shapes(convert(theirs.state_dict()))


def test_model_zoo_names_recipes_that_exist_and_the_published_figures(repository):
    text = (repository / "docs" / "model_zoo.md").read_text(encoding="utf-8")
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    named = re.findall(r"`((?:[a-z]+/)?\w*(?:rcnn|retinanet|quick_start)\w*)`", tables)
    assert len(named) > 30
    assert set(named) <= set(recipes())
    rows = re.findall(r"`torchvision/(\w+)` \| `torchvision://(\w+)` \| ([\d.]+) \| ([\d.]*)", text)
    assert {name: model for name, model, *_ in rows} == TORCHVISION
    for _, model, *figures in rows:
        metrics = torchvision.models.get_model_weights(model).DEFAULT.meta["_metrics"]["COCO-val2017"]
        assert [float(figure) for figure in figures if figure] == list(metrics.values())
    assert set(re.findall(r"`catalog://([^`…]+)`", text)) <= set(CATALOG)
    readme = (repository / "README.md").read_text(encoding="utf-8")
    assert all(figure in readme for figure in re.findall(r"\w+ AP50 [\d.]+", text))


def test_torchvisions_retinanet():
    cfg = load_config(CONFIGS / "torchvision" / "retinanet_R_50_FPN.yaml")
    with torch.device("meta"):
        peer = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
        second = torchvision.models.detection.retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None)
    own = cfg.MODEL.RETINANET
    assert peer.head.classification_head.num_classes == own.NUM_CLASSES  # theirs has a logit of the label 0
    assert (
        peer.nms_thresh,
        peer.score_thresh,
        peer.topk_candidates,
    ) == (own.NMS_TH, own.INFERENCE_TH, own.PRE_NMS_TOP_N)
    assert peer.detections_per_img == cfg.TEST.DETECTIONS_PER_IMG
    assert peer.proposal_matcher.high_threshold == own.FG_IOU_THRESHOLD
    assert peer.proposal_matcher.low_threshold == own.BG_IOU_THRESHOLD
    assert peer.box_coder.weights == own.BBOX_REG_WEIGHTS
    assert (own.BOX_REG_LOSS, own.BBOX_REG_BETA, peer.head.regression_head._loss_type) == ("smooth_l1", 0, "l1")
    sizes = [[int(s * 2 ** (k / 3)) for k in range(own.SCALES_PER_OCTAVE)] for s in own.ANCHOR_SIZES]
    assert sizes == [list(level) for level in peer.anchor_generator.sizes]
    cfg = load_config(CONFIGS / "torchvision" / "retinanet_R_50_FPN_V2.yaml")
    assert cfg.MODEL.RETINANET.BOX_REG_LOSS == second.head.regression_head._loss_type == "giou"


REPRESENTATIVE = (
    "e2e_mask_rcnn_R_50_C4_1x",
    "e2e_keypoint_rcnn_R_50_FPN_1x",
    "rpn_R_50_FPN_1x",
    "e2e_mask_rcnn_fbnet",
    "caffe2/e2e_mask_rcnn_X_101_32x8d_FPN_1x_caffe2",
    "dcn/e2e_faster_rcnn_mdconv_R_50_FPN_1x",
    "gn_baselines/scratch_e2e_mask_rcnn_R_50_FPN_Xconv1fc_3x_gn",
    "retinanet/retinanet_R-50-FPN_P5_1x",
)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_trains_and_detects(name):
    steps(name)


@pytest.mark.nightly
@pytest.mark.parametrize("name", recipes())
def test_every_recipe_trains_and_detects(name):
    steps(name)
