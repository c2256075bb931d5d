"""The log's lines and bars: what a person at a terminal sees, and what a machine reads."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crowdlayer import logs
from crowdlayer.logs import about, duration, track
from crowdlayer.masking import without_secrets
from tests.conftest import ROOT


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that goes on only when told to."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def go_on(seconds: float) -> None:
        now[0] += seconds

    return go_on


def taking(seconds: float, n: int, clock: Callable[[float], None]) -> Iterator[int]:
    for i in range(n):
        clock(seconds)
        yield i


def test_long_work_says_once_a_minute_how_far_it_is(
    caplog: pytest.LogCaptureFixture, clock: Callable[[float], None]
) -> None:
    with caplog.at_level(logging.INFO, "crowdlayer"):
        assert list(track(taking(25, 10, clock), "sync", 50_000_000, "B", size=lambda _: 5_000_000)) == list(range(10))
    assert [record.getMessage() for record in caplog.records] == [
        "sync: 15 of 50 MB, 0.2 per second, 3 min left",
        "sync: 30 of 50 MB, 0.2 per second, 2 min left",
        "sync: 45 of 50 MB, 0.2 per second, 25 s left",
    ]
    assert [vars(record)["done"] for record in caplog.records] == [15e6, 30e6, 45e6]


def test_what_was_done_before_does_not_count_for_the_rate(
    caplog: pytest.LogCaptureFixture, clock: Callable[[float], None]
) -> None:
    with caplog.at_level(logging.INFO, "crowdlayer"):
        list(track(taking(60, 2, clock), "epoch 3", 100, "steps", done=96))
    assert [record.getMessage() for record in caplog.records] == [
        "epoch 3: 97 of 100 steps, 0.0167 per second, 3 min left",
        "epoch 3: 98 of 100 steps, 0.0167 per second, 2 min left",
    ]


def test_short_work_is_not_worth_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "crowdlayer"):
        list(track(range(1000), "decode", 1000, "images"))
    assert not caplog.records


PROGRAM = """
import logging, sys
from crowdlayer import logs
logs.start(sys.argv[1])
for i in logs.track(range(3), "decode", 3, "images"):
    logging.getLogger("crowdlayer.x").info("line %d", i, extra={"number": i})
logging.getLogger("crowdlayer.x").warning("two\\nlines")
"""


def shown(log_format: str, terminal: bool) -> str:
    """What the program writes to standard error."""
    command = [sys.executable, "-c", PROGRAM, log_format]
    if not terminal:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen(command, cwd=ROOT, stderr=theirs) as process:
        os.close(theirs)
        parts = []
        try:
            while part := os.read(ours, 4096):
                parts.append(part)
        except OSError:  # Linux's way to say that the other side has closed
            pass
        assert process.wait(60) == 0
    os.close(ours)
    return b"".join(parts).decode()


def test_a_terminal_gets_a_bar_that_leaves_the_lines_whole() -> None:
    text = shown("text", terminal=True)
    assert "decode:   0%" in text
    visible = [line.rpartition("\r")[2] for line in text.split("\r\n")]
    for number in range(3):
        assert any(line.endswith(f"I line {number}") for line in visible)
    assert any(line.endswith("W two lines") for line in visible)


def test_elsewhere_there_are_lines_alone() -> None:
    lines = shown("text", terminal=False).splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["I line 0", "I line 1", "I line 2", "W two lines"]


def test_lines_say_what_they_are_about_and_those_of_other_threads_do_not(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("crowdlayer")
    with about("baseline", "majority"):
        log.warning("%d %%", 5)
        beside = threading.Thread(target=log.warning, args=["beside"])
        beside.start()
        beside.join()
    log.warning("after")
    assert caplog.messages == ["baseline majority: 5 %", "beside", "after"]
    assert [vars(record).get("baseline") for record in caplog.records] == ["majority", None, None]


@pytest.mark.parametrize("terminal", [True, False])
def test_json_is_an_object_per_line_with_the_same_keys_everywhere(terminal: bool) -> None:
    records = [json.loads(line) for line in shown("json", terminal).splitlines()]
    assert [set(record) for record in records] == [{"time", "level", "logger", "message", "number"}] * 3 + [
        {"time", "level", "logger", "message"}
    ]
    assert [record.get("number") for record in records] == [0, 1, 2, None]


@given(st.lists(st.sampled_from(["?Token=", "https://", "@", '"', "'", "\\", " ", "\n", "a", "é"])).map("".join))
def test_a_secret_is_taken_out_of_a_message_and_not_out_of_its_json(text: str) -> None:
    line = logs.JsonLines("%(message)s").format(logging.makeLogRecord({"msg": text}))
    assert json.loads(line) == {"message": without_secrets(text)}


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.4, "8 s"), (300, "5 min"), (3.2 * 3600, "3.2 h"), (2.5 * 86400, "2.5 days")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_library_user_sees_no_log_unless_it_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    handlers = logging.getLogger().handlers[:]
    logging.getLogger().handlers.clear()
    try:
        with logs.shown(False) as log:
            log.info("quiet")
        with logs.shown(True) as log:
            log.info("loud")
    finally:
        logging.getLogger().handlers[:] = handlers
    assert capsys.readouterr().err == "loud\n"


def test_a_program_that_has_logged_a_word_of_its_own_sees_a_verbose_run(capsys: pytest.CaptureFixture[str]) -> None:
    """`logging.warning` alone sets up the root, for warnings."""
    root, ours = logging.getLogger(), logging.getLogger("crowdlayer")
    before = root.handlers[:], root.level, ours.level
    root.handlers.clear()
    root.setLevel(logging.WARNING)
    ours.setLevel(logging.NOTSET)  # a job that ran in this process has set it
    try:
        logging.warning("my own")
        with logs.shown(True) as log:
            log.info("loud")
        with logs.shown(False) as log:
            log.info("quiet")
        logging.getLogger("another").info("quiet")
        assert ours.level == logging.NOTSET
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        ours.setLevel(before[2])
    assert capsys.readouterr().err == "WARNING:root:my own\nINFO:crowdlayer:loud\n"


def test_a_terminal_that_is_gone_costs_the_line_and_not_the_run() -> None:
    """As when a run goes on in the background, and its window is closed."""
    theirs, ours = pty.openpty()
    terminal = os.fdopen(ours, "w")
    handler = logs.TerminalHandler(terminal)
    os.close(theirs)
    handler.emit(logging.makeLogRecord({"msg": "epoch 2"}))
    with suppress(OSError):  # what it has not written
        terminal.close()
