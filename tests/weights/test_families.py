"""Every known family: its names become ours, and ours become its, bit for bit."""

import pickle
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torchvision.models as classifiers
from torchvision.models import detection
from weights.projects import (
    benchmark_stage,
    benchmark_stem,
    detectron2_stage,
    detectron2_stem,
    detectron_file,
    tensors,
    weight_bias,
)

import fastrcnn
from fastrcnn.weights import WeightError, detectron2, export, load, read_state, torchvision

SMALL = (
    "MODEL.DEVICE cpu MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.RESNETS.RES2_OUT_CHANNELS 32 "
    "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.BACKBONE_OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 16 "
    "MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM 16 MODEL.ROI_MASK_HEAD.CONV_LAYERS (16,16,16,16) MODEL.GROUP_NORM.NUM_GROUPS 4 "
    "MODEL.ROI_BOX_HEAD.NUM_CLASSES 5 MODEL.CONVENTIONS modern"
).split()
GROUP_NORM = (
    "MODEL.RESNETS.TRANS_FUNC BottleneckWithGN MODEL.RESNETS.STEM_FUNC StemWithGN MODEL.FPN.USE_GN True "
    "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR FPNXconv1fcFeatureExtractor MODEL.ROI_BOX_HEAD.USE_GN True "
    "MODEL.ROI_MASK_HEAD.USE_GN True MODEL.RESNETS.STRIDE_IN_1X1 False"
).split()
MODELS = {
    "faster": ("e2e_faster_rcnn_R_50_FPN_1x.yaml", []),
    "mask": ("e2e_mask_rcnn_R_50_FPN_1x.yaml", []),
    "group norm": ("e2e_mask_rcnn_R_50_FPN_1x.yaml", GROUP_NORM),
    "keypoint": ("e2e_keypoint_rcnn_R_50_FPN_1x.yaml", ["MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS", "(16,16)"]),
    "retinanet": ("retinanet/retinanet_R-50-FPN_1x.yaml", []),
    "retinanet of torchvision": ("torchvision/retinanet_R_50_FPN_V2.yaml", []),
    "batch norm": ("torchvision/mask_rcnn_R_50_FPN_V2.yaml", []),
    "mobile": ("torchvision/faster_rcnn_MobileNetV3_FPN.yaml", []),
    "C4": ("e2e_mask_rcnn_R_50_C4_1x.yaml", []),
    "deformable": ("dcn/e2e_mask_rcnn_mdconv_R_50_FPN_1x.yaml", []),
    "cascade": ("modern/cascade_mask_rcnn_R_50_FPN_3x.yaml", []),
}


NOT_OF = {"torchvision": {"C4", "deformable", "cascade"}, "detectron2": {"mobile"}}


def build(repository, kind="mask", *overrides):
    file, more = MODELS[kind]
    cfg = fastrcnn.load_config(file, [*SMALL, *more, *overrides])
    model = fastrcnn.build_model(cfg)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else 7)
    return model


def assert_same(got, want):
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def background(state, fill=0.0):
    """What detectron2 does not store: boxes and masks of the background."""
    state = {name: value.clone() for name, value in state.items()}
    for name, value in state.items():
        if name.startswith("roi_heads") and "bbox_pred" in name:
            value[:4] = fill
        if "mask_fcn_logits" in name:
            value[:1] = fill
    return state


# --- torchvision ------------------------------------------------------------------------------------------------------

DETECTORS = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
)


def meta(build):
    with torch.device("meta"):
        return build(weights=None, **({"weights_backbone": None} if build.__module__.count("detection") else {}))


def old_names(state):
    """As torchvision before 0.14 wrote them."""
    out = {}
    for name, value in state.items():
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for k in range(4):
            name = name.replace(f"_blocks.{k}.0.", f"_blocks.{k}.")
            name = name.replace(f"mask_head.{k}.0.", f"mask_head.mask_fcn{k + 1}.")
            name = name.replace(f"ation_head.conv.{k}.0.", f"ation_head.conv.{2 * k}.")
            name = name.replace(f"regression_head.conv.{k}.0.", f"regression_head.conv.{2 * k}.")
        out[name] = value
    return out


