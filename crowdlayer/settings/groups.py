"""Every setting, in three groups: the data, the training, the job; and which run of several this is.

A setting is a field, its description the docstring under it, its unit a note on its type; `--help`, the table in
docs/settings.md and the messages are made from these. Nothing here imports torch: a wrong setting is reported in a
second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from .values import (
    Entry,
    File,
    FileName,
    Finite,
    Flag,
    Folder,
    ListOf,
    Location,
    ModelName,
    Names,
    NoneOrDrawn,
    NoneOrSeveral,
    Once,
    Percent,
    Rising,
    ShareOrCount,
    Some,
    Unit,
    Word,
    lower,
)


class Group(BaseModel):
    """A group of settings: typed, checked once, then unchangeable."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


class DataSettings(Group):
    """Which images and answers, and what is known about them."""

    tasks: Location
    """The data set: a folder, an s3://bucket/prefix, or one archive (.tar, .tar.gz, .zip) at either place."""
    answers: Location | None = None
    """Where the answers are if not in `<tasks>/answers.json`; JSON, or .csv or .parquet of task, worker, label."""
    n_classes: Annotated[int, Field(ge=2, le=100_000)] | None = None
    """The number of classes; found in the data, and must agree with it when given."""
    classes: Annotated[tuple[str, ...] | None, *ListOf, Names] = None
    """The class names in the order of the labels, as a JSON list or with commas; found in the data."""
    val_fraction: Annotated[float, Finite, Field(gt=0, lt=1), Unit("share of the tasks")] = 0.1
    """The part of the train tasks that is held out to choose the epoch when there is no val/."""
    path_remove: Location | None = None
    """Peerannot's file of tasks to leave out."""
    max_bad_images: Annotated[float, Percent, Finite, Field(ge=0), ShareOrCount, Unit("images")] = 0.01
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

    model: ModelName = "resnet18"
    """Any classification model of torchvision.models."""
    pretrained: Annotated[bool | Location, Field(union_mode="left_to_right")] = False
    """true: torchvision's default weights; or a path or s3:// URI of a state dict."""
    freeze: Flag = False
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
    guard: Flag = True
    """Start a run that collapses again, with the workers' matrices held where the answers alone put them."""
    baselines: Annotated[tuple[Annotated[Literal["majority", "dawid-skene"], Word], ...], *ListOf, Once] = ()
    """What to compare with in the same run: the same network and budget on labels aggregated from the answers."""
    folds: Annotated[int, Field(ge=0, le=100), NoneOrSeveral] = 0
    """Judge labels and workers by so many more trainings, each without its part of the tasks; 0: by the run's own."""
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
    momentum: Annotated[float, Finite, Field(ge=0, lt=1)] = 0.9
    """The momentum of sgd."""
    decay: Annotated[float, Finite, Field(ge=0)] = 5e-4
    """The weight decay of the classifier; the workers' matrices have none."""
    scheduler: Annotated[Literal["multistep", "cosine", "none"], Word, BeforeValidator(lambda v: v or "none")] = (
        "multistep"
    )
    """multistep: LR times LR_DECAY at each of MILESTONES; cosine: down to 0 over N_EPOCHS."""
    milestones: Annotated[tuple[Annotated[int, Field(ge=1)], ...], *ListOf, Rising, Unit("epochs")] = (50,)
    """The epochs after which multistep lowers the learning rate."""
    lr_decay: Annotated[float, Finite, Field(gt=0, le=1)] = 0.1
    """The factor of multistep."""
    mixup: Annotated[float, Finite, Field(ge=0), NoneOrDrawn] = 0.0
    """α of mixup over images, workers and answers (annot-mix), as in Beta(α, α), from 0.01 on; 0: none."""
    ema: Annotated[float, Finite, Field(ge=0, lt=1)] = 0.0
    """What is evaluated and kept is a moving average of the weights, with this decay per step; 0: the last weights."""
    img_size: Annotated[int, Field(ge=8, le=4096), Unit("pixels")] = 224
    """The side of the square image."""
    data_augmentation: Flag = False
    """One of shear ±15°, flip, random resized crop, drawn for each image in each epoch."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The seed of everything random."""
    mixed_precision: Annotated[Literal["auto", "no", "fp16", "bf16"], Word] = "auto"
    """auto: bf16 on GPUs that have it natively."""
    compile: Annotated[Literal["auto", "true", "false"], Word] = "auto"
    """What a step runs; auto: kernels, on one GPU in CUDA graphs; true: torch.compile's, likewise; false: no graphs."""
    sync_batchnorm: Annotated[Literal["auto", "true", "false"], Word] = "auto"
    """Batch norm over the batch of all processes; auto: on several GPUs."""
    num_workers: Annotated[Annotated[int, Field(ge=0)] | Literal["auto"], Word, Unit("threads")] = "auto"
    """Threads that load images; auto: one for each CPU that is this job's."""
    max_cache: Annotated[Annotated[float, Finite, Field(ge=0)] | Literal["auto"], Word, Unit("GB per split")] = "auto"
    """Decoded images held in WORKDIR; auto: what checkpoints leave room for. The others are decoded in every epoch."""
    verbose: Flag = True
    """Log every epoch."""

    @field_validator("pretrained", mode="before")
    @classmethod
    def _boolean_words(cls, value: object) -> object:
        return lower(value) if isinstance(value, str) and value.strip().lower() in {"true", "false"} else value


