"""The demo, but for the minutes that it takes: when it fails."""

from __future__ import annotations

import pytest

from tests.demo import shortcoming

USUAL = {"test_accuracy": 93.2, "train_accuracy": 99.1, "majority_vote_accuracy": 72.3}


def test_a_demo_that_has_learnt_is_none_to_complain_of() -> None:
    assert shortcoming(USUAL) is None


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"test_accuracy": 10.0}, "test_accuracy: must be above 80.0 % and majority vote's 72.3 %, is 10.0 %"),
        ({"train_accuracy": 72.3}, "train_accuracy: must be above 95.0 % and majority vote's 72.3 %, is 72.3 %"),
        ({"majority_vote_accuracy": 95.0}, "test_accuracy: must be above 80.0 % and"),
        ({"test_accuracy": float("nan")}, "test_accuracy: must be above"),
    ],
)
def test_a_demo_no_better_than_chance_or_majority_vote_fails(found: dict[str, float], told: str) -> None:
    assert told in str(shortcoming(USUAL | found))
