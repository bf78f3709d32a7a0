"""Several datasets as one."""

from __future__ import annotations

import bisect
from typing import Any

from torch.utils.data import ConcatDataset as TorchConcatDataset

from fastrcnn.data.datasets.abstract import DataError


class ConcatDataset(TorchConcatDataset):
    """Datasets one after another; those that name their categories must agree on them, else a DataError."""

    def __init__(self, datasets: list[Any]) -> None:
        super().__init__(datasets)
        known = [dataset for dataset in self.datasets if hasattr(dataset, "categories")]
        for other in known[1:]:
            if other.categories != known[0].categories:
                raise DataError(
                    f"datasets with different categories cannot be joined: {known[0].categories} and {other.categories}"
                )
        if known:
            self.categories = known[0].categories

    def get_idxs(self, index: int) -> tuple[int, int]:
        """(which dataset, index in it)."""
        dataset = bisect.bisect_right(self.cumulative_sizes, index)
        return dataset, index - (self.cumulative_sizes[dataset - 1] if dataset else 0)

    def get_img_info(self, index: int) -> dict[str, Any]:
        dataset, inner = self.get_idxs(index)
        return self.datasets[dataset].get_img_info(inner)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        dataset, inner = self.get_idxs(index)
        image, target, _ = self.datasets[dataset][inner]
        return image, target, index
