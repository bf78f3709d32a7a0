"""Detects what is in a photo with a detector in ONNX: needs onnxruntime, NumPy and Pillow, neither fastrcnn nor torch.

python examples/run_onnx.py model.onnx photo.jpg
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def new_size(width, height, facts):
    """The (width, height) at which the detector sees a photo."""
    short, long, low, high = min(width, height), max(width, height), facts["min_size"], facts["max_size"]
    if not facts["antialias"]:  # torchvision's way
        scale = min(low / short, high / long)
        return max(int(width * scale), 1), max(int(height * scale), 1)
    low = max(round(high * short / long), 1) if long / short * low > high else low
    other = int(low * long / short)
    return (low, other) if width <= height else (other, low)


def detect(session, facts, image):
    """A PIL image -> {"boxes": [N, 4] xyxy in its pixels, "scores": [N], "labels": [N], …}, best first."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    width, height = new_size(*image.size, facts)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    missing = [(0, -side % facts["size_divisibility"]) for side in (height, width)]
    images = np.pad(pixels, (*missing, (0, 0))).transpose(2, 0, 1)[None]
    found = session.run(None, {"images": images, "sizes": np.array([[height, width]])})
    found = dict(zip(facts["outputs"], found, strict=True))
    count = found.pop("count")[0]
    found = {name: value[0, :count] for name, value in found.items()}
    scale, last = np.divide(image.size, (width, height)), np.array([0, 0, 1, 1]) * facts["last_pixel"]
    found["boxes"] = (found["boxes"] - last) * np.tile(scale, 2) + last
    if "keypoints" in found:
        found["keypoints"][..., :2] *= scale
    return found


if __name__ == "__main__":
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    facts = json.loads(session.get_modelmeta().custom_metadata_map["fastrcnn.json"])
    found = detect(session, facts, Image.open(sys.argv[2]))
    labels = found.get("labels", ["proposal"] * len(found["scores"]))
    for label, score, box in zip(labels, found["scores"], found["boxes"], strict=True):
        print(facts["categories"].get(str(label), label), f"{score:.4f}", " ".join(f"{side:.2f}" for side in box))
