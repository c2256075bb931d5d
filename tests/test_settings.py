"""The settings: what the environment may say, and what a user is told where it says something else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import hypothesis
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from crowdlayer.errors import SettingsError
from crowdlayer.settings import (
    DataSettings,
    JobSettings,
    Settings,
    TrainingSettings,
    influential,
    load_settings,
    table,
)
from crowdlayer.settings.values import classification_models

NAMES = [name.upper() for name in Settings.model_fields]


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment, with the one setting that is required."""
    monkeypatch.setenv("CROWDLAYER_TASKS", "/data")
    return monkeypatch


@contextmanager
def variables(**settings: str) -> Iterator[None]:
    """These settings in the environment, for a while; a fixture would last for all of hypothesis' examples."""
    names = {f"CROWDLAYER_{name}": value for name, value in settings.items()}
    os.environ.update(names)
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


def complaint(**settings: str) -> str:
    """What a user is told who sets these beside TASKS."""
    with variables(**{"TASKS": "/data"} | settings), pytest.raises(SettingsError) as refused:
        load_settings()
    return str(refused.value)


def loaded(**settings: str) -> Settings:
    with variables(**{"TASKS": "/data"} | settings):
        return load_settings()


# --- the whole -------------------------------------------------------------------------------------------------------


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


def test_every_shown_default_is_the_default(env: pytest.MonkeyPatch) -> None:
    defaults = load_settings()
    for row in table():
        if row.default not in ("", "required"):
            env.setenv(row.name, row.default)

    assert load_settings() == defaults


def test_the_contracts_defaults_hold(env: pytest.MonkeyPatch) -> None:
    settings = load_settings()

    assert (settings.output_name, settings.workdir, settings.model) == ("crowdlayer", None, "resnet18")
    assert (settings.pretrained, settings.freeze, settings.select_by) == (False, False, "loss")
    assert (settings.scale, settings.loss_reduction, settings.optimizer) == (0, "task", "sgd")
    assert (settings.n_epochs, settings.batch_size, settings.lr) == (100, 64, 0.1)
    assert (settings.momentum, settings.decay) == (0.9, 5e-4)
    assert (settings.scheduler, settings.milestones, settings.lr_decay) == ("multistep", (50,), 0.1)
    assert (settings.img_size, settings.data_augmentation, settings.val_fraction) == (224, False, 0.1)
    assert (settings.seed, settings.mixed_precision, settings.num_workers) == (0, "auto", "auto")
    assert (settings.log_format, settings.verbose) == ("text", True)


def test_settings_cannot_be_changed(env: pytest.MonkeyPatch) -> None:
    settings = load_settings()

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


# --- complaints ------------------------------------------------------------------------------------------------------


def test_a_missing_data_set_is_named() -> None:
    with pytest.raises(SettingsError, match=r"^CROWDLAYER_TASKS: must be set$"):
        load_settings()


def test_all_complaints_come_at_once() -> None:
    with variables(N_EPOCHS="0", LR="fast", BATCH_SIZ="8", MODEL="resnet19"), pytest.raises(SettingsError) as refused:
        load_settings()

    parts = sorted(str(refused.value).split("; "))
    assert [part.partition(":")[0] for part in parts] == [
        "CROWDLAYER_BATCH_SIZ",
        "CROWDLAYER_LR",
        "CROWDLAYER_MODEL",
        "CROWDLAYER_N_EPOCHS",
        "CROWDLAYER_TASKS",
    ]


def test_a_complaint_names_the_setting_the_rule_and_the_value() -> None:
    assert complaint(N_EPOCHS="0") == "CROWDLAYER_N_EPOCHS: should be greater than or equal to 1, got '0'"
    assert complaint(OPTIMIZER="lion") == "CROWDLAYER_OPTIMIZER: should be 'sgd', 'adam' or 'adamw', got 'lion'"


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("BATCH_SIZ", "BATCH_SIZE"),
        ("N_EPOCH", "N_EPOCHS"),
        ("EPOCHS", "N_EPOCHS"),
        ("MILESTONE", "MILESTONES"),
        ("WORK_DIR", "WORKDIR"),
        ("REGULARISER", "REGULARIZER"),
        ("OUTPUTNAME", "OUTPUT_NAME"),
    ],
)
def test_a_misspelt_setting_is_refused_with_the_nearest_name(misspelt: str, meant: str) -> None:
    refused = f"CROWDLAYER_{misspelt}: is not a setting, did you mean CROWDLAYER_{meant}?"
    assert complaint(**{misspelt: "1"}) == refused


