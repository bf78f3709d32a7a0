"""A user's own dataset, written by nothing but the contract: `__getitem__`, `__len__`, `get_img_info`."""

import torch
from PIL import Image

from fastrcnn.data import AbstractDataset
from fastrcnn.structures import BoxList


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
        target = BoxList([self.box], (40, 30))
        target.add_field("labels", torch.tensor([self.label]))
        image, target = self.transforms(Image.new("RGB", (40, 30), (index, 0, 0)), target)
        return image, target, index


class Untransformed(Squares):
    def __getitem__(self, index: int):
        return Image.new("RGB", (40, 30)), BoxList([self.box], (40, 30)), index


class Unlabelled(Squares):
    def __getitem__(self, index: int):
        return torch.zeros(3, 30, 40, dtype=torch.uint8), BoxList([self.box], (40, 30)), index
