"""The metrics of a training run, and a picture of them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from fastrcnn.visualization.colours import PALETTE

_COLOURS = [tuple(channel / 255 for channel in PALETTE[n]) for n in (0, 1, 2, 4, 5, 6)]  # yellow is too pale on white


class Metrics(NamedTuple):
    """The lines of metrics.jsonl by iteration: training (loss, lr, time …), evaluations ({dataset: {task: {metric:
    value}}}) and validation losses."""

    training: dict[int, dict[str, float]]
    evaluations: dict[int, dict[str, dict]]
    validation: dict[int, dict[str, float]]


def read_metrics(metrics_jsonl: Path | str) -> Metrics:
    """What a metrics file holds, in the order of the iterations.

    After a resumed run the later line of an iteration counts. A last line cut short, as a killed run leaves it, is left
    out; another broken line is a ValueError with its number.
    """
    found = Metrics({}, {}, {})
    lines = Path(metrics_jsonl).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values: dict[str, Any] = json.loads(line)
            iteration = int(values.pop("iteration"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines) and isinstance(error, json.JSONDecodeError):
                break
            raise ValueError(f"{metrics_jsonl}, line {number}: not JSON with an iteration ({error})") from None
        if "eval" in values:
            found.evaluations[iteration] = values["eval"]
        if values.get("validation"):
            found.validation[iteration] = values["validation"]
        if "loss" in values:
            found.training[iteration] = values
    return Metrics(*(dict(sorted(part.items())) for part in found))


def loss_names(metrics: Metrics) -> list[str]:
    """The losses that sum up to "loss"."""
    return sorted({n for values in metrics.training.values() for n in values if n.startswith("loss_")})


def plot_metrics(metrics_jsonl: Path | str, path: Path | str) -> None:
    """Draws the losses, the learning rate and the evaluations (AP, AP50) of a metrics file over the iterations."""
    metrics = read_metrics(metrics_jsonl)
    training, evaluations, validation = metrics
    if not training and not evaluations:
        raise ValueError(f"{metrics_jsonl} has no line with a loss or an evaluation")
    figure = Figure(figsize=(9, 9), layout="constrained")
    losses, rate, precision = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 2))

    iterations = list(training)
    for number, name in enumerate(loss_names(metrics)):
        series = [values.get(name, float("nan")) for values in training.values()]
        style = ("-", "--", ":")[number // len(_COLOURS) % 3]
        losses.plot(iterations, series, style, color=_COLOURS[number % len(_COLOURS)], linewidth=1.2, label=name)
    total = [values["loss"] for values in training.values()]
    losses.plot(iterations, total, color="black", linewidth=1.8, label="loss (total)")
    held_out = [values["loss"] for values in validation.values()]
    if validation:
        losses.plot(list(validation), held_out, "o--", color="black", linewidth=1.2, label="validation loss (total)")
    if training and min([*total, *held_out]) > 0:
        losses.set_yscale("log")
        losses.yaxis.set_major_formatter(ScalarFormatter())
    losses.set_ylabel("loss")
    losses.legend(loc="best", ncols=2, fontsize=9)

    rated = {iteration: values["lr"] for iteration, values in training.items() if "lr" in values}
    rate.plot(list(rated), list(rated.values()), color="black", linewidth=1.5)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)

    curves = precision_over_time(evaluations)
    for number, (name, (x, y)) in enumerate(curves.items()):
        marker, colour = "osD^v"[number // len(_COLOURS) % 5], _COLOURS[number % len(_COLOURS)]
        precision.plot(x, y, marker=marker, color=colour, label=f"{name} = {y[-1]:.3f}")
    precision.set_ylim(0, 1)
    precision.set_ylabel("average precision")
    precision.set_xlabel("iteration")
    precision.xaxis.set_major_locator(MaxNLocator(integer=True))
    if curves:
        precision.legend(loc="best", fontsize=9)
    else:
        precision.text(0.5, 0.5, "not evaluated", ha="center", va="center", transform=precision.transAxes)
    for axes in (losses, rate, precision):
        axes.grid(alpha=0.3)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def precision_over_time(evaluations: dict[int, dict[str, dict]]) -> dict[str, tuple[list[int], list[float]]]:
    """{"dataset: task metric": (iterations, values)} of AP, AP50 and, of proposals, AR@1000, where measured."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for iteration, datasets in evaluations.items():
        for dataset, tasks in datasets.items():
            for task, values in tasks.items():
                for metric in ("AP", "AP50", "AR@1000"):
                    if values.get(metric, -1) >= 0:
                        x, y = curves.setdefault(f"{dataset}: {task} {metric}", ([], []))
                        x.append(iteration)
                        y.append(values[metric])
    return curves
