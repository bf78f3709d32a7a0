"""What a detector costs: parameters, operations and memory by part, without computing; and how fast it is, by timing.

An operation is a multiplication, an addition, a comparison or a division, so a multiply-add is 2. Counted are
convolutions and matrix products, by the formulas of `torch.utils.flop_counter`, and the package's operators, by those
of this file; not the elementwise rest (activations, norms, losses), nor sorting, sampling and rasterising.
"""

import itertools
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastrcnn.config import Config
from fastrcnn.data import make_data_loader
from fastrcnn.engine import make_optimizer
from fastrcnn.engine.inference import autocast
from fastrcnn.models import build_model
from fastrcnn.structures import DetectionBatch, ImageBatch, PolygonBatch, TargetBatch

OBJECTS, EDGES = 8, 64  # of the ground truth that a training step is counted and timed with
PAIR = 14  # operations of an IoU test: 2 max, 2 min, 2 sub, 2 clamps, 1 mul, 2 for the union, 1 mul, 2 comparisons
ENCODE, DECODE, DECODE_AND_CLIP = 24, 26, 34  # of a box
FOCAL, FOCAL_BACKWARD = 30, 35  # of a logit
OPERATORS, OTHER = "operators", "other"


@dataclass(frozen=True)
class Cost:
    """flops: operations. memory, in bytes: of an inference the most that was alive at once, of a training step what is
    kept for its backward pass; beside parameters, buffers and the images. peak: the most that was alive at once, in a
    training step with the gradients of the parameters."""

    flops: int = 0
    memory: int = 0
    peak: int = 0


@dataclass(frozen=True)
class Part:
    """Of the model, by the names of its modules. `operators` are the package's own, whoever calls them; `other` is what
    no part does, such as the losses of the heads. bytes: of parameters and buffers."""

    name: str
    parameters: int = 0
    trainable: int = 0
    bytes: int = 0
    inference: Cost = field(default_factory=Cost)
    training: Cost | None = None


@dataclass(frozen=True)
class Analysis:
    """size: (height, width) of the images, padded: of the batch. total: all parts; its memory is that of the whole."""

    batch: int
    size: tuple[int, int]
    padded: tuple[int, int]
    dtype: str
    total: Part
    parts: list[Part]


def analyze(
    cfg: Config, batch: int = 1, size: tuple[int, int] | None = None, train: bool = False, depth: int = 0
) -> Analysis:
    """Parameters, operations and memory of the model of a config, by part, for one inference and, with `train`, one
    training step.

    Tensors have shapes and no values, so that the largest model takes seconds. size: (height, width) of an image; None
    is INPUT.MIN_SIZE_TEST × INPUT.MAX_SIZE_TEST. depth: levels of modules below the usual parts. Ground truth: 8
    objects an image, with outlines of 64 edges. What depends on the images is counted at its most: all slots of
    proposals and detections are filled, NMS compares every pair. Adaptive ROIAlign counts as 2 × 2 samples a bin.
    ValueError for a batch, size or depth that cannot be.
    """
    size = _checked_size(cfg, batch, size)
    if depth < 0:
        raise ValueError(f"depth must not be negative, got {depth}")
    with torch.device("meta"):
        model = build_model(cfg)
    with FakeTensorMode():
        _give_device(model)
        images = _images(cfg, batch, size)
        inference = _count(model, depth, lambda: _infer(cfg, model, images))
        training = None
        if train:
            targets = _targets(cfg, images)
            training = _count(model, depth, lambda: _losses(cfg, model, images, targets).backward())
    by_name = {name: Part(name) for name in _names(model, depth, inference, training)}
    for owner, module in model.named_modules():
        part = by_name[part_of(owner, depth)]
        own, buffers = list(module.parameters(recurse=False)), list(module.buffers(recurse=False))
        by_name[part.name] = replace(
            part,
            parameters=part.parameters + sum(p.numel() for p in own),
            trainable=part.trainable + sum(p.numel() for p in own if p.requires_grad),
            bytes=part.bytes + sum(t.nbytes for t in (*own, *buffers)),
        )
    parts = [
        replace(part, inference=inference.cost(name), training=training and training.cost(name))
        for name, part in by_name.items()
    ]
    total = Part(
        "total",
        *(sum(getattr(part, key) for part in parts) for key in ("parameters", "trainable", "bytes")),
        inference.total(inference.peak),
        training and training.total(sum(training.saved.values())),
    )
    return Analysis(batch, size, tuple(images.pixels.shape[2:]), cfg.DTYPE, total, [p for p in parts if _counts(p)])


