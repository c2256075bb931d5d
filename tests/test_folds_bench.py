"""The bench of FOLDS, on little: what it says of a share is what can be counted there."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from tests.bench.crowds import share
from tests.bench.folds import BY_HEART, DATA, by_heart, compared, table


def test_a_share_is_judged_four_ways_and_a_table_has_their_means() -> None:
    condition = replace(DATA[f"{BY_HEART}, 2"], budget={"n_epochs": 1})
    part = share(by_heart(0), 0, 0, 5, 60, None)
    found = compared(part, condition, 0)
    assert list(found) == [f"{n} by {by}" for by in ("val/", "held-out answers") for n in (0, 5)]
    assert all(0 <= value <= 1 for one in found.values() for value in (one.right, one.score, one.found, one.holds))
    assert found["0 by val/"] != found["5 by val/"]

    ones = dict.fromkeys(asdict(found["0 by val/"]), 1.0)
    seeds = ones, ones | {"right": 0.5}
    lines: list[dict[str, object]] = [{"data": "by heart, 2", "found": {"0 by val/": figures}} for figures in seeds]
    assert table(lines).splitlines()[-1] == f"| by heart, 2 | 0 by val/ | 0.750 {'| 1.000 ' * 5}| 2 |"


def test_workers_by_heart_are_as_good_as_they_are_made() -> None:
    pool = by_heart(1)
    right = pool.answers.label == pool.truth[pool.answers.task]
    shares = [right[pool.answers.worker == worker].mean() for worker in range(20)]
    assert len(pool.answers) == 5 * 800
    assert min(shares) == pytest.approx(0.4, abs=0.15)
    assert max(shares) == pytest.approx(0.9, abs=0.15)
    assert np.mean(right) == pytest.approx(0.65, abs=0.1)
