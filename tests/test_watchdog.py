"""A process that hangs shows where, and ends; one that is told to stop is gone when the grace is over."""

from __future__ import annotations

import subprocess
import sys
import time

from tests.conftest import ROOT


def run(program: str) -> subprocess.CompletedProcess[str]:
    """A Python process that knows this package; its last line is said as the job's is."""
    said = "lambda line, code: print(line, flush=True) or code"
    listen = f"from crowdlayer.machine import interruption; interruption.listen({said}); interruption.begin(25)\n"
    return subprocess.run(
        [sys.executable, "-c", listen + program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_a_process_without_progress_shows_its_stacks_and_ends() -> None:
    done = run("""
import time
from crowdlayer.machine.watchdog import Watchdog
def hang(): time.sleep(100)
with Watchdog(0.5).watching(): hang()
""")
    assert done.returncode == 70
    assert "in hang" in done.stderr
    assert "no progress for TIMEOUT=0.5 seconds" in done.stdout


def test_a_process_with_progress_is_left_alone() -> None:
    done = run("""
import time
from crowdlayer.machine.watchdog import Watchdog
watchdog = Watchdog(2.0)
with watchdog.watching():
    for _ in range(30):
        time.sleep(0.1)
        watchdog.progress()
print("done")
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_process_that_was_suspended_goes_on() -> None:
    """As `docker pause` and `scontrol suspend` do it, for longer than it may go without progress."""
    done = run("""
import os, signal, subprocess, sys, time
from crowdlayer.machine.watchdog import Watchdog
again = f"import os, signal, time; time.sleep(3.5); os.kill({os.getpid()}, signal.SIGCONT)"
with Watchdog(2.5).watching():
    other = subprocess.Popen([sys.executable, "-c", again])
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.2)
other.wait()
print("done")
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_the_grace_is_the_end_whatever_a_process_does() -> None:
    done = run("""
import os, signal, time
interruption.begin(0.5)
with interruption.deferred():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    while True: time.sleep(1)
""")
    assert done.returncode == 75
    assert done.stdout == "SIGTERM: the run was interrupted, and did not stop within GRACE=0.5 seconds\n"


def test_the_grace_is_the_end_though_nobody_reads_the_last_line() -> None:
    """A collector that has stalled leaves a pipe that is full."""
    started = time.monotonic()
    done = run("""
import os, signal
reader, writer = os.pipe()
os.set_blocking(writer, False)
try:
    while os.write(writer, b"x" * 4096): pass
except BlockingIOError: os.set_blocking(writer, True)
os.dup2(writer, 1)
interruption.begin(0.2)
with interruption.deferred():
    os.kill(os.getpid(), signal.SIGTERM)
    while True: os.write(writer, b"x")
""")
    assert done.returncode == 75
    assert time.monotonic() - started < 60


def test_outside_training_a_signal_is_an_exception_and_later_ones_are_nothing() -> None:
    done = run("""
import os, signal
try:
    os.kill(os.getpid(), signal.SIGUSR1)
except KeyboardInterrupt as error:
    os.kill(os.getpid(), signal.SIGTERM)
    print(error, error.exit_code)
""")
    assert (done.returncode, done.stdout) == (0, "SIGUSR1: the run was interrupted 75\n")
