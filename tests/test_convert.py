"""Answers from one form into another; Label Studio's exports in, its import list out."""

from __future__ import annotations

import codecs
import csv
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from crowdlayer import job
from crowdlayer.answers import look_up
from crowdlayer.answers.convert import answers_in, convert, main
from crowdlayer.answers.files import read_answers
from crowdlayer.answers.label_studio import import_list
from crowdlayer.errors import DataError, SettingsError
from crowdlayer.settings import load_settings
from tests.conftest import QUICK
from tests.crowds import write_shapes

ANSWERS: dict[str, dict[str, Any]] = {"7": {"ann": "cat", "bob": "dog"}, "x-9": {"ann": "cat", "3": "cat"}}
ROWS = {("7", "ann", "cat"), ("7", "bob", "dog"), ("x-9", "ann", "cat"), ("x-9", "3", "cat")}


def annotation(worker: object, *choices: str, **more: object) -> dict[str, Any]:
    """As Label Studio exports it."""
    result = [{"type": "choices", "from_name": "choice", "to_name": "image", "value": {"choices": list(choices)}}]
    return {"completed_by": worker, "was_cancelled": False, "result": result if choices else []} | more


def exported(folder: Path, content: object, name: str = "export.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    return exported(tmp_path, ANSWERS, "answers.json")


@pytest.mark.parametrize("ending", ["json", "csv", "parquet"])
def test_any_form_holds_the_same_answers(answers: Path, tmp_path: Path, ending: str) -> None:
    assert convert(answers, tmp_path / f"a.{ending}") == 4
    assert set(answers_in(tmp_path / f"a.{ending}")) == ROWS
    convert(tmp_path / f"a.{ending}", tmp_path / "back.json")
    assert json.loads((tmp_path / "back.json").read_text()) == ANSWERS


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_labels_that_are_numbers_stay_numbers(tmp_path: Path, ending: str) -> None:
    convert(exported(tmp_path, {"1": {"a": 0, "b": 2}}, "answers.json"), tmp_path / f"a.{ending}")
    assert read_answers(tmp_path / f"a.{ending}").labels == ([0, 2] if ending == "parquet" else ["0", "2"])


@pytest.mark.parametrize("ending", ["csv", "parquet", "json"])
def test_labels_count_classes_of_digits_as_before(tmp_path: Path, ending: str) -> None:
    """A CSV knows no numbers: its 0, 1 and 2 are indices still, and not an index and the names of two classes."""
    given = exported(tmp_path, {"1": {"a": 0, "b": 2}, "2": {"a": 1}}, "answers.json")
    convert(given, tmp_path / f"a.{ending}")
    assert look_up(read_answers(tmp_path / f"a.{ending}"), ["1", "2", "3"]).label.tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("labels", "ending", "said"),
    [
        ([1, 2], "csv", True),
        ([1, "cat"], "csv", True),
        ([1, "cat"], "parquet", True),
        ([1, 2], "parquet", False),
        ([1, "cat"], "json", False),
        (["1", "2"], "csv", False),
        (["cat", "2"], "parquet", False),
    ],
)
def test_indices_that_become_text_are_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, labels: list[Any], ending: str, said: bool
) -> None:
    """Of classes named 1, 2 and 3 the indices 1 and 2 are the last two, the texts 1 and 2 the first two."""
    convert(exported(tmp_path, {"7": dict(zip("ab", labels, strict=True))}, "answers.json"), tmp_path / f"a.{ending}")
    assert len(caplog.records) == said
    if said:
        assert (
            caplog.text.count(f"a.{ending}: labels that are indices become text; where the names of the classes") == 1
        )
    else:
        assert read_answers(tmp_path / f"a.{ending}").labels == labels


