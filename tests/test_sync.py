"""Whatever place holds a data set, the same files arrive, once, whole, and inside the folder they belong in."""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from crowdlayer.data.layout import belongs
from crowdlayer.errors import AccessError, DataError, SettingsError, StoreError
from crowdlayer.settings import is_archive
from crowdlayer.storage.places import place
from crowdlayer.storage.sync import Synced, fetch, sync
from crowdlayer.storage.workdir import OURS, working_folder
from tests.conftest import ROOT, Store, run_job
from tests.crowds import write_shapes
from tests.servers import (
    OTHER_USER,
    Answer,
    Meddler,
    cut_after,
    flipped,
    late,
    real_store,
    refused,
    shortened_to,
)

TREE = {
    "answers.json": b'{"0": {"w": 0}, "1": {"w": 1}}',
    "metadata.json": b"{}",
    "train/cat/cat-0.png": b"a cat",
    "train/dog/dog-1.PNG": b"a dog",
    "train/no class-2.jpeg": b"no class",
    "val/cat/x.png": b"another cat",
    "test/dog/y.png": b"",
}
"""A data set for whoever does not decode its images."""
STRANGERS = {
    "README.md": b"hello",
    "results/run.json": b"{}",
    "train/notes.txt": b"notes",
    "train/.hidden.png": b"hidden",
    "__MACOSX/train/._cat-0.png": b"fork",
    "elsewhere/train/z.png": b"z",
}
ODD = [
    "train/a b/c  d .png",
    "train/+%&?#=;,$@!'()*~-1.png",
    "train/%2e%2e/%2Fx-2.png",
    f"train/{unicodedata.normalize('NFC', 'é')}-3.png",
    f"train/{unicodedata.normalize('NFD', 'é')}-4.png",
    "train/猫/🐈-5.png",
    "train/...png",
    'train/"quoted" <x>|y-6.png',
    "train/" + "n" * 250 + ".png",
]
"""Names that are strange but harmless; `train/...png` starts with a dot and is hidden."""


class Unpacked(NamedTuple):
    """What there is of a file."""

    inode: int
    modified: int
    body: bytes


def state(root: Path) -> dict[str, Unpacked]:
    """Every file below `root`."""
    return {
        str(path.relative_to(root)): Unpacked(path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def bodies(root: Path) -> dict[str, bytes]:
    return {name: file.body for name, file in state(root).items()}


def write(root: Path, tree: Mapping[str, bytes]) -> Path:
    for name, body in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(body)
    return root


def put(store: Store, tree: Mapping[str, bytes], prefix: str = "data") -> str:
    for name, body in tree.items():
        store.put(f"{prefix}/{name}", body)
    return f"s3://{store.bucket}/{prefix}"


def digests(tree: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(body).hexdigest() for name, body in tree.items()}


def outside(tmp_path: Path, workdir: Path) -> list[str]:
    """The files that are not in `workdir`."""
    return [str(path) for path in sorted(tmp_path.rglob("*")) if not path.is_relative_to(workdir) and path.is_file()]


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A folder that is there, in a folder that shows what escapes."""
    path = tmp_path / "deep" / "er" / "workdir"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def no_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with little more than the bytes that a sync leaves free."""
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 64 * 2**20 + 10))


# --- folders ---------------------------------------------------------------------------------------------------------


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
    names = ["answers.json", "train/linked/y-1.png", "train/x-0.png"]
    assert sorted(sync(str(folder), workdir, belongs).digests) == names


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


def test_a_folder_that_is_not_there_is_a_wrong_setting(tmp_path: Path, workdir: Path) -> None:
    with pytest.raises(SettingsError, match="nothing: must be a folder"):
        sync(str(tmp_path / "nothing"), workdir, belongs)


# --- buckets ---------------------------------------------------------------------------------------------------------


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


