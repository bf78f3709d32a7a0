"""Whole training and inference steps: our models, torchvision's, and ours on the reference operators.

All have the same random weights, images and ground truth, prepared on the device beforehand; nothing is loaded. The
reference operators need a process of their own, for FASTRCNN_KERNELS is read at import:

    FASTRCNN_KERNELS=reference python -m benchmarks.steps     a line of JSON for each of the GPU's cases
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou
from torchvision.transforms.functional import pil_to_tensor

import fastrcnn
from benchmarks import timing
from fastrcnn.config import Config
from fastrcnn.engine.solver import make_optimizer

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS, THEIRS, REFERENCE = "fastrcnn", "torchvision", "fastrcnn, reference operators"
MODELS = {
    "Faster R-CNN R-50-FPN": ("faster_rcnn_R_50_FPN.yaml", fasterrcnn_resnet50_fpn),
    "Mask R-CNN R-50-FPN": ("mask_rcnn_R_50_FPN.yaml", maskrcnn_resnet50_fpn),
}
OBJECTS = 10  # ground truth per image
MOST_PROPOSALS = 8  # that overlap one of them by more than half
ROUNDS = 10
REFERENCE_SECONDS = 150
SECONDS = {"cuda": 4.0, "cpu": 12.0}  # a case that would take longer is measured in fewer rounds, but in 3 at least


@dataclass(frozen=True)
class Case:
    """detections: so many are found in the first image, by the choice of the score threshold; None: the default
    threshold. dtype "bfloat16" and "float16" are autocast."""

    model: str
    mode: str
    batch: int = 1
    height: int = 800
    width: int = 1333
    dtype: str = "bfloat16"
    detections: int | None = None

    def __str__(self) -> str:
        found = "" if self.detections is None else f", {self.detections} detections"
        return f"{self.model} {self.mode}, {self.batch} × {self.height}×{self.width}, {self.dtype}{found}"


GPU_CASES = [Case(model, mode, batch) for model in MODELS for mode in ("training", "inference") for batch in (1, 2, 8)]
CPU_CASES = [
    *(Case("Mask R-CNN R-50-FPN", "inference", 1, 800, 1067, "float32", found) for found in (100, 5)),
    Case("Mask R-CNN R-50-FPN", "training", 1, 320, 427, "float32"),
]


def photos(count: int, height: int, width: int) -> list[Tensor]:
    """Smooth noise as uint8 RGB [3, height, width]: structure of 32 pixels, the same for the same index."""
    found = []
    for index in range(count):
        noise = torch.rand(1, 3, height // 32, width // 32, generator=torch.Generator().manual_seed(index))
        smooth = nn.functional.interpolate(noise, size=(height, width), mode="bicubic").clamp(0, 1)
        found.append((smooth[0] * 255).round().byte())
    return found


def config(case: Case, threshold: float = 0.05) -> Config:
    """torchvision's model as a config of ours. The learning rate is too small to leave the random weights."""
    settings = f"MODEL.DEVICE {DEVICE.type} MODEL.RESNETS.FROZEN_BN_EPS 1e-5 SOLVER.BASE_LR 1e-7 DTYPE {case.dtype}"
    path = ROOT / "fastrcnn" / "configs" / "torchvision" / MODELS[case.model][0]
    return fastrcnn.load_config(path, [*settings.split(), "MODEL.ROI_HEADS.SCORE_THRESH", str(threshold)])


def image_batch(case: Case) -> fastrcnn.ImageBatch:
    size = (case.height, case.width)
    return fastrcnn.ImageBatch.from_tensors(photos(case.batch, *size), [size] * case.batch, config(case)).to(DEVICE)


def autocast(case: Case) -> torch.autocast:
    return torch.autocast(DEVICE.type, getattr(torch, case.dtype), enabled=case.dtype != "float32")


