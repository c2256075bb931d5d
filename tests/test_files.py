"""What files on this machine ask for: names that stay inside, room on the disk, one line per error."""

from __future__ import annotations

import mmap
import shutil
from pathlib import Path

import pytest

from crowdlayer.data.layout import belongs
from crowdlayer.errors import AccessError, DataError, DeviceMemoryError, StoreError
from crowdlayer.storage.files import disk_errors
from crowdlayer.storage.sync import fetch, sync
from tests.conftest import Store
from tests.servers import Meddler
from tests.trees import KINDS, ODD, TREE, UNSAFE, bodies, digests, outside, pack, put, upload, write

# --- names that stay inside ------------------------------------------------------------------------------------------


SHOWN = {9: " ", 0x1B: "\N{REPLACEMENT CHARACTER}", 0x7F: "\N{REPLACEMENT CHARACTER}"}
"""How a message shows control characters."""


def assert_refused(location: str, name: str, rule: str, workdir: Path) -> None:
    """One line that names the name and the rule, and cannot play tricks on a terminal."""
    with pytest.raises(DataError) as raised:
        sync(location, workdir, belongs)
    message = str(raised.value)
    assert message.isprintable()
    assert rule in message
    assert repr(name.translate(SHOWN)) in message


def test_strange_but_harmless_names_survive(store: Store, tmp_path: Path, workdir: Path) -> None:
    tree = {name: name.encode() for name in ODD}
    expected = {name: body for name, body in tree.items() if "/." not in name}
    assert len(expected) == len(tree) - 1
    location = put(store, tree, "a prefix/ü+%&?#")
    assert sync(location, workdir, belongs).digests == digests(expected)
    assert bodies(workdir / "data") == expected
    assert sync(location, workdir, belongs).digests == digests(expected)
    assert sync(str(write(tmp_path / "folder", tree)), workdir, belongs).digests == digests(expected)
    for kind in KINDS:
        assert sync(pack(tmp_path / f"odd{kind}", tree), workdir, belongs).digests == digests(expected)


def test_an_unsafe_name_is_refused_by_name_and_nothing_is_written(
    store: Store, meddler: Meddler, tmp_path: Path, workdir: Path
) -> None:
    refused = {name: rule for name, rule in UNSAFE.items() if belongs(name)}
    assert len(refused) > 5
    for i, (name, rule) in enumerate(refused.items()):
        location = put(store, {"answers.json": b"{}", name: b"evil"}, f"data/{i}")
        assert_refused(location, name, rule, workdir)
        assert outside(tmp_path, workdir) == []
        assert bodies(workdir) == {}
    assert meddler.count("GET", "/data/") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_unsafe_member_is_refused_by_name_and_nothing_is_written(kind: str, tmp_path: Path, workdir: Path) -> None:
    for name, rule in UNSAFE.items():
        if name.startswith("./"):
            continue  # as many archives begin all their names
        archive = pack(tmp_path / f"data{kind}", TREE | {name: b"evil"})
        assert_refused(archive, name, rule, workdir)
        assert outside(tmp_path, workdir) == [archive]
        assert bodies(workdir / "data") == {}


def test_an_unsafe_name_of_something_else_is_as_good_as_any(store: Store, tmp_path: Path, workdir: Path) -> None:
    others = {name: b"evil" for name in UNSAFE if not belongs(name)}
    others |= {"logs//2024.txt": b"", "notes": b"", "notes/a": b"", "Icon\r": b"", f"old/{'n' * 256}": b""}
    location = put(store, TREE | others)
    assert sync(location, workdir, belongs).digests == digests(TREE)
    assert bodies(workdir / "data") == TREE
    assert outside(tmp_path, workdir) == []


def test_all_unsafe_names_are_listed_and_many_are_counted(store: Store, workdir: Path) -> None:
    location = put(store, {f"train//{i:02}.png": b"" for i in range(25)})
    with pytest.raises(DataError, match=r"'train//00\.png'.*'train//19\.png'.*; and 5 more$"):
        sync(location, workdir, belongs)


def test_a_name_cannot_be_a_file_and_a_folder(store: Store, workdir: Path) -> None:
    location = put(store, TREE | {"train/cat/cat-0.png/x.png": b"x"})
    with pytest.raises(DataError, match=r"'train/cat/cat-0.png': must be a file or a folder, is both"):
        sync(location, workdir, belongs)
    assert bodies(workdir) == {}


@pytest.mark.parametrize("kind", [".tar", ".zip"])
def test_a_member_cannot_be_a_file_and_a_folder(kind: str, tmp_path: Path, workdir: Path) -> None:
    archive = pack(tmp_path / f"data{kind}", TREE | {"train/cat/cat-0.png/x.png": b"x"})
    with pytest.raises(DataError, match=r"'train/cat/cat-0.png': must be a file or a folder, is both"):
        sync(archive, workdir, belongs)


# --- room on the disk ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with little more than the bytes that a sync leaves free."""
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 64 * 2**20 + 10))


@pytest.mark.usefixtures("no_space")
def test_a_disk_that_is_too_small_is_found_before_the_first_byte(store: Store, meddler: Meddler, workdir: Path) -> None:
    location = put(store, TREE)
    with pytest.raises(StoreError, match=r"workdir: 67 MB of disk are needed, 67 MB are free"):
        sync(location, workdir, belongs)
    assert meddler.count("GET", "/data/") == 0
    assert bodies(workdir / "data") == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("no_space")
def test_an_archive_larger_than_the_disk_is_found_before_the_first_byte(
    kind: str, tmp_path: Path, workdir: Path
) -> None:
    archive = pack(tmp_path / f"bomb{kind}", {"train/x-0.png": bytes(10_000_000)})
    with pytest.raises(StoreError, match="77 MB of disk are needed"):
        sync(archive, workdir, belongs)
    assert bodies(workdir / "data") == {}


@pytest.mark.usefixtures("no_space")
def test_an_archive_in_a_bucket_larger_than_the_disk_is_not_downloaded(
    store: Store, meddler: Meddler, tmp_path: Path, workdir: Path
) -> None:
    location = upload(store, pack(tmp_path / "data.tar", TREE))
    with pytest.raises(StoreError, match="of disk are needed"):
        sync(location, workdir, belongs)
    assert meddler.count("GET") == 0


@pytest.mark.usefixtures("no_space")
def test_a_single_file_larger_than_the_disk_is_not_fetched(store: Store, meddler: Meddler, workdir: Path) -> None:
    store.put("x", bytes(100))
    with pytest.raises(StoreError, match="of disk are needed"):
        fetch(f"s3://{store.bucket}/x", workdir, "ANSWERS")
    assert meddler.count("GET") == 0


# --- one line per error ----------------------------------------------------------------------------------------------


def test_a_disk_that_is_read_only_is_refused_access() -> None:
    with pytest.raises(AccessError, match="out: must be writable: Read-only file system"), disk_errors("out"):
        raise OSError(30, "Read-only file system")


def test_a_full_disk_is_a_failing_store() -> None:
    with (
        pytest.raises(StoreError, match="out/x: No space left on device"),
        disk_errors("out/x"),
        Path("/dev/full").open("wb") as full,
    ):
        full.write(b"x")


def test_a_file_for_which_there_are_no_addresses_is_out_of_memory() -> None:
    with pytest.raises(DeviceMemoryError, match="out of memory: images: Cannot allocate memory"), disk_errors("images"):
        mmap.mmap(-1, 2**47)
