"""Every setting, in three groups: the data, the training, the job.

A setting is a field, its description the docstring under it, its unit a note on its type; `--help`, the README's
table and the messages are made from these. Nothing here imports torch: a wrong setting is reported in a second.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .errors import SettingsError, listed
from .machine.launch import array_index

PREFIX = "CROWDLAYER_"
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
NO_TEXT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""Control characters, and what is not UTF-8 in the environment: no file of the results could hold it."""


@dataclass(frozen=True)
class Unit:
    """The unit of a setting, shown in `--help` and in the README."""

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
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f", did you mean {prefix}{close[0]}?" if close else ""


def is_archive(location: str) -> bool:
    """Whether `location` names an archive, by its ending; the name of a bucket does not count."""
    bucket_alone = location.startswith("s3://") and "/" not in location.removeprefix("s3://")
    return location.lower().endswith(ARCHIVES) and not bucket_alone


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _split(value: object) -> object:
    """A list as JSON, or its items with commas between them."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except RecursionError as error:
            raise ValueError("must be a list, is lists in lists") from error
    return [item.strip() for item in value.split(",")]


def _is_path(value: str) -> bool:
    """Whether `value` is a path, and no URI: a folder named s3: would go with the container."""
    return bool(value.strip()) and not re.match(r"s3:|\w+://", value, re.IGNORECASE) and not NO_TEXT.search(value)


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
        return value
    if not value.startswith("s3://"):
        raise ValueError("must be a path or an s3:// URI")
    if not re.fullmatch(r"s3://(arn:[\w.:-]+|[\w.-]+)(/[^?#]*)?", value, re.ASCII) or NO_TEXT.search(value):
        raise ValueError("must have the form s3://bucket or s3://bucket/prefix, without credentials or query")
    return value.rstrip("/")


def _file_name(value: str) -> str:
    if not re.fullmatch(r"\w[\w .+=@-]*", value) or len(value.encode()) > 200:
        raise ValueError("must be a file name: letters, digits and ' .+=@_-', at most 200 bytes, no leading dot")
    return value


def _known_model(value: str) -> str:
    known = classification_models()
    if known and value not in known:
        raise ValueError(f"is not a classification model of torchvision.models{nearest(value, known)}")
    return value


def _rising(value: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(value)))


def _percent(value: object) -> object:
    """`2 %` is 0.02."""
    percent = re.fullmatch(r"\s*([\d.]+)\s*%\s*", value) if isinstance(value, str) else None
    return float(percent[1]) / 100 if percent else value


def _share_or_count(value: float) -> float:
    if value > 1 and not value.is_integer():
        raise ValueError("must be a share below 1 or a whole number of images")
    return value


def _class_names(value: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if value is not None and (len(value) < 2 or len(set(value)) < len(value) or not all(value)):
        raise ValueError("must be at least two different names")
    if any(NO_TEXT.search(name) for name in value or ()):
        raise ValueError("must be names in UTF-8 without control characters")
    return value


Location = Annotated[str, AfterValidator(as_location)]
Word = BeforeValidator(_lower)
ListOf = (NoDecode, BeforeValidator(_split))
Finite = Field(allow_inf_nan=False)


class Group(BaseModel):
    """A group of settings: typed, checked once, then unchangeable."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True, validate_default=False
    )


class DataSettings(Group):
    """Which images and answers, and what is known about them."""

    tasks: Location
    """The data set: a folder, an s3://bucket/prefix, or one archive (.tar, .tar.gz, .zip) at either place."""
    answers: Location | None = None
    """Where the answers are if not in `<tasks>/answers.json`; JSON, or .csv or .parquet of task, worker, label."""
    n_classes: Annotated[int, Field(ge=2, le=100_000)] | None = None
    """The number of classes; found in the data, and must agree with it when given."""
    classes: Annotated[tuple[str, ...] | None, *ListOf, AfterValidator(_class_names)] = None
    """The class names in the order of the labels, as a JSON list or with commas; found in the data."""
    val_fraction: Annotated[float, Field(gt=0, lt=1), Unit("share of the tasks")] = 0.1
    """The part of the train tasks that is held out to choose the epoch when there is no val/."""
    path_remove: Location | None = None
    """Peerannot's file of tasks to leave out."""
    max_bad_images: Annotated[
        float, BeforeValidator(_percent), Field(ge=0), AfterValidator(_share_or_count), Unit("images")
    ] = 0.01
    """How many broken images may be left out before the job refuses the data: below 1 a share of all, else a number."""

    @field_validator("classes")
    @classmethod
    def _as_many_as_said(cls, value: tuple[str, ...] | None, others: ValidationInfo) -> tuple[str, ...] | None:
        wanted = others.data.get("n_classes")
        if value is not None and wanted is not None and len(value) != wanted:
            raise ValueError(f"must be as many as n_classes={wanted}")
        return value


