"""What files on this machine ask for: names that stay inside, room on the disk, one line per error."""

from __future__ import annotations

from pathlib import Path

import pytest

from crowdlayer.errors import AccessError, StoreError
from crowdlayer.storage.files import disk_errors


def test_a_disk_that_is_read_only_is_refused_access() -> None:
    with pytest.raises(AccessError, match="out: must be writable: Read-only file system"), disk_errors("out"):
        raise OSError(30, "Read-only file system")


def test_a_full_disk_is_a_failing_store() -> None:
    with (
        pytest.raises(StoreError, match="out/x: No space left on device"),
        disk_errors("out/x"),
        Path("/dev/full").open("wb") as full,
    ):
        full.write(b"x")
