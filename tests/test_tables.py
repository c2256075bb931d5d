"""The tables, as pandas and a spreadsheet read them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from crowdlayer.tables import cell, write_table

TRICKY = ["plain", "a,b", 'say "hi"', "two\nlines", " edges ", "a;b", "ünï", "", "0", "007", "<b>", "a\rb", "1e5"]


@pytest.mark.parametrize("text", TRICKY)
def test_text_comes_back_as_it_was(text: str) -> None:
    assert next(csv.reader(io.StringIO(f"{cell(text)},x\n", newline=""))) == [text, "x"]


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


def test_a_semicolon_does_not_open_a_cell_where_it_separates(tmp_path: Path) -> None:
    """As in a spreadsheet of a country that writes 1,5."""
    write_table(tmp_path / "t.csv", ["task", "n"], [["a;=1+1", 1]])
    with (tmp_path / "t.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file, delimiter=";") for cell in row]
    assert not any(cell.startswith("=") for cell in cells)
