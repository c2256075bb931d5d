"""A data set in one archive."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from crowdlayer.data.layout import belongs
from crowdlayer.errors import DataError, SettingsError
from crowdlayer.pack import pack
from crowdlayer.storage.sync import sync
from tests.conftest import ROOT, Store

WITHOUT_TORCH = "import sys, crowdlayer.pack; sys.exit('torch' in sys.modules)"


def test_what_was_packed_is_the_same_data_set(shapes: Path, tmp_path: Path) -> None:
    archive = tmp_path / "new" / "shapes.tar"
    n = pack(str(shapes), str(archive))
    packed, folder = (sync(str(at), tmp_path / "work", belongs) for at in (archive, shapes))
    assert packed.digest() == folder.digest()
    assert n == len(folder.digests)


def test_a_bucket_is_packed_into_a_bucket(shapes: Path, store: Store, tmp_path: Path) -> None:
    uri = store.put_tree(shapes)
    pack(uri, f"s3://{store.bucket}/packed/shapes.tar")
    packed = sync(f"s3://{store.bucket}/packed/shapes.tar", tmp_path / "work", belongs)
    assert packed.digest() == sync(str(shapes), tmp_path, belongs).digest()


def test_the_same_files_make_the_same_bytes_and_strangers_stay_out(tmp_path: Path) -> None:
    files = ["train/x-1.png", "answers.json", "notes.txt", "results/crowdlayer.json"]
    for name, order in (("a", files), ("b", files[::-1])):
        for file in order:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file)
        pack(str(tmp_path / name), str(tmp_path / f"{name}.tar"))
    first, second = (hashlib.sha256((tmp_path / f"{name}.tar").read_bytes()).hexdigest() for name in ("a", "b"))
    assert first == second
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == ["answers.json", "train/x-1.png"]


@pytest.mark.parametrize("archive", ["x.zip", "s3://bucket.tar", "folder/"])
def test_what_is_no_place_for_an_archive_is_refused(shapes: Path, archive: str) -> None:
    with pytest.raises(SettingsError, match=r"archive: must be a \.tar"):
        pack(str(shapes), archive)


def test_a_name_that_no_archive_may_have_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "a/train").mkdir(parents=True)
    (tmp_path / "a/train/x\\y-1.png").touch()
    with pytest.raises(DataError, match="a name must have no backslash"):
        pack(str(tmp_path / "a"), str(tmp_path / "a.tar"))


def test_links_to_nowhere_are_told_and_not_packed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a/train").mkdir(parents=True)
    (tmp_path / "a/train/x-1.png").touch()
    (tmp_path / "a/train/y-2.png").symlink_to("nowhere.png")
    assert pack(str(tmp_path / "a"), str(tmp_path / "a.tar")) == 1
    assert caplog.messages == ["left out: 1 links that lead nowhere: train/y-2.png"]


def test_a_folder_without_a_data_set_is_not_packed(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        pack(str(tmp_path), str(tmp_path / "x.tar"))
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_did_and_how_it_is_called(shapes: Path, tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "crowdlayer.pack", *arguments]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)

    done = command(str(shapes), str(tmp_path / "x.tar"))
    assert (done.returncode, done.stdout) == (0, "")
    assert "packed: 43 files" in done.stderr
    asked = command("--help")  # nobody waits for torch
    assert subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT).returncode == 0
    assert (asked.returncode, asked.stdout) == (0, "usage: python -m crowdlayer.pack <tasks> <archive>.tar\n")
    wrong = command(str(shapes))
    assert (wrong.returncode, wrong.stderr) == (
        78,
        "crowdlayer: usage: python -m crowdlayer.pack <tasks> <archive>.tar\n",
    )
