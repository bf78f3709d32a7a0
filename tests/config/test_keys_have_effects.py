"""Every key that is not dead changes something, and a test shows it: one that is named here, or a comparison here."""

import ast
import copy
import functools
import shlex

import pytest
import torch
from config.small import batch, small
from PIL import Image

import fastrcnn
from fastrcnn.config import Config, ConfigError
from fastrcnn.config.schema import leaves
from fastrcnn.data import build_transforms
from fastrcnn.structures import BoxList

# key: another value than that of the recipe, and after ";" keys that must be set in both for it to count
MODELS = {
    "e2e_mask_rcnn_R_50_FPN_1x": """
MODEL.CONVENTIONS modern
MODEL.RPN_ONLY True; MODEL.MASK_ON False
MODEL.MASK_ON False
MODEL.RETINANET_ON True; MODEL.MASK_ON False
MODEL.CASCADE_ON True; MODEL.CLS_AGNOSTIC_BBOX_REG True
MODEL.CLS_AGNOSTIC_BBOX_REG True
MODEL.BACKBONE.CONV_BODY R-18-FPN; MODEL.RESNETS.RES2_OUT_CHANNELS 16
MODEL.BACKBONE.FREEZE_CONV_BODY_AT 0
MODEL.FPN.USE_GN True
MODEL.FPN.NORM BatchNorm
MODEL.FPN.USE_RELU True
MODEL.GROUP_NORM.DIM_PER_GP 8; MODEL.FPN.USE_GN True
MODEL.GROUP_NORM.NUM_GROUPS 2; MODEL.FPN.USE_GN True
MODEL.GROUP_NORM.EPSILON 0.1; MODEL.FPN.USE_GN True
MODEL.RESNETS.NUM_GROUPS 2
MODEL.RESNETS.WIDTH_PER_GROUP 4
MODEL.RESNETS.STRIDE_IN_1X1 False
MODEL.RESNETS.TRANS_FUNC BottleneckWithBatchNorm
MODEL.RESNETS.STEM_FUNC StemWithBatchNorm
MODEL.RESNETS.FROZEN_BN_EPS 0.5
MODEL.RESNETS.RES5_DILATION 2
MODEL.RESNETS.BACKBONE_OUT_CHANNELS 8
MODEL.RESNETS.RES2_OUT_CHANNELS 16
MODEL.RESNETS.STEM_OUT_CHANNELS 4
MODEL.RESNETS.STAGE_WITH_DCN (False,False,False,True)
MODEL.RESNETS.WITH_MODULATED_DCN True; MODEL.RESNETS.STAGE_WITH_DCN (False,False,False,True)
MODEL.RESNETS.DEFORMABLE_GROUPS 2; MODEL.RESNETS.STAGE_WITH_DCN (False,False,False,True)
""",
    "e2e_keypoint_rcnn_R_50_FPN_1x": """
MODEL.KEYPOINT_ON False
MODEL.ROI_KEYPOINT_HEAD.FEATURE_EXTRACTOR none
MODEL.ROI_KEYPOINT_HEAD.PREDICTOR none
MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION 7
MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO 1
MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES (0.125,)
MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS (16,)
MODEL.ROI_KEYPOINT_HEAD.RESOLUTION 28
MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES 5
MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR True
""",
    "retinanet/retinanet_R-50-FPN_1x": """
TEST.DETECTIONS_PER_IMG 3
""",
}

# one image through the transforms and the batching
INPUTS = """
INPUT.MIN_SIZE_TRAIN (80,)
INPUT.MAX_SIZE_TRAIN 120
INPUT.MIN_SIZE_TEST 80
INPUT.MAX_SIZE_TEST 120
INPUT.PIXEL_MEAN (0.0,0.0,0.0)
INPUT.PIXEL_STD (2.0,2.0,2.0)
INPUT.TO_BGR255 False
INPUT.ANTIALIAS False
INPUT.BRIGHTNESS 0.5
INPUT.CONTRAST 0.5
INPUT.SATURATION 0.5
INPUT.HUE 0.5
INPUT.HORIZONTAL_FLIP_PROB_TRAIN 1.0
INPUT.VERTICAL_FLIP_PROB_TRAIN 1.0
INPUT.LSJ_SIZE 64
INPUT.LSJ_SCALE (0.5,0.6); INPUT.LSJ_SIZE 64
DATALOADER.SIZE_DIVISIBILITY 64
"""

