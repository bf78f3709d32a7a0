"""Turns a results file into Markdown tables and a chart; every number comes from the file.

python -m benchmarks.report RESULTS.json [--markdown FILE] [--chart FILE.png]
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS, THEIRS = "fastrcnn", "torchvision"
PLAIN = ("reference", "compiled reference")  # PyTorch's own operators
ON_REFERENCE = "fastrcnn, reference operators"
CLOCKS = {"graph_cold_us": "graph, cold L2", "graph_warm_us": "graph, warm L2", "eager_us": "eager"}
MISSING = "—"

Info = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """All providers' results of one case: provider -> extra_info."""

    kind: str
    op: str
    case: str
    providers: dict[str, Info]

    def time(self, provider: str, against: str = "") -> tuple[float | None, str]:
        """Median in ms and how it was measured: by the same clock as `against`, the kindest to short launches first."""
        found = self.providers.get(provider)
        if found is None:
            return None, ""
        if self.kind == "step":
            return found["ms"]["median"], ""
        other = self.providers.get(against, found)
        for clock, told in CLOCKS.items():
            if found.get(clock) and other.get(clock):
                return found[clock]["median"] / 1e3, told
        return None, ""

    def speedup(self, provider: str) -> float | None:
        """How many times faster ours is."""
        ours, theirs = self.time(OURS, provider)[0], self.time(provider, OURS)[0]
        return theirs / ours if ours and theirs else None

    def best_plain(self) -> str:
        """The fastest of PyTorch's own operators, by its comparison with ours."""
        return min(PLAIN, key=lambda provider: self.speedup(provider) or float("inf"))


def read_rows(results: dict[str, Any]) -> list[Row]:
    """The cases of a results file in its order; entries that are not of this suite, or failed, are left out."""
    rows: dict[tuple[str, str, str], dict[str, Info]] = {}
    for entry in results["benchmarks"]:
        info = entry["extra_info"]
        if info.get("kind") == "operator":
            key = ("operator", info["op"], f"{info['case']}, {info['dtype']}, {info['direction']}")
        elif info.get("kind") == "step":
            found = "" if info.get("detections") is None else f", {info['detections']} detections"
            case = f"batch {info['batch']} of {info['height']}×{info['width']}, {info['dtype']}{found}"
            key = ("step", f"{info['model']} {info['mode']}", case)
        else:
            continue
        rows.setdefault(key, {})[info["provider"]] = info
    return [Row(*key, providers) for key, providers in rows.items()]


def machine(results: dict[str, Any]) -> str:
    """What was measured where, in a sentence or two."""
    info = results["machine_info"]
    cpu = info.get("cpu", {}).get("brand_raw", "CPU")
    where = info.get("gpu") or f"{cpu}, {info.get('threads', '?')} threads"
    if info.get("driver"):
        where += f", driver {info['driver']}"
    versions = ", ".join(f"{name} {version}" for name, version in info.get("versions", {}).items() if version)
    commit = info.get("commit") or results.get("commit_info", {}).get("id", "unknown")
    told = f"{where}; {versions}; commit {commit}; {results.get('datetime', '')[:10]}."
    ceilings = info.get("ceilings")
    if ceilings:
        copy, write, l2 = (ceilings[f"{name}_gb_per_s"] for name in ("copy", "write", "l2_read"))
        told += f" Measured ceilings: copy {copy:.0f} GB/s, write {write:.0f} GB/s, reads from L2 {l2:.0f} GB/s, "
        told += f"float32 {ceilings['fp32_tflops']:.1f} TFLOP/s."
    return told


def milliseconds(value: float | None) -> str:
    if value is None:
        return MISSING
    digits = 2 if value >= 10 else 3 if value >= 0.1 else 4
    return f"{value:.{digits}f}" if value < 1000 else f"{value:.0f}"


def times(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.0f}×" if value >= 100 else f"{value:.1f}×" if value >= 10 else f"{value:.2f}×"