def test_a_local_file_that_was_cut_or_deleted_is_fetched_again(store: Store, meddler: Meddler, workdir: Path) -> None:
    location = put(store, TREE)
    first = sync(location, workdir, belongs)
    gets = meddler.count("GET", "/data/")
    (workdir / "data/train/cat/cat-0.png").write_bytes(b"a c")
    (workdir / "data/answers.json").unlink()
    assert sync(location, workdir, belongs) == first
    assert bodies(workdir / "data") == TREE
    assert meddler.count("GET", "/data/") == gets + 2


def test_a_sync_that_was_killed_goes_on(store: Store, meddler: Meddler, workdir: Path) -> None:
    tree = {f"train/{i:02}-{'slow' if i >= 30 else 'quick'}.png": bytes([i]) for i in range(45)}
    location = put(store, tree)
    released = threading.Event()

    def wait(answer: Answer) -> None:
        released.wait(60)

    meddler.spoil(wait, path="slow.png", times=1000)
    code = "import sys; from pathlib import Path; from crowdlayer.storage.sync import sync;"
    code += "sync(sys.argv[1], Path(sys.argv[2]), lambda name: True)"
    killed = subprocess.Popen([sys.executable, "-c", code, location, str(workdir)], cwd=ROOT)
    try:
        manifest, deadline = workdir / "manifest.jsonl", time.monotonic() + 60
        while not manifest.exists() or len(manifest.read_text().splitlines()) < 32:
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        released.set()
    assert list((workdir / "partial").iterdir())  # what was half there
    with manifest.open("a") as file:
        file.write('["train/30-slow.png", 1, "\\"6')
    quick = meddler.count("GET", "quick.png")
    assert sync(location, workdir, lambda name: True) == Synced(workdir / "data", digests(tree))
    assert bodies(workdir / "data") == tree
    assert meddler.count("GET", "quick.png") == quick
    assert list((workdir / "partial").iterdir()) == []


def test_a_file_that_a_power_loss_tore_is_fetched_again(store: Store, meddler: Meddler, workdir: Path) -> None:
    """It has its size, and is named among what has come; the sync was not at its end."""
    location = put(store, TREE)
    meddler.spoil(refused(403, "AccessDenied"), path="val/cat/x.png", times=2)
    with pytest.raises(AccessError):
        sync(location, workdir, belongs)
    torn = workdir / "data/train/cat/cat-0.png"
    torn.write_bytes(bytes(torn.stat().st_size))
    assert sync(location, workdir, belongs).digests == digests(TREE)
    assert bodies(workdir / "data") == TREE
    gets = meddler.count("GET", "/data/")
    assert sync(location, workdir, belongs).digests == digests(TREE)
    assert meddler.count("GET", "/data/") == gets


def test_what_a_sync_has_brought_is_on_the_disk_at_its_end_and_is_not_read_again(store: Store, workdir: Path) -> None:
    """The last line of the manifest says so; what happens to a file later is not the sync's matter."""
    location = put(store, TREE)
    sync(location, workdir, belongs)
    assert (workdir / "manifest.jsonl").read_bytes().splitlines()[-1] == b'"flushed"'
    other = workdir / "data/train/cat/cat-0.png"
    other.write_bytes(bytes(other.stat().st_size))
    assert sync(location, workdir, belongs).digests == digests(TREE)
    assert not any(other.read_bytes())


@pytest.mark.parametrize(
    "line", [b"no json", b'["train/x.png", "large", "", ""]', b'["../victim", 1, "", ""]', b"\xff"]
)
def test_a_spoilt_line_of_the_manifest_costs_no_file(
    line: bytes, store: Store, meddler: Meddler, workdir: Path
) -> None:
    """Neither those of the lines below it, nor one outside, which would go as one that the bucket has no more."""
    location, victim = put(store, TREE), workdir / "victim"
    first = sync(location, workdir, belongs)
    victim.write_bytes(b"x")
    manifest, gets = workdir / "manifest.jsonl", meddler.count("GET", "/data/")
    head, *rest = manifest.read_bytes().splitlines()
    manifest.write_bytes(b"\n".join([head, line, *rest, b""]))
    assert sync(location, workdir, belongs) == first
    assert victim.exists()
    assert meddler.count("GET", "/data/") == gets


