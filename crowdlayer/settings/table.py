"""All settings as people read them: `--help`, and the table in docs/settings.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from .environment import PREFIX
from .groups import DataSettings, JobSettings, SweepSettings, TrainingSettings
from .values import Unit


@dataclass(frozen=True)
class Row:
    """One setting as it is shown to people."""

    name: str
    type: str
    default: str
    unit: str
    text: str


def table() -> list[Row]:
    """All settings in the order of their groups, a row each."""
    return [
        Row(
            PREFIX + name.upper(),
            _type_name(field),
            "required" if field.is_required() else _shown(field.default),
            next((note.name for note in field.metadata if isinstance(note, Unit)), ""),
            field.description or "",
        )
        for group in (DataSettings, TrainingSettings, JobSettings, SweepSettings)
        for name, field in group.model_fields.items()
    ]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def _type_name(field: FieldInfo) -> str:
    return " or ".join(dict.fromkeys(_type_names(field.annotation)))


def _type_names(annotation: Any) -> Iterator[str]:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return
    if origin is Annotated:
        yield from _type_names(args[0])
    elif origin is Literal:
        yield "|".join(args)
    elif origin is dict:
        yield "JSON object"
    elif origin is tuple:
        yield f"list of {' or '.join(_type_names(args[0]))}"
    elif args:
        for arg in args:
            yield from _type_names(arg)
    else:
        yield {"str": "text", "int": "integer", "float": "number", "bool": "true|false"}[annotation.__name__]