class Ours:
    """fastrcnn's model as its engine trains it and tests with it."""

    def __init__(self, case: Case):
        cfg = config(case, score_threshold(case))
        self.model = fastrcnn.build_model(cfg).train(case.mode == "training")
        fastrcnn.weights.load(self.model, random_weights(case.model, case.height, case.width))
        self.images = image_batch(case)
        if case.mode == "training":
            self.optimizer = make_optimizer(cfg, self.model)
            boxlists = []
            for boxes, labels, outlines in ground_truth(case):
                boxlist = fastrcnn.BoxList(boxes, (case.width, case.height))
                boxlist.add_field("labels", labels)
                if cfg.MODEL.MASK_ON:
                    masks = fastrcnn.SegmentationMask([[outline] for outline in outlines], boxlist.size)
                    boxlist.add_field("masks", masks)
                boxlists.append(boxlist)
            self.targets = fastrcnn.TargetBatch.from_boxlists(boxlists, self.images)

    def losses(self) -> dict[str, Tensor]:
        return self.model(self.images, self.targets)

    def detections(self) -> fastrcnn.DetectionBatch:
        return self.model(self.images)

    def on_host(self, detections: fastrcnn.DetectionBatch) -> list[dict[str, Tensor]]:
        found = []
        for boxlist in detections.to_boxlists():
            fields = {"boxes": boxlist.bbox, "scores": boxlist.get_field("scores")}
            found.append(fields | {"labels": boxlist.get_field("labels")})
        return found


class Theirs:
    """torchvision's model, channels_last, on the same padded batch, without its `transform` and its pasting of masks.

    Its norms are nn.BatchNorm2d with constant statistics: FrozenBatchNorm2d gives the same values, but turns bfloat16
    activations into float32 ones.
    """

    def __init__(self, case: Case):
        self.model = loaded_model(case)
        self.model.roi_heads.score_thresh = score_threshold(case)
        self.model.to(memory_format=torch.channels_last).train(case.mode == "training")
        self.images = as_image_list(image_batch(case))
        self.targets = None
        body = self.model.backbone.body
        for module in (body.conv1, body.layer1):  # as with pretrained weights, and as in ours
            module.requires_grad_(False)
        for norm in batch_norms(self.model):
            norm.eval().requires_grad_(False)
        if case.mode == "training":
            trained = [p for p in self.model.parameters() if p.requires_grad]
            solver = config(case).SOLVER
            self.optimizer = torch.optim.SGD(
                trained, lr=solver.BASE_LR, momentum=solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY, fused=True
            )
            self.targets = []
            for boxes, labels, outlines in ground_truth(case):
                target = {"boxes": boxes, "labels": labels}
                if self.model.roi_heads.has_mask():
                    target["masks"] = torch.cat([bitmap(outline, case.height, case.width) for outline in outlines])
                self.targets.append({name: value.to(DEVICE) for name, value in target.items()})

    def _heads(self) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        return forward(self.model, self.images, self.targets)

    def losses(self) -> dict[str, Tensor]:
        return self._heads()[1]

    def detections(self) -> list[dict[str, Tensor]]:
        return self._heads()[0]

    def on_host(self, detections: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return [{name: value.cpu() for name, value in found.items()} for found in detections]


def bitmap(outline: Tensor, height: int, width: int) -> Tensor:
    """The inside of a polygon [V, 2] as uint8 [1, height, width]."""
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).polygon([tuple(point) for point in outline.tolist()], fill=1)
    return pil_to_tensor(image)


def as_image_list(batch: fastrcnn.ImageBatch) -> ImageList:
    return ImageList(batch.pixels, [tuple(size) for size in batch.sizes.tolist()])


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def torchvision_model(name: str) -> nn.Module:
    return MODELS[name][1](weights=None, weights_backbone=None)


def loaded_model(case: Case) -> nn.Module:
    """torchvision's on the device, for evaluation, with the weights of the case."""
    model = torchvision_model(case.model)
    model.load_state_dict(random_weights(case.model, case.height, case.width))
    return model.to(DEVICE).eval()


