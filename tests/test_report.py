"""What one looks at after a run: the page in a real browser, and the files beside it. The data have hostile names."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas
import pytest
import torch
import yaml
from PIL import Image

from crowdlayer import job
from crowdlayer.answers import Answers
from crowdlayer.data.dataset import CrowdImages, Dataset, LabelledImages
from crowdlayer.data.decoding import Decoded
from crowdlayer.data.held import Held
from crowdlayer.errors import DataError, SettingsError
from crowdlayer.learning.experiment import Images, Outcome
from crowdlayer.learning.inference import Predictions, infer
from crowdlayer.learning.progress import Best, History
from crowdlayer.report import html as report
from crowdlayer.report.pictures import write_pictures
from crowdlayer.report.view import MOST_WORKERS, view
from crowdlayer.settings import load_settings
from tests.conftest import QUICK, ROOT
from tests.crowds import Crowd, Simulated, simulate, write_shapes

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page, Request

CLASSES = {"blue": "<img src=x onerror=alert(1)>", "green": "=cmd|' &amp; {{7*7}}", "red": 'r"><script>alert(2)<!--'}
WORKERS = {
    "0": "</script><script>alert(3)</script>",
    "1": "@SUM(1+1)*cmd",
    "2": "'\"><b onmouseover=alert(4)>",
    "3": "spammer \u202e `${alert(5)}`",
}
BESIDE = {
    "README.md",
    "args.yaml",
    "confusion.csv",
    "confusion_matrix.png",
    "confusion_matrix_normalized.png",
    "label_studio.json",
    "labels.csv",
    "manifest.sha256",
    "report.html",
    "report.json",
    "results.csv",
    "results.png",
    "train_batch0.jpg",
    "val_batch0_labels.jpg",
    "val_batch0_pred.jpg",
    "workers.csv",
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of three epochs whose classes and workers have hostile names."""
    data, out = write_shapes(tmp_path_factory.mktemp("data"), n_train=45), tmp_path_factory.mktemp("out")
    for split in ("train", "val", "test"):
        for name, hostile in CLASSES.items():
            (data / split / name).rename(data / split / hostile)
    answers = json.loads((data / "answers.json").read_text())
    renamed = {task: {WORKERS[worker]: label for worker, label in votes.items()} for task, votes in answers.items()}
    (data / "answers.json").write_text(json.dumps(renamed))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        settings = QUICK | {"TASKS": str(data), "OUTPUT": str(out), "N_EPOCHS": "3"}
        for name, value in (settings | {"CLASSES": json.dumps(list(CLASSES.values()))}).items():
            environment.setenv(f"CROWDLAYER_{name}", value)
        job.train(load_settings())
    return out


@pytest.fixture
def beside(output: Path) -> Path:
    return output / "results" / "crowdlayer"


@pytest.fixture
def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results" / "crowdlayer.json").read_text())
    return found


# --- the files beside the results ------------------------------------------------------------------------------------


def test_everything_is_there_and_has_its_digest(output: Path, beside: Path, results: dict[str, Any]) -> None:
    assert {path.name for path in beside.iterdir()} == BESIDE
    assert {f"results/crowdlayer/{name}" for name in BESIDE} <= results["job"]["files"].keys()
    for name, digest in results["job"]["files"].items():
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == digest
    subprocess.run(["sha256sum", "--check", "--strict", "results/crowdlayer/manifest.sha256"], cwd=output, check=True)
    listed = {line.split("  ", 1)[1] for line in (beside / "manifest.sha256").read_text().splitlines()}
    assert listed == results["job"]["files"].keys() - {"results/crowdlayer/manifest.sha256"}


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


def test_the_pictures_are_pictures(beside: Path) -> None:
    for name in BESIDE:
        if name.endswith((".png", ".jpg")):
            with Image.open(beside / name) as picture:
                assert min(picture.size) > 100
                assert len(picture.convert("RGB").getcolors(10**7) or []) > 20


def test_a_class_whose_letters_the_pictures_lack_is_its_number_there(tmp_path: Path) -> None:
    dataset, outcome, images = made_up(simulate(0, n_classes=3, n_tasks=200, n_workers=10, per_task=2))
    for folder, classes in (("named", ["cat", "Bär", "猫"]), ("numbered", ["cat", "#1", "#2"])):
        (tmp_path / folder).mkdir()
        names = write_pictures(tmp_path / folder, replace(dataset, classes=classes), outcome, images)
    for name in names:
        assert (tmp_path / "named" / name).read_bytes() == (tmp_path / "numbered" / name).read_bytes()


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
    card = " ".join(report.card(results).split())
    assert [text for text in said if text not in card] == []
    results["temperature_fitted_on"] = "held-out answers"
    if settings.get("select_by") == "last":
        assert "held out to choose the temperature by their answers" in " ".join(report.card(results).split())


