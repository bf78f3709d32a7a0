"""Heads for other classes, made of the rows of trained ones."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from fastrcnn.weights.errors import WeightError

# the last layers, whose rows belong to classes; a cascade numbers its stages
_REGIONS = re.compile(
    r"roi_heads\.(?:box|mask)\.predictor\.(?:\d+\.)?(cls_score|bbox_pred|mask_fcn_logits)\.(?:weight|bias)"
)
_RETINA = re.compile(r"rpn\.head\.cls_logits\.(?:weight|bias)")
_ROWS = {"cls_score": 1, "bbox_pred": 4, "mask_fcn_logits": 1}  # of a class


def select_classes(
    state: Mapping[str, Tensor], classes: Mapping[int, int], initial: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The state dict, under our names, with the last layers for other classes.

    classes: {our label: their label}, 1 being the first; the background is taken along. initial: the state dict of the
    model that is to be filled: rows of labels without a counterpart stay as they are there; without it our labels are
    1 to len(classes). A layer with one box for all classes stays as it is. WeightError for a label that is not there.
    """
    if any(label < 1 for label in (*classes, *classes.values())):
        raise WeightError(f"classes: {dict(classes)}; the first label is 1, the background is taken along")
    out = dict(state)
    for name, value in state.items():
        form = _form(name, state)
        if form is None:
            continue
        anchors, rows, background = form
        theirs = value.unflatten(0, (anchors, -1, rows))  # [anchors, classes, rows, ...]
        if initial is None:
            shape = list(theirs.shape)
            shape[1] = len(classes) + background
            mine = theirs.new_empty(shape)
        elif name in initial:
            mine = initial[name].detach().to(theirs, copy=True).unflatten(0, (anchors, -1, rows))
        else:
            continue
        first = 1 - background  # the label of the first row
        pairs = {**({0: 0} if background else {}), **classes}
        _check("our", classes, first + mine.shape[1])
        _check("their", classes.values(), first + theirs.shape[1])
        mine[:, [label - first for label in pairs]] = theirs[:, [label - first for label in pairs.values()]]
        out[name] = mine.flatten(0, 2)
    return out


def _form(name: str, state: Mapping[str, Tensor]) -> tuple[int, int, int] | None:
    """Of a layer whose rows are classes: anchors, rows of a class, and 1 where the background has rows too."""
    match = _REGIONS.fullmatch(name)
    if match is not None:
        rows = _ROWS[match[1]]
        scores = name.replace("bbox_pred", "cls_score")
        return (1, rows, 1) if rows == 1 or len(state[name]) == rows * len(state[scores]) else None
    if _RETINA.fullmatch(name) and "rpn.head.cls_tower.0.weight" in state:
        return len(state["rpn.head.bbox_pred.bias"]) // 4, 1, 0
    return None


def _check(whose: str, labels: Iterable[int], end: int) -> None:
    wrong = sorted(label for label in labels if label >= end)
    if wrong:
        raise WeightError(f"classes: {whose} labels {wrong} do not exist; they end at {end - 1}")