@pytest.mark.parametrize("name", DETECTORS)
def test_torchvision_and_back(name):
    state = meta(getattr(detection, name)).state_dict()
    ours = read_state(state)
    assert (ours.family, ours.conventions) == ("torchvision", "torchvision")
    theirs = re.compile(r"(inner|layer)_blocks|_head\.|_predictor")
    assert not [key for key in ours.state if theirs.search(key)]
    back = export(ours.state, "torchvision")
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in state.items()}
    if "v2" not in name:
        assert old_names(state).keys() != state.keys()
        assert read_state(old_names(state)).state.keys() == ours.state.keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fasterrcnn_resnet50_fpn", {"rpn.head.conv.weight": (256, 256, 3, 3), "backbone.fpn.fpn_inner4.bias": (256,)}),
        (
            "maskrcnn_resnet50_fpn_v2",
            {
                "backbone.fpn.fpn_inner1.0.weight": (256, 256, 1, 1),
                "backbone.fpn.fpn_layer4.1.running_var": (256,),
                "rpn.head.conv.0.weight": (256, 256, 3, 3),
                "rpn.head.conv.1.bias": (256,),
                "roi_heads.box.feature_extractor.xconvs.0.weight": (256, 256, 3, 3),
                "roi_heads.box.feature_extractor.xconvs.10.running_mean": (256,),
                "roi_heads.box.feature_extractor.fc6.weight": (1024, 12544),
                "roi_heads.mask.feature_extractor.mask_fcn1.0.weight": (256, 256, 3, 3),
                "roi_heads.mask.feature_extractor.mask_fcn4.1.bias": (256,),
                "roi_heads.mask.predictor.conv5_mask.weight": (256, 256, 2, 2),
            },
        ),
        (
            "keypointrcnn_resnet50_fpn",
            {
                "roi_heads.keypoint.feature_extractor.conv_fcn1.weight": (512, 256, 3, 3),
                "roi_heads.keypoint.feature_extractor.conv_fcn8.bias": (512,),
                "roi_heads.keypoint.predictor.kps_score_lowres.weight": (512, 17, 4, 4),
            },
        ),
        (
            "retinanet_resnet50_fpn",
            {
                "backbone.fpn.fpn_inner2.weight": (256, 512, 1, 1),
                "backbone.fpn.fpn_layer4.bias": (256,),
                "backbone.fpn.top_blocks.p7.weight": (256, 256, 3, 3),
                "rpn.head.cls_tower.6.weight": (256, 256, 3, 3),
                "rpn.head.bbox_tower.0.bias": (256,),
                "rpn.head.cls_logits.weight": (9 * 90, 256, 3, 3),
                "rpn.head.bbox_pred.bias": (36,),
            },
        ),
        (
            "retinanet_resnet50_fpn_v2",
            {"rpn.head.cls_tower.9.weight": (256, 256, 3, 3), "rpn.head.cls_tower.10.weight": (256,)},
        ),
        (
            "fasterrcnn_mobilenet_v3_large_fpn",
            {"backbone.body.0.0.weight": (16, 3, 3, 3), "backbone.fpn.fpn_inner2.weight": (256, 960, 1, 1)},
        ),
    ],
)
def test_our_names_of_torchvisions_parameters(name, expected):
    state = read_state(meta(getattr(detection, name)).state_dict()).state
    assert {key: tuple(state[key].shape) for key in expected} == expected


def test_torchvision_reads_what_we_export(repository):
    path = "torchvision/mask_rcnn_R_50_FPN"
    with torch.device("meta"):
        ours = fastrcnn.build_model(fastrcnn.load_config(path))
    theirs = meta(detection.maskrcnn_resnet50_fpn)
    theirs.load_state_dict(export(ours, "torchvision"), strict=True, assign=True)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("project", ["torchvision", "detectron2"])
def test_our_models_come_back(repository, kind, project):
    state = build(repository, kind).state_dict()
    if kind in NOT_OF[project]:
        with pytest.raises(WeightError, match=f"{project} has no counterpart of"):
            export(state, project)
        return
    back = read_state(export(state, project))
    assert back.family == project
    assert_same(back.state, background(state) if project == "detectron2" else state)