def test_the_page_says_which_try_collapsed(beside: Path) -> None:
    """With GUARD the figures are those of the second; without, of the one that there was."""
    shown = json.loads((beside / "report.json").read_text())
    assert "collapsed" not in report.page(shown)
    shown["results"] |= {"collapsed": True, "collapsed_since": 12}
    assert "A first try collapsed.</strong> From its epoch 12 on" in report.page(shown)
    shown["results"]["job"]["settings"]["guard"] = False
    assert "The run collapsed.</strong> From epoch 12 on" in report.page(shown)


def test_the_page_says_what_the_crowd_layer_gained(beside: Path) -> None:
    shown = json.loads((beside / "report.json").read_text())
    assert "Gain over" not in report.page(shown)
    shown["results"]["baselines"] = {
        "majority": {"test_accuracy": 31.5, "gain": {"points": -15.0, "low": -22.34, "high": -7.36}},
        "dawid-skene": {"test_accuracy": None, "gain": None},  # without test/
        "left out": None,  # diverged
    }
    page = " ".join(report.page(shown).split())
    assert page.count("Gain over") == 1
    assert 'Gain over majority</span><b class="alarm">-15.0</b>' in page
    assert "-22.3 to -7.4 with 95 %: the same network trained on its labels has 31.5 %." in page


def test_the_page_says_that_scores_are_upper_bounds(beside: Path, results: dict[str, Any]) -> None:
    per_task = results["n_answers"] / results["n_tasks"]
    said = f"Scores are upper bounds, the more so the fewer answers a task has (here {per_task:.1f} in the mean)"
    assert said in (beside / "report.html").read_text()


def test_no_cell_of_a_table_is_a_formula(beside: Path) -> None:
    for name in ("labels.csv", "workers.csv", "confusion.csv"):
        table = pandas.read_csv(beside / name, dtype=str, keep_default_na=False)
        cells = [str(cell) for cell in [*table.columns, *table.to_numpy().ravel()]]
        assert not [cell for cell in cells if cell.startswith(("=", "+", "@", "\t", "\r"))]
        assert not [cell for cell in cells if cell.startswith("-") and not re.fullmatch(r"-[\d.e-]+", cell)]


# --- the page --------------------------------------------------------------------------------------------------------


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


def test_the_tool_draws_the_same_page_again(output: Path, beside: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "crowdlayer.report", str(output)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "report.html\n"), done.stderr
    again = report.main([str(output / "results" / "crowdlayer.json"), "-o", str(tmp_path / "again.html")])
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
        report.main([str(tmp_path), "-o", str(tmp_path / "page.html")])
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
        report.main([location])


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
        report.main([str(tmp_path), "-o", str(tmp_path / "page.html")])
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
    page = report.main([*folders, "-o", "page.html"]).read_text()
    for name in names:
        assert page.count(f">{name}<") > 1  # in the table, and in a legend


