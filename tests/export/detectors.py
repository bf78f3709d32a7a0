"""Small detectors of random weights that find something, and what exported ones are compared with."""

import torch
from config.small import small
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms.functional import pil_to_tensor

import fastrcnn
from fastrcnn.export import outputs

CATEGORIES = {1: "disc", 2: "a bar"}  # not of every label
SPREAD = {"cls_logits": 1.0, "bbox_pred": 0.3, "cls_score": 2.0, "kps_score_lowres": 2.0}
WITHIN = {"boxes": 0.05, "scores": 1e-4, "masks": 1e-4, "keypoints": 0.05, "keypoint_scores": 1e-3}


@torch.no_grad()
def detector(name, *overrides):
    """The recipe as a small model whose scores and boxes are spread on noise: (cfg, model)."""
    cfg = small(name)
    cfg.merge_from_list(["MODEL.ROI_HEADS.SCORE_THRESH", "0.3", "MODEL.RETINANET.INFERENCE_TH", "0.3", *overrides])
    model = fastrcnn.build_model(cfg).eval()
    noise = fastrcnn.ImageBatch.from_images([torch.randint(256, (3, 128, 160), dtype=torch.uint8)], cfg)
    for path, layer in model.named_modules():
        deviation = SPREAD.get(path.rpartition(".")[2])
        if deviation:
            rare = cfg.MODEL.RETINANET_ON and path.endswith("cls_logits")
            spread(layer, deviation, -3.0 if rare else 0.0, lambda: model(noise))
    return cfg, model


def spread(layer, deviation, mean, run):
    """Scale and shift a layer so that each channel of its output, whenever `run` calls it, has this mean, and all
    together this deviation."""
    seen = []
    handle = layer.register_forward_hook(lambda _, __, out: seen.append(out.transpose(0, 1).flatten(1)))
    run()
    handle.remove()
    values = torch.cat(seen, 1)
    factor = deviation / (values - values.mean(1, keepdim=True)).std()
    layer.bias.copy_((layer.bias - values.mean(1)) * factor + mean)
    layer.weight.mul_(factor)


def photos(test_data, sides):
    """uint8 RGB photos [3, h, w] of these (h, w)."""
    paths = sorted((test_data / "coco_open" / "val2017").glob("*.jpg"))
    images = [pil_to_tensor(Image.open(path).convert("RGB"))[None] for path in paths[: len(sides)]]
    return [interpolate(i, size, mode="bilinear", antialias=True)[0] for i, size in zip(images, sides, strict=True)]


def as_inputs(images, cfg):
    """Images [3, h, w] of their final size as inputs of an exported model, and as the batch of the model itself."""
    batch = fastrcnn.ImageBatch.from_tensors(images, [tuple(i.shape[1:]) for i in images], cfg)
    pixels = torch.randint(256, batch.pixels.shape, dtype=torch.uint8)  # the padding may hold anything
    for slot, image in zip(pixels, images, strict=True):
        slot[:, : image.shape[1], : image.shape[2]] = image
    return (pixels, batch.sizes.long()), batch


@torch.no_grad()
def assert_same(cfg, model, exported, images):
    """`exported` finds in the images what `model` finds; returns the numbers of detections."""
    inputs, batch = as_inputs(images, cfg)
    got, want = dict(zip(outputs(cfg), exported(*inputs), strict=True)), model(batch)
    assert got["count"].dtype == torch.int64
    counts = want.count.tolist()
    assert got["count"].tolist() == counts
    for image, count in enumerate(counts):
        if "labels" in got:
            assert torch.equal(got["labels"][image, :count], want.labels[image, :count])
        for name in got.keys() & WITHIN:
            mine, theirs = got[name][image, :count], getattr(want, name)[image, :count]
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=WITHIN[name])
    return counts
