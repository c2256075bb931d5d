"""The report, and a page that compares runs, in a real browser. The data have hostile names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from crowdlayer.report import html
from tests.crowds import HOSTILE_CLASSES, HOSTILE_WORKERS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page, Request


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
    assert set(HOSTILE_CLASSES.values()) >= set(column(opened, 6))
    shown = opened.locator("main").inner_text()
    for name in (*HOSTILE_CLASSES.values(), *(worker for task, worker in HOSTILE_WORKERS.items() if task != "3")):
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
    name = HOSTILE_WORKERS["2"]
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


def test_several_runs_are_compared_on_one_page(output: Path, tmp_path: Path, browser: Browser) -> None:
    (tmp_path / "results").mkdir()
    original = json.loads((output / "results" / "crowdlayer.json").read_text())
    for name, accuracy, lr in (("first", 70.0, 0.1), ("second", 90.0, 0.01), ("<b>third", None, 0.1)):
        changed = json.loads(json.dumps(original))
        changed["test_accuracy"], changed["job"]["settings"]["lr"] = accuracy, lr
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(changed))

    html.main([str(tmp_path), "-o", str(tmp_path / "comparison.html")])

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
