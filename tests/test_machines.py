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
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import QUICK, Store
from tests.containers import ANYBODY, build, command, fresh_name, run
from tests.crowds import write_shapes
from tests.servers import Answer, Fault, Faults, Request, header, meddling, refused

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


@pytest.mark.slow
def test_images_of_more_than_the_memory_are_read_from_the_disk(image: str, tmp_path: Path) -> None:
    """1.1 GB of decoded images and 1 GB of memory: nothing is killed, and every image is trained on.

    Frozen, for the sake of time; averaged weights keep it from being trained on features.
    """
    data, work = write_shapes(tmp_path / "data", n_train=7300), tmp_path / "work"
    work.mkdir()
    for folder in (tmp_path, data, work):
        folder.chmod(0o777)
    volumes = ["--volume", f"{data}:/data:ro", "--volume", f"{work}:/work"]
    places = {"TASKS": "/data", "OUTPUT": "/work/out", "WORKDIR": "/work"}
    settings = SMALL | places | {"IMG_SIZE": "224", "BATCH_SIZE": "8", "N_EPOCHS": "1", "FREEZE": "true", "EMA": "0.5"}
    done = run(image, settings, [*TIGHT, *volumes])
    assert done.code == 0, done.stderr
    assert "the others are decoded in every epoch" not in done.stderr
    assert sum(file.stat().st_size for file in work.glob("cache/images-train-*")) > 2**30


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


# --- the clock -------------------------------------------------------------------------------------------------------

CLOCK = """
FROM python:3.12-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends libfaketime
RUN cp /usr/lib/*/faketime/libfaketimeMT.so.1 /faketime.so
"""


@pytest.fixture(scope="module")
def faketime(image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that lets a program see another time; of the system that the image is made of."""
    folder = tmp_path_factory.mktemp("clock")
    folder.chmod(0o755)
    (folder / "Dockerfile").write_text(CLOCK)
    build(folder, "crowdlayer/clock")
    with (folder / "faketime.so").open("wb") as library:
        reading = ["docker", "run", "--rm", "--entrypoint", "cat", "crowdlayer/clock", "/faketime.so"]
        subprocess.run(reading, stdout=library, check=True)
    return folder / "faketime.so"


class Punctual(Faults):
    """A store that refuses what was signed more than a quarter of an hour ago, or will be, as AWS does."""

    def __init__(self) -> None:
        super().__init__([], share=0)

    def next(self, request: Request) -> Fault | None:
        signed = datetime.strptime(request.headers["x-amz-date"], "%Y%m%dT%H%M%S%z")
        if abs(datetime.now(UTC) - signed) < timedelta(minutes=15):
            return None
        self.done["refused"] += 1

        def refuse(answer: Answer) -> None:
            refused(403, "RequestTimeTooSkewed")(answer)
            header("Date", formatdate(usegmt=True))(answer)

        return Fault("refused", refuse, reaches_the_store=False)


@pytest.mark.parametrize(
    ("shift", "told"),
    [
        pytest.param("+1h", "60 min ahead of", id="an hour ahead"),
        pytest.param("-1h", "60 min behind", id="an hour behind", marks=pytest.mark.slow),
        pytest.param("+3m", None, id="three minutes ahead", marks=pytest.mark.slow),
    ],
)
def test_a_clock_an_hour_off_is_named_and_one_three_minutes_off_does_no_harm(
    shift: str, told: str | None, image: str, faketime: Path, store: Store, shapes: Path, endpoint: str
) -> None:
    settings = SMALL | {"TASKS": store.put_tree(shapes)}
    clock = ["--volume", f"{faketime}:/faketime.so:ro", "--env", "LD_PRELOAD=/faketime.so"]
    clock += ["--env", f"FAKETIME={shift}"]
    with meddling(endpoint) as punctual:
        punctual.faults = Punctual()
        there = ["--env", f"AWS_ENDPOINT_URL={punctual.url}"]
        done = run(image, settings, [*ANYBODY, *clock, *there])
    if told is None:
        assert done.code == 0, done.stderr
        assert not punctual.faults.done
        return
    assert done.code == 77, done.stderr
    assert "the store must allow this, it answers 403" in done.last_line
    assert done.last_line.endswith(f"; this machine's clock must be right, it is {told} the store's")
    assert "Traceback" not in done.stderr
    assert punctual.faults.done["refused"]
    assert not [key for key in store.keys() if not key.startswith("data/")]


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_containers_killed_at_any_moment_end_with_the_results_of_one_that_was_not(
    kills: int, image: str, store: Store, shapes: Path
) -> None:
    """Nothing but the bucket outlives a container. A run that is done makes room for the next until all have hit."""
    store.put_tree(shapes)
    settings = SMALL | {"TASKS": f"s3://{store.bucket}/data", "N_EPOCHS": "12", "SCHEDULER": "cosine"}

    def out(name: str) -> dict[str, str]:
        return settings | {"OUTPUT": f"s3://{store.bucket}/{name}"}

    started = time.monotonic()
    assert run(image, out("calm"), ANYBODY).code == 0
    whole = time.monotonic() - started
    draw = random.Random(kills)
    runs = hits = 0
    while True:
        runs += 1
        prefix = f"killed-{runs}"
        while hits < kills and not run_until(draw.uniform(0.02, 1.0) * whole, image, out(prefix)):
            hits += 1
        done = run(image, out(prefix), ANYBODY)  # if only to say that it is done
        assert done.code == 0, done.stderr
        assert lasting(store, prefix) == lasting(store, "calm")
        print(f"run {runs}: {hits} kills so far; a calm run takes {whole:.1f} s")
        if hits == kills:
            break


def run_until(moment: float, image: str, settings: dict[str, str]) -> bool:
    """Whether a container has done its work before SIGKILL meets it, `moment` seconds after its start."""
    name = fresh_name()
    process = subprocess.Popen(command(image, name, ANYBODY, settings), stderr=subprocess.DEVNULL)
    try:
        code = process.wait(moment)
    except subprocess.TimeoutExpired:
        subprocess.run(["docker", "kill", name], capture_output=True)
        code = process.wait()
    assert code in (0, 137)
    print(f"killed after {moment:.1f} s" if code else f"done before {moment:.1f} s")
    return code == 0


def lasting(store: Store, prefix: str) -> dict[str, object]:
    """What two runs of the same share: figures, the model, and the names of all there is."""
    results = json.loads(store.get(f"{prefix}/results/crowdlayer.json"))
    del results["job"]
    names = [key.removeprefix(prefix) for key in store.keys() if key.startswith(f"{prefix}/")]
    return {"results": results, "model": store.get(f"{prefix}/best_models/crowdlayer.pth"), "names": names}
