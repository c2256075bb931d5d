"""The image on machines that mean no good: little of everything, a full disk, a wrong clock, kills."""

from __future__ import annotations

import json
import random
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import QUICK, Store
from tests.containers import ANYBODY, command, fresh_name, run

pytestmark = pytest.mark.container

SMALL = QUICK | {"MODEL": "shufflenet_v2_x0_5", "IMG_SIZE": "32"}
ODDITIES: dict[str, list[str]] = {
    "a random user": ["--user", "1938475:2847561"],
    "a root that is read only": ["--read-only", "--tmpfs", "/tmp"],
    "no home": ["--env", "HOME=/nowhere", "--env", "USER=", "--user", "77:77"],
    "64 MB of /dev/shm": ["--shm-size", "64m"],
    "2 GB of memory": ["--memory", "2g", "--memory-swap", "2g"],
    "256 open files": ["--ulimit", "nofile=256:256"],
    "one CPU": ["--cpus", "1"],
    "no capability": ["--cap-drop", "ALL", "--security-opt", "no-new-privileges"],
}


def slow(*names: str) -> list[object]:
    """The first as it is; the others take minutes together."""
    return [names[0], *(pytest.param(name, marks=pytest.mark.slow) for name in names[1:])]


@pytest.mark.parametrize("oddity", slow("all of them", *ODDITIES))
def test_an_odd_machine_is_enough(oddity: str, image: str, store: Store, shapes: Path) -> None:
    options = ODDITIES.get(oddity) or [option for options in ODDITIES.values() for option in options]
    data = store.put_tree(shapes)
    done = run(image, SMALL | {"TASKS": data, "N_PROCESSES": "2"}, options)
    assert done.code == 0, done.stderr
    assert done.stdout == f"{data}/results/crowdlayer.json\n"
    assert {"data/best_models/crowdlayer.pth", "data/results/crowdlayer.json"} <= set(store.keys())


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readable(shapes: Path) -> list[str]:
    """Options that mount the data set where any user can read it."""
    shapes.chmod(0o755)
    return ["--volume", f"{shapes}:/data:ro"]


TIGHT = [*ANYBODY, "--memory", "1g", "--memory-swap", "1g"]


def test_too_little_memory_is_said_and_what_needs_less(image: str, readable: list[str]) -> None:
    settings = QUICK | {"TASKS": "/data", "OUTPUT": "/tmp/out", "MODEL": "resnet18", "IMG_SIZE": "512"}
    done = run(image, settings | {"BATCH_SIZE": "24"}, [*TIGHT, *readable])
    assert done.code == 71, done.stderr
    assert "out of memory with MODEL=resnet18, BATCH_SIZE=24 and IMG_SIZE=512: lower one of them" in done.last_line


def test_a_container_too_small_for_the_libraries_is_said(image: str) -> None:
    done = run(image, {"TASKS": "/data"}, [*ANYBODY, "--memory", "300m", "--memory-swap", "300m"])
    assert done.code == 71, done.stderr
    assert "the container's limit must be at least 537 MB for the libraries alone, it is 315 MB" in done.last_line


def test_images_in_memory_leave_room_for_the_training(image: str, readable: list[str]) -> None:
    """/tmp lies in memory here and counts as the job's: images beyond half of what is free are not held."""
    settings = SMALL | {"TASKS": "/data", "OUTPUT": "/tmp/out", "IMG_SIZE": "2048"}  # 42 images of 13 MB
    done = run(image, settings, [*TIGHT, *readable, "--tmpfs", "/tmp:size=8g"], "--check")
    assert "decoded images of 12582912 bytes are held; the others are decoded in every epoch" in done.stderr
    assert done.code == 71, done.stderr  # all that is left is too little for a step, and that can be said
    assert "IMG_SIZE=2048: lower one of them" in done.last_line


# --- the disk --------------------------------------------------------------------------------------------------------

FULL = {
    "WORKDIR": {
        "64k": "a disk of nothing",
        "65m": "room for the images alone",
        "100m": "room for a part of the first checkpoint",
        "200m": "room for the first checkpoint",
        "240m": "room for the second",
    },
    "OUTPUT": {
        "4k": "a disk of nothing",
        "20m": "room for a part of the model",
        "80m": "room for the model",
        "140m": "room for a checkpoint",
    },
}


@pytest.mark.parametrize(
    ("setting", "size"),
    [
        pytest.param(setting, size, id=f"{setting}: {what}", marks=() if size in ("100m", "20m") else pytest.mark.slow)
        for setting, sizes in FULL.items()
        for size, what in sizes.items()
    ],
)
def test_a_disk_that_is_full_is_said_and_no_results_are_there(
    setting: str, size: str, image: str, store: Store, shapes: Path
) -> None:
    """Whatever was to be written when it was full; a disk that is large enough after all is no failure."""
    data = store.put_tree(shapes)
    disk = [*ANYBODY, "--tmpfs", f"/disk:size={size},mode=1777"]
    done = run(image, QUICK | {"TASKS": data, "MODEL": "resnet18", setting: "/disk"}, disk)
    print(setting, size, done.code, done.last_line)
    assert done.code == 74, done.stderr
    assert "/disk" in done.last_line
    assert "Traceback" not in done.stderr
    assert not [key for key in store.keys() if "results" in key or "best_models" in key]


