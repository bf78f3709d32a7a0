"""Names of parameters in two projects, side by side."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from fastrcnn.weights.errors import WeightError

# {k}, {k+1}, {3k}, {3k+1}: a number in a name, as a multiple of a variable plus a constant
_FIELD = re.compile(r"\{(\d*)([a-z])(?:\+(\d+))?\}")


class _Template:
    def __init__(self, text: str):
        self.text = text
        literals = _FIELD.split(text)[::4]
        self.pattern = re.compile(r"(\d+)".join(re.escape(literal) for literal in literals))
        self.fields = [(int(m[1] or 1), m[2], int(m[3] or 0)) for m in _FIELD.finditer(text)]

    def parse(self, name: str) -> tuple[dict[str, int], str] | None:
        """The variables and the rest of a name that begins like this, or None."""
        match = self.pattern.match(name)
        if match is None:
            return None
        values: dict[str, int] = {}
        for number, (factor, variable, constant) in zip(match.groups(), self.fields, strict=True):
            value, remainder = divmod(int(number) - constant, factor)
            if remainder or value < 0:
                return None
            values[variable] = value
        return values, name[match.end() :]

    def format(self, values: dict[str, int]) -> str:
        return _FIELD.sub(lambda m: str(int(m[1] or 1) * values[m[2]] + int(m[3] or 0)), self.text)


class Renaming:
    """Rows (their beginning of a name, our beginning of it), usable in both directions; the first row that fits counts.

    Fields in braces stand for numbers: ("res{s+1}.", "layer{s}.") reads "res2." as "layer1.", and back.
    """

    def __init__(self, rows: Iterable[tuple[str, str]]):
        self._rows = [(_Template(theirs), _Template(ours)) for theirs, ours in rows]

    def ours(self, name: str) -> str | None:
        """Our name for one of theirs; None where no row fits."""
        return self._rename(name, 0)

    def convert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors under our names; those that no row fits keep their names."""
        return {self.ours(name) or name: value for name, value in state.items()}

    def export(self, state: Mapping[str, Tensor], project: str) -> dict[str, Tensor]:
        """The same tensors under their names; WeightError, with the list, for those that no row fits."""
        names = {name: self._rename(name, 1) for name in state}
        absent = [name for name, theirs in names.items() if theirs is None]
        if absent:
            raise WeightError(f"{project} has no counterpart of {', '.join(absent)}")
        return {names[name]: value for name, value in state.items()}

    def _rename(self, name: str, side: int) -> str | None:
        for row in self._rows:
            parsed = row[side].parse(name)
            if parsed is not None:
                return row[1 - side].format(parsed[0]) + parsed[1]
        return None
