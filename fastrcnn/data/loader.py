"""From datasets to batches: which images, in which process, in which order, made of which random numbers."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastrcnn.data.catalog import build_dataset
from fastrcnn.data.datasets import ConcatDataset, DataError, SampleError
from fastrcnn.data.datasets.abstract import IMAGE_ERRORS
from fastrcnn.data.samplers import DistributedSampler, GroupedBatchSampler, IterationBasedBatchSampler
from fastrcnn.data.transforms import build_transforms
from fastrcnn.structures import BoxList, ImageBatch, TargetBatch

logger = logging.getLogger(__name__)
_LEAST_SIDE = 1e-3  # pixels; resizing leaves less of a box that only touches the image


class Loader:
    """An iterable of batches with `dataset` and `dataset_name`.

    A bad file raises its SampleError, a DataError, here, also when a worker process met it.
    """

    def __init__(self, batches: DataLoader, dataset: Any, dataset_name: str) -> None:
        self.batches = batches
        self.dataset = dataset
        self.dataset_name = dataset_name

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if isinstance(batch, SampleError):
                raise batch
            yield batch

    def __len__(self) -> int:
        return len(self.batches)


@overload
def make_data_loader(
    cfg: Any, is_train: Literal[True], start_iter: int = 0, rank: int = 0, world_size: int = 1
) -> Loader: ...


@overload
def make_data_loader(
    cfg: Any, is_train: Literal[False], start_iter: int = 0, rank: int = 0, world_size: int = 1
) -> list[Loader]: ...


def make_data_loader(
    cfg: Any, is_train: bool, start_iter: int = 0, rank: int = 0, world_size: int = 1
) -> Loader | list[Loader]:
    """The batches of DATASETS.TRAIN or DATASETS.TEST.

    Training: one Loader of (ImageBatch, TargetBatch, ids) over all datasets, from start_iter to SOLVER.MAX_ITER.
    Testing: for each dataset one Loader of (ImageBatch, ids); with TEST.BBOX_AUG.ENABLED of (images, ids), uint8
    [3, h, w] as they are in the files.

    Of world_size processes each gets its own part: in training equal ones, in testing every image once. Order and
    augmentation depend on SEED, iteration and image alone: not on the number of workers, nor on where a run resumed.
    `fastrcnn.engine.train` replaces a SEED of −1 by one from the clock; here it is 0.

    DataError, here or while iterating: a missing or broken file; a dataset that is unknown, empty or of another number
    of classes; images that do not divide among the processes; an item of your own dataset of another form than
    `AbstractDataset` says. Its boxes with NaN, without area or outside the image are left out, with a warning.
    """
    key = "DATASETS.TRAIN" if is_train else "DATASETS.TEST"
    names = cfg.DATASETS.TRAIN if is_train else cfg.DATASETS.TEST
    if not names:
        raise DataError(f"{key} is empty: name at least one dataset")
    batch_size = images_per_process(cfg, is_train, world_size)
    transforms = build_transforms(cfg, is_train)
    datasets = [build_dataset(cfg, name, is_train, transforms) for name in names]
    for name, dataset in zip(names, datasets, strict=True):
        check_num_classes(cfg, name, dataset)
    seed = max(cfg.SEED, 0)
    if is_train:
        dataset = datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)
        sampler = DistributedSampler(len(dataset), world_size, rank, shuffle=True, seed=seed)
        groups = [0] * len(dataset)
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            groups = [int(ratio >= 1) for ratio in _aspect_ratios(dataset, names)]
        batches = GroupedBatchSampler(sampler, groups, batch_size)
        batches = IterationBasedBatchSampler(batches, cfg.SOLVER.MAX_ITER, start_iter)
        return _loader(cfg, dataset, names, batches, True, start_iter, seed)
    loaders = []
    for name, dataset in zip(names, datasets, strict=True):
        order = list(range(len(dataset)))
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING:  # images of like shape need less padding
            order.sort(key=_aspect_ratios(dataset, [name]).__getitem__)
        mine = order[rank::world_size]
        batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
        loaders.append(_loader(cfg, dataset, [name], batches, False, 0, seed))
    return loaders


def images_per_process(cfg: Any, is_train: bool, world_size: int) -> int:
    """SOLVER.IMS_PER_BATCH or TEST.IMS_PER_BATCH, divided by the number of processes, which must come out even."""
    key = "SOLVER.IMS_PER_BATCH" if is_train else "TEST.IMS_PER_BATCH"
    images = cfg.SOLVER.IMS_PER_BATCH if is_train else cfg.TEST.IMS_PER_BATCH
    if images < 1 or images % world_size:
        raise DataError(f"{key} is {images}; it must be a multiple of the number of processes, {world_size}")
    return images // world_size


def _classes_key(cfg: Any) -> tuple[str, int] | None:
    """The key that tells the number of classes, and the number; None for a model without classes."""
    if cfg.MODEL.RETINANET_ON:  # the original's recipes set RPN_ONLY as well
        return "MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES
    if cfg.MODEL.RPN_ONLY:
        return None
    return "MODEL.ROI_BOX_HEAD.NUM_CLASSES", cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES


def check_num_classes(cfg: Any, name: str, dataset: Any) -> None:
    """DataError unless the model has the dataset's categories and the background."""
    wanted = _classes_key(cfg)
    if wanted is None or not hasattr(dataset, "categories"):
        return
    key, number = wanted
    last = max(dataset.categories, default=0)
    if number != last + 1:
        raise DataError(
            f"{key} is {number}; dataset {name!r} has {len(dataset.categories)} categories, the last with label "
            f"{last}, so it must be {last + 1} (with the background)"
        )