def test_a_setting_like_none_is_refused_without_a_guess() -> None:
    assert complaint(XYZZY="1") == "CROWDLAYER_XYZZY: is not a setting"


@pytest.mark.parametrize("name", ["crowdlayer_lr", "CROWDLAYER_lr", "Crowdlayer_Lr"])
def test_a_name_in_small_letters_is_refused(env: pytest.MonkeyPatch, name: str) -> None:
    env.setenv(name, "0.5")

    with pytest.raises(SettingsError, match=f"^{name}: is not a setting, did you mean CROWDLAYER_LR\\?$"):
        load_settings()


def test_an_empty_unknown_variable_is_refused_too() -> None:
    assert "CROWDLAYER_BATCH_SIZ: is not a setting" in complaint(BATCH_SIZ="")


def test_variables_of_others_are_none_of_our_business(env: pytest.MonkeyPatch) -> None:
    env.setenv("CROWD_LAYER", "x")
    env.setenv("LR", "x")
    env.setenv("TASKS", "x")

    assert load_settings().lr == 0.1


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_variable_counts_as_unset(name: str) -> None:
    if name == "TASKS":
        assert complaint(TASKS="") == "CROWDLAYER_TASKS: must be set"
    else:
        assert loaded(**{name: ""}) == loaded()


def test_a_long_value_is_not_shown_in_full() -> None:
    assert len(complaint(OPTIMIZER="x" * 50_000)) < 400


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["10,20,40", " 10, 20 ,40", "[10, 20, 40]", "40,20,10", "[10,10,20,40]"])
def test_milestones_come_with_commas_or_as_json_in_any_order(value: str) -> None:
    assert loaded(MILESTONES=value).milestones == (10, 20, 40)


@pytest.mark.parametrize("value", ["10,,20", "0", "10;20", "[10", "{}", '["a"]', "1.5", "[[10]]", "[" * 60_000])
def test_milestones_that_are_no_list_of_epochs_are_refused(value: str) -> None:
    assert complaint(MILESTONES=value).startswith("CROWDLAYER_MILESTONES: ")


def test_no_milestones_are_an_empty_json_list() -> None:
    assert loaded(MILESTONES="[]").milestones == ()


@pytest.mark.parametrize("value", ["plane,car,bird", "plane, car , bird", '["plane", "car", "bird"]'])
def test_class_names_keep_the_order_in_which_they_are_given(value: str) -> None:
    assert loaded(CLASSES=value).classes == ("plane", "car", "bird")


def test_a_class_name_with_a_comma_needs_json() -> None:
    assert loaded(CLASSES='["cat, big", "cat, small"]').classes == ("cat, big", "cat, small")


@pytest.mark.parametrize(
    "value", ["cat", "cat,cat", "cat,", '["cat", 3]', '["cat", ""]', "null", '["a", "b\\n"]', '["\\ud800", "b"]']
)
def test_class_names_that_do_not_tell_classes_apart_are_refused(value: str) -> None:
    assert complaint(CLASSES=value).startswith("CROWDLAYER_CLASSES: ")


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("OPTIMIZER", "AdamW", "adamw"),
        ("SCHEDULER", "Cosine", "cosine"),
        ("SCHEDULER", "NONE", "none"),
        ("SELECT_BY", " Last ", "last"),
        ("LOSS_REDUCTION", "ANSWER", "answer"),
        ("MODEL", "ResNet50", "resnet50"),
        ("CROWD_LAYER", "MATRIX", "matrix"),
        ("MIXED_PRECISION", "No", "no"),
        ("NUM_WORKERS", "AUTO", "auto"),
        ("NUM_WORKERS", "0", 0),
        ("LOG_FORMAT", "JSON", "json"),
        ("SMALL_IMAGES", "True", "true"),
        ("FREEZE", "TRUE", True),
        ("DATA_AUGMENTATION", "True", True),
        ("VERBOSE", "False", False),
    ],
)
def test_words_may_come_in_any_case(name: str, value: str, meant: object) -> None:
    assert getattr(loaded(**{name: value}), name.lower()) == meant


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("weights.pth", "weights.pth"),
        ("/models/resnet18.pth", "/models/resnet18.pth"),
        ("s3://bucket/models/resnet18.pth", "s3://bucket/models/resnet18.pth"),
    ],
)
def test_pretrained_is_yes_or_no_or_where_the_weights_are(value: str, meant: bool | str) -> None:
    assert loaded(PRETRAINED=value).pretrained == meant


