"""What the environment may say: settings by their names, one run of a sweep; and every complaint at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crowdlayer.errors import SettingsError
from crowdlayer.settings import influential, load_settings
from tests.conftest import variables
from tests.test_fuzz import fuzzed
from tests.test_settings import NAMES, complaint, loaded

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
    assert complaint(OPTIMIZER=" Lion") == "CROWDLAYER_OPTIMIZER: should be 'sgd', 'adam' or 'adamw', got ' Lion'"
    assert complaint(MAX_CACHE="12GB").endswith(" or should be 'auto', got '12GB'")


def test_a_long_value_is_not_shown_in_full() -> None:
    assert len(complaint(OPTIMIZER="x" * 50_000)) < 400


# --- names -----------------------------------------------------------------------------------------------------------


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
def test_a_name_in_small_letters_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "0.5")

    assert complaint() == f"{name}: is not a setting, did you mean CROWDLAYER_LR?"


def test_an_empty_unknown_variable_is_refused_too() -> None:
    assert "CROWDLAYER_BATCH_SIZ: is not a setting" in complaint(BATCH_SIZ="")


@fuzzed
@given(suffix=st.text(st.characters(codec="utf-8", exclude_characters="\0=")))
def test_any_name_with_our_prefix_is_a_setting_or_refused(suffix: str) -> None:
    if suffix in NAMES:
        return

    assert f"CROWDLAYER_{suffix}: is not a setting" in complaint(**{suffix: "1"})


def test_variables_of_others_are_none_of_our_business(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CROWD_LAYER", "LR", "TASKS"):
        monkeypatch.setenv(name, "x")

    assert loaded().lr == 0.1


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_variable_counts_as_unset(name: str) -> None:
    if name == "TASKS":
        assert complaint(TASKS="") == "CROWDLAYER_TASKS: must be set"
    else:
        assert loaded(**{name: ""}) == loaded()


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
        ({"CROWDLAYER_SWEEP": "1,2", "CROWDLAYER_SWEEP_INDEX": "0"}, "SWEEP: must be a JSON list with an object of"),
        ({"CROWDLAYER_SWEEP": '[{"seed": 0}'}, "SWEEP: must be a list in JSON, or items with commas between them, got"),
        ({"CROWDLAYER_SWEEP": "[]"}, "SWEEP: must have at least one run, got '[]'"),
        ({"CROWDLAYER_SWEEP": '[{"seed": 1, "SEED": 2}]'}, "SWEEP: must have each setting of a run once, 'seed' is"),
        ({"CROWDLAYER_SWEEP": "[", "CROWDLAYER_N_EPOCHS": "none"}, "CROWDLAYER_N_EPOCHS: "),  # all that is wrong
        ({"CROWDLAYER_SWEEP": SWEEP, "CROWDLAYER_N_EPOCHS": "none"}, "CROWDLAYER_N_EPOCHS: "),
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
