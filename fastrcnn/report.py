"""A training run as one HTML file: figures, curves, the best and the worst images. No script, no outside address."""

import base64
import io
import json
import platform
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from fastrcnn.config import Config, load_config
from fastrcnn.config.schema import leaves
from fastrcnn.data import DataError, build_dataset
from fastrcnn.engine import load_predictions
from fastrcnn.evaluation import best_threshold, judge, set_aside, target_of
from fastrcnn.structures import BoxList
from fastrcnn.visualization import Metrics, draw_comparison, read_metrics, readable_scale
from fastrcnn.visualization.curves import loss_names, precision_over_time
from fastrcnn.visualization.svg import COLOURS, Series, line_chart

IOU = 0.5  # at which a detection counts as right in the judgement of images
_IMAGES = 6  # best ones, and as many worst ones, shared by the test datasets
_SIDE = 384  # pixels of the longer side of a picture
_QUALITIES = (80, 60, 40, 20)  # of JPEG: the first at which a picture has no more than _BYTES
_BYTES = 150_000
_WARNINGS = 20  # lines of the log that are shown

_MEANINGS = {
    "AP": "average precision, mean over the thresholds of IoU (keypoints: OKS) 0.50, 0.55 … 0.95",
    "AP50": "average precision at IoU 0.50",
    "AP75": "average precision at IoU 0.75",
    "APs": "AP of small objects, below 32² pixels",
    "APm": "AP of medium objects, 32² to 96² pixels",
    "APl": "AP of large objects, above 96² pixels",
    "AR": "average recall",
    "AR1": "average recall with one detection per image and class",
    "AR10": "average recall with 10",
    "AR100": "average recall with 100",
}
_TASKS = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints", "box_proposal": "proposals"}


