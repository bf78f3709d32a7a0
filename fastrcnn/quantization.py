"""INT8 after training: an ONNX file with 8-bit convolutions and fully connected layers, and what that costs and gains.

Method: static quantisation of onnxruntime (`onnxruntime.quantization.quantize_static`, QDQ): weights per output
channel, activations with the ranges that a calibration set shows.
"""

import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrcnn.config import Config, conventions_of
from fastrcnn.data import make_data_loader
from fastrcnn.evaluation import encode_masks, evaluate
from fastrcnn.export import ExportModule
from fastrcnn.extras import require
from fastrcnn.structures import BoxList, DetectionBatch, ImageBatch

OPERATORS = ["Conv", "Gemm", "MatMul"]
PREDICTORS = ("cls_logits", "bbox_pred", "cls_score")  # layers that give scores and offsets, as parameters are named
Detect = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # as `ExportModule`


@dataclass(frozen=True)
class Latency:
    """Of one image, in ms: median and quartiles over the runs."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.1f} ms ({self.low:.1f} – {self.high:.1f})"


@dataclass(frozen=True)
class QuantizationReport:
    """What quantisation cost and gained.

    ap: {dataset: {task: {"float32": AP, "int8": AP}}}, for proposals AR@100. latency: of "eager", "float32" and "int8",
    the last two in onnxruntime, in turn on the same image, with `threads` threads. bytes: of the files "float32" and
    "int8".
    """

    path: str
    calibration_images: int
    evaluated_images: int
    ap: dict[str, dict[str, dict[str, float]]]
    latency: dict[str, Latency]
    bytes: dict[str, int]
    processor: str
    threads: int
    versions: dict[str, str]

    @property
    def latency_ratio(self) -> float:
        """INT8 over float32 in onnxruntime; below 1 is faster."""
        return self.latency["int8"].median / self.latency["float32"].median

    def __str__(self) -> str:
        rows = [("", "float32", "int8", "int8 − float32")]
        for dataset, tasks in self.ap.items():
            for task, ap in tasks.items():
                before, after = ap["float32"], ap["int8"]
                rows.append((f"{dataset} {task}", f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"))
        rows.append(("file", *(f"{self.bytes[kind] / 2**20:.1f} MiB" for kind in ("float32", "int8")), ""))
        rows.append(("latency", *(str(self.latency[kind]) for kind in ("float32", "int8")), ""))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(
            [
                f"{self.path}: {self.calibration_images} images of calibration, {self.evaluated_images} of evaluation",
                *table,
                f"latency of int8 / float32 {self.latency_ratio:.2f}; eager {self.latency['eager']}",
            ]
        )


def quantize(
    cfg: Config,
    model: nn.Module,
    categories: Mapping[int, str],
    path: str | Path,
    calibration_images: int = 100,
    evaluate_images: int = 0,
    runs: int = 20,
) -> QuantizationReport:
    """Writes `path` (INT8), beside it <stem>_float32.onnx, which is the same without quantisation, and <stem>.json,
    the report.

    calibration_images: so many of DATASETS.TRAIN, prepared as for testing. evaluate_images: so many of each of
    DATASETS.TEST, 0 for all. runs: of each kind for the latency. The predictors, whose numbers are scores and box
    offsets, stay float32.

    ValueError and ConfigError as of `export_onnx`, DataError as of `make_data_loader`.
    """
    from fastrcnn.export import onnx as onnx_files

    path = Path(path)
    plain = path.with_name(f"{path.stem}_float32.onnx")
    onnx_files.export_onnx(cfg, model, categories, plain)
    module = ExportModule(cfg, model)
    calibrated = _quantize_file(plain, path, _calibration_set(cfg, calibration_images))
    kinds: dict[str, Detect] = {"float32": onnx_files.load(plain), "int8": onnx_files.load(path)}

    ap: dict[str, dict[str, dict[str, float]]] = {}
    evaluated = 0
    for loader in make_data_loader(cfg, is_train=False):
        predictions = _predictions(cfg, module, kinds, loader, evaluate_images or len(loader.dataset))
        evaluated += len(predictions["int8"])
        found = {kind: _average_precision(cfg, loader.dataset, boxlists) for kind, boxlists in predictions.items()}
        tasks = found["float32"]
        ap[loader.dataset_name] = {task: {kind: found[kind][task] for kind in kinds} for task in tasks}
    images, sizes = _exported_form(cfg, next(iter(loader))[0])
    kinds["eager"] = lambda pixels, size: module.model(ImageBatch(module.normalised(pixels, size), size, size))
    report = QuantizationReport(
        path=str(path),
        calibration_images=calibrated,
        evaluated_images=evaluated,
        ap=ap,
        latency=_latency(kinds, images[:1].contiguous(), sizes[:1], runs),
        bytes={"float32": plain.stat().st_size, "int8": path.stat().st_size},
        processor=_processor(),
        threads=torch.get_num_threads(),
        versions={name: version(name) for name in ("fastrcnn", "torch", "onnxruntime")},
    )
    text = json.dumps(asdict(report) | {"latency_ratio": report.latency_ratio}, indent=2)
    path.with_suffix(".json").write_text(text + "\n")
    return report


def _processor() -> str:
    """Its name, where Linux tells it."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", path.read_text()) if path.is_file() else []
    return names[0] if names else platform.machine()


