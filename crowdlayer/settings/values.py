"""The forms that a setting's value can have, with the rule that refuses all others."""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_settings import NoDecode

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
NO_TEXT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""Control characters, and what is not UTF-8 in the environment: no file of the results could hold it."""

ACCESS_POINT = re.compile(r"(?<=^s3://)arn:[\w.:-]+:(outpost[/:][\w-]+[/:])?accesspoint/[\w.-]+", re.ASCII)
"""An ARN in the place of a bucket, as AWS writes it; with colons for its slashes the location is the same."""
IN_QUOTES = re.compile(r"""\s*(["']).*\1\s*""", re.DOTALL)
"""What an env file leaves of a quoted value, which a shell does not."""


@dataclass(frozen=True)
class Unit:
    """The unit of a setting, shown in `--help` and in docs/settings.md."""

    name: str


@cache
def classification_models() -> frozenset[str]:
    """The names in torchvision.models, read from its source: importing torch to check a name would take seconds."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return frozenset()
    registered = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
    sources = (Path(spec.origin).parent / "models").glob("*.py")
    return frozenset(name for source in sources for name in registered.findall(source.read_text(encoding="utf-8")))


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`", did you mean …?"` with the known name closest to `name`, shown behind `prefix`; or nothing."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.55)
    return f", did you mean {prefix}{close[0]}?" if close else ""


def is_archive(location: str) -> bool:
    """Whether `location` names an archive, by its ending; the name of a bucket does not count."""
    bucket_alone = location.startswith("s3://") and "/" not in location.removeprefix("s3://")
    return location.lower().endswith(ARCHIVES) and not bucket_alone


def folder_and_name(location: str) -> tuple[str, str]:
    """The folder that holds what a location names, and its name there."""
    folder, slash, name = location.rpartition("/")
    return folder or slash or ".", name


def name_of(location: str) -> str:
    """What one calls the data set at a location: the name of its folder or prefix, or of its archive without ending."""
    whole = location if location.startswith("s3://") else str(Path(location).absolute())
    _, name = folder_and_name(whole)
    if not is_archive(location):
        return name
    (ending,) = (ending for ending in ARCHIVES if name.lower().endswith(ending))
    return name[: -len(ending)]


def lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _as_word(value: object, rule: ValidatorFunctionWrapHandler) -> object:
    """By the rule in small letters; what it refuses is shown as it was written."""
    try:
        return rule(lower(value))
    except ValidationError:
        return rule(value)


def _split(value: object) -> object:
    """A list as JSON, or its items with commas between them."""
    if not isinstance(value, str):
        return value
    if IN_QUOTES.fullmatch(value):  # which an env file leaves there
        raise ValueError("must be a list without quotes around it")
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError("must be a list in JSON, or items with commas between them") from error
    return [item.strip() for item in value.split(",")]


def _is_path(value: str) -> bool:
    """Whether `value` is a path, and no URI: a folder named s3: would go with the container, as one in quotes would.

    Raises:
        ValueError: it would be one, but for what no shell has taken away.
    """
    if not value.strip() or IN_QUOTES.fullmatch(value) or NO_TEXT.search(value):
        return False
    if value != value.strip():
        raise ValueError("must have no blanks around it")
    if value.partition("/")[0] == "~":
        raise ValueError("must be written out, without ~")
    return not re.match(r"""["']*(s3:|\w+://)""", value, re.IGNORECASE)


def _entry(value: object) -> object:
    """What a run of a sweep has for itself; names in capitals or not, but once."""
    if not isinstance(value, dict):
        raise ValueError("must be a JSON list with an object of settings for each run")
    names = [name.lower() for name in value]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"must have each setting of a run once, {twice!r} is there twice")
    return value


def _some(value: tuple[object, ...]) -> tuple[object, ...]:
    if not value:
        raise ValueError("must have at least one run")
    return value


def _file(value: str) -> str:
    if not _is_path(value):
        raise ValueError("must be a file on this machine")
    return value


def _folder(value: str) -> str:
    if not _is_path(value):
        raise ValueError("must be a folder on this machine")
    return value