# --- nothing but the store -------------------------------------------------------------------------------------------


@contextmanager
def relayed(endpoint: str, path: Path) -> Iterator[None]:
    """A Unix socket that leads to the endpoint: a way into a container that has no network."""
    address = urlsplit(endpoint)

    class Relay(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection((address.hostname, address.port or 80)) as upstream:
                back = threading.Thread(target=pump, args=(upstream, self.request))
                back.start()
                pump(self.request, upstream)
                back.join()

    with socketserver.ThreadingUnixStreamServer(str(path), Relay) as server:
        path.chmod(0o777)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while chunk := source.recv(65536):
            sink.sendall(chunk)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # one of them is gone


DOOR = """
import socket, threading
def pump(source, sink):
    try:
        while chunk := source.recv(65536):
            sink.sendall(chunk)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass
door = socket.create_server(("127.0.0.1", 9000), backlog=64)
print("open", flush=True)
while True:
    inner, _ = door.accept()
    outer = socket.socket(socket.AF_UNIX)
    outer.connect("/door/store")
    for pair in ((inner, outer), (outer, inner)):
        threading.Thread(target=pump, args=pair, daemon=True).start()
"""


def test_no_network_but_the_store(image: str, store: Store, shapes: Path, endpoint: str, tmp_path: Path) -> None:
    """The job's network has a loopback and nothing else; the store is at one of its ports."""
    data = store.put_tree(shapes)
    name = fresh_name()
    beside = ["docker", "run", "--rm", "--network", "none", "--name", name, "--volume", f"{tmp_path}:/door"]
    tmp_path.chmod(0o755)
    with relayed(endpoint, tmp_path / "store"):
        door = subprocess.Popen(
            [*beside, "--entrypoint", "python", image, "-c", DOOR], stdout=subprocess.PIPE, text=True
        )
        assert door.stdout is not None
        assert door.stdout.readline() == "open\n"
        try:
            there = ["--env", "AWS_ENDPOINT_URL=http://127.0.0.1:9000", *ANYBODY]
            done = run(image, SMALL | {"TASKS": data}, there, network=f"container:{name}")
        finally:
            subprocess.run(["docker", "rm", "-f", name], capture_output=True)
            door.communicate()
    assert done.code == 0, done.stderr
    assert "data/results/crowdlayer.json" in store.keys()


def test_no_network_at_all_and_a_data_set_that_is_there(image: str, readable: list[str], tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    mounted = [*readable, "--volume", f"{tmp_path}:/out"]
    done = run(image, SMALL | {"TASKS": "/data", "OUTPUT": "/out"}, [*ANYBODY, *mounted], network="none")
    assert done.code == 0, done.stderr
    assert (tmp_path / "results/crowdlayer.json").is_file()


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_container_killed_at_any_moment_ends_with_the_results_of_one_that_was_not(
    kills: int, image: str, store: Store, shapes: Path
) -> None:
    """Nothing but the bucket outlives a container."""
    store.put_tree(shapes)
    settings = SMALL | {"TASKS": f"s3://{store.bucket}/data", "N_EPOCHS": "12", "SCHEDULER": "cosine"}

    def out(name: str) -> dict[str, str]:
        return settings | {"OUTPUT": f"s3://{store.bucket}/{name}"}

    started = time.monotonic()
    assert run(image, out("calm"), ANYBODY).code == 0
    whole = time.monotonic() - started
    draw = random.Random(kills)
    for _ in range(kills):
        name = fresh_name()
        process = subprocess.Popen(command(image, name, ANYBODY, out("killed")), stderr=subprocess.DEVNULL)
        try:
            process.wait(draw.uniform(0.3, 1.0) * whole)
        except subprocess.TimeoutExpired:
            subprocess.run(["docker", "kill", name], capture_output=True)
            assert process.wait() in (0, 137)
    assert run(image, out("killed"), ANYBODY).code == 0
    assert lasting(store, "killed") == lasting(store, "calm")


def lasting(store: Store, prefix: str) -> dict[str, object]:
    """What two runs of the same share: figures, the model, and the names of all there is."""
    results = json.loads(store.get(f"{prefix}/results/crowdlayer.json"))
    del results["job"]
    names = [key.removeprefix(prefix) for key in store.keys() if key.startswith(f"{prefix}/")]
    return {"results": results, "model": store.get(f"{prefix}/best_models/crowdlayer.pth"), "names": names}
