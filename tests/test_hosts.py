"""Two hosts, in namespaces of their own and wired together: whatever becomes of one, nobody waits for ever."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, SHARED
from tests.crowds import write_shapes

RIG = SHARED / "tools/platforms/two-hosts"
TIMEOUT = 15
"""Seconds that processes wait for each other."""
KILLED, LOST = -signal.SIGKILL, 74

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not RIG.is_file() or os.geteuid() != 0, reason="two hosts need the rig, which needs root"),
]


class Hosts:
    """The rig at work: on each host a job that would train for hours."""

    def __init__(self, folder: Path) -> None:
        data = write_shapes(folder / "shapes", n_train=30)
        settings = {
            "TASKS": data, "OUTPUT": folder / "out", "MODEL": "shufflenet_v2_x0_5", "IMG_SIZE": 32, "BATCH_SIZE": 6,
            "LR": 0.01, "GUARD": "false", "N_EPOCHS": 100_000, "TIMEOUT": TIMEOUT,
        }  # fmt: skip
        self._environment = {f"CROWDLAYER_{name}": str(value) for name, value in settings.items()}
        self._script = f"export TMPDIR={folder}/$NODE_RANK; mkdir $TMPDIR; exec {sys.executable} {ROOT}/entrypoint.py"
        self.log: list[str] = []

    def start(self, *options: str) -> None:
        self._rig = subprocess.Popen(
            [str(RIG), "--timeout", "240", *options, "--", "bash", "-c", self._script],
            env=dict(os.environ) | self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, pattern: str) -> re.Match[str]:
        assert self._rig.stdout is not None
        for line in self._rig.stdout:
            self.log.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError("".join(self.log))

    def stop(self, variable: str) -> None:
        """SIGSTOP for the processes of the jobs that have the variable."""
        ours = f"CROWDLAYER_OUTPUT={self._environment['CROWDLAYER_OUTPUT']}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                variables = (process / "environ").read_bytes().split(b"\0")
                program = os.path.realpath(process / "exe")
            except OSError:  # it has just ended
                continue
            if {ours, variable.encode()} <= set(variables) and program == os.path.realpath(sys.executable):
                os.kill(int(process.name), signal.SIGSTOP)

    def codes(self, *hosts: int) -> dict[int, int]:
        """The exit code of the job of each of these hosts, once they have ended."""
        started = time.monotonic()
        found: dict[int, int] = {}
        while not found.keys() >= set(hosts):
            host, code = self.wait_for(r"node (\d) command ended, rc (-?\d+)").groups()
            found[int(host)] = int(code)
            print(f"host {host} ended with {code} after {time.monotonic() - started:.1f} s")
        return found

    def end(self) -> None:
        self._rig.terminate()
        self.log += self._rig.communicate()[0].splitlines(keepends=True)
        print("".join(line for line in self.log if " epoch " not in line))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path)
    yield hosts
    hosts.end()


@pytest.mark.parametrize("host", [0, 1])
@pytest.mark.parametrize(("fault", "its_own"), [("kill", KILLED), ("cut", LOST)])
def test_a_host_that_is_killed_or_cut_off_ends_the_other(hosts: Hosts, host: int, fault: str, its_own: int) -> None:
    hosts.start(f"--fault={fault}:{host}@/epoch +3\\//")
    hosts.wait_for(f"FAULT {fault}")
    assert hosts.codes(0, 1) == {host: its_own, 1 - host: LOST}
    assert not [line for line in hosts.log if "frame #" in line or "Traceback" in line]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_training_process_that_is_stopped_ends_both_hosts_jobs(hosts: Hosts, rank: int) -> None:
    hosts.start()
    hosts.wait_for(r"epoch +3/")
    hosts.stop(f"RANK={rank}")
    assert hosts.codes(0, 1) == {0: LOST, 1: LOST}


@pytest.mark.parametrize("host", [0, 1])
def test_a_host_that_is_stopped_ends_the_others_job(hosts: Hosts, host: int) -> None:
    hosts.start()
    hosts.wait_for(r"epoch +3/")
    hosts.stop(f"NODE_RANK={host}")
    assert hosts.codes(1 - host) == {1 - host: LOST}


@pytest.mark.parametrize("host", [0, 1])
def test_a_host_that_never_comes_is_not_waited_for_longer_than_the_time_out(hosts: Hosts, host: int) -> None:
    hosts.start(f"--fault=kill:{1 - host}@0.1")
    assert hosts.codes(0, 1) == {host: LOST, 1 - host: KILLED}
