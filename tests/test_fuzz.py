"""Whatever the bytes are: an answer or one of our errors, soon, and nothing outside of the folder.

FUZZ_EXAMPLES says how many of each are tried, here and wherever else `fuzzed` is; `make fuzz` tries very many.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crowdlayer.answers.convert import answers_in
from crowdlayer.answers.files import read_answers
from crowdlayer.data.classes import read_metadata
from crowdlayer.data.layout import belongs, read_dataset, read_removed
from crowdlayer.data.picture import BrokenImageError, decode
from crowdlayer.errors import CrowdlayerError, DataError, one_line
from crowdlayer.settings import DataSettings
from crowdlayer.storage.files import safe_names
from crowdlayer.storage.sync import sync
from tests.catalogue.images import WHOLE, red, saved
from tests.conftest import Store

fuzzed = hypothesis.settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "50")),
    deadline=5_000,  # milliseconds: nothing hangs
    suppress_health_check=list(hypothesis.HealthCheck),
)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder of its own, in one that shows what escapes."""
    with tempfile.TemporaryDirectory() as above:
        path = Path(above) / "deep" / "inside"
        path.mkdir(parents=True)
        yield path
        outside = [p for p in Path(above).rglob("*") if not p.is_relative_to(path) and not path.is_relative_to(p)]
        assert outside == []


def mutated(whole: bytes) -> st.SearchStrategy[bytes]:
    """`whole` with some bytes replaced, inserted, cut out or repeated."""

    @st.composite
    def mutations(draw: st.DrawFn) -> bytes:
        body = bytearray(whole)
        for _ in range(draw(st.integers(1, 8))):
            at = draw(st.integers(0, len(body)))
            match draw(st.integers(0, 4)):
                case 0:
                    body[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
                case 1:
                    body[at:at] = draw(st.binary(max_size=8))
                case 2:
                    del body[at : at + draw(st.integers(1, 64))]
                case 3:
                    body[at:at] = body[at : at + draw(st.integers(1, 64))]
                case _:
                    body[at : at + 4] = draw(
                        st.sampled_from([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x80\0\0\0"])
                    )
        return bytes(body)

    return mutations()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
IDS = st.text(max_size=4) | st.integers(0, 12).map(str) | st.sampled_from(["007", "7", "a:b", "\ud800", "\0"])
GOOD = json.dumps({str(task): {"w": task % 2, "v": "a"} for task in range(4)}).encode()
DOCUMENTS = (
    st.binary(max_size=60)
    | mutated(GOOD)
    | st.dictionaries(IDS, st.dictionaries(IDS, VALUES, max_size=3) | VALUES, max_size=4).map(
        lambda value: json.dumps(value).encode("utf-8", "surrogatepass")
    )
    | st.tuples(st.sampled_from([b"[", b'{"a":', b'{"0":{"w":', b" "]), st.integers(1, 20_000)).map(
        lambda deep: deep[0] * deep[1]
    )
)


def one_line_each(error: Exception) -> None:
    """What it says fits into the last line of standard error."""
    assert one_line(str(error)).isprintable()
    assert len(str(error)) < 20_000


@fuzzed
@given(DOCUMENTS, st.sampled_from(["answers.json", "answers.csv"]))
def test_any_bytes_are_answers_or_refused(content: bytes, name: str) -> None:
    with folder() as root:
        (root / name).write_bytes(content)
        try:
            file = read_answers(root / name)
        except DataError as error:
            one_line_each(error)
        else:
            assert len(file.answers) > 0
            assert file.answers.task.max() < len(file.tasks)
            assert file.answers.worker.max() < len(file.workers)
            assert file.answers.label.max() < len(file.labels)


EXPORT = [
    {
        "id": 1,
        "data": {"image": "/data/upload/4/0a1b2c3d-cat-12.jpg"},
        "annotations": [
            {
                "completed_by": {"id": 2, "email": "bob@example.org"},
                "was_cancelled": False,
                "updated_at": "2026-02-02",
                "result": [{"type": "choices", "value": {"choices": ["cat"]}}],
            }
        ],
    }
]
FLAT = [{"image": "http://[x/a-1.jpg", "annotator": 5, "choice": '{"choices": ["cat"]}', "updated_at": ""}]


def parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a document: a dictionary or list, and a key or index of it."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from parts(value[key])


@st.composite
def altered(draw: st.DrawFn, whole: list[Any]) -> bytes:
    """The document with other values in one or two of its places, or none."""
    document = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 2))):
        places = list(parts(document))
        if not places:
            break
        inside, key = draw(st.sampled_from(places))
        if draw(st.booleans()):
            inside[key] = draw(VALUES | st.just([]) | st.sampled_from(["http://[x.jpg", '{"choices"', "a.png"]))
        else:
            del inside[key]
    return json.dumps(document).encode("utf-8", "surrogatepass")


@fuzzed
@given(
    DOCUMENTS | altered(EXPORT) | altered(FLAT) | mutated(json.dumps(FLAT).encode()), st.sampled_from(["json", "csv"])
)
def test_any_bytes_are_an_export_or_refused(content: bytes, ending: str) -> None:
    with folder() as root:
        (root / f"export.{ending}").write_bytes(content)
        try:
            assert list(answers_in(root / f"export.{ending}"))
        except DataError as error:
            one_line_each(error)


@fuzzed
@given(DOCUMENTS | mutated(b'{"name": "x", "n_classes": 3, "classes": ["a", "b", "c"], "n_workers": 9}'))
def test_any_bytes_are_metadata_or_refused(content: bytes) -> None:
    with folder() as root:
        (root / "metadata.json").write_bytes(content)
        with contextlib.suppress(DataError):
            read_metadata(root / "metadata.json")


