"""The forms that a setting's value may have: what is taken, as what, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from crowdlayer.errors import SettingsError
from crowdlayer.settings import load_settings, name_of
from crowdlayer.settings.values import classification_models
from tests.conftest import variables
from tests.test_fuzz import fuzzed
from tests.test_settings import NAMES, complaint, loaded

# --- words and numbers -----------------------------------------------------------------------------------------------


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
        ("GUARD", " FALSE ", False),
    ],
)
def test_words_may_come_in_any_case_and_with_blanks_around_them(name: str, value: str, meant: object) -> None:
    assert getattr(loaded(**{name: value}), name.lower()) == meant


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
        ("MIXUP", "0", "-1"),
        ("MIXUP", "0.01", "0.009"),
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
        ("GRACE", "1e9", "1e10"),
        ("TIMEOUT", "1e9", "1e10"),  # torch, which counts nanoseconds, would wait for no time at all
    ],
)
def test_some_numbers_have_a_largest_value(name: str, most: str, above: str) -> None:
    assert getattr(loaded(**{name: most}), name.lower()) == float(most)
    assert complaint(**{name: above}).startswith(f"CROWDLAYER_{name}: ")


# --- lists -----------------------------------------------------------------------------------------------------------


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


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["run-1", "digits_v2.1", "a", "Ünï", "x" * 200, "a b", "mail@home=1+1"])
def test_an_output_name_is_a_file_name(value: str) -> None:
    assert loaded(OUTPUT_NAME=value).output_name == value


@pytest.mark.parametrize("value", ["../x", "a/b", ".hidden", "a\nb", "x" * 201, "é" * 101, "-rf", "a\\b", " "])
def test_an_output_name_that_is_no_file_name_is_refused(value: str) -> None:
    assert complaint(OUTPUT_NAME=value).startswith("CROWDLAYER_OUTPUT_NAME: must be a file name")


@pytest.mark.parametrize("value", ["run.json", "run.PTH"])
def test_an_output_name_is_none_of_another_runs_files(value: str) -> None:
    """The folder results/run.json of one would be the place of the other's results."""
    assert complaint(OUTPUT_NAME=value).startswith("CROWDLAYER_OUTPUT_NAME: must be a file name without .json and .pth")


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
        ("s3://bucket//pre/fix//", "s3://bucket/pre/fix"),
        ("s3://bucket//", "s3://bucket"),
        ("s3://bucket/pre//fix", "s3://bucket/pre//fix"),  # a key may be so
        ("s3://bucket/a b/ü@home", "s3://bucket/a b/ü@home"),
        ("s3://my.bucket-1/x", "s3://my.bucket-1/x"),
        ("s3://arn:aws:s3:eu-west-1:123456789012:accesspoint:mine/x",) * 2,
        (
            "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/mine/x/",
            "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint:mine/x",
        ),
        (
            "s3://arn:aws:s3-outposts:eu-west-1:123456789012:outpost/op-1/accesspoint/mine/x",
            "s3://arn:aws:s3-outposts:eu-west-1:123456789012:outpost:op-1:accesspoint:mine/x",
        ),
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


@pytest.mark.parametrize("name", ["TASKS", "OUTPUT", "WORKDIR", "METRICS_FILE"])
@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (" /results", "must have no blanks around it"),
        ("/results ", "must have no blanks around it"),
        ("~/results", "must be written out, without ~"),
    ],
)
def test_a_path_that_no_shell_has_seen_is_no_other_folder(name: str, value: str, rule: str) -> None:
    """Results would lie in a folder named " ", or go with the container."""
    assert f"CROWDLAYER_{name}: {rule}, got '{value}'" in complaint(**{name: value})


@pytest.mark.parametrize("value", ['"a,b"', """'["a", "b"]'""", "'a, b' "])
def test_quotes_that_an_env_file_leaves_are_in_no_class_name(value: str) -> None:
    assert "CROWDLAYER_CLASSES: must be a list without quotes around it" in complaint(CLASSES=value)


@pytest.mark.parametrize(
    ("value", "rule"), [("200 %", "must be at most 100 %"), ("1.2.3 %", "should be a valid number")]
)
def test_a_percentage_is_one(value: str, rule: str) -> None:
    assert f"CROWDLAYER_MAX_BAD_IMAGES: {rule}" in complaint(MAX_BAD_IMAGES=value)


@pytest.mark.parametrize("value", ["s3://bucket/x", "s3:/bucket", "https://host/x", " "])
def test_the_working_folder_is_on_this_machine(value: str) -> None:
    assert "CROWDLAYER_WORKDIR: must be a folder on this machine" in complaint(WORKDIR=value)


@pytest.mark.parametrize(
    ("tasks", "name"),
    [
        ("/data/birds", "birds"),
        ("s3://bucket/data/birds", "birds"),
        ("s3://birds", "birds"),
        ("s3://birds.zip", "birds.zip"),
        ("s3://bucket/birds.TAR.gz", "birds"),
        ("birds.zip", "birds"),
        ("/data/birds.tgz", "birds"),
        (".", "birds"),
    ],
)
def test_a_data_set_is_called_as_its_folder_or_archive_is(
    tasks: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path / "birds")
    assert name_of(tasks) == name


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
@hypothesis.settings(fuzzed, max_examples=max(500, fuzzed.max_examples))  # of all settings
def test_any_text_is_taken_or_refused_as_a_setting(name: str, value: str) -> None:
    with variables(**{"TASKS": "/data"} | {name: value}):
        try:
            settings = load_settings()
        except SettingsError as error:
            assert f"CROWDLAYER_{name}: " in str(error)  # noqa: PT017  it may be taken, too
        else:
            assert settings.output_location