def write_report(run: Path | str, output: Path | str | None = None) -> Path:
    """Writes the report of a run's folder, as `fastrcnn train` leaves it, to `output` (default: report.html there).

    Takes what there is: config.yml (needed), metrics.jsonl, log.txt and inference/<dataset>/ with predictions, measures
    and curves; the images of the test datasets, where they can be read. FileNotFoundError for another folder.
    """
    run = Path(run)
    if not (run / "config.yml").is_file():
        raise FileNotFoundError(f"{run} is no folder of a run: it has no config.yml, which fastrcnn train writes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that do nothing: training has told them
        cfg = load_config(run / "config.yml")
    file = run / "metrics.jsonl"
    metrics = read_metrics(file) if file.is_file() else Metrics({}, {}, {})
    log = _Log.read(run / "log.txt")
    results = _results(run, cfg, metrics)
    path = run / "report.html" if output is None else Path(output)
    sections = [("results", "Results", _result_section(metrics, results))]
    for name in results:
        content = _dataset_section(cfg, run / "inference" / name, name, results[name], max(_IMAGES // len(results), 1))
        sections.append((f"data-{len(sections)}", f"Dataset {name}", content))
    sections += [
        ("training", "Training", _training_section(metrics)),
        ("time", "Time", _time_section(metrics, log)),
        ("configuration", "Configuration", _configuration_section(cfg, log)),
    ]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{escape(title)}</h2>{content}</section>' for key, title, content in sections
    )
    title = escape(run.resolve().name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}: training report</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{title}</h1>{_summary(cfg, metrics, results)}<nav>{links}</nav>{body}</main></body></html>\n",
        encoding="utf-8",
    )
    return path


# ------------------------------------------------------------------------------------------------ what a run has left


@dataclass(frozen=True)
class _Log:
    """Of log.txt: the starts, (time, what), the warnings, and the seconds of detecting per dataset."""

    starts: list[tuple[str, str]]
    warnings: Counter[str]
    detecting: dict[str, float]

    @classmethod
    def read(cls, path: Path) -> "_Log":
        log = cls([], Counter(), {})
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        for line in lines:
            entry = re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ (\w+) (.*)", line)
            if entry is None:
                continue
            time, level, text = entry.groups()
            if level in ("WARNING", "ERROR"):
                log.warnings[text] += 1
            elif text.startswith(("python ", "resumed ")):
                log.starts.append((time, text))
            elif spent := re.match(r"(.+): \d+ images in ([\d.]+) s, ", text):
                log.detecting[spent[1]] = log.detecting.get(spent[1], 0.0) + float(spent[2])
        return log


def _results(run: Path, cfg: Config, metrics: Metrics) -> dict[str, dict[str, dict[str, float]]]:
    """{dataset: {task: {metric: value}}} of the last evaluation, of training or of `fastrcnn test`."""
    last = list(metrics.evaluations.values())[-1] if metrics.evaluations else {}
    found = {}
    for name in dict.fromkeys([*last, *cfg.DATASETS.TEST]):
        file = run / "inference" / name / "results.json"
        measures = json.loads(file.read_text()) if file.is_file() else last.get(name)
        if measures:
            found[name] = measures
    return found


# ------------------------------------------------------------------------------------------------------------ sections


def _summary(cfg: Config, metrics: Metrics, results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    done = max([0, *metrics.training, *metrics.evaluations])
    cards = [(f"{done:,} of {cfg.SOLVER.MAX_ITER:,}", "iterations")]
    for name, tasks in results.items():
        for task, values in tasks.items():
            metric = next((m for m in ("AP", "AP50", "AR@1000") if values.get(m, -1) >= 0), None)
            if metric:
                cards.append((f"{values[metric]:.3f}", f"{metric} of {_TASKS.get(task, task)}, {name}"))
    spent = sum(part for _, part in _spent(metrics))
    if spent:
        cards.append((_duration(spent), "training time"))
    if metrics.training:
        cards.append((f"{list(metrics.training.values())[-1]['loss']:.3f}", "last training loss"))
    if memory := max((v.get("max_mem_mb", 0.0) for v in metrics.training.values()), default=0.0):
        cards.append((f"{memory / 1024:.1f} GiB", "GPU memory"))
    shown = "".join(f"<li><b>{escape(value)}</b><span>{escape(name)}</span></li>" for value, name in cards)
    kind = "RetinaNet" if cfg.MODEL.RETINANET_ON else "region proposal network" if cfg.MODEL.RPN_ONLY else "R-CNN"
    heads = [word for word, on in (("masks", cfg.MODEL.MASK_ON), ("keypoints", cfg.MODEL.KEYPOINT_ON)) if on]
    model = f"{kind}{' with ' + ' and '.join(heads) if heads else ''}, {cfg.MODEL.BACKBONE.CONV_BODY}"
    text = f"{model}, trained on {', '.join(cfg.DATASETS.TRAIN) or 'nothing'}"
    return f'<p>{escape(text)}.</p><ul class="cards">{shown}</ul>'


def _result_section(metrics: Metrics, results: Mapping[str, Any]) -> str:
    over_time = precision_over_time(metrics.evaluations)
    parts = []
    if not results:
        parts.append("<p>The run was not evaluated: <code>fastrcnn test --weights RUN</code> does it.</p>")
    if len(metrics.evaluations) > 1:
        lines = [Series(name, x, y, marked=True) for name, (x, y) in over_time.items()]
        parts.append("<h3>Precision over the iterations</h3>")
        parts.append(line_chart(lines, "iteration", "average precision", y_range=(0, 1)))
    for name, tasks in results.items():
        rows = []
        for metric in dict.fromkeys(m for values in tasks.values() for m in values if "/" not in m):
            figures = [_figure(values.get(metric)) for values in tasks.values()]
            rows.append([f"<b>{escape(metric)}</b>", *figures, escape(_meaning(metric))])
        headings = [_TASKS.get(task, task) for task in tasks]
        parts.append(f"<h3>{escape(name)}</h3>" + _table(["", *headings, "meaning"], rows))
    return "".join(parts)


def _dataset_section(
    cfg: Config, folder: Path, name: str, tasks: Mapping[str, Mapping[str, float]], images: int
) -> str:
    parts = []
    try:
        dataset = build_dataset(cfg, name, is_train=False, transforms=lambda image, target: (image, target))
        objects, pictures = _image_part(dataset, folder, images)
    except (DataError, OSError) as error:
        objects, pictures = {}, f"<h3>Images</h3><p>No pictures: {escape(str(error))}</p>"
    parts.append(_class_table(tasks, objects))
    for task, measures in tasks.items():
        file = folder / f"{task}_curves.npz"
        if file.is_file():
            parts.append(_curves(task, np.load(file), measures))
    return "".join([*parts, pictures])


def _class_table(tasks: Mapping[str, Mapping[str, float]], objects: Mapping[str, int]) -> str:
    columns = dict.fromkeys((task, m.split("/", 1)[0]) for task, values in tasks.items() for m in values if "/" in m)
    names = dict.fromkeys(m.split("/", 1)[1] for values in tasks.values() for m in values if "/" in m)
    if not names:
        return ""
    head = ["class", *(["objects"] if objects else []), *(f"{_TASKS.get(task, task)} {m}" for task, m in columns)]
    rows = []
    for name in names:
        row = [escape(name), *([f"{objects.get(name, 0):,}"] if objects else [])]
        for task, metric in columns:
            row.append(_figure(tasks[task].get(f"{metric}/{name}"), bar=True))
        rows.append(row)
    return f"<h3>Classes</h3>{_table(head, rows)}"


def _curves(task: str, file: Mapping[str, np.ndarray], measures: Mapping[str, float]) -> str:
    """Charts of a file that `fastrcnn.evaluation.coco.save_curves` wrote."""
    recall, precision, thresholds = file["recall"], file["precision"], file["thresholds"]
    known = np.flatnonzero((precision > -1).any((0, 1)))
    if not len(known):
        return ""
    means = precision[:, :, known].mean(2)  # [T, R]
    lines = [
        Series(f"IoU {threshold:.2f}", recall, mean)
        for threshold, mean in zip(thresholds, means, strict=True)
        if round(float(threshold), 2) in (0.5, 0.75)
    ]
    if len(thresholds) > 1:
        lines.append(Series("mean over all IoU thresholds", recall, means.mean(0), main=True))
    chart = {"x_label": "recall", "y_label": "precision", "x_range": (0, 1), "y_range": (0, 1)}
    each = [(measures.get(f"AP50/{file['classes'][k]}", float(precision[0, :, k].mean())), k) for k in known]
    each.sort(key=lambda pair: (-pair[0], pair[1]))
    chosen = [each[k] for k in np.unique(np.linspace(0, len(each) - 1, COLOURS).round().astype(int))]
    which = "" if len(each) <= COLOURS else f": {COLOURS} of {len(each)}, from the best to the worst"
    classes = [Series(f"{file['classes'][k]} (AP50 {ap:.3f})", recall, precision[0, :, k]) for ap, k in chosen]
    return (
        f"<h3>Precision and recall of {escape(_TASKS.get(task, task))}</h3><div class='pair'>"
        f"<div><h4>Mean over the classes</h4>{line_chart(lines, **chart)}</div>"
        f"<div><h4>Classes at IoU {thresholds[0]:.2f}{which}</h4>{line_chart(classes, **chart)}</div></div>"
    )


def _image_part(dataset: Any, folder: Path, count: int) -> tuple[dict[str, int], str]:
    """Objects per class, and the pictures."""
    categories = getattr(dataset, "categories", {})
    file = folder / "predictions.pth"
    predictions = load_predictions(file) if file.is_file() else {}
    objects: Counter[str] = Counter()
    judged = []
    for index, detections in predictions.items():
        if index >= len(dataset):
            raise DataError(f"{file} has a prediction of image {index}, the dataset has {len(dataset)} images")
        target = target_of(dataset, index)
        judged.append(judge(index, target, detections, IOU))
        labels = target.get_field("labels").tolist() if target.has_field("labels") else []
        for label, aside in zip(labels, set_aside(target).tolist(), strict=True):
            objects[str(categories.get(label, label))] += not aside
    threshold = best_threshold(judged)
    ranked = [(f1, image) for image in judged if (f1 := image.f1(threshold)) is not None]
    if not ranked:
        return objects, ""
    worst = sorted(ranked, key=lambda pair: (pair[0], -sum(pair[1].counts(threshold)[1:])))
    best = sorted(ranked, key=lambda pair: (-pair[0], -pair[1].counts(threshold)[0]))
    few = len(ranked) // 2
    parts = [
        f"<h3>Best and worst images</h3><p>Judged by F1 = 2 · right / (2 · right + wrong + missed): a detection with a "
        f"score of at least {threshold:.2f} is right if its box has an IoU of at least {IOU} with an object of its "
        f"class that no better one has found. {threshold:.2f} is the score that gives all {len(judged):,} images "
        "together the best F1. Of equals those with more objects or more mistakes come first; images without objects "
        "and without detections are left out. Ticks and solid boxes: found and right; crosses and dashed boxes: missed "
        "and wrong.</p>"
    ]
    for title, chosen in (("Worst", worst[: min(count, len(ranked) - few)]), ("Best", best[: min(count, few)])):
        shown = [_picture(dataset, image.index, predictions[image.index], threshold, f1) for f1, image in chosen]
        parts.append(f"<h4>{title}</h4><div class='images'>{''.join(shown)}</div>" if shown else "")
    return objects, "".join(parts)


def _picture(dataset: Any, index: int, detections: BoxList, threshold: float, f1: float) -> str:
    image = dataset[index][0]
    scale = readable_scale(detections.size, _SIDE)
    categories = getattr(dataset, "categories", {})
    picture = draw_comparison(
        image, target_of(dataset, index), detections, categories, threshold, iou_threshold=IOU, scale=scale
    )
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= _BYTES:
            break
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    name = dataset.get_img_info(index).get("file_name") or getattr(dataset, "id_to_img_map", {}).get(index, index)
    text = escape(f"image {name}: F1 {f1:.2f}")
    size = f'width="{picture.width}" height="{picture.height}"'
    shown = f'<img {size} alt="{text}" src="data:image/jpeg;base64,{data}">'
    return f"<figure>{shown}<figcaption>{text}</figcaption></figure>"


def _training_section(metrics: Metrics) -> str:
    if not metrics.training:
        return "<p>No iteration was logged.</p>"
    x = list(metrics.training)

    def values(name: str) -> list[float]:
        return [each.get(name, float("nan")) for each in metrics.training.values()]

    lines = [Series("loss (total)", x, values("loss"), main=True)]
    charts = {"Losses": lines}
    if metrics.validation:
        held_out, total = list(metrics.validation), [each["loss"] for each in metrics.validation.values()]
        lines.append(Series("validation loss (total)", held_out, total, main=True, marked=True, dashed=True))
        parts = {n: [each.get(n, float("nan")) for each in metrics.validation.values()] for n in loss_names(metrics)}
        charts["Validation losses"] = [Series(name, held_out, own, marked=True) for name, own in parts.items()]
    lines += [Series(name, x, values(name)) for name in loss_names(metrics)]
    drawn = {title: line_chart(chart, "iteration", "loss", log=True) for title, chart in charts.items()}
    rate = [Series("learning rate", x, values("lr"), main=True)]
    drawn["Learning rate"] = line_chart(rate, "iteration", "learning rate")
    return f'<div class="pair">{"".join(f"<div><h3>{title}</h3>{chart}</div>" for title, chart in drawn.items())}</div>'


def _time_section(metrics: Metrics, log: _Log) -> str:
    parts = [*_spent(metrics), *((f"detecting on {name}", seconds) for name, seconds in log.detecting.items())]
    total = sum(seconds for _, seconds in parts)
    if not total:
        return "<p>No time was logged.</p>"
    bar = "".join(
        f'<span class="s{k % COLOURS}" style="flex-grow:{seconds / total:.4f}"></span>'
        for k, (_, seconds) in enumerate(parts)
    )
    rows = [
        [f'<i class="s{k % COLOURS}"></i> {escape(name)}', _duration(seconds), f"{100 * seconds / total:.1f} %"]
        for k, (name, seconds) in enumerate(parts)
    ]
    x = list(metrics.training)
    speed = [each.get("images_per_second", float("nan")) for each in metrics.training.values()]
    return (
        f'<div class="shares">{bar}</div>{_table(["", "time", "share"], rows)}'
        "<p>Not counted: starting, measuring the detections, validation losses and writing checkpoints.</p>"
        + line_chart([Series("images per second", x, speed)], "iteration", "images per second")
    )


def _spent(metrics: Metrics) -> list[tuple[str, float]]:
    """Seconds of training, by what they went to."""
    model = data = before = 0.0
    for iteration, values in metrics.training.items():
        count = iteration - before
        data += count * values.get("data_time", 0.0)
        model += count * (values.get("time", 0.0) - values.get("data_time", 0.0))
        before = iteration
    return [("training: forward, backward, update", model), ("training: waiting for images", data)]


def _configuration_section(cfg: Config, log: _Log) -> str:
    defaults = {leaf.path: leaf.default for leaf in leaves(Config())}
    rows = []
    for leaf in leaves(cfg):
        if leaf.default != defaults[leaf.path]:
            rows.append(
                [f"<code>{escape(text)}</code>" for text in (leaf.path, *map(str, (leaf.default, defaults[leaf.path])))]
            )
    parts = ["<h3>Keys that differ from the defaults</h3>", _table(["key", "value", "default"], rows)]
    if log.starts:
        parts.append("<h3>Starts</h3>" + _table(["time", ""], [[escape(t) for t in start] for start in log.starts]))
    if log.warnings:
        shown = log.warnings.most_common(_WARNINGS)
        rows = [[f"{count}×", escape(text)] for text, count in shown]
        more = len(log.warnings) - len(shown)
        parts.append("<h3>Warnings</h3>" + _table(["", "message"], rows))
        parts.append(f"<p>and {more} more in log.txt</p>" if more else "")
    versions = (
        f"Written by fastrcnn {version('fastrcnn')} with torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, Python {platform.python_version()}."
    )
    return "".join([*parts, f"<p>{escape(versions)}</p>"])


# ---------------------------------------------------------------------------------------------------------------- HTML


def _meaning(metric: str) -> str:
    name, _, limit = metric.partition("@")
    if limit:  # of proposals
        size = {"s": ", small objects", "m": ", medium objects", "l": ", large objects"}
        area = name.removeprefix("AR")
        text = size.get(area, f", objects of {area} pixels square" if area else "")
        return f"average recall of the best {limit} boxes{text}"
    if metric in _MEANINGS:
        return _MEANINGS[metric]
    level = {"s": "small", "m": "medium", "l": "large"}
    if metric[2:] in level:
        return f"average recall of {level[metric[2:]]} objects"
    return f"average recall at IoU 0.{metric[2:]}" if metric[2:].isdigit() else ""


def _figure(value: float | None, bar: bool = False) -> str:
    if value is None or value < 0:
        return "–"
    return f'<span class="bar" style="--v:{value:.3f}">{value:.3f}</span>' if bar else f"{value:.3f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """head is text, the cells are HTML. A long table scrolls."""
    rows = list(rows)
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    kind = "wide long" if len(rows) > 24 else "wide"
    return f'<div class="{kind}"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c1f23;--soft:#5c646e;--rule:#d9dde2;--plate:#f3f5f7;--bar:#cfe3f3;
--c0:#0072b2;--c1:#c24f00;--c2:#007f5c;--c3:#a8508a;--c4:#8a6d00;--c5:#3b7ea8}
@media(prefers-color-scheme:dark){:root{--bg:#15181c;--fg:#e6e9ed;--soft:#a2abb6;--rule:#363d46;--plate:#1f242a;
--bar:#1d4a6b;--c0:#56b4e9;--c1:#ff8a4c;--c2:#2fc79a;--c3:#e39ac6;--c4:#f0e442;--c5:#b9c4ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif}
main{max-width:1400px;margin:auto;padding:1rem 1.25rem 4rem}
h1{margin:.5rem 0 0;overflow-wrap:anywhere}
h2{margin:2.5rem 0 .5rem;border-bottom:1px solid var(--rule);overflow-wrap:anywhere}
h3{margin:1.5rem 0 .5rem}
h4{margin:.75rem 0 .25rem;color:var(--soft);font-weight:600}
p{max-width:46rem}
a{color:var(--c0)}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1rem}
.cards{display:flex;flex-wrap:wrap;gap:.75rem;padding:0;list-style:none}
.cards li{background:var(--plate);border-radius:.5rem;padding:.6rem .9rem}
.cards b{display:block;font-size:1.4rem;line-height:1.2}
.cards span{color:var(--soft);font-size:.85rem}
.wide{overflow-x:auto;width:fit-content;max-width:100%}
.long{max-height:40rem;overflow-y:auto;padding-right:1rem}
.long th{position:sticky;top:0;background:var(--bg)}
@media print{.long{max-height:none}}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .75rem .25rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
th{color:var(--soft);font-weight:600;white-space:nowrap}
td code{overflow-wrap:anywhere}
.bar{display:inline-block;min-width:8rem;padding:0 .3rem;border-radius:.2rem;
background:linear-gradient(var(--bar),var(--bar)) 0/calc(var(--v)*100%) 100% no-repeat}
figure{margin:0 0 1rem}
figure>svg{display:block;width:100%;max-width:620px}
svg text{fill:var(--soft);font:12px system-ui,sans-serif}
.grid{stroke:var(--rule);stroke-width:1}
.axis{stroke:var(--soft);fill:none}
.line{fill:none;stroke-width:1.8;stroke:currentColor}
.line circle{fill:currentColor;stroke:none}
.main{color:var(--fg);stroke-width:2.4}
.s0{color:var(--c0)}.s1{color:var(--c1)}.s2{color:var(--c2)}.s3{color:var(--c3)}.s4{color:var(--c4)}.s5{color:var(--c5)}
figcaption{display:flex;flex-wrap:wrap;gap:.1rem 1rem;color:var(--soft);font-size:.85rem}
figcaption svg{width:28px;height:8px;margin-right:.35rem;vertical-align:middle}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),620px));gap:0 1.5rem}
.images{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,620px),1fr));gap:.5rem 1.5rem}
.images img{max-width:100%;height:auto;border-radius:.25rem}
.shares{display:flex;height:1.5rem;border-radius:.25rem;overflow:hidden;max-width:620px}
.shares span{background:currentColor;flex-basis:0}
i{display:inline-block;width:.75rem;height:.75rem;background:currentColor;border-radius:.15rem}
"""
