"""The first processes of two nodes: who waits for whom, and that the reason of one that fails is the others'."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from crowdlayer.errors import DataError, EndedError, InterruptedRunError, PeerError
from crowdlayer.machine.launch import Launch, Peers
from crowdlayer.machine.lead import Lead
from crowdlayer.machine.meeting import Meeting
from tests.conftest import ROOT
from tests.servers import free_port

LONG = 300.0
"""Seconds that nobody waits for here."""
FIRST = """
import sys, time
from crowdlayer.machine.launch import Launch
from crowdlayer.machine.lead import Lead
with Lead(Launch("kubernetes", 2, 0, port=int(sys.argv[1])), 300) as lead:
    lead.ready()
    with lead.publishing():
        print("publishes", flush=True)
        time.sleep(300)
"""


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert any(said == f"{line}\n" for said in process.stdout)


def two_nodes(port: int, timeout: float) -> list[Lead]:
    return [Lead(Launch("kubernetes", 2, node, port=port), timeout) for node in range(2)]


def test_the_others_stay_until_the_first_has_published() -> None:
    """Twice the time-out, here."""
    ended: list[str] = []
    first, other = two_nodes(free_port(), 2.0)

    def stay() -> None:
        with other, other.publishing():
            pass
        ended.append("other")

    thread = threading.Thread(target=stay)
    with first:
        first.ready()
        thread.start()
        with first.publishing():
            time.sleep(4.0)
            ended.append("published")
    ended.append("first")
    thread.join(LONG)
    assert ended[0] == "published"
    assert sorted(ended[1:]) == ["first", "other"]


def test_a_first_that_is_lost_while_it_publishes_is_missed(started: list[subprocess.Popen[str]]) -> None:
    port = free_port()
    started.append(
        subprocess.Popen([sys.executable, "-c", FIRST, str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    )
    wait_for(started[0], "publishes")
    _, other = two_nodes(port, LONG)
    killing = threading.Timer(0.5, started[0].kill)
    killing.start()
    with pytest.raises(PeerError, match="gone or silent"), other, other.publishing():
        pass
    killing.join()


def test_a_first_that_is_stopped_while_it_publishes_is_not_waited_for_longer_than_the_time_out(
    started: list[subprocess.Popen[str]],
) -> None:
    """Its host answers nothing any more, as one that is cut off: torch would wait for as long as the system does."""
    port = free_port()
    started.append(
        subprocess.Popen([sys.executable, "-c", FIRST, str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    )
    wait_for(started[0], "publishes")
    other = Lead(Launch("kubernetes", 2, 1, port=port), 2.0)
    stopping = threading.Timer(0.5, started[0].send_signal, (signal.SIGSTOP,))
    stopping.start()
    with pytest.raises(PeerError, match="must answer within TIMEOUT=2 s"), other, other.publishing():
        pass
    stopping.join()


def test_who_has_published_does_not_fail_for_a_node_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crowdlayer.machine.lead.PARTING", 0.3)
    first, _ = two_nodes(free_port(), LONG)
    with first, first.publishing():
        pass


def test_who_prepares_the_data_is_waited_for_as_long_as_it_takes() -> None:
    """Three times the time-out, here."""
    launch = Launch("slurm", port=free_port(), peers=Peers(0, 2, 0, 2))
    with Lead(launch, 2.0) as lead:
        other = Meeting.join(launch, 2.0)
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(other.told("plan")))
        thread.start()
        time.sleep(6.0)
        lead.ready().tell("plan", "/folder")
        thread.join(LONG)
    assert found == ["/folder"]


# --- Last words -------------------------------------------------------------------------------------------------------


def both(*work: Callable[[Lead], None]) -> list[BaseException | None]:
    """What comes of each of two leads that do this."""
    came: list[BaseException | None] = [None, None]

    def do(node: int, lead: Lead) -> None:
        try:
            with lead:
                work[node](lead)
        except BaseException as error:
            came[node] = error

    threads = [threading.Thread(target=do, args=one) for one in enumerate(two_nodes(free_port(), LONG))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG / 2)
    assert not any(thread.is_alive() for thread in threads)
    return came


def fails(error: BaseException, after: float = 0) -> Callable[[Lead], None]:
    def work(lead: Lead) -> None:
        time.sleep(after)
        raise error

    return work


def waits(lead: Lead) -> None:
    """For a plan that never comes."""
    lead.ready().told("plan")


def prepares(lead: Lead) -> None:
    """Longer than the other stays."""
    time.sleep(4)
    lead.ready()


def misses(lead: Lead) -> None:
    """As training does, before the other has said why it ends."""
    lead.ready()
    raise PeerError("another process of the run is gone")


DATA = DataError("answers.json: must be there")


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    ("work", "error", "said", "code"),
    [
        (waits, DATA, "answers.json: must be there", 65),
        (prepares, DATA, "answers.json: must be there", 65),
        (misses, DATA, "answers.json: must be there", 65),
        (waits, EndedError("process 3: killed", 137), "process 3: killed", 137),
        (waits, ValueError("of http://me:secret@here"), "a fault of the program: ValueError: of http://***@here", 70),
    ],
)
def test_why_one_fails_is_why_the_other_ends(
    work: Callable[[Lead], None],
    failing: int,
    error: Exception,
    said: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("crowdlayer.machine.meeting.PARTING", 2.0)
    came = both(fails(error, 1), work) if failing == 0 else both(work, fails(error, 1))

    assert came[failing] is error
    theirs = came[1 - failing]
    assert isinstance(theirs, EndedError)
    assert (str(theirs), theirs.exit_code) == (f"node {failing}: {said}", code)


def test_each_has_its_own_reason_where_it_has_one() -> None:
    errors = DataError("a label"), ValueError("a fault")
    assert both(*map(fails, errors)) == list(errors)


def test_who_waits_for_one_that_is_told_to_stop_has_been_interrupted() -> None:
    """Not lost another: who is that waits for the next start of the other, not for an explanation."""
    came = both(waits, fails(InterruptedRunError("SIGTERM: the run was interrupted"), 1))
    assert isinstance(came[0], InterruptedRunError)
    assert str(came[0]) == "node 1: SIGTERM: the run was interrupted"


def test_where_nobody_says_why_another_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was killed, or cut off."""
    monkeypatch.setattr("crowdlayer.machine.meeting.PARTING", 0.5)
    came = both(misses, misses)
    assert [str(error) for error in came] == ["another process of the run is gone"] * 2
    assert all(isinstance(error, PeerError) for error in came)


