"""Detections of whole datasets, from all processes, and what they are worth."""

import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fastrcnn import weights as weight_files
from fastrcnn.config import Config, conventions_of
from fastrcnn.data import make_data_loader
from fastrcnn.engine import checkpoint, distributed
from fastrcnn.engine.logging import has_terminal, log_to
from fastrcnn.engine.tta import detect_augmented
from fastrcnn.evaluation import encode_masks, evaluate
from fastrcnn.models import build_model
from fastrcnn.structures import BoxList, Keypoints

logger = logging.getLogger("fastrcnn")

Results = dict[str, dict[str, float]]  # {"bbox": {"AP": …, "AP50": …}, "segm": {…}}


def autocast(cfg: Config, device: torch.device) -> torch.autocast:
    """Mixed precision where DTYPE is "float16" or "bfloat16", nothing where it is "float32"."""
    return torch.autocast(device.type, getattr(torch, cfg.DTYPE), enabled=cfg.DTYPE != "float32")


@torch.inference_mode()
def detect(model: nn.Module, loader: Iterable, cfg: Config) -> dict[int, BoxList]:
    """Index in the dataset → detections in the frame of the original image, for the images of the loader of this
    process.

    loader: as `make_data_loader` gives it. Masks become run lengths (field `rle`) at once, so the memory stays small.
    """
    model.eval()
    device = next(model.parameters()).device
    conventions = conventions_of(cfg)
    predictions = {}
    bar = tqdm(
        loader,
        desc=f"test {loader.dataset_name}",
        unit="batch",
        dynamic_ncols=True,
        disable=not (distributed.is_main() and has_terminal()),
    )
    for images, ids in bar:
        with autocast(cfg, device):
            if cfg.TEST.BBOX_AUG.ENABLED:
                detections = detect_augmented(model, images, cfg)
            else:
                detections = model(images.to(device, non_blocking=True))
        for index, boxlist in zip(ids, detections.to_boxlists(), strict=True):
            if boxlist.has_field("mask"):
                boxlist = encode_masks(boxlist, conventions)
            predictions[int(index)] = boxlist
    return predictions


def inference(model: nn.Module, loader: Iterable, cfg: Config, output_folder: str | Path) -> Results:
    """Detects on the loader's dataset and evaluates the detections of all processes on rank 0; the others get {}.

    Writes predictions.pth (see `load_predictions`) and the evaluation's files into `output_folder`.
    """
    started = time.perf_counter()
    predictions = detect(model, loader, cfg)
    seconds = time.perf_counter() - started
    gathered = distributed.gather_objects(predictions)
    results: Results = {}
    if gathered is not None:
        predictions = dict(sorted(item for part in gathered for item in part.items()))
        count, world_size = len(loader.dataset), distributed.world_size()
        if len(predictions) != count:
            raise RuntimeError(
                f"{loader.dataset_name}: detections of {len(predictions)} images, but the dataset has {count}"
            )
        logger.info(
            "%s: %d images in %.1f s, %.4f s / img per device, on %d device(s)",
            loader.dataset_name, count, seconds, seconds * world_size / max(count, 1), world_size,
        )  # fmt: skip
        folder = Path(output_folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_predictions(predictions, folder / "predictions.pth")
        tasks = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
        results = evaluate(
            loader.dataset,
            predictions,
            folder,
            iou_types=[task for task, wanted in tasks.items() if wanted],
            expected_results=cfg.TEST.EXPECTED_RESULTS,
            sigma_tol=cfg.TEST.EXPECTED_RESULTS_SIGMA_TOL,
            box_only=cfg.MODEL.RPN_ONLY and not cfg.MODEL.RETINANET_ON,
            use_07_metric=cfg.TEST.USE_07_METRIC,
        )
    distributed.barrier()
    return results


def save_predictions(predictions: dict[int, BoxList], path: Path) -> None:
    """As plain types, so that the file loads without running code: index → {"size" (w, h), "boxes" [N, 4] xyxy,
    fields …}; keypoints are a tensor [N, K, 3] there."""
    plain = {}
    for index, b in predictions.items():
        values = {name: b.get_field(name) for name in b.fields()}
        values = {name: v.keypoints if isinstance(v, Keypoints) else v for name, v in values.items()}
        plain[index] = {"size": tuple(b.size), "boxes": b.bbox.cpu(), **values}
    checkpoint.write_atomically(path, lambda file: torch.save(plain, file))


def load_predictions(path: str | Path) -> dict[int, BoxList]:
    """What `inference` has written to predictions.pth."""
    predictions = {}
    for index, entry in torch.load(path, weights_only=True).items():
        boxlist = BoxList(entry.pop("boxes"), entry.pop("size"))
        for name, value in entry.items():
            boxlist.add_field(name, value)
        predictions[index] = boxlist
    return predictions


def test_all(model: nn.Module, loaders: Sequence[Any], cfg: Config) -> dict[str, Results]:
    """`inference` for each loader, into OUTPUT_DIR/inference/<dataset>: {dataset: results}, on ranks other than 0
    empty."""
    distributed.broadcast_buffers(model)
    results = {}
    for loader in loaders:
        found = inference(model, loader, cfg, Path(cfg.OUTPUT_DIR) / "inference" / loader.dataset_name)
        if distributed.is_main():
            results[loader.dataset_name] = found
    return results


def test(cfg: Config, weights: str | Path) -> dict[str, Results]:
    """Builds the model, loads `weights` (a file, or a folder with checkpoints) and evaluates it on all DATASETS.TEST.

    MODEL.CONVENTIONS becomes what the weights were trained with. Under torchrun the images are shared among the
    processes and rank 0 has the results. Weights that leave a parameter of the model without a value are refused:
    figures of a half-random model would mislead.
    """
    with distributed.session(cfg.MODEL.DEVICE) as device, log_to(cfg.OUTPUT_DIR):
        rank, world_size = distributed.rank(), distributed.world_size()
        path = checkpoint.find(weights)
        weight_files.adopt_conventions(cfg, path)
        model = build_model(cfg).to(device)
        report = weight_files.load(model, path)
        if report.missing:
            raise ValueError(f"{path} does not fill the whole model:\n{report}")
        logger.info("weights of %s\n%s", path, report)
        with distributed.main_first():
            loaders = make_data_loader(cfg, is_train=False, rank=rank, world_size=world_size)
        return test_all(model, loaders, cfg)


test.__test__ = test_all.__test__ = False  # not for pytest, whatever it collects
