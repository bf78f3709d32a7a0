"""Which images come when. Each order follows from seed, epoch and rank alone, so that a resumed run continues it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count

import torch
from torch.utils.data import Sampler


class DistributedSampler(Sampler[int]):
    """One process' share of range(length): shuffled anew in each epoch, in equal parts, the last filled from the start.

    `set_epoch` chooses the epoch.
    """

    def __init__(self, length: int, num_replicas: int = 1, rank: int = 0, shuffle: bool = True, seed: int = 0) -> None:
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank is {rank}; there are {num_replicas} processes")
        self.length = length
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.num_samples = -(-length // num_replicas)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        indices = torch.arange(self.length)
        if self.shuffle:
            # distinct for every (seed, epoch): seed 0 in epoch 1 is not seed 1 in epoch 0
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
            indices = torch.randperm(self.length, generator=generator)
        places = torch.arange(self.rank * self.num_samples, (self.rank + 1) * self.num_samples)
        return iter(indices[places % max(self.length, 1)].tolist())

    def __len__(self) -> int:
        return self.num_samples


class GroupedBatchSampler(Sampler[list[int]]):
    """Batches whose images are of one group, in the sampler's order as far as that allows.

    A batch takes the place of its first image. The last batch of a group may be smaller, unless drop_uneven.
    """

    def __init__(
        self, sampler: Iterable[int], group_ids: Sequence[int], batch_size: int, drop_uneven: bool = False
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; want at least 1")
        self.sampler = sampler
        self.group_ids = torch.as_tensor(group_ids).tolist()
        self.batch_size = batch_size
        self.drop_uneven = drop_uneven

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def _batches(self) -> list[list[int]]:
        batches: list[list[int]] = []
        open_batches: dict[int, list[int]] = {}
        for index in self.sampler:
            group = self.group_ids[index]
            if len(open_batches.get(group, ())) in (0, self.batch_size):
                open_batches[group] = []
                batches.append(open_batches[group])
            open_batches[group].append(index)
        if self.drop_uneven:
            batches = [batch for batch in batches if len(batch) == self.batch_size]
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())

    def __len__(self) -> int:
        return len(self._batches())


class IterationBasedBatchSampler(Sampler[list[int]]):
    """Batches number start_iter … num_iterations − 1 of an endless sequence of epochs.

    Starting at start_iter gives what a run from 0 gives from there on.
    """

    def __init__(self, batch_sampler: GroupedBatchSampler, num_iterations: int, start_iter: int = 0) -> None:
        self.batch_sampler = batch_sampler
        self.num_iterations = num_iterations
        self.start_iter = start_iter

    def __iter__(self) -> Iterator[list[int]]:
        iteration = 0
        for epoch in count():
            self.batch_sampler.set_epoch(epoch)
            before = iteration
            for batch in self.batch_sampler:
                if iteration >= self.num_iterations:
                    return
                if iteration >= self.start_iter:
                    yield batch
                iteration += 1
            if iteration == before:
                raise ValueError("no batch in a whole epoch: the dataset is empty or smaller than a batch")

    def __len__(self) -> int:
        return max(self.num_iterations - self.start_iter, 0)
