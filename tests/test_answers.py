"""Files of answers → arrays."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from crowdlayer.answers import AnswerFile, Answers, canonical, look_up, majority_vote, natural_order
from crowdlayer.answers.files import read_answers
from crowdlayer.errors import DataError, SettingsError, StoreError


def write(folder: Path, content: Any) -> Path:
    path = folder / "answers.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_gaps_text_ids_and_any_start_are_kept(tmp_path: Path) -> None:
    file = read_answers(write(tmp_path, {"7": {"ann": 0}, "1003": {"12": 1, "bob": 0}, "x-é": {"ann": 1}}))
    assert file.tasks == ["7", "1003", "x-é"]
    assert file.workers == ["12", "ann", "bob"]
    answers = look_up(file, ["no", "yes"])
    assert answers.task.tolist() == [0, 1, 1, 2]
    assert answers.worker.tolist() == [1, 0, 2, 1]
    assert answers.label.tolist() == [0, 1, 0, 1]


def test_workers_come_in_natural_order() -> None:
    assert sorted(["10", "9", "b", "a10", "007", "0"], key=natural_order) == ["0", "007", "9", "10", "a10", "b"]


@given(st.integers(0, 10**30), st.integers(0, 5))
def test_decimal_ids_meet_by_value(number: int, zeros: int) -> None:
    assert canonical("0" * zeros + str(number)) == str(number)


def test_labels_are_indices_names_or_digits(tmp_path: Path) -> None:
    file = read_answers(write(tmp_path, {"0": {"0": "dog", "1": 1, "2": "0", "3": 1.0}}))
    assert look_up(file, ["cat", "dog"]).label.tolist() == [1, 1, 0, 1]


def test_a_class_name_of_digits_goes_before_the_index(tmp_path: Path) -> None:
    file = read_answers(write(tmp_path, {"0": {"0": "2", "1": 2}}))
    assert look_up(file, ["1", "2", "10"]).label.tolist() == [1, 2]


def test_digits_are_indices_where_one_of_them_names_no_class(tmp_path: Path) -> None:
    file = read_answers(write(tmp_path, {"0": {"a": "0", "b": "1", "c": "2", "d": "x"}}))
    assert look_up(file, ["1", "2", "x"]).label.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("label", [True, None, 1.5, [1], {"a": 1}])
def test_a_label_of_another_kind_is_refused_with_its_place(tmp_path: Path, label: Any) -> None:
    with pytest.raises(DataError, match=r"answers.json: task 17, worker w3: label .* must be an index or a class name"):
        read_answers(write(tmp_path, {"16": {"w3": 0}, "17": {"w3": label}}))


@pytest.mark.parametrize(
    ("label", "rule"),
    [(12, "label 12 is not below n_classes=10"), (-1, "label -1 is not a class"), ("cow", "label cow is not a class")],
)
def test_a_label_out_of_range_is_refused_with_its_place(tmp_path: Path, label: Any, rule: str) -> None:
    file = read_answers(write(tmp_path, {"17": {"w3": label}, "18": {"w3": 1}}))
    with pytest.raises(DataError, match=f"answers.json: task 17, worker w3: {rule}"):
        look_up(file, [str(i) for i in range(10)])


def test_all_wrong_labels_are_named_at_once(tmp_path: Path) -> None:
    file = read_answers(write(tmp_path, {str(i): {"w": 100 + i} for i in range(30)}))
    with pytest.raises(DataError) as caught:
        look_up(file, ["a", "b"])
    assert str(caught.value).count("is not below") == 20
    assert str(caught.value).endswith("and 10 more")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "null",
        '{"1": [0]}',
        '{"1": 0}',
        '{"1": {"2": }}',
        '{"1": {"2": 0}',
        '{"1": {"2": NaN}}',
        "\ufeff{}",
    ],
)
def test_what_is_not_the_json_we_want_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"answers\.json: must"):
        read_answers(write(tmp_path, content))


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"answers\.json: is missing"):
        read_answers(tmp_path / "answers.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"1": {"a:b": 0}, "2": {"a:b": 1}, "1": {}}', "task 1 must be there once"),
        ('{"1": 5, "1": {"a": 0}}', "task 1 must be there once"),
        ('{"1": [1, [2]], "1": {"a": 0}}', "task 1 must be there once"),
        ('{"1": {"a": 0, "b": 1, "a": 0}}', "task 1, worker a: must answer once"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_answers(write(tmp_path, content))


def test_votes_that_others_replaced_may_be_anything(tmp_path: Path) -> None:
    (tmp_path / "answers.json").write_bytes(b'{"1": {"\xff": 0}, "1": {"a": 0}}')
    with pytest.raises(DataError, match="must have every task once, and all of it JSON"):
        read_answers(tmp_path / "answers.json")


def test_colons_in_names_are_no_keys(tmp_path: Path) -> None:
    assert read_answers(write(tmp_path, '{"a:1": {"w:2": "c:3"}}')).labels == ["c:3"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read_answers(write(tmp_path, '\ufeff{"1": {"a": 0}}')).tasks == ["1"]


COMPOSED, DECOMPOSED = "h\u00e9ron", "he\u0301ron"


@pytest.mark.parametrize("twice", [("7", "007"), (COMPOSED, DECOMPOSED)])
def test_two_spellings_of_one_task_are_refused(tmp_path: Path, twice: tuple[str, str]) -> None:
    with pytest.raises(DataError, match="must occur once"):
        read_answers(write(tmp_path, {task: {"0": 1} for task in twice}))


def test_workers_are_any_text(tmp_path: Path) -> None:
    """The platform that pays them tells 7 and 007 apart."""
    for first in ("007", "7"):
        file = read_answers(write(tmp_path, {"1": {first: 1, "10": 0}, "2": {"7": 0, "007": 1}}))
        assert file.workers == ["007", "7", "10"]
        assert file.answers.worker.tolist() == [file.workers.index(first), 2, 1, 0]


def test_a_class_may_be_spelt_as_the_file_system_does(tmp_path: Path) -> None:
    file = read_answers(write(tmp_path, {"0": {"a": COMPOSED, "b": DECOMPOSED}}))
    for name in (COMPOSED, DECOMPOSED):
        assert look_up(file, ["cat", name]).label.tolist() == [1, 1]


def test_answers_of_some_tasks_keep_their_workers_and_labels() -> None:
    answers = Answers(4, 3, np.array([0, 0, 1, 3, 3, 3]), np.array([0, 2, 1, 0, 1, 2]), np.array([5, 6, 7, 8, 9, 10]))
    some = answers.of_tasks(np.array([3, 2, 0]))
    assert (some.n_tasks, some.n_workers, len(some)) == (3, 3, 5)
    assert some.task.tolist() == [0, 0, 0, 2, 2]
    assert some.label.tolist() == [8, 9, 10, 5, 6]
    assert some.starts_at.tolist() == [0, 3, 3, 5]


def test_what_a_worker_says_again_is_one_pair() -> None:
    answers = Answers(3, 2, np.array([0, 0, 1, 2]), np.array([1, 0, 1, 1]), np.array([4, 0, 4, 0]))
    worker, label, of_answer = answers.pairs
    assert list(zip(worker.tolist(), label.tolist(), strict=True)) == [(0, 0), (1, 0), (1, 4)]
    assert (worker[of_answer].tolist(), label[of_answer].tolist()) == ([1, 0, 1, 1], [4, 0, 4, 0])


def test_majority_vote_of_no_answers_is_none() -> None:
    answers = Answers(3, 3, np.array([0, 0, 0, 2]), np.array([0, 1, 2, 0]), np.array([2, 1, 2, 1]))
    assert majority_vote(answers, 3).tolist() == [2, -1, 1]


def test_majority_vote_prefers_no_class_among_equals_and_is_always_the_same() -> None:
    """A classifier learns from labels that lean to a class to lean there itself."""
    task = np.repeat(np.arange(3000), 2)
    label = np.array([pair for pair in [(0, 1), (2, 0), (1, 2)] for _ in range(1000)]).ravel()
    answers = Answers(3000, 2, task, np.tile([0, 1], 3000), label)
    found = majority_vote(answers, 3)
    assert found.tolist() == majority_vote(answers, 3).tolist()
    for at, (one, other) in enumerate([(0, 1), (2, 0), (1, 2)]):
        share = (found[1000 * at : 1000 * (at + 1)] == one).mean()
        assert share == pytest.approx(0.5, abs=0.06)
        assert set(found[1000 * at : 1000 * (at + 1)]) == {one, other}


# --- the long form, and what is kept ---------------------------------------------------------------------------------


def flat(file: AnswerFile) -> list[tuple[str, str, int | str]]:
    answers = file.answers
    return [
        (file.tasks[task], file.workers[worker], file.labels[label])
        for task, worker, label in zip(answers.task, answers.worker, answers.label, strict=True)
    ]


def test_rows_of_csv_are_sorted_by_task_and_further_columns_ignored(tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    path.write_text("\ufeffworker,when,label,task\nann,1,0,b\nbob,2,dog,007\n\nann,3,0,007\n", encoding="utf-8")
    assert flat(read_answers(path)) == [("b", "ann", "0"), ("7", "bob", "dog"), ("7", "ann", "0")]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "must have columns task, worker, label"),
        ("task,worker\n1,2\n", "must have columns task, worker, label once, has task, worker"),
        ("task,worker,label,label\n1,a,0,1\n", "must have columns .*, has task, worker, label, label"),
        ("task,worker,label\n", "must have at least one answer"),
        ("task,worker,label\n1,a,0\n1,a\n", "line 3: must have all columns"),
        ("task,worker,label\n1,,0\n", "line 2: must have a worker"),
        ("task,worker,label\n2,b,0\n1,a,0\n2,c,0\n1,a,1\n", "task 1, worker a: must have one answer, has 2"),
        ("task,worker,label\n1,a,0\n01,b,0\n", "every task id must occur once"),
        ('task,worker,label\n1,a,"0\n', "must be CSV in UTF-8"),
    ],
)
def test_what_is_not_the_csv_we_want_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "answers.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"answers\.csv: {complaint}"):
        read_answers(path)


def test_rows_of_csv_come_in_pieces_and_each_once(tmp_path: Path) -> None:
    path, n = tmp_path / "answers.csv", 2**16 + 5
    path.write_text("task,worker,label\n" + "".join(f"{row // 300},{row % 300},{row % 3}\n" for row in range(n)))
    answers = read_answers(path).answers
    assert np.array_equal(answers.task, np.arange(n) // 300)
    assert np.array_equal(answers.worker, np.arange(n) % 300)
    assert np.array_equal(answers.label, np.arange(n) % 3)


@pytest.mark.parametrize("labels", [[0, 1, 0], ["cat", "dog", "cat"], [0.0, 1.0, 0.0]])
def test_rows_of_parquet_are_those_of_csv(tmp_path: Path, labels: list[Any]) -> None:
    table = pa.table({"task": [7, 1003, 7], "worker": ["b", "b", "a"], "label": labels, "seconds": [1.5, 2.5, 3.5]})
    parquet.write_table(table, tmp_path / "answers.parquet")
    file = read_answers(tmp_path / "answers.parquet")
    assert flat(file) == [("7", "b", labels[0]), ("7", "a", labels[2]), ("1003", "b", labels[1])]


@pytest.mark.parametrize("label", [[0, None], [0.5, 1.0], [[0], [1]]])
def test_what_is_not_the_parquet_we_want_is_refused(tmp_path: Path, label: list[Any]) -> None:
    path = tmp_path / "answers.parquet"
    parquet.write_table(pa.table({"task": ["1", "2"], "worker": ["a", "a"], "label": label}), path)
    with pytest.raises(DataError, match=r"answers\.parquet: .*must"):
        read_answers(path)
    twice = pa.table([pa.array(["1"])] * 4, names=["task", "worker", "label", "label"])
    parquet.write_table(twice, path)
    with pytest.raises(DataError, match=r"answers\.parquet: must have columns task, worker, label once, has"):
        read_answers(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"answers\.parquet: must be Parquet"):
        read_answers(path)


def test_a_damaged_parquet_is_refused_as_data(tmp_path: Path) -> None:
    path, n = tmp_path / "answers.parquet", 1000
    table = pa.table({"task": [str(i) for i in range(n)], "worker": ["a"] * n, "label": list(range(n))})
    parquet.write_table(table, path, use_dictionary=False)
    column = parquet.read_metadata(path).row_group(0).column(0)
    with path.open("r+b") as file:  # in the middle of the tasks
        file.seek(column.data_page_offset + column.total_compressed_size // 2)
        file.write(b"\xff" * 64)
    with pytest.raises(DataError, match=r"^answers\.parquet: must be Parquet .*: Corrupt snappy compressed data"):
        read_answers(path)


def test_a_parquet_whose_text_is_not_utf_8_is_refused_as_data(tmp_path: Path) -> None:
    path, latin = tmp_path / "answers.parquet", "Möwe".encode("latin-1")
    offsets = np.array([0, len(latin)], dtype=np.int32)
    label = pa.StringArray.from_buffers(1, pa.py_buffer(offsets), pa.py_buffer(latin))
    parquet.write_table(pa.table({"task": ["1"], "worker": ["a"], "label": label}), path)
    with pytest.raises(DataError, match=r"^answers\.parquet: must be Parquet .*: .*can't decode byte 0xf6"):
        read_answers(path)


@pytest.mark.parametrize("ending", ["json", "csv", "parquet"])
def test_answers_that_the_disk_does_not_give_are_no_fault_of_the_data(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"answers.{ending}").symlink_to(f"answers.{ending}")  # whoever opens it gets an errno, root too
    with pytest.raises(StoreError, match=rf"answers\.{ending}: .*symbolic links"):
        read_answers(tmp_path / f"answers.{ending}")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SettingsError, match=r"answers\.parquet needs pyarrow: pip install pyarrow"):
        read_answers(tmp_path / "answers.parquet")


def test_what_was_kept_is_read_instead_of_the_file_unless_it_is_damaged(tmp_path: Path) -> None:
    path = write(tmp_path, {"7": {"ann": 0, "10": "dog"}, "x": {"10": 1}, "8": {}})
    kept = tmp_path / "cache" / "answers-1.npz"
    first = flat(read_answers(path, kept))
    path.write_text("{}")
    again = read_answers(path, kept)
    assert flat(again) == first
    assert (again.tasks, again.workers, again.answers.n_tasks) == (["7", "x", "8"], ["10", "ann"], 3)
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="at least one answer"):
        read_answers(path, kept)
    write(tmp_path, {"9": {"eve": 1}})
    assert flat(read_answers(path, kept.with_name("answers-2.npz"))) == [("9", "eve", 1)]
    assert [found.name for found in kept.parent.iterdir()] == ["answers-2.npz"]


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_what_was_kept_runs_no_code(tmp_path: Path) -> None:
    path, kept = write(tmp_path, {"7": {"ann": 0}}), tmp_path / "answers-1.npz"
    np.savez(kept, names=np.array([Evil(tmp_path / "made")], dtype=object))
    assert flat(read_answers(path, kept)) == [("7", "ann", 0)]
    assert not (tmp_path / "made").exists()


def test_answers_that_cannot_be_kept_are_read_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, {"7": {"ann": 0}})
    (tmp_path / "file").touch()
    (tmp_path / "cache/answers-1.npz/in the way").mkdir(parents=True)
    for kept in (tmp_path / "file/answers-1.npz", tmp_path / "cache/answers-1.npz"):
        caplog.clear()
        assert flat(read_answers(path, kept)) == [("7", "ann", 0)]
        assert f"{kept}: the answers cannot be kept for the next start" in caplog.text
    assert [found.name for found in (tmp_path / "cache").iterdir()] == ["answers-1.npz"]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=60))
def test_majority_vote_is_what_counting_gives(rows: list[tuple[int, int]]) -> None:
    task, label = np.array(sorted(rows), dtype=np.int64).reshape(-1, 2).T
    table = np.zeros((10, 5), dtype=np.int64)
    np.add.at(table, (task, label), 1)
    found = majority_vote(Answers(10, 60, task, np.arange(len(task)), label), 5)
    assert ((found == -1) == ~table.any(1)).all()
    assert (table[np.arange(10), found] == table.max(1))[found >= 0].all()
