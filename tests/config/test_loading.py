"""Files, overrides, their errors, and the recipes."""

import warnings

import pytest
import torch
import torchvision

from fastrcnn.config import Config, ConfigError, dump_config, find_config, load_config, loading
from fastrcnn.config.loading import RECIPES
from fastrcnn.config.schema import leaves


@pytest.fixture(autouse=True)
def _no_warning_yet(monkeypatch):
    monkeypatch.setattr(loading, "_warned", set())


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "a.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


# The original's style: quotes, tuples as text, a section of comments only, a dead key, a value on its own line.
ORIGINAL_STYLE = """
MODEL:
  META_ARCHITECTURE: "GeneralizedRCNN"
  WEIGHT: "catalog://ImageNetPretrained/MSRA/R-50"
  RETINANET_ON: True
  BACKBONE:
    CONV_BODY: "R-50-FPN-RETINANET"
  FBNET:
    DET_HEAD_BLOCKS: []
  RPN:
    ANCHOR_STRIDE: (4, 8, 16, 32, 64)
    RPN_HEAD: FBNet.rpn_head
  ROI_HEADS:
    USE_FPN: True
  ROI_BOX_HEAD:
    POOLER_SCALES: (0.25, 0.125, 0.0625, 0.03125)
  RETINANET:
    STRADDLE_THRESH: -1
    FG_IOU_THRESHOLD: 0.5
DATASETS:
  TRAIN: ("coco_2014_train", "coco_2014_valminusminival")
  TEST: ("coco_2014_minival",)
INPUT:
  MIN_SIZE_TRAIN: (320, )
  PIXEL_MEAN: [103.53, 116.28, 123.675]
SOLVER:
  BASE_LR: 0.02
  WEIGHT_DECAY: 1e-4
  STEPS: (60000, 80000)
  IMS_PER_BATCH: 128  # for 8GPUs
TEST:
  # IMS_PER_BATCH: 8
OUTPUT_DIR:
  "runs/original"
"""


def test_original_file_loads_unchanged(write):
    with pytest.warns(UserWarning, match=r"do nothing.*: MODEL\.ROI_HEADS\.USE_FPN$"):
        cfg = load_config(write(ORIGINAL_STYLE))
    assert cfg.MODEL.WEIGHT == "catalog://ImageNetPretrained/MSRA/R-50"
    assert cfg.MODEL.RPN.ANCHOR_STRIDE == (4, 8, 16, 32, 64)
    assert cfg.MODEL.ROI_BOX_HEAD.POOLER_SCALES == (0.25, 0.125, 0.0625, 0.03125)
    assert cfg.MODEL.RETINANET.STRADDLE_THRESH == -1
    assert cfg.DATASETS.TRAIN == ("coco_2014_train", "coco_2014_valminusminival")
    assert cfg.DATASETS.TEST == ("coco_2014_minival",)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (320,)
    assert cfg.INPUT.PIXEL_MEAN == (103.53, 116.28, 123.675)
    assert cfg.SOLVER.WEIGHT_DECAY == 1e-4
    assert cfg.SOLVER.STEPS == (60000, 80000)
    assert cfg.OUTPUT_DIR == "runs/original"
    assert cfg.MODEL.RPN.NMS_THRESH == 0.7  # not in the file


def test_no_file_gives_the_defaults_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_config() == Config()


def test_dead_keys_give_one_warning():
    dead = ["AMP_VERBOSE", "True", "MODEL.ROI_MASK_HEAD.MLP_HEAD_DIM", "512"]
    with pytest.warns(UserWarning, match=r"MODEL\.ROI_MASK_HEAD\.MLP_HEAD_DIM, AMP_VERBOSE$") as caught:
        load_config(None, dead)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_config(None, dead)
    with pytest.warns(UserWarning, match=r"maskrcnn-benchmark: MODEL\.ROI_KEYPOINT_HEAD\.MLP_HEAD_DIM$"):
        load_config(None, [*dead, "MODEL.ROI_KEYPOINT_HEAD.MLP_HEAD_DIM", 7])