def _aspect_ratios(dataset: Any, names: Sequence[str]) -> list[float]:
    sizes = (_image_size(dataset, names, index) for index in range(len(dataset)))
    return [height / width for height, width in sizes]


def _place(dataset: Any, names: Sequence[str], index: int) -> tuple[str, int]:
    """The name of the dataset that holds an item, which may be one of several joined, and the item's number in it."""
    which, inner = dataset.get_idxs(index) if isinstance(dataset, ConcatDataset) else (0, index)
    return names[which], inner


def _image_size(dataset: Any, names: Sequence[str], index: int) -> tuple[int, int]:
    """(height, width) of an image in its file."""
    name, item = _place(dataset, names, index)
    try:
        info = dataset.get_img_info(index)
    except IMAGE_ERRORS as error:
        raise DataError(f"dataset {name!r}, item {item}: get_img_info failed: {error}") from None
    with contextlib.suppress(KeyError, TypeError):
        height, width = info["height"], info["width"]
        if 1 <= height < math.inf and 1 <= width < math.inf:
            return int(height), int(width)
    raise DataError(
        f"dataset {name!r}, item {item}: get_img_info gave {info!r}; want the image's height and width in pixels"
    )


def _loader(
    cfg: Any,
    dataset: Any,
    names: Sequence[str],
    batches: Iterable[list[int]],
    is_train: bool,
    start_iter: int,
    seed: int,
) -> Loader:
    workers, name = cfg.DATALOADER.NUM_WORKERS, "+".join(names)
    loader = DataLoader(
        _Samples(dataset, names, seed, _classes_key(cfg)),
        batch_sampler=_Numbered(batches, start_iter),
        num_workers=workers,
        collate_fn=_Collator(cfg, name, is_train),
        pin_memory=torch.cuda.is_available() and cfg.MODEL.DEVICE != "cpu",
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(seed),  # of the workers' own seeds, for datasets with other generators
    )
    return Loader(loader, dataset, name)


class _Numbered:
    """Batches of (number of the batch, index of the image)."""

    def __init__(self, batches: Iterable[list[int]], start: int) -> None:
        self.batches = batches
        self.start = start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number, batch in enumerate(self.batches, self.start):
            yield [(number, index) for index in batch]

    def __len__(self) -> int:
        return len(self.batches)


