"""`python -m crowdlayer.report <results>...`: the page of one run, or one that compares several."""

import sys

from .. import command
from .html import USAGE, main


def work(*arguments: str) -> str:
    return str(main(arguments))


sys.exit(command.run(USAGE, work, sys.argv[1:]))