def test_another_place_in_the_same_workdir_starts_clean(store: Store, meddler: Meddler, workdir: Path) -> None:
    sync(put(store, TREE), workdir, belongs)
    other = {name: body.upper() for name, body in TREE.items() if "cat" in name} | {"train/only-3.png": b"only"}
    assert sync(put(store, other, "other"), workdir, belongs).digests == digests(other)
    assert bodies(workdir / "data") == other
    assert sync(f"s3://{store.bucket}/data", workdir, belongs).digests == digests(TREE)
    assert bodies(workdir / "data") == TREE


def test_a_bucket_and_an_archive_may_take_turns_in_the_same_workdir(
    store: Store, tmp_path: Path, workdir: Path
) -> None:
    other = {name: body.swapcase() for name, body in TREE.items()} | {"train/only-3.png": b"only"}
    location, archive = put(store, TREE), pack(tmp_path / "other.tar", other)
    for _ in range(2):
        assert sync(location, workdir, belongs).digests == digests(TREE)
        assert bodies(workdir / "data") == TREE
        assert sync(archive, workdir, belongs).digests == digests(other)
        assert bodies(workdir / "data") == other


@pytest.mark.parametrize("name", OURS)
def test_what_is_the_users_is_never_removed(name: str, workdir: Path) -> None:
    write(workdir, {f"{name}/thesis.tex" if "." not in name else name: b"years of work"})
    before = state(workdir)
    with (
        pytest.raises(SettingsError, match=rf"WORKDIR: must be a folder for this job alone, .* has {name} of another"),
        working_folder(str(workdir)),
    ):
        pass
    assert {path: what for path, what in state(workdir).items() if path != ".lock"} == before


def test_a_file_may_become_a_folder_and_a_folder_a_file(store: Store, workdir: Path) -> None:
    file, folder = {"train/x.png": b"file"}, {"train/x.png/y.png": b"in a folder"}
    location = f"s3://{store.bucket}/data"
    for old, new in ((file, folder), (folder, file), (file, folder)):
        for name in old:
            place(location).delete(name)
        put(store, new)
        assert sync(location, workdir, belongs).digests == digests(new)
        assert bodies(workdir / "data") == new


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


UNSAFE = {
    "../x.png": "'..'",
    "train/../../x.png": "'..'",
    "train/..": "'..'",
    "./train/x.png": "'.'",
    "train/./x.png": "'.'",
    "/abs.png": "relative",
    "train//x.png": "empty part",
    "C:/x.png": "relative",
    "c:x.png": "relative",
    "train/a\\b.png": "backslash",
    "..\\x.png": "backslash",
    "train/a\tb.png": "control character",
    "train/a\x1b[2Jb.png": "control character",
    "train/a\x7fb.png": "control character",
    "train/" + "n" * 252 + ".png": "255 bytes",
    "train/" + "猫" * 84 + ".png": "255 bytes",
}


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


@pytest.mark.parametrize("tree", [{}, {"": b"", "train/": b""}, STRANGERS], ids=["empty", "markers", "strangers"])
def test_a_prefix_without_a_file_of_a_data_set_is_unusable(tree: dict[str, bytes], store: Store, workdir: Path) -> None:
    location = put(store, tree) if tree else f"s3://{store.bucket}/data"
    with pytest.raises(DataError, match=rf"^{location}: must hold train/ and answers.json"):
        sync(location, workdir, belongs)