def test_pretrained_elsewhere_on_the_web_is_refused() -> None:
    assert "CROWDLAYER_PRETRAINED" in complaint(PRETRAINED="https://download.pytorch.org/models/resnet18.pth")


@pytest.mark.parametrize(("value", "meant"), [("2 %", 0.02), ("3", 3), ("1", 1), ("0.5", 0.5)])
def test_broken_images_are_a_share_or_a_number(value: str, meant: float) -> None:
    assert loaded(MAX_BAD_IMAGES=value).max_bad_images == meant


def test_all_images_are_more_than_one() -> None:
    assert 0.999 < loaded(MAX_BAD_IMAGES="100%").max_bad_images < 1


@pytest.mark.parametrize("name", ["VAL_FRACTION", "SCALE", "LR", "MOMENTUM", "DECAY", "LR_DECAY"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "-0.1"])
def test_numbers_that_no_run_survives_are_refused(name: str, value: str) -> None:
    assert complaint(**{name: value}).startswith(f"CROWDLAYER_{name}: ")


@pytest.mark.parametrize(
    ("name", "least", "below"),
    [
        ("N_CLASSES", "2", "1"),
        ("N_EPOCHS", "1", "0"),
        ("BATCH_SIZE", "1", "0"),
        ("IMG_SIZE", "8", "7"),
        ("SEED", "0", "-1"),
        ("NUM_WORKERS", "0", "-1"),
        ("SCALE", "0", "-1"),
        ("DECAY", "0", "-1"),
        ("MOMENTUM", "0", "-0.1"),
        ("LR", "1e-9", "0"),
        ("LR_DECAY", "1e-9", "0"),
        ("VAL_FRACTION", "1e-9", "0"),
    ],
)
def test_a_number_has_a_least_value(name: str, least: str, below: str) -> None:
    assert getattr(loaded(**{name: least}), name.lower()) == float(least)
    assert complaint(**{name: below}).startswith(f"CROWDLAYER_{name}: ")


@pytest.mark.parametrize(
    ("name", "most", "above"),
    [
        ("IMG_SIZE", "4096", "4097"),
        ("SEED", "4294967295", "4294967296"),
        ("MOMENTUM", "0.999", "1"),
        ("LR_DECAY", "1", "1.1"),
        ("VAL_FRACTION", "0.999", "1"),
    ],
)
def test_some_numbers_have_a_largest_value(name: str, most: str, above: str) -> None:
    assert getattr(loaded(**{name: most}), name.lower()) == float(most)
    assert complaint(**{name: above}).startswith(f"CROWDLAYER_{name}: ")


@pytest.mark.parametrize("value", ["run-1", "digits_v2.1", "a", "Ünï", "x" * 200, "a b", "mail@home=1+1"])
def test_an_output_name_is_a_file_name(value: str) -> None:
    assert loaded(OUTPUT_NAME=value).output_name == value


@pytest.mark.parametrize("value", ["../x", "a/b", ".hidden", "a\nb", "x" * 201, "é" * 101, "-rf", "a\\b", " "])
def test_an_output_name_that_is_no_file_name_is_refused(value: str) -> None:
    assert complaint(OUTPUT_NAME=value).startswith("CROWDLAYER_OUTPUT_NAME: must be a file name")


def test_the_known_models_are_torchvisions_classification_models() -> None:
    import torchvision

    assert sorted(classification_models()) == sorted(torchvision.models.list_models(module=torchvision.models))


def test_a_model_that_is_not_there_is_refused_with_the_nearest() -> None:
    assert "did you mean resnet" in complaint(MODEL="resnet19")
    assert "is not a classification model" in complaint(MODEL="fasterrcnn_resnet50_fpn")


# --- locations -------------------------------------------------------------------------------------------------------

LOCATIONS = ["TASKS", "ANSWERS", "OUTPUT", "PATH_REMOVE", "PRETRAINED"]