def test_retinanet_of_torchvision_has_a_label_0():
    """Channels there: 9 anchors × (labels 0 to 3); here: 9 anchors × (labels 1 to 3)."""
    theirs = {
        "head.classification_head.conv.0.0.weight": torch.randn(4, 4, 3, 3),
        "head.classification_head.cls_logits.weight": torch.randn(36, 4, 3, 3),
        "head.classification_head.cls_logits.bias": torch.randn(36),
        "head.regression_head.bbox_reg.bias": torch.randn(36),
    }
    ours = torchvision.convert(theirs)
    for end in ("weight", "bias"):
        there, here = theirs[f"head.classification_head.cls_logits.{end}"], ours[f"rpn.head.cls_logits.{end}"]
        for anchor in range(9):
            for label in (1, 2, 3):
                assert torch.equal(here[anchor * 3 + label - 1], there[anchor * 4 + label])
    back = torchvision.export(ours)
    assert_same(torchvision.convert(back), ours)
    scores = back["head.classification_head.cls_logits.bias"].sigmoid()
    assert (scores[::4] < 1e-6).all()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext101_32x8d", "mobilenet_v3_large", "convnext_tiny"])
def test_classifiers_of_torchvision(name):
    state = meta(getattr(classifiers, name)).state_dict()
    ours = read_state(state)
    assert ours.conventions is None
    assert all(key.startswith("backbone.body.") for key in ours.state)
    kept = {key: value for key, value in state.items() if not key.startswith(("fc.", "classifier."))}
    assert export(ours.state, "torchvision").keys() == kept.keys()


# --- detectron2 -------------------------------------------------------------------------------------------------------


def test_names_of_detectron2_fpn(repository):
    """The whole list for Mask R-CNN R-50-FPN, written down from its modules."""
    names = detectron2_stem("backbone.bottom_up.")
    names += [n for stage in (1, 2, 3, 4) for n in detectron2_stage("backbone.bottom_up.", stage)]
    names += weight_bias(*(f"backbone.fpn_{kind}{k}" for kind in ("lateral", "output") for k in (2, 3, 4, 5)))
    names += weight_bias(*(f"proposal_generator.rpn_head.{n}" for n in ("conv", "objectness_logits", "anchor_deltas")))
    names += weight_bias("roi_heads.box_head.fc1", "roi_heads.box_head.fc2")
    names += weight_bias("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred")
    names += weight_bias(*(f"roi_heads.mask_head.{n}" for n in ("mask_fcn1", "mask_fcn2", "mask_fcn3", "mask_fcn4")))
    names += weight_bias("roi_heads.mask_head.deconv", "roi_heads.mask_head.predictor")
    assert export(build(repository), "detectron2").keys() == set(names)


def test_background_of_detectron2_is_last(repository):
    state = build(repository).state_dict()
    theirs = export(state, "detectron2")
    ours = "roi_heads.box.predictor.cls_score.weight", "roi_heads.box.predictor.bbox_pred.weight"
    assert torch.equal(theirs["roi_heads.box_predictor.cls_score.weight"][4], state[ours[0]][0])
    assert torch.equal(theirs["roi_heads.box_predictor.cls_score.weight"][0], state[ours[0]][1])
    assert torch.equal(theirs["roi_heads.box_predictor.bbox_pred.weight"][:4], state[ours[1]][4:8])
    assert theirs["roi_heads.box_predictor.bbox_pred.weight"].shape[0] == 4 * 4
    assert torch.equal(
        theirs["roi_heads.mask_head.predictor.bias"], state["roi_heads.mask.predictor.mask_fcn_logits.bias"][1:]
    )


def test_agnostic_boxes_of_detectron2(repository):
    state = build(repository, "faster", "MODEL.CLS_AGNOSTIC_BBOX_REG", "True").state_dict()
    theirs = export(state, "detectron2")
    assert theirs["roi_heads.box_predictor.bbox_pred.bias"].shape == (4,)
    assert_same(read_state(theirs).state, background(state))


