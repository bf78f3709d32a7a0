"""Detects what is in a photo with an exported detector: needs torch, torchvision and Pillow, not fastrcnn.

python examples/run_exported.py model.pt2 photo.jpg
"""

import json
import sys
import zipfile

import torch
import torchvision  # its operators are in the file
from PIL import Image, ImageOps
from torch.nn.functional import interpolate, pad


def load(path):
    """(images, sizes) -> tensors, and what the file says about them; of torch.export or an AOTInductor package."""
    if any("/aotinductor/" in name for name in zipfile.ZipFile(path).namelist()):
        package = torch._inductor.aoti_load_package(path)
        return package, json.loads(package.get_metadata()["fastrcnn.json"])
    files = {"fastrcnn.json": ""}
    program = torch.export.load(path, extra_files=files)
    return program.module(), json.loads(files["fastrcnn.json"])


def new_size(height, width, facts):
    """The (height, width) at which the detector sees a photo."""
    short, long, low, high = min(height, width), max(height, width), facts["min_size"], facts["max_size"]
    if not facts["antialias"]:  # torchvision's way
        scale = min(low / short, high / long)
        return max(int(height * scale), 1), max(int(width * scale), 1)
    low = max(round(high * short / long), 1) if long / short * low > high else low
    other = int(low * long / short)
    return (low, other) if height <= width else (other, low)


@torch.inference_mode()
def detect(model, facts, image):
    """A PIL image -> {"boxes": [N, 4] xyxy in its pixels, "scores": [N], "labels": [N], …}, best first."""
    pixels = torchvision.transforms.functional.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    size = new_size(*pixels.shape[1:], facts)
    numbers = pixels if facts["antialias"] else pixels.float()  # as the detector's own resizing has them
    resized = interpolate(numbers[None], size, mode="bilinear", antialias=facts["antialias"]).round().byte()
    missing = [-side % facts["size_divisibility"] for side in size]
    images, sizes = pad(resized, (0, missing[1], 0, missing[0])), torch.tensor([size])
    found = dict(zip(facts["outputs"], model(images, sizes), strict=True))
    count = int(found.pop("count"))
    found = {name: value[0, :count] for name, value in found.items()}
    scale = torch.tensor([pixels.shape[2] / size[1], pixels.shape[1] / size[0]])
    last = torch.tensor([0.0, 0.0, 1.0, 1.0]) * facts["last_pixel"]
    found["boxes"] = (found["boxes"] - last) * scale.repeat(2) + last
    if "keypoints" in found:
        found["keypoints"][..., :2] *= scale
    return found


if __name__ == "__main__":
    model, facts = load(sys.argv[1])
    found = detect(model, facts, Image.open(sys.argv[2]))
    labels = found["labels"].tolist() if "labels" in found else ["proposal"] * len(found["scores"])
    for label, score, box in zip(labels, found["scores"], found["boxes"], strict=True):
        name = facts["categories"].get(str(label), label)
        print(f"{name} {score:.4f} at {', '.join(f'{side:.2f}' for side in box.tolist())}")
