"""A user's own dataset, written by nothing but the contract: `__getitem__`, `__len__`, `get_img_info`."""

import torch
from PIL import Image

from fastrcnn.data import AbstractDataset
from fastrcnn.structures import BoxList, SegmentationMask


class Squares(AbstractDataset):
    CLASSES = ("__background__", "dark", "light")

    def __init__(self, count: int = 6, label: int = 2, box=(2, 3, 20, 21), transforms=None) -> None:
        super().__init__()
        self.count, self.label, self.box, self.transforms = count, label, box, transforms

    def __len__(self) -> int:
        return self.count

    def get_img_info(self, index: int) -> dict[str, int]:
        return {"height": 30, "width": 40}

    def __getitem__(self, index: int):
        boxes = self.box if isinstance(self.box[0], list) else [self.box]
        target = BoxList(boxes, (40, 30))
        target.add_field("labels", torch.tensor([self.label] * len(boxes)))
        image, target = self.transforms(Image.new("RGB", (40, 30), (index, 0, 0)), target)
        return image, target, index


class Absent(Squares):
    def __getitem__(self, index: int):
        return Image.open(f"absent{index}.png"), BoxList([self.box], (40, 30)), index


class Sized(Squares):
    def __init__(self, info, **arguments) -> None:
        super().__init__(**arguments)
        self.info = info

    def get_img_info(self, index: int):
        return self.info


class Rows(Squares):
    """Labels and masks tell the boxes apart: box k has label k % 2 + 1 and a mask from column k on."""

    def __getitem__(self, index: int):
        target = BoxList(self.box, (40, 30))
        target.add_field("labels", torch.arange(len(self.box)) % 2 + 1)
        outlines = [[[k, 3, 30, 3, 30, 20]] for k in range(len(self.box))]
        target.add_field("masks", SegmentationMask(outlines, (40, 30)))
        image, target = self.transforms(Image.new("RGB", (40, 30)), target)
        return image, target, index


class Untransformed(Squares):
    def __getitem__(self, index: int):
        return Image.new("RGB", (40, 30)), BoxList([self.box], (40, 30)), index


class Unlabelled(Squares):
    def __getitem__(self, index: int):
        return torch.zeros(3, 30, 40, dtype=torch.uint8), BoxList([self.box], (40, 30)), index