@pytest.mark.usefixtures("no_space")
def test_a_disk_that_is_too_small_is_found_before_the_first_byte(store: Store, meddler: Meddler, workdir: Path) -> None:
    location = put(store, TREE)
    with pytest.raises(StoreError, match=r"workdir: 67 MB of disk are needed, 67 MB are free"):
        sync(location, workdir, belongs)
    assert meddler.count("GET", "/data/") == 0
    assert bodies(workdir / "data") == {}


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


def test_an_object_swapped_while_syncing_is_noticed(store: Store, meddler: Meddler, workdir: Path) -> None:
    location = put(store, TREE)

    def swap(answer: Answer) -> None:
        put(store, {"train/cat/cat-0.png": b"A CAT"})

    meddler.spoil(swap, path="encoding-type=url")
    with pytest.raises(StoreError, match=r"cat-0.png: must stay as it was listed, was changed meanwhile"):
        sync(location, workdir, belongs)
    assert sync(location, workdir, belongs).digests["train/cat/cat-0.png"] == hashlib.sha256(b"A CAT").hexdigest()


def test_downloads_that_come_when_the_job_has_ended_leave_nothing(store: Store, meddler: Meddler) -> None:
    """Threads that wait for a store are not waited for, and what they then have is nobody's any more."""
    for i in range(8):
        store.put(f"data/train/{i}/x-{i}.png", b"body")
    meddler.spoil(refused(403, "AccessDenied"), path="x-0.png", times=9)
    for i in range(1, 8):
        meddler.spoil(late(1), path=f"x-{i}.png", times=9)
    with pytest.raises(AccessError), working_folder(None) as workdir:
        sync(f"s3://{store.bucket}/data", workdir, belongs)
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join()
    assert not workdir.exists()


def test_a_bad_line_costs_no_file(store: Store, meddler: Meddler, workdir: Path) -> None:
    tree = {f"train/{i}.png": os.urandom(1000) for i in range(20)}
    location = put(store, tree)
    for i in (3, 7, 11):
        meddler.spoil(shortened_to(100 * i), path=f"/{i}.png")
        meddler.spoil(refused(503, "SlowDown"), path=f"/{i + 1}.png")
    assert sync(location, workdir, belongs).digests == digests(tree)
    assert bodies(workdir / "data") == tree


# --- archives --------------------------------------------------------------------------------------------------------

KINDS = (".tar", ".tar.gz", ".zip")


def pack(path: Path, tree: Mapping[str, bytes], top: str = "") -> str:
    """Write an archive; returns its location."""
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, body in tree.items():
                archive.writestr(top + name, body)
        return str(path)
    with tarfile.open(path, "w" if path.name.endswith(".tar") else "w:gz") as tar:
        for name, body in tree.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return str(path)


def upload(store: Store, archive: str) -> str:
    key = f"archives/{Path(archive).name}"
    store.put(key, Path(archive).read_bytes())
    return f"s3://{store.bucket}/{key}"


def refusal(path: Path, workdir: Path) -> str | None:
    """Why the archive is refused; None where it gives all of `TREE`."""
    try:
        synced = sync(str(path), workdir, belongs)
    except DataError as error:
        return str(error)
    assert synced.digests == digests(TREE)
    return None


@pytest.mark.parametrize("encoding", ["utf-8", "cp437"])
def test_a_zip_that_does_not_say_what_its_names_are_in_is_read_all_the_same(
    encoding: str, tmp_path: Path, workdir: Path
) -> None:
    """UTF-8 as Info-ZIP's zip writes it, and the code page of DOS."""
    name = "train/Äpfel-0.png"
    packed = Path(pack(tmp_path / "data.zip", {f"train/{'X' * len('Ä'.encode(encoding))}pfel-0.png": b"apples"}))
    packed.write_bytes(re.sub(b"X+", "Ä".encode(encoding), packed.read_bytes()))
    assert sync(str(packed), workdir, belongs).digests == digests({name: b"apples"})