class RunSettings(DataSettings, TrainingSettings):
    """The groups that the job and the class `Crowdlayer` share."""


class JobSettings(Group):
    """Where the results go and how the job speaks."""

    output: Location | None = None
    """Where results and models go, a folder or s3:// prefix; default: `<tasks>`, an archive's folder."""
    output_name: FileName = "crowdlayer"
    """The prefix of every file written."""
    workdir: Folder | None = None
    """Where data is synced and cached, kept and reused; default: a fresh folder under TMPDIR, removed at the end."""
    export: Annotated[tuple[Annotated[Literal["onnx", "torch_export"], Word], ...], *ListOf, Once] = ()
    """The best model in other formats too, preprocessing and temperature inside: onnx (an extra), torch_export."""
    predict: Location | None = None
    """What `entrypoint.py predict` labels: a folder, an s3://bucket/prefix or one archive of images."""
    predict_format: Annotated[Literal["csv", "parquet"], Word] = "csv"
    """The format of the predictions; parquet is an extra."""
    store_timeout: Annotated[float, Finite, Field(ge=1, le=3600), Unit("seconds")] = 60
    """How long a store may be silent before a request has failed."""
    store_attempts: Annotated[int, Field(ge=1, le=100)] = 8
    """How often a request or the reading of an object is tried; for requests AWS_MAX_ATTEMPTS goes before."""
    n_processes: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], Word] = "auto"
    """Training processes on this node; auto: one per GPU, or one."""
    checkpoint_every: Annotated[int, Field(ge=0), Unit("epochs")] = 1
    """Epochs between checkpoints put to OUTPUT; 0: only when interrupted."""
    resume: Annotated[Literal["auto", "never", "must"], Word] = "auto"
    """Go on from the newest whole checkpoint in OUTPUT: where there is one, never, or only so."""
    grace: Annotated[float, Finite, Field(gt=0, le=1e9), Unit("seconds")] = 25.0
    """From a signal to the end of the job, checkpoint put; some seconds less than the platform gives."""
    timeout: Annotated[float, Finite, Field(gt=0, le=1e9), Unit("seconds")] = 1800.0
    """How long a process waits for another, and how long it may go without progress, before it ends."""
    tensorboard: Folder | None = None
    """Where TensorBoard's event files go, a folder on this machine; an extra."""
    metrics_file: File | None = None
    """The newest figures as OpenMetrics text, a file on this machine for Prometheus' textfile collector."""
    log_format: Annotated[Literal["text", "json"], Word] = "text"
    """The form of the log's lines."""


class SweepSettings(Group):
    """Which run of several this is."""

    sweep: Annotated[tuple[Entry, ...], *ListOf, Some, Field(exclude=True)] = ()  # other runs' settings, unchecked
    """Several runs: a JSON list with the settings of each that are not as here; OUTPUT_NAME gets the place in it."""
    sweep_index: Annotated[int, Field(ge=0)] | None = None
    """Which of SWEEP, from 0; found out in an array of AWS Batch or Slurm, and in a Kubernetes Indexed Job."""


NO_INFLUENCE = frozenset(
    {"workdir", "log_format", "store_timeout", "store_attempts", "verbose", "num_workers", "max_cache"}
    | {"tensorboard", "metrics_file", "predict", "predict_format", "sweep", "sweep_index"}
    | {"n_processes", "checkpoint_every", "resume", "grace", "timeout"}
    | {"tasks", "answers", "path_remove", "output", "output_name"}
)
"""Settings that change nothing in the results: what is read has a digest, wherever it lies."""


def influential(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a run what it is."""
    return {name: value for name, value in settings.items() if name not in NO_INFLUENCE}
