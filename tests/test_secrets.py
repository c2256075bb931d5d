"""No secret is in anything that a run leaves behind, whatever happens to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from crowdlayer import command
from crowdlayer.errors import DataError, few
from crowdlayer.masking import without_secrets
from crowdlayer.storage.files import safe_names
from tests.conftest import ROOT, Finished, Store, run_job
from tests.forks import Forks
from tests.servers import Fault, Faults, Request, free_port, meddling, refused
from tests.test_catalogue import QUICK

PASSWORD = "pa55-w0rd"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAS3CRETKEYID00001",
    "AWS_SECRET_ACCESS_KEY": "s3cret/access+key/of/forty/characters000",
    "AWS_SESSION_TOKEN": f"s3cretSessionToken{'x' * 40}",
}
FORMS = {form.encode() for secret in (*SECRETS.values(), PASSWORD) for form in (secret, quote(secret, safe=""))}


@pytest.fixture
def world(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a job with secrets; all that it may write to on this machine is below the folder."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for name, folder in {"TMPDIR": "tmp", "HOME": "home", "CROWDLAYER_WORKDIR": "work"}.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
        (tmp_path / folder).mkdir()
    for name, value in (QUICK | {"STORE_TIMEOUT": "2", "STORE_ATTEMPTS": "2"}).items():
        monkeypatch.setenv(f"CROWDLAYER_{name}", value)
    return tmp_path


def assert_no_secret(done: Finished, world: Path, store: Store) -> None:
    left = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    left |= {str(path): path.read_bytes() for path in world.rglob("*") if path.is_file()}
    left |= {key: store.get(key) + key.encode() for key in store.keys()}
    assert [name for name, body in left.items() if any(secret in body for secret in FORMS)] == []


def job(forks: Forks, *arguments: str, **environment: str) -> Finished:
    return Finished(*forks.run(list(arguments), dict(os.environ) | environment))


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("arguments", [[], ["--check"]])
def test_a_run_and_a_check_that_end_well(
    arguments: list[str], log_format: str, shapes: Path, world: Path, store: Store, forks: Forks
) -> None:
    data = store.put_tree(shapes)
    done = job(forks, *arguments, CROWDLAYER_TASKS=data, CROWDLAYER_LOG_FORMAT=log_format)
    assert done.code == 0, done.stderr
    assert_no_secret(done, world, store)


def test_what_other_runs_of_a_sweep_have_is_not_looked_at_and_not_put(
    shapes: Path, world: Path, store: Store, forks: Forks
) -> None:
    sweep = f'[{{"seed": 1}}, {{"output": "s3://user:{PASSWORD}@bucket/x"}}]'
    data = store.put_tree(shapes)
    done = job(forks, CROWDLAYER_TASKS=data, CROWDLAYER_SWEEP=sweep, CROWDLAYER_SWEEP_INDEX="0")
    assert done.code == 0, done.stderr
    assert_no_secret(done, world, store)


class Refusing(Faults):
    """Every request from the n-th on is refused."""

    def __init__(self, n: int) -> None:
        super().__init__([Fault("403", refused(403, "InvalidAccessKeyId"), reaches_the_store=False)], share=1)
        self._left = n

    def next(self, request: Request) -> Fault | None:
        self._left -= 1
        return super().next(request) if self._left < 0 else None


@pytest.mark.parametrize("n", [0, 5, 60])
def test_a_store_that_refuses(n: int, shapes: Path, world: Path, store: Store, forks: Forks, endpoint: str) -> None:
    data = store.put_tree(shapes)
    with meddling(endpoint) as proxy:
        proxy.faults = Refusing(n)
        done = job(forks, CROWDLAYER_TASKS=data, AWS_ENDPOINT_URL=proxy.url)
    assert done.code == 77, done.stderr
    assert_no_secret(done, world, store)


def test_a_store_that_fails_and_whose_address_has_a_password(
    shapes: Path, world: Path, store: Store, forks: Forks
) -> None:
    address = f"http://user:{PASSWORD}@127.0.0.1:{free_port()}"
    done = job(forks, CROWDLAYER_TASKS="s3://bucket/data", AWS_ENDPOINT_URL=address)
    assert done.code in (74, 78)
    assert_no_secret(done, world, store)


def test_an_address_with_a_password_and_no_scheme(world: Path, store: Store, forks: Forks) -> None:
    address = f"user:{PASSWORD}@127.0.0.1:{free_port()}"
    done = job(forks, CROWDLAYER_TASKS="s3://bucket/data", AWS_ENDPOINT_URL=address)
    assert (done.code, "Invalid endpoint: ***@127.0.0.1:" in done.last_line) == (78, True)
    assert_no_secret(done, world, store)


@pytest.mark.parametrize("name", ["verify", "report"])
def test_a_command_whose_store_fails_and_whose_address_has_a_password(
    name: str, world: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{PASSWORD}@127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    arguments = [sys.executable, "-m", f"crowdlayer.{name}", "s3://bucket"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 74, done.stderr
    assert_no_secret(Finished(done.returncode, done.stdout, done.stderr), world, store)


def test_a_fault_of_a_command_with_urls_in_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise RuntimeError(f"https://user:{PASSWORD}@host")

    assert command.run("python -m crowdlayer.fault", work, []) == 70
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):\n")
    assert shown.endswith("\ncrowdlayer: a fault of the program: RuntimeError: https://***@host\n")
    assert PASSWORD not in shown


@pytest.mark.parametrize(
    "tasks",
    [
        f"s3://user:{PASSWORD}@bucket/data",
        f"https://bucket/data?X-Amz-Credential=x&X-Amz-Signature={PASSWORD}",
        f"s3://bucket/data?X-Amz-Security-Token={PASSWORD}",
    ],
)
def test_a_setting_with_a_secret_in_it(tasks: str, world: Path, store: Store, forks: Forks) -> None:
    done = job(forks, CROWDLAYER_TASKS=tasks, CROWDLAYER_OUTPUT=tasks, CROWDLAYER_PRETRAINED=tasks)
    assert done.code == 78
    assert_no_secret(done, world, store)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_fault_of_the_program_with_urls_in_its_traceback(
    log_format: str, shapes: Path, world: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"https://user:{PASSWORD}@host/key?X-Amz-Date=1&X-Amz-Signature={PASSWORD}"
    code = f"import shutil\ndef usage(path):\n    raise RuntimeError({url!r})\nshutil.disk_usage = usage\n"
    (world / "site").mkdir()
    (world / "site/sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(world / "site"))
    done = run_job(TASKS=store.put_tree(shapes), LOG_FORMAT=log_format)
    (world / "site/sitecustomize.py").unlink()
    shown = done.stderr.replace(repr(url), "")  # the line of source that failed
    assert (done.code, "Traceback" in shown) == (70, True), shown
    assert "https://***@host/key?***" in done.last_line
    assert_no_secret(Finished(done.code, done.stdout, shown), world, store)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('connect to "http://u:p@host:9/b?list-type=2"', 'connect to "http://***@host:9/b?list-type=2"'),
        ("connect to https://u:p@ss@host/b@c", "connect to https://***@host/b@c"),
        ("GET https://h/k?X-Amz-Signature=abc&x=1 failed", "GET https://h/k?*** failed"),
        ("s3://bucket/data@home and 3@4", "s3://bucket/data@home and 3@4"),
        ("what? Signature=none", "what? Signature=none"),
        ("Invalid endpoint: u:p@127.0.0.1:9", "Invalid endpoint: ***@127.0.0.1:9"),
        ("endpoint='u:p@ss@[::1]:9'", "endpoint='***@[::1]:9'"),
        ("//u:p@host", "//***@host"),
        ("train/12:30@cam.png: must be an image", "train/12:30@cam.png: must be an image"),
        ("worker w: ann@example.org, a:@b", "worker w: ann@example.org, a:@b"),
        ("https://u:p?x&y@host/k?x&Token=abc", "https://***@host/k?***"),
        ("proxy=u:p@host/a,b:c@d", "***@host/a,***@d"),
        ("https://h/?to=http://u:p@h&Signature=a", "https://h/?***"),
    ],
)
def test_what_is_hidden_of_a_text(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.mark.parametrize("piece", ["&", "?", ",", ":", "@", "/", "=a:", "a:b@", "://", "&Token", "=a:b@", "a@:,"])
def test_a_text_of_any_length_is_looked_through_in_no_time(piece: str) -> None:
    """Hours, if the time were quadratic; and nothing else runs meanwhile, signals neither."""
    assert len(without_secrets(piece * 10**6)) > 3


def test_a_name_of_a_million_characters_is_not_all_of_the_message() -> None:
    for name in ("train/" + 10**6 * "&", 500_000 * "a/"):
        with pytest.raises(DataError, match=r"at most 1024 bytes|no empty part") as refused:
            safe_names([name])
        assert len(str(refused.value)) < 500
    assert len(few(["n" * 10**6])) < 200
