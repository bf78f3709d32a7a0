"""Keypoints of the instances of one image."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastrcnn.structures.boxlist import FLIP_LEFT_RIGHT, as_index, check_flip, crop_window, take


class Keypoints:
    """K keypoints of each of N instances.

    keypoints: float32 [N, K, 3], (x, y, visibility): continuous pixels as in boxes (the centre of the first pixel is
    0.5), visibility 0 not labelled (x = y = 0), 1 hidden, 2 visible. size: (width, height). flip_map: for each
    keypoint the index of its mirror image (left eye ↔ right eye), or None if mirroring changes no name.
    """

    def __init__(
        self, keypoints: Tensor | Sequence, size: tuple[int, int], flip_map: Sequence[int] | None = None
    ) -> None:
        keypoints = torch.as_tensor(keypoints, dtype=torch.float32)
        if keypoints.ndim != 3 or keypoints.shape[2] != 3:
            raise ValueError(f"keypoints have shape {list(keypoints.shape)}; want [N, K, 3]")
        if flip_map is not None and sorted(flip_map) != list(range(keypoints.shape[1])):
            raise ValueError(f"flip_map {list(flip_map)} is no permutation of {keypoints.shape[1]} keypoints")
        self.keypoints = keypoints
        self.size = (int(size[0]), int(size[1]))
        self.flip_map = None if flip_map is None else list(flip_map)

    def _like(self, keypoints: Tensor, size: tuple[int, int] | None = None) -> Keypoints:
        result = copy.copy(self)
        visible = keypoints[..., 2:] > 0
        result.keypoints = torch.where(visible, keypoints, 0)
        result.size = self.size if size is None else (int(size[0]), int(size[1]))
        return result

    def resize(self, size: tuple[int, int]) -> Keypoints:
        """Keypoints of the image scaled to size (width, height)."""
        scale = self.keypoints.new_tensor([size[0] / self.size[0], size[1] / self.size[1], 1])
        return self._like(self.keypoints * scale, size)

    def transpose(self, method: int) -> Keypoints:
        """Keypoints of the mirrored image. Either mirroring makes a left hand a right one, so both apply flip_map."""
        check_flip(method)
        keypoints = self.keypoints if self.flip_map is None else self.keypoints[:, self.flip_map]
        x, y, visibility = keypoints.unbind(2)
        if method == FLIP_LEFT_RIGHT:
            x = self.size[0] - x
        else:
            y = self.size[1] - y
        return self._like(torch.stack((x, y, visibility), 2))

    def crop(self, box: Sequence[float]) -> Keypoints:
        """Keypoints of a window of the image (rounded to whole pixels); those outside are no longer labelled."""
        x1, y1, x2, y2 = crop_window(box, self.size)
        x, y, visibility = self.keypoints.unbind(2)
        inside = (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)
        visibility = torch.where(inside, visibility, 0)
        return self._like(torch.stack((x - x1, y - y1, visibility), 2), (x2 - x1, y2 - y1))

    def to(self, device: torch.device | str) -> Keypoints:
        return self._like(self.keypoints.to(device))

    @classmethod
    def cat(cls, parts: Sequence[Keypoints]) -> Keypoints:
        """All instances of several Keypoints of one image."""
        return parts[0]._like(torch.cat([part.keypoints for part in parts]))

    def __getitem__(self, index: int | slice | Sequence | Tensor) -> Keypoints:
        return self._like(take(self.keypoints, as_index(index)))

    def __len__(self) -> int:
        return self.keypoints.shape[0]

    def __repr__(self) -> str:
        n, k, _ = self.keypoints.shape
        return f"{type(self).__name__}({n} instances of {k} keypoints, image {self.size[0]}x{self.size[1]})"


def flip_map_of(names: Sequence[str]) -> list[int]:
    """For each keypoint name the index of its mirror image: names that contain left ↔ right and exist."""
    swap = {name: index for index, name in enumerate(names)}

    def mirror(name: str) -> str:
        return "right".join(part.replace("right", "left") for part in name.split("left"))

    return [swap.get(mirror(name), index) for index, name in enumerate(names)]


class PersonKeypoints(Keypoints):
    """The 17 keypoints of a person in COCO. keypoints: float32 [N, 17, 3]."""

    NAMES: ClassVar[tuple[str, ...]] = (
        "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
        "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
        "right_ankle",
    )  # fmt: skip
    FLIP_MAP: ClassVar[tuple[int, ...]] = tuple(flip_map_of(NAMES))

    def __init__(self, keypoints: Tensor | Sequence, size: tuple[int, int]) -> None:
        super().__init__(keypoints, size, self.FLIP_MAP)
