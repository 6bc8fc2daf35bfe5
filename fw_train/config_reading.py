"""Strict reading of configuration files: plain YAML into frozen dataclasses, and nothing guessed."""

import dataclasses
import difflib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 8


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what, where and what to do."""


def read_tree(path: Path) -> dict[str, Any]:
    """The sections of a YAML file."""
    if not path.is_file():
        raise ConfigError(f"no configuration file {path}")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes; a configuration has at most {MAX_BYTES}")
    tree = parse(path.read_text(encoding="utf-8"), str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `model:` at the top, found {_shown(tree)}")
    return tree


class _StrictLoader(yaml.SafeLoader):
    """YAML without aliases (a few of them can blow up to gigabytes), repeated keys and deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError(f"{self._line()}: aliases are not allowed in a configuration; write the value out")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"{self._line()}: nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = getattr(key, "value", None)
            if isinstance(name, str) and name in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: `{name}` is given twice; keep one")
            seen.add(name if isinstance(name, str) else id(key))
        return super().construct_mapping(node, deep)

    def _line(self) -> str:
        return f"line {self.peek_event().start_mark.line + 1}"


def parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not readable as plain YAML: {error}") from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    names = path.strip().split(".")
    if not separator or len(names) != 2 or not all(names):
        raise ConfigError(f"override `{override}` is not of the form section.key=value, for example data.frames=41")
    section = tree.setdefault(names[0], {})
    if section is None:
        section = tree[names[0]] = {}
    if not isinstance(section, dict):
        raise ConfigError(f"override `{override}`: `{names[0]}` is not a section")
    section[names[1]] = parse(text, f"override `{override}`") if text.strip() else ""  # `key=` means the empty text


def build(cls: Any, tree: Any, where: str, prefix: str = "") -> Any:
    """A dataclass from nested mappings; unknown, missing and mistyped keys are errors with the key's full name."""
    if tree is None:
        tree = {}
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}: `{prefix.rstrip('.')}` is a section of keys, got {_shown(tree)}")
    hints = get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise ConfigError(f"{where}: unknown key `{name}`{_nearest(str(key), hints, prefix)}")
        hint = hints[key]
        values[key] = (
            build(hint, value, where, f"{name}.")
            if dataclasses.is_dataclass(hint)
            else _value(hint, value, where, name)
        )
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise ConfigError(f"{where}: `{prefix}{missing[0]}` is missing; give it")
    return cls(**values)


def _nearest(key: str, valid: Mapping[str, Any], prefix: str) -> str:
    close = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    if close:
        return f"; did you mean `{prefix}{close[0]}`?"
    return f"; valid here: {', '.join(prefix + name for name in valid)}"


def _value(hint: Any, value: Any, where: str, name: str) -> Any:
    """The value as the field's type, or an error; nothing is rounded or guessed."""
    origin, args = get_origin(hint), get_args(hint)
    told = f"{where}: `{name}`"
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where, f"{name}.")
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _value(next(a for a in args if a is not type(None)), value, where, name)
    if origin is Literal:
        if value not in args or isinstance(value, bool):
            raise ConfigError(f"{told} is one of {', '.join(map(str, args))}, got {_shown(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{told} is a list, got {_shown(value)}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise ConfigError(f"{told} has {len(kinds)} entries, got {len(value)}")
        return tuple(
            _value(kind, v, where, f"{name}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value, strict=True))
        )
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-5 as text
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{told} is of type {hint.__name__}, got {_shown(value)}")


def _shown(value: Any) -> str:
    return f"{str(value)[:80]!r} ({type(value).__name__})"
