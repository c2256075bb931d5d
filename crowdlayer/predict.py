"""New images → the trained model's labels for them, as a table beside the results."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np

from .data.dataset import spelt_out
from .data.layout import is_image
from .deployment.model_files import DESCRIPTION
from .deployment.predictor import Predictor, Probabilities, load_from, model_folder
from .errors import DataError, SettingsError
from .inputs import probe
from .learning.devices import bound_to_container, memory_for
from .machine.launch import recognise
from .report.results import results_name
from .report.tables import Cell, cell
from .settings import Settings
from .storage.files import disk_errors
from .storage.places import place
from .storage.sync import inside, must_be_there, must_outlast, sync
from .storage.workdir import tidy, working_folder

log = logging.getLogger(__name__)

Writer = Callable[[Sequence[str], Probabilities], None]


def predictions_name(output_name: str, predict_format: str) -> str:
    return f"results/{output_name}/predictions.{predict_format}"


def predict(settings: Settings) -> str:
    """Label the images of PREDICT with the model in OUTPUT; returns the location of the predictions.

    Of several processes or nodes the first does all, on every GPU that it sees; the others return nothing, at once.

    The table has a row per image in the order of the names: `image`, `label`, `confidence`, and `prob_<class>` for
    each class, calibrated. An image that cannot be read keeps its row, with nothing in it, and a warning in the log.
    Where PREDICT is OUTPUT, the pictures of runs in results/ are none of them.

    Raises:
        SettingsError: PREDICT is not set or not there; there is no trained model in OUTPUT; no pyarrow for parquet.
        DataError: the model is none, there is no image in PREDICT, or none that can be read.
        DeviceMemoryError: too little for BATCH_SIZE images.
        AccessError, StoreError: as the places say.
    """
    launch = recognise()
    if not launch.publishes:
        log.info("%s: the images are labelled by the first, this one has nothing to do", launch)
        return ""
    if settings.predict is None:
        raise SettingsError("CROWDLAYER_PREDICT: must be set, to the images that shall be labelled")
    if settings.predict_format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise SettingsError("PREDICT_FORMAT: parquet needs pyarrow: pip install pyarrow")
    must_be_there(settings.predict, "PREDICT")
    must_outlast(settings.workdir, {"OUTPUT": settings.output_location})
    output = place(settings.output_location)
    results = f"{output.location}/{results_name(settings.output_name)}"
    trained = model_folder(results)
    if place(trained).find(DESCRIPTION) is None:
        raise SettingsError(
            f"OUTPUT: must have the model of a finished run named OUTPUT_NAME={settings.output_name}, "
            f"there is no {DESCRIPTION} in {trained}"
        )
    name = predictions_name(settings.output_name, settings.predict_format)
    at = inside(settings.output_location, settings.predict)
    runs = None if at is None else f"{PurePosixPath(at, 'results')}/"  # whose charts are no images to be labelled

    def wanted(name: str) -> bool:
        return is_image(name) and not (runs and name.startswith(runs))

    with working_folder(settings.workdir) as workdir:
        probe(output, settings.output_name, workdir)
        tidy(workdir)
        (workdir / "partial").mkdir()
        model = load_from(trained, workdir / "partial")
        log.info("model %s: %s, %d classes", settings.output_name, model.description.architecture, len(model.classes))
        synced = sync(settings.predict, workdir / "predict", wanted, "PREDICT", "images")
        path = workdir / Path(name).name
        try:
            with disk_errors(str(workdir)), _table(path, model.classes) as write:
                _label(model, synced.root, sorted(synced.digests), settings.batch_size, write)
            output.upload(path, name)
        finally:
            path.unlink(missing_ok=True)
    log.info("predictions at %s/%s", output.location, name)
    return f"{output.location}/{name}"


def _label(model: Predictor, root: Path, names: Sequence[str], batch_size: int, write: Writer) -> None:
    started = time.monotonic()
    at = bad = 0
    bound_to_container()
    network = f"the model's {model.description.architecture} at {model.image_size} pixels"
    with memory_for(f"{network} and BATCH_SIZE={batch_size}", "lower BATCH_SIZE"):
        for probabilities in model.batches((root / name for name in names), batch_size, bad_images="nan"):
            write([spelt_out(name) for name in names[at : at + len(probabilities)]], probabilities)
            at += len(probabilities)
            bad += int(np.isnan(probabilities[:, 0]).sum())
    if bad == len(names):
        raise DataError(f"PREDICT: at least one image must be readable, of {len(names)} none is")
    rate = len(names) / max(time.monotonic() - started, 1e-9)
    log.info(
        "labelled %d images, %d not readable, %.0f images/s", len(names) - bad, bad, rate,
        extra={"images": len(names), "bad_images": bad, "images_per_second": round(rate, 1)},
    )  # fmt: skip


def columns(classes: Sequence[str]) -> list[str]:
    return ["image", "label", "confidence", *(f"prob_{name}" for name in classes)]


@contextmanager
def _table(path: Path, classes: Sequence[str]) -> Iterator[Writer]:
    """A new table at `path`, in the format of its ending, and what adds rows to it."""
    with (_parquet if path.suffix == ".parquet" else _csv)(path, classes) as write:
        yield write


@contextmanager
def _csv(path: Path, classes: Sequence[str]) -> Iterator[Writer]:
    with path.open("w", newline="", encoding="utf-8") as file:

        def write_row(row: Sequence[Cell]) -> None:
            file.write(",".join(map(cell, row)) + "\n")

        def write(names: Sequence[str], probabilities: Probabilities) -> None:
            for name, row in zip(names, probabilities, strict=True):
                found = ["", ""] if np.isnan(row[0]) else [classes[row.argmax()], float(row.max())]
                write_row([name, *found, *("" if np.isnan(p) else float(p) for p in row)])

        write_row(columns(classes))
        yield write


@contextmanager
def _parquet(path: Path, classes: Sequence[str]) -> Iterator[Writer]:
    import pyarrow as pa
    import pyarrow.parquet

    kinds = [pa.string(), pa.dictionary(pa.int32(), pa.string()), *[pa.float32()] * (1 + len(classes))]
    schema = pa.schema(list(zip(columns(classes), kinds, strict=True)))
    with pyarrow.parquet.ParquetWriter(path, schema) as file:

        def write(names: Sequence[str], probabilities: Probabilities) -> None:
            bad = np.isnan(probabilities[:, 0])
            label = pa.array(probabilities.argmax(1).astype(np.int32), mask=bad)
            arrays = [
                pa.array(names, pa.string()),
                pa.DictionaryArray.from_arrays(label, pa.array(classes, pa.string())),
                pa.array(probabilities.max(1), mask=bad),
                *(pa.array(column, mask=bad) for column in probabilities.T),
            ]
            file.write_batch(pa.record_batch(arrays, schema=schema))

        yield write
