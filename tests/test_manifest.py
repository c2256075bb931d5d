"""What a sync has brought is remembered: a killed one goes on, and of a torn or cut file another comes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from crowdlayer.data.layout import belongs
from crowdlayer.errors import AccessError
from crowdlayer.storage.sync import Synced, sync
from tests.conftest import ROOT, Store
from tests.servers import Answer, Meddler, refused
from tests.trees import TREE, bodies, digests, pack, put


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
