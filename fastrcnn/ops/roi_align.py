"""ROIAlign: the mean of bilinear samples in each cell of a grid over each box, from one or from many feature levels."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.fx
import torchvision  # noqa: F401 (loads torch.ops.torchvision)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastrcnn.ops._library import (
    below_autograd,
    check_floating,
    check_one_device,
    needs_grad,
    register,
    register_composite,
)
from fastrcnn.ops.reference import roi_align as reference
from fastrcnn.ops.reference.roi_align import Regions, compute_dtype, is_channels_last, memory_format

_SETTINGS = (
    "SymInt[] output_size, float[] scales, int sampling_ratio, bool aligned, float canonical_size, "
    "int canonical_level, bool last_pixel=False"
)
_TAPS_PER_CHUNK = 1 << 18  # forward: keeps the taps and their result in the cache
_TAPS_PER_SORT = 1 << 22  # backward: each sort writes a whole map, so fewer of them
_FEW_CHANNELS = 16


def _fake(features, boxes, valid, output_size, *rest):
    count = boxes.shape[0] * boxes.shape[1] if boxes.ndim == 3 else boxes.shape[0]
    out = features[0].new_empty((count, features[0].shape[1], *output_size))
    return torch.empty_like(out, memory_format=memory_format(is_channels_last(features[0])))


def _fake_backward(grad, boxes, valid, shapes, channels_last, *rest, dtype=None):
    levels = (grad.new_empty(shapes[i : i + 4], dtype=dtype) for i in range(0, len(shapes), 4))
    return [torch.empty_like(level, memory_format=memory_format(channels_last)) for level in levels]


def _cpu(features, boxes, valid, output_size, scales, sampling_ratio, aligned, *canonical):
    """Weighted sums of whole pixels: each tap reads all channels at once, where torchvision's loop reads one number."""
    dtype = compute_dtype(features[0].dtype)
    boxes = boxes.to(dtype)
    settings = output_size, scales, sampling_ratio, aligned, *canonical
    regions = reference.locate([feature.shape for feature in features], boxes, valid, *settings)
    out = _fake(features, boxes, valid, output_size)
    if not regions.usable.all():
        out.zero_()
    format_ = memory_format(is_channels_last(features[0]))
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        rows = _rows_of_level(regions, level)
        if not len(rows) or not out.numel():
            continue
        if _suits_torchvision(regions, rows, output_size, feature.shape, is_channels_last(feature)):
            rois = _torchvision_rois(regions, boxes, rows, *canonical[2:])
            arguments = rois, scale, *output_size, sampling_ratio, aligned
            out[rows] = torch.ops.torchvision.roi_align(feature.to(dtype), *arguments).to(out.dtype)
            continue
        table = feature.permute(0, 2, 3, 1).to(dtype).flatten(0, 2).contiguous()
        for chunk, index, weight in _chunks(regions, rows, output_size, sampling_ratio):
            part = reference.gather(table, index, weight).view(-1, *output_size, feature.shape[1])
            out[chunk] = part.permute(0, 3, 1, 2).to(out.dtype).contiguous(memory_format=format_)
    return out


def _cpu_backward(grad, boxes, valid, shapes, channels_last, output_size, scales, sampling_ratio, aligned, *canonical):
    dtype = compute_dtype(grad.dtype)
    boxes = boxes.to(dtype)
    levels = [tuple(shapes[i : i + 4]) for i in range(0, len(shapes), 4)]
    regions = reference.locate(levels, boxes, valid, output_size, scales, sampling_ratio, aligned, *canonical)
    grads = _fake_backward(grad, boxes, valid, shapes, channels_last)
    for level, (out, shape, scale) in enumerate(zip(grads, levels, scales, strict=True)):
        rows = _rows_of_level(regions, level)
        if not len(rows) or not out.numel():
            out.zero_()
            continue
        part = grad if len(rows) == len(grad) else grad[rows]
        part = part.to(dtype)
        if _suits_torchvision(regions, rows, output_size, shape, channels_last):
            rois = _torchvision_rois(regions, boxes, rows, *canonical[2:])
            arguments = rois, scale, *output_size, *shape, sampling_ratio, aligned
            out.copy_(torch.ops.torchvision._roi_align_backward(part.contiguous(), *arguments))
            continue
        batch, channels, height, width = shape
        total = None
        for piece in _pieces(regions, rows, output_size):
            taps = reference.flat_taps(regions.select(rows[piece]), output_size, sampling_ratio)
            grad_rows = part[piece].permute(0, 2, 3, 1).flatten(0, 2).contiguous()
            added = reference.scatter(grad_rows, *taps, batch * height * width)
            total = added if total is None else total.add_(added)
        out.copy_(total.view(batch, height, width, channels).permute(0, 3, 1, 2))
    return grads