@pytest.mark.parametrize("name", LOCATIONS)
@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("/data/set", "/data/set"),
        ("data", "data"),
        ("data/", "data"),
        ("/", "/"),
        ("./a folder/with spaces", "./a folder/with spaces"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/pre/fix/", "s3://bucket/pre/fix"),
        ("s3://bucket/a b/ü@home", "s3://bucket/a b/ü@home"),
        ("s3://my.bucket-1/x", "s3://my.bucket-1/x"),
        ("s3://arn:aws:s3:eu-west-1:123456789012:accesspoint:mine/x",) * 2,
    ],
)
def test_a_location_is_a_path_or_an_s3_uri(name: str, value: str, meant: str) -> None:
    assert getattr(loaded(**{name: value}), name.lower()) == meant


@pytest.mark.parametrize("name", LOCATIONS)
@pytest.mark.parametrize(
    "value",
    [
        "https://bucket.s3.amazonaws.com/x",
        "gs://bucket/x",
        "file:///data",
        "S3://bucket/x",
        "s3://",
        " s3://bucket/x",
        '"s3://bucket/x"',
        "'/data/x'",
        "s3:///x",
        "s3:/bucket/x",
        "s3:bucket/x",
        "s3://bucket/x?versionId=3",
        "s3://bucket/x#part",
        "s3://bucket/a\nb",
        "s3://bucket name/x",
        "s3://user@bucket/x",
        "s3://bucket/\udcff",
        "/data/\udcff",
        "/data\n",
        "   ",
    ],
)
def test_any_other_location_is_refused(name: str, value: str) -> None:
    assert complaint(**{name: value}).startswith(f"CROWDLAYER_{name}: ")


@pytest.mark.parametrize("name", [*LOCATIONS, "WORKDIR", "MODEL", "N_EPOCHS"])
@pytest.mark.parametrize(
    "value",
    [
        "s3://AKIAEXAMPLE:sEcReT@bucket/x",
        "s3://AKIAEXAMPLE:sEc/ReT@bucket/x",
        "s3://AKIAEXAMPLE:sEc@ReT@bucket/x",
        "https://AKIAEXAMPLE:sEcReT@store.example/bucket",
        "s3://bucket/x?X-Amz-Credential=AKIAEXAMPLE&X-Amz-Signature=sEcReT",
        "s3://bucket/x#AKIAEXAMPLE:sEcReT",
    ],
)
def test_a_secret_in_a_uri_is_refused_and_not_repeated(name: str, value: str) -> None:
    told = complaint(**{name: value})

    assert "***" in told
    assert not any(secret in told for secret in ("AKIAEXAMPLE", "sEc", "ReT"))


@pytest.mark.parametrize("value", ["s3://bucket/x", "s3:/bucket", "https://host/x", " "])
def test_the_working_folder_is_on_this_machine(value: str) -> None:
    assert "CROWDLAYER_WORKDIR: must be a folder on this machine" in complaint(WORKDIR=value)


@pytest.mark.parametrize(
    ("tasks", "output"),
    [
        ("/data/set", "/data/set"),
        ("set", "set"),
        ("s3://bucket/set", "s3://bucket/set"),
        ("s3://bucket", "s3://bucket"),
        ("/data/set.tar", "/data"),
        ("/data/set.tar.gz", "/data"),
        ("data/set.TGZ", "data"),
        ("set.zip", "."),
        ("/set.zip", "/"),
        ("s3://bucket/a/set.zip", "s3://bucket/a"),
        ("s3://bucket/set.zip", "s3://bucket"),
    ],
)
def test_results_go_to_the_data_set_or_to_the_folder_of_its_archive(tasks: str, output: str) -> None:
    assert loaded(TASKS=tasks).output_location == output
    assert loaded(TASKS=tasks, OUTPUT="/elsewhere").output_location == "/elsewhere"


# --- anything --------------------------------------------------------------------------------------------------------

ANY_TEXT = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    st.binary().map(lambda raw: os.fsdecode(raw.replace(b"\0", b""))),  # what an environment can hold
    st.from_regex(r"\A(s3|S3|file|)(://|:/|:|)[\[\]{}\",.a-z0-9@:/?#-]*\Z"),
    st.from_regex(r"\A-?[0-9_]*\.?[0-9]*(e-?[0-9]+)?\Z"),
)