def _exported_form(cfg: Config, images: ImageBatch) -> tuple[Tensor, Tensor]:
    """What the loader has normalised as the inputs of an exported model: uint8 pixels and int64 sizes."""
    return images.to_uint8(cfg).contiguous(), images.sizes.long()


def _calibration_set(cfg: Config, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `count` images of DATASETS.TRAIN in batches, prepared as for testing."""
    cfg = cfg.clone()
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    for loader in make_data_loader(cfg, is_train=False):
        for images, _ in loader:
            pixels, sizes = (value[:count] for value in _exported_form(cfg, images))
            yield pixels, sizes
            count -= len(sizes)
            if not count:
                return


def _quantize_file(source: Path, target: Path, batches: Iterator[tuple[Tensor, Tensor]]) -> int:
    """Writes `target`; the number of images that it was calibrated with."""
    onnx = require("onnx", extra="export", why="INT8")
    quantization = require("onnxruntime.quantization", extra="export", why="INT8")
    preparation = require("onnxruntime.quantization.shape_inference", extra="export", why="INT8")

    class Reader(quantization.CalibrationDataReader):
        images = 0

        def get_next(self) -> dict[str, Any] | None:
            batch = next(batches, None)
            if batch is None:
                return None
            self.images += len(batch[1])
            return {"images": batch[0].numpy(), "sizes": batch[1].numpy()}

    reader = Reader()
    with tempfile.TemporaryDirectory() as folder:
        folded = Path(folder) / "folded.onnx"  # batch norm in the weights, constants computed
        preparation.quant_pre_process(source, folded, skip_symbolic_shape=True)
        nodes = onnx.load(folded).graph.node
        predictors = [
            node.name for node in nodes if any(name in weight for weight in node.input for name in PREDICTORS)
        ]
        quantization.quantize_static(
            folded,
            target,
            reader,
            op_types_to_quantize=OPERATORS,
            nodes_to_exclude=predictors,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
        )
    return reader.images


def _predictions(
    cfg: Config, module: ExportModule, kinds: Mapping[str, Detect], loader: Any, limit: int
) -> dict[str, dict[int, BoxList]]:
    """{kind: {index in the dataset: detections}} of at most `limit` images."""
    conventions = conventions_of(cfg)
    predictions: dict[str, dict[int, BoxList]] = {kind: {} for kind in kinds}
    left = limit
    for images, ids in loader:
        ids = list(ids)[:left]
        inputs = tuple(value[: len(ids)] for value in _exported_form(cfg, images))
        sizes, original = images.sizes[: len(ids)], images.original_sizes[: len(ids)]
        for kind, detect in kinds.items():
            found = {"labels": None} | dict(zip(module.outputs, detect(*inputs), strict=True))
            found["boxes"] = conventions.for_scaling(found["boxes"], sizes, original)
            boxlists = DetectionBatch(**found, sizes=sizes, original_sizes=original).to_boxlists()
            if cfg.MODEL.MASK_ON:
                boxlists = [encode_masks(boxlist, conventions) for boxlist in boxlists]
            predictions[kind] |= zip(map(int, ids), boxlists, strict=True)
        left -= len(ids)
        if not left:
            break
    return predictions


class _Part:
    """Some of the images of a dataset, as `evaluate` takes one."""

    def __init__(self, dataset: Any, indices: Sequence[int]):
        self._dataset, self._indices = dataset, indices
        if hasattr(dataset, "id_to_img_map"):
            self.id_to_img_map = {place: dataset.id_to_img_map[index] for place, index in enumerate(indices)}

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> Any:
        return self._dataset[self._indices[place]]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._dataset, name)
        if name in ("get_img_info", "get_groundtruth", "get_instance_ids"):
            return lambda place: value(self._indices[place])
        return value


def _average_precision(cfg: Config, dataset: Any, predictions: Mapping[int, BoxList]) -> dict[str, float]:
    """{task: AP} over the images that have predictions; of proposals {"box_proposal": AR@100}."""
    indices = sorted(predictions)
    tasks = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    measures = evaluate(
        _Part(dataset, indices),
        {place: predictions[index] for place, index in enumerate(indices)},
        None,
        iou_types=[task for task, wanted in tasks.items() if wanted],
        box_only=cfg.MODEL.RPN_ONLY and not cfg.MODEL.RETINANET_ON,
        use_07_metric=cfg.TEST.USE_07_METRIC,
    )
    return {task: values["AR@100" if task == "box_proposal" else "AP"] for task, values in measures.items()}


@torch.inference_mode()
def _latency(kinds: Mapping[str, Detect], images: Tensor, sizes: Tensor, runs: int) -> dict[str, Latency]:
    """In turn, so that what else the machine does falls on all alike; two runs of each beforehand."""
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(runs + 2):
        for kind, detect in kinds.items():
            started = time.perf_counter()
            detect(images, sizes)
            seconds[kind].append(time.perf_counter() - started)
    quartiles = {kind: statistics.quantiles(values[2:], n=4) for kind, values in seconds.items()}
    return {kind: Latency(*(1000 * q[index] for index in (1, 0, 2))) for kind, q in quartiles.items()}
