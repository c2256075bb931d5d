"""README and docs say what is so. `python -m tests.test_readme` writes the table of settings anew."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from crowdlayer import errors
from crowdlayer.settings import PREFIX, table
from tests.conftest import ROOT

README = ROOT / "README.md"
DOCS = ROOT / "crowdlayer" / "docs"
SETTINGS = DOCS / "settings.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
BETWEEN = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.DOTALL)


def settings_table() -> str:
    """The table of settings in Markdown."""
    rows = [
        [f"`{row.name}`", row.type.replace("|", "\\|"), row.default, row.unit, row.text.replace("|", "\\|")]
        for row in table()
    ]
    lines = [["variable", "type", "default", "unit", "meaning"], ["---"] * 5, *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def test_the_table_of_settings_is_the_settings() -> None:
    found = BETWEEN.search(SETTINGS.read_text())
    assert found is not None
    assert found.group() == settings_table(), "run make readme"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_variable_named_anywhere_is_a_setting(page: Path) -> None:
    named = set(re.findall(rf"{PREFIX}[A-Z_]*[A-Z]\b", page.read_text()))
    assert named - {"CROWDLAYER_SWEEP"} <= {row.name for row in table()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_is_four_screens_and_names_every_page() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 4 * 50
    assert [page.name for page in DOCS.glob("*.md") if f"crowdlayer/docs/{page.name}" not in text] == []


def test_the_exit_codes_are_the_errors() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", README.read_text(), re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if hasattr(kind, "exit_code")]
    assert codes == {kind.exit_code for kind in kinds} | {0}
    told = {int(code) for code in re.findall(r"^## (\d+): ", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)}
    assert told == codes - {0}


@pytest.mark.parametrize("target", ["demo", "test", "format", "slow", "container", "store", "readme", "requirements"])
def test_every_make_target_named_exists(target: str) -> None:
    assert f"make {target}" in README.read_text()
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_layer_example_runs() -> None:
    examples = [
        block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "CrowdLayer(" in block
    ]
    assert len(examples) == 1
    names: dict[str, object] = {}
    exec(compile(examples[0], "README.md", "exec"), names)
    assert float(names["loss"].detach()) > 0  # type: ignore[attr-defined]


if __name__ == "__main__":
    SETTINGS.write_text(BETWEEN.sub(lambda _: settings_table(), SETTINGS.read_text()))