def test_a_label_that_parquet_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    given = exported(tmp_path, {"7": {"ann": 1, "bob": 2**63}, "8": {"ann": -(2**63)}}, "answers.json")
    rule = r"^a\.parquet: task '7', worker 'bob': label 9223372036854775808 must be an integer of 64 bits$"
    with pytest.raises(DataError, match=rule):
        convert(given, tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"": {"ann": "cat"}}, "task '', worker 'ann': must have a task"),
        ({"7": {"": 0}}, "task '7', worker '': must have a worker"),
        ({"7": {"ann": ""}}, "task '7', worker 'ann': must have a label"),
    ],
)
def test_what_a_table_could_not_be_read_back_with_is_refused_before_it_is_written(
    tmp_path: Path, content: dict[str, dict[str, Any]], place: str
) -> None:
    given = exported(tmp_path, content, "answers.json")
    with pytest.raises(DataError, match=rf"^a\.csv: {place}, has none$"):
        convert(given, tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()
    assert convert(given, tmp_path / "a.parquet") == 1


def test_a_table_of_plain_names_is_plain(answers: Path, tmp_path: Path) -> None:
    convert(answers, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes().startswith(b"task,worker,label\n7,ann,cat\n")


def test_crowd_kit_and_pandas_read_the_long_table_without_a_word(answers: Path, tmp_path: Path) -> None:
    convert(answers, tmp_path / "long.csv")
    table = pd.read_csv(tmp_path / "long.csv")
    assert list(table.columns) == ["task", "worker", "label"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # crowd-kit's own, about pandas
        aggregation = pytest.importorskip("crowdkit.aggregation", reason="brings transformers along: not in [dev]")
        assert aggregation.MajorityVote().fit_predict(table)["x-9"] == "cat"


def test_a_table_can_be_read_again_whatever_is_in_a_name(tmp_path: Path) -> None:
    given = {"1": {"a\rb": "cat", 'q"r': "a,b"}, " x\n9 ": {"ö": "cat"}}
    convert(exported(tmp_path, given, "answers.json"), tmp_path / "a.csv")
    convert(tmp_path / "a.csv", tmp_path / "back.json")
    assert json.loads((tmp_path / "back.json").read_text()) == given


def test_a_byte_order_mark_is_no_part_of_the_answers(answers: Path, tmp_path: Path) -> None:
    (tmp_path / "marked.json").write_bytes(codecs.BOM_UTF8 + answers.read_bytes())
    assert set(answers_in(tmp_path / "marked.json")) == ROWS


def test_the_command_converts_and_says_how_many(answers: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "crowdlayer.answers", "convert"]
    done = subprocess.run([*command, str(answers), str(tmp_path / "long.csv")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'long.csv'}: 4 answers\n"), done.stderr


def test_a_table_is_never_half_there_and_may_be_its_own_source(tmp_path: Path) -> None:
    rows = [f"{i},w,{i % 3}" for i in range(2000)]
    table = tmp_path / "a.csv"
    table.write_text("\n".join(["task,worker,label", *rows, ""]))
    before = table.read_bytes()
    command = [sys.executable, "-m", "crowdlayer.answers", "convert", str(table), str(table)]
    full = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash"]  # the disk, for all that the process can tell
    done = subprocess.run([*full, *command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (74, ""), done.stderr
    assert table.read_bytes() == before
    assert convert(table, table) == 2000
    assert table.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_the_commands_exit_codes_are_a_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path / "none.json"), "a.csv"]) == 65
    assert "none.json: must be a file of answers" in capsys.readouterr().err
    assert main(["convert"]) == 78
    assert capsys.readouterr().err == "crowdlayer: usage: python -m crowdlayer.answers convert FROM TO\n"
    assert main(["merge", "a.json", "b.json"]) == 78
    assert "must be convert, got 'merge'" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m crowdlayer.answers convert FROM TO\n\nFROM ")


@pytest.mark.parametrize(("source", "target"), [("s3://b/a.json", "a.csv"), ("a.json", "s3://u:secret@b/a.csv")])
def test_what_is_not_on_this_machine_is_refused(source: str, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", source, target]) == 78
    name, shown = ("FROM", source) if "://" in source else ("TO", "s3://***@b/a.csv")
    assert capsys.readouterr().err == f"crowdlayer: {name}: must be a file on this machine, got '{shown}'\n"


@pytest.mark.parametrize("target", ["nowhere/a.csv", "folder.csv"])
def test_a_target_that_cannot_be_there_is_a_wrong_argument(
    answers: Path, tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.csv").mkdir()
    assert main(["convert", str(answers), str(tmp_path / target)]) == 78
    assert "TO: must be a file in a folder that is there, got " in capsys.readouterr().err


def test_a_link_stays_one_and_a_pipe_is_no_target(
    answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "link.csv").symlink_to("below/a.csv")
    assert main(["convert", str(answers), str(tmp_path / "link.csv")]) == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert set(answers_in(tmp_path / "below/a.csv")) == ROWS
    os.mkfifo(tmp_path / "pipe.csv")
    assert main(["convert", str(answers), str(tmp_path / "pipe.csv")]) == 78
    assert "TO: must be a file in a folder that is there, got " in capsys.readouterr().err
    assert (tmp_path / "pipe.csv").is_fifo()


def test_another_ending_is_refused(answers: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"a\.xlsx: must end in \.json, \.csv or \.parquet"):
        convert(answers, tmp_path / "a.xlsx")


def test_to_parquet_without_pyarrow_says_what_to_install(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SettingsError, match=r"a\.parquet: \.parquet needs pyarrow: pip install pyarrow"):
        convert(answers, tmp_path / "a.parquet")


# --- Label Studio ----------------------------------------------------------------------------------------------------


def test_an_export_gives_the_votes_of_its_annotators_for_the_images(tmp_path: Path) -> None:
    content = [
        {
            "id": 1,
            "data": {"image": "/data/upload/4/0a1b2c3d-cat-12.jpg", "title": "the first"},
            "annotations": [annotation(1, "cat"), annotation({"id": 2, "email": "bob@example.org"}, "dog")],
        },
        {
            "id": 2,
            "data": {"image": "/data/local-files/?d=birds/train/cat-13.PNG"},
            "annotations": [annotation(1, "dog"), annotation(3, "cat", was_cancelled=True), annotation(4)],
        },
        {"id": 3, "data": {"image": "s3://bucket/train/cat-14.jpg"}, "annotations": []},
    ]
    assert set(answers_in(exported(tmp_path, content))) == {
        ("cat-12", "1", "cat"),
        ("cat-12", "bob@example.org", "dog"),
        ("cat-13", "1", "dog"),
    }


@pytest.mark.parametrize(
    ("address", "task"),
    [
        ("https://host/a/my%20cat-7.jpg?size=3", "my cat-7"),
        ("HTTP://host/caf%C3%A9-3.png", "café-3"),
        ("s3://bucket/my%20cat-7.jpg", "my%20cat-7"),
        ("s3://bucket/cat #7? yes-7.jpg", "cat #7? yes-7"),
        ("gs://bucket/upload/deadbeef-7.jpg", "deadbeef-7"),
        ("/data/local-files/?d=x/my%20cat-7.jpg", "my cat-7"),
    ],
)
def test_an_address_is_decoded_as_its_kind_is(tmp_path: Path, address: str, task: str) -> None:
    content = [{"id": 1, "data": {"image": address}, "annotations": [annotation(1, "cat")]}]
    assert list(answers_in(exported(tmp_path, content))) == [(task, "1", "cat")]


@pytest.mark.parametrize("form", ["json", "csv"])
def test_flat_exports_say_the_same(tmp_path: Path, form: str) -> None:
    flat = [
        {"image": "s3://b/train/a-1.jpg", "id": 1, "choice": "cat", "annotator": 5, "updated_at": "2026-01-01"},
        {"image": "s3://b/train/a-1.jpg", "id": 1, "choice": "dog", "annotator": 6, "updated_at": "2026-01-01"},
        {"image": "s3://b/train/a-2.jpg", "id": 2, "choice": "", "annotator": 6, "updated_at": "2026-01-01"},
    ]
    path = exported(tmp_path, flat, "export.json")
    if form == "csv":
        path = tmp_path / "export.csv"
        with path.open("w", newline="") as file:
            rows = csv.DictWriter(file, flat[0])
            rows.writeheader()
            rows.writerows(flat)
    assert set(answers_in(path)) == {("a-1", "5", "cat"), ("a-1", "6", "dog")}


@pytest.mark.parametrize("choices", [[0, 1], [0, 0]])
def test_a_choice_of_0_is_an_answer(tmp_path: Path, choices: list[int]) -> None:
    flat = [{"image": f"a-{i}.jpg", "choice": choice, "annotator": 5} for i, choice in enumerate(choices)]
    none: tuple[object, ...] = (None, "", [], {})
    flat += [{"image": "a-9.jpg", "choice": choice, "annotator": 5} for choice in none]
    expected = [(f"a-{i}", "5", str(choice)) for i, choice in enumerate(choices)]
    assert list(answers_in(exported(tmp_path, flat))) == expected


@pytest.mark.parametrize("form", ["json", "json-min", "csv"])
def test_annotations_of_nobody_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    """Those of several users that have been deleted are not the answers of one worker."""
    votes = [(5, "cat"), (None, "cat"), (None, "dog")]
    if form == "json":
        annotations = [annotation(worker, choice) for worker, choice in votes]
        path = exported(tmp_path, [{"id": 1, "data": {"image": "a-1.jpg"}, "annotations": annotations}])
    elif form == "json-min":
        path = exported(tmp_path, [{"image": "a-1.jpg", "annotator": by, "choice": choice} for by, choice in votes])
    else:
        path = tmp_path / "export.csv"
        pd.DataFrame([("a-1.jpg", by or "", choice) for by, choice in votes]).to_csv(
            path, header=["image", "annotator", "choice"], index=False
        )
    assert list(answers_in(path)) == [("a-1", "5", "cat")]
    assert f"{path.name}: 2 annotations have no annotator any more and are left out" in caplog.text


def test_an_export_whose_annotations_are_all_of_nobody_has_none(tmp_path: Path) -> None:
    content = [{"id": 1, "data": {"image": "a-1.jpg"}, "annotations": [annotation(None, "cat")]}]
    with pytest.raises(DataError, match=r"^export\.json: must have at least one annotation with a choice, has none$"):
        list(answers_in(exported(tmp_path, content)))


def test_what_is_no_json_is_no_export(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text('[{"data": ')
    with pytest.raises(DataError, match=r"^export\.json: must be JSON: "):
        list(answers_in(tmp_path / "export.json"))


def test_a_table_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "export.csv").write_bytes("image,choice,annotator\na-1.jpg,Möwe,5\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"export\.csv: must be CSV in UTF-8: .*can't decode byte 0xf6"):
        list(answers_in(tmp_path / "export.csv"))


@pytest.mark.parametrize("ending", ["bmp", "gif", "jpeg", "jpg", "JPG", "png", "tif", "tiff", "webp"])
def test_any_image_of_the_contract_is_one(ending: str, tmp_path: Path) -> None:
    content = [{"id": 1, "data": {"image": f"a-1.{ending}"}, "annotations": [annotation(1, "cat")]}]
    assert set(answers_in(exported(tmp_path, content))) == {("a-1", "1", "cat")}


def test_of_several_annotations_by_one_person_the_latest_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    votes = [annotation(1, "dog", updated_at="2026-02-02"), annotation(1, "cat", updated_at="2026-01-01")]
    content = [{"id": 1, "data": {"image": "a-1.jpg"}, "annotations": votes}]
    assert set(answers_in(exported(tmp_path, content))) == {("a-1", "1", "dog")}
    assert "1 annotations were replaced" in caplog.text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            [{"id": 1, "data": {"image": "a-1.jpg"}, "annotations": [annotation(1, "cat", "dog")]}],
            r"image a-1.jpg, annotator 1: must have one choice, has \['cat', 'dog'\]",
        ),
        ([{"id": 8, "data": {"image": "a-1.jpg"}, "annotations": []}], "must have at least one annotation"),
        (
            [{"id": 8, "data": {"text": "hello"}, "annotations": [annotation(1, "cat")]}],
            "task 8: must have one image, has 0",
        ),
        (
            [{"image": f"s3://b/train/{name}/1.png", "annotator": 5, "choice": name} for name in ("cat", "dog")],
            r"task 1: must have one image, has b/train/cat/1\.png and b/train/dog/1\.png",
        ),
        (
            [{"image": "a-1.jpg", "annotator": 1, "mood": "good", "kind": "cat"}],
            r"must have one field with the label, or one named choice, has \['kind', 'mood'\]",
        ),
        (
            [{"data": {"image": "a-1.jpg"}, "annotations": [{"result": 5}]}],
            r"must be as Label Studio exports it: .* at `\$\[0\]\.annotations\[0\]\.result`",
        ),
        (
            [{"id": 8, "data": {"image": "http://[x/a-1.jpg"}, "annotations": [annotation(1, "cat")]}],
            "task 8: must have one image, has 0",
        ),
    ],
)
def test_what_does_not_map_cleanly_is_refused(tmp_path: Path, content: object, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        list(answers_in(exported(tmp_path, content)))


def test_a_row_of_a_flat_export_with_a_cell_too_many_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("image,annotator,kind\na-1.jpg,1,cat\nb-2.jpg,1,dog, I think\n")
    with pytest.raises(DataError, match=r"x\.csv: line 3: must have 3 columns, has more"):
        list(answers_in(tmp_path / "x.csv"))


def test_what_is_imported_comes_back_under_the_same_tasks(tmp_path: Path) -> None:
    names = ["train/cat/a-1.jpg", "train/über uns/b 7.png"]
    for tasks in ("s3://bucket/birds", str(tmp_path), "s3://bucket/birds.tar"):
        items = import_list(tasks, names, ["cat", "dog"], [0.25, 0.5], "crowdlayer 1")
        assert [item["predictions"][0]["score"] for item in items] == [0.25, 0.5]
        if tasks.startswith("s3://"):
            beside = "s3://bucket" if tasks.endswith(".tar") else tasks
            assert [item["data"]["image"] for item in items] == [f"{beside}/{name}" for name in names]
        for item in items:  # as a person who agrees with every prediction
            result = item["predictions"][0]["result"]
            item["annotations"] = [{"completed_by": 1, "was_cancelled": False, "result": result}]
        assert set(answers_in(exported(tmp_path, items))) == {("a-1", "1", "cat"), ("b 7", "1", "dog")}


def test_an_archive_may_lie_at_the_root() -> None:
    """Its images are where it would be unpacked, not in the folder that the job was started in."""
    (item,) = import_list("/birds.tar", ["train/a-1.jpg"], ["cat"], [0.5], "crowdlayer 1")
    assert item["data"]["image"] == "/data/local-files/?d=/train/a-1.jpg"


def test_a_run_leaves_a_list_of_the_images_to_look_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_shapes(tmp_path / "data")
    for name, value in (QUICK | {"TASKS": str(data)}).items():
        monkeypatch.setenv(f"CROWDLAYER_{name}", value)
    job.train(load_settings())
    folder = data / "results" / "crowdlayer"
    items = json.loads((folder / "label_studio.json").read_text())
    table = pd.read_csv(folder / "labels.csv")
    assert [Path(item["data"]["image"]).name for item in items] == [Path(image).name for image in table["image"]]
    assert [item["predictions"][0]["score"] for item in items] == pytest.approx(table["consensus_quality_score"])
    image = items[0]["data"]["image"].removeprefix("/data/local-files/?d=")
    assert Path("/", image).is_file()