def _rows_of_level(regions: Regions, level: int) -> Tensor:
    return ((regions.level == level) & regions.usable).nonzero().flatten()


def _chunks(regions: Regions, rows: Tensor, output_size: Sequence[int], ratio: int):
    """(rows, their taps) in pieces of about _TAPS_PER_CHUNK taps."""
    for samples, group in reference.same_grid(regions, rows, ratio):
        taps_of_box = 4 * math.prod(samples) * math.prod(output_size)
        for chunk in group.split(max(_TAPS_PER_CHUNK // max(taps_of_box, 1), 1)):
            yield chunk, *reference.taps(regions.select(chunk), output_size, samples)


def _pieces(regions: Regions, rows: Tensor, output_size: Sequence[int]) -> list[slice]:
    """Slices of `rows` with about _TAPS_PER_SORT taps each."""
    count = math.ceil(4 * _samples(regions, rows, output_size) / _TAPS_PER_SORT)
    step = math.ceil(len(rows) / max(count, 1))
    return [slice(first, first + step) for first in range(0, len(rows), step)]


def _samples(regions: Regions, rows: Tensor, output_size: Sequence[int]) -> int:
    return (regions.y.samples[rows] * regions.x.samples[rows]).sum().item() * math.prod(output_size)


def _suits_torchvision(regions: Regions, rows: Tensor, output_size, shape, channels_last: bool) -> bool:
    """Whether torchvision's operator is faster: contiguous maps that have few channels or are hardly read.

    Limits measured on two cores. It does not limit adaptive grids, so it gets no box to which that matters.
    """
    if channels_last:
        return False
    y, x = regions.y.select(rows), regions.x.select(rows)
    limited = ((y.samples == y.extent) & (y.step > y.samples)) | ((x.samples == x.extent) & (x.step > x.samples))
    batch, channels, height, width = shape
    hardly_read = 2 * _samples(regions, rows, output_size) < batch * height * width
    return (channels < _FEW_CHANNELS or hardly_read) and not limited.any()


def _torchvision_rois(regions: Regions, boxes: Tensor, rows: Tensor, last_pixel: bool = False) -> Tensor:
    corners = boxes.flatten(0, 1) if boxes.ndim == 3 else boxes[:, 1:]
    if last_pixel:
        corners = torch.cat([corners[:, :2], corners[:, 2:] - 1], 1)
    return torch.cat([regions.image[rows, None].to(boxes.dtype), corners[rows]], 1)


def _triton(features, boxes, valid, output_size, scales, sampling_ratio, aligned, size, level, last_pixel=False):
    from triton_kernels import roi_align as kernels

    # the kernels compute in float32 and take a fixed number of levels
    if features[0].dtype == torch.float64 or len(features) > kernels.MAX_LEVELS:
        rest = output_size, scales, sampling_ratio, aligned, size, level, last_pixel
        return reference.multilevel_roi_align(features, boxes, valid, *rest)
    out = _fake(features, boxes, valid, output_size)
    settings = scales, reference.level_thresholds(scales, size, level), float(last_pixel), sampling_ratio, aligned
    kernels.roi_align_forward(out, features, boxes, valid, *settings, channels_last=is_channels_last(features[0]))
    return out


def _triton_backward(
    grad, boxes, valid, shapes, channels_last, output_size, scales, ratio, aligned, size, level, last_pixel=False
):
    from triton_kernels import roi_align as kernels

    if grad.dtype == torch.float64 or len(scales) > kernels.MAX_LEVELS:  # as in the forward
        rest = output_size, scales, ratio, aligned, size, level, last_pixel
        return reference.multilevel_roi_align_backward(grad, boxes, valid, shapes, channels_last, *rest)
    thresholds = reference.level_thresholds(scales, size, level)
    settings = boxes, valid, scales, thresholds, float(last_pixel), ratio, aligned
    if torch.are_deterministic_algorithms_enabled():
        grads = _fake_backward(grad, boxes, valid, shapes, channels_last)
        kernels.roi_align_gather(grads, grad, *settings, channels_last=channels_last)
        return grads
    grads = _fake_backward(grad, boxes, valid, shapes, channels_last, dtype=torch.float32)
    torch._foreach_zero_(grads)
    kernels.roi_align_scatter(grads, grad, *settings, channels_last=channels_last)
    return [level.to(grad.dtype) for level in grads]


class _RoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, boxes, valid, settings, *features):  # features flat: lists are not tracked
        ctx.save_for_backward(boxes, valid)
        ctx.settings = settings
        ctx.shapes = [size for feature in features for size in feature.shape]
        ctx.channels_last = is_channels_last(features[0])
        with below_autograd():
            return _OP(features, boxes, valid, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, None, None, *_OP_BACKWARD(grad, *ctx.saved_tensors, ctx.shapes, ctx.channels_last, *ctx.settings)


def _autograd(features, boxes, valid, *settings):
    if needs_grad(*features):
        return _RoIAlign.apply(boxes, valid, settings, *features)
    with below_autograd():
        return _OP(features, boxes, valid, *settings)


_OP = register(
    f"multilevel_roi_align(Tensor[] features, Tensor boxes, Tensor? valid, {_SETTINGS}) -> Tensor",
    reference=reference.multilevel_roi_align,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    autograd=_autograd,
)
_OP_BACKWARD = register(
    "multilevel_roi_align_backward(Tensor grad, Tensor boxes, Tensor? valid, SymInt[] shapes, bool channels_last, "
    f"{_SETTINGS}) -> Tensor[]",
    reference=reference.multilevel_roi_align_backward,
    fake=_fake_backward,
    cpu=_cpu_backward,
    triton=_triton_backward,
)


def _single_level(input, rois, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned):
    size = [pooled_height, pooled_width]
    return _OP([input], rois, None, size, [spatial_scale], sampling_ratio, aligned, 224.0, 4)


_OP_SINGLE = register_composite(
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
    _single_level,
)


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    output_size: int | Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_size: float = 224,
    canonical_level: int = 4,
    valid: Tensor | None = None,
    last_pixel: bool = False,
) -> Tensor:
    """Pool each box from the feature level that suits its size (Lin et al., Feature Pyramid Networks, equation 1).

    features: L × [B, C, Hl, Wl], finest first. boxes: [B, R, 4] xyxy in image pixels, or [K, 5] with the image's index
    first. scales: feature pixels per image pixel of each level, not rising. output_size: bins, (height, width).
    sampling_ratio: samples per bin and axis; 0 or less takes one per pixel. aligned: as in `roi_align`. A box with
    √area = canonical_size belongs to level canonical_level, where a level is −log2(scale). valid: bool [B, R] or [K].
    last_pixel: the level is that of the box, the samples are those of (x1, y1, x2 − 1, y2 − 1): maskrcnn-benchmark's
    rule.

    On a GPU kernels serve float16, bfloat16 and float32 features of at most 5 levels. Their gradients are added
    atomically, or under `torch.use_deterministic_algorithms` gathered in a fixed order: equal inputs then give equal
    bits. Other features and everything without Triton take the PyTorch reference, which is slower and, with
    sampling_ratio ≤ 0 only, waits for the device to read the numbers of samples; nothing else waits.

    Returns [B · R or K, C, height, width] in the dtype and memory format of the features; channels_last is the fast
    one. Boxes that are not valid, not finite or of an image that is not there give zeros. Differentiable in the
    features. Raises ValueError if shapes, dtypes, devices or scales do not fit together.
    """
    if not features or len(features) != len(scales):
        raise ValueError(f"features and scales must be equally many, at least one: got {len(features)}, {len(scales)}")
    if min(scales) <= 0 or any(scales[i + 1] > scales[i] for i in range(len(scales) - 1)):
        raise ValueError(f"scales must be positive and not rise from level to level: got {list(scales)}")
    first = features[0]
    for index, feature in enumerate(features):
        if feature.ndim != 4 or feature.shape[:2] != first.shape[:2] or feature.dtype != first.dtype:
            raise ValueError(
                f"features[{index}] is {feature.dtype} {tuple(feature.shape)}; all must be [B, C, H, W] with B, C and "
                f"dtype of the first, which is {first.dtype} {tuple(first.shape)}"
            )
    padded = boxes.ndim == 3 and boxes.shape[2] == 4
    if not padded and not (boxes.ndim == 2 and boxes.shape[1] == 5):
        raise ValueError(f"boxes must be [B, R, 4] or [K, 5]: got {tuple(boxes.shape)}")
    if padded and boxes.shape[0] != first.shape[0]:
        raise ValueError(f"boxes are of {boxes.shape[0]} images and features of {first.shape[0]}")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != boxes.shape[:-1]):
        raise ValueError(f"valid must be bool {tuple(boxes.shape[:-1])}: got {valid.dtype} {tuple(valid.shape)}")
    check_floating(**{"features[0]": first}, boxes=boxes)
    check_one_device(**{f"features[{i}]": feature for i, feature in enumerate(features)}, boxes=boxes, valid=valid)
    canonical = float(canonical_size), canonical_level, last_pixel
    settings = [float(scale) for scale in scales], sampling_ratio, aligned, *canonical
    return _OP(list(features), boxes, valid, _pair(output_size), *settings)


