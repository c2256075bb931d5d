"""Containers of the image, run as a user would: settings, docker's options, exit code and output."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT, SHARED, Finished

RIG = SHARED / "tools/container/build-and-run"
TAG = "crowdlayer/test"
ANYBODY = ["--user", "43210:43210", "--read-only", "--tmpfs", "/tmp:rw,noexec,size=512m", "--cap-drop", "ALL"]
ANYBODY += ["--security-opt", "no-new-privileges", "--shm-size", "64m"]
"""A user of no name, who may write to /tmp alone."""


def build(checkout: Path, tag: str) -> None:
    """The image of a checkout under a name."""
    rig, docker = [str(RIG), "-n", "-q", "-t", tag, str(checkout)], ["docker", "build", "-t", tag, str(checkout)]
    done = subprocess.run(rig if RIG.exists() else docker, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def built() -> str:
    """The name of the image of this checkout; the test is skipped where there is no engine."""
    if shutil.which("docker") is None or subprocess.run(["docker", "version"], capture_output=True).returncode:
        pytest.skip("no docker engine")
    build(ROOT, TAG)
    return TAG


def fresh_name() -> str:
    return f"test-{uuid.uuid4().hex[:8]}"


def command(
    image: str,
    name: str,
    options: Sequence[str],
    settings: Mapping[str, str],
    *arguments: str,
    network: str = "host",
) -> list[str]:
    """`docker run` with this machine's AWS variables, and its loopback unless `network` is another."""
    variables = {f"CROWDLAYER_{key}": value for key, value in settings.items()}
    variables |= {key: value for key, value in os.environ.items() if key.startswith("AWS_") and "FILE" not in key}
    variables["OMP_NUM_THREADS"] = "1"  # on a busy machine threads wait for each other, and nets this small need none
    environment = [part for key, value in variables.items() for part in ("--env", f"{key}={value}")]
    return ["docker", "run", "--rm", "--network", network, "--name", name, *environment, *options, image, *arguments]


def run(
    image: str, settings: Mapping[str, str], options: Sequence[str], *arguments: str, network: str = "host"
) -> Finished:
    """The container's output and exit code."""
    parts = command(image, fresh_name(), options, settings, *arguments, network=network)
    done = subprocess.run(parts, capture_output=True, text=True, timeout=600)
    return Finished(done.returncode, done.stdout, done.stderr)


def inside(image: str, program: str, *arguments: str, options: Sequence[str] = ()) -> str:
    """What another program of the image prints."""
    parts = ["docker", "run", "--rm", "--network", "none", *options, "--entrypoint", program, image, *arguments]
    return subprocess.run(parts, capture_output=True, text=True, check=True).stdout
