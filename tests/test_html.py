"""Report and model card say what a run came to, and are drawn again from its files. The data have hostile names."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from crowdlayer.errors import DataError, SettingsError
from crowdlayer.report import html
from tests.conftest import ROOT

# --- the model card --------------------------------------------------------------------------------------------------


def test_the_model_card_is_markdown_that_no_name_breaks(beside: Path, results: dict[str, Any]) -> None:
    text = (beside / "README.md").read_text()
    _, front, body = text.split("---\n", 2)

    assert yaml.safe_load(front)["pipeline_tag"] == "image-classification"
    assert f"{results['test_accuracy']:.1f}" in body
    assert "<script" not in re.sub(r"\\.", "", body)
    assert "<img" not in re.sub(r"\\.", "", body)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, ["end to end", "those of val/ chose the epoch and the temperature."]),
        ({"select_by": "last"}, ["end to end", "those of val/ chose the temperature."]),
        ({"freeze": True}, ["the last layer alone", "those of val/ chose the epoch and the temperature."]),
    ],
)
def test_the_model_card_says_what_was_trained_and_what_chosen(
    results: dict[str, Any], settings: dict[str, Any], said: list[str]
) -> None:
    results["job"]["settings"] |= settings
    card = " ".join(html.card(results).split())
    assert [text for text in said if text not in card] == []
    results["temperature_fitted_on"] = "held-out answers"
    if settings.get("select_by") == "last":
        assert "held out to choose the temperature by their answers" in " ".join(html.card(results).split())


def test_card_and_page_say_how_many_tasks_were_held_out(beside: Path, results: dict[str, Any]) -> None:
    shown = json.loads((beside / "report.json").read_text())
    assert "held out," not in html.page(shown)
    for figures in (results, shown["results"]):
        figures |= {"temperature_fitted_on": "held-out answers", "n_held_out": 7}
    assert f"to {results['n_tasks']} images, of which 7 were held out to choose" in " ".join(html.card(results).split())
    assert f"to {results['n_tasks']} tasks, of which 7 were held out, " in " ".join(html.page(shown).split())


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_says_which_try_collapsed(beside: Path) -> None:
    """With GUARD the figures are those of the second; without, of the one that there was."""
    shown = json.loads((beside / "report.json").read_text())
    assert "collapsed" not in html.page(shown)
    shown["results"] |= {"collapsed": True, "collapsed_since": 12}
    assert "A first try collapsed.</strong> From its epoch 12 on" in html.page(shown)
    shown["results"]["job"]["settings"]["guard"] = False
    assert "The run collapsed.</strong> From epoch 12 on" in html.page(shown)


def test_the_page_says_what_the_crowd_layer_gained(beside: Path) -> None:
    shown = json.loads((beside / "report.json").read_text())
    assert "Gain over" not in html.page(shown)
    shown["results"]["baselines"] = {
        "majority": {"test_accuracy": 31.5, "gain": {"points": -15.0, "low": -22.34, "high": -7.36}},
        "dawid-skene": {"test_accuracy": None, "gain": None},  # without test/
        "left out": None,  # diverged
    }
    page = " ".join(html.page(shown).split())
    assert page.count("Gain over") == 1
    assert 'Gain over majority</span><b class="alarm">-15.0</b>' in page
    assert "-22.3 to -7.4 with 95 %: the same network trained on its labels has 31.5 %." in page


def test_the_page_says_that_scores_are_upper_bounds(beside: Path, results: dict[str, Any]) -> None:
    per_task = results["n_answers"] / results["n_tasks"]
    said = f"Scores are upper bounds, the more so the fewer answers a task has (here {per_task:.1f} in the mean)"
    assert said in (beside / "report.html").read_text()


def test_the_policy_allows_the_pages_own_style_and_script_and_nothing_else(beside: Path) -> None:
    text = (beside / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.group(1).replace("&#39;", "'").split(";"))

    def digest(part: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"

    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert rules == {
        "default-src": "'none'",
        "style-src": digest(style),
        "script-src": digest(script),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert not re.search(r'(src|href)="(?!data:image/jpeg;base64,|#)', text)
    assert not re.search(r"\sstyle=|\son\w+=\"", text)


# --- drawn again -----------------------------------------------------------------------------------------------------


def test_the_tool_draws_the_same_page_again(output: Path, beside: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "crowdlayer.report", str(output)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "report.html\n"), done.stderr
    again = html.main([str(output / "results" / "crowdlayer.json"), "-o", str(tmp_path / "again.html")])
    for path in (tmp_path / "report.html", again):
        assert path.read_bytes() == (beside / "report.html").read_bytes()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, SettingsError),
        ("", DataError),
        ("{", DataError),
        ('{"job": 1}', DataError),
        ('{"job": {"settings": {}}}', DataError),
    ],
)
def test_what_is_no_run_is_told(tmp_path: Path, content: str | None, error: type[Exception]) -> None:
    (tmp_path / "results").mkdir()
    if content is not None:
        for name in ("a", "b"):
            (tmp_path / "results" / f"{name}.json").write_text(content)
    with pytest.raises(error):
        html.main([str(tmp_path), "-o", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("location", "complaint"),
    [
        ("--page", "arguments are required: results; usage: python -m crowdlayer.report RESULTS... [-o PAGE]"),
        ("https://store/run", "results: must be a path or an s3:// URI, got 'https://store/run'"),
        ("crowdlayer.json", "results: must be results/<name>.json or the folder above, got crowdlayer.json"),
        ("my-results/a.json", "results: must be results/<name>.json or the folder above, got my-results/a.json"),
    ],
)
def test_a_location_that_no_run_has_is_a_wrong_setting(location: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(complaint)):
        html.main([location])


@pytest.mark.parametrize("target", ["s3://bucket/page.html", "nowhere/page.html", "."])
def test_a_page_that_cannot_be_there_is_a_wrong_argument(output: Path, target: str) -> None:
    with pytest.raises(SettingsError, match=f"^-o: must be a file .*, got '{target}'$"):
        html.main([str(output), "-o", target])


def test_results_of_peerannots_beside_ours_are_left_out(
    output: Path, beside: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(output / "results", tmp_path / "results")
    (tmp_path / "results/peerannot.json").write_text('{"train_loss": [0.7], "val_accuracy": [50.0]}')
    drawn = html.main([str(tmp_path), "-o", str(tmp_path / "page.html")])
    assert drawn.read_bytes() == (beside / "report.html").read_bytes()
    assert "results/peerannot.json: left out, it says nothing of a job" in caplog.text


def test_a_place_without_runs_beside_one_with_a_run_is_told(output: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"results: must name a run, there is none at {tmp_path}$"):
        html.main([str(output), str(tmp_path), "-o", str(tmp_path / "page.html")])


@pytest.mark.parametrize(
    ("content", "complaint"), [(None, "must have its report.json beside it"), ("{}", "must be one of this version's")]
)
def test_a_run_whose_page_cannot_be_drawn_is_told(
    output: Path, tmp_path: Path, content: str | None, complaint: str
) -> None:
    beside = tmp_path / "results" / "crowdlayer"
    beside.mkdir(parents=True)
    shutil.copy(output / "results" / "crowdlayer.json", beside.parent)
    if content is not None:
        (beside / "report.json").write_text(content)
    with pytest.raises(DataError, match=rf"{tmp_path}/results/crowdlayer.json: .*{complaint}"):
        html.main([str(tmp_path), "-o", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (("a", "b"), ("a: crowdlayer", "b: crowdlayer")),
        (("sweeps/2026-11/seed-1", "sweeps/2026-11/seed-2"), ("seed-1: crowdlayer", "seed-2: crowdlayer")),
        (("a", "a/b"), ("a: crowdlayer", "a/b: crowdlayer")),
        (("n" * 99 + "a", "n" * 99 + "b"), ("1. crowdlayer", "2. crowdlayer")),
    ],
    ids=[
        "by their places",
        "by what differs of these",
        "one below the other",
        "by a number, of places too long to be shown",
    ],
)
def test_runs_of_the_same_name_are_told_apart(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: tuple[str, ...], names: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in folders:
        (tmp_path / folder / "results").mkdir(parents=True)
        shutil.copy(output / "results" / "crowdlayer.json", tmp_path / folder / "results")
    page = html.main([*folders, "-o", "page.html"]).read_text()
    for name in names:
        assert page.count(f">{name}<") > 1  # in the table, and in a legend


def test_of_many_runs_without_a_test_none_is_called_the_best(output: Path, tmp_path: Path) -> None:
    document = json.loads((output / "results" / "crowdlayer.json").read_text())
    (tmp_path / "results").mkdir()

    def drawn(accuracies: list[float | None]) -> str:
        for n, accuracy in enumerate(accuracies):
            (tmp_path / "results" / f"run-{n}.json").write_text(json.dumps(document | {"test_accuracy": accuracy}))
        return html.main([str(tmp_path), "-o", str(tmp_path / "page.html")]).read_text()

    assert "The first 6 runs." in drawn([None] * 8)
    page = drawn([None] * 6 + [0.0, 50.0])
    assert "The 6 runs with the best test accuracy." in page
    assert page.count(">run-6<") > 1  # 0 % is better than none


@pytest.mark.parametrize("harm", [("calibration", {"test": {}}), ("seconds", 5)])
def test_results_that_cannot_be_compared_are_told(output: Path, tmp_path: Path, harm: tuple[str, Any]) -> None:
    name, value = harm
    document = json.loads((output / "results" / "crowdlayer.json").read_text())
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text(json.dumps(document))
    (document if name in document else document["job"])[name] = value
    (tmp_path / "results" / "b.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="must be results of this version, one of them is not"):
        html.main([str(tmp_path), "-o", str(tmp_path / "page.html")])
