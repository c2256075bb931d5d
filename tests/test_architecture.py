"""One way down: what a module may import is read from its source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "crowdlayer"

FLOORS = [
    {"errors", "cpus"},
    {"launch", "interruption", "last_words"},
    {"drawing", "logs", "settings", "answers", "files", "processes", "memory", "supervisor", "watchdog"},
    {"command"},
    {"answer_files"},
    {"label_studio", "trackers"},
    {"convert"},
    {
        "rows",
        "classes",
        "s3",
        "archive",
        "crowd_layer",
        "metrics",
        "charts",
        "pages",
        "classifier",
        "images",
        "decoding",
        "devices",
    },
    {
        "aggregation",
        "selection",
        "guard",
        "mixup",
        "regularizers",
        "dataset",
        "storage",
        "optimization",
        "deploy",
        "quality",
    },
    {"sync", "trainer", "comparison", "export", "predictor", "inference", "checkpoint"},
    {"features"},
    {"advice"},
    {"experiment", "report"},
    {"baselines"},
    {"tables", "training", "pictures", "view"},
    {"results", "inputs"},
    {"job", "check", "peerannot", "predict", "verify", "pack", "process"},
]
OWNERS = {
    "boto3": {"s3"},
    "botocore": {"s3"},
    "accelerate": {"devices", "trainer", "trackers"},
    "pydantic_settings": {"settings"},
}


def imports(module: str) -> set[str]:
    """What a module imports: ours as `.name`, others by their top name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {f".{node.module}"} if node.module else {f".{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found


def modules() -> set[str]:
    return {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}


def test_every_module_has_its_floor() -> None:
    assert set.union(*FLOORS) == modules()


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_only_from_floors_below(module: str) -> None:
    floor = next(number for number, names in enumerate(FLOORS) if module in names)
    below = set.union(set(), *FLOORS[:floor])
    ours = {name[1:] for name in imports(module) if name.startswith(".")} - {"__version__"}
    assert ours <= below, f"{module} imports {sorted(ours - below)}, which are not below it"


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_a_library_at_the_edge_has_one_owner(library: str) -> None:
    assert {module for module in modules() if library in imports(module)} == OWNERS[library]


def test_the_environment_is_read_in_one_place_and_where_others_variables_count() -> None:
    readers = {module for module in modules() if "os.environ" in (PACKAGE / f"{module}.py").read_text()}
    assert readers == {
        "settings",
        "launch",
        "s3",  # whether the user chose botocore's checksums and retries
        "supervisor",  # hands it on
        "trackers",  # whether MLflow's and W&B's own variables ask for them
    }
