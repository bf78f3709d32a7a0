"""Every key of the heads on regions has an effect, and every family of them traces without values."""

import pytest
import torch
from models.test_no_host_reads import SMALL, inputs, without_values
from torch._subclasses.fake_tensor import FakeTensorMode

import fastrcnn
from fastrcnn.config.schema import Config, leaves
from fastrcnn.models.registry import ROI_BOX_PREDICTOR
from fastrcnn.models.roi_heads import ROIHeads
from fastrcnn.models.roi_heads.box import FPNPredictor
from fastrcnn.structures import ImageBatch, ProposalBatch, TargetBatch

BASE = """
MODEL.DEVICE cpu MODEL.MASK_ON True MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR False
MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.ROI_HEADS.DETECTIONS_PER_IMG 40 MODEL.ROI_BOX_HEAD.NUM_CLASSES 5
MODEL.ROI_BOX_HEAD.POOLER_SCALES (0.25,0.125) MODEL.ROI_MASK_HEAD.POOLER_SCALES (0.25,0.125)
MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 7 MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM 8 MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 16
MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR FPNXconv1fcFeatureExtractor MODEL.ROI_BOX_HEAD.PREDICTOR FPNPredictor
MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR MaskRCNNFPNFeatureExtractor MODEL.ROI_MASK_HEAD.CONV_LAYERS (8,8)
MODEL.ROI_MASK_HEAD.RESOLUTION 28 MODEL.GROUP_NORM.NUM_GROUPS 4
MODEL.RESNETS.RES2_OUT_CHANNELS 8 MODEL.RESNETS.WIDTH_PER_GROUP 4
"""
CASCADE = "MODEL.CASCADE_ON True MODEL.CLS_AGNOSTIC_BBOX_REG True "
C4 = """
MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR ResNet50Conv5ROIFeatureExtractor MODEL.ROI_BOX_HEAD.PREDICTOR FastRCNNPredictor
MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 14 MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR ResNet50Conv5ROIFeatureExtractor
MODEL.ROI_MASK_HEAD.RESOLUTION 14
"""


@ROI_BOX_PREDICTOR.register("Shy")
class Shy(FPNPredictor):
    """Halves its logits."""

    def forward(self, x):
        logits, deltas = super().forward(x)
        return logits / 2, deltas


