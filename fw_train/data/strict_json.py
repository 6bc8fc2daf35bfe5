"""JSON that is what it should be: dataclasses of exactly the named fields and types, and no NaN, no name given twice."""

import json
import math
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


class SchemaError(ValueError):
    """A file that is not what the schema asks for: where, what was found, and what would be right."""


def read_json(text: str | bytes, where: str) -> Any:
    """JSON as the standard has it: no duplicate names, no NaN, no infinity."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        document: dict[str, Any] = {}
        for name, value in items:
            if name in document:
                raise SchemaError(f"{where}: {name!r:.40} is given twice in one object")
            document[name] = value
        return document

    def constant(name: str) -> None:
        raise SchemaError(f"{where}: {name} is not JSON; write null or leave the entry out")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except SchemaError:
        raise
    except RecursionError:
        raise SchemaError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise SchemaError(f"{where} is not JSON: {error}") from None


def read_record(kind: type[Record], document: object, where: str) -> Record:
    """The dataclass of an object that has exactly its fields (those with a default may be missing), of their types."""
    if not isinstance(document, dict):
        raise SchemaError(f"{where}: an object is needed, not {document!r:.80}")
    known, required = _fields(kind)  # type: ignore[arg-type]
    missing = [name for name in required if name not in document]
    unknown = [name for name in document if name not in known]
    if missing or unknown:
        raise SchemaError(
            f"{where}: "
            + " and ".join([f"no {name}" for name in missing] + [f"an unknown {name!r:.40}" for name in unknown])
            + f"; the fields are {', '.join(known)}"
        )
    values = {name: _value(known[name], value, f"{where}, {name}") for name, value in document.items()}
    return kind(**values)


@cache
def _fields(kind: type[Any]) -> tuple[dict[str, Any], list[str]]:
    """Types of a dataclass's fields, and the names of those without a default."""
    types = get_type_hints(kind)
    known = {field.name: types[field.name] for field in fields(kind)}
    return known, [field.name for field in fields(kind) if field.default is MISSING]


def _value(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type of a field."""
    if type(value) is kind and (kind is int or (kind is float and math.isfinite(value))):  # a manifest has 100,000s
        return value
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise SchemaError(f"{where}: {value!r:.40} is not one of {', '.join(get_args(kind))}")
        return value
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        return read_record(kind, value, where)
    optional = type(None) in getattr(kind, "__args__", ())
    kind = next(part for part in kind.__args__ if part is not type(None)) if optional else kind
    if value is None and optional:
        return None
    if kind == tuple[float, ...]:
        if not isinstance(value, list):
            raise SchemaError(f"{where}: a list of numbers is needed, not {value!r:.80}")
        return tuple(_value(float, item, where) for item in value)
    # A bool is an int to Python, and an int may stand for a float.
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        wanted = {int: "a whole number", float: "a number", str: "a string"}[kind]
        raise SchemaError(f"{where}: {wanted} is needed, not {value!r:.80}")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON's escapes can express
            raise SchemaError(f"{where}: {value!r:.80} is no text") from None
    if kind is float:
        value = float(value) if abs(value) < 1e300 else math.inf
        if not math.isfinite(value):
            raise SchemaError(f"{where}: the number is out of range")
    return value
