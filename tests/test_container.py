"""The image, built and run as a user would: a bucket in, a bucket out, exit codes to the platform."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import QUICK, ROOT, Store
from tests.containers import ANYBODY, RIG, TAG, build, command, fresh_name, inside, run

pytestmark = pytest.mark.container


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
    done = run(image, {"TASKS": "/nowhere", "LR": "x"}, [*ANYBODY, *mounted])
    assert done.code == 78
    assert log.read_text() == done.last_line
    assert "CROWDLAYER_LR" in done.last_line


@pytest.fixture
def running(image: str, store: Store, shapes: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A container that has trained an epoch of very many."""
    name = fresh_name()
    settings = QUICK | {"TASKS": store.put_tree(shapes), "N_EPOCHS": "100000"}
    process = subprocess.Popen(
        command(image, name, ANYBODY, settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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


def test_docker_stop_at_any_moment_costs_nothing_but_time(image: str, store: Store, shapes: Path) -> None:
    """Again and again, in the bucket where a run goes on: it ends with the results of one that nobody stopped."""
    settings = QUICK | {"TASKS": store.put_tree(shapes), "N_EPOCHS": "60", "N_PROCESSES": "2"}
    settings |= {"MODEL": "shufflenet_v2_x0_5", "IMG_SIZE": "32"}

    def output(name: str) -> dict[str, str]:
        return settings | {"OUTPUT": f"s3://{store.bucket}/{name}"}

    def results(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(store.get(f"{name}/results/crowdlayer.json"))
        del found["job"]
        return found

    started = time.monotonic()
    assert run(image, output("whole"), ANYBODY).code == 0
    life, rng = time.monotonic() - started, random.Random(int(os.environ.get("STOP_SEED", "0")))
    print(f"uninterrupted: {life:.1f} s")
    stops = 0
    while stops < int(os.environ.get("STOPS", "3")):
        name, moment = fresh_name(), rng.uniform(0.1, 0.9) * life
        process = subprocess.Popen(
            command(image, name, ANYBODY, output("out")), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            _, log = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            stops += 1
            told = time.monotonic()
            subprocess.run(["docker", "stop", "-t", "25", name], check=True, capture_output=True)
            _, log = process.communicate(timeout=60)
            last = log.rstrip().rpartition("\n")[2]
            print(f"stopped after {moment:.1f} s: {process.returncode} in {time.monotonic() - told:.1f} s: {last}")
        assert process.returncode in (0, 75), log
        if process.returncode == 0:
            break
    done = run(image, output("out"), ANYBODY)
    assert done.code == 0, done.stderr
    assert results("out") == results("whole")
    assert not [key for key in store.keys() if "checkpoints" in key]


# --- a pod -----------------------------------------------------------------------------------------------------------

PLAY_JOB = RIG.with_name("play-job")


def kustomized(folder: Path, image: str, settings: Mapping[str, str]) -> str:
    """The overlay one-gpu by a user's own kustomization: the image, the settings, and a CPU in place of the GPU."""
    shutil.copytree(ROOT / "k8s", folder / "k8s")
    overlay = folder / "k8s/overlays/one-gpu/kustomization.yaml"
    overlay.write_text(overlay.read_text().replace("credentials/secret", "credentials/role"))
    path, small = "/spec/template/spec/containers/0/resources/", {"cpu": "1", "memory": "2Gi"}
    patch = [{"op": "replace", "path": path + part, "value": small} for part in ("requests", "limits")]
    literals = [f"CROWDLAYER_{name}={value}" for name, value in settings.items()]
    kustomization = {
        "resources": ["../k8s/overlays/one-gpu"],
        "images": [{"name": "registry.example.com/crowdlayer", "newName": image, "newTag": "latest"}],
        "configMapGenerator": [{"name": "crowdlayer", "behavior": "merge", "literals": literals}],
        "patches": [{"target": {"kind": "Job"}, "patch": json.dumps(patch)}],
    }
    own = folder / "own"
    own.mkdir()
    (own / "kustomization.yaml").write_text(json.dumps(kustomization))
    return subprocess.run(["kubectl", "kustomize", str(own)], check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.skipif(not PLAY_JOB.exists() or shutil.which("kubectl") is None, reason="nothing that plays a Job")
def test_the_pod_of_an_overlay_trains_from_a_bucket_into_it(
    image: str, store: Store, shapes: Path, tmp_path: Path
) -> None:
    """The store and its credentials are in the environment, where a cluster puts a role's (podman knows no secrets)."""
    data = store.put_tree(shapes)
    job = tmp_path / "job.yaml"
    job.write_text(kustomized(tmp_path, image, QUICK | {"TASKS": data, "MODEL": "shufflenet_v2_x0_5"}))
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    injected = [part for name in names for part in ("-e", f"{name}={os.environ[name]}")]
    done = subprocess.run([str(PLAY_JOB), *injected, str(job)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{data}/results/crowdlayer.json" in done.stdout.splitlines(), done.stdout + done.stderr
    settings = json.loads(store.get("data/results/crowdlayer.json"))["job"]["settings"]
    assert settings["log_format"] == "json", "as the base says"
    assert "data/best_models/crowdlayer.pth" in store.keys()


# --- what is in the image --------------------------------------------------------------------------------------------


def test_the_image_runs_as_nobody_in_particular_and_holds_no_tests(image: str) -> None:
    script = "import os, sys; print(os.getuid(), sys.version_info[:2], sorted(os.listdir('/app')))"
    uid, _, listing = inside(image, "python", "-c", script).partition(" ")
    assert int(uid) != 0
    assert "entrypoint.py" in listing
    assert "tests" not in listing
    assert sys.version_info >= (3, 11)


def test_nothing_in_the_image_makes_its_user_another_or_can_be_changed_by_all(image: str) -> None:
    """Not even by root's own: no file that runs as its owner, has a capability, or is writable for everybody."""
    search = ["/", "-xdev", "-type", "f", "-perm", "/6002", "-o", "-type", "d", "-perm", "-0002", "!", "-perm", "-1000"]
    assert inside(image, "find", *search, options=["--user", "0"]) == ""
    capable = """if True:
        import os
        files = (os.path.join(folder, name) for folder, _, names in os.walk("/") for name in names)
        files = (file for file in files if not file.startswith(("/proc", "/sys")) and not os.path.islink(file))
        print([file for file in files if "security.capability" in os.listxattr(file)])
    """
    assert inside(image, "python", "-c", capable, options=["--user", "0"]) == "[]\n"
    status = inside(image, "cat", "/proc/self/status")
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)


def test_the_image_lists_what_is_in_it(image: str) -> None:
    listed = json.loads(inside(image, "cat", "/app/sbom.cdx.json"))
    script = "from importlib.metadata import distributions; print(*(f'{d.name}=={d.version}' for d in distributions()))"
    installed = inside(image, "python", "-c", script).split()
    assert listed["bomFormat"] == "CycloneDX"
    assert {f"{part['name']}=={part['version']}" for part in listed["components"]} == set(installed)
    assert len(installed) > 30
    assert all(part["purl"].startswith("pkg:pypi/") for part in listed["components"])


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
    build(copy, other)
    ours, theirs = layers(image), layers(other)
    assert ours != theirs
    shared = sum(a == b for a, b in zip(ours, theirs, strict=True))
    assert len(ours) - shared <= 2
    subprocess.run(["docker", "rmi", other], capture_output=True)
