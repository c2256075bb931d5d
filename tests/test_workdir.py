"""The job's folder on this machine: what is ours in it is nobody else's, and what becomes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crowdlayer.errors import StoreError
from crowdlayer.storage.workdir import working_folder
from tests.conftest import ROOT


def test_a_working_folder_is_free_when_its_job_has_ended(tmp_path: Path) -> None:
    for _ in range(2):
        with working_folder(str(tmp_path)) as path:
            with pytest.raises(StoreError, match="another job is using"), working_folder(str(tmp_path)):
                pass
            assert path == tmp_path


KILLED = """
import os, sys
from crowdlayer.storage.workdir import working_folder
with working_folder(None) as folder:
    (folder / "data").touch()
    print(folder, flush=True)
    if sys.argv[1:]:
        sys.stdin.read()
    os._exit(9)
"""


def test_what_a_killed_job_has_left_is_removed_by_the_next_and_what_another_uses_is_not(tmp_path: Path) -> None:
    def started(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", KILLED, *arguments]
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment)

    (tmp_path / "crowdlayer-kept-x").mkdir()
    with started("and waits") as living:
        assert living.stdout is not None
        used = Path(living.stdout.readline().strip())
        with started() as killed:
            left = Path(killed.communicate()[0].strip())
        assert {path.name for path in tmp_path.iterdir()} == {used.name, left.name, "crowdlayer-kept-x"}
        with started() as killed:
            again = Path(killed.communicate()[0].strip())
        assert {path.name for path in tmp_path.iterdir()} == {used.name, again.name, "crowdlayer-kept-x"}
        assert (used / "data").exists()