def number(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown, without columns that are empty; columns after the first two are aligned to the right."""
    header, rows = list(header), [list(row) for row in rows]
    used = [i for i in range(len(header)) if any(row[i] != MISSING for row in rows)]
    rules = ["---", "---", *["---:"] * (len(header) - 2)]
    return "\n".join("| " + " | ".join(cells[i] for i in used) + " |" for cells in (header, rules, *rows))


def operator_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        rival = THEIRS if THEIRS in row.providers else row.best_plain()
        ours, clock = row.time(OURS, rival)
        share = row.providers.get(OURS, {}).get("roofline_share")
        lines.append(
            [
                row.op,
                row.case,
                milliseconds(ours),
                milliseconds(row.time(THEIRS, OURS)[0]),
                times(row.speedup(THEIRS)),
                times(row.speedup(row.best_plain())),
                clock or MISSING,
                MISSING if share is None else f"{100 * share:.0f} %",
            ]
        )
    header = ("operator", "case", "fastrcnn, ms", "torchvision, ms", "ratio", "ratio to PyTorch", "time", "of roofline")
    return table(header, lines)


def step_table(rows: list[Row]) -> str:
    providers = (OURS, THEIRS, ON_REFERENCE)
    lines = []
    for row in rows:
        found = [row.providers.get(provider, {}) for provider in providers]
        speed, memory = ([info.get(key) for info in found] for key in ("images_per_s", "peak_mib"))
        cells = [number(speed[0], 2), number(speed[1], 2), times(row.speedup(THEIRS))]
        cells += [number(speed[2], 2), times(row.speedup(ON_REFERENCE))]
        lines.append([row.op, row.case, *cells, *(number(value and value / 1024, 2) for value in memory)])
    header = ["model", "case", "fastrcnn, images/s", "torchvision", "ratio", "reference operators", "ratio"]
    return table([*header, "fastrcnn, peak GiB", "torchvision", "reference operators"], lines)


def markdown(results: dict[str, Any]) -> str:
    rows = read_rows(results)
    if not rows:
        raise ValueError("the file holds no result of this suite")
    parts = [machine(results)]
    operators, steps = ([row for row in rows if row.kind == kind] for kind in ("operator", "step"))
    if operators:
        parts += [
            operator_table(operators),
            "Medians. A ratio compares times of one kind: inside a CUDA graph with cold L2 where both could be "
            "captured, else eager. PyTorch: the faster of the reference and its compiled form. Of roofline: what the "
            "bytes and operations that any implementation needs would take at the measured ceilings, over our time in "
            "a graph, or eager where it could not be captured.",
        ]
    if steps:
        parts += [step_table(steps), "Medians; peak memory is all that the model holds at most, weights included."]
    return "\n\n".join(parts) + "\n"


INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e8ec"
COLOURS = {THEIRS: "#0f766e", "PyTorch": "#c2854a", ON_REFERENCE: "#8794c7"}
LABELS = {
    THEIRS: "against torchvision",
    "PyTorch": "against PyTorch's operators",
    ON_REFERENCE: "against our models on the reference operators",
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars of how many times faster ours is, on a logarithmic axis with a line at 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator

    bars: list[tuple[str, str, str, float]] = []  # heading, case, compared with, ratio
    for row in read_rows(results):
        plain = row.best_plain()
        others = (
            {THEIRS: THEIRS, "PyTorch": plain}
            if row.kind == "operator"
            else {THEIRS: THEIRS, ON_REFERENCE: ON_REFERENCE}
        )
        ratios = {told: ratio for told, provider in others.items() if (ratio := row.speedup(provider))}
        if row.kind == "operator" and THEIRS in ratios:
            ratios = {THEIRS: ratios[THEIRS]}
        bars += [(row.op, row.case, told, ratio) for told, ratio in ratios.items()]
    if not bars:
        raise ValueError("the file holds no case that ours and another provider have both")

    position, y, headings, cases = 0.0, [], [], []
    for index, (heading, case, _, _) in enumerate(bars):
        before = bars[index - 1] if index else ("", "")
        if heading != before[0]:
            position += 0.6 if index else 0.0
            headings.append((position, heading))
            position += 1.0
        elif case == before[1]:
            position -= 0.1
        cases.append("" if (heading, case) == tuple(before[:2]) else case)
        y.append(position)
        position += 1.0
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK})
    figure, axes = plt.subplots(figsize=(10.5, 1.7 + 0.24 * position), layout="constrained")
    ratios = [ratio for *_, ratio in bars]
    low, high = min(0.8, min(ratios) / 1.1), max(2.0, max(ratios) * 1.5)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(position, -1)
    for place, (_, _, told, ratio) in zip(y, bars, strict=True):
        axes.barh(place, ratio - 1, left=1, height=0.74, color=COLOURS[told], zorder=2, alpha=1 if ratio >= 1 else 0.55)
        axes.annotate(
            times(ratio), (max(ratio, 1), place), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK
        )
    axes.axvline(1, color=INK, linewidth=1.2, zorder=3)
    axes.set_yticks(y, cases, color=INK, fontsize=8.5)
    for place, heading in headings:
        axes.annotate(
            heading, (0, place), (-6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", va="center", weight="bold", fontsize=9.5,
        )  # fmt: skip
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.xaxis.set_ticks_position("top")
    axes.tick_params(axis="both", length=0, colors=MUTED)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.minorticks_off()
    axes.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    used = [told for told in COLOURS if any(told == bar[2] for bar in bars)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[told]) for told in used]
    figure.suptitle("How many times faster fastrcnn is", x=0.01, ha="left", fontsize=14, weight="bold")
    figure.legend(handles, [LABELS[told] for told in used], loc="outside lower left", ncols=3, frameon=False)
    figure.supxlabel(machine(results).split(" Measured")[0], x=0.99, ha="right", fontsize=7.5, color=MUTED)
    figure.savefig(path, dpi=160, facecolor="white")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--markdown", type=Path, help="write the tables here instead of printing them")
    parser.add_argument("--chart", type=Path, help="write a chart of the ratios here")
    args = parser.parse_args()
    results = json.loads(args.results.read_text(encoding="utf-8"))
    text = markdown(results)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    if args.chart:
        draw(results, args.chart)


if __name__ == "__main__":
    main()