def test_overrides_come_last(write):
    path = write("SOLVER: {BASE_LR: 0.02, MAX_ITER: 7}")
    overrides = ["SOLVER.BASE_LR", "0.005", "SOLVER.STEPS", "(480000, 640000)", "MODEL.MASK_ON", "True", "SEED", 3]
    cfg = load_config(path, [*overrides, "MODEL.WEIGHT", "", "DTYPE", "bfloat16"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (0.005, 7, (480000, 640000))
    assert (cfg.MODEL.MASK_ON, cfg.SEED, cfg.MODEL.WEIGHT, cfg.DTYPE) == (True, 3, "", "bfloat16")


def test_base_chain(write):
    write(
        "SOLVER: {BASE_LR: 0.1, MAX_ITER: 1, GAMMA: 0.5}\nDATASETS: {REGISTER: {a: {img_dir: x, ann_file: y}}}",
        "a.yaml",
    )
    write("_BASE_: ../a.yaml\nSOLVER: {MAX_ITER: 2, GAMMA: 0.6}", "sub/b.yaml")
    path = write(
        "SOLVER: {GAMMA: 0.7}\nDATASETS: {REGISTER: {b: {data_dir: z, split: val}}}\n_BASE_: sub/b.yaml", "c.yaml"
    )
    cfg = load_config(path)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.GAMMA) == (0.1, 2, 0.7)
    assert set(cfg.DATASETS.REGISTER) == {"a", "b"}


def test_several_bases_are_read_in_order(write):
    write("SOLVER: {BASE_LR: 0.1, MAX_ITER: 1, GAMMA: 0.5}", "a.yaml")
    write("SOLVER: {MAX_ITER: 2, GAMMA: 0.6}", "b.yaml")
    cfg = load_config(write("_BASE_: [a.yaml, b.yaml]\nSOLVER: {GAMMA: 0.7}", "c.yaml"))
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.GAMMA) == (0.1, 2, 0.7)


def test_base_is_a_recipe_where_no_file_lies_beside(write):
    cfg = load_config(write("_BASE_: quick_start.yaml\nSOLVER: {MAX_ITER: 2}"))
    assert (cfg.DATASETS.TRAIN, cfg.SOLVER.MAX_ITER) == (("shapes_train",), 2)
    write("SOLVER: {MAX_ITER: 5}", "quick_start.yaml")
    assert load_config(write("_BASE_: quick_start.yaml")).DATASETS.TRAIN == ()


