"""torchvision's Faster R-CNN with the operators of fastrcnn: the same detections, both models measured in turn.

python examples/torchvision_swap.py                     random weights, a picture of noise
python examples/torchvision_swap.py --weights photo.jpg torchvision's weights, a photo
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, fasterrcnn_resnet50_fpn, roi_heads
from torchvision.models.detection.image_list import ImageList
from torchvision.transforms.functional import pil_to_tensor

import fastrcnn.ops as ops


class Proposals(nn.Module):
    """In the place of torchvision's RPN, for inference: its head, then one operator for all images and levels.

    torchvision decodes every anchor, and then goes from image to image; this decodes the anchors of the top-k alone.
    """

    def __init__(self, rpn: nn.Module):
        super().__init__()
        self.rpn = rpn.eval()

    def forward(self, images: ImageList, features: dict[str, Tensor], targets=None) -> tuple[list[Tensor], dict]:
        maps = list(features.values())
        logits, deltas = self.rpn.head(maps)
        height, width = images.tensors.shape[-2:]
        boxes, scores, valid = ops.select_proposals(
            logits,
            deltas,
            [cells.to(maps[0].device) for cells in self.rpn.anchor_generator.cell_anchors],
            [(height // m.shape[2], width // m.shape[3]) for m in maps],
            torch.tensor(images.image_sizes, device=maps[0].device),
            pre_nms_top_n=self.rpn.pre_nms_top_n(),
            post_nms_top_n=self.rpn.post_nms_top_n(),
            max_proposals=self.rpn.post_nms_top_n(),
            nms_threshold=self.rpn.nms_thresh,
            min_size=self.rpn.min_size,
        )
        valid = valid & (scores >= self.rpn.score_thresh)
        return [image[good] for image, good in zip(boxes, valid, strict=True)], {}


def swap(model: nn.Module) -> nn.Module:
    """A copy of the model with our operators."""
    model = deepcopy(model)
    model.rpn = Proposals(model.rpn)
    heads = model.roi_heads
    pool = heads.box_roi_pool
    heads.box_roi_pool = ops.MultiScaleRoIAlign(pool.featmap_names, pool.output_size, pool.sampling_ratio)
    coder = ops.BoxCoder(heads.box_coder.weights, heads.box_coder.bbox_xform_clip)
    heads.box_coder.decode_single = coder.decode
    return model


@contextmanager
def our_box_operators() -> Iterator[None]:
    """NMS, clipping and removal of small boxes, which the heads look up in their module: this concerns every model.

    In a program of your own, without torchvision's model beside it, this is the one line `roi_heads.box_ops = ops`.
    """
    theirs, roi_heads.box_ops = roi_heads.box_ops, ops
    try:
        yield
    finally:
        roi_heads.box_ops = theirs


@torch.no_grad()
def random_model(images: list[Tensor], size: int) -> nn.Module:
    """An untrained model that detects something: norms measured on the images, class scores spread out."""
    torch.manual_seed(0)
    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=size).to(images[0].device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.backbone.train()(model.transform(images)[0].tensors)
    model.eval()
    logits: list[Tensor] = []
    handle = model.roi_heads.box_predictor.cls_score.register_forward_hook(lambda *call: logits.append(call[-1]))
    model(images)
    handle.remove()
    model.roi_heads.box_predictor.cls_score.weight *= 3 / logits[0].std()
    return model


def check(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> int:
    """How many detections there are; AssertionError, with the difference, unless they are the same."""
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=0, atol=1e-4)
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=0, atol=0.05)  # pixels
    return sum(len(image["labels"]) for image in wanted)


def measure(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each call; the calls take turns, so that a drifting clock meets them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", help="images of one batch (default: one of noise)")
    parser.add_argument("--weights", action="store_true", help="download torchvision's trained weights")
    parser.add_argument("--size", type=int, default=800, help="shorter side in pixels (800)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each model (5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    images = [pil_to_tensor(Image.open(path).convert("RGB")).to(device) / 255 for path in args.photos]
    images = images or [
        torch.rand(3, args.size, args.size * 4 // 3, generator=torch.Generator().manual_seed(0)).to(device)
    ]
    if args.weights:
        weights = FasterRCNN_ResNet50_FPN_Weights.DEFAULT
        theirs = fasterrcnn_resnet50_fpn(weights=weights, min_size=args.size).to(device).eval()
    else:
        theirs = random_model(images, args.size)
    ours = swap(theirs)

    def run_ours() -> list[dict[str, Tensor]]:
        with our_box_operators():
            return ours(images)

    count = check(run_ours(), theirs(images))
    print(f"{count} detections, the same from both")
    times = measure({"torchvision": lambda: theirs(images), "with fastrcnn.ops": run_ours}, args.rounds, device)
    for name, milliseconds in times.items():
        print(f"{name:<18}{milliseconds:9.1f} ms")
    print(f"ratio {times['torchvision'] / times['with fastrcnn.ops']:.2f}")


if __name__ == "__main__":
    main()