def test_c4_of_detectron2():
    theirs = detectron2_stem("backbone.") + [n for stage in (1, 2, 3) for n in detectron2_stage("backbone.", stage)]
    theirs += detectron2_stage("roi_heads.", 4)
    theirs += weight_bias("proposal_generator.rpn_head.conv", "roi_heads.mask_head.deconv")
    ours = benchmark_stem() + [n for stage in (1, 2, 3) for n in benchmark_stage("backbone.body.", stage)]
    ours += benchmark_stage("roi_heads.box.feature_extractor.head.", 4)
    ours += weight_bias("rpn.head.conv", "roi_heads.mask.predictor.conv5_mask")
    state = tensors(theirs)
    converted = read_state(state)
    assert (converted.family, converted.conventions) == ("detectron2", "modern")
    assert_same(converted.state, dict(zip(ours, state.values(), strict=True)))
    # a shared head is listed twice in our models
    twice = {n.replace(".box.", ".mask."): v for n, v in converted.state.items() if ".head.layer4." in n}
    assert_same(export(converted.state | twice, "detectron2"), state)


def test_other_models_of_detectron2():
    """RetinaNet, keypoints, cascade, deformable convolution, norms in the heads, RPN with several convolutions."""
    body = "backbone.bottom_up.res2.0.conv1.weight", "backbone.body.layer1.0.conv1.weight"
    retina = {
        "backbone.fpn_lateral3.weight": "backbone.fpn.fpn_inner2.weight",
        "backbone.top_block.p6.bias": "backbone.fpn.top_blocks.p6.bias",
        "head.cls_subnet.0.weight": "rpn.head.cls_tower.0.weight",
        "head.bbox_subnet.6.bias": "rpn.head.bbox_tower.6.bias",
        "head.cls_score.weight": "rpn.head.cls_logits.weight",
        "head.bbox_pred.weight": "rpn.head.bbox_pred.weight",
    }
    regions = {
        "backbone.bottom_up.res3.1.conv2.weight": "backbone.body.layer2.1.conv2.conv.weight",
        "backbone.bottom_up.res3.1.conv2.norm.weight": "backbone.body.layer2.1.bn2.weight",
        "backbone.bottom_up.res3.1.conv2_offset.weight": "backbone.body.layer2.1.conv2.offset.weight",
        "backbone.bottom_up.res3.1.conv2_offset.bias": "backbone.body.layer2.1.conv2.offset.bias",
        "backbone.bottom_up.res3.0.conv2.weight": "backbone.body.layer2.0.conv2.weight",
        "backbone.fpn_lateral2.weight": "backbone.fpn.fpn_inner1.0.weight",
        "backbone.fpn_lateral2.norm.weight": "backbone.fpn.fpn_inner1.1.weight",
        "backbone.fpn_output5.weight": "backbone.fpn.fpn_layer4.0.weight",
        "backbone.fpn_output5.norm.weight": "backbone.fpn.fpn_layer4.1.weight",
        "proposal_generator.rpn_head.conv.conv0.weight": "rpn.head.conv.0.weight",
        "proposal_generator.rpn_head.conv.conv1.weight": "rpn.head.conv.1.weight",
        "roi_heads.box_head.0.conv1.weight": "roi_heads.box.feature_extractor.0.xconvs.0.weight",
        "roi_heads.box_head.0.conv1.norm.weight": "roi_heads.box.feature_extractor.0.xconvs.1.weight",
        "roi_heads.box_head.2.conv4.weight": "roi_heads.box.feature_extractor.2.xconvs.9.weight",
        "roi_heads.box_head.1.fc1.weight": "roi_heads.box.feature_extractor.1.fc6.weight",
        "roi_heads.box_predictor.2.cls_score.weight": "roi_heads.box.predictor.2.cls_score.weight",
        "roi_heads.mask_head.mask_fcn1.weight": "roi_heads.mask.feature_extractor.mask_fcn1.0.weight",
        "roi_heads.mask_head.mask_fcn1.norm.weight": "roi_heads.mask.feature_extractor.mask_fcn1.1.weight",
        "roi_heads.keypoint_head.conv_fcn8.bias": "roi_heads.keypoint.feature_extractor.conv_fcn8.bias",
        "roi_heads.keypoint_head.score_lowres.weight": "roi_heads.keypoint.predictor.kps_score_lowres.weight",
    }
    for names in (retina, regions):
        names = {body[0]: body[1], **names}
        derived = {"pixel_mean": (3, 1, 1), "proposal_generator.anchor_generator.cell_anchors.0": (3, 4)}
        derived["anchor_generator.cell_anchors.4"] = (9, 4)
        state = tensors(list(names))
        converted = detectron2.convert(state | tensors(derived))
        assert converted.keys() == set(names.values())
        for theirs, ours in names.items():
            assert converted[ours].shape == state[theirs].shape
        assert_same(detectron2.export(converted), state)