class TrainingSettings(Group):
    """How the classifier is trained; also keyword arguments of the class `Crowdlayer`."""

    model: Annotated[str, Word, AfterValidator(_known_model)] = "resnet18"
    """Any classification model of torchvision.models."""
    pretrained: Annotated[bool | Location, Field(union_mode="left_to_right")] = False
    """true: torchvision's default weights; or a path or s3:// URI of a state dict."""
    freeze: bool = False
    """Train the last layer only."""
    small_images: Annotated[Literal["auto", "true", "false"], Word] = "auto"
    """A stem without downsampling for resnets (3×3 convolution, no pooling); auto: where IMG_SIZE is below 64."""
    crowd_layer: Annotated[Literal["matrix", "scale", "bias", "scale+bias", "scalar", "stochastic"], Word] = "matrix"
    """The worker model; stochastic: rows of the matrix are probabilities (Tanno 2019), the others Rodrigues 2018."""
    crowd_start: Annotated[Literal["identity", "dawid-skene"], Word] = "identity"
    """Where the workers' matrices start: every worker right; or as the answers alone tell, by EM."""
    crowd_warmup: Annotated[int, Field(ge=0), Unit("epochs")] = 0
    """How long the workers' matrices are held at their start, while the classifier learns."""
    scale: Annotated[float, Finite, Field(ge=0)] = 0.0
    """The weight of the regulariser in the loss."""
    regularizer: Annotated[Literal["identity", "pooled", "trace", "geo-w", "geo-f"], Word] = "identity"
    """What SCALE weighs: distance from the start, or from the crowd's mean; Tanno's trace; GeoCrowdNet's volumes."""
    loss_reduction: Annotated[Literal["task", "answer"], Word] = "task"
    """task: sum over a task's answers, mean over tasks (the paper's formula); answer: mean over answers."""
    crowd_updates: Annotated[Literal["auto", "dense", "rows"], Word] = "auto"
    """rows: a step moves only workers who answered in it; auto: so where the matrices hold over 10 million numbers."""
    guard: bool = True
    """Start a run that collapses again, with the workers' matrices held where the answers alone put them."""
    baselines: Annotated[tuple[Annotated[Literal["majority", "dawid-skene"], Word], ...], *ListOf] = ()
    """What to compare with in the same run: the same network and budget on labels aggregated from the answers."""
    select_by: Annotated[Literal["loss", "accuracy", "calibrated_loss", "last"], Word] = "loss"
    """What picks the best epoch, on val/ or on the answers of the held-out tasks."""
    optimizer: Annotated[Literal["sgd", "adam", "adamw"], Word] = "sgd"
    """The optimiser, of the classifier and of the workers' matrices."""
    n_epochs: Annotated[int, Field(ge=1), Unit("epochs")] = 100
    """How often every task is seen."""
    batch_size: Annotated[int, Field(ge=1), Unit("tasks")] = 64
    """Tasks per step, over all processes."""
    lr: Annotated[float, Finite, Field(gt=0)] = 0.1
    """The learning rate at the start."""
    lr_crowd: Annotated[float, Finite, Field(gt=0)] | None = None
    """The learning rate of the workers' matrices at the start; LR, where it is not set."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """The momentum of sgd."""
    decay: Annotated[float, Finite, Field(ge=0)] = 5e-4
    """The weight decay of the classifier; the workers' matrices have none."""
    scheduler: Annotated[Literal["multistep", "cosine", "none"], Word, BeforeValidator(lambda v: v or "none")] = (
        "multistep"
    )
    """multistep: LR times LR_DECAY at each of MILESTONES; cosine: down to 0 over N_EPOCHS."""
    milestones: Annotated[tuple[Annotated[int, Field(ge=1)], ...], *ListOf, AfterValidator(_rising), Unit("epochs")] = (
        50,
    )
    """The epochs after which multistep lowers the learning rate."""
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The factor of multistep."""
    mixup: Annotated[float, Finite, Field(ge=0)] = 0.0
    """α of mixup over images, workers and answers (annot-mix), as in Beta(α, α); 0: none."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """What is evaluated and kept is a moving average of the weights, with this decay per step; 0: the last weights."""
    img_size: Annotated[int, Field(ge=8, le=4096), Unit("pixels")] = 224
    """The side of the square image."""
    data_augmentation: bool = False
    """One of shear ±15°, flip, random resized crop, drawn for each image in each epoch."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The seed of everything random."""
    mixed_precision: Annotated[Literal["auto", "no", "fp16", "bf16"], Word] = "auto"
    """auto: bf16 on GPUs that have it natively."""
    sync_batchnorm: Annotated[Literal["auto", "true", "false"], Word] = "auto"
    """Batch norm over the batch of all processes; auto: on several GPUs."""
    num_workers: Annotated[Annotated[int, Field(ge=0)] | Literal["auto"], Word, Unit("threads")] = "auto"
    """Threads that load images; auto: one for each CPU that is this job's."""
    max_cache: Annotated[Annotated[float, Finite, Field(ge=0)] | Literal["auto"], Word, Unit("GB per split")] = "auto"
    """Decoded images held in WORKDIR; auto: all that the disk has room for. The others are decoded in every epoch."""
    verbose: bool = True
    """Log every epoch."""

    @field_validator("pretrained", mode="before")
    @classmethod
    def _boolean_words(cls, value: object) -> object:
        return _lower(value) if isinstance(value, str) and value.strip().lower() in {"true", "false"} else value