def _checked_size(cfg: Config, batch: int, size: tuple[int, int] | None) -> tuple[int, int]:
    low, high = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    size = size or (low, max(low, high))
    if batch < 1 or min(size) < 1:
        raise ValueError(f"batch ({batch}) and size {size} must be positive")
    return size


def part_of(module: str, depth: int = 0) -> str:
    """The part that a module, named as in the state dict, belongs to: a stage of the backbone's body, its pyramid, the
    region proposal network, a head, or `depth` levels below."""
    names = module.split(".")
    level = 3 if names[:2] == ["backbone", "body"] else 2 if names[0] in ("backbone", "roi_heads") else 1
    return ".".join(names[: level + depth]) or OTHER


def _names(model: nn.Module, depth: int, *counts: "_Counter | None") -> list[str]:
    """Of all parts: in the order of the model, then the operators and the rest."""
    names = dict.fromkeys(part_of(name, depth) for name, _ in model.named_modules())
    names |= dict.fromkeys(name for count in counts if count for name in (*count.flops, *count.saved, *count.alive))
    last = [name for name in names if name.startswith(OPERATORS)]
    return [name for name in names if name not in last and name != OTHER] + [*last, OTHER]


def _counts(part: Part) -> bool:
    """Whether there is anything to tell of it."""
    kept = part.training and part.training.flops + part.training.memory
    return any((part.parameters, part.bytes, part.inference.flops, kept))


