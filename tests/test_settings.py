"""The settings as a whole: what there is, as people read of it, and what holds where nothing is said."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from crowdlayer.errors import SettingsError
from crowdlayer.settings import DataSettings, JobSettings, Settings, TrainingSettings, load_settings, table
from tests.conftest import variables

NAMES = [name.upper() for name in Settings.model_fields]


def complaint(**settings: str) -> str:
    """What a user is told who sets these beside TASKS."""
    with variables(**{"TASKS": "/data"} | settings), pytest.raises(SettingsError) as refused:
        load_settings()
    return str(refused.value)


def loaded(**settings: str) -> Settings:
    with variables(**{"TASKS": "/data"} | settings):
        return load_settings()


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_says_what_it_means(name: str) -> None:
    row = {row.name: row for row in table()}[f"CROWDLAYER_{name}"]

    assert row.text.endswith(".")
    assert "\n" not in row.text
    assert row.type


def test_the_table_has_every_setting_once_and_no_other() -> None:
    assert sorted(row.name for row in table()) == sorted(f"CROWDLAYER_{name}" for name in NAMES)


def test_the_table_shows_types_defaults_and_units_as_a_user_would_write_them() -> None:
    rows = {row.name.removeprefix("CROWDLAYER_"): (row.type, row.default, row.unit) for row in table()}

    assert rows["TASKS"] == ("text", "required", "")
    assert rows["PRETRAINED"] == ("true|false or text", "false", "")
    assert rows["VERBOSE"] == ("true|false", "true", "")
    assert rows["MILESTONES"] == ("list of integer", "50", "epochs")
    assert rows["IMG_SIZE"] == ("integer", "224", "pixels")
    assert rows["NUM_WORKERS"] == ("integer or auto", "auto", "threads")
    assert rows["OPTIMIZER"] == ("sgd|adam|adamw", "sgd", "")
    assert rows["LR"] == ("number", "0.1", "")


def test_every_shown_default_is_the_default() -> None:
    shown = {row.name.removeprefix("CROWDLAYER_"): row.default for row in table()}
    said = {name: default for name, default in shown.items() if default not in ("", "required")}

    assert loaded(**said) == loaded()


def test_the_contracts_defaults_hold() -> None:
    settings = loaded()

    assert (settings.output_name, settings.workdir, settings.model) == ("crowdlayer", None, "resnet18")
    assert (settings.pretrained, settings.freeze, settings.select_by) == (False, False, "loss")
    assert (settings.scale, settings.loss_reduction, settings.optimizer) == (0, "task", "sgd")
    assert (settings.n_epochs, settings.batch_size, settings.lr) == (100, 64, 0.1)
    assert (settings.momentum, settings.decay) == (0.9, 5e-4)
    assert (settings.scheduler, settings.milestones, settings.lr_decay) == ("multistep", (50,), 0.1)
    assert (settings.img_size, settings.data_augmentation, settings.val_fraction) == (224, False, 0.1)
    assert (settings.seed, settings.mixed_precision, settings.num_workers) == (0, "auto", "auto")
    assert (settings.log_format, settings.verbose) == ("text", True)


def test_settings_cannot_be_changed() -> None:
    settings = loaded()

    with pytest.raises(ValidationError, match="frozen"):
        settings.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("group", [DataSettings, TrainingSettings, JobSettings])
def test_a_group_refuses_names_that_it_does_not_have(group: type[DataSettings]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        group.model_validate({"tasks": "/data", "epochs": 3})


def test_reading_the_settings_does_not_wait_for_torch() -> None:
    heavy = {"torch", "torchvision", "accelerate", "boto3", "numpy"}
    program = (
        "import os, sys; os.environ |= {'CROWDLAYER_TASKS': 'x', 'CROWDLAYER_MODEL': 'resnet50'}\n"
        "import crowdlayer.settings; crowdlayer.settings.load_settings(); crowdlayer.settings.table()\n"
        f"print(*{heavy!r} & sys.modules.keys())"
    )

    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert shown.stdout.split() == []
