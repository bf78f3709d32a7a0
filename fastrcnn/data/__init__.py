"""Datasets, and the way from files to batches."""

from fastrcnn.data.catalog import DatasetCatalog, build_dataset
from fastrcnn.data.datasets import (
    AbstractDataset,
    CityScapesDataset,
    COCODataset,
    ConcatDataset,
    DataError,
    PascalVOCDataset,
    SampleError,
    read_image,
)
from fastrcnn.data.loader import Loader, check_num_classes, make_data_loader
from fastrcnn.data.samplers import DistributedSampler, GroupedBatchSampler, IterationBasedBatchSampler
from fastrcnn.data.transforms import build_transforms

__all__ = [
    "AbstractDataset",
    "COCODataset",
    "CityScapesDataset",
    "ConcatDataset",
    "DataError",
    "DatasetCatalog",
    "DistributedSampler",
    "GroupedBatchSampler",
    "IterationBasedBatchSampler",
    "Loader",
    "PascalVOCDataset",
    "SampleError",
    "build_dataset",
    "build_transforms",
    "check_num_classes",
    "make_data_loader",
    "read_image",
]