@pytest.mark.parametrize("kind", KINDS)
def test_links_in_an_archive_are_left_out_and_told(
    kind: str, tmp_path: Path, workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"data{kind}"
    if kind == ".zip":
        pack(path, TREE)
        with zipfile.ZipFile(path, "a") as archive:
            for name in ("val/cat/link.png", "notes/link"):
                info = zipfile.ZipInfo(name)
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
                archive.writestr(info, "../../train/cat/cat-0.png")
    else:
        root = tmp_path / "tree"
        write(root, TREE)
        (root / "notes").mkdir()
        for name in ("val/cat/link.png", "notes/link"):
            (root / name).symlink_to("../../train/cat/cat-0.png")
        with tarfile.open(path, "w:gz" if kind.endswith("gz") else "w") as tar:
            tar.add(root, ".")
    assert sync(str(path), workdir, belongs).digests == digests(TREE)
    assert f"data{kind}: 1 links are left out; tar --dereference" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_data_sets_archive_has_a_folder_above_it(kind: str, tmp_path: Path, workdir: Path) -> None:
    """New images keep the names that they have in the archive, whatever one of their folders is called."""
    tree = {"a/train/1.png": b"1", "a/car/2.png": b"2", "b/3.png": b"3"}
    location = pack(tmp_path / f"new{kind}", tree)
    assert sync(location, workdir, lambda _: True, "PREDICT").digests == digests(tree)
    assert bodies(workdir / "data") == tree


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", ["./", "set/", "./my set.v2/"])
def test_the_folder_that_an_archive_was_made_of_does_not_matter(
    top: str, kind: str, tmp_path: Path, workdir: Path
) -> None:
    archive = pack(tmp_path / f"data{kind}", TREE | {"results/x.json": b"{}"}, top)
    assert sync(archive, workdir, belongs).digests == digests(TREE)


def test_a_forks_folder_beside_the_top_one_is_ignored(tmp_path: Path, workdir: Path) -> None:
    tree = {f"set/{name}": body for name, body in TREE.items()} | {"__MACOSX/set/train/._cat-0.png": b"fork"}
    assert sync(pack(tmp_path / "data.zip", tree), workdir, belongs).digests == digests(TREE)


def test_an_archive_with_two_data_sets_is_unusable(tmp_path: Path, workdir: Path) -> None:
    tree = {f"{top}/{name}": body for top in ("a", "b") for name, body in TREE.items()}
    with pytest.raises(DataError, match=r"two.tar: must hold train/ and answers.json"):
        sync(pack(tmp_path / "two.tar", tree), workdir, belongs)


def test_a_real_tar_of_a_folder_with_its_folders_and_owners_is_unpacked(tmp_path: Path, workdir: Path) -> None:
    folder = write_shapes(tmp_path / "shapes")
    expected = sync(str(folder), workdir, belongs).digest()
    for arguments in (["-C", str(folder), "."], ["-C", str(tmp_path), "shapes"], ["--posix", "-C", str(folder), "."]):
        subprocess.run(["tar", "-czf", str(tmp_path / "x.tar.gz"), *arguments], check=True)
        assert sync(str(tmp_path / "x.tar.gz"), workdir, belongs).digest() == expected


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


def test_an_archive_that_is_not_there_is_a_wrong_setting(store: Store, tmp_path: Path, workdir: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    for location in (f"{tmp_path}/x.tar", f"{tmp_path}/folder.tar", f"s3://{store.bucket}/x.zip"):
        with pytest.raises(SettingsError, match=rf"TASKS: .* there is none at {location}"):
            sync(location, workdir, belongs)
    with pytest.raises(SettingsError, match=r"the bucket must exist, 'x\.tar' does not"):
        sync("s3://x.tar", workdir, belongs)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unsafe_member_is_refused_by_name_and_nothing_is_written(kind: str, tmp_path: Path, workdir: Path) -> None:
    for name, rule in UNSAFE.items():
        if name.startswith("./"):
            continue  # as many archives begin all their names
        archive = pack(tmp_path / f"data{kind}", TREE | {name: b"evil"})
        assert_refused(archive, name, rule, workdir)
        assert outside(tmp_path, workdir) == [archive]
        assert bodies(workdir / "data") == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_above_the_top_folder_is_never_written(kind: str, tmp_path: Path, workdir: Path) -> None:
    tree = {f"set/{name}": body for name, body in TREE.items()}
    archive = pack(tmp_path / f"data{kind}", tree | {"../x.png": b"evil", "/abs.png": b"evil", "set": b"evil"})
    before = outside(tmp_path, workdir)
    assert sync(archive, workdir, belongs).digests == digests(TREE)
    assert outside(tmp_path, workdir) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_ignored(kind: bytes, tmp_path: Path, workdir: Path) -> None:
    secret = write(tmp_path, {"secret.png": b"secret"}) / "secret.png"
    archive = pack(tmp_path / "data.tar", TREE)
    with tarfile.open(archive, "a") as tar:
        for name in ("train/x-7.png", "train/linked"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret) if name.endswith(".png") else str(tmp_path)
            tar.addfile(info)
        info = tarfile.TarInfo("train/linked/x-8.png")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"file"))
    before = state(tmp_path)
    expected = TREE | {"train/linked/x-8.png": b"file"}
    assert sync(archive, workdir, belongs).digests == digests(expected)
    assert bodies(workdir / "data") == expected
    assert not (workdir / "data/train/linked").is_symlink()
    assert {name: file for name, file in state(tmp_path).items() if name in before} == before
    assert outside(tmp_path, workdir) == [archive, str(secret)]


