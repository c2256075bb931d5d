"""A file has its name when it is whole; what a killed process has left beside it goes, what another writes stays."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from crowdlayer.storage.durable import flush_disk, flush_folder, whole
from tests.conftest import ROOT


def test_a_file_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "x"
    for body in (b"old", b"new"):
        before = target.read_bytes() if target.exists() else None
        with whole(target) as file:
            file.write(body)
            file.flush()
            assert (target.read_bytes() if target.exists() else None) == before
        assert target.read_bytes() == body
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_file_that_cannot_be_written_leaves_the_old_one_alone(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"old")

    def fill() -> None:
        with whole(target) as file:
            file.write(b"half of the ne")
            file.seek(-1)

    with pytest.raises(OSError, match="Invalid argument"):
        fill()
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_two_who_write_the_same_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    with whole(tmp_path / "x") as first:
        first.write(b"first")
        with whole(tmp_path / "x") as second:
            second.write(b"second")
        assert (tmp_path / "x").read_bytes() == b"second"
    assert (tmp_path / "x").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["x", "n" * 250 + ".json", "é[*]\n" * 40])
def test_what_a_killed_process_left_goes_with_the_next_file_of_that_name(name: str, tmp_path: Path) -> None:
    """And of no other, which is on its way perhaps, from a host whose locks are not seen here."""
    other = f"{name[:-1]}~"
    code = "import os, sys; from pathlib import Path; from crowdlayer.storage.durable import whole\n"
    code += "with whole(Path(sys.argv[1])) as file: file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / name], cwd=ROOT)
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    with whole(tmp_path / other):
        pass
    assert left.read_bytes() == b"half"
    with whole(tmp_path / name) as file:
        file.write(b"whole")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {other: b"", name: b"whole"}


def test_a_folder_that_is_not_there_cannot_be_flushed(tmp_path: Path) -> None:
    flush_folder(tmp_path)
    flush_disk(tmp_path)
    for flush in (flush_folder, flush_disk):
        with pytest.raises(FileNotFoundError):
            flush(tmp_path / "x")


@pytest.mark.skipif(os.getuid() != 0, reason="takes two users")
def test_what_another_users_process_has_left_stays_and_is_in_nobodys_way() -> None:
    with tempfile.TemporaryDirectory() as named:
        left = Path(named, f".x.{'0' * 32}")
        left.write_bytes(b"half")
        Path(named).chmod(0o777)
        os.seteuid(65534)
        try:
            with whole(Path(named, "x")) as file:
                file.write(b"all")
        finally:
            os.seteuid(0)
        assert {path.name: path.read_bytes() for path in Path(named).iterdir()} == {left.name: b"half", "x": b"all"}