@given(name=st.sampled_from(NAMES), value=ANY_TEXT)
@example(name="MILESTONES", value="[" * 60_000)
@example(name="MILESTONES", value="[NaN]")
@example(name="CLASSES", value="[" + "9" * 5_000 + "]")
@example(name="N_EPOCHS", value="9" * 5_000)
@example(name="PRETRAINED", value="s3://[")
@hypothesis.settings(max_examples=500, deadline=None)  # a machine may be busy
def test_any_text_is_taken_or_refused_as_a_setting(name: str, value: str) -> None:
    with variables(**{"TASKS": "/data"} | {name: value}):
        try:
            settings = load_settings()
        except SettingsError as error:
            assert f"CROWDLAYER_{name}: " in str(error)  # noqa: PT017  it may be taken, too
        else:
            assert settings.output_location


@hypothesis.settings(deadline=None)
@given(suffix=st.text(st.characters(codec="utf-8", exclude_characters="\0=")))
def test_any_name_with_our_prefix_is_a_setting_or_refused(suffix: str) -> None:
    if suffix in NAMES:
        return

    assert f"CROWDLAYER_{suffix}: is not a setting" in complaint(**{suffix: "1"})


# --- several runs ----------------------------------------------------------------------------------------------------


SWEEP = '[{"seed": 0}, {"seed": 1, "LR": 0.01, "milestones": [3]}, {"tasks": "other", "output_name": "own"}]'


def test_an_element_of_an_array_takes_its_own_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROWDLAYER_TASKS", "data")
    monkeypatch.setenv("CROWDLAYER_SWEEP", SWEEP)
    monkeypatch.setenv("CROWDLAYER_LR", "0.5")
    monkeypatch.setenv("AWS_BATCH_JOB_ARRAY_INDEX", "1")
    settings = load_settings()
    assert (settings.seed, settings.lr, settings.milestones) == (1, 0.01, (3,))
    assert (settings.tasks, settings.output_name, settings.sweep_index) == ("data", "crowdlayer-1", 1)

    monkeypatch.setenv("CROWDLAYER_SWEEP_INDEX", "0")  # goes before
    settings = load_settings()
    assert (settings.seed, settings.lr, settings.output_name) == (0, 0.5, "crowdlayer-0")


def test_an_entry_may_have_what_must_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROWDLAYER_SWEEP", SWEEP)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    settings = load_settings()
    assert (settings.tasks, settings.output_name) == ("other", "own")


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"CROWDLAYER_SWEEP": SWEEP}, "CROWDLAYER_SWEEP_INDEX: must be set, this run is in no array"),
        ({"CROWDLAYER_SWEEP": SWEEP, "SLURM_ARRAY_TASK_ID": "3"}, "SLURM_ARRAY_TASK_ID: must be below 3"),
        ({"CROWDLAYER_SWEEP": SWEEP, "JOB_COMPLETION_INDEX": "1", "NNODES": "2"}, "SWEEP_INDEX: must be set"),
        ({"CROWDLAYER_SWEEP": '[{"sed": 1}]', "CROWDLAYER_SWEEP_INDEX": "0"}, "'sed' is not a setting, did you mean"),
        ({"CROWDLAYER_SWEEP": '[{"seed": "x"}]', "CROWDLAYER_SWEEP_INDEX": "0"}, "CROWDLAYER_SEED: "),
        ({"CROWDLAYER_SWEEP": '[{"sweep": []}]', "CROWDLAYER_SWEEP_INDEX": "0"}, "'sweep' is not a setting"),
        ({"CROWDLAYER_SWEEP": "1,2", "CROWDLAYER_SWEEP_INDEX": "0"}, "CROWDLAYER_SWEEP: "),
        ({"CROWDLAYER_SWEEP": "[", "CROWDLAYER_SWEEP_INDEX": "0"}, "CROWDLAYER_SWEEP: "),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], complaint: str
) -> None:
    monkeypatch.setenv("CROWDLAYER_TASKS", "data")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as refused:
        load_settings()
    assert complaint in str(refused.value)


def test_which_run_of_a_sweep_it_is_makes_no_other_run_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROWDLAYER_TASKS", "data")
    alone = load_settings().model_copy(update={"output_name": "crowdlayer-0"})
    monkeypatch.setenv("CROWDLAYER_SWEEP", SWEEP)
    monkeypatch.setenv("CROWDLAYER_SWEEP_INDEX", "0")
    assert influential(load_settings().model_dump()) == influential(alone.model_dump())
