"""Bad input of every kind, each with the exit code and the words that it must have.

A case is a small good data set, spoiled, and settings. `{data}` in a setting is the folder of the data set, `{tmp}` the
folder above it.
"""

from __future__ import annotations

from tests.catalogue.answers import ANSWERS, METADATA
from tests.catalogue.archives import ARCHIVES
from tests.catalogue.images import IMAGES
from tests.catalogue.names import NAMES
from tests.catalogue.places import PLACES
from tests.catalogue.settings import SETTINGS

CATALOGUE = [*SETTINGS, *ANSWERS, *METADATA, *IMAGES, *NAMES, *ARCHIVES, *PLACES]
