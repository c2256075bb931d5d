"""The tables, as pandas and a spreadsheet read them."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml

from crowdlayer.learning.progress import History
from crowdlayer.report.tables import cell, write_epochs, write_settings, write_table

TRICKY = ["plain", "a,b", 'say "hi"', "two\nlines", " edges ", "a;b", "ünï", "", "0", "007", "<b>", "a\rb", "1e5"]


@pytest.mark.parametrize("text", TRICKY)
def test_text_comes_back_as_it_was(text: str) -> None:
    assert next(csv.reader(io.StringIO(f"{cell(text)},x\n", newline=""))) == [text, "x"]


def test_pandas_reads_classes_whose_names_mean_nothing_to_it_as_the_docs_say(tmp_path: Path) -> None:
    names = ["None", "NA", "nan", "null"]
    write_table(tmp_path / "t.csv", ["class", "prob"], [[name, 0.5] for name in names])
    assert pandas.read_csv(tmp_path / "t.csv")["class"].isna().all()
    read = pandas.read_csv(tmp_path / "t.csv", keep_default_na=False)
    assert (read["class"].tolist(), read["prob"].tolist()) == (names, [0.5] * 4)


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "＝1", "-", "--1"])
def test_no_text_is_a_formula(text: str) -> None:
    (read,) = next(csv.reader(io.StringIO(f"{cell(text)}\n", newline="")))
    assert read == f"'{text}"


@pytest.mark.parametrize("text", ["-5", "+1.5", "-1e-3", "-0"])
def test_a_negative_number_stays_one_even_as_a_name(text: str) -> None:
    assert cell(text) == text


def test_numbers_and_truth_values_are_plain() -> None:
    values = [-0.25, 1.0, 1 / 3, 1e-9, 12, True, False]
    assert [cell(value) for value in values] == ["-0.25", "1", "0.333333", "0", "12", "True", "False"]


def test_results_csv_has_the_same_bits_after_a_resume(tmp_path: Path) -> None:
    """Whose history comes out of a checkpoint; a figure that an epoch lacks leaves its cell empty."""
    history = History([0.1 + 0.2, 1 / 3], [None, 2e-7], [None, 50.0], [0.1, 1e-5], [0.1, 0.2])
    history.figures += [{"lr/pg1": 0.1}, {"lr/pg1": 0.1, "crowd/agreement": 0.5, "metrics/accuracy_top5": 99.0}]
    write_epochs(tmp_path / "before.csv", history)
    write_epochs(tmp_path / "after.csv", History(**json.loads(json.dumps(asdict(history)))))

    text = (tmp_path / "before.csv").read_text()
    assert (tmp_path / "after.csv").read_text() == text
    assert text.splitlines() == [
        "epoch,time,train/loss,val/loss,metrics/accuracy_top1,metrics/accuracy_top5,lr/pg0,lr/pg1,crowd/agreement",
        "1,0.100,0.3,,,,0.1,0.1,",
        "2,0.300,0.3333333,2e-07,50,99,1e-05,0.1,0.5",
    ]


@pytest.mark.parametrize("value", [1e-5, "true", ["a: b", "# c"], "s3://b/# d", "…", "\x85", None, [], 0, False, "😀"])
def test_any_setting_comes_back_from_args_yaml(tmp_path: Path, value: object) -> None:
    write_settings(tmp_path / "args.yaml", {"it": value, "other": 1}, {"it": "environment"})
    text = (tmp_path / "args.yaml").read_text()
    assert yaml.safe_load(text) == {"it": value, "other": 1}
    assert text.splitlines()[0].endswith("  # environment")


def test_a_semicolon_does_not_open_a_cell_where_it_separates(tmp_path: Path) -> None:
    """As in a spreadsheet of a country that writes 1,5."""
    write_table(tmp_path / "t.csv", ["task", "n"], [["a;=1+1", 1]])
    with (tmp_path / "t.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file, delimiter=";") for cell in row]
    assert not any(cell.startswith("=") for cell in cells)


def test_results_csv_has_a_row_per_epoch(beside: Path, results: dict[str, Any]) -> None:
    table = pandas.read_csv(beside / "results.csv")

    assert table.columns.tolist() == [
        "epoch",
        "time",
        "train/loss",
        "val/loss",
        "metrics/accuracy_top1",
        "lr/pg0",
        "lr/pg1",
        "crowd/mean_quality",
        "crowd/agreement",
        "crowd/diversity",
    ]
    assert table.epoch.tolist() == [1, 2, 3]
    assert table["train/loss"].tolist() == pytest.approx(results["train_loss"], rel=1e-6)
    assert table["val/loss"].tolist() == pytest.approx(results["val_loss"], rel=1e-6)
    assert table["metrics/accuracy_top1"].tolist() == pytest.approx(results["val_accuracy"], rel=1e-6)
    assert table.time.is_monotonic_increasing


def test_args_yaml_has_every_setting_and_where_it_came_from(beside: Path, results: dict[str, Any]) -> None:
    text = (beside / "args.yaml").read_text()

    assert yaml.safe_load(text) == results["job"]["settings"]
    lines = {line.partition(":")[0]: line for line in text.splitlines()}
    assert lines.keys() == results["job"]["settings"].keys()
    assert lines["n_epochs"] == "n_epochs: 3  # environment"
    assert lines["momentum"] == "momentum: 0.9  # default"