def test_bodies_of_detectron2():
    """Published ResNets have no prefix, and a classifier."""
    theirs = detectron2_stem("") + [n for stage in (1, 2, 3, 4) for n in detectron2_stage("", stage)]
    ours = benchmark_stem() + [n for stage in (1, 2, 3, 4) for n in benchmark_stage("backbone.body.", stage)]
    state = tensors(theirs)
    read = read_state({"model": state | tensors(weight_bias("fc1000")), "__author__": "torchvision"})
    assert (read.family, read.conventions) == ("detectron2 body", None)
    assert_same(read.state, dict(zip(ours, state.values(), strict=True)))
    assert_same(export(read.state, "detectron2"), state)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_file_of_detectron2(repository, tmp_path, protocol):
    model, other = build(repository), build(repository)
    arrays = {name: value.numpy() for name, value in export(model, "detectron2").items()}
    content = {"model": arrays, "__author__": "Detectron2 Model Zoo", "matching_heuristics": True}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(content, protocol))
    load(other, tmp_path / "model_final.pkl")
    assert_same(other.state_dict(), background(model.state_dict()))
    torch.save({"model": export(model, "detectron2"), "iteration": 3}, tmp_path / "model_final.pth")
    load(build(repository), tmp_path / "model_final.pth")


@pytest.mark.parametrize("project", ["torchvision", "detectron2"])
@pytest.mark.parametrize(
    "name", ["backbone.body.stages.xif0_0.pw.conv.weight", "roi_heads.box.feature_extractor.fc6.0.weight", "other.bias"]
)
def test_what_has_no_counterpart_is_named(project, name):
    with pytest.raises(WeightError, match=rf"^{project} has no counterpart of {re.escape(name)}$"):
        export(tensors([name, "rpn.head.conv.weight"]), project)


@pytest.mark.parametrize(
    "name", ["backbone.body.layer2.0.conv2.offset.weight", "roi_heads.box.predictor.0.cls_score.bias"]
)
def test_what_only_detectron2_has(name):
    with pytest.raises(WeightError, match=rf"^torchvision has no counterpart of {re.escape(name)}$"):
        export(tensors([name, "rpn.head.conv.weight"]), "torchvision")
    assert len(export(tensors([name, "rpn.head.conv.weight"]), "detectron2")) == 2


def test_other_projects():
    with pytest.raises(WeightError, match="'caffe2': weights can be exported to torchvision and detectron2"):
        export({}, "caffe2")


# --- Detectron --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["faster", "mask", "group norm", "keypoint", "C4"])
def test_file_of_detectron(repository, tmp_path, kind):
    """Written from our model by the inverse of the names, it comes back; its batch norm is folded into two numbers."""
    model, other = build(repository, kind), build(repository, kind)
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith(("running_mean", "running_var")):
            value.fill_(float(name.endswith("var")))
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps(detectron_file(state, kind == "group norm"), protocol=2))
    read = read_state(path)
    assert (read.family, read.conventions) == ("Detectron", "detectron")
    assert_same(read.state, state)
    with pytest.warns(UserWarning, match="trained with the conventions 'detectron'"):
        report = load(other, path)
    assert not report.missing + report.unexpected
    assert_same(other.state_dict(), state)


def test_c4_and_keypoints_of_detectron():
    body = benchmark_stem() + [n for stage in (1, 2, 3) for n in benchmark_stage("backbone.body.", stage)]
    last = weight_bias("roi_heads.box.predictor.cls_score", "roi_heads.box.predictor.bbox_pred")
    c4 = benchmark_stage("roi_heads.box.feature_extractor.head.", 4) + last
    fpn = benchmark_stage("backbone.body.", 4) + weight_bias(
        "backbone.fpn.fpn_inner4",
        "backbone.fpn.fpn_layer1",
        "roi_heads.box.feature_extractor.fc6",
        "roi_heads.keypoint.feature_extractor.conv_fcn8",
        "roi_heads.keypoint.predictor.kps_score_lowres",
    )
    for names in (c4, fpn + last):
        state = tensors(body + names)
        for name, value in state.items():
            if name.endswith(("running_mean", "running_var")):
                value.fill_(float(name.endswith("var")))
        file = detectron_file(state, group_norm=False)
        file["blobs"] |= {"kps_score_w": np.ones((17, 17, 4, 4)), "kps_score_b": np.zeros(17)}
        assert_same(read_state(file).state, state)