def test_links_in_a_zip_are_ignored(tmp_path: Path, workdir: Path) -> None:
    archive = pack(tmp_path / "data.zip", TREE)
    with zipfile.ZipFile(archive, "a") as file:
        info = zipfile.ZipInfo("train/x-7.png")
        info.external_attr = 0o120777 << 16
        file.writestr(info, "/etc/passwd")
    assert sync(archive, workdir, belongs).digests == digests(TREE)


@pytest.mark.parametrize("kind", [".tar", ".zip"])
def test_a_member_that_is_there_twice_is_refused(kind: str, tmp_path: Path, workdir: Path) -> None:
    path = tmp_path / f"data{kind}"
    pack(path, TREE)
    if kind == ".zip":
        with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as file:
            warnings.simplefilter("ignore")
            file.writestr("train/cat/cat-0.png", b"another")
    else:
        with tarfile.open(path, "a") as tar:
            info = tarfile.TarInfo("train/cat/cat-0.png")
            tar.addfile(info, io.BytesIO())
    with pytest.raises(DataError, match=r"'train/cat/cat-0.png': must be in the archive once"):
        sync(str(path), workdir, belongs)


@pytest.mark.parametrize("kind", [".tar", ".zip"])
def test_a_member_cannot_be_a_file_and_a_folder(kind: str, tmp_path: Path, workdir: Path) -> None:
    archive = pack(tmp_path / f"data{kind}", TREE | {"train/cat/cat-0.png/x.png": b"x"})
    with pytest.raises(DataError, match=r"'train/cat/cat-0.png': must be a file or a folder, is both"):
        sync(archive, workdir, belongs)


