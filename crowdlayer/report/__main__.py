"""`python -m crowdlayer.report <results>...`: the page of one run, or one that compares several."""

import sys

from ..errors import CrowdlayerError, one_line, without_secrets
from .html import main

try:
    print(main(sys.argv[1:]))  # noqa: T201  standard output is its interface
except CrowdlayerError as error:
    print(without_secrets(f"crowdlayer.report: {one_line(str(error))}"), file=sys.stderr)  # noqa: T201
    sys.exit(error.exit_code)
