"""The messages that troubleshooting and the data page quote are those of the program."""

import ast
import re

import pytest
from docs.pages import ROOT, blocks

ANYTHING = "…"


def text_of(node: ast.AST) -> str | None:
    """The text of a literal, … where a value is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[\w.]+", ANYTHING, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else ANYTHING for part in node.values)
    return None


@pytest.fixture(scope="module")
def messages() -> list[str]:
    """Every text in the sources."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "fastrcnn").rglob("*.py")]
    return [text for tree in trees for node in ast.walk(tree) if (text := text_of(node))]


QUOTED = [block for block in blocks("text") if block.page in ("docs/troubleshooting.md", "docs/dataset.md")]


@pytest.mark.parametrize("block", QUOTED, ids=str)
def test_message_is_in_the_program(block, messages):
    wanted = " ".join(block.text.split()).removeprefix("error: ")
    assert len(wanted.replace(ANYTHING, "")) > 15
    assert any(wanted in " ".join(message.split()) for message in messages), wanted


def test_there_are_many():
    assert len(QUOTED) > 25
