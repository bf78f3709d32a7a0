"""Detections against ground truth: COCO's, PASCAL VOC's and Cityscapes' measures.

`evaluate` picks by what the dataset offers: `coco` (a pycocotools COCO), `get_instance_ids(i)` (Cityscapes),
`get_groundtruth(i)` (VOC), or its targets.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrcnn.evaluation.cityscapes import evaluate_cityscapes
from fastrcnn.evaluation.coco import (
    coco_from_targets,
    evaluate_coco,
    image_id_of,
    target_of,
    to_coco_results,
)
from fastrcnn.evaluation.images import Judged, best_threshold, judge, match_detections, scores_of, set_aside
from fastrcnn.evaluation.masks import encode_masks
from fastrcnn.evaluation.proposals import evaluate_proposals
from fastrcnn.evaluation.voc import evaluate_voc
from fastrcnn.structures import BoxList

__all__ = [
    "Judged",
    "best_threshold",
    "check_expected_results",
    "encode_masks",
    "evaluate",
    "evaluate_cityscapes",
    "evaluate_coco",
    "evaluate_proposals",
    "evaluate_voc",
    "judge",
    "match_detections",
    "scores_of",
    "set_aside",
    "target_of",
    "to_coco_results",
]

logger = logging.getLogger(__name__)


def evaluate(
    dataset: Any,
    predictions: Mapping[int, BoxList],
    output_folder: Path | str | None,
    iou_types: Sequence[str] = ("bbox",),
    expected_results: Sequence[tuple[str, str, tuple[float, float]]] = (),
    sigma_tol: float = 4,
    box_only: bool = False,
    use_07_metric: bool = False,
) -> dict[str, dict[str, float]]:
    """Measures per task, {"bbox": {"AP": …, "AP50": …, "AP/<class>": …}, "segm": …}; logged as a table.

    `predictions`: by index of the dataset, in pixels of the original images, fields as `to_coco_results` says. An image
    without prediction counts as one with no detections. A dataset with `coco` gets COCO's measures; one with
    `get_instance_ids` Cityscapes', one with `get_groundtruth` alone VOC's (`use_07_metric`: see `evaluate_voc`), boxes
    only; the targets of any other are turned into COCO's form. `box_only` measures the recall of proposals,
    {"box_proposal": {"AR@100": …}}, and nothing else.
    Writes into `output_folder`, unless it is None, the measures (results.json), COCO's and VOC's precision–recall
    curves (<task>_curves.npz) and the detections in COCO's form ({bbox,segm,keypoints}.json; VOC: result.txt).
    `expected_results`, [task, metric, [mean, deviation]], are checked within `sigma_tol` deviations.
    """
    _check_frames(dataset, predictions)
    folder = None if output_folder is None else Path(output_folder)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    measures: dict[str, dict[str, float]] = {}
    cityscapes = hasattr(dataset, "get_instance_ids") and not box_only
    if hasattr(dataset, "get_groundtruth") and not hasattr(dataset, "coco") and not cityscapes and not box_only:
        if skipped := [task for task in iou_types if task != "bbox"]:
            logger.warning(
                "a dataset with get_groundtruth() is evaluated by its boxes: no %s measures", ", ".join(skipped)
            )
        measures["bbox"] = evaluate_voc(dataset, predictions, folder, use_07_metric=use_07_metric)
    else:
        truth = dataset.coco if hasattr(dataset, "coco") else None if cityscapes else coco_from_targets(dataset)
        ids = [image_id_of(dataset, index) for index in range(len(dataset))]
        if box_only:
            by_id = {ids[index]: boxlist for index, boxlist in predictions.items()}
            measures["box_proposal"] = evaluate_proposals(truth, by_id, image_ids=ids)
        for task in () if box_only else iou_types:
            results = to_coco_results(dataset, predictions, task)
            if folder is not None:
                (folder / f"{task}.json").write_text(json.dumps(results))
            if cityscapes:
                measures[task] = evaluate_cityscapes(dataset, predictions, task)
            else:
                curves = None if folder is None else folder / f"{task}_curves.npz"
                measures[task] = evaluate_coco(truth, results, task, image_ids=ids, curves=curves)
    for task, values in measures.items():
        logger.info("%s on %d images\n%s", task, len(dataset), format_table(values))
    if folder is not None:
        (folder / "results.json").write_text(json.dumps(measures, indent=2))
    check_expected_results(measures, expected_results, sigma_tol)
    return measures


def _check_frames(dataset: Any, predictions: Mapping[int, BoxList]) -> None:
    for index, boxlist in predictions.items():
        if not 0 <= index < len(dataset):
            raise ValueError(f"a prediction has index {index}, the dataset has {len(dataset)} images")
        info = dataset.get_img_info(index)
        if tuple(boxlist.size) != (info["width"], info["height"]):
            raise ValueError(
                f"the prediction of image id {image_id_of(dataset, index)} is in a frame of {tuple(boxlist.size)} "
                f"(width, height), wanted that of the original image, {(info['width'], info['height'])}"
            )
    if missing := len(dataset) - len(predictions):
        logger.warning(
            "%d of %d images have no prediction: they count as images without detections", missing, len(dataset)
        )


def format_table(measures: Mapping[str, float], columns: int = 6) -> str:
    """Names above their values, `columns` to a line, then those of the classes; "-" for what cannot be measured."""
    lines = []
    means = {name: value for name, value in measures.items() if "/" not in name}
    per_class = {name: value for name, value in measures.items() if "/" in name}
    if len({name.split("/", 1)[0] for name in per_class}) == 1:  # else the whole names, such as AP50/car
        per_class = {name.split("/", 1)[1]: value for name, value in per_class.items()}
    for group in (means, per_class):
        cells = [(name, f"{value:.4f}" if value >= 0 else "-") for name, value in group.items()]
        width = max((len(name) for name, _ in cells), default=0)
        for start in range(0, len(cells), columns):
            row = cells[start : start + columns]
            lines.append("  " + "  ".join(name.rjust(max(width, 6)) for name, _ in row))
            lines.append("  " + "  ".join(value.rjust(max(width, 6)) for _, value in row))
    return "\n".join(lines)


def check_expected_results(
    measures: Mapping[str, Mapping[str, float]],
    expected_results: Sequence[tuple[str, str, tuple[float, float]]],
    sigma_tol: float = 4,
) -> bool:
    """Logs PASS or FAIL for each [task, metric, [mean, deviation]]; true if all are within `sigma_tol` deviations."""
    passed = True
    for task, metric, (mean, deviation) in expected_results:
        value = measures.get(task, {}).get(metric)
        good = value is not None and abs(value - mean) <= sigma_tol * deviation
        passed &= good
        logger.log(
            logging.INFO if good else logging.ERROR,
            "%s: %s %s is %s, expected %.4f ± %.4f",
            "PASS" if good else "FAIL",
            task,
            metric,
            "not measured" if value is None else f"{value:.4f}",
            mean,
            sigma_tol * deviation,
        )
    return passed
