"""The settings that the environment holds, or every complaint about them at once."""

from __future__ import annotations

import os
from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from ..errors import SettingsError, listed
from ..machine.launch import array_index
from .groups import JobSettings, RunSettings, SweepSettings
from .values import folder_and_name, is_archive, nearest, quoted

PREFIX = "CROWDLAYER_"
ENVIRONMENT = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, validate_default=False)
"""Beside what the groups say for themselves. The rules are for what is set: no SWEEP is not an empty one."""
MISSING = "must be set"


class Settings(RunSettings, JobSettings, SweepSettings, BaseSettings):
    """All settings, from the environment: CROWDLAYER_<NAME>."""

    model_config = ENVIRONMENT

    @property
    def output_location(self) -> str:
        """OUTPUT, or `<tasks>`, or the folder of the archive that `<tasks>` is."""
        if self.output is not None:
            return self.output
        return folder_and_name(self.tasks)[0] if is_archive(self.tasks) else self.tasks


class _Sweep(SweepSettings, BaseSettings):
    """What is to be known before the others: SWEEP may have one that must be set."""

    model_config = ENVIRONMENT | SettingsConfigDict(extra="ignore")


def _of_sweep() -> dict[str, Any]:
    """The settings that this run's entry of SWEEP has, and its place there.

    Raises:
        SettingsError: SWEEP has no such entry, or it is not known which.
    """
    said = _Sweep()
    if not said.sweep:
        return {}
    index, source = said.sweep_index, f"{PREFIX}SWEEP_INDEX"
    if index is None:
        if (found := array_index()) is None:
            raise SettingsError(f"{source}: must be set, this run is in no array that would tell which of SWEEP it is")
        source, index = found
    if index >= len(said.sweep):
        raise SettingsError(f"{source}: must be below {len(said.sweep)}, the entries of SWEEP, got {index}")
    entry = {name.lower(): value for name, value in said.sweep[index].items()}
    names = Settings.model_fields.keys() - _Sweep.model_fields.keys()
    if unknown := sorted(entry.keys() - names):
        complaints = [f"{PREFIX}SWEEP: {name!r} is not a setting{nearest(name, names)}" for name in unknown]
        raise SettingsError(listed(complaints))
    return entry | {"sweep_index": index}


def load_settings() -> Settings:
    """The settings in the environment; of a sweep's entry, where there is one.

    Raises:
        SettingsError: with every complaint at once.
    """
    known = {name.upper() for name in Settings.model_fields}
    complaints = [
        f"{name}: is not a setting{nearest(name[len(PREFIX) :].upper(), known, PREFIX)}"
        for name in sorted(os.environ)
        if name.upper().startswith(PREFIX) and name.removeprefix(PREFIX) not in known
    ]
    entry: dict[str, Any] | None = None
    try:
        entry = _of_sweep()
    except SettingsError as error:
        complaints.append(str(error))
    except ValidationError:
        pass  # what is wrong with SWEEP itself is wrong below, too
    try:
        settings = Settings(**entry or {})
    except ValidationError as error:
        found = setting_complaints(error, PREFIX)
        if entry is None:  # which may say what is missing
            found = [complaint for complaint in found if not complaint.endswith(MISSING)]
        complaints += found
    if complaints:
        raise SettingsError(listed(complaints))
    if entry and "output_name" not in entry:
        settings = settings.model_copy(update={"output_name": f"{settings.output_name}-{settings.sweep_index}"})
    return settings


def setting_complaints(error: ValidationError, prefix: str = "") -> list[str]:
    """One line per setting that `error` names: the setting, the rule, the value."""
    rules: dict[str, list[str]] = {}
    values: dict[str, object] = {}
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0]) if problem["loc"] else ""
        rule = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        rules.setdefault(name, []).append(MISSING if problem["type"] == "missing" else rule)
        values.setdefault(name, problem["input"])
    return [
        f"{prefix + name.upper() if prefix else name}: {' or '.join(dict.fromkeys(found))}"  # a union has several rules
        + ("" if found == [MISSING] else f", got {quoted(values[name])}")
        for name, found in rules.items()
    ]
