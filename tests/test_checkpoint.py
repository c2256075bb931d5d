"""A checkpoint is found whole, or not at all."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from crowdlayer.errors import SettingsError, StoreError
from crowdlayer.learning.checkpoint import Checkpoints, Found
from crowdlayer.learning.spool import FORMAT, PARTS, Identity, Spool, going_on
from crowdlayer.storage.durable import whole
from crowdlayer.storage.places import Folder, Place, place
from tests.checkpoints import SETTINGS, found, names, new_spool, put, state
from tests.conftest import Store


@pytest.fixture(params=["folder", "bucket"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return Folder(tmp_path / "out")
    store: Store = request.getfixturevalue("store")
    return place(f"s3://{store.bucket}/out")


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return new_spool(tmp_path)


def test_what_was_saved_is_found(output: Place, spool: Spool, tmp_path: Path) -> None:
    checkpoints = put(output, spool, state(1), state(1, 7), state(2, 3))
    back = found(checkpoints, tmp_path)
    assert back is not None
    assert (back["progress"]["epoch"], back["progress"]["step"]) == (2, 3)
    assert torch.equal(back["model"]["w"], torch.full((100,), 2.0))
    assert back["best"]["epoch"] == 1


def test_of_a_further_trainings_checkpoint_the_run_is_not_written_again(
    output: Place, spool: Spool, tmp_path: Path
) -> None:
    run, further = state(5), {"done": {"baseline majority": {"test_loss": 0.5, "gain": None}}, "state": state(1)}
    before = spool.write(run)
    assert set(before) == set(PARTS)
    same = {name: part for name, part in before.items() if name != "further"}
    written = {path.name: path.stat().st_mtime_ns for path in spool.folder.glob("*.pt")}
    after = spool.write(run | {"further": further}, same)
    left = {path.name: path.stat().st_mtime_ns for path in spool.folder.glob("*.pt")}
    assert {name: left[name] for name, _ in same.values()} == {name: written[name] for name, _ in same.values()}
    assert set(left) == {name for name, _ in after.values()}
    checkpoints = Checkpoints(output, "run")
    checkpoints.put(spool.folder, "00000002.json")
    back = found(checkpoints, tmp_path)
    assert back is not None
    assert back["progress"]["epoch"] == 5
    assert back["further"]["done"] == further["done"]
    assert back["further"]["state"]["progress"]["epoch"] == 1


def test_a_run_that_starts_again_within_itself_goes_on_from_its_last(
    output: Place, spool: Spool, tmp_path: Path
) -> None:
    """The guard may send a run back to its first epoch: the newest is not the one of most epochs."""
    put(output, spool, state(4), state(0))
    (tmp_path / "next").mkdir()
    later = Spool(tmp_path / "next", spool.identity, last=2)
    back = found(put(output, later, state(1)), tmp_path)
    assert back is not None
    assert back["progress"]["epoch"] == 1


def test_two_are_kept_and_nothing_remains_at_the_end(output: Place, spool: Spool) -> None:
    checkpoints = put(output, spool, *(state(epoch, best=epoch) for epoch in range(1, 5)))
    kept = names(output)
    assert [name for name in kept if name.endswith(".json")] == ["00000003.json", "00000004.json"]
    assert len(kept) == 2 + 2 * 2 + 1  # both have no further one
    checkpoints.remove()
    assert names(output) == []
    assert not isinstance(output, Folder) or not (output.path / "checkpoints").exists()


def test_another_programs_checkpoints_of_the_same_name_stay(output: Place, spool: Spool, tmp_path: Path) -> None:
    theirs = ["epoch=3.ckpt", "last.pt", f"lightning/{'0' * 64}.pt", "lightning/00000001.json"]
    source = tmp_path / "theirs"
    source.write_bytes(b"days of training")
    for name in theirs:
        output.upload(source, f"checkpoints/run/{name}")
    checkpoints = put(output, spool, *(state(epoch, best=epoch) for epoch in range(1, 5)))
    assert {name for name in names(output) if name.endswith(".json")} >= {"00000003.json", "00000004.json"}
    assert found(checkpoints, tmp_path) is not None
    checkpoints.remove()
    assert sorted(stored.name for stored in output.below("checkpoints")) == [
        f"checkpoints/run/{name}" for name in theirs
    ]


def test_what_a_killed_upload_has_left_goes_with_the_checkpoints(tmp_path: Path, spool: Spool) -> None:
    output = Folder(tmp_path / "out")
    checkpoints = put(output, spool, state(1))
    for name in ("00000001.json", f"{'0' * 64}.pt"):
        with suppress(InterruptedError), whole(output.path / "checkpoints" / "run" / name) as file:
            left = Path(file.name)
            file.write(b"half")
            file.flush()
            os.link(left, kept := tmp_path / "kept")
            raise InterruptedError
        kept.rename(left)
    assert len([name for name in names(output) if name.startswith(".")]) == 2
    checkpoints.remove()
    assert not (output.path / "checkpoints").exists()


def test_what_an_index_names_is_there_as_long_as_the_index_is(tmp_path: Path, spool: Spool) -> None:
    class Watched(Folder):
        lies = 0

        def delete(self, name: str) -> None:
            super().delete(name)
            there = names(self)
            for index in (name for name in there if name.endswith(".json")):
                parts = json.loads((self.path / "checkpoints" / "run" / index).read_text())["parts"]
                self.lies += any(file not in there for file, _ in parts.values())

    output = Watched(tmp_path / "out")
    put(output, spool, *(state(epoch, best=epoch) for epoch in range(1, 5))).remove()
    assert names(output) == []
    assert output.lies == 0


def test_a_part_that_has_not_changed_is_not_put_again(tmp_path: Path, spool: Spool) -> None:
    class Counting(Folder):
        put: list[str] = []  # noqa: RUF012

        def upload(self, source: Path, name: str) -> None:
            self.put.append(name)
            super().upload(source, name)

    output = Counting(tmp_path / "out")
    put(output, spool, state(1), state(2))
    assert len(output.put) == 6  # three parts and an index, then a part and an index
    assert [number for number, name in enumerate(output.put) if name.endswith(".json")] == [3, 5]


@pytest.mark.parametrize("damage", ["short", "gone", "other", "no json", "format", "foreign"])
def test_the_newest_whole_one_is_used(
    output: Place, spool: Spool, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    checkpoints = put(output, spool, state(1), state(2))
    index = "checkpoints/run/00000002.json"
    said = json.loads(output.read(index) or b"")
    part = f"checkpoints/run/{said['parts']['run'][0]}"
    spoilt = tmp_path / "spoilt"
    size = said["parts"]["run"][1]
    match damage:
        case "gone":
            output.delete(part)
        case "short" | "other":
            spoilt.write_bytes(b"x" * (size if damage == "other" else 10))
            output.upload(spoilt, part)
        case _:
            text = {"no json": "{", "format": json.dumps(said | {"format": FORMAT - 1}), "foreign": '["index"]'}
            spoilt.write_text(text[damage])
            output.upload(spoilt, index)
    with caplog.at_level(logging.WARNING):
        back = found(checkpoints, tmp_path)
    assert back is not None
    assert back["progress"]["epoch"] == 1
    assert "00000002.json" in caplog.text


def test_another_runs_is_refused_with_the_difference(output: Place, spool: Spool, tmp_path: Path) -> None:
    checkpoints = put(output, spool, state(1))
    assert found(checkpoints, tmp_path, Identity(SETTINGS | {"verbose": False}, "data")) is not None
    with pytest.raises(SettingsError, match=r"must be this run's: LR was 0\.1 and is 0\.2; never starts afresh"):
        found(checkpoints, tmp_path, Identity(SETTINGS | {"lr": 0.2}, "data"))
    with pytest.raises(SettingsError, match="the data is not the same"):
        found(checkpoints, tmp_path, Identity(SETTINGS, "other data"))


@pytest.mark.parametrize(("theirs", "ours"), [({}, {"momentum": 0.5}), ({"momentum": 0.5}, {})])
def test_a_setting_that_one_of_them_does_not_have_is_a_difference(
    tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    """As those of another version."""
    spool = Spool(tmp_path, Identity(SETTINGS | theirs, "data"))
    spool.write(state(1))
    index = json.loads((tmp_path / "00000001.json").read_bytes())
    (said,) = Identity(SETTINGS | ours, "data").differences(index)
    assert said.startswith("MOMENTUM was ")


def test_a_run_begins_where_there_is_no_checkpoint(output: Place, spool: Spool, tmp_path: Path) -> None:
    assert Checkpoints(output, "run").find(spool.identity, "auto", tmp_path) == Found(0, {})


def test_a_disk_that_is_full_while_torch_writes_is_named(spool: Spool) -> None:
    (spool.folder / "checkpoint").symlink_to("/dev/full")
    with pytest.raises(StoreError, match=r"spool: checkpoint must be written whole, with \d+ MB of disk free it is"):
        spool.write(state(1))
    assert [path.name for path in spool.folder.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("error", [StoreError("the store is away"), MemoryError()])
def test_what_has_a_meaning_of_its_own_says_nothing_of_the_checkpoint(error: Exception) -> None:
    with pytest.raises(type(error)), going_on():
        raise error


def test_any_other_error_says_that_the_state_is_none_of_ours() -> None:
    with pytest.raises(SettingsError, match="one that this program wrote, it is not: 'model'; never"), going_on():
        raise KeyError("model")


def test_resume_says_whether_there_may_be_or_must_be_one(output: Place, spool: Spool, tmp_path: Path) -> None:
    identity = Identity(SETTINGS, "data")
    with pytest.raises(SettingsError, match="RESUME: must find a checkpoint"):
        Checkpoints(output, "run").find(identity, "must", tmp_path)
    checkpoints = put(output, spool, state(1))
    found = checkpoints.find(identity, "must", tmp_path)
    assert (found.number, set(found.parts)) == (1, set(PARTS))
    assert checkpoints.find(identity, "never", tmp_path) == Found()
    assert names(output) == []


def kept(folder: Path, identity: Identity, *states: dict[str, Any]) -> Path:
    """A spool with the newest of these states, that nobody has put."""
    folder.mkdir()
    for one in states:
        Spool(folder, identity).write(one)
    return folder


def test_what_an_earlier_start_could_not_put_is_put_where_it_is_newer(
    output: Place, spool: Spool, tmp_path: Path
) -> None:
    checkpoints = put(output, spool, state(1), state(2))
    older = kept(tmp_path / "older", spool.identity, state(7))
    newer = kept(tmp_path / "newer", spool.identity, state(1), state(2), state(3))
    assert checkpoints.put_kept(older, spool.identity)
    back = found(checkpoints, tmp_path)
    assert back is not None
    assert back["progress"]["epoch"] == 2
    assert checkpoints.put_kept(newer, spool.identity)
    back = found(checkpoints, tmp_path)
    assert back is not None
    assert back["progress"]["epoch"] == 3
    assert [name for name in names(output) if name.endswith(".json")] == ["00000002.json", "00000003.json"]


@pytest.mark.parametrize("harm", ["settings", "data", "torn index", "torn part", "no part", "empty", "none"])
def test_what_was_kept_of_another_run_or_not_whole_stays_where_it_is(
    output: Place, spool: Spool, tmp_path: Path, harm: str
) -> None:
    folder = kept(tmp_path / "kept", spool.identity, state(1))
    identity, part = spool.identity, next(folder.glob("*.pt"))
    match harm:
        case "settings":
            identity = Identity(SETTINGS | {"lr": 0.2}, "data")
        case "data":
            identity = Identity(SETTINGS, "other data")
        case "torn index":
            (folder / "00000001.json").write_text("{")
        case "torn part":
            part.write_bytes(bytes(part.stat().st_size))
        case "no part":
            part.unlink()
        case _:
            folder = tmp_path / harm
            if harm == "empty":
                folder.mkdir()
    assert not Checkpoints(output, "run").put_kept(folder, identity)
    assert names(output) == []


@pytest.mark.parametrize("there", [9, 4], ids=["a newer one", "an older one"])
def test_what_was_kept_and_what_another_run_has_put_both_stay(
    output: Place, spool: Spool, tmp_path: Path, there: int
) -> None:
    (tmp_path / "theirs").mkdir()
    checkpoints = put(output, Spool(tmp_path / "theirs", Identity(SETTINGS, "other data"), there), state(1))
    before = names(output)
    folder = kept(tmp_path / "kept", spool.identity, *map(state, range(1, 6)))
    assert not checkpoints.put_kept(folder, spool.identity)
    assert not checkpoints.are_of(spool.identity)
    assert names(output) == before


def test_a_run_that_begins_beside_torn_ones_is_newer(output: Place, spool: Spool, tmp_path: Path) -> None:
    checkpoints = put(output, spool, state(1), state(2), state(3))
    ((shared, _),) = [json.loads(path.read_text())["parts"]["best"] for path in spool.folder.glob("*.json")]
    written = tmp_path / "rotten"
    written.write_bytes(b"rotten")
    output.upload(written, f"checkpoints/run/{shared}")
    begun = checkpoints.find(spool.identity, "auto", tmp_path)
    assert begun == Found(3)
    (tmp_path / "next").mkdir()
    for epoch in (1, 2):
        put(output, Spool(tmp_path / "next", spool.identity, begun.number), state(epoch, best=5))
        back = found(checkpoints, tmp_path)
        assert back is not None
        assert back["progress"]["epoch"] == epoch


@pytest.mark.parametrize("stray", ["99999999.json", "20261128.json", "123456789012.json"])
def test_checkpoints_are_found_beside_one_of_a_larger_number_that_is_none(
    output: Place, spool: Spool, tmp_path: Path, stray: str
) -> None:
    (tmp_path / stray).write_text("{}")
    output.upload(tmp_path / stray, f"checkpoints/run/{stray}")
    begun = Checkpoints(output, "run").find(spool.identity, "auto", tmp_path)
    for epoch in (1, 2, 3):
        checkpoints = put(output, Spool(spool.folder, spool.identity, begun.number), state(epoch))
        back = found(checkpoints, tmp_path)
        assert back is not None
        assert back["progress"]["epoch"] == epoch
        begun = checkpoints.find(spool.identity, "auto", tmp_path)
    Checkpoints(output, "run").remove()
    assert names(output) == [stray]  # another program's