# tests of whole sections, in files that name every key or ask the schema for all
SECTIONS = {
    "MODEL.RPN.": "models/test_rpn.py::test_keys_have_an_effect",
    "MODEL.ROI_HEADS.": "models/test_roi_heads_keys.py::test_the_key_has_an_effect",
    "MODEL.ROI_BOX_HEAD.": "models/test_roi_heads_keys.py::test_the_key_has_an_effect",
    "MODEL.ROI_BOX_CASCADE_HEAD.": "models/test_roi_heads_keys.py::test_the_key_has_an_effect",
    "MODEL.ROI_MASK_HEAD.": "models/test_roi_heads_keys.py::test_the_key_has_an_effect",
    "MODEL.RETINANET.": "models/test_retinanet.py::test_keys_have_an_effect",
    "MODEL.FBNET.": "models/test_fbnet.py::test_every_key_has_an_effect",
    "TEST.BBOX_AUG.": "engine/test_tta.py::test_every_key_has_an_effect",
}
# tests of single keys
ELSEWHERE = {
    "MODEL.META_ARCHITECTURE": "models/test_rpn.py::test_unknown_architecture",
    "MODEL.IMPORT": "models/test_registry.py::test_modules_that_cannot_be_imported",
    "MODEL.DEVICE": "engine/test_trainer.py::test_no_gpu_is_one_message",
    "MODEL.WEIGHT": "cli/test_command_line.py::test_mistakes_in_training_end_with_one_message",
    "INPUT.LSJ_MIN_AREA": "data/test_transforms_lsj.py::test_objects_of_which_too_little_remains_are_dropped",
    "DATASETS.TRAIN": "data/test_loader.py::test_several_datasets_are_joined_for_training_and_kept_apart_for_testing",
    "DATASETS.TEST": "data/test_loader.py::test_several_datasets_are_joined_for_training_and_kept_apart_for_testing",
    "DATASETS.JSON_CATEGORY_IDS": "evaluation/test_coco.py::test_labels_may_be_the_ids_of_the_file",
    "DATASETS.REGISTER": "data/test_catalog.py::test_registered_coco_for_training_and_testing",
    "DATALOADER.NUM_WORKERS": "data/test_loader.py::test_workers_change_nothing_and_the_callers_random_numbers_stay",
    "DATALOADER.ASPECT_RATIO_GROUPING": "data/test_loader.py::test_training_batches",
    "SOLVER.MAX_ITER": "engine/test_trainer.py::test_a_longer_schedule_goes_on",
    "SOLVER.OPTIMIZER": "engine/test_solver.py::test_adamw_is_the_textbook_update",
    "SOLVER.BASE_LR": "engine/test_solver.py::test_groups_follow_the_names",
    "SOLVER.BIAS_LR_FACTOR": "engine/test_solver.py::test_groups_follow_the_names",
    "SOLVER.MOMENTUM": "engine/test_solver.py::test_groups_follow_the_names",
    "SOLVER.BETAS": "engine/test_solver.py::test_adamw_is_the_textbook_update",
    "SOLVER.EPSILON": "engine/test_solver.py::test_adamw_is_the_textbook_update",
    "SOLVER.WEIGHT_DECAY": "engine/test_solver.py::test_groups_follow_the_names",
    "SOLVER.WEIGHT_DECAY_BIAS": "engine/test_solver.py::test_adamw_is_the_textbook_update",
    "SOLVER.WEIGHT_DECAY_NORM": "engine/test_solver.py::test_weights_of_norms_have_their_own_decay",
    "SOLVER.LR_SCHEDULER": "engine/test_solver.py::test_cosine_is_torchs",
    "SOLVER.GAMMA": "engine/test_solver.py::test_steps_fall_by_gamma",
    "SOLVER.STEPS": "engine/test_solver.py::test_learning_rate_of_the_1x_schedule",
    "SOLVER.WARMUP_FACTOR": "engine/test_solver.py::test_constant_warmup",
    "SOLVER.WARMUP_ITERS": "engine/test_solver.py::test_cosine_is_torchs",
    "SOLVER.WARMUP_METHOD": "engine/test_solver.py::test_constant_warmup",
    "SOLVER.CLIP_GRADIENTS": "engine/test_trainer.py::test_the_loop_is_plain_sgd",
    "SOLVER.ACCUMULATE_STEPS": "engine/test_trainer.py::test_accumulation_must_divide_the_batch",
    "SOLVER.EMA_DECAY": "engine/test_ema.py::test_average_is_what_is_evaluated_and_saved",
    "SOLVER.CHECKPOINT_PERIOD": "engine/test_trainer.py::test_what_a_run_leaves",
    "SOLVER.LOG_PERIOD": "engine/test_trainer.py::test_loss_that_is_not_finite",
    "SOLVER.TEST_PERIOD": "engine/test_trainer.py::test_what_a_run_leaves",
    "SOLVER.IMS_PER_BATCH": "data/test_loader.py::test_training_batches",
    "TEST.EXPECTED_RESULTS": "engine/test_inference.py::test_weights_are_used_and_the_expected_results_are_checked",
    "TEST.EXPECTED_RESULTS_SIGMA_TOL": "evaluation/test_coco.py::test_expected_results",
    "TEST.USE_07_METRIC": "engine/test_inference.py::test_the_metric_of_voc_2007_is_passed_on",
    "TEST.IMS_PER_BATCH": "data/test_loader.py::test_images_must_divide_among_the_processes",
    "OUTPUT_DIR": "engine/test_trainer.py::test_what_a_run_leaves",
    "PATHS_CATALOG": "data/test_catalog.py::test_catalogue_in_a_python_file_of_the_original_form",
    "DTYPE": "engine/test_trainer.py::test_half_precision_learns_and_resumes",
    "SEED": "data/test_loader.py::test_other_seeds_give_other_orders",
}
HERE = {
    "MODEL.WEIGHT_SKIP_MISMATCH": "test_weights_of_other_classes_may_be_skipped",
}