# key -> what it is set to, and what else must be set for it to count
EFFECTS = {
    "MODEL.CLS_AGNOSTIC_BBOX_REG": ("True", ""),
    "MODEL.CASCADE_ON": ("True", "MODEL.CLS_AGNOSTIC_BBOX_REG True"),
    "MODEL.ROI_HEADS.FG_IOU_THRESHOLD": ("0.8", ""),
    "MODEL.ROI_HEADS.BG_IOU_THRESHOLD": ("0.2", ""),
    "MODEL.ROI_HEADS.BBOX_REG_WEIGHTS": ("(1,1,1,1)", ""),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": ("8", ""),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": ("0.5", ""),
    "MODEL.ROI_HEADS.SCORE_THRESH": ("0.21", ""),
    "MODEL.ROI_HEADS.PRE_NMS_TOP_N": ("5", ""),
    "MODEL.ROI_HEADS.NMS": ("0.1", ""),
    "MODEL.ROI_HEADS.SOFT_NMS": ("gaussian", ""),
    "MODEL.ROI_HEADS.SOFT_NMS_SIGMA": ("0.1", "MODEL.ROI_HEADS.SOFT_NMS gaussian"),
    "MODEL.ROI_HEADS.SOFT_NMS_MIN_SCORE": ("0.2", "MODEL.ROI_HEADS.SOFT_NMS gaussian"),
    "MODEL.ROI_HEADS.DETECTIONS_PER_IMG": ("9", ""),
    "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR": ("FPN2MLPFeatureExtractor", ""),
    "MODEL.ROI_BOX_HEAD.PREDICTOR": ("Shy", ""),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": ("5", ""),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": ("2", ""),
    "MODEL.ROI_BOX_HEAD.POOLER_SCALES": ("(0.125,)", ""),
    "MODEL.ROI_BOX_HEAD.NUM_CLASSES": ("6", ""),
    "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM": ("12", ""),
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": ("0.0", ""),
    "MODEL.ROI_BOX_HEAD.BOX_REG_LOSS": ("giou", ""),
    "MODEL.ROI_BOX_HEAD.BOX_REG_LOSS_WEIGHT": ("2.0", ""),
    "MODEL.ROI_BOX_HEAD.USE_GN": ("True", ""),
    "MODEL.ROI_BOX_HEAD.NORM": ("BatchNorm", ""),
    "MODEL.ROI_BOX_HEAD.DILATION": ("2", ""),
    "MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM": ("4", ""),
    "MODEL.ROI_BOX_HEAD.NUM_STACKED_CONVS": ("2", ""),
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": ("(0.5, 0.55, 0.9)", CASCADE),
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": ("((1,1,1,1),(2,2,2,2),(3,3,3,3))", CASCADE),
    "MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR": ("ResNet50Conv5ROIFeatureExtractor", "MODEL.ROI_MASK_HEAD.RESOLUTION 14"),
    "MODEL.ROI_MASK_HEAD.PREDICTOR": ("MaskRCNNConv1x1Predictor", "MODEL.ROI_MASK_HEAD.RESOLUTION 14"),
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": ("7", "MODEL.ROI_MASK_HEAD.RESOLUTION 14"),
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": ("2", ""),
    "MODEL.ROI_MASK_HEAD.POOLER_SCALES": ("(0.125,)", ""),
    "MODEL.ROI_MASK_HEAD.CONV_LAYERS": ("(8,8,8)", ""),
    "MODEL.ROI_MASK_HEAD.RESOLUTION": ("14", ""),
    "MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR": ("True", C4),
    "MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS": ("True", ""),
    "MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS_THRESHOLD": ("0.52", "MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS True"),
    "MODEL.ROI_MASK_HEAD.DILATION": ("2", ""),
    "MODEL.ROI_MASK_HEAD.USE_GN": ("True", ""),
    "MODEL.ROI_MASK_HEAD.NORM": ("BatchNorm", ""),
}
SECTIONS = ("MODEL.ROI_HEADS.", "MODEL.ROI_BOX_HEAD.", "MODEL.ROI_BOX_CASCADE_HEAD.", "MODEL.ROI_MASK_HEAD.")


def test_all_living_keys_are_here():
    living = {leaf.path for leaf in leaves(Config()) if leaf.path.startswith(SECTIONS) and not leaf.dead}
    assert living == {key for key in EFFECTS if key.startswith(SECTIONS)}


def outcome(keys):
    """Shapes of the parameters, the losses and the detections, from fixed random numbers."""
    cfg = fastrcnn.load_config(None, [*BASE.split(), *keys])
    torch.manual_seed(0)
    features = [torch.randn(2, 32, 24, 32), torch.randn(2, 32, 12, 16)]
    corner = torch.rand(2, 40, 2) * 60
    boxes = torch.cat([corner, corner + 15 + torch.rand(2, 40, 2) * 40], 2)
    gt = boxes[:, :2] + torch.tensor([1.0, -1, 2, -2])
    boxes[:, 2:12] = gt[:, :1] + torch.randn(2, 10, 4) * 4
    proposals = ProposalBatch(boxes, torch.rand(2, 40), torch.ones(2, 40, dtype=torch.bool))
    masks = (torch.rand(2, 2, 96, 128) < 0.5).to(torch.uint8)
    targets = TargetBatch(gt, torch.tensor([[1, 3], [2, 4]]), torch.zeros(2, 2, dtype=torch.bool), masks=masks)
    sizes = torch.tensor([[96, 128], [90, 120]], dtype=torch.int32)
    images = ImageBatch(torch.zeros(2, 3, 96, 128), sizes, sizes)
    torch.manual_seed(1)
    heads = ROIHeads(cfg, 32)
    for parameter in heads.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
    torch.manual_seed(2)
    found = {name: value.shape for name, value in heads.state_dict().items()}
    found |= heads.train().losses(features, images, proposals, targets)
    with torch.no_grad():
        for index, boxlist in enumerate(heads.eval().detect(features, images, proposals).to_boxlists()):
            found[f"boxes {index}"] = boxlist.bbox
            found |= {f"{name} {index}": boxlist.get_field(name) for name in ("scores", "labels", "mask")}
    return found