@pytest.mark.parametrize("kind", [".tar", ".tar.gz", ".zip"])
def test_a_cut_archive_is_never_taken_for_a_whole_one(kind: str, tmp_path: Path, workdir: Path) -> None:
    whole = Path(pack(tmp_path / f"whole{kind}", TREE)).read_bytes()
    path = tmp_path / f"data{kind}"
    refusals = []
    for n in sorted({*range(0, len(whole), 512), *range(0, len(whole), max(1, len(whole) // 37)), len(whole) - 1}):
        path.write_bytes(whole[:n])
        refusals.append(refusal(path, workdir))
    assert sum(why is not None for why in refusals) > 10
    assert all(why.startswith(f"{path}: must be a whole archive: ") for why in refusals if why is not None)


@pytest.mark.parametrize("kind", [".tar", ".tar.gz"])
def test_a_tar_with_a_flipped_bit_in_a_header_is_never_taken_for_a_shorter_one(
    kind: str, tmp_path: Path, workdir: Path
) -> None:
    body = bytearray(Path(pack(tmp_path / "whole.tar", TREE)).read_bytes())
    body[2 * 1024 + 150] ^= 1  # the checksum of the third header
    path = tmp_path / f"data{kind}"
    path.write_bytes(gzip.compress(body) if kind == ".tar.gz" else body)
    with pytest.raises(DataError, match="must be a whole archive"):
        sync(str(path), workdir, belongs)


@pytest.mark.parametrize("level", [0, 9])
def test_a_flipped_bit_in_a_compressed_tar_is_noticed(level: int, tmp_path: Path, workdir: Path) -> None:
    tar = Path(pack(tmp_path / "whole.tar", TREE)).read_bytes()
    whole = gzip.compress(tar, level)
    path = tmp_path / "data.tar.gz"
    for position in range(10, len(whole), max(1, len(whole) // 61)):
        body = bytearray(whole)
        body[position] ^= 4
        path.write_bytes(body)
        assert "must be a whole archive" in (refusal(path, workdir) or "")


def test_a_flipped_bit_in_a_zipped_file_is_noticed(tmp_path: Path, workdir: Path) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("train/x-0.png", b"a body to be found")
    body = path.read_bytes()
    path.write_bytes(body.replace(b"a body", b"A body"))
    with pytest.raises(DataError, match="must be a whole archive: Bad CRC-32"):
        sync(str(path), workdir, belongs)


@pytest.mark.parametrize("packing", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_flipped_bit_in_a_compressed_zip_is_noticed(packing: int, tmp_path: Path, workdir: Path) -> None:
    name, path = "train/x-0.png", tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr(name, os.urandom(1000))
    body = bytearray(path.read_bytes())
    body[30 + len(name) + 100] ^= 4
    path.write_bytes(body)
    with pytest.raises(DataError, match="must be a whole archive"):
        sync(str(path), workdir, belongs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", [b"", b"no archive at all" * 100, bytes(10240)], ids=["empty", "text", "zeros"])
def test_what_is_no_archive_is_refused(body: bytes, kind: str, tmp_path: Path, workdir: Path) -> None:
    path = tmp_path / f"data{kind}"
    path.write_bytes(body)
    with pytest.raises(DataError, match=rf"data{kind}: must "):
        sync(str(path), workdir, belongs)


def test_an_encrypted_zip_is_refused(tmp_path: Path, workdir: Path) -> None:
    path = Path(pack(tmp_path / "data.zip", TREE))
    body = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := body.find(mark, at + 1)) >= 0:
            body[at + flags] |= 1
    path.write_bytes(body)
    with pytest.raises(DataError, match=r"must be a whole archive: .*encrypted"):
        sync(str(path), workdir, belongs)


def test_a_zip_with_an_impossible_name_or_offset_is_refused(tmp_path: Path, workdir: Path) -> None:
    nameless = Path(pack(tmp_path / "nameless.zip", TREE | {"?": b"nameless"}))
    nameless.write_bytes(nameless.read_bytes().replace(b"?", b"\0"))  # a name ends where a zero is
    with pytest.raises(DataError, match="a name must have no empty part"):
        sync(str(nameless), workdir, belongs)
    undecodable = Path(pack(tmp_path / "undecodable.zip", TREE | {"é": b""}))
    undecodable.write_bytes(undecodable.read_bytes().replace("é".encode(), b"\xff\xff"))
    with pytest.raises(DataError, match="must be a whole archive"):
        sync(str(undecodable), workdir, belongs)
    path = Path(pack(tmp_path / "offset.zip", TREE))
    body = bytearray(path.read_bytes())
    body[-6:-2] = (len(body) + 100).to_bytes(4, "little")  # where the directory is said to start
    path.write_bytes(body)
    with pytest.raises(DataError, match="must be a whole archive"):
        sync(str(path), workdir, belongs)


def lying_zip(path: Path, body: bytes, declared: int, crc: int) -> str:
    """A zip whose one member has `body`, but declares another size and CRC."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/x-0.png", body)
    packed = path.read_bytes()
    for true, lie in ((len(body), declared), (zlib.crc32(body), crc)):
        old = true.to_bytes(4, "little")
        assert packed.count(old) == 2
        packed = packed.replace(old, lie.to_bytes(4, "little"))
    path.write_bytes(packed)
    return str(path)


def test_a_zipped_file_larger_than_it_declares_is_refused(tmp_path: Path, workdir: Path) -> None:
    body = bytes(1_000_000)
    with pytest.raises(DataError, match="must be a whole archive: Bad CRC-32"):
        sync(lying_zip(tmp_path / "bomb.zip", body, 1000, zlib.crc32(body)), workdir, belongs)
    assert all(len(file) <= 1000 for file in bodies(workdir / "data").values())


def test_a_zipped_file_smaller_than_it_declares_is_refused(tmp_path: Path, workdir: Path) -> None:
    body = os.urandom(100_000)
    with pytest.raises(DataError, match=r"'train/x-0.png': must have the 100001 bytes it declares, has 100000"):
        sync(lying_zip(tmp_path / "short.zip", body, 100_001, zlib.crc32(body)), workdir, belongs)


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


@pytest.mark.usefixtures("no_space")
def test_a_single_file_larger_than_the_disk_is_not_fetched(store: Store, meddler: Meddler, workdir: Path) -> None:
    store.put("x", bytes(100))
    with pytest.raises(StoreError, match="of disk are needed"):
        fetch(f"s3://{store.bucket}/x", workdir, "ANSWERS")
    assert meddler.count("GET") == 0


# --- a real store ----------------------------------------------------------------------------------------------------


@pytest.mark.store
def test_a_real_stores_prefix_comes_whole_with_odd_names(real: Store, workdir: Path) -> None:
    tree = TREE | {name: name.encode() for name in ODD if "/." not in name}
    location = put(real, tree | STRANGERS | {"": b"", "train/": b""}, "a prefix/ü+%&?#")
    synced = sync(location, workdir, belongs)
    assert synced.digests == digests(tree)
    assert bodies(workdir / "data") == tree
    before = state(workdir / "data")
    assert sync(location, workdir, belongs) == synced
    assert state(workdir / "data") == before


@pytest.mark.store
def test_a_real_store_keeps_unsafe_names_and_they_are_refused(real: Store, tmp_path: Path, workdir: Path) -> None:
    for name in UNSAFE:
        real.put(f"data/{name}", b"evil")
    with pytest.raises(DataError, match=r"a name must be relative.*a name must have no backslash"):
        sync(f"s3://{real.bucket}/data", workdir, belongs)
    assert outside(tmp_path, workdir) == []


@pytest.mark.store
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_stores_archive_is_unpacked(kind: str, real: Store, tmp_path: Path, workdir: Path) -> None:
    location = upload(real, pack(tmp_path / f"data{kind}", TREE))
    assert sync(location, workdir, belongs).digests == digests(TREE)


@pytest.mark.store
def test_a_job_that_a_real_store_refuses_ends_with_77(
    real: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = real.put_tree(write_shapes(tmp_path / "shapes"))
    other = real_store(OTHER_USER)
    if other is None:
        pytest.skip("no S3_TEST_OTHER_ACCESS_KEY")
    for name, value in other.items():
        monkeypatch.setenv(name, value)
    done = run_job("--check", TASKS=location)
    assert done.code == 77
    assert location in done.last_line
    assert "Traceback" not in done.stderr
