"""Standard output and standard error, which may be closed, or come to have no reader."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


def open_all() -> None:
    """Let the three streams be there; of those that who started us has closed, a file would take the place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def say(text: str, stream: TextIO) -> None:
    """Print it, if anybody reads it still: neither what has been done nor the exit code depends on that."""
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):
        with suppress(OSError, ValueError):  # or Python would try again when it ends, and end with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
