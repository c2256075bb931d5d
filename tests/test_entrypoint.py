"""The job as the platform sees it: a process with an environment, an exit code and its last words."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import crowdlayer
import entrypoint
from crowdlayer.settings import table
from tests.conftest import QUICK, ROOT, Finished, Store, run_job
from tests.crowds import write_shapes
from tests.forks import Forks
from tests.servers import Answer, free_port, meddling
from tests.test_streams import without_a_reader

GRACE = 30
"""Seconds that Kubernetes gives after SIGTERM, by default."""


def left_in(tmpdir: Path) -> list[str]:
    """What is left there, but for a folder that torch makes and leaves empty."""
    return sorted(path.name for path in tmpdir.iterdir() if not path.name.startswith("torchinductor_"))


def quick_job(*arguments: str, **settings: str) -> Finished:
    """The job in a process, on settings that let it end in seconds."""
    return run_job(*arguments, timeout=300, **(QUICK | settings))


def forked(forks: Forks, *arguments: str, **settings: str) -> Finished:
    """The same without the seconds in which a process imports torch."""
    environment = dict(os.environ) | {f"CROWDLAYER_{name}": value for name, value in (QUICK | settings).items()}
    return Finished(*forks.run(list(arguments), environment, timeout=300))


def assert_failed(done: Finished, code: int, *told: str) -> None:
    """It ended with `code`, one last line that tells it, nothing on standard output, no traceback."""
    assert (done.code, done.stdout) == (code, ""), done.stderr
    assert done.last_line.startswith("crowdlayer: ")
    assert done.last_line.isprintable()
    assert done.stderr.endswith("\n")
    assert "Traceback" not in done.stderr
    for text in told:
        assert text in done.last_line


@pytest.fixture
def tmpdir_of_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TMPDIR of the processes started, empty at first."""
    folder = tmp_path / "TMPDIR"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


class Running:
    """A job that runs: its standard error is read as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._came = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._came:
                self.lines.append(line)
                self._came.notify_all()

    def wait_for(self, text: str, timeout: float = 120) -> None:
        """Until a line has `text`."""
        with self._came:
            found = self._came.wait_for(lambda: any(text in line for line in self.lines), timeout)
        assert found, "".join(self.lines)

    def signalled(self, number: int) -> tuple[Finished, float]:
        """Send the signal; the end, and how many seconds it took."""
        started = time.monotonic()
        self.process.send_signal(number)
        code = self.process.wait(timeout=2 * GRACE)
        seconds = time.monotonic() - started
        self._reader.join()
        assert self.process.stdout is not None
        return Finished(code, self.process.stdout.read(), "".join(self.lines)), seconds


@contextmanager
def running(*arguments: str, **settings: str) -> Iterator[Running]:
    """The job in a process, which is gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "entrypoint.py"), *arguments],
        env=dict(os.environ) | {f"CROWDLAYER_{name}": value for name, value in settings.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        job = Running(process)
        try:
            yield job
        finally:
            process.kill()
            job._reader.join()


# --- words -----------------------------------------------------------------------------------------------------------


def test_help_lists_every_setting_with_type_default_and_unit_without_waiting_for_torch() -> None:
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "entrypoint.py"), "--help"], capture_output=True, text=True
    )

    assert shown.returncode == 0
    for row in table():
        line = next(line for line in shown.stdout.splitlines() if line.startswith(f"  {row.name}  ("))
        assert row.type in line
        assert row.default in line
        assert row.unit in line
        assert row.text in shown.stdout
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "crowdlayer.settings" in imported
    assert imported.isdisjoint({"torch", "torchvision", "accelerate", "boto3", "numpy"})


def test_help_may_be_cut_short() -> None:
    with subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "entrypoint.py"), "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_version_is_the_packages() -> None:
    assert run_job("--version") == Finished(0, f"{crowdlayer.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--chek"], ["--check", "--help"], ["train"], [""], ["a\nb"]])
