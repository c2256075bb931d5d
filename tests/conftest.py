"""Fixtures: a store on loopback, tiny data sets, a finished run; the job as a process and in this one."""

from __future__ import annotations

import os

if "OMP_NUM_THREADS" not in os.environ:  # before torch comes: on nets this small threads only wait
    os.environ["OMP_NUM_THREADS"] = "1"

import json
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest

from crowdlayer.settings import load_settings
from tests.crowds import HOSTILE_CLASSES, write_hostile_shapes, write_shapes
from tests.forks import Forks, forking
from tests.servers import REAL_STORE, Answer, Meddler, Spoiler, meddling, moto_server, real_store, refused

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

QUICK = {"MODEL": "shufflenet_v2_x0_5", "IMG_SIZE": "16", "SMALL_IMAGES": "false", "N_EPOCHS": "2", "LR": "0.01"}
QUICK |= {"BATCH_SIZE": "16"}
"""Settings for a run of a second on `write_shapes`, of the network with the fewest weights."""
FEW_LAYERS = {"MODEL": "squeezenet1_1", "IMG_SIZE": "32"}
"""Beside them, where a model is exported: torch takes ten seconds for the layers of the other."""
RESULTS, MODEL = "results/crowdlayer.json", "best_models/crowdlayer.pth"
Job = Callable[..., str]
"""What `train` gives: settings in, the results' location out."""


def pytest_configure(config: pytest.Config) -> None:
    """GPUs are for the tests that are marked so: what a process sees of them is decided by its first look."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the settings, credentials or proxies of whoever runs it."""
    for name in list(os.environ):
        if name.startswith(("CROWDLAYER_", "AWS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny data set; not to be written to."""
    return write_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def image() -> str:
    """The image built from this checkout."""
    from tests.containers import built

    return built()


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that do not outlive the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def nobody_is_left() -> Iterator[None]:
    """Jobs of `tests.jobs` do not outlive the test."""
    from tests import jobs

    yield
    jobs.nobody_is_left()


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder that may be read but not written. Root may do everything: the test runs as a user who may not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)


def forbid(path: Path, mode: int = 0) -> None:
    """Change the mode as the owner, whoever this test runs as."""
    user = os.geteuid()
    if os.getuid() == 0:
        os.seteuid(0)
    path.chmod(mode)
    os.seteuid(user)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts jobs by forking."""
    with forking() as server:
        yield server


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """An S3 server on loopback."""
    with moto_server() as url:
        yield url


def without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extra were not installed: botocore reads everything."""
    for name in ("obstore", "obstore.store"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who reads a bucket: botocore alone, unless a test says otherwise."""
    name: str = getattr(request, "param", "botocore")
    if name == "botocore":
        without_obstore(monkeypatch)
    return name


BOTH = pytest.mark.parametrize("reader", ["botocore", "obstore"], indirect=True)
"""The same comes of it whether obstore is installed or not."""


@dataclass(frozen=True)
class Store:
    """A fresh bucket and a client that looks at it from outside."""

    bucket: str
    client: S3Client

    def put_tree(self, folder: Path, prefix: str = "data") -> str:
        """Upload a folder; returns its s3:// URI."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.client.put_object(
                    Bucket=self.bucket, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes()
                )
        return f"s3://{self.bucket}/{prefix}"

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=body)

    def keys(self) -> list[str]:
        """All keys, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", []))

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def not_taken(self, key: str, status: int, code: str) -> Spoiler:
        """The store refuses an object, and does not have it."""

        def spoiler(answer: Answer) -> None:
            self.client.delete_object(Bucket=self.bucket, Key=key)
            refused(status, code)(answer)

        return spoiler


@pytest.fixture
def store(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A fresh bucket at `endpoint`, with the environment set so that the job reaches it."""
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", region_name="us-east-1")
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    return Store(bucket, client)


@pytest.fixture
def meddler(store: Store, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Meddler]:
    """A proxy between the code under test and `store`."""
    with meddling(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A fresh bucket in the real store; gone afterwards."""
    environment = real_store(REAL_STORE)
    if environment is None:
        pytest.skip("no S3_TEST_ENDPOINT")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    client = boto3.client("s3", region_name="us-east-1")
    monkeypatch.delenv("AWS_REQUEST_CHECKSUM_CALCULATION")
    store = Store(f"test-{uuid.uuid4().hex[:12]}", client)
    client.create_bucket(Bucket=store.bucket)
    yield store
    for key in store.keys():
        client.delete_object(Bucket=store.bucket, Key=key)
    client.delete_bucket(Bucket=store.bucket)


@dataclass(frozen=True)
class Finished:
    """A job that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        return self.stderr.rstrip("\n").rpartition("\n")[2]


def run_job(*arguments: str, timeout: float = 300, **settings: str) -> Finished:
    """`python entrypoint.py` in a process of its own, with the current environment and these settings."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "entrypoint.py"), *arguments],
        env=dict(os.environ) | {f"CROWDLAYER_{name}": value for name, value in settings.items()},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@contextmanager
def variables(**settings: str) -> Iterator[None]:
    """These settings in the environment, for a while."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(f"CROWDLAYER_{name}", value)
        yield


@pytest.fixture
def _tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TMPDIR, which has to be empty again at the end."""
    folder = tmp_path / "TMPDIR"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")] == []


@pytest.fixture
def train(_tmpdir: None) -> Job:
    """Train in this process, on the settings named beside the quick ones, one epoch; gives the results' location."""
    from crowdlayer import job

    def run(**settings: str) -> str:
        with variables(**QUICK | {"N_EPOCHS": "1"} | settings):
            return job.train(load_settings())

    return run


@pytest.fixture
def check(_tmpdir: None) -> Callable[..., None]:
    """Check in this process."""
    from crowdlayer.check import check

    def run(**settings: str) -> None:
        with variables(**QUICK | settings):
            check(load_settings())

    return run


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of three epochs on hostile names; not to be written to."""
    from crowdlayer import job

    data, out = write_hostile_shapes(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("out")
    classes = json.dumps(list(HOSTILE_CLASSES.values()))
    with variables(**QUICK | {"TASKS": str(data), "OUTPUT": str(out), "N_EPOCHS": "3", "CLASSES": classes}):
        job.train(load_settings())
    return out


@pytest.fixture
def beside(output: Path) -> Path:
    """The folder of what is beside the results of `output`."""
    return output / "results/crowdlayer"


@pytest.fixture
def results(output: Path) -> dict[str, Any]:
    """The results of `output`."""
    return results_in(output)


def results_in(output: Path) -> dict[str, Any]:
    """The results of a run that has put them there."""
    results: dict[str, Any] = json.loads((output / RESULTS).read_text())
    return results


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A folder that is there, in a folder that shows what escapes."""
    path = tmp_path / "deep" / "er" / "workdir"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of the cgroups of both versions; this process is in the group job/step, and no file says anything."""
    from crowdlayer.machine import cgroups

    root = tmp_path / "cgroup"
    root.mkdir()
    monkeypatch.setattr(cgroups, "ROOT", root)
    monkeypatch.setattr(cgroups, "MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "membership").write_text("5:cpu,cpuacct:/job/step\n4:memory:/job/step\n1:pids:/\n0::/job/step\n")
    return root
