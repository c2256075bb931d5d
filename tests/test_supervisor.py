"""The training processes of a node, as the one that has started them sees them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crowdlayer.errors import EndedError, PeerError
from crowdlayer.machine.last_words import LastWords
from crowdlayer.machine.launch import Launch
from crowdlayer.machine.supervisor import live, supervise
from tests.conftest import ROOT

BUSY = """
import sys, types
busy = sys.modules["crowdlayer.busy"] = types.ModuleType("crowdlayer.busy")
exec(\'\'\'{main}\'\'\', vars(busy))
"""
"""A file that Python runs at its start: it makes a module of our package, with a `main` in it."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where processes leave their last words."""
    path = tmp_path / "run"
    path.mkdir()
    return path


def busy(main: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have processes that are started now know a module `busy` with this text."""
    (tmp_path / "sitecustomize.py").write_text(BUSY.format(main=main))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_what_processes_print_is_not_on_standard_output(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Which is for the location of the results alone; libraries print, as MLflow does."""
    busy("def main(): print('a library speaks')", tmp_path, monkeypatch)
    supervise("busy", folder, 2, Launch(), 1, 60.0)
    assert capfd.readouterr() == ("", "a library speaks\n" * 2)


def test_how_a_process_ended_is_known_where_who_started_the_job_wants_to_hear_of_no_ends(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a daemon ignores its programs ignore, too; the system keeps no exit codes for them."""
    busy("def main(): raise SystemExit(65)", tmp_path, monkeypatch)
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(EndedError, match="must end by itself, was ended with 65"):
            supervise("busy", folder, 2, Launch(), 1, 60.0)
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize(("nccl", "code"), [(True, 74), (False, 134)])
def test_a_process_that_nccl_has_aborted_misses_another(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nccl: bool, code: int
) -> None:
    """Its watchdog ends a process so when another is gone; without it that is a crash."""
    busy("import os\ndef main(): os.abort()", tmp_path, monkeypatch)
    with pytest.raises(PeerError if nccl else EndedError) as raised:
        supervise("busy", folder, 2, Launch(), 1, 60.0, nccl)
    assert raised.value.exit_code == code


WAITING = "def main(): import time; time.sleep(300)"
FAULT = LastWords("a fault", 70, by="node 1")


def test_processes_end_for_the_reason_of_another_node(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they wait for it in a collective, NCCL would wait for as long as TIMEOUT."""
    busy(WAITING, tmp_path, monkeypatch)
    with pytest.raises(EndedError, match="node 1: a fault") as raised:
        supervise("busy", folder, 2, Launch(), 1, 60.0, reason=lambda: FAULT)
    assert raised.value.exit_code == 70


def test_processes_that_save_do_not_end_for_a_node_that_was_interrupted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy("def main(): import time; time.sleep(1)", tmp_path, monkeypatch)
    interrupted = LastWords("SIGTERM: the run was interrupted", 75, by="node 1")
    supervise("busy", folder, 2, Launch(), 1, 60.0, reason=lambda: interrupted)


def test_processes_that_are_done_do_not_fail_for_another_node(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    busy(f"from pathlib import Path; import os\ndef main(): Path({str(pid)!r}).write_text(str(os.getpid()))",
         tmp_path, monkeypatch)  # fmt: skip

    def reason() -> LastWords | None:
        """That has failed when these have ended, and their ends were seen."""
        return FAULT if pid.exists() and pid.read_text() and not Path("/proc", pid.read_text()).exists() else None

    supervise("busy", folder, 1, Launch(), 1, 60.0, reason=reason)
    assert reason() is FAULT


def test_a_process_whose_supervisor_was_killed_before_it_could_ask_to_go_with_it_goes(folder: Path) -> None:
    another = str(os.getppid())
    program = "from crowdlayer.process import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), another], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (75, "")
    assert list(folder.iterdir()) == []


LIVING = """
def main():
    import os, sys, time
    from pathlib import Path
    from crowdlayer.machine.supervisor import live
    folder = Path(sys.argv[1])
    live(folder, int(os.environ["RANK"]))
    while not (folder / "end").exists():
        time.sleep(0.05)
"""
SUPERVISE = """
import sys
from pathlib import Path
from crowdlayer.machine.launch import Launch
from crowdlayer.machine.supervisor import supervise
supervise("busy", Path(sys.argv[1]), 2, Launch(), 1, timeout=3)
"""


def test_the_time_for_which_all_were_suspended_is_no_silence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the moment that the others need longer than the supervisor to be there again."""
    busy(LIVING, tmp_path, monkeypatch)
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, str(folder)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while len(list(folder.glob("alive-*"))) < 2:
            time.sleep(0.05)
        os.killpg(supervisor.pid, signal.SIGSTOP)
        time.sleep(5)
        os.kill(supervisor.pid, signal.SIGCONT)
        time.sleep(0.5)
        os.killpg(supervisor.pid, signal.SIGCONT)
        (folder / "end").touch()
        assert (supervisor.communicate(timeout=60)[1], supervisor.returncode) == ("", 0)
    finally:
        if supervisor.poll() is None:
            os.killpg(supervisor.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("ends", "code", "how"),
    [
        ("os._exit(255)", 255, "ended with 255"),
        ("os.kill(os.getpid(), 35)", 163, "killed by signal 35"),
        ("os.kill(os.getpid(), 11)", 139, "killed by SIGSEGV"),
    ],
)
def test_however_a_process_ends_its_end_has_a_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, code: int, how: str
) -> None:
    busy(f"import os\ndef main(): {ends}", tmp_path, monkeypatch)
    with pytest.raises(EndedError, match=f"must end by itself, was {how}") as raised:
        supervise("busy", folder, 1, Launch(), 1, 60.0)
    assert raised.value.exit_code == code


def test_last_words_that_the_disk_does_not_take_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is that of the reason, which may be that very disk."""
    LastWords("the disk is full", 74).write(tmp_path / "gone", 0)
    assert capsys.readouterr().err == "the disk is full\n"


FAILING = """
import crowdlayer.process as process
def train(folder, launch):
    raise ValueError("http://me:secret@here")
process._train = train
process.main()
"""


def test_no_secret_is_in_a_training_processs_traceback(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING, str(folder), str(os.getpid())],
        cwd=ROOT,
        env=dict(os.environ) | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        | {"MASTER_ADDR": "127.0.0.1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 70
    assert "ValueError: http://***@here" in done.stderr
    assert "secret" not in done.stderr


def test_a_disk_that_is_away_for_a_moment_does_not_end_the_signs_of_life(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crowdlayer.machine.supervisor.BEAT", 0.05)
    away = folder.with_name("away")
    folder.rename(away)
    live(folder, 0)
    time.sleep(0.2)
    away.rename(folder)
    deadline = time.monotonic() + 60
    while not (folder / "alive-0").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
