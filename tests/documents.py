"""What the Markdown files show: headings, links, commands, programs."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

PAGES = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
PROGRAMS = ("fw", ".venv/bin/fw")


class Command(NamedTuple):
    page: Path
    line: int
    words: list[str]  # behind `fw`


class Block(NamedTuple):
    page: Path
    marker: str  # of the comment above it: `run`, or `file: NAME`
    language: str
    text: str


def prose(page):
    """The text without what stands in blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors(page):
    """As code hosts make them from headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    """Targets of links and pictures that stand in this repository."""
    found = re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", prose(page)) + re.findall(r'(?:src|href)="([^"]+)"', prose(page))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def code_lines(page):
    """Lines of code blocks, indented or fenced, with their numbers; `\\` joins lines."""
    fenced, joined = False, ""
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.startswith("```"):
            fenced = not fenced
            continue
        if fenced or line.startswith("    "):
            joined += line.strip().removesuffix("\\")
            if not line.rstrip().endswith("\\"):
                yield number, joined
                joined = ""


def commands(page):
    """Every `fw ...` of code blocks and tables, as its words; what a table only names, as `fw data pack`, is left out."""
    shown = list(code_lines(page))
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.startswith("|"):
            shown += [(number, cell) for cell in re.findall(r"`([^`]*)`", line) if re.search(r"fw .*([/.=]| --)", cell)]
    for number, text in shown:
        for part in re.split(r"&&|\|\||;|\|", text):
            words = shlex.split(part, comments=True) if part.strip().startswith(PROGRAMS) else []
            if words and words[0] in PROGRAMS:
                yield Command(page, number, words[1:])


def blocks(page):
    """Fenced blocks that a comment `<!-- ... -->` right above them marks."""
    found = re.findall(r"^<!-- (run|file: \S+) -->\n```(\w+)\n(.*?)^```$", page.read_text(), flags=re.M | re.S)
    return [Block(page, *block) for block in found]
