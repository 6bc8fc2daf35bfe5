"""The documentation holds: links lead somewhere, commands exist with these options, tests that are cited exist."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
from documents import PAGES, anchors, blocks, commands, links

from fw_train.cli import COMMANDS, Group, main

EVERY_COMMAND = [command for page in PAGES for command in commands(page)]
TESTS_CITED = re.compile(r"`(tests/[\w/]+\.py)::([\w:]+)`")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings(page):
    broken = []
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [Path("README.md")]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = {page.parent / target.partition("#")[0] for target in links(page) if target.partition("#")[0]}
        waiting += [Path(*target.parts) for target in targets if target.suffix == ".md" and target.exists()]
    normal = {Path(str(page.resolve())) for page in reached}
    assert [str(page) for page in PAGES if page.resolve() not in normal] == []


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=lambda c: f"{c.page}:{c.line} {' '.join(c.words)}"[:90])
def test_every_command_that_is_shown_parses(command, monkeypatch, capsys):
    entry = COMMANDS.get(command.words[0])
    if isinstance(entry, Group):
        entry = entry.commands.get(command.words[1])
    assert entry is not None, f"there is no command fw {' '.join(command.words[:2])}"
    asked = []
    monkeypatch.setattr(importlib.import_module(entry.module), "run", lambda args: asked.append(args) or 0)
    try:
        code = main(command.words)
    except SystemExit as stop:
        code = stop.code
    assert code == 0, capsys.readouterr().err
    assert asked or "--help" in command.words


def test_cited_tests_exist():
    for page in PAGES:
        for file, name in TESTS_CITED.findall(page.read_text()):
            assert name in names_of_tests(Path(file)), f"{page} cites {file}::{name}"


def names_of_tests(path):
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)}
    return found


def test_numerics_cites_a_test_for_every_promise():
    rows = [line for line in Path("docs/numerics.md").read_text().splitlines() if line.startswith("| ")]
    promises = [row for row in rows if row.count("|") == 4 and not row.startswith("| what |")]
    assert len(promises) > 20
    assert [row for row in promises if not TESTS_CITED.search(row)] == []


def test_the_drawing_of_the_conventions_is_current():
    spec = importlib.util.spec_from_file_location("draw_conventions", "docs/draw_conventions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert Path("docs/conventions.svg").read_text() == module.drawing(), "run docs/draw_conventions.py again"


def test_marked_programs_are_found():
    marked = [block for page in PAGES for block in blocks(page)]
    assert sum(block.marker == "run" and block.language == "python" for block in marked) >= 4
    assert [block.marker for block in marked if block.language == "yaml"] == ["file: configs/mine.yaml"]