def test_rpn_of_detectron_on_c4():
    blobs = tensors(["conv1_w", "res2_0_branch2a_w", "conv_rpn_w", "rpn_cls_logits_b", "rpn_bbox_pred_w"])
    read = read_state({"blobs": blobs})
    assert (read.family, read.conventions) == ("Detectron", "detectron")
    assert torch.equal(read.state["rpn.head.conv.weight"], blobs["conv_rpn_w"])
    assert torch.equal(read.state["rpn.head.cls_logits.bias"], blobs["rpn_cls_logits_b"])
    assert torch.equal(read.state["rpn.head.bbox_pred.weight"], blobs["rpn_bbox_pred_w"])


def test_retinanet_of_detectron():
    """Its 9 anchors are octave by octave, ratios 1, 2, 0.5 in each; ours are ratio by ratio, 0.5, 1, 2."""
    there = [(octave, ratio) for octave in range(3) for ratio in (1.0, 2.0, 0.5)]
    here = [(octave, ratio) for ratio in (0.5, 1.0, 2.0) for octave in range(3)]
    blobs = {"conv1_w": (2,), "res2_0_branch2a_w": (2,), "fpn_6_w": (2,), "fpn_7_b": (2,), "fpn_res3_3_sum_w": (2,)}
    blobs |= {"retnet_cls_conv_n0_fpn3_w": (4, 4, 3, 3), "retnet_bbox_conv_n3_fpn3_b": (4,)}
    blobs |= {"retnet_cls_pred_fpn3_w": (18, 4, 3, 3), "retnet_cls_pred_fpn3_b": (18,)}
    blobs |= {"retnet_bbox_pred_fpn3_w": (36, 4, 3, 3), "retnet_bbox_pred_fpn3_b": (36,)}
    theirs = tensors(blobs)
    state = read_state({"blobs": theirs}).state
    expected = {
        "backbone.fpn.top_blocks.p6.weight",
        "backbone.fpn.top_blocks.p7.bias",
        "backbone.fpn.fpn_layer2.weight",
    }
    expected |= {"rpn.head.cls_tower.0.weight", "rpn.head.bbox_tower.6.bias"}
    assert expected < state.keys()
    for layer, count in (("cls_pred", 2), ("bbox_pred", 4)):
        for end in ("weight", "bias"):
            own = state[f"rpn.head.{layer.replace('cls_pred', 'cls_logits')}.{end}"].split(count)
            for index, anchor in enumerate(here):
                their = theirs[f"retnet_{layer}_fpn3_{end[0]}"].split(count)[there.index(anchor)]
                assert torch.equal(own[index], their)


@pytest.mark.parametrize("statistics", [False, True])
def test_bodies_of_detectron(statistics):
    """Published on their own, with a classifier; batch norm folded into two numbers, or with all four."""
    names = benchmark_stem() + [n for stage in (1, 2, 3, 4) for n in benchmark_stage("backbone.body.", stage)]
    state = tensors(names)
    blobs = detectron_file(state, group_norm=False)["blobs"] | {"fc1000_w": np.ones((10, 8)), "pred_b": np.ones(10)}
    for name in list(state):
        if name.endswith(("running_mean", "running_var")):
            if not statistics:
                state[name].fill_(float(name.endswith("var")))
                continue
            scale = detectron_file({name.replace(name.rsplit(".", 1)[1], "bias"): state[name]}, False)["blobs"]
            blob = next(key for key in scale if not key.endswith("_momentum")).removesuffix("b")
            blobs[blob + ("rm" if name.endswith("mean") else "riv")] = state[name].numpy()
    read = read_state(blobs)
    assert (read.family, read.conventions) == ("Detectron body", None)
    assert_same(read.state, state)


