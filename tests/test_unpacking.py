"""An archive at any place is unpacked once, and of what came over the line only what is proven."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from crowdlayer.data.layout import belongs
from crowdlayer.errors import DataError, SettingsError, StoreError
from crowdlayer.storage.sync import Synced, sync
from tests.conftest import Store
from tests.servers import Answer, Meddler, cut_after, flipped
from tests.trees import KINDS, STRANGERS, TREE, bodies, digests, pack, state, upload, write

# --- once ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, ".tgz", ".TAR.GZ", ".Zip"])
def test_an_archive_is_the_same_data_set_as_its_tree(kind: str, store: Store, tmp_path: Path, workdir: Path) -> None:
    archive = pack(tmp_path / f"data{kind}", TREE | STRANGERS)
    expected = sync(str(write(tmp_path / "folder", TREE | STRANGERS)), workdir, belongs)
    for location in (archive, upload(store, archive)):
        synced = sync(location, workdir, belongs)
        assert synced == Synced(workdir / "data", digests(TREE))
        assert synced.digest() == expected.digest()
        assert bodies(workdir / "data") == TREE
    assert [str(path) for path in tmp_path.rglob("data.*")] == [archive]  # what was downloaded does not stay


@pytest.mark.parametrize(
    ("kind", "more"),
    [(".tar.gz", {}), (".zip", {}), (".tar", {"train/caf\udce9-2.png": b"a name that is no UTF-8"})],
)
def test_a_second_start_unpacks_nothing(
    kind: str, more: dict[str, bytes], store: Store, meddler: Meddler, tmp_path: Path, workdir: Path
) -> None:
    archive = pack(tmp_path / f"data{kind}", TREE | more)
    for location in (archive, upload(store, archive)):
        first = sync(location, workdir, belongs)
        before = state(workdir / "data")
        assert sync(location, workdir, belongs) == first
        assert state(workdir / "data") == before
    assert meddler.count("GET", "/archives/") == 1


def test_a_changed_archive_is_unpacked_anew(store: Store, tmp_path: Path, workdir: Path) -> None:
    changed = {"answers.json": b"{}", "train/cat/cat-0.png": b"A CAT"}
    for remote in (False, True):
        for tree in (TREE, changed):
            archive = pack(tmp_path / "data.tar", tree)
            assert sync(upload(store, archive) if remote else archive, workdir, belongs).digests == digests(tree)
            assert bodies(workdir / "data") == tree


@pytest.mark.parametrize("damage", ["cut", "deleted", "forgotten", "unreadable"])
def test_what_is_missing_of_an_unpacked_archive_is_unpacked_anew(damage: str, tmp_path: Path, workdir: Path) -> None:
    archive = pack(tmp_path / "data.tar", TREE)
    first = sync(archive, workdir, belongs)
    if damage == "cut":
        (workdir / "data/train/cat/cat-0.png").write_bytes(b"a c")
    elif damage == "deleted":
        (workdir / "data/train/cat/cat-0.png").unlink()
    elif damage == "forgotten":
        (workdir / "archive.json").unlink()
    else:
        (workdir / "archive.json").write_bytes(b"")  # as after the machine went down
    assert sync(archive, workdir, belongs) == first
    assert bodies(workdir / "data") == TREE


def test_what_a_killed_start_left_of_an_archive_is_removed(store: Store, tmp_path: Path, workdir: Path) -> None:
    sync(pack(tmp_path / "old.tar", {"train/old-0.png": b"old"}), workdir, belongs)
    write(workdir, {"archive/old.tar": b"old", "partial/tmpx": b"half", "data/train/stray.png": b"stray"})
    sync(upload(store, pack(tmp_path / "data.tar", TREE)), workdir, belongs)
    assert {name for name in bodies(workdir) if not name.startswith("data/")} == {"archive.json"}
    assert bodies(workdir / "data") == TREE
    assert not (workdir / "archive").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_data_sets_archive_has_a_folder_above_it(kind: str, tmp_path: Path, workdir: Path) -> None:
    """New images keep the names that they have in the archive, whatever one of their folders is called."""
    tree = {"a/train/1.png": b"1", "a/car/2.png": b"2", "b/3.png": b"3"}
    location = pack(tmp_path / f"new{kind}", tree)
    assert sync(location, workdir, lambda _: True, "PREDICT").digests == digests(tree)
    assert bodies(workdir / "data") == tree


def test_an_archive_that_is_not_there_is_a_wrong_setting(store: Store, tmp_path: Path, workdir: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    for location in (f"{tmp_path}/x.tar", f"{tmp_path}/folder.tar", f"s3://{store.bucket}/x.zip"):
        with pytest.raises(SettingsError, match=rf"TASKS: .* there is none at {location}"):
            sync(location, workdir, belongs)
    with pytest.raises(SettingsError, match=r"the bucket must exist, 'x\.tar' does not"):
        sync("s3://x.tar", workdir, belongs)


# --- while it comes --------------------------------------------------------------------------------------------------


BULK = {f"train/{i}.png": os.urandom(20_000) for i in range(60)}
"""More than a chunk of bytes."""


@pytest.mark.parametrize("kind", [".tar", ".tar.gz"])
def test_a_tar_in_a_bucket_is_unpacked_while_it_comes(
    kind: str, store: Store, meddler: Meddler, tmp_path: Path, workdir: Path
) -> None:
    location = upload(store, pack(tmp_path / f"data{kind}", BULK))
    largest: list[int] = []

    def watching(name: str) -> bool:
        largest.append(max((len(body) for body in bodies(workdir).values()), default=0))
        return belongs(name)

    meddler.spoil(cut_after(2**20 + 5), path=kind)
    assert sync(location, workdir, watching).digests == digests(BULK)
    assert max(largest) == 20_000  # the archive itself is nowhere
    first, second = (request.headers for request in meddler.requests if request.method == "GET")
    assert "range" not in first
    assert 2**20 <= int(second["range"].removeprefix("bytes=").removesuffix("-")) <= 2**20 + 5


def test_a_tar_that_came_out_wrong_is_read_again(store: Store, meddler: Meddler, tmp_path: Path, workdir: Path) -> None:
    location = upload(store, pack(tmp_path / "data.tar", BULK))
    tar = (tmp_path / "data.tar").read_bytes()
    for at in (tar.index(BULK["train/7.png"]), tar.index(b"train/9.png")):  # in an image, and in a header
        meddler.spoil(flipped(at), path=".tar")
        shutil.rmtree(workdir)
        assert sync(location, workdir, belongs).digests == digests(BULK)
        assert bodies(workdir / "data") == BULK
    assert meddler.count("GET", ".tar") == 4


def test_nothing_of_a_tar_is_used_before_all_of_it_is_proven(
    store: Store, meddler: Meddler, tmp_path: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crowdlayer.storage.s3.patience.attempts", 2)
    location = upload(store, pack(tmp_path / "data.tar", BULK))
    for at in (700, 800):  # each time another, else two equal readings would outvote the ETag
        meddler.spoil(flipped(at), path=".tar")
    with pytest.raises(StoreError, match=r"data.tar: Expected checksum .* did not match"):
        sync(location, workdir, belongs)
    assert not (workdir / "data").exists()
    assert not (workdir / "archive.json").exists()


def test_a_tar_swapped_while_it_is_read_is_noticed(
    store: Store, meddler: Meddler, tmp_path: Path, workdir: Path
) -> None:
    location = upload(store, pack(tmp_path / "data.tar", BULK))

    def swap(answer: Answer) -> None:
        answer.sent = 2**20 + 5
        upload(store, pack(tmp_path / "data.tar", TREE))

    meddler.spoil(swap, path=".tar")
    with pytest.raises(StoreError, match=r"data.tar: must stay as it was listed, was changed meanwhile"):
        sync(location, workdir, belongs)
    assert sync(location, workdir, belongs).digests == digests(TREE)


def test_a_damaged_tar_in_a_bucket_is_read_once(store: Store, meddler: Meddler, tmp_path: Path, workdir: Path) -> None:
    path = Path(pack(tmp_path / "data.tar.gz", BULK))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataError, match=r"data.tar.gz: must be a whole archive"):
        sync(upload(store, str(path)), workdir, belongs)
    assert meddler.count("GET", ".tar") == 1