def test_base_cycle(write):
    write("_BASE_: b.yaml", "a.yaml")
    with pytest.raises(ConfigError, match=r"_BASE_ leads back to this file: .*a\.yaml → .*b\.yaml → .*a\.yaml"):
        load_config(write("_BASE_: a.yaml", "b.yaml").with_name("a.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: {RPN: {NMS_TRESH: 0.6}}", r"a\.yaml: unknown key MODEL\.RPN\.NMS_TRESH; .* MODEL\.RPN\.NMS_THRESH$"),
        ("SOLVR: {BASE_LR: 0.6}", r"a\.yaml: unknown key SOLVR; the nearest is SOLVER$"),
        ("SOLVER: {BASE_LR: fast}", r"a\.yaml: SOLVER\.BASE_LR: wanted float, got str 'fast'"),
        ("INPUT: {MIN_SIZE_TRAIN: 800}", r"INPUT\.MIN_SIZE_TRAIN: wanted tuple of int, got int 800"),
        ("INPUT: {PIXEL_STD: [1, 1]}", r"INPUT\.PIXEL_STD: wanted tuple of 3 float, got list \[1, 1\]"),
        ("MODEL: {CONVENTIONS: new}", r'MODEL\.CONVENTIONS: wanted "modern" or "torchvision".*, got str \'new\''),
        ("DTYPE: float8", r'DTYPE: wanted "float32" or "float16" or "bfloat16", got'),
        ("MODEL: {CONVENTIONS: DETR}", r"MODEL\.CONVENTIONS: wanted \"modern\""),
        ("MODEL: {RPN: 5}", r"a\.yaml: MODEL\.RPN is a section, wanted keys below it, got int 5"),
        ("SEED: {A: 1}", r"a\.yaml: SEED: wanted int, got dict"),
        ("MODEL:\n  RPN: [1, 2", r"a\.yaml, line 2: broken YAML: "),
        ("- 1\n- 2", r"a\.yaml: wanted keys with values, got list"),
        ("_BASE_: none.yaml", r"none\.yaml: .*no such file, nor a recipe; the nearest is "),
        ("_BASE_: {a: b}", r"a\.yaml: _BASE_: wanted the name of a file, got dict"),
        ("\x01", r"a\.yaml: broken YAML"),
        ("SOLVER: {ACCUMULATE_STEPS: 0}", r"SOLVER\.ACCUMULATE_STEPS is 0; it must be at least 1"),
        ("SOLVER: {EMA_DECAY: 1}", r"SOLVER\.EMA_DECAY is 1\.0; it must be at least 0 and below 1"),
        ("SOLVER: {IMS_PER_BATCH: 0}", r"SOLVER\.IMS_PER_BATCH is 0; it must be at least 1"),
        ("MODEL: {ROI_BOX_HEAD: {NUM_CLASSES: 1}}", r"MODEL\.ROI_BOX_HEAD\.NUM_CLASSES is 1; it must be at least 2"),
        ("SOLVER: {STEPS: [20, 10]}", r"SOLVER\.STEPS is \(20, 10\); it must be in rising order"),
    ],
)
def test_bad_files(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(text))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot read this configuration file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot read this configuration file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.BASE_LR"], r"command line: wanted pairs KEY VALUE, but the last key has no value: 'SOLVER.BASE_LR'"),
        (["SOLVER.BASE_LRR", "1"], r"command line: unknown key SOLVER\.BASE_LRR; the nearest is SOLVER\.BASE_LR$"),
        (["model.mask_on", "1"], r"unknown key model\.mask_on; the nearest is MODEL\.MASK_ON$"),
        (["BASE_LR", "1"], r"unknown key BASE_LR; the nearest is SOLVER\.BASE_LR$"),
        (["SEED.X", "1"], r"unknown key SEED\.X; the nearest is SEED$"),
        (["SOLVER", "1"], r"command line: SOLVER is a section; name a key of it, such as SOLVER\.MAX_ITER"),
        (["SOLVER.MAX_ITER", "1.5"], r"command line: SOLVER\.MAX_ITER: wanted int, got str '1\.5'"),
    ],
)
def test_bad_overrides(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_dump_loads_back_equal(write):
    overrides = ["MODEL.RPN.ANCHOR_SIZES", "((32, 48), (64,))", "DATASETS.REGISTER", "{'a': {'img_dir': 'x'}}"]
    overrides += ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', [36.8, 0.2]]]", "SOLVER.WEIGHT_DECAY", "1e-5"]
    cfg = load_config(None, [*overrides, "OUTPUT_DIR", "1e5", "MODEL.WEIGHT", "größe: 1 # x"])
    text = dump_config(cfg)
    assert load_config(write(text)) == cfg
    assert "  STEPS: [30000]\n" in text
    assert "    ANCHOR_SIZES: [[32.0, 48.0], [64.0]]\n" in text
    assert text.index("MODEL:") < text.index("INPUT:") < text.index("SOLVER:") < text.index("DTYPE:")
    assert "&" not in text  # no YAML anchors where two keys hold the same tuple


def test_every_recipe_loads_without_warnings(repository):
    files = sorted((repository / "fastrcnn" / "configs").rglob("*.yaml"))
    assert len(files) >= 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in files:
            load_config(file)


def test_torchvision_recipes_describe_torchvisions_models(repository):
    folder = repository / "fastrcnn" / "configs" / "torchvision"
    cfg = load_config(folder / "mask_rcnn_R_50_FPN.yaml")
    with torch.device("meta"):
        peer = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    transform, rpn, heads = peer.transform, peer.rpn, peer.roi_heads
    peers_values = {
        "INPUT.MIN_SIZE_TRAIN": transform.min_size,
        "INPUT.MIN_SIZE_TEST": transform.min_size[-1],
        "INPUT.MAX_SIZE_TRAIN": transform.max_size,
        "INPUT.MAX_SIZE_TEST": transform.max_size,
        "INPUT.PIXEL_MEAN": tuple(transform.image_mean),
        "INPUT.PIXEL_STD": tuple(transform.image_std),
        "INPUT.TO_BGR255": False,
        "INPUT.ANTIALIAS": False,  # interpolate() without it
        "DATALOADER.SIZE_DIVISIBILITY": transform.size_divisible,
        "MODEL.CONVENTIONS": "torchvision",
        "MODEL.MASK_ON": True,
        "MODEL.RESNETS.BACKBONE_OUT_CHANNELS": peer.backbone.out_channels,
        "MODEL.RESNETS.STRIDE_IN_1X1": peer.backbone.body.layer2[0].conv1.stride == (2, 2),
        "MODEL.RPN.ANCHOR_SIZES": tuple(size for (size,) in rpn.anchor_generator.sizes),
        "MODEL.RPN.ASPECT_RATIOS": rpn.anchor_generator.aspect_ratios[0],
        "MODEL.RPN.PRE_NMS_TOP_N_TRAIN": rpn._pre_nms_top_n["training"],
        "MODEL.RPN.PRE_NMS_TOP_N_TEST": rpn._pre_nms_top_n["testing"],
        "MODEL.RPN.POST_NMS_TOP_N_TRAIN": rpn._post_nms_top_n["training"],
        "MODEL.RPN.POST_NMS_TOP_N_TEST": rpn._post_nms_top_n["testing"],
        "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN": rpn._post_nms_top_n["training"],
        "MODEL.RPN.FPN_POST_NMS_TOP_N_TEST": rpn._post_nms_top_n["testing"],
        "MODEL.RPN.FPN_POST_NMS_PER_BATCH": False,
        "MODEL.RPN.NMS_THRESH": rpn.nms_thresh,
        "MODEL.RPN.MIN_SIZE": rpn.min_size,
        "MODEL.RPN.FG_IOU_THRESHOLD": rpn.proposal_matcher.high_threshold,
        "MODEL.RPN.BG_IOU_THRESHOLD": rpn.proposal_matcher.low_threshold,
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": rpn.fg_bg_sampler.batch_size_per_image,
        "MODEL.RPN.POSITIVE_FRACTION": rpn.fg_bg_sampler.positive_fraction,
        "MODEL.RPN.SMOOTH_L1_BETA": 1 / 9,  # in the text of rpn.py and roi_heads.py
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 1 / 9,
        "MODEL.ROI_HEADS.BBOX_REG_WEIGHTS": heads.box_coder.weights,
        "MODEL.ROI_HEADS.SCORE_THRESH": heads.score_thresh,
        "MODEL.ROI_HEADS.NMS": heads.nms_thresh,
        "MODEL.ROI_HEADS.DETECTIONS_PER_IMG": heads.detections_per_img,
        "MODEL.ROI_HEADS.FG_IOU_THRESHOLD": heads.proposal_matcher.high_threshold,
        "MODEL.ROI_HEADS.BG_IOU_THRESHOLD": heads.proposal_matcher.low_threshold,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": heads.fg_bg_sampler.batch_size_per_image,
        "MODEL.ROI_HEADS.POSITIVE_FRACTION": heads.fg_bg_sampler.positive_fraction,
        "MODEL.ROI_BOX_HEAD.NUM_CLASSES": heads.box_predictor.cls_score.out_features,
        "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM": heads.box_head.fc6.out_features,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": heads.box_roi_pool.output_size[0],
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": heads.box_roi_pool.sampling_ratio,
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": heads.mask_roi_pool.output_size[0],
        "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": heads.mask_roi_pool.sampling_ratio,
    }
    values = {leaf.path: leaf.default for leaf in leaves(cfg)}
    assert {path: values[path] for path in peers_values} == peers_values

    faster = load_config(folder / "faster_rcnn_R_50_FPN.yaml")
    faster.MODEL.MASK_ON, faster.MODEL.ROI_MASK_HEAD = True, cfg.MODEL.ROI_MASK_HEAD
    faster.MODEL.WEIGHT = cfg.MODEL.WEIGHT
    assert faster == cfg


def test_recipes_and_runs_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = RECIPES / "torchvision" / "mask_rcnn_R_50_FPN.yaml"
    for name in ("torchvision/mask_rcnn_R_50_FPN", "configs/torchvision/mask_rcnn_R_50_FPN.yaml", recipe):
        assert find_config(name) == recipe
    assert find_config("../configs/caffe2/e2e_mask_rcnn_R_50_FPN_1x_caffe2.yaml").parent == RECIPES / "caffe2"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quick_start.yaml").write_text("SEED: 5\n")
    assert load_config("configs/quick_start.yaml").SEED == 5  # a file of one's own comes first
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yml").write_text("SEED: 6\n")
    assert load_config("run").SEED == 6
    (tmp_path / "mine.yaml").write_text("_BASE_: [run/config.yml, torchvision/mask_rcnn_R_50_FPN]\n")
    assert load_config("mine.yaml") == load_config(recipe, ["SEED", 6])
    for name in ("Mask_RCNN_r_50_fpn", tmp_path / "quick_start", "configs", "run/other"):
        with pytest.raises(ConfigError, match=f"{name}: cannot read this configuration file.*nearest is "):
            find_config(name)


def test_the_global_of_maskrcnn_benchmark():
    from fastrcnn.config import cfg

    own = cfg.clone()
    own.merge_from_file("quick_start")
    own.merge_from_list(["MODEL.DEVICE", "cpu", "SOLVER.STEPS", "(1, 2)"])
    assert own == load_config("quick_start", ["MODEL.DEVICE", "cpu", "SOLVER.STEPS", "(1, 2)"])
    assert cfg == load_config()
    with pytest.raises(ConfigError, match=r"unknown key MODEL\.DEVISE"):
        own.merge_from_list(["MODEL.DEVISE", "cpu"])
