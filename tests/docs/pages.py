"""The documentation as its tests read it: blocks of code, code within text, tables.

An HTML comment on the line before a block says what to do with it: `<!-- file: my.yaml -->` puts it into that file
before the page's snippets run, `<!-- not run: why -->` leaves a snippet at being compiled.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"(?:^<!-- ([^\n]*?) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    page: str
    line: int  # of the first line of the text
    language: str
    text: str
    mark: str  # what the comment before it says

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def page_names() -> list[str]:
    """README.md and docs/*.md."""
    return ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@cache
def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(*languages: str) -> list[Block]:
    """Every fenced block of these languages, of all pages, in their order."""
    found = []
    for page in page_names():
        for match in _BLOCK.finditer(read(page)):
            if match[2] in languages:
                line = read(page).count("\n", 0, match.start(3)) + 1
                found.append(Block(page, line, match[2], match[3], match[1] or ""))
    return found


def words(page: str) -> list[str]:
    """Every piece of code within the text. Of a table with a column "fastrcnn", which compares us with others, only
    what stands in that column."""
    found: list[str] = []
    header, ours = True, None
    for line in _BLOCK.sub("", read(page)).splitlines():
        if not line.startswith("|"):
            header, ours = True, None
        else:
            cells = [cell.strip() for cell in line.split("|")]
            if header and "fastrcnn" in cells:
                ours = cells.index("fastrcnn")
            header = False
            line = line if ours is None else cells[ours]
        found += _INLINE.findall(line)
    return found
