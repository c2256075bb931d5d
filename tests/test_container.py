"""The image, built and run as a user would: a bucket in, a bucket out, exit codes to the platform."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import QUICK, ROOT, SHARED, Finished, Store

pytestmark = pytest.mark.container

RIG = SHARED / "tools/container/build-and-run"
TAG = "crowdlayer/test"
ANYBODY = ["--user", "43210:43210", "--read-only", "--tmpfs", "/tmp:rw,noexec,size=512m", "--cap-drop", "ALL"]
ANYBODY += ["--security-opt", "no-new-privileges", "--shm-size", "64m"]


@pytest.fixture(scope="module")
def image() -> str:
    """The image built from this checkout."""
    if shutil.which("docker") is None or subprocess.run(["docker", "version"], capture_output=True).returncode:
        pytest.skip("no docker engine")
    build = [str(RIG), "-n", "-q", "-t", TAG, str(ROOT)] if RIG.exists() else ["docker", "build", "-t", TAG, str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return TAG


def command(image: str, name: str, options: list[str], settings: dict[str, str], arguments: list[str]) -> list[str]:
    variables = {f"CROWDLAYER_{key}": value for key, value in settings.items()}
    variables |= {key: value for key, value in os.environ.items() if key.startswith("AWS_") and "FILE" not in key}
    environment = [part for key, value in variables.items() for part in ("--env", f"{key}={value}")]
    return ["docker", "run", "--rm", "--network", "host", "--name", name, *environment, *options, image, *arguments]


def run(image: str, settings: dict[str, str], options: list[str], *arguments: str) -> Finished:
    """The container's output and exit code, with this machine's loopback and AWS variables."""
    parts = command(image, f"test-{uuid.uuid4().hex[:8]}", options, settings, list(arguments))
    done = subprocess.run(parts, capture_output=True, text=True, timeout=300)
    return Finished(done.returncode, done.stdout, done.stderr)


def test_any_user_on_a_read_only_root_trains_from_a_bucket_into_it(image: str, store: Store, shapes: Path) -> None:
    data = store.put_tree(shapes)
    settings = QUICK | {"TASKS": data}
    done = run(image, settings, ANYBODY)
    assert done.code == 0, done.stderr
    assert done.stdout == f"{data}/results/crowdlayer.json\n"
    assert {"data/best_models/crowdlayer.pth", "data/results/crowdlayer.json"} <= set(store.keys())
    assert run(image, settings, ANYBODY).stderr.count("already done") == 1


def test_exit_codes_are_the_contracts(image: str, store: Store, shapes: Path) -> None:
    data = store.put_tree(shapes)
    store.put("broken/train/x-1.png", b"")
    settings = QUICK | {"TASKS": data}
    nobody = ["--env", "AWS_ACCESS_KEY_ID=", "--env", "AWS_SECRET_ACCESS_KEY="]
    cases = [
        (0, run(image, {}, [], "--help")),
        (78, run(image, settings | {"LEARNING_RATE": "1"}, [])),
        (65, run(image, settings | {"TASKS": f"s3://{store.bucket}/broken"}, [])),
        (77, run(image, settings, nobody)),
        (74, run(image, settings, ["--env", "AWS_ENDPOINT_URL=http://127.0.0.1:9"])),
    ]
    assert [code for code, _ in cases] == [done.code for _, done in cases], [done.last_line for _, done in cases]


def test_the_termination_log_gets_the_last_line(image: str, tmp_path: Path) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    log.chmod(0o666)
    mounted = ["--volume", f"{log}:/dev/termination-log"]
    done = run(image, {"TASKS": "/nowhere", "LR": "x"}, ANYBODY + mounted)
    assert done.code == 78
    assert log.read_text() == done.last_line
    assert "CROWDLAYER_LR" in done.last_line


@pytest.fixture
def running(image: str, store: Store, shapes: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A container that has trained an epoch of very many."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    settings = QUICK | {"TASKS": store.put_tree(shapes), "N_EPOCHS": "100000"}
    process = subprocess.Popen(
        command(image, name, ANYBODY, settings, []), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "epoch" in line:
            break
    yield name, process
    subprocess.run(["docker", "rm", "-f", name], capture_output=True)


def test_docker_stop_ends_it_in_time_with_75(running: tuple[str, subprocess.Popen[str]], store: Store) -> None:
    name, process = running
    started = time.monotonic()
    subprocess.run(["docker", "stop", "-t", "25", name], check=True, capture_output=True)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert time.monotonic() - started < 25
    assert not [key for key in store.keys() if "results" in key or "best_models" in key]


def test_the_image_runs_as_nobody_in_particular_and_holds_no_tests(image: str) -> None:
    script = "import os, sys; print(os.getuid(), sys.version_info[:2], sorted(os.listdir('/app')))"
    done = subprocess.run(
        ["docker", "run", "--rm", "--entrypoint", "python", image, "-c", script], capture_output=True, text=True
    )
    uid, _, listing = done.stdout.partition(" ")
    assert int(uid) != 0
    assert "entrypoint.py" in listing
    assert "tests" not in listing
    assert sys.version_info >= (3, 11)


def test_a_change_of_the_code_costs_only_its_layers(image: str, tmp_path: Path) -> None:
    """The layers of torch and of the libraries are shared by two images whose code differs."""

    def layers(tag: str) -> list[str]:
        listed = subprocess.run(
            ["docker", "image", "inspect", "-f", "{{json .RootFS.Layers}}", tag], capture_output=True, text=True
        )
        return listed.stdout.strip().strip("[]").split(",")

    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "demo", ".*_cache"))
    with (copy / "crowdlayer/errors.py").open("a") as file:
        file.write("\n# changed\n")
    other = f"{TAG}:changed"
    build = (
        [str(RIG), "-n", "-q", "-t", other, str(copy)] if RIG.exists() else ["docker", "build", "-t", other, str(copy)]
    )
    subprocess.run(build, check=True, capture_output=True)
    ours, theirs = layers(image), layers(other)
    assert ours != theirs
    shared = sum(a == b for a, b in zip(ours, theirs, strict=True))
    assert len(ours) - shared <= 2
    subprocess.run(["docker", "rmi", other], capture_output=True)