def same(a, b):
    return a.keys() == b.keys() and all(
        x.shape == b[name].shape and torch.equal(x, b[name]) if isinstance(x, torch.Tensor) else x == b[name]
        for name, x in a.items()
    )


@pytest.mark.parametrize("key", EFFECTS)
def test_the_key_has_an_effect(key):
    value, others = EFFECTS[key]
    results = []
    for keys in (others.split(), others.split(), [*others.split(), key, value]):
        try:
            results.append(outcome(keys))
        except fastrcnn.config.ConfigError as error:
            results.append({"error": str(error)})
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_pasted_masks():
    """POSTPROCESS_MASKS: what `paste_masks` makes of the probabilities, in the frame of the original image."""
    for conventions, continuous in (("modern", True), ("torchvision", False)):
        keys = ["MODEL.CONVENTIONS", conventions]
        plain = outcome(keys)
        pasted = outcome([*keys, "MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS", "True"])
        for index, size in enumerate(((96, 128), (90, 120))):
            masks = fastrcnn.ops.paste_masks(plain[f"mask {index}"], plain[f"boxes {index}"], size, 0.5, continuous)
            assert torch.equal(pasted[f"mask {index}"], masks)
            assert masks.any()


FAMILIES = {
    "C4": ("MODEL.BACKBONE.CONV_BODY R-50-C4 MODEL.MASK_ON True MODEL.RPN.PRE_NMS_TOP_N_TRAIN 200", None),
    "C4, not shared": (
        "MODEL.BACKBONE.CONV_BODY R-50-C4 MODEL.MASK_ON True MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR False",
        None,
    ),
    "cascade": (CASCADE, "e2e_mask_rcnn_R_50_FPN_1x"),
    "V2": (
        "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR FPNXconv1fcFeatureExtractor MODEL.ROI_BOX_HEAD.NORM BatchNorm "
        "MODEL.ROI_MASK_HEAD.NORM BatchNorm MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM 16 MODEL.ROI_BOX_HEAD.BOX_REG_LOSS giou",
        "torchvision/mask_rcnn_R_50_FPN",
    ),
    "legacy, soft": (
        "MODEL.CONVENTIONS maskrcnn-benchmark MODEL.ROI_HEADS.SOFT_NMS gaussian "
        "MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS True",
        "e2e_mask_rcnn_R_50_FPN_1x",
    ),
}


def family(name, repository):
    keys, file = FAMILIES[name]
    path = None if file is None else file
    few = "MODEL.ROI_HEADS.DETECTIONS_PER_IMG 10 MODEL.ROI_MASK_HEAD.CONV_LAYERS (16,16)".split()
    return fastrcnn.load_config(path, [*SMALL, *few, *keys.split()])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_trace_without_values(name, precision, repository):
    model = fastrcnn.build_model(family(name, repository))
    mode = FakeTensorMode()
    without_values(model, mode)
    images, targets = (batch._map(mode.from_tensor) for batch in inputs("masks"))
    with mode, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        losses = model.train()(images, targets)
        assert all(loss.shape == () for loss in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        detections = model.eval()(images)
        assert detections.boxes.shape == (2, 10, 4)
        side = 14 if name.startswith("C4") else 28
        assert detections.masks.shape == (2, 10, side, side)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_learn_with_and_without_objects(name, repository):
    """Losses and gradients are finite; an image without objects, and a batch of nothing else, work."""
    model = fastrcnn.build_model(family(name, repository)).train()
    images, targets = inputs("masks")
    for _ in range(2):
        losses = model(images, targets)
        assert all(loss.isfinite() for loss in losses.values())
        model.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        targets.labels.zero_()
    boxlists = model.eval()(images).to_boxlists()
    assert [b.size for b in boxlists] == [(320, 256), (260, 192)]