def test_any_other_argument_is_refused(arguments: list[str]) -> None:
    assert_failed(run_job(*arguments), 78, "arguments: must be predict, --check, --dry-run, --help, --version or none")


def test_all_wrong_settings_are_in_the_last_line_before_anything_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as store:
        store.setblocking(False)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.getsockname()[1]}")
        done = run_job(TASKS="s3://bucket/data", N_EPOCHS="none", MODL="x", OUTPUT_NAME="a\nb", LOG_FORMAT="json")
        with pytest.raises(BlockingIOError):
            store.accept()

    assert_failed(done, 78, "N_EPOCHS: ", "'none'", "MODL: is not a setting, did you mean CROWDLAYER_MODEL?")
    assert "OUTPUT_NAME: must be a file name" in done.last_line
    record, _ = done.stderr.splitlines()
    assert json.loads(record)["exit_code"] == 78


@pytest.fixture
def _as_it_was() -> Iterator[None]:
    """Signals are handled afterwards as before: `main` sets handlers."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("_as_it_was")
def test_kubernetes_finds_the_last_line_in_the_termination_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setattr(entrypoint, "TERMINATION_LOG", log)

    assert entrypoint.main(["--chek"]) == 78
    assert log.read_text() == capsys.readouterr().err.rstrip("\n")

    entrypoint.failed("ü" * 5_000, 65)
    assert len(log.read_bytes()) == 4096  # Kubernetes' limit

    log.unlink()
    assert entrypoint.main(["--chek"]) == 78
    assert not log.exists()


@pytest.mark.usefixtures("_as_it_was")
def test_who_reads_the_logs_may_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setattr(entrypoint, "TERMINATION_LOG", log)
    with without_a_reader() as pipe:
        monkeypatch.setattr(sys, "stderr", os.fdopen(pipe, "w", closefd=False))
        assert entrypoint.main(["--chek"]) == 78
    assert "arguments: must be" in log.read_text()

    program = [sys.executable, str(ROOT / "entrypoint.py")]
    with without_a_reader() as pipe:
        assert subprocess.run([*program, "--chek"], stderr=pipe).returncode == 78
        done = subprocess.run([*program, "--version"], stdout=pipe, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b"")


def test_the_log_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROWDLAYER_TASKS", "nowhere")
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, str(ROOT / "entrypoint.py"), "--check"],
        stdout=subprocess.PIPE,
    )
    assert (done.returncode, done.stdout) == (78, b"")


SPEAKING = """
import shutil
usage = shutil.disk_usage
shutil.disk_usage = lambda path: print("a library speaks") or usage(path)
"""

# --- 0 ---------------------------------------------------------------------------------------------------------------


def test_a_run_says_where_its_results_are_and_a_second_one_has_nothing_to_do(
    shapes: Path, tmp_path: Path, tmpdir_of_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any characters, wherever a log is said to take ASCII alone; and whatever a library has to say.

    It waits for nobody, though a script around it has variables for more processes than NNODES tells of.
    """
    out = tmp_path / "résultats"
    for name, value in {"NNODES": "1", "RANK": "0", "WORLD_SIZE": "2", "PMI_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    (tmp_path / "sitecustomize.py").write_text(SPEAKING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    first = quick_job(TASKS=str(shapes), OUTPUT=str(out), VERBOSE="false")

    assert (first.code, first.stdout) == (0, f"{out}/results/crowdlayer.json\n"), first.stderr
    assert "epoch 1/2" not in first.stderr
    assert "a library speaks" in first.stderr
    assert left_in(tmpdir_of_job) == []
    results = out / "results" / "crowdlayer.json"
    written = results.stat().st_mtime_ns

    again = quick_job(TASKS=str(shapes), OUTPUT=str(out), VERBOSE="true", LOG_FORMAT="json", NUM_WORKERS="1")

    assert (again.code, again.stdout) == (0, first.stdout), again.stderr
    assert results.stat().st_mtime_ns == written
    assert "already done" in json.loads(again.last_line)["message"]


def test_a_log_in_json_has_an_object_per_line_and_its_figures_as_numbers(
    shapes: Path, tmp_path: Path, forks: Forks
) -> None:
    done = forked(forks, TASKS=str(shapes), OUTPUT=str(tmp_path), LOG_FORMAT="json", N_EPOCHS="3")

    assert done.code == 0, done.stderr
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    epochs = [record for record in records if "epoch" in record]
    assert [record["epoch"] for record in epochs] == [1, 2, 3]
    for figure in ("train_loss", "val_loss", "val_accuracy", "lr", "seconds"):
        assert all(isinstance(record[figure], float) for record in epochs)


def test_a_check_leaves_nothing_behind(shapes: Path, tmp_path: Path, tmpdir_of_job: Path, forks: Forks) -> None:
    done = forked(forks, "--check", TASKS=str(shapes), OUTPUT=str(tmp_path / "a" / "b"))

    assert (done.code, done.stdout) == (0, ""), done.stderr
    assert "check passed" in done.last_line
    assert not (tmp_path / "a").exists()
    assert left_in(tmpdir_of_job) == []


# --- failures --------------------------------------------------------------------------------------------------------


def test_names_are_utf_8_in_an_old_locale_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C stands for those of Latin-1: a class é was Ã© there, in the results and in the model."""
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    data = str(tmp_path / "déjà vu")
    assert_failed(run_job(TASKS=data), 78, f"there is none at {data}")


def test_65_a_data_set_that_cannot_be_used(tmp_path: Path, forks: Forks) -> None:
    data = write_shapes(tmp_path / "data")
    (data / "train" / "red" / "square-2.png").unlink()
    (data / "train" / "red" / "\x1b[31m\ncrowdlayer: all is well-2.png").write_bytes(b"no image")
    (data / "metadata.json").write_text(json.dumps({"name": "\x1b[31m\ncrowdlayer: all is well"}))

    done = forked(forks, TASKS=str(data))

    lines = done.stderr.splitlines()
    assert not any(line.startswith("crowdlayer: ") for line in lines[:-1])
    assert all(line.isprintable() for line in lines)
    assert_failed(done, 65, "crowdlayer: all is well-2.png: must be an image")
    assert not (data / "results" / "crowdlayer.json").exists()


def test_70_a_fault_of_the_program_has_a_traceback_before_the_last_line(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import shutil\nshutil.disk_usage = lambda path: 1 / 0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    done = quick_job(TASKS=str(shapes), OUTPUT=str(tmp_path / "out"))

    assert (done.code, done.stdout) == (70, "")
    assert "Traceback (most recent call last):\n" in done.stderr
    assert done.last_line == "crowdlayer: a fault of the program: ZeroDivisionError: division by zero"


@pytest.mark.parametrize("n_processes", ["1", "2"])
def test_70_a_fault_has_its_traceback_in_an_object_where_the_log_is_of_objects(
    n_processes: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the job itself, and of one of several training processes."""
    fault = "import torch.optim\ntorch.optim.SGD.step = lambda *_, **__: 1 / 0\n"
    (tmp_path / "sitecustomize.py").write_text(fault)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    done = quick_job(TASKS=str(shapes), OUTPUT=str(tmp_path / "out"), LOG_FORMAT="json", N_PROCESSES=n_processes)

    *objects, last = done.stderr.splitlines()
    records = [json.loads(line) for line in objects]
    assert (done.code, records[-1]["exit_code"], last) == (70, 70, done.last_line)
    traces = [record["traceback"] for record in records if "traceback" in record]
    assert traces
    assert all(trace.endswith("ZeroDivisionError: division by zero") for trace in traces)


def test_74_a_store_that_is_not_there(monkeypatch: pytest.MonkeyPatch, forks: Forks) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sEcReT")

    assert_failed(forked(forks, TASKS="s3://bucket/data"), 74, "s3://bucket/data")


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """What a full disk does, without filling one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_74_no_disk_takes_a_byte(shapes: Path, tmp_path: Path) -> None:
    """As with a root that is read only and nothing mounted at /tmp: torch asks for TMPDIR while it is imported."""
    with no_file_larger_than(0):
        done = quick_job(TASKS=str(shapes), OUTPUT=str(tmp_path / "out"), WORKDIR=str(tmp_path / "work"))

    assert_failed(done, 74, "crowdlayer: TMPDIR")


def test_74_a_disk_that_is_full(shapes: Path, tmp_path: Path, tmpdir_of_job: Path) -> None:
    """The model has 1.4 MB."""
    with no_file_larger_than(2**20):
        done = quick_job(TASKS=str(shapes), OUTPUT=str(tmp_path / "out"))

    assert_failed(done, 74, str(tmpdir_of_job))
    assert all(name.startswith("crowdlayer-kept-") for name in left_in(tmpdir_of_job))
    assert not (tmp_path / "out" / "results" / "crowdlayer.json").exists()


def test_77_no_credentials(monkeypatch: pytest.MonkeyPatch, endpoint: str, forks: Forks) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)

    done = forked(forks, "--check", TASKS="s3://bucket/data", LOG_FORMAT="json")
    assert_failed(done, 77, "credentials are needed")


# --- signals ---------------------------------------------------------------------------------------------------------


def test_75_a_signal_that_came_before_anybody_listened_is_heard() -> None:
    def told() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        os.kill(os.getpid(), signal.SIGTERM)

    done = subprocess.run(
        [sys.executable, str(ROOT / "entrypoint.py")], preexec_fn=told, capture_output=True, text=True, timeout=60
    )
    assert_failed(Finished(done.returncode, done.stdout, done.stderr), 75, "SIGTERM: the run was interrupted")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_75_a_signal_stops_the_training(
    shapes: Path, tmp_path: Path, tmpdir_of_job: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    settings = QUICK | {"TASKS": str(shapes), "OUTPUT": str(out), "N_EPOCHS": "100000", "LOG_FORMAT": "json"}
    with running(**settings) as job:
        job.wait_for('"epoch": 1,')
        done, seconds = job.signalled(number)

    assert_failed(done, 75, number.name)
    records = [json.loads(line) for line in done.stderr.splitlines()[:-1]]
    assert all(record["message"] for record in records)
    assert records[-1]["exit_code"] == 75
    assert done.last_line == f"crowdlayer: {records[-1]['message']}"
    assert seconds < GRACE / 2
    assert left_in(tmpdir_of_job) == []
    assert not (out / "results" / "crowdlayer.json").exists()


def test_75_a_signal_is_heard_while_a_store_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as store:
        store.settimeout(120)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        with running(TASKS="s3://bucket/data") as job:
            connection, _ = store.accept()
            with connection:
                assert connection.recv(4) == b"HEAD"  # is there a result already?
                done, seconds = job.signalled(signal.SIGUSR1)

    assert_failed(done, 75, "SIGUSR1")
    assert seconds < GRACE / 2


def test_75_a_signal_does_not_wait_for_downloads_that_hang(
    shapes: Path, store: Store, tmpdir_of_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = store.put_tree(shapes)
    asked, over = threading.Event(), threading.Event()

    def hanging(answer: Answer) -> None:
        asked.set()
        over.wait(120)

    with meddling(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        proxy.spoil(hanging, path=".png", times=1000)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        try:
            with running(TASKS=tasks) as job:
                assert asked.wait(120)
                done, seconds = job.signalled(signal.SIGTERM)
        finally:
            over.set()

    assert_failed(done, 75, "SIGTERM")
    assert seconds < GRACE / 2
    assert left_in(tmpdir_of_job) == []