@torch.fx.wrap  # symbolic tracing takes it as one function, as it takes torchvision's
def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """torchvision.ops.roi_align: ROIAlign of He et al., Mask R-CNN.

    input: [N, C, H, W]. boxes: [K, 5] (image, x1, y1, x2, y2) or N tensors [L, 4]. output_size: bins, (height, width)
    or one number for both. spatial_scale: input pixels per unit of the boxes. sampling_ratio: samples per bin and
    axis; 0 or less takes ⌈bin side⌉. aligned: shift by half a pixel, as detectron2 does; without it boxes are at least
    one pixel wide and high.

    Returns [K, C, height, width] in the dtype and memory format of the input; channels_last is the fast one. Computed
    in float32, or float64 for float64 input, for boxes of any floating dtype. Differentiable in the input. Boxes that
    are not finite or of an image that is not there give zeros. What waits for a GPU: see `multilevel_roi_align`.
    Raises AssertionError for boxes of another shape, RuntimeError for an input of another shape, for numbers that are
    not floating and for two devices.
    """
    rois = _to_rois(boxes)
    if input.ndim != 4:
        raise RuntimeError(f"input must be [N, C, H, W]: got {tuple(input.shape)}")
    check_floating(RuntimeError, input=input, boxes=rois)
    check_one_device(RuntimeError, input=input, boxes=rois)
    return _OP_SINGLE(input, rois, float(spatial_scale), *_pair(output_size), sampling_ratio, aligned)