@fuzzed
@given(st.binary(max_size=40) | mutated(b"0 17\n1 18\n-1 3\n"))
def test_any_bytes_are_tasks_to_leave_out_or_refused(content: bytes) -> None:
    with folder() as root:
        (root / "remove.txt").write_bytes(content)
        with contextlib.suppress(DataError):
            read_removed(root / "remove.txt")


NAMES = st.lists(
    st.sampled_from(
        ["train", "val", "test", "a", "b", "..", ".", "", "x-1.png", "x-2.PNG", "\n", "\\", "C:", "é", "\udcff"]
    )
    | st.text(max_size=6),
    min_size=1,
    max_size=5,
).map("/".join)


@fuzzed
@given(st.lists(NAMES, min_size=1, max_size=6, unique=True), DOCUMENTS, DOCUMENTS)
def test_any_names_and_answers_are_a_data_set_or_refused(names: list[str], answers: bytes, metadata: bytes) -> None:
    with folder() as root:
        (root / "answers.json").write_bytes(answers)
        (root / "metadata.json").write_bytes(metadata)
        try:
            data = read_dataset(root, names, DataSettings(tasks=str(root)), root / "answers.json", None, 0)
        except CrowdlayerError as error:
            one_line_each(error)
        else:
            assert {name for part in data.crowd for name in part.names} <= set(names)


@fuzzed
@given(st.lists(NAMES, min_size=1, max_size=6, unique=True))
def test_names_that_are_let_through_are_files_inside(names: list[str]) -> None:
    try:
        safe_names(names)
    except DataError as error:
        one_line_each(error)
        return
    with folder() as root:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"")
        assert sum(path.is_file() for path in root.rglob("*")) == len(names)


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    files = {"train/a/x-0.png": b"x" * 700, "train/b/x-1.png": b"y", "answers.json": GOOD}
    if kind == ".zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, body in files.items():
                packed.writestr(name, body)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz" if kind == ".tar.gz" else "w", format=tarfile.PAX_FORMAT) as tar:
            for name, body in files.items():
                info = tarfile.TarInfo(name)
                info.size, info.pax_headers = len(body), {"comment": "é" * 9}
                tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [".tar", ".tar.gz", ".zip"])
def test_any_bytes_are_an_archive_or_refused_and_nothing_is_written_outside(kind: str) -> None:
    @fuzzed
    @given(mutated(archive(kind)) | st.binary(max_size=2000))
    def any_bytes(content: bytes) -> None:
        with folder() as root:
            (root / f"data{kind}").write_bytes(content)
            try:
                sync(str(root / f"data{kind}"), root / "work", belongs)
            except CrowdlayerError as error:
                one_line_each(error)

    any_bytes()


IMAGES = {
    "png": WHOLE,
    "jpg": saved(red(size=24), "JPEG", exif=Image.Exif()),
    "bmp": saved(red(), "BMP"),
    "tif": saved(red(), "TIFF", compression="tiff_lzw"),
    "webp": saved(red(), "WEBP"),
    "ppm": saved(red(), "PPM"),
    "gif": saved(red(), "GIF", save_all=True, append_images=[red("L")]),
    "png16": saved(Image.new("I;16", (9, 9)), "PNG"),
    "palette": saved(red("P"), "PNG", transparency=b"\x00\x80"),
}


@pytest.mark.filterwarnings("ignore")  # decode_all hears them in no test
@pytest.mark.parametrize("kind", sorted(IMAGES))
def test_any_bytes_are_an_image_or_broken(kind: str) -> None:
    @fuzzed
    @given(mutated(IMAGES[kind]) | st.binary(max_size=200))
    def any_bytes(content: bytes) -> None:
        with folder() as root:
            (root / "x.png").write_bytes(content)
            try:
                assert decode(root / "x.png", 8).shape == (8, 8, 3)
            except BrokenImageError as error:
                one_line_each(error)

    any_bytes()


LINES = st.lists(VALUES | st.lists(VALUES, min_size=4, max_size=4) | st.lists(IDS, min_size=4, max_size=4), max_size=5)


REMEMBERED = VALUES | st.dictionaries(IDS, VALUES | st.lists(VALUES, min_size=2, max_size=2), max_size=3)


@fuzzed
@given(REMEMBERED | st.none(), st.sampled_from([".tar", ".zip"]), DOCUMENTS)
def test_what_is_remembered_of_an_archive_may_be_anything(said: Any, kind: str, document: bytes) -> None:
    with folder() as root:
        (root / f"data{kind}").write_bytes(archive(kind))
        location = str(root / f"data{kind}")
        names = sync(location, root / "work", belongs).digests
        memory = root / "work/archive.json"
        version = json.loads(memory.read_text())["version"]
        memory.write_bytes(document if said is None else json.dumps({"version": version, "files": said}).encode())
        assert sync(location, root / "work", belongs).digests.keys() in (
            names.keys(),
            said.keys() if isinstance(said, dict) else (),
        )


def test_what_is_remembered_of_a_bucket_may_be_anything(store: Store) -> None:
    location = f"s3://{store.bucket}/data"
    for name in ("answers.json", "train/x-0.png"):
        store.put(f"data/{name}", b"body")

    @fuzzed
    @given(LINES, st.sampled_from(["", "[" * 5000, '["train/x-0.png", 4', '["../../x", 4, "y", "z"]']))
    def anything(lines: list[Any], tail: str) -> None:
        with folder() as root:
            (root.parent.parent / "x").touch()
            (root / ".crowdlayer").touch()
            text = "\n".join([*map(json.dumps, [{"location": location}, *lines]), tail])
            (root / "manifest.jsonl").write_text(text)
            assert len(sync(location, root, belongs).digests) == 2
            (root.parent.parent / "x").unlink()

    anything()
