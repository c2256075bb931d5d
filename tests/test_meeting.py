"""How processes come together, and that no signal and no peer that does not come keeps them waiting."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from crowdlayer.errors import EndedError, InterruptedRunError, PeerError
from crowdlayer.machine.launch import Launch, Peers
from crowdlayer.machine.meeting import FAILED, Meeting
from tests.conftest import ROOT
from tests.servers import free_port

LONG = 300.0
"""Seconds that nobody waits for here."""
JOIN = """
import sys
from crowdlayer.errors import InterruptedRunError
from crowdlayer.machine import interruption
interruption.listen(lambda line, code: print(line, flush=True) or code)
interruption.begin(25)
from crowdlayer.machine.launch import Launch
from crowdlayer.machine.meeting import Meeting
from crowdlayer.machine.processes import join
try:
    index, port = map(int, sys.argv[1:])
    print("meets", flush=True)
    meeting = (Meeting.join if index else Meeting.host)(Launch(port=port), 300)
    print("hosts", flush=True)
    join(meeting, index, 3)
except InterruptedRunError as error:
    print(error)
    sys.exit(error.exit_code)
"""
"""One process of three, of which the third never comes."""


def start(index: int, port: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", JOIN, str(index), str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert any(said == f"{line}\n" for said in process.stdout)


def test_a_signal_ends_all_that_wait_for_another_to_join(started: list[subprocess.Popen[str]]) -> None:
    """Those too that nobody has told."""
    port = free_port()
    started += [start(index, port) for index in range(2)]
    wait_for(started[0], "hosts")
    meeting = Meeting.join(Launch(port=port), LONG)
    while meeting.store.add("here", 0) < 2:
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=60)[0].splitlines()[-1] for process in started]
    assert [process.returncode for process in started] == [75, 75]
    assert said[1] == "SIGTERM: the run was interrupted before it began"
    assert said[0] == "another process: the run was interrupted before it began"


def test_a_signal_ends_a_process_that_waits_for_the_first(started: list[subprocess.Popen[str]]) -> None:
    started.append(start(1, free_port()))
    wait_for(started[0], "meets")
    started[0].send_signal(signal.SIGTERM)
    assert started[0].communicate(timeout=60)[0] == "SIGTERM: the run was interrupted\n"
    assert started[0].returncode == 75


def test_who_never_comes_is_not_waited_for_longer_than_the_time_out() -> None:
    meeting = Meeting.host(Launch(), 0.3)
    with pytest.raises(PeerError, match=r"2 processes: must be there within TIMEOUT=0.3 s"):
        meeting.all_here(2)
    with pytest.raises(PeerError, match=r"plan: must be there within TIMEOUT=0.3 s"):
        meeting.told("plan")
    with pytest.raises(PeerError, match=r"the run's first process must answer within TIMEOUT=0.3 s"):
        Meeting.join(Launch(port=free_port()), 0.3)


def test_who_was_interrupted_after_all_had_come_goes_in_with_them() -> None:
    """The door is shut or open for all: nobody is left inside alone."""
    meeting = Meeting.host(Launch(), LONG)
    meeting.all_here(1)
    assert meeting.store.compare_set("door", "", "shut") == b"open"
    shut = Meeting.host(Launch(), LONG)
    assert shut.store.compare_set("door", "", "shut") == b"shut"
    with pytest.raises(InterruptedRunError, match="another process"):
        shut.all_here(1)


def test_who_has_the_store_goes_last() -> None:
    launch = Launch("slurm", port=free_port(), peers=Peers(0, 2, 0, 2))
    host, other = Meeting.host(launch, LONG), Meeting.join(launch, LONG)
    leaving = threading.Thread(target=lambda: host.part(2, host=True))
    leaving.start()
    leaving.join(0.5)
    assert leaving.is_alive()
    other.part(2, host=False)
    leaving.join(60)
    assert not leaving.is_alive()


def test_another_attempt_of_a_launcher_hears_nothing_of_the_one_before(tmp_path: Path) -> None:
    port = free_port()
    store = Meeting.host(Launch(port=port), LONG)
    store.tell("plan", "old")
    again = Meeting.join(Launch(port=port, attempt=1), 0.3)
    with pytest.raises(PeerError):
        again.told("plan")


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PeerError, match=f"^MASTER_PORT: must be free on the run's first node, {port} is not$"):
            Meeting.host(Launch(port=port), LONG)


def test_a_run_hears_nothing_of_another_at_its_port() -> None:
    port = free_port()
    store = Meeting.host(Launch(port=port, run="slurm-7.0"), LONG)
    store.tell("plan", "another's")
    with pytest.raises(PeerError):
        Meeting.join(Launch(port=port, run="slurm-7.1"), 0.3).told("plan")


@pytest.mark.parametrize("told", [b'{"line": "all is well", "code": 0}', b'{"line": "", "code": 1000}', b"well", b""])
def test_what_a_stranger_tells_is_a_failure_and_never_that_all_is_done(told: bytes) -> None:
    meeting = Meeting.host(Launch(port=free_port()), LONG)
    meeting.store.set(FAILED, told.decode())
    with pytest.raises(EndedError) as ended:
        meeting.told("anything")
    assert ended.value.exit_code == 74


def test_processes_of_one_node_meet_on_this_machine_alone() -> None:
    """Who meets there says how the run ends, and nobody asks who that is."""
    meeting = Meeting.host(Launch(), LONG)
    listening = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    listening += [line.split() for line in Path("/proc/self/net/tcp6").read_text().splitlines()[1:]]
    places = [
        fields[1] for fields in listening if fields[3] == "0A" and int(fields[1].split(":")[1], 16) == meeting.port
    ]
    assert places == [f"0100007F:{meeting.port:04X}"]