def test_signs_of_life_go_on_when_the_first_has_come_anew() -> None:
    """A pod is started again, with a store that knows nothing of the one before, while another still prepares."""
    port = free_port()
    _, other = two_nodes(port, LONG)
    with other:
        for _ in range(2):
            first = Meeting.host(Launch("kubernetes", 2, 0, port=port), LONG)
            deadline = time.monotonic() + 60
            while not first.store.add("signs", 0):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            del first
            gc.collect()


def test_who_fails_alone_is_not_waited_for_longer_than_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other never comes."""
    monkeypatch.setattr("crowdlayer.machine.meeting.PARTING", 0.5)
    monkeypatch.setattr("crowdlayer.machine.lead.PARTING", 0.5)
    for lead in two_nodes(free_port(), LONG):
        started = time.monotonic()
        with pytest.raises(DataError), lead:
            raise DataError("a label")
        assert time.monotonic() - started < 60


def test_processes_that_the_platform_starts_end_for_one_that_fails() -> None:
    """Those, too, that are not their node's first and only follow it."""
    launch = Launch("slurm", port=free_port(), peers=Peers(0, 2, 0, 2))
    follower = Launch("slurm", port=launch.port, peers=Peers(1, 2, 1, 2))
    came: list[BaseException] = []

    def follow() -> None:
        meeting = Meeting.join(follower, LONG)
        try:
            with meeting.accounted():
                meeting.told("plan")
        except EndedError as error:
            came.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    with pytest.raises(DataError), Lead(launch, LONG):
        raise DataError("a label")
    thread.join(LONG)
    assert [str(error) for error in came] == ["process 0: a label"]
