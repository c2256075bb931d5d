"""The README says what is so. `python -m tests.test_readme` writes its table of settings anew."""

from __future__ import annotations

import re

import pytest

from crowdlayer import errors
from crowdlayer.settings import PREFIX, table
from tests.conftest import ROOT

README = ROOT / "README.md"
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
    found = BETWEEN.search(README.read_text())
    assert found is not None
    assert found.group() == settings_table(), "run make readme"


def test_every_variable_named_anywhere_is_a_setting() -> None:
    named = set(re.findall(rf"{PREFIX}[A-Z_]+", README.read_text()))
    assert named <= {row.name for row in table()}


def test_the_exit_codes_are_the_errors() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", README.read_text(), re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if hasattr(kind, "exit_code")]
    assert codes == {kind.exit_code for kind in kinds} | {0}


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
    README.write_text(BETWEEN.sub(lambda _: settings_table(), README.read_text()))
