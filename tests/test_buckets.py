"""A bucket comes into the working folder whole, and only what is new or changed comes again."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from pathlib import Path

import pytest

from crowdlayer.data.layout import belongs
from crowdlayer.errors import AccessError, DataError, StoreError
from crowdlayer.storage.places import place
from crowdlayer.storage.sync import Synced, sync
from tests.conftest import Store
from tests.servers import Answer, Meddler, refused, shortened_to
from tests.trees import STRANGERS, TREE, bodies, digests, put, state, write

# --- what comes ------------------------------------------------------------------------------------------------------


def test_a_bucket_comes_whole_and_without_what_is_none_of_the_data_sets(
    store: Store, meddler: Meddler, tmp_path: Path, workdir: Path
) -> None:
    location = put(store, TREE | STRANGERS | {"": b"", "train/": b"", "train/cat/": b"", "train/empty.png/": b""})
    synced = sync(location, workdir, belongs)
    assert synced == Synced(workdir / "data", digests(TREE))
    assert bodies(workdir / "data") == TREE
    assert meddler.count("GET", "/data/") == len(TREE)
    assert synced.digest() == sync(str(write(tmp_path / "folder", TREE)), workdir, belongs).digest()


def test_the_log_says_how_much_is_brought_and_what_is_left(
    store: Store, workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    location = put(store, TREE | STRANGERS)
    with caplog.at_level(logging.INFO):
        for body in (b"x" * 2_000_000, b"y" * 2_000_000):
            put(store, {"train/cat/cat-0.png": body})
            sync(location, workdir, belongs)
    assert [line for line in caplog.messages if line.startswith("sync: ")] == [
        f"sync: 7 files, {n} to download (2.0 MB), {len(STRANGERS)} other objects ignored" for n in (7, 1)
    ]


def test_a_whole_bucket_may_be_the_data_set(store: Store, workdir: Path) -> None:
    for name, body in TREE.items():
        store.put(name, body)
    assert sync(f"s3://{store.bucket}", workdir, belongs).digests == digests(TREE)


@pytest.mark.parametrize("tree", [{}, {"": b"", "train/": b""}, STRANGERS], ids=["empty", "markers", "strangers"])
def test_a_prefix_without_a_file_of_a_data_set_is_unusable(tree: dict[str, bytes], store: Store, workdir: Path) -> None:
    location = put(store, tree) if tree else f"s3://{store.bucket}/data"
    with pytest.raises(DataError, match=rf"^{location}: must hold train/ and answers.json"):
        sync(location, workdir, belongs)


# --- what comes again ------------------------------------------------------------------------------------------------


def test_a_second_sync_downloads_nothing(store: Store, meddler: Meddler, workdir: Path) -> None:
    location = put(store, TREE)
    first = sync(location, workdir, belongs)
    before, gets = state(workdir / "data"), meddler.count("GET", "/data/")
    assert sync(location, workdir, belongs) == first
    assert state(workdir / "data") == before
    assert meddler.count("GET", "/data/") == gets


def test_a_second_sync_downloads_what_is_new_or_changed(store: Store, meddler: Meddler, workdir: Path) -> None:
    location = put(store, TREE)
    sync(location, workdir, belongs)
    before, gets = state(workdir / "data"), meddler.count("GET", "/data/")
    changed = {"train/cat/cat-0.png": b"A CAT", "train/new-3.png": b"new"}  # the first with the size it had
    put(store, changed)
    assert sync(location, workdir, belongs).digests == digests(TREE | changed)
    after = state(workdir / "data")
    assert {name: file.body for name, file in after.items()} == TREE | changed
    assert {name for name in TREE if after[name] == before[name]} == TREE.keys() - changed.keys()
    assert meddler.count("GET", "/data/") == gets + 2


def test_what_is_deleted_in_the_bucket_disappears(store: Store, workdir: Path) -> None:
    location = put(store, TREE)
    sync(location, workdir, belongs)
    place(location).delete("val/cat/x.png")
    rest = {name: body for name, body in TREE.items() if name != "val/cat/x.png"}
    assert sync(location, workdir, belongs).digests == digests(rest)
    assert bodies(workdir / "data") == rest


def test_a_file_may_become_a_folder_and_a_folder_a_file(store: Store, workdir: Path) -> None:
    file, folder = {"train/x.png": b"file"}, {"train/x.png/y.png": b"in a folder"}
    location = f"s3://{store.bucket}/data"
    for old, new in ((file, folder), (folder, file), (file, folder)):
        for name in old:
            place(location).delete(name)
        put(store, new)
        assert sync(location, workdir, belongs).digests == digests(new)
        assert bodies(workdir / "data") == new


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_bad_line_costs_no_file(store: Store, meddler: Meddler, workdir: Path) -> None:
    tree = {f"train/{i}.png": os.urandom(1000) for i in range(20)}
    location = put(store, tree)
    for i in (3, 7, 11):
        meddler.spoil(shortened_to(100 * i), path=f"/{i}.png")
        meddler.spoil(refused(503, "SlowDown"), path=f"/{i + 1}.png")
    assert sync(location, workdir, belongs).digests == digests(tree)
    assert bodies(workdir / "data") == tree


def test_an_object_swapped_while_syncing_is_noticed(store: Store, meddler: Meddler, workdir: Path) -> None:
    location = put(store, TREE)

    def swap(answer: Answer) -> None:
        put(store, {"train/cat/cat-0.png": b"A CAT"})

    meddler.spoil(swap, path="encoding-type=url")
    with pytest.raises(StoreError, match=r"cat-0.png: must stay as it was listed, was changed meanwhile"):
        sync(location, workdir, belongs)
    assert sync(location, workdir, belongs).digests["train/cat/cat-0.png"] == hashlib.sha256(b"A CAT").hexdigest()


def test_an_object_that_is_refused_stops_the_sync_and_leaves_no_litter(
    store: Store, meddler: Meddler, workdir: Path
) -> None:
    location = put(store, TREE)
    meddler.spoil(refused(403, "AccessDenied"), path="cat-0.png", times=2)
    with pytest.raises(AccessError, match=r"data/train/cat/cat-0.png: the store must allow this, it answers 403"):
        sync(location, workdir, belongs)
    assert not (workdir / "data/train/cat/cat-0.png").exists()
    assert sync(location, workdir, belongs).digests == digests(TREE)
    assert list((workdir / "partial").iterdir()) == []


def test_what_waits_behind_a_refused_object_is_not_asked_for(store: Store, meddler: Meddler, workdir: Path) -> None:
    names = [f"train/x-{i:03}.png" for i in range(300)]
    location = put(store, dict.fromkeys(names, b"body"))
    over = threading.Event()

    def held(answer: Answer) -> None:
        assert over.wait(60)

    meddler.spoil(refused(403, "AccessDenied"), path=names[0], times=2)
    for name in names[1:]:
        meddler.spoil(held, path=name, times=2)
    try:
        with pytest.raises(AccessError):
            sync(location, workdir, belongs)
    finally:
        over.set()
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join()
    assert meddler.count("GET", "/data/") < 200  # 128 at once, and the refused one again
