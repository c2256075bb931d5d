"""The settings: typed values, checked once, that everything above takes by name."""

from .environment import PREFIX, Settings, load_settings, setting_complaints
from .groups import NO_INFLUENCE, DataSettings, JobSettings, RunSettings, TrainingSettings, influential
from .table import table
from .values import ARCHIVES, FileName, as_location, folder_and_name, is_archive, name_of, nearest, one_spelling, quoted

__all__ = [
    "ARCHIVES",
    "NO_INFLUENCE",
    "PREFIX",
    "DataSettings",
    "FileName",
    "JobSettings",
    "RunSettings",
    "Settings",
    "TrainingSettings",
    "as_location",
    "folder_and_name",
    "influential",
    "is_archive",
    "load_settings",
    "name_of",
    "nearest",
    "one_spelling",
    "quoted",
    "setting_complaints",
    "table",
]