def forward(
    model: nn.Module, images: ImageList, targets: list[dict[str, Tensor]] | None = None
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """torchvision's detector between its `transform` and its pasting of masks -> detections, losses."""
    features = model.backbone(images.tensors)
    proposals, rpn_losses = model.rpn(images, features, targets)
    detections, losses = model.roi_heads(features, proposals, images.image_sizes, targets)
    return detections, losses | rpn_losses


@cache
@torch.no_grad()
def random_weights(name: str, height: int, width: int) -> dict[str, Tensor]:
    """Weights in torchvision's names that detect something in `photos`.

    Batch norms are calibrated on the first photo, and the outputs of the heads scaled to a deviation at which some
    hundred pairs of region and class pass the default threshold of 0.05, as with trained weights.
    """
    torch.manual_seed(0)
    images = as_image_list(image_batch(Case(name, "inference", 1, height, width)))
    model = torchvision_model(name).to(DEVICE).eval()
    for norm in batch_norms(model):
        norm.momentum = 1.0
    model.backbone.train()(images.tensors)
    model.eval()
    heads = model.roi_heads.box_predictor
    for layer, deviation in ((model.rpn.head.cls_logits, 1.0), (heads.cls_score, 3.0), (heads.bbox_pred, 1.0)):
        scale_output(layer, deviation, lambda: forward(model, images))
    return {key: value.cpu() for key, value in model.state_dict().items()}


@torch.no_grad()
def score_threshold(case: Case) -> float:
    """By which as many are detected in the first image as the case wants."""
    if case.detections is None:
        return 0.05
    model = loaded_model(case)
    scores = forward(model, as_image_list(image_batch(replace(case, batch=1))))[0][0]["scores"].tolist()
    return 0.05 if len(scores) == case.detections else (scores[case.detections - 1] + scores[case.detections]) / 2


@cache
@torch.no_grad()
def ground_truth(case: Case) -> list[tuple[Tensor, Tensor, list[Tensor]]]:
    """Per image: boxes [10, 4], labels [10], outlines 10 × [24, 2], ellipses.

    The boxes are proposals that some others overlap: random weights do not gather proposals round objects, and heads
    that find no positives would have little to do. Not too many: while all positives of an image are drawn, the losses
    of the boxes do not depend on chance, and `check_agreement` can compare them.
    """
    model = loaded_model(case)
    images = as_image_list(image_batch(case))
    found = []
    for index, proposals in enumerate(model.rpn(images, model.backbone(images.tensors))[0]):
        sides = proposals[:, 2:] - proposals[:, :2]
        overlap = box_iou(proposals, proposals)
        crowd = (overlap > 0.5).sum(1) * (sides.amin(1) > 16)
        crowd[crowd > MOST_PROPOSALS] = 0
        chosen = []
        for _ in range(OBJECTS):
            chosen.append(int(crowd.argmax()))
            crowd[overlap[chosen[-1]] > 0.3] = 0
        boxes = proposals[chosen].cpu()
        labels = torch.randint(1, 91, (OBJECTS,), generator=torch.Generator().manual_seed(index))
        found.append((boxes, labels, [ellipse(box) for box in boxes]))
    return found


def ellipse(box: Tensor) -> Tensor:
    """The largest in a box, as a polygon [24, 2]."""
    angles = torch.arange(24) / 24 * 2 * torch.pi
    unit = torch.stack([angles.cos(), angles.sin()], 1)
    return (box[:2] + box[2:]) / 2 + unit * (box[2:] - box[:2]) / 2


def scale_output(layer: nn.Module, deviation: float, run: Callable[[], Any]) -> None:
    """Scale a layer so that its output has this standard deviation."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, out: seen.append(out.flatten()))
    run()
    handle.remove()
    factor = deviation / torch.cat(seen).std()
    layer.weight.mul_(factor)
    layer.bias.mul_(factor)


def build(case: Case, provider: str) -> Ours | Theirs:
    return Theirs(case) if provider == THEIRS else Ours(case)


def on_device(work: Ours | Theirs, case: Case) -> Any:
    """One step as far as the device does it: the losses, after the update of the weights, or the detections."""
    if case.mode == "inference":
        with torch.inference_mode(), autocast(case):
            return work.detections()
    with autocast(case):
        losses = work.losses()
    values = torch.stack([loss.float() for loss in losses.values()])
    work.optimizer.zero_grad(set_to_none=True)
    values.sum().backward()
    work.optimizer.step()
    return values.detach()


def step(work: Ours | Theirs, case: Case) -> Any:
    """One step with what a loop around it needs of it: the detections on the host; the losses stay on the device."""
    result = on_device(work, case)
    return work.on_host(result) if case.mode == "inference" else result


def check(work: Ours | Theirs, case: Case, provider: str) -> None:
    """Raises unless a step gives finite numbers and, with our operators on a GPU, never waits for the device."""
    if DEVICE.type == "cuda":
        step(work, case)  # compiles, and fills the allocator
    if DEVICE.type == "cuda" and provider == OURS:
        timing.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            on_device(work, case)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    result = step(work, case)
    values = [result] if case.mode == "training" else [v for found in result for v in found.values()]
    for value in values:
        if not value.isfinite().all():
            raise FloatingPointError(f"{provider}: {case}: a result is not finite: {value}")


@cache
def check_agreement(case: Case) -> None:
    """Raises unless ours and torchvision's give the same in float32: detections, or losses of the boxes.

    Detections: rounding decides which of two overlapping boxes with equal scores stays, so 98 in 100 have to agree.
    Losses: those that do not depend on which negatives are drawn.
    """
    case = replace(case, dtype="float32")
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        ours, theirs = Ours(case), Theirs(case)
        if case.mode == "training":
            want = theirs.losses()
            for name, loss in ours.losses().items():
                if name.endswith("box_reg"):
                    torch.testing.assert_close(loss, want[name], rtol=1e-3, atol=0, msg=lambda m, n=name: f"{n}: {m}")
            return
        for got, want in zip(step(ours, case), step(theirs, case), strict=True):
            if len(got["scores"]) != len(want["scores"]) or case.detections not in (None, len(got["scores"])):
                raise AssertionError(f"{case}: {len(got['scores'])} detections, torchvision's {len(want['scores'])}")
            same = (got["labels"][:, None] == want["labels"]) & (got["scores"][:, None] - want["scores"]).abs().lt(1e-3)
            same &= (got["boxes"][:, None] - want["boxes"]).abs().amax(2) < 0.1
            if same.any(1).float().mean() < 0.98:
                raise AssertionError(f"{case}: only {same.any(1).sum()} of {len(same)} detections are torchvision's")
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def measure(case: Case, provider: str) -> tuple[dict[str, Any], list[float]]:
    """The `extra_info` of a result, and the seconds of each step.

    peak_mib: all that the provider holds at most: weights, images, activations, gradients, momentum.
    """
    timing.release()
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    seconds = time_steps(build(case, provider), case, provider)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if DEVICE.type == "cuda" else None
    timing.release()
    milliseconds = timing.spread([1e3 * value for value in seconds])
    info = {"kind": "step", **asdict(case), "provider": provider, "device": DEVICE.type, "ms": milliseconds}
    return info | {"images_per_s": 1e3 * case.batch / milliseconds["median"], "peak_mib": peak}, seconds


def time_steps(work: Ours | Theirs, case: Case, provider: str) -> list[float]:
    """The seconds of each step, after `check`. On a GPU the steps follow each other as in a loop, with an event between
    them, and are waited for once at the end."""
    check(work, case, provider)
    rounds = max(3, min(ROUNDS, int(SECONDS[DEVICE.type] / timing.seconds(lambda: step(work, case)))))
    if DEVICE.type == "cpu":
        return [timing.seconds(lambda: step(work, case)) for _ in range(rounds)]
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        step(work, case)
        event.record()
    timing.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def measure_reference() -> dict[Case, tuple[dict[str, Any], list[float]]]:
    """`measure` of our models on the reference operators, in another process; {"error": …} for a case that failed."""
    environment = os.environ | {"FASTRCNN_KERNELS": "reference"}
    command = [sys.executable, "-m", "benchmarks.steps"]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=REFERENCE_SECONDS)
        output, reason = done.stdout, done.stderr.decode()[-2000:]
    except subprocess.TimeoutExpired as error:
        output, reason = error.stdout or b"", f"not measured within {REFERENCE_SECONDS} s"
    lines = output.decode().splitlines()
    found = [json.loads(line) for line in lines]
    return dict(zip_longest(GPU_CASES, found, fillvalue=({"error": reason}, [])))


def main() -> None:
    for case in GPU_CASES:
        try:
            result = measure(case, REFERENCE)
        except (RuntimeError, FloatingPointError) as error:  # out of memory is a RuntimeError
            result = {"error": f"{type(error).__name__}: {error}"}, []
            timing.release()
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
