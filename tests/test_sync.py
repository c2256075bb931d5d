"""A data set at any place is files on this machine, each with its digest; so is a single file that a setting names."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import pytest

from crowdlayer.data.layout import belongs
from crowdlayer.data.picture import BrokenImageError, decode
from crowdlayer.errors import AccessError, DataError, SettingsError
from crowdlayer.settings import is_archive
from crowdlayer.storage.sync import Synced, fetch, sync
from tests.conftest import Store
from tests.trees import STRANGERS, TREE, bodies, digests, put, state, write

# --- folders, in place -----------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_place(tmp_path: Path, workdir: Path) -> None:
    folder = write(tmp_path / "data", TREE | STRANGERS)
    before = state(folder)
    synced = sync(str(folder), workdir, belongs)
    assert synced == Synced(folder, digests(TREE))
    assert state(folder) == before
    assert list(workdir.iterdir()) == []


def test_links_in_a_folder_are_followed_and_loops_end(tmp_path: Path, workdir: Path) -> None:
    folder = write(tmp_path / "data", {"answers.json": b"{}", "train/x-0.png": b"x"})
    write(tmp_path / "elsewhere", {"y-1.png": b"y"})
    (folder / "train" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "train" / "loop").symlink_to("..")
    (folder / "train" / "itself.png").symlink_to("itself.png")
    names = ["answers.json", "train/itself.png", "train/linked/y-1.png", "train/x-0.png"]
    assert sorted(sync(str(folder), workdir, belongs).digests) == names


def test_of_links_to_nowhere_images_are_broken_and_the_others_told(
    tmp_path: Path, workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "data", {"answers.json": b"{}", "train/x-0.png": b"x"})
    for name in ("train/y-1.png", "val", "metadata.json", "notes.txt"):
        (folder / name).symlink_to(tmp_path / "nowhere" / name)
    (folder / "train/itself-2.png").symlink_to("itself-2.png")
    (folder / "train/through-3.png").symlink_to("x-0.png/y.png")
    synced = sync(str(folder), workdir, belongs)
    images = ["train/itself-2.png", "train/through-3.png", "train/x-0.png", "train/y-1.png"]
    assert sorted(synced.digests) == ["answers.json", *images]
    assert caplog.messages == ["left out: 1 links that lead nowhere: val"]
    for name in (image for image in images if image != "train/x-0.png"):
        with pytest.raises(BrokenImageError, match="it is a link to nowhere"):
            decode(synced.root / name, 8)


@pytest.mark.parametrize("forbidden", ["train/cat/cat-0.png", "data.tar"])
def test_a_file_that_may_not_be_read_is_named(forbidden: str) -> None:
    with tempfile.TemporaryDirectory() as named, tempfile.TemporaryDirectory() as workdir:
        folder = write(Path(named), TREE | {"data.tar": b""})
        folder.chmod(0o755)
        Path(workdir).chmod(0o777)
        (folder / forbidden).chmod(0)
        if root := os.geteuid() == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(AccessError, match=rf"{named}/{forbidden}: .*Permission denied"):
                sync(f"{named}/{forbidden}" if is_archive(forbidden) else named, Path(workdir), belongs)
        finally:
            if root:
                os.seteuid(0)


def test_a_folder_of_the_disks_own_may_be_closed() -> None:
    """lost+found is root's, where a job is another user; so is another's waste basket."""
    with tempfile.TemporaryDirectory() as named, tempfile.TemporaryDirectory() as workdir:
        folder = write(Path(named), TREE | {"lost+found/x": b"", "train/.Trash-0/x.png": b""})
        folder.chmod(0o755)
        for closed in ("lost+found", "train/.Trash-0"):
            (folder / closed).chmod(0)
        if root := os.geteuid() == 0:
            os.seteuid(65534)
        try:
            assert sync(named, Path(workdir), belongs).digests == digests(TREE)
        finally:
            if root:
                os.seteuid(0)
            for closed in ("lost+found", "train/.Trash-0"):
                (folder / closed).chmod(0o700)


def test_a_folder_without_a_file_of_a_data_set_is_unusable(tmp_path: Path, workdir: Path) -> None:
    folder = write(tmp_path / "data", STRANGERS)
    with pytest.raises(DataError, match=r"data: must hold train/ and answers.json, holds no such file"):
        sync(str(folder), workdir, belongs)


# --- single files ----------------------------------------------------------------------------------------------------


def test_a_local_file_is_used_where_it_is(tmp_path: Path, workdir: Path) -> None:
    path = tmp_path / "answers.json"
    path.write_bytes(b"{}")
    assert fetch(str(path), workdir, "ANSWERS") == (path, hashlib.sha256(b"{}").hexdigest())
    assert list(workdir.iterdir()) == []


def test_an_object_is_fetched_beside_the_data_set(store: Store, workdir: Path) -> None:
    location = put(store, TREE)
    synced = sync(location, workdir, belongs)
    store.put("weights/net ü.pth", b"weights")
    path, digest = fetch(f"s3://{store.bucket}/weights/net ü.pth", workdir, "PRETRAINED")
    assert (path.name, path.read_bytes(), digest) == ("net ü.pth", b"weights", hashlib.sha256(b"weights").hexdigest())
    assert path.is_relative_to(workdir)
    store.put("weights/net ü.pth", b"WEIGHTS")
    assert fetch(f"s3://{store.bucket}/weights/net ü.pth", workdir, "PRETRAINED")[0].read_bytes() == b"WEIGHTS"
    store.put("net ü.pth", b"at the top")
    assert fetch(f"s3://{store.bucket}/net ü.pth", workdir, "ANSWERS")[0].read_bytes() == b"at the top"
    assert bodies(synced.root) == TREE


def test_a_single_file_that_is_not_there_is_a_wrong_setting(store: Store, tmp_path: Path, workdir: Path) -> None:
    for location in (str(tmp_path / "x"), str(tmp_path), f"s3://{store.bucket}/x", f"s3://{store.bucket}", "s3://"):
        with pytest.raises(SettingsError, match=rf"^ANSWERS: must be .*, there is none at {location}$"):
            fetch(location, workdir, "ANSWERS")