# --- maskrcnn-benchmark -----------------------------------------------------------------------------------------------


def test_file_of_maskrcnn_benchmark(repository, tmp_path):
    model, other = build(repository), build(repository)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    state |= {f"module.rpn.anchor_generator.cell_anchors.{k}": torch.zeros(3, 4) for k in range(5)}
    torch.save({"model": state}, tmp_path / "e2e.pth", _use_new_zipfile_serialization=False)  # as torch 1.0 did
    with pytest.warns(UserWarning, match="trained with the conventions 'maskrcnn-benchmark'"):
        report = load(other, tmp_path / "e2e.pth")
    assert report.family == "maskrcnn-benchmark"
    assert not report.missing + report.unexpected
    assert_same(other.state_dict(), model.state_dict())


class Part(torch.nn.Module):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


conv = partial(torch.nn.Conv2d, 2, 2, 1)


def test_longest_ending_fills_a_parameter():
    """The rule of maskrcnn-benchmark's loader."""
    model = Part(backbone=Part(layer1=Part(conv=conv()), conv=conv()), other=Part(conv=conv()))
    state = tensors(
        {f"{n}.{e}": (2, 2, 1, 1)[:k] for n in ("layer1.conv", "conv") for e, k in (("weight", 4), ("bias", 1))}
    )
    report = load(model, state)
    assert torch.equal(model.backbone.layer1.conv.weight, state["layer1.conv.weight"])
    assert torch.equal(model.backbone.conv.weight, state["conv.weight"])
    assert not report.missing + report.unexpected


def test_a_body_fills_the_head_of_c4_and_deformable_convolutions():
    head = Part(layer4=torch.nn.Sequential(Part(conv1=conv(), conv2=Part(conv=conv(), offset=conv()))))
    extractor = Part(head=head)
    model = Part(
        backbone=Part(body=Part(layer1=torch.nn.Sequential(Part(conv1=conv())))),
        roi_heads=Part(box=Part(feature_extractor=extractor), mask=Part(feature_extractor=extractor)),
    )
    shapes = {"weight": (2, 2, 1, 1), "bias": (2,)}
    names = ("conv1", "layer1.0.conv1", "layer4.0.conv1", "layer4.0.conv2")
    state = tensors({f"{name}.{end}": shape for name in names for end, shape in shapes.items()})
    report = load(model, state)
    assert report.family == "torchvision ResNet"
    assert torch.equal(head.layer4[0].conv1.weight, state["layer4.0.conv1.weight"])
    assert torch.equal(head.layer4[0].conv2.conv.weight, state["layer4.0.conv2.weight"])
    assert report.unexpected == ["backbone.body.stem.conv1.weight", "backbone.body.stem.conv1.bias"]
    assert {name.rsplit(".", 1)[0].split("head.")[1] for name in report.missing} == {"layer4.0.conv2.offset"}
    # a shared head that the weights list once
    once = {name: value for name, value in model.state_dict().items() if ".mask." not in name}
    assert not load(model, once).missing


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"model": {"a": torch.zeros(1)}, "conventions": "torchvision"}, "torchvision"),
        ({"a": torch.zeros(1)}, "modern"),
        ({"rpn.anchor_generator.cell_anchors.0": torch.zeros(3, 4), "a": torch.zeros(1)}, "maskrcnn-benchmark"),
    ],
)
def test_conventions_of_the_weights_are_adopted(state, found):
    cfg = fastrcnn.load_config(None, ["MODEL.CONVENTIONS", "modern"])
    fastrcnn.weights.adopt_conventions(cfg, state)
    assert found == cfg.MODEL.CONVENTIONS


def test_predictor_has_the_conventions_of_its_weights(repository, tmp_path):
    model = build(repository)
    path = tmp_path / "model.pth"
    torch.save({"model": export(model, "torchvision")}, path)
    cfg = fastrcnn.load_config("e2e_mask_rcnn_R_50_FPN_1x", SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor = fastrcnn.Predictor(cfg, path)
    assert predictor.model.conventions == predictor.cfg.MODEL.CONVENTIONS == "torchvision"
    assert cfg.MODEL.CONVENTIONS == "modern"
