"""Datasets, one file for each layout."""

from fastrcnn.data.datasets.abstract import AbstractDataset, DataError, SampleError, read_image
from fastrcnn.data.datasets.cityscapes import CityScapesDataset
from fastrcnn.data.datasets.coco import COCO_CATEGORIES, COCODataset
from fastrcnn.data.datasets.concat import ConcatDataset
from fastrcnn.data.datasets.voc import VOC_CLASSES, PascalVOCDataset

__all__ = [
    "COCO_CATEGORIES",
    "VOC_CLASSES",
    "AbstractDataset",
    "COCODataset",
    "CityScapesDataset",
    "ConcatDataset",
    "DataError",
    "PascalVOCDataset",
    "SampleError",
    "read_image",
]
