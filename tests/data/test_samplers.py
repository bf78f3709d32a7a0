from collections import Counter
from itertools import chain, islice

import pytest

from fastrcnn.data.samplers import DistributedSampler, GroupedBatchSampler, IterationBasedBatchSampler


def test_ranks_share_every_epoch_between_them():
    samplers = [DistributedSampler(10, 3, rank, seed=5) for rank in range(3)]
    orders = []
    for epoch in (0, 1):
        parts = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            parts.append(list(sampler))
        assert [len(part) for part in parts] == [4, 4, 4] == [len(sampler) for sampler in samplers]
        counts = Counter(chain.from_iterable(parts))
        assert set(counts) == set(range(10))
        assert max(counts.values()) == 2  # 12 places for 10 images
        orders.append(parts)
    assert orders[0] != orders[1]


def test_order_depends_on_seed_and_epoch_only():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = DistributedSampler(50, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_without_shuffling_and_with_fewer_images_than_ranks():
    assert list(DistributedSampler(6, 2, 1, shuffle=False)) == [3, 4, 5]
    assert [list(DistributedSampler(2, 5, rank, shuffle=False)) for rank in range(5)] == [[0], [1], [0], [1], [0]]
    with pytest.raises(ValueError, match="rank is 2; there are 2"):
        DistributedSampler(6, 2, 2)


# the cases of maskrcnn-benchmark's own test of this class, worked out by its rule
@pytest.mark.parametrize(
    ("order", "groups", "drop_uneven", "want"),
    [
        (range(5), [0] * 5, False, [[0, 1], [2, 3], [4]]),
        (range(5), [0] * 5, True, [[0, 1], [2, 3]]),
        (range(10), [0] * 5 + [1] * 5, False, [[0, 1], [2, 3], [4], [5, 6], [7, 8], [9]]),
        (range(10), [0, 1] * 5, False, [[0, 2], [1, 3], [4, 6], [5, 7], [8], [9]]),
        ([5, 3, 2, 7, 0], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0], False, [[5, 3], [2, 7], [0]]),
    ],
)
def test_groups_keep_the_order(order, groups, drop_uneven, want):
    sampler = GroupedBatchSampler(order, groups, 2, drop_uneven)
    assert list(sampler) == want
    assert len(sampler) == len(want)


@pytest.mark.parametrize("start", [0, 1, 4, 7, 23])
def test_resuming_continues_the_sequence(start):
    def batches(start_iter: int) -> IterationBasedBatchSampler:
        groups = [i % 3 == 0 for i in range(11)]
        grouped = GroupedBatchSampler(DistributedSampler(11, 2, 1, seed=4), groups, 2)
        return IterationBasedBatchSampler(grouped, 25, start_iter)

    whole = list(batches(0))
    assert len(whole) == len(batches(0)) == 25
    assert list(batches(start)) == whole[start:]
    assert len(batches(start)) == 25 - start


def test_every_epoch_shows_every_image_once():
    grouped = GroupedBatchSampler(DistributedSampler(7, seed=1), [0] * 7, 2)
    batches = iter(IterationBasedBatchSampler(grouped, 1000))
    epochs = [list(chain.from_iterable(islice(batches, 4))) for _ in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_no_batches_is_an_error_not_an_endless_loop():
    grouped = GroupedBatchSampler(range(2), [0, 1], 2, drop_uneven=True)
    with pytest.raises(ValueError, match="no batch in a whole epoch"):
        list(IterationBasedBatchSampler(grouped, 3))
