"""What one looks at after a run: report.html, drawn from report.json; and a page that compares runs.

Everything in the page that comes from the data is text: escaped by jinja2, or in a block of JSON that no browser runs.
The policy in its head lets nothing be loaded, and runs the one script whose digest it names.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError

from ..command import to_write
from ..errors import DataError, SettingsError
from ..storage.durable import whole
from ..storage.files import disk_errors
from ..storage.places import Place
from . import charts, comparison
from .drawing import beside, to_svg
from .pages import embedded, name, rendered, rendered_markdown
from .runs import read_results, runs_at

USAGE = """python -m crowdlayer.report RESULTS... [-o PAGE]

RESULTS   results/<name>.json, or the folder or s3:// prefix above; of several runs the page compares them
PAGE      default: report.html, of several runs comparison.html, in this folder"""


def page(shown: dict[str, Any]) -> str:
    """report.html, of what `view` gave: the same bits for the same JSON."""
    results, classes = shown["results"], shown["classes"]
    epochs = {"train": results["train_loss"], "validation": results["val_loss"]}
    drawn = [charts.curves("loss", epochs, results["best_epoch"], "loss")]
    if any(value is not None for value in results["val_accuracy"]):
        drawn.append(
            charts.curves("validation accuracy", {"accuracy": results["val_accuracy"]}, results["best_epoch"], "%")
        )
    confused = shown["confusion"]
    matrix = None
    if confused is not None and confused["counts"] is not None:
        matrix = to_svg(charts.matrix(classes, confused["counts"], normalised=True))
    diagrams = {
        split: to_svg(beside([
            charts.reliability("as trained", bins["before"], "two"),
            charts.reliability("after temperature", bins["after"], "one"),
        ]))
        for split, bins in shown["reliability"].items()
    }  # fmt: skip
    data = shown["data"]
    histograms = [
        to_svg(charts.histogram(title, data[key]["counts"], data[key]["labels"]))
        for title, key in (
            ("tasks by number of answers", "answers_per_task"),
            ("workers by number of answers", "answers_per_worker"),
        )
    ]
    balance = None
    if data["balance"] is not None:
        balance = to_svg(charts.bars("class balance in percent", classes, data["balance"]))
    return rendered(
        "report.html",
        "report.js",
        r=results,
        shown=shown,
        classes=classes,
        curves=[to_svg(drawing) for drawing in drawn],
        matrix=matrix,
        diagrams=diagrams,
        histograms=histograms,
        balance=balance,
        embedded=embedded(
            {"classes": classes, "widest": charts.widest(classes)}
            | {key: shown[key] for key in ("workers", "matrices")}
        ),
        first_workers=shown["workers"][:25],
    )


def card(results: dict[str, Any]) -> str:
    """README.md: the model card, of the results."""
    return rendered_markdown("card.md", r=results)


MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, TemplateError)
"""What drawing meets in JSON that is not of the shape it has here."""


class _Arguments(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; usage: {USAGE.splitlines()[0]}")


def main(arguments: Sequence[str]) -> Path:
    """Draw the report of one run again, or a page that compares several; returns where it was written.

    What a run has published stays as it is: the page goes to --output, by default into this folder.

    Raises:
        DataError: no results there, or not ours.
        SettingsError: nothing to draw, or nowhere to put it.
    """
    parser = _Arguments(add_help=False)
    parser.add_argument("results", nargs="+")
    parser.add_argument("-o", "--output")
    given = parser.parse_args(arguments)
    output = None if given.output is None else to_write("-o", given.output)
    runs = [(at, file) for at, files in map(runs_at, given.results) for file in files]
    if len(runs) == 1:
        at, file = runs[0]
        raw = at.read(f"{file.removesuffix('.json')}/report.json")
        if raw is None:
            raise DataError(f"{at.location}/{file}: must have its report.json beside it, has none")
        try:
            text = page(json.loads(raw))
        except MALFORMED as error:
            raise DataError(f"{at.location}/{file}: its report.json must be one of this version's") from error
    else:
        every = [read_results(at, file) for at, file in runs]
        try:
            text = comparison.page(_names(runs), every)
        except MALFORMED as error:
            raise DataError(
                f"{', '.join(given.results)}: must be results of this version, one of them is not"
            ) from error
    output = output or Path("report.html" if len(runs) == 1 else "comparison.html")
    with disk_errors(str(output)), whole(output) as written:
        written.write(text.encode())
    return output


def _names(runs: Sequence[tuple[Place, str]]) -> list[str]:
    """What a page calls each run: by its name; where some are the same, by its place too, and by a number at last.

    Of the places that which differs: not the folder or prefix above all of them.
    """
    own = [file.removeprefix("results/").removesuffix(".json") for _, file in runs]
    places = [at.location for at, _ in runs]
    below = commonprefix(places).rfind("/") + 1  # an s3:// URI is no path  # noqa: RUF071
    for names in (own, [f"{location[below:]}: {mine}" for location, mine in zip(places, own, strict=True)]):
        shown = list(map(name, names))
        if len(set(shown)) == len(shown):
            return shown
    return [name(f"{number}. {mine}") for number, mine in enumerate(own, 1)]
