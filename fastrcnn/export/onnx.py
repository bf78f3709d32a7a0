"""ONNX files that onnxruntime runs on the CPU, with detections equal to the model's.

What `fastrcnn.ops` does becomes ONNX's NonMaxSuppression, RoiAlign, TopK and Resize, so that a file needs no other
runtime than onnxruntime. The functions in `TRANSLATIONS` have the arguments of their operator, tensors being values of
the graph that is built.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrcnn.export.module import outputs
from fastrcnn.export.program import METADATA, export_program, metadata
from fastrcnn.extras import require
from fastrcnn.ops.reference.roi_align import level_thresholds

onnx, onnxscript, onnxruntime = (
    require(name, extra="export", why="an ONNX file") for name in ("onnx", "onnxscript", "onnxruntime")
)
# torch.onnx translates to opset 18 and converts to OPSET, the first with DeformConv
op, FLOAT, INT64 = onnxscript.opset18, onnxscript.FLOAT, onnxscript.INT64
OPSET = 19

Value = Any  # of the graph: a tensor that exists when the file runs
LOWEST = -3.4028234663852886e38  # the lowest finite float32; −∞ stays below


class ExportError(ValueError):
    """A model that ONNX or onnxruntime cannot represent; the message says what is missing."""


def export_onnx(cfg: Any, model: nn.Module, categories: Mapping[int, str], path: str | Path) -> None:
    """Writes a file with the inputs "images" and "sizes" and the outputs that `fastrcnn.export.outputs` names, as of
    `ExportModule`; batch, height and width are free. `METADATA` is among its metadata.

    ConfigError as of `export_program`; ExportError for an operator without translation, or that onnxruntime has not;
    ValueError unless the path ends in .onnx.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"{path}: the name must end in .onnx")
    translated = [operator for operator in TRANSLATIONS if operator.namespace == "fastrcnn"]
    try:
        program = torch.onnx.export(
            export_program(cfg, model, translated),
            dynamo=True,
            verbose=False,
            input_names=["images", "sizes"],
            output_names=outputs(cfg),
            opset_version=OPSET,
            custom_translation_table=TRANSLATIONS,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise ExportError(f"ONNX cannot hold this model: {reason}") from error
    file = program.model_proto
    _name_axes(file)
    onnx.helper.set_model_props(file, {METADATA: json.dumps(metadata(cfg, categories))})
    onnx.checker.check_model(file, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(file, path)
    load(path)


def _name_axes(file: Any) -> None:
    """Names for the free axes of inputs and outputs. Inside the graph they are inferred anew by whoever loads it: the
    exporter's own names are not right for what grows in a Loop."""
    images = file.graph.input[0].type.tensor_type.shape.dim
    names = {images[axis].dim_param: name for axis, name in ((0, "batch"), (2, "height"), (3, "width"))}
    for value in (*file.graph.input, *file.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = names.get(dim.dim_param, "detections")
    del file.graph.value_info[:]


def load(path: str | Path) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """A file of `export_onnx` as a function like `ExportModule`, on the CPU with as many threads as PyTorch has;
    ExportError for one that onnxruntime does not run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # idle threads would keep the processor from what runs next, PyTorch for instance
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise ExportError(f"{path}: onnxruntime {onnxruntime.__version__} does not run it: {error}") from error

    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        found = session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
        return tuple(torch.from_numpy(value) for value in found)

    return run


def _finite(x: Value) -> Value:
    return op.Less(op.Abs(x), math.inf)  # not true of NaN


def nms_padded(
    boxes: Value,
    scores: Value,
    iou_threshold: float,
    max_output: int,
    labels: Value | None = None,
    valid: Value | None = None,
) -> tuple[Value, Value]:
    """NonMaxSuppression takes sets as images and labels as classes: a box has its score in its own class and −∞, which
    is below the threshold of scores, in the others."""
    usable = op.And(_finite(op.ReduceSum(op.Abs(boxes), [2], keepdims=0)), _finite(scores))
    if valid is not None:
        usable = op.And(usable, valid)
    scores = op.Where(usable, scores, -math.inf)
    per_class = op.Unsqueeze(scores, [1])  # [S, C, N]
    if labels is not None:
        classes = op.Range(0, op.Add(op.ReduceMax(labels, keepdims=0), 1), 1)
        of_class = op.Equal(op.Unsqueeze(labels, [1]), op.Unsqueeze(classes, [0, 2]))
        per_class = op.Where(of_class, per_class, -math.inf)
    kept = op.NonMaxSuppression(boxes, per_class, [max_output], [iou_threshold], [LOWEST])  # [M, 3]: set, class, box
    place = op.Gather(kept, [0, 2], axis=1)
    nothing = op.Expand(-math.inf, op.Shape(scores))
    left = op.ScatterND(nothing, place, op.GatherND(scores, place))
    # TopK prefers the earlier of equal ones; padding allows for less than max_output boxes
    best, index = op.TopK(op.Pad(left, [0, 0, 0, max_output], -math.inf), [max_output])
    filled = op.Greater(best, -math.inf)
    count = op.ReduceSum(op.Cast(filled, to=6), [1], keepdims=0)  # 6 is int32
    return op.Where(filled, index, -1), count


def multilevel_roi_align(
    features: Sequence[Value],
    boxes: Value,
    valid: Value | None,
    output_size: Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_size: float,
    canonical_level: int,
    last_pixel: bool = False,
) -> Value:
    """RoiAlign of the boxes [B, R, 4] of each level, put back into their order; zeros where there is none."""
    shape = op.Shape(boxes, start=0, end=2)
    images = op.Range(0, op.Squeeze(op.Shape(boxes, start=0, end=1)), 1)
    image = op.Reshape(op.Expand(op.Unsqueeze(images, [1]), shape), [-1])
    corners = op.Reshape(boxes, [-1, 4])
    x1, y1, x2, y2 = op.Split(corners, axis=1, num_outputs=4)
    area = op.Squeeze(op.Mul(op.Sub(x2, x1), op.Sub(y2, y1)), [1])
    usable = _finite(op.ReduceSum(op.Abs(corners), [1], keepdims=0))
    if valid is not None:
        usable = op.And(usable, op.Reshape(valid, [-1]))
    if last_pixel:
        corners = op.Sub(corners, [0.0, 0.0, 1.0, 1.0])
    level = op.Mul(image, 0)
    for threshold in level_thresholds(scales, canonical_size, canonical_level):
        level = op.Add(level, op.Cast(op.GreaterOrEqual(area, threshold), to=7))  # 7 is int64
    places, pooled = [], []
    for index, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        rows = op.Reshape(op.NonZero(op.And(usable, op.Equal(level, index))), [-1])
        places.append(rows)
        pooled.append(
            op.RoiAlign(
                feature,
                op.Gather(corners, rows),
                op.Gather(image, rows),
                coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
                output_height=output_size[0],
                output_width=output_size[1],
                sampling_ratio=max(sampling_ratio, 0),
                spatial_scale=scale,
            )
        )
    bins = op.Constant(value_ints=list(output_size))
    size = op.Concat(op.Shape(image), op.Shape(features[0], start=1, end=2), bins, axis=0)
    rows = op.Unsqueeze(op.Concat(*places, axis=0), [1])
    return op.ScatterND(op.Expand(0.0, size), rows, op.Concat(*pooled, axis=0))


@onnxscript.script()
def first_maxima(heatmaps: FLOAT, rows: INT64, columns: INT64) -> tuple[INT64, FLOAT]:
    """heatmaps [N, K, S, S] resized to rows and columns, int64 [N]: index of the first maximum and its value [N, K]."""
    number, kinds = op.Shape(heatmaps, start=0, end=1), op.Shape(heatmaps, start=1, end=2)
    values = op.ConstantOfShape(op.Concat(op.Constant(value_ints=[0]), kinds, axis=0))
    places = op.Cast(values, to=7)
    for i in range(number):
        size = op.Concat(
            op.Constant(value_ints=[1]), kinds, op.Reshape(rows[i], [1]), op.Reshape(columns[i], [1]), axis=0
        )
        one = op.Unsqueeze(op.Gather(heatmaps, i), [0])
        # as torch.nn.functional.interpolate has it
        resized = op.Resize(
            one, None, None, size, mode="cubic", cubic_coeff_a=-0.75, coordinate_transformation_mode="half_pixel"
        )
        flat = op.Reshape(resized, [1, 0, -1])
        places = op.Concat(places, op.ArgMax(flat, axis=2, keepdims=0), axis=0)
        values = op.Concat(values, op.ReduceMax(flat, [2], keepdims=0), axis=0)
    return places, values


def heatmaps_to_keypoints(heatmaps: Value, boxes: Value, height: Value, width: Value) -> tuple[Value, Value]:
    """A Loop over the boxes, each of which has a size of its own to Resize to."""
    x1, y1, x2, y2 = op.Split(boxes, axis=1, num_outputs=4)
    sides = op.Concat(op.Sub(x2, x1), op.Sub(y2, y1), axis=1)
    sides = op.Where(op.GreaterOrEqual(sides, 1.0), sides, 1.0)
    limits = op.Cast(op.Concat(op.Reshape(width, [1]), op.Reshape(height, [1]), axis=0), to=1)
    counts = op.Min(op.Ceil(sides), limits)
    columns, rows = (op.Squeeze(c, [1]) for c in op.Split(op.Cast(counts, to=7), axis=1, num_outputs=2))
    place, scores = first_maxima(heatmaps, rows, columns)
    columns = op.Unsqueeze(columns, [1])
    place = op.Cast(op.Concat(*(op.Unsqueeze(f(place, columns), [2]) for f in (op.Mod, op.Div)), axis=2), to=1)
    scale = op.Unsqueeze(op.Div(sides, counts), [1])
    points = op.Add(op.Mul(op.Add(place, 0.5), scale), op.Unsqueeze(op.Concat(x1, y1, axis=1), [1]))
    return op.Pad(points, [0, 0, 0, 0, 0, 1], 1.0), scores


def deform_conv2d(
    x: Value,
    weight: Value,
    offset: Value,
    mask: Value,
    bias: Value,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Value:
    return onnxscript.opset19.DeformConv(
        x,
        weight,
        offset,
        bias,
        mask if use_mask else None,
        strides=[stride_h, stride_w],
        pads=[pad_h, pad_w, pad_h, pad_w],
        dilations=[dilation_h, dilation_w],
        group=groups,
        offset_group=offset_groups,
    )


def _as(x: Value, number: Value | float) -> Value:
    """The second argument of aten.*.Scalar: a number, or, which torch.onnx does not expect, a size of the images."""
    return number if isinstance(number, (int, float)) else op.CastLike(number, x)


def multiply(x: Value, number: Value | float) -> Value:
    return op.Mul(x, _as(x, number))


def remainder(x: Value, number: Value | int) -> Value:
    return op.Mod(x, _as(x, number))


def stable_sort(x: Value, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple[Value, Value]:
    """TopK of everything: of equal values it has the earlier first."""
    count = op.Gather(op.Shape(x), [dim])
    return op.TopK(x, count, axis=dim, largest=int(descending))


TRANSLATIONS = {
    torch.ops.aten.sort.stable: stable_sort,
    torch.ops.aten.mul.Scalar: multiply,
    torch.ops.aten.remainder.Scalar: remainder,  # of integers
    torch.ops.fastrcnn.nms_padded.default: nms_padded,
    torch.ops.fastrcnn.multilevel_roi_align.default: multilevel_roi_align,
    torch.ops.fastrcnn.heatmaps_to_keypoints.default: heatmaps_to_keypoints,
    torch.ops.torchvision.deform_conv2d.default: deform_conv2d,
}