PATIENCE = 180_000.0
"""Milliseconds; on a machine that is busy a Chromium takes its time."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium, where one is installed."""
    api = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def opened(browser: Browser, beside: Path) -> Iterator[Page]:
    """The report in a tab of its own; at the end nothing may have been complained about, asked or loaded."""
    complaints: list[str] = []

    def asked(dialog: Dialog) -> None:
        complaints.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def loaded(request: Request) -> None:
        if not request.url.startswith(("file:", "data:")):
            complaints.append(request.url)

    page = browser.new_page(viewport={"width": 1180, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", asked)
    page.on("request", loaded)
    page.goto((beside / "report.html").as_uri(), timeout=PATIENCE)
    yield page
    page.close()
    assert complaints == []


def column(page: Page, nth: int) -> list[str]:
    return [cell.inner_text() for cell in page.locator(f"#workers tr td:nth-child({nth})").all()]


def test_the_page_renders_and_shows_names_as_text(opened: Page) -> None:
    assert "crowdlayer" in opened.title()
    assert column(opened, 1)[0].startswith("spammer")
    assert set(CLASSES.values()) >= set(column(opened, 6))
    shown = opened.locator("main").inner_text()
    for name in (*CLASSES.values(), *(worker for task, worker in WORKERS.items() if task != "3")):
        assert name in shown
    assert opened.locator("main img").count() == opened.locator("ul.review img").count() > 0
    assert opened.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert opened.locator("b").count() == opened.locator(".card b").count()
    assert "None" not in shown
    assert "nan" not in shown.lower()


def test_the_workers_are_sorted_by_a_click_or_a_key_and_say_so(opened: Page) -> None:
    head = opened.locator("#table th[data-column='1']")

    head.locator("button").click()
    falling = [int(text) for text in column(opened, 2)]
    assert falling == sorted(falling, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").press("Enter")
    assert [int(text) for text in column(opened, 2)] == sorted(falling)
    assert opened.locator("#table th[aria-sort]").count() == 1


def test_the_workers_are_searched_and_counted(opened: Page) -> None:
    opened.fill("#search", "SPAMMER")
    assert len(column(opened, 1)) == 1
    assert opened.inner_text("#count").startswith("1 of 4 workers")
    opened.fill("#search", "nobody")
    assert column(opened, 1) == []
    opened.fill("#search", "")
    assert len(column(opened, 1)) == 4


def test_a_workers_matrix_is_chosen_by_its_button_and_keeps_the_focus(opened: Page) -> None:
    name = WORKERS["2"]
    button = opened.locator("#workers button", has_text=name)
    button.focus()
    button.press("Enter")
    assert opened.inner_text("#matrix h3") == f"Worker {name}"
    assert opened.locator("#matrix rect").count() == 9
    assert opened.evaluate("document.activeElement.textContent") == name


def test_what_one_points_at_is_told(opened: Page) -> None:
    opened.locator("#classes rect").first.hover()
    assert " → " in opened.inner_text("#tip")


@pytest.mark.parametrize("width", [360, 390, 820, 1180])
def test_nothing_is_cut_off_on_a_narrow_screen(opened: Page, width: int) -> None:
    opened.set_viewport_size({"width": width, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_text_can_be_read_by_day_and_by_night(opened: Page, scheme: Any) -> None:
    """Contrast of at least 4.5 to 1 between text, muted text and both backgrounds (WCAG AA)."""
    opened.emulate_media(color_scheme=scheme)
    tones = opened.evaluate(
        "() => Object.fromEntries(['ink', 'muted', 'one', 'alarm', 'three', 'paper', 'panel'].map("
        "name => [name, getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()]))"
    )

    def luminance(tone: str) -> float:
        channels = [int(tone[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for text in ("ink", "muted", "one", "alarm", "three"):
        for ground in ("paper", "panel"):
            lighter, darker = sorted((luminance(tones[text]), luminance(tones[ground])), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, ground)


def test_a_screen_reader_finds_names_for_everything(opened: Page) -> None:
    unnamed = opened.evaluate(
        "() => [...document.querySelectorAll('main svg[role=img]')].filter(e => !e.getAttribute('aria-label')).length"
        " + [...document.images].filter(e => !e.alt).length"
        " + [...document.querySelectorAll('input')].filter(e => !e.labels.length).length"
        " + [...document.querySelectorAll('section')]"
        ".filter(e => !document.getElementById(e.getAttribute('aria-labelledby'))).length"
    )
    assert unnamed == 0
    assert opened.locator("html[lang=en]").count() == 1
    assert opened.locator("h1").count() == 1


def test_it_prints_without_its_buttons(opened: Page) -> None:
    opened.emulate_media(media="print")
    assert not opened.locator(".tools").is_visible()
    assert not opened.locator("nav").is_visible()
    assert opened.locator("#workers tr").count() == 4


def test_without_scripts_the_table_is_there(browser: Browser, beside: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((beside / "report.html").as_uri(), timeout=PATIENCE)
    assert page.locator("#workers tr").count() == 4
    assert not page.locator("#search").is_visible()
    context.close()


# --- size ------------------------------------------------------------------------------------------------------------


def made_up(crowd: Simulated) -> tuple[Dataset, Outcome, Images]:
    """A finished run on a simulated crowd, with names as long as they come."""
    n_tasks, (n_workers, n_classes, _) = len(crowd.truth), crowd.confusion.shape
    rng = np.random.default_rng(0)
    names = [f"train/class/an image with a rather long name {task}.jpg" for task in range(n_tasks)]
    train = CrowdImages(names, [str(task) for task in range(n_tasks)], crowd.answers, crowd.truth)
    labels = rng.integers(n_classes, size=200)
    other = LabelledImages([f"{i}.png" for i in range(200)], labels)
    workers = [f"worker-{rng.bytes(12).hex()}" for _ in range(n_workers)]
    classes = [f"class number {i}" for i in range(n_classes)]
    dataset = Dataset("made up", classes, workers, train, None, other, other)
    logits = torch.from_numpy(rng.standard_normal((200, n_classes)))
    predictions = Predictions(crowd.logits, logits, logits)
    likelihood = torch.eye(n_classes).repeat(n_workers, 1, 1).log_softmax(2)
    temperature, inferred = infer(dataset, predictions, likelihood)
    history = History([1.0] * 100, [2.0] * 100, [50.0] * 100, [0.1] * 100, [1.0] * 100, [{}] * 100)
    figures = {"temperature": temperature}
    outcome = Outcome(history, Best(1, 1.0, {}, {}, {}), likelihood, figures, predictions, inferred, "matrix", None)
    noise = torch.from_numpy(rng.integers(0, 256, (n_tasks, 8, 8, 3), dtype=np.uint8))
    train_images, other_images = (
        Decoded(Held(noise), torch.arange(n), lambda row: noise[row].numpy(), 1, torch.ones(n)) for n in (n_tasks, 200)
    )
    return dataset, outcome, Images(train_images, other_images, other_images)


def document(dataset: Dataset, outcome: Outcome, images: Images) -> dict[str, Any]:
    from crowdlayer.report.results import Finished, Provenance, document

    settings = {"output_name": "big", "seed": 0, "model": "resnet18", "select_by": "loss", "img_size": 8}
    return document(Finished(dataset, images, outcome, Provenance(settings, "0" * 64, ["cpu"], False)), {})


@pytest.mark.parametrize(
    ("n_tasks", "n_workers", "n_classes", "megabytes"),
    [(2000, 60, 10, 1.5), (100_000, 12_000, 10, 5.0), (2000, 50, 200, 5.0)],
)
def test_the_page_stays_a_page(n_tasks: int, n_workers: int, n_classes: int, megabytes: float) -> None:
    crowd = simulate(0, n_classes=n_classes, n_tasks=n_tasks, n_workers=n_workers, per_task=3)
    dataset, outcome, images = made_up(crowd)
    shown = json.loads(json.dumps(view(dataset, outcome, images, document(dataset, outcome, images))))
    assert len(report.page(shown).encode()) < megabytes * 1e6
    assert len(shown["workers"]) == min(n_workers, MOST_WORKERS)
    found = outcome.inferred.workers
    assert {dataset.workers[int(at)] for at in (found.order[0], found.n.argmax())} <= {
        row[0] for row in shown["workers"]
    }


@pytest.mark.parametrize(("n_classes", "right"), [(2, 0.6), (10, 0.2), (10, 0.3)])
def test_honest_work_that_is_seldom_right_is_not_called_spam(n_classes: int, right: float) -> None:
    """Five a task who are right more often than chance, and else anything; of twenty workers two answer at random."""
    rng = np.random.default_rng(0)
    truth = rng.integers(n_classes, size=3000)
    eye = np.eye(n_classes)
    confusion = np.stack([right * eye + (1 - right) / (n_classes - 1) * (1 - eye)] * 18 + [0 * eye + 1 / n_classes] * 2)
    votes = Crowd(confusion).answers(truth, 5, rng)
    given = [(task, int(worker), label) for task, vote in enumerate(votes) for worker, label in vote.items()]
    answers = Answers(3000, 20, *np.array(given).T.copy())
    logits = rng.standard_normal((3000, n_classes))
    logits[np.arange(3000), truth] += 6
    dataset, outcome, images = made_up(Simulated(truth, confusion, answers, torch.from_numpy(6 * logits)))
    shown = view(dataset, outcome, images, document(dataset, outcome, images))
    assert {row[0] for row in shown["workers"] if row[8]} == set(dataset.workers[18:])
    assert shown["suspects"]["count"] == 2


# --- several runs ----------------------------------------------------------------------------------------------------


def test_several_runs_are_compared_on_one_page(output: Path, tmp_path: Path, browser: Browser) -> None:
    (tmp_path / "results").mkdir()
    original = json.loads((output / "results" / "crowdlayer.json").read_text())
    for name, accuracy, lr in (("first", 70.0, 0.1), ("second", 90.0, 0.01), ("<b>third", None, 0.1)):
        changed = json.loads(json.dumps(original))
        changed["test_accuracy"], changed["job"]["settings"]["lr"] = accuracy, lr
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(changed))

    report.main([str(tmp_path), "-o", str(tmp_path / "comparison.html")])

    complaints: list[str] = []
    page = browser.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((tmp_path / "comparison.html").as_uri(), timeout=PATIENCE)
    heads = page.locator("#runs th").all_inner_texts()
    assert heads[:3] == ["run", "data", "test accuracy"]
    assert heads[-1] == "lr"  # what differs, and nothing else
    assert page.locator("#runs td.best", has_text="90.0").count() == 1
    page.locator("#runs th button", has_text="test accuracy").click()
    assert page.locator("#runs td:first-child").all_inner_texts() == ["first", "second", "<b>third"]
    assert complaints == []
    page.close()
