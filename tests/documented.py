"""The commands that README and docs show, read from the pages themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([README, *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(?:sh|shell|bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`(deepar [^`]+)`")
INDENTED = re.compile(r"^    ((?:\w+=\S+ )?deepar .+)$", re.MULTILINE)


@dataclass(frozen=True)
class Line:
    """One command of a page."""

    page: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def lines_of(page: Path) -> Iterator[Line]:
    """The commands in a page's fenced blocks."""
    for block in FENCE.findall(page.read_text(encoding="utf-8")):
        for text in block.replace("\\\n", " ").splitlines():
            stripped = text.removeprefix("$ ").split("  #")[0].strip()
            if stripped and not stripped.startswith("#"):
                yield Line(page.name, " ".join(stripped.split()))


def indented_lines_of(page: Path) -> Iterator[Line]:
    """The commands in a page's indented lists; a description follows after at least three spaces."""
    for text in INDENTED.findall(page.read_text(encoding="utf-8").replace("\\\n", " ")):
        command = re.split(r"\s{3,}(?=[#a-z])|\s{2,}#", text)[0]
        yield Line(page.name, " ".join(command.split()))


def inline_lines_of(page: Path) -> Iterator[Line]:
    """The commands between backticks in a page's sentences: whole commands, or only a command's name."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for found in INLINE.findall(text):
        yield Line(page.name, " ".join(found.split()))