class JobSettings(Group):
    """Where the results go and how the job speaks."""

    output: Location | None = None
    """Where results and models go, a folder or s3:// prefix; default: `<tasks>`, an archive's folder."""
    output_name: Annotated[str, AfterValidator(_file_name)] = "crowdlayer"
    """The prefix of every file written."""
    workdir: Annotated[str, AfterValidator(_folder)] | None = None
    """Where data is synced and cached, kept and reused; default: a fresh folder under TMPDIR, removed at the end."""
    export: Annotated[tuple[Annotated[Literal["onnx", "torch_export"], Word], ...], *ListOf] = ()
    """The best model in other formats too, preprocessing and temperature inside: onnx (an extra), torch_export."""
    predict: Location | None = None
    """What `entrypoint.py predict` labels: a folder, an s3://bucket/prefix or one archive of images."""
    predict_format: Annotated[Literal["csv", "parquet"], Word] = "csv"
    """The format of the predictions; parquet is an extra."""
    store_timeout: Annotated[float, Field(ge=1, le=3600), Unit("seconds")] = 60
    """How long a store may be silent before a request has failed."""
    store_attempts: Annotated[int, Field(ge=1, le=100)] = 8
    """How often a request or the reading of an object is tried; for requests AWS_MAX_ATTEMPTS goes before."""
    n_processes: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], Word] = "auto"
    """Training processes on this node; auto: one per GPU, or one."""
    checkpoint_every: Annotated[int, Field(ge=0), Unit("epochs")] = 1
    """Epochs between checkpoints put to OUTPUT; 0: only when interrupted."""
    resume: Annotated[Literal["auto", "never", "must"], Word] = "auto"
    """Go on from the newest whole checkpoint in OUTPUT: where there is one, never, or only so."""
    grace: Annotated[float, Finite, Field(gt=0), Unit("seconds")] = 25.0
    """From a signal to the end of the job, checkpoint put; some seconds less than the platform gives."""
    timeout: Annotated[float, Finite, Field(gt=0), Unit("seconds")] = 1800.0
    """How long a process waits for another, and how long it may go without progress, before it ends with its stacks."""
    tensorboard: Annotated[str, AfterValidator(_folder)] | None = None
    """Where TensorBoard's event files go, a folder on this machine; an extra."""
    metrics_file: Annotated[str, AfterValidator(_file)] | None = None
    """The newest figures as OpenMetrics text, a file on this machine for Prometheus' textfile collector."""
    log_format: Annotated[Literal["text", "json"], Word] = "text"
    """The form of the log's lines."""


