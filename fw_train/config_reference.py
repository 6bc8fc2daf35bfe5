"""The reference of all settings as Markdown: the dataclasses of the configuration, and the comments on their fields."""

import ast
import dataclasses
import inspect
import io
import json
import tokenize
from pathlib import Path
from typing import Any, NamedTuple

from fw_train.config import Config, SourceConfig

HEAD = """\
# Configuration

<!-- Written by `fw config --reference`; edit the comments in fw_train/config.py instead. -->

A run is configured by one YAML file with the sections below. What a file leaves out has its default; unknown names, values of
another type and settings that contradict each other are errors that say what would be right. Anything can be changed behind the
file name, in every command that takes a configuration:

    fw config configs/stage1.yaml train.steps=2000 'data.sizes_px=[[288,512]]' data.frames=41

prints what comes of it, every field named. The files in `configs/` are documents of the published schedules, with hardware, hours
and what to expect. Which settings a run may change when it goes on is told in [checkpoints.md](checkpoints.md).
"""


class Field(NamedTuple):
    name: str
    kind: str  # its type or the values that it takes
    default: str
    meaning: str


class Section(NamedTuple):
    name: str
    meaning: str
    fields: list[Field]


def reference() -> str:
    """The text of docs/configuration.md."""
    parts = [HEAD]
    for section in sections():
        rows = [f"| `{f.name}` | {f.kind} | {f.default} | {f.meaning} |" for f in section.fields]
        table = ["| setting | values | default | meaning |", "|---|---|---|---|", *rows]
        parts.append(f"## {section.name}\n\n{section.meaning}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


def sections() -> list[Section]:
    """Sections in the order of a file; the entries of `data.sources` follow their section."""
    classes = _documented_classes(Path(inspect.getfile(Config)))
    found: list[Section] = []
    for section in dataclasses.fields(Config):
        assert isinstance(section.default_factory, type)
        found.append(_section(section.name, f"{section.name}.", section.default_factory, classes))
        if section.name == "data":
            found.append(_section("data.sources", "", SourceConfig, classes))
    return found


class _Documented(NamedTuple):
    doc: str
    types: dict[str, ast.expr]
    comments: dict[str, str]


def _section(name: str, prefix: str, cls: type, classes: dict[str, _Documented]) -> Section:
    documented = classes[cls.__name__]
    fields = []
    for field in dataclasses.fields(cls):
        shown = "must be given" if field.default is dataclasses.MISSING else f"`{_yaml(field.default)}`"
        kind = _kind(documented.types[field.name])
        fields.append(Field(prefix + field.name, kind, shown, _sentence(documented.comments.get(field.name, ""))))
    return Section(name, documented.doc, fields)


def _documented_classes(path: Path) -> dict[str, _Documented]:
    """Docstrings, types and comments of the dataclasses in a module; a comment stands behind its field or right above it."""
    text = path.read_text(encoding="utf-8")
    comments: dict[int, tuple[str, bool]] = {}  # by line: text, and whether it has the line for itself
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = (
                token.string.removeprefix("#").strip(),
                not token.line[: token.start[1]].strip(),
            )
    found = {}
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
        types = {f.target.id: f.annotation for f in fields if isinstance(f.target, ast.Name)}
        told = {f.target.id: _comment(f, comments) for f in fields if isinstance(f.target, ast.Name)}
        found[node.name] = _Documented(ast.get_docstring(node) or "", types, told)
    return found


def _comment(field: ast.AnnAssign, comments: dict[int, tuple[str, bool]]) -> str:
    above: list[str] = []
    line = field.lineno - 1
    while line in comments and comments[line][1]:
        above.insert(0, comments[line][0])
        line -= 1
    behind = [comments[n][0] for n in range(field.lineno, (field.end_lineno or field.lineno) + 1) if n in comments]
    return " ".join([*above, *behind])


def _kind(annotation: ast.expr) -> str:
    """The type in words, or the values of a Literal."""
    match annotation:
        case ast.Subscript(value=ast.Name("Literal"), slice=ast.Tuple(elts=values)):
            return ", ".join(f"`{value.value!s}`" for value in values if isinstance(value, ast.Constant))
        case ast.Subscript(value=ast.Name("tuple"), slice=ast.Tuple(elts=[first, ast.Constant(value=end)])) if (
            end is ...
        ):
            return f"list of {_plural(_kind(first))}"
        case ast.Subscript(value=ast.Name("tuple"), slice=ast.Tuple(elts=[first, *_] as all_of_them)):
            return f"{len(all_of_them)} {_plural(_kind(first))}"
        case ast.BinOp(left=left, right=ast.Constant(value=None)):
            return f"{_kind(left)} or `null`"
        case ast.Name(name):
            return {"str": "text", "int": "whole number", "float": "number", "bool": "`true`, `false`"}.get(
                name, "mapping"
            )
    raise TypeError(f"no words for the type {ast.unparse(annotation)}")


def _plural(kind: str) -> str:
    return kind if kind.endswith("s") else f"{kind}s"


def _yaml(value: Any) -> str:
    return (value or "''") if isinstance(value, str) else json.dumps(value)


def _sentence(text: str) -> str:
    return text.replace("|", "\\|")
