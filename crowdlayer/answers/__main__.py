"""`python -m crowdlayer.answers convert FROM TO`."""

import sys

from .convert import main

sys.exit(main(sys.argv[1:]))
