"""README and docs say what is so. `python -m tests.test_readme` writes the table of settings anew."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from crowdlayer import errors
from crowdlayer.settings import PREFIX, table
from tests.catalogue import CATALOGUE
from tests.conftest import QUICK, ROOT, Store
from tests.crowds import write_shapes

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
    assert named <= {row.name for row in table()}


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


def test_every_make_target_named_exists_and_every_one_that_is_explained_is_named() -> None:
    targets = dict(re.findall(r"^([a-z]+):[^#\n]*(##.*)?$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"(?:`|^)make ([a-z]+)(?=`|  )", text, re.MULTILINE))
    assert {name for name, explained in targets.items() if explained} <= named <= targets.keys()


def test_what_can_be_counted_is_as_many_as_is_said() -> None:
    text = " ".join((DOCS / "robustness.md").read_text().split())
    codes = Counter(case.code for case in CATALOGUE)
    assert f"{len(CATALOGUE)} cases of bad input in a catalogue" in text
    assert f"{codes[65]} end with 65, {codes[78]} with 78, {codes[0]} with 0 and a warning, " in text
    assert f"{codes[74] + codes[77]} with 74 or 77" in text
    image, tool = (
        {pin for name in names for pin in re.findall(r"^\S+==\S+", (ROOT / ".docker" / name).read_text(), re.MULTILINE)}
        for names in (["requirements.txt", "requirements-torch.txt"], ["requirements-sbom.txt"])
    )
    assert f"The image's {len(image)} packages, and {len(tool - image)} more of the tool" in text
    assert f"of these {len(image | tool)}" in text
    nvidias = [pin for pin in image if pin.startswith(("nvidia-", "cuda-"))]
    assert f"of the {len(nvidias)} of NVIDIA's libraries" in text


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [README, DOCS / "platforms.md"], ids=lambda page: page.name)
def test_the_loop_around_docker_tries_again_what_may_go_well_and_keeps_the_code(page: Path, tmp_path: Path) -> None:
    codes = tmp_path / "codes"
    codes.write_text("75\n74\n65\n0\n")
    programs = {"docker": f"read -r code <{codes} && sed -i 1d {codes} && exit $code", "sleep": ""}
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (loop,) = re.findall(r"^(?:until|while) docker run.*?\bdone\b", "\n".join(blocks(page, "bash")), re.M | re.S)
    done = subprocess.run(
        ["bash", "-c", f'{loop}\nexit "$code"'], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, timeout=60
    )
    assert (done.returncode, codes.read_text()) == (65, "0\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_block_names_are_where_it_goes(page: Path) -> None:
    for block in blocks(page, "bash"):
        folder = ROOT / next(iter(re.findall(r"^cd (\S+)$", block, re.MULTILINE)), ".")
        assert [name for name in re.findall(r"file://(\S+)", block) if not (folder / name).is_file()] == []


def test_the_library_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, but for the size of the task."""
    write_shapes(tmp_path / "labelme")
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (20, 10)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    small = {"n_classes=8": "n_classes=3", "n_epochs=100": "n_epochs=1, img_size=16, batch_size=16, verbose=False"}
    names: dict[str, Any] = {}
    for block in blocks(README, "python"):
        for what, instead in small.items():
            block = block.replace(what, instead)
        exec(compile(block, "README.md", "exec"), names)
    assert names["results"]["n_tasks"] == 24
    assert float(names["loss"].detach()) > 0


@pytest.mark.slow
def test_the_commands_run_in_the_order_of_the_readme(
    shapes: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but docker's (tests/test_container.py runs the image) and make's (above), on a bucket of this machine."""
    commands = "".join(block for block in blocks(README, "bash") if "--check" in block)
    convert = "".join(block for block in blocks(DOCS / "data-set.md", "bash") if "convert answers.json" in block)
    commands += convert.splitlines()[0]
    assert len(re.findall(r"^(?:\w+=\S+ )?python ", commands, re.MULTILINE)) == commands.count("python ")
    store.put_tree(shapes, "birds")
    store.put_tree(shapes / "test", "new")
    (tmp_path / "answers.json").write_bytes((shapes / "answers.json").read_bytes())
    (tmp_path / "entrypoint.py").symlink_to(ROOT / "entrypoint.py")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    for name, value in QUICK.items():
        monkeypatch.setenv(f"CROWDLAYER_{name}", value)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{':'.join(filter(None, sys.path))}")

    script = commands.replace("my-bucket", store.bucket)
    done = subprocess.run(["bash", "-euxc", script], cwd=tmp_path, capture_output=True, text=True, timeout=900)

    assert done.returncode == 0, done.stderr[-3000:]
    keys = store.keys()
    for name in ("results/crowdlayer.json", "results/crowdlayer/predictions.csv", "best_models/crowdlayer/model.json"):
        assert f"birds/{name}" in keys
    assert (tmp_path / "answers.csv").is_file()


if __name__ == "__main__":
    SETTINGS.write_text(BETWEEN.sub(lambda _: settings_table(), SETTINGS.read_text()))
