"""What a killed run has left is there until a run is done."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from crowdlayer.errors import StoreError
from crowdlayer.run_folder import RUN, SPOOL, run_folder


def killed(workdir: Path, *files: str) -> None:
    """As SIGKILL leaves a run's folder."""
    (workdir / RUN / SPOOL).mkdir(parents=True)
    for name in files:
        (workdir / RUN / SPOOL / name).touch()


def test_the_checkpoint_of_a_killed_run_outlives_starts_that_could_not_take_it(tmp_path: Path) -> None:
    killed(tmp_path, "00000001.json")
    with suppress(StoreError), run_folder(tmp_path, RUN):
        raise StoreError("the store is away")
    killed(tmp_path)  # before it trained
    with suppress(StoreError), run_folder(tmp_path, RUN):
        raise StoreError("the store is away")
    assert [path.name for path in tmp_path.rglob("*.json")] == ["00000001.json"]

    killed(tmp_path, "00000002.json")
    with run_folder(tmp_path, RUN) as folder:
        assert [path.name for path in folder.iterdir()] == [SPOOL]
        assert [path.name for path in tmp_path.rglob("*.json")] == ["00000002.json"]
    assert not list(tmp_path.iterdir())
