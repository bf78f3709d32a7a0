"""Line charts as SVG text for HTML pages, without scripts."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

_WIDTH, _HEIGHT = 560, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 40
_POINTS = 400  # more are averaged in groups
COLOURS = 6  # classes s0 … s5 of lines, which the page's style colours
_DASHES = ("", "7 3", "2 2.5")


@dataclass(frozen=True, slots=True)
class Series:
    """A line of a chart: x and y of the same length, NaN where there is none; main: the thick line in the text's
    colour; marked: with a dot at each point; dashed, where its kind asks for it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    main: bool = False
    marked: bool = False
    dashed: bool = False


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    y_range: tuple[float, float] | None = None,
    x_range: tuple[float, float] | None = None,
) -> str:
    """An HTML figure: SVG and legend. Lines differ in colour and, beyond COLOURS, in dashes.

    log: y on a logarithmic scale, where all values are positive. Lines of more than 400 points are drawn through the
    means of groups of points. Empty text where there is nothing to draw.
    """
    points = [_thinned(np.asarray(s.x, float), np.asarray(s.y, float)) for s in series]
    x, y = (np.concatenate([p[k][np.isfinite(p[1])] for p in points] or [np.zeros(0)]) for k in (0, 1))
    if not len(x):
        return ""
    log = log and y.min() > 0
    low_x, high_x = x_range or (x.min(), x.max())
    low_y, high_y = y_range or (y.min() if log else min(y.min(), 0), y.max())
    high_x += high_x == low_x
    high_y = high_y * 1.1 if high_y == low_y and high_y > 0 else high_y + (high_y == low_y)
    ticks = [t for t in MaxNLocator(6, integer=high_x > 2).tick_values(low_x, high_x) if low_x <= t <= high_x]
    if log:
        low_y, high_y = low_y / 1.1, high_y * 1.1
        decades = np.log10(high_y / low_y)
        locator = LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.8 else np.arange(1.0, 10))
    else:
        locator = MaxNLocator(5)
    levels = [t for t in locator.tick_values(low_y, high_y) if low_y <= t <= high_y * (1 + 1e-9)]

    def across(value: np.ndarray) -> np.ndarray:
        return _LEFT + (value - low_x) / (high_x - low_x) * (_WIDTH - _LEFT - _RIGHT)

    def up(value: np.ndarray) -> np.ndarray:
        share = np.log(value / low_y) / np.log(high_y / low_y) if log else (value - low_y) / (high_y - low_y)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    floor, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">']
    for tick in levels:
        at = f"{up(np.float64(tick)):.1f}"
        parts.append(f'<path class="grid" d="M{_LEFT} {at}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at}" dy="4" text-anchor="end">{tick:.4g}</text>')
    for tick in ticks:
        at = f"{across(np.float64(tick)):.1f}"
        parts.append(f'<path class="grid" d="M{at} {_TOP}V{floor}"/>')
        parts.append(f'<text x="{at}" y="{floor + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{floor}H{right}"/>')
    middle = (_TOP + floor) / 2
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    legend = []
    for (line, style), (xs, ys) in zip(_styles(series), points, strict=True):
        drawn = [(f"{a:.1f}", f"{b:.1f}") if np.isfinite(b) else None for a, b in zip(across(xs), up(ys), strict=True)]
        path = "".join(
            "" if p is None else f"{'M' if k == 0 or drawn[k - 1] is None else 'L'}{p[0]} {p[1]}"
            for k, p in enumerate(drawn)
        )
        title = f"<title>{escape(line.name)}</title>"
        parts.append(f'<path {style} d="{path}">{title}</path>')
        if line.marked or len(xs) == 1:
            dots = "".join(f'<circle cx="{p[0]}" cy="{p[1]}" r="3.5"/>' for p in drawn if p is not None)
            parts.append(f"<g {style}>{dots}{title}</g>")
        legend.append(f'<span><svg viewBox="0 0 28 8"><path {style} d="M1 4H27"/></svg>{escape(line.name)}</span>')
    return f"<figure>{''.join(parts)}</svg><figcaption>{''.join(legend)}</figcaption></figure>"


def _styles(series: Sequence[Series]) -> list[tuple[Series, str]]:
    styles = []
    number = 0
    for line in series:
        dashes = _DASHES[1] if line.dashed else "" if line.main else _DASHES[number // COLOURS % len(_DASHES)]
        name = "line main" if line.main else f"line s{number % COLOURS}"
        number += not line.main
        styles.append((line, f'class="{name}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")))
    return styles


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= _POINTS:
        return x, y
    groups = np.array_split(np.arange(len(x)), _POINTS)
    return np.array([x[g].mean() for g in groups]), np.array([y[g].mean() for g in groups])