def rows(text: str) -> dict[str, tuple[str, list[str]]]:
    """Key → its other value, and the keys of both."""
    found = {}
    for line in text.strip().splitlines():
        change, _, also = line.partition(";")
        key, value = change.split()
        found[key] = value, shlex.split(also)
    return found


def assign(cfg: Config, words: list[str]) -> Config:
    cfg = copy.deepcopy(cfg)
    for path, value in zip(words[::2], words[1::2], strict=True):
        *sections, name = path.split(".")
        setattr(functools.reduce(getattr, sections, cfg), name, value)
    return cfg


COMPARED = [(recipe, key) for recipe, text in MODELS.items() for key in rows(text)]


def test_every_key_is_accounted_for():
    """Once, here or by a test elsewhere."""
    shown = [key for _, key in COMPARED] + [*rows(INPUTS), *ELSEWHERE, *HERE]
    living = [leaf.path for leaf in leaves(Config()) if not leaf.dead]
    shown += [key for key in living if key.startswith(tuple(SECTIONS))]
    assert sorted(shown) == sorted(living)


def source(test: str, repository) -> str:
    """The text of the file of a test that is there."""
    file, _, name = test.partition("::")
    text = (repository / "tests" / file).read_text(encoding="utf-8")
    assert name in {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    return text


@pytest.mark.parametrize("test", sorted({*ELSEWHERE.values()}))
def test_named_tests_exist(test, repository):
    assert source(test, repository)


@pytest.mark.parametrize("section", SECTIONS)
def test_tests_of_sections_name_every_key(section, repository):
    text = source(SECTIONS[section], repository)
    if "fields(FBNetConfig)" not in text:
        names = [leaf.path.removeprefix(section) for leaf in leaves(Config()) if leaf.path.startswith(section)]
        dead = {leaf.path.removeprefix(section) for leaf in leaves(Config()) if leaf.dead}
        assert [name for name in names if name not in text and name not in dead] == []


def test_tests_here_exist():
    assert set(HERE.values()) <= set(globals())


def outcome(cfg: Config, words: tuple[str, ...]) -> list[torch.Tensor | str]:
    """All that a model is and does, from the same seeds: its layers and first weights, losses and detections."""
    cfg = assign(cfg, list(words))
    torch.manual_seed(0)
    model = fastrcnn.build_model(cfg)
    seen = [repr(model), str([p.requires_grad for p in model.parameters()]), *model.state_dict().values()]
    seen = copy.deepcopy(seen)
    with torch.no_grad():  # predictions that differ from place to place
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and any(part in name for part in ("cls_", "bbox_pred")):
                parameter.normal_(std=0.2)
    torch.manual_seed(1)
    images, targets = batch(cfg)
    seen += [loss.detach() for loss in model.train()(images, targets).values()]
    for boxlist in model.eval()(images).to_boxlists():
        values = [boxlist.get_field(field) for field in boxlist.fields()]
        seen += [boxlist.bbox, *(getattr(value, "keypoints", value) for value in values)]
    return seen


def same(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(first, second, strict=True)
    )


@functools.cache
def reference(recipe: str, also: tuple[str, ...]) -> list[torch.Tensor | str]:
    return outcome(small(recipe), also)


@pytest.mark.parametrize(("recipe", "key"), COMPARED)
def test_key_changes_the_model_or_what_it_does(recipe, key):
    """Or its value does not fit the others, and an error says so."""
    value, also = rows(MODELS[recipe])[key]
    plain = reference(recipe, tuple(also))
    try:
        changed = outcome(small(recipe), (*also, key, value))
    except ConfigError as error:
        changed = [str(error)]
    assert not same(plain, changed)


@pytest.mark.parametrize("recipe", MODELS)
def test_without_a_change_nothing_changes(recipe):
    """What the comparison of the others rests on."""
    assert same(reference(recipe, ()), outcome(small(recipe), ()))


def seen_images(words: list[str]) -> list[torch.Tensor]:
    cfg = assign(Config(), words)
    pixels = torch.randint(0, 256, (100, 160, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.numpy())
    target = BoxList(torch.tensor([[10.0, 10, 60, 50]]), (160, 100))
    target.add_field("labels", torch.ones(1, dtype=torch.int64))
    tensors = []
    for is_train in (True, False):
        transforms = build_transforms(cfg, is_train)
        for seed in range(4):
            torch.manual_seed(seed)
            changed, boxes = transforms(image, target)
            tensors += [fastrcnn.ImageBatch.from_tensors([changed], [(100, 160)], cfg).pixels, boxes.bbox]
    return tensors


@pytest.mark.parametrize("key", rows(INPUTS))
def test_key_changes_the_images(key):
    value, also = rows(INPUTS)[key]
    base = ["INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96", *also]
    assert same(seen_images(base), seen_images(base))
    assert not same(seen_images(base), seen_images([*base, key, value]))


def test_weights_of_other_classes_may_be_skipped(tmp_path):
    """An error, or first values for what does not fit."""
    cfg = small("e2e_faster_rcnn_R_50_FPN_1x")
    torch.save({"model": fastrcnn.build_model(cfg).state_dict()}, tmp_path / "coco.pth")
    cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES = 3
    model = fastrcnn.build_model(cfg)
    with pytest.raises(ValueError, match="WEIGHT_SKIP_MISMATCH"):
        fastrcnn.weights.load(model, tmp_path / "coco.pth", skip_mismatch=cfg.MODEL.WEIGHT_SKIP_MISMATCH)
    cfg = assign(cfg, ["MODEL.WEIGHT_SKIP_MISMATCH", "True"])
    fastrcnn.weights.load(model, tmp_path / "coco.pth", skip_mismatch=cfg.MODEL.WEIGHT_SKIP_MISMATCH)