class SweepSettings(Group):
    """Which run of several this is."""

    sweep: Annotated[tuple[dict[str, Any], ...], *ListOf] = ()
    """Several runs: a JSON list with the settings of each that are not as here; OUTPUT_NAME gets the place in it."""
    sweep_index: Annotated[int, Field(ge=0)] | None = None
    """Which of SWEEP, from 0; found out in an array of AWS Batch or Slurm, and in a Kubernetes Indexed Job."""


ENVIRONMENT = SettingsConfigDict(
    env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", hide_input_in_errors=True
)


class Settings(DataSettings, TrainingSettings, JobSettings, SweepSettings, BaseSettings):
    """All settings, from the environment: CROWDLAYER_<NAME>."""

    model_config = ENVIRONMENT

    @property
    def output_location(self) -> str:
        """OUTPUT, or `<tasks>`, or the folder of the archive that `<tasks>` is."""
        if self.output is not None:
            return self.output
        if is_archive(self.tasks):
            parent, slash, _ = self.tasks.rpartition("/")
            return parent or slash or "."
        return self.tasks


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
    try:
        entry = _of_sweep()
        settings = Settings(**entry)
        if entry and "output_name" not in entry:
            settings = settings.model_copy(update={"output_name": f"{settings.output_name}-{settings.sweep_index}"})
    except SettingsError as error:
        complaints.append(str(error))
    except ValidationError as error:
        complaints += setting_complaints(error, PREFIX)
    if complaints:
        raise SettingsError(listed(complaints))
    return settings


def setting_complaints(error: ValidationError, prefix: str = "") -> list[str]:
    """One line per setting that `error` names: the setting, the rule, the value."""
    rules: dict[str, list[str]] = {}
    values: dict[str, object] = {}
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0]) if problem["loc"] else ""
        rule = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        rules.setdefault(name, []).append("must be set" if problem["type"] == "missing" else rule)
        values.setdefault(name, problem["input"])
    return [
        f"{prefix + name.upper() if prefix else name}: {' or '.join(dict.fromkeys(found))}"  # a union has several rules
        + ("" if found == ["must be set"] else f", got {quoted(values[name])}")
        for name, found in rules.items()
    ]


def quoted(value: object, longest: int = 200) -> str:
    """`value` for a message: no credentials or signature of a URI, and not pages of it."""
    if isinstance(value, str) and "://" in value:
        value = re.sub(r"([?#]).*", r"\1***", re.sub(r"://.*@", "://***@", value, flags=re.DOTALL), flags=re.DOTALL)
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}…"


NO_INFLUENCE = frozenset(
    {"workdir", "log_format", "store_timeout", "store_attempts", "verbose", "num_workers", "max_cache"}
    | {"tensorboard", "metrics_file", "predict", "predict_format", "sweep", "sweep_index"}
    | {"n_processes", "checkpoint_every", "resume", "grace", "timeout"}
)
"""Settings that change nothing in the results."""


def influential(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a run what it is."""
    return {name: value for name, value in settings.items() if name not in NO_INFLUENCE}


@dataclass(frozen=True)
class Row:
    """One setting as it is shown to people."""

    name: str
    type: str
    default: str
    unit: str
    text: str


def table() -> list[Row]:
    """All settings in the order of their groups, for `--help` and the README."""
    fields = {name: field for group in Settings.__mro__[::-1] for name, field in _own_fields(group).items()}
    order = [
        name for group in (DataSettings, TrainingSettings, JobSettings, SweepSettings) for name in group.model_fields
    ]
    return [
        Row(
            PREFIX + name.upper(),
            _type_name(fields[name]),
            "required" if fields[name].is_required() else _shown(fields[name].default),
            next((note.name for note in fields[name].metadata if isinstance(note, Unit)), ""),
            fields[name].description or "",
        )
        for name in order
    ]


def _own_fields(group: type) -> dict[str, FieldInfo]:
    return dict(group.model_fields) if issubclass(group, Group) else {}


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
