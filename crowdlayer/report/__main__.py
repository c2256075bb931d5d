"""`python -m crowdlayer.report <results>...`: the page of one run, or one that compares several."""

import sys

from .. import command
from .html import USAGE, main


def work(*arguments: str) -> None:
    print(main(arguments))  # noqa: T201  standard output is its interface


sys.exit(command.run(USAGE, work, sys.argv[1:]))