def _to_rois(boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """[K, 5], or a list of [L, 4] per image -> [K, 5]."""
    if isinstance(boxes, Tensor):
        torch._assert(boxes.ndim == 2 and boxes.shape[1] == 5, f"boxes must be [K, 5]: got {tuple(boxes.shape)}")
        return boxes
    torch._assert(isinstance(boxes, (list, tuple)), f"boxes must be a tensor or a list of tensors: got {type(boxes)}")
    for index, part in enumerate(boxes):
        shape = tuple(part.shape)
        torch._assert(part.ndim == 2 and part.shape[1] == 4, f"boxes[{index}] must be [L, 4]: got {shape}")
    images = [torch.full_like(part[:, :1], index) for index, part in enumerate(boxes)]
    return torch.cat([torch.cat(images), torch.cat(list(boxes))], 1)


def _pair(size: int | Sequence[int]) -> list[int]:
    if isinstance(size, (list, tuple)):
        return [size[0], size[-1]]
    return [size, size]


class RoIAlign(nn.Module):
    """`roi_align` as a module, with the same arguments."""

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float, sampling_ratio: int, aligned: bool = False
    ):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """input [N, C, H, W], rois [K, 5] or N tensors [L, 4] -> [K, C, height, width].

        Raises AssertionError for rois of another shape.
        """
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )


class MultiScaleRoIAlign(nn.Module):
    """torchvision.ops.MultiScaleRoIAlign: pools each box from the level of a feature pyramid that suits its size.

    featmap_names: the keys of the pyramid to pool from. canonical_scale, canonical_level: a box with
    √area = canonical_scale belongs to level canonical_level, a level being −log2 of its scale. More than 5 levels work,
    but on a GPU without the kernel: see `multilevel_roi_align`.
    """

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
    ):
        super().__init__()
        self.featmap_names = featmap_names
        self.output_size = tuple(_pair(output_size))
        self.sampling_ratio = sampling_ratio
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level
        self.scales: list[float] | None = None

    def forward(self, x: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool from x, name -> [N, C, H, W], finest first.

        boxes: for each image [L, 4], xyxy in image pixels. image_shapes: (height, width) of each. The scales
        are powers of two, read off the first call's shapes. Returns [sum of L, C, height, width]. Raises ValueError for
        no image shapes and for features that `multilevel_roi_align` refuses, AssertionError for boxes not [L, 4].
        """
        features = [feature for name, feature in x.items() if name in self.featmap_names]
        if self.scales is None:
            if not image_shapes:
                raise ValueError("images list should not be empty")
            height = max(shape[0] for shape in image_shapes)
            self.scales = [2.0 ** round(math.log2(feature.shape[-2] / height)) for feature in features]
        settings = self.scales, self.sampling_ratio, False, self.canonical_scale, self.canonical_level
        return multilevel_roi_align(features, _to_rois(boxes), self.output_size, *settings)

    def extra_repr(self) -> str:
        return (
            f"featmap_names={self.featmap_names}, output_size={self.output_size}, sampling_ratio={self.sampling_ratio}"
        )