class _Samples(Dataset):
    """A dataset as the loader reads it: each sample with its own seed, checked; an error in the data is returned, not
    raised, as it would come out of a worker process wrapped in that one's stack trace."""

    def __init__(self, dataset: Any, names: Sequence[str], seed: int, classes: tuple[str, int] | None) -> None:
        self.dataset = dataset
        self.names = names
        self.seed = seed
        self.classes = classes
        self.warned: set[str] = set()  # names of datasets

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, BoxList, int, tuple[int, int]] | SampleError:
        number, index = place
        state = torch.get_rng_state()
        sample_seed = np.random.SeedSequence([self.seed, number, index]).generate_state(1)[0]
        torch.default_generator.manual_seed(int(sample_seed))
        try:
            size = _image_size(self.dataset, self.names, index)
            image, target, _ = self.dataset[index]
            target = self._checked(index, image, target)
        except DataError as error:
            return SampleError(str(error))
        except IMAGE_ERRORS as error:
            name, item = _place(self.dataset, self.names, index)
            return SampleError(f"dataset {name!r}, item {item}: cannot be read: {error}")
        finally:
            torch.set_rng_state(state)
        return image, target, index, size

    def _checked(self, index: int, image: Any, target: Any) -> BoxList:
        """The target without the boxes that nothing can be learnt from."""
        name, item = _place(self.dataset, self.names, index)
        where = f"dataset {name!r}, item {item}"
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            shape = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise DataError(f"{where}: the image is {shape}; want uint8 [3, h, w], as `transforms` gives it")
        if not isinstance(target, BoxList) or not target.has_field("labels"):
            raise DataError(f"{where}: the target is {target!r}; want a BoxList with the field labels")
        labels = torch.as_tensor(target.get_field("labels"))
        key, number = self.classes or ("", torch.iinfo(torch.int64).max)
        if len(labels) and not (labels.min() >= 1 and labels.max() < number):
            raise DataError(f"{where}: labels are {labels.tolist()}; want 1 to {key} - 1 = {number - 1}")
        finite = target.bbox.isfinite().all(1)
        sized = (target.convert("xywh").bbox[:, 2:] > _LEAST_SIDE).all(1)
        inside = (target.clip_to_image(remove_empty=False).convert("xywh").bbox[:, 2:] > _LEAST_SIDE).all(1)
        good = finite & sized & inside
        if good.all():
            return target
        if name not in self.warned:
            self.warned.add(name)
            first = int(good.int().argmin())
            reason = (
                "NaN or infinity" if not finite[first] else "no area" if not sized[first] else "no part in the image"
            )
            logger.warning(
                "%s: box %d is left out, it has %s; later ones of this dataset are not reported", where, first, reason
            )
        return target[good]


class _Collator:
    """Samples → (ImageBatch, TargetBatch, ids), in testing (ImageBatch, ids), with augmentation (uint8 images, ids)."""

    def __init__(self, cfg: Any, name: str, is_train: bool) -> None:
        self.cfg = cfg
        self.name = name
        self.is_train = is_train
        self.fields = ["labels", "iscrowd"]
        self.fields += ["masks"] if cfg.MODEL.MASK_ON else []
        self.fields += ["keypoints"] if cfg.MODEL.KEYPOINT_ON else []

    def __call__(self, samples: list[Any]) -> Any:
        for sample in samples:
            if isinstance(sample, SampleError):
                return sample
        images, targets, ids, original_sizes = zip(*samples, strict=True)
        if not self.is_train and self.cfg.TEST.BBOX_AUG.ENABLED:
            return images, ids
        batch = ImageBatch.from_tensors(images, original_sizes, self.cfg)
        if not self.is_train:
            return batch, ids
        for index, target in zip(ids, targets, strict=True):
            for field in self.fields[2:]:
                if len(target) and not target.has_field(field):
                    key = "MODEL.MASK_ON" if field == "masks" else "MODEL.KEYPOINT_ON"
                    return SampleError(f"{key} is set, but dataset {self.name!r} has no {field} (item {index})")
        # only what the model learns from: unused outlines would cost copies, and their sizes new shapes
        targets = [target.copy_with_fields(self.fields, skip_missing=True).clip_to_image() for target in targets]
        return batch, TargetBatch.from_boxlists(targets, batch), ids
