"""Hostile images by the thousand: an image or broken, within bounds of memory and time, and nothing of it is run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.hostile import images

DECODE_ALL = """if True:
    import json, logging, resource, sys
    from pathlib import Path
    from crowdlayer.data.decoding import decode_all
    root, out = Path(sys.argv[1]), Path(sys.argv[2])
    def most():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = most()
    names = sorted(path.name for path in root.iterdir())
    held, broken = decode_all(root, names, 32, 2, out)
    print(json.dumps({"held": len(held), "broken": broken, "memory": most() - before}))
"""
MEMORY = 5 * 2**28
"""Bytes. A picture of 177 million pixels, the largest that is read, takes 0.7 GB on its way."""


@pytest.mark.parametrize(("n", "seed", "seconds"), [(150, 0, 120), pytest.param(1000, 1, 600, marks=pytest.mark.slow)])
def test_hostile_images_are_decoded_or_broken_within_bounds(n: int, seed: int, seconds: float, tmp_path: Path) -> None:
    root, out = tmp_path / "images", tmp_path / "out"
    root.mkdir()
    out.mkdir()
    strangers = set()
    for number, (name, body, refused) in enumerate(images(n, seed)):
        path = root / f"{number}-{name}"
        path.write_bytes(body)
        if refused:
            strangers.add(path.name)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", DECODE_ALL, str(root), str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr  # libtiff has its own say, of numbers
    found = json.loads(done.stdout)
    print({k: v for k, v in found.items() if k != "broken"}, len(found["broken"]), time.monotonic() - started)
    assert found["held"] + len(found["broken"]) == n
    assert found["held"] > n / 20  # some damage is none
    assert strangers - set(found["broken"]) == set()
    assert all(reason.isprintable() and 0 < len(reason) < 500 for reason in found["broken"].values())
    assert found["memory"] < MEMORY
    assert len(list(root.iterdir())) == n
    assert list(out.iterdir()) == []