def _give_device(model: nn.Module) -> None:
    """Parameters and buffers of a model on "meta" become fake ones on the CPU, where autocast works."""
    for module in model.modules():
        for values in (module._parameters, module._buffers):
            for name, old in values.items():
                if old is not None:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)
                    values[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _images(cfg: Config, batch: int, size: tuple[int, int], device: torch.device | None = None) -> ImageBatch:
    """A batch of empty images of that size."""
    divisor = max(cfg.DATALOADER.SIZE_DIVISIBILITY, 1)
    height, width = (-(-side // divisor) * divisor for side in size)
    pixels = torch.zeros(batch, height, width, 3, device=device).permute(0, 3, 1, 2)  # channels_last
    sizes = torch.tensor([size] * batch, dtype=torch.int32, device=device)
    return ImageBatch(pixels, sizes, sizes.clone())


def _targets(cfg: Config, images: ImageBatch) -> TargetBatch:
    """OBJECTS of class 1 in each image, of sizes from the whole image down, with what the heads of the config learn."""
    device, (height, width) = images.pixels.device, images.pixels.shape[2:]
    sides = torch.tensor([height, width] * 2, device=device)
    share = 1 / torch.arange(1, OBJECTS + 1, device=device)[:, None]
    boxes = torch.cat([torch.zeros_like(share), torch.zeros_like(share), share, share], 1) * sides[[1, 0, 1, 0]]
    boxes = boxes.expand(len(images), -1, -1).clone()
    labels = torch.ones(len(images), OBJECTS, dtype=torch.int64, device=device)
    targets = TargetBatch(boxes, labels, torch.zeros_like(labels, dtype=torch.bool))
    if cfg.MODEL.MASK_ON:
        angle = torch.linspace(0, 2 * torch.pi, EDGES + 1, device=device)
        circle = torch.stack([angle.cos(), angle.sin()], 1) / 2 + 0.5  # [EDGES + 1, 2], in units of the box
        points = boxes[:, :, None, :2] + circle * (boxes[..., 2:] - boxes[..., :2])[:, :, None]
        edges = torch.cat([points[:, :, :-1], points[:, :, 1:]], 3)
        targets.polygons = PolygonBatch(edges, torch.zeros(edges.shape[:3], dtype=torch.int64, device=device), 1)
    if cfg.MODEL.KEYPOINT_ON:
        centre = (boxes[..., None, :2] + boxes[..., None, 2:]) / 2
        points = torch.cat([centre, torch.full_like(centre[..., :1], 2)], 3)
        targets.keypoints = points.repeat(1, 1, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES, 1)
    return targets


def _infer(cfg: Config, model: nn.Module, images: ImageBatch) -> DetectionBatch:
    # not inference_mode, in which counters see operators such as matmul before they are split into those with a formula
    with torch.no_grad(), autocast(cfg, images.pixels.device):
        return model.eval()(images)


def _losses(cfg: Config, model: nn.Module, images: ImageBatch, targets: TargetBatch) -> Tensor:
    with autocast(cfg, images.pixels.device):
        return sum(loss.float() for loss in model.train()(images, targets).values())


class _Counter(TorchDispatchMode):
    """Counts operations, tensors kept for the backward pass and tensors alive, each by the part that is running.

    In the backward pass that is the part whose saved tensors were unpacked last.
    """

    def __init__(self, model: nn.Module, depth: int):
        super().__init__()
        self.depth = depth
        self.running = [OTHER]
        self.flops: Counter[str] = Counter()
        self.saved: Counter[str] = Counter()  # bytes
        self.alive: dict[str, int] = {}  # the most bytes, while the part was running
        self.peak = self._now = 0
        weights = (t.untyped_storage() for t in (*model.parameters(), *model.buffers()))
        self._weights = weakref.WeakSet(weights)
        self._created: weakref.WeakSet = weakref.WeakSet()
        self._saved: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        part = self.running[-1]
        operator = func._overloadpacket
        if func.namespace == "fastrcnn":
            part = OPERATORS + (f".{operator.__name__.removesuffix('_backward')}" if self.depth else "")
        if operator in FORMULAS:
            self.flops[part] += FORMULAS[operator](out, *args)
        elif operator in flop_registry:
            self.flops[part] += flop_registry[operator](*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        self.alive[part] = max(self.alive.get(part, 0), self._now)
        self.peak = max(self.peak, self._now)
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._created and storage not in self._weights:
            self._created.add(storage)
            self._now += storage.nbytes()
            weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self._now -= size

    def pack(self, tensor: Tensor) -> tuple[str, Tensor]:
        storage = tensor.untyped_storage()
        if storage not in self._saved and storage not in self._weights:
            self._saved.add(storage)
            self.saved[self.running[-1]] += storage.nbytes()
        return self.running[-1], tensor

    def unpack(self, packed: tuple[str, Tensor]) -> Tensor:
        self.running[-1], tensor = packed
        return tensor

    def cost(self, part: str) -> Cost:
        alive = self.alive.get(part, 0)
        return Cost(self.flops[part], self.saved[part] if self.saved else alive, alive)

    def total(self, memory: int) -> Cost:
        return Cost(self.flops.total(), memory, self.peak)


def _count(model: nn.Module, depth: int, step: Callable[[], Any]) -> _Counter:
    counter = _Counter(model, depth)
    with (
        _followed(model, counter.running, depth),
        torch.autograd.graph.saved_tensors_hooks(counter.pack, counter.unpack),
        counter,
    ):
        step()
    model.zero_grad(set_to_none=True)
    return counter


@contextmanager
def _followed(model: nn.Module, running: list[str], depth: int) -> Iterator[None]:
    """The last of `running` is the part whose module is being called."""
    handles = []
    for name, module in model.named_modules():
        part = part_of(name, depth)
        handles.append(module.register_forward_pre_hook(lambda *_, part=part: running.append(part)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pairs(sets: int, count: int) -> int:
    """Operations of comparing every box of a set with those before it."""
    return sets * (count * (count - 1) // 2) * PAIR


def _roi_align(pooled: Tensor, sampling_ratio: int) -> int:
    """Four taps of each of the samples of a bin, a multiply-add each."""
    return 8 * pooled.numel() * (sampling_ratio if sampling_ratio > 0 else 2) ** 2


def _select_proposals(out: Any, logits: Sequence[Tensor], *rest: Any) -> int:
    pre_nms_top_n = rest[4]
    total = 0
    for level in logits:
        chosen = min(pre_nms_top_n, level[0].numel())
        total += level.numel() + len(level) * chosen * DECODE_AND_CLIP + _pairs(len(level), chosen)
    return total


def _decode(out: Tensor, deltas: Tensor, anchors: Tensor, sizes: Tensor | None, *rest: Any) -> int:
    clips = sizes is not None or rest[2] is not None
    return out.numel() // 4 * (DECODE_AND_CLIP if clips else DECODE)


def _decode_backward(out: Any, grad: Tensor, *rest: Any) -> int:
    return 2 * _decode(grad, *rest)


def _deform_conv(out: Tensor, x: Tensor, weight: Tensor, offset: Tensor, *_: Any) -> int:
    """Four taps for each value that the convolution reads, then the convolution."""
    places = len(out) * out.shape[2] * out.shape[3]
    return places * (8 * x.shape[1] * prod(weight.shape[2:]) + 2 * weight.numel())


_ours, _theirs = torch.ops.fastrcnn, torch.ops.torchvision
# operator -> operations, from its result and its arguments; backward passes not derived here count as two forward ones
FORMULAS: dict[Any, Callable[..., int]] = {
    _ours.multilevel_roi_align: lambda out, f, boxes, valid, size, scales, ratio, *_: _roi_align(out, ratio),
    _ours.multilevel_roi_align_backward: (
        lambda out, grad, boxes, valid, shapes, last, size, scales, ratio, *_: _roi_align(grad, ratio)
    ),
    _ours.nms: lambda out, boxes, *_: _pairs(1, len(boxes)),
    _ours.batched_nms: lambda out, boxes, *_: _pairs(1, len(boxes)),
    _ours.nms_padded: lambda out, boxes, *_: _pairs(*boxes.shape[:2]),
    _ours.soft_nms_padded: lambda out, boxes, *_: out[0].numel() * boxes.shape[1] * PAIR,
    _ours.select_proposals: _select_proposals,
    _ours.match_boxes: lambda out, boxes, gt, *_: out[0].numel() * gt.shape[1] * PAIR,
    _ours.grid_anchors: lambda out, *_: out.numel(),
    _ours.encode_boxes: lambda out, *_: out.numel() // 4 * ENCODE,
    _ours.encode_boxes_backward: lambda out, grad, *_: grad.numel() // 4 * 2 * ENCODE,
    _ours.decode_boxes: _decode,
    _ours.decode_boxes_backward: _decode_backward,
    _ours.focal_loss: lambda out, logits, *_: logits.numel() * FOCAL,
    _ours.focal_loss_backward: lambda out, grad, logits, *_: logits.numel() * FOCAL_BACKWARD,
    _theirs.deform_conv2d: _deform_conv,
    _theirs._deform_conv2d_backward: lambda out, grad, *rest: 2 * _deform_conv(grad, *rest),
}


@dataclass(frozen=True)
class Rate:
    """Images per second: median, and the 20th and 80th percentile of `count` measurements."""

    images_per_second: float
    p20: float
    p80: float
    count: int


def _rate(images: int, seconds: Sequence[float]) -> Rate:
    rates = sorted(images / s for s in seconds)
    at = [rates[round(share * (len(rates) - 1))] for share in (0.2, 0.8)]
    return Rate(statistics.median(rates), *at, len(rates))


def time_model(
    cfg: Config, batch: int = 1, size: tuple[int, int] | None = None, train: bool = False, seconds: float = 10.0
) -> Rate:
    """The model alone on MODEL.DEVICE, with random weights, on one batch that is there already: inference, or with
    `train` forward, backward and update.

    One step to warm up (three on a GPU), then for about `seconds`, at least three steps. batch, size: as of `analyze`.
    """
    size = _checked_size(cfg, batch, size)
    model = build_model(cfg)
    device = next(model.parameters()).device
    images = _images(cfg, batch, size, device)
    images.pixels.normal_(generator=torch.Generator(device).manual_seed(0))
    cfg = cfg.clone()
    cfg.SOLVER.BASE_LR = 0.0  # noise and random weights would soon give losses that are not finite
    optimizer = make_optimizer(cfg, model) if train else None
    targets = _targets(cfg, images) if train else None

    def step() -> None:
        if optimizer is None:
            _infer(cfg, model, images)
        else:
            optimizer.zero_grad(set_to_none=True)
            _losses(cfg, model, images, targets).backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3 if device.type == "cuda" else 1):
        step()
    return _rate(batch, list(_timed(step, seconds)))


def _timed(step: Callable[[], Any], seconds: float) -> Iterator[float]:
    """How long each call took, at least three."""
    end = time.perf_counter() + seconds
    for count in itertools.count():
        before = time.perf_counter()
        if count >= 3 and before > end:
            return
        step()
        yield time.perf_counter() - before


@dataclass(frozen=True)
class Loading:
    """batch: its images. read, transform, collate: seconds an image, on one thread: decoding it and reading its
    annotations, changing it, making it part of a batch. rates: by number of workers; 0 is the main process."""

    batch: int
    read: float
    transform: float
    collate: float
    rates: dict[int, Rate]


def time_data(cfg: Config, workers: Sequence[int] = (), seconds: float = 10.0) -> Loading:
    """The loading of DATASETS.TRAIN alone, in batches of SOLVER.IMS_PER_BATCH, nothing done with them.

    For each number of workers, by default DATALOADER.NUM_WORKERS, about `seconds` once the workers' queues are full, at
    least three times two batches a worker. DataError where a dataset cannot be used.
    """
    cfg = cfg.clone()
    cfg.SOLVER.MAX_ITER = 10**6  # more than are measured
    stages, batch = _stages(cfg, seconds)
    rates = {}
    for count in workers or (cfg.DATALOADER.NUM_WORKERS,):
        cfg.DATALOADER.NUM_WORKERS = count
        batches = iter(make_data_loader(cfg, is_train=True))
        queue = 2 * max(count, 1)  # what the workers prepare; they deliver in bursts, so one batch tells nothing

        def fetch(batches=batches, queue=queue) -> None:
            for _ in range(queue):
                next(batches)

        fetch()
        rates[count] = _rate(batch * queue, list(_timed(fetch, seconds)))
    return Loading(batch, *stages, rates)


def _stages(cfg: Config, seconds: float) -> tuple[list[float], int]:
    """Seconds an image of reading, transforming and collating, and the images of a batch."""
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = 0
    loader = make_data_loader(cfg, is_train=True).batches
    spent: Counter[str] = Counter()

    def clocked(name: str, function: Callable) -> Callable:
        def call(*args):
            before = time.perf_counter()
            try:
                return function(*args)
            finally:
                spent[name] += time.perf_counter() - before

        return call

    whole = loader.dataset.dataset
    for dataset in getattr(whole, "datasets", [whole]):
        dataset.transforms = clocked("transform", dataset.transforms)
    samples, collate = clocked("sample", loader.dataset.__getitem__), clocked("collate", loader.collate_fn)
    order, images = iter(loader.batch_sampler), 0
    end = time.perf_counter() + seconds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        while images == 0 or time.perf_counter() < end:
            places = next(order)
            images += len(places)
            collate([samples(place) for place in places])
    finally:
        torch.set_num_threads(threads)
    times = [spent["sample"] - spent["transform"], spent["transform"], spent["collate"]]
    return [t / images for t in times], len(places)