def as_location(value: str) -> str:
    """A folder, a file, or an s3:// URI without credentials or query."""
    if _is_path(value):
        return value.rstrip("/") or "/"
    if not value.startswith("s3://"):
        raise ValueError("must be a path or an s3:// URI")
    if not re.fullmatch(r"s3://(arn:[\w.:-]+|[\w.-]+)(/[^?#]*)?", value, re.ASCII) or NO_TEXT.search(value):
        raise ValueError("must have the form s3://bucket or s3://bucket/prefix, without credentials or query")
    bucket, _, prefix = one_spelling(value).removeprefix("s3://").partition("/")
    return f"s3://{bucket}/{prefix.strip('/')}".rstrip("/")  # one spelling of a place, by which places are compared


def one_spelling(location: str) -> str:
    """A location in which a bucket's name has no slash."""
    return ACCESS_POINT.sub(lambda arn: arn[0].replace("/", ":"), location, count=1)


def _file_name(value: str) -> str:
    if not re.fullmatch(r"\w[\w .+=@-]*", value) or len(value.encode()) > 200:
        raise ValueError("must be a file name: letters, digits and ' .+=@_-', at most 200 bytes, no leading dot")
    if value.lower().endswith((".json", ".pth")):
        raise ValueError("must be a file name without .json and .pth, which the results and the model get")
    return value


def _known_model(value: str) -> str:
    known = classification_models()
    if known and value not in known:
        raise ValueError(f"is not a classification model of torchvision.models{nearest(value, known)}")
    return value


def _rising(value: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(value)))


def _percent(value: object) -> object:
    """`2 %` is 0.02, and `100 %` next to 1, which would be one image."""
    percent = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*%\s*", value, re.ASCII) if isinstance(value, str) else None
    if percent is None:
        return value
    if float(percent[1]) > 100:
        raise ValueError("must be at most 100 %")
    return min(float(percent[1]) / 100, math.nextafter(1, 0))


def _share_or_count(value: float) -> float:
    if value > 1 and not value.is_integer():
        raise ValueError("must be a share below 1 or a whole number of images")
    return value


def _none_or_drawn(value: float) -> float:
    """Refuse what torch cannot draw from: both gammas of a narrower Beta underflow, and nearly 0 or 1 becomes 0.5."""
    if 0 < value < 0.01:
        raise ValueError("must be 0 or at least 0.01")
    return value


def _none_or_several(value: int) -> int:
    if value == 1:
        raise ValueError("must be 0 or at least 2")
    return value


def _class_names(value: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if value is not None and (len(value) < 2 or len(set(value)) < len(value) or not all(value)):
        raise ValueError("must be at least two different names")
    if any(NO_TEXT.search(name) for name in value or ()):
        raise ValueError("must be names in UTF-8 without control characters")
    return value


def quoted(value: object, longest: int = 200) -> str:
    """`value` for a message: no credentials or signature of a URI, and not pages of it."""
    if isinstance(value, str) and "://" in value:
        value = re.sub(r"([?#]).*", r"\1***", re.sub(r"://.*@", "://***@", value, flags=re.DOTALL), flags=re.DOTALL)
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}…"


Location = Annotated[str, AfterValidator(as_location)]
File = Annotated[str, AfterValidator(_file)]
Folder = Annotated[str, AfterValidator(_folder)]
FileName = Annotated[str, AfterValidator(_file_name)]
Word = WrapValidator(_as_word)
Flag = Annotated[bool, Word]
ModelName = Annotated[str, Word, AfterValidator(_known_model)]
ListOf = (NoDecode, BeforeValidator(_split))
Once = AfterValidator(lambda names: tuple(dict.fromkeys(names)))
Rising = AfterValidator(_rising)
Names = AfterValidator(_class_names)
Finite = Field(allow_inf_nan=False)
Percent = BeforeValidator(_percent)
ShareOrCount = AfterValidator(_share_or_count)
NoneOrDrawn = AfterValidator(_none_or_drawn)
NoneOrSeveral = AfterValidator(_none_or_several)
Entry = Annotated[dict[str, Any], BeforeValidator(_entry)]
Some = AfterValidator(_some)
