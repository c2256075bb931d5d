"""One way down: what a module may import is read from its source."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "crowdlayer"

FLOORS = [
    {"errors", "masking", "streams"},
    {"logs", "machine"},
    {"settings"},
    {"storage"},
    {"command"},
    {"answers"},
    {"data"},
    {"learning"},
    {"deployment"},
    {"report"},
    {"inputs", "run_folder", "training"},
    {"job", "check", "peerannot", "predict", "verify", "pack", "process"},
]
"""The modules and packages of crowdlayer/, from the ground up."""
OWNERS = {
    "boto3": {"storage.s3"},
    "botocore": {"storage.s3", "storage.s3_errors", "storage.s3_session", "storage.s3_stream"},
    "obstore": {"storage.fast"},
    "accelerate": {"learning.devices", "learning.learner", "learning.trainer", "report.trackers"},
    "pydantic_settings": {"settings.environment", "settings.values"},
}


def dotted(path: Path) -> str:
    """A module's name below crowdlayer; a package's own file has the package's."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}


def imports(module: str) -> tuple[set[str], set[str]]:
    """What a module imports: modules of ours by their name below crowdlayer, others by their top name."""
    ours: set[str] = set()
    others: set[str] = set()
    home = MODULES[module].relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*home[: len(home) + 1 - node.level], *(node.module or "").split(".")]
            names = [".".join(filter(None, [*base, alias.name])) for alias in node.names]
            ours |= {name if name in MODULES else name.rpartition(".")[0] for name in names} - {""}
        elif isinstance(node, ast.ImportFrom) and node.module:
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return ours, others


def floor(module: str) -> int:
    top = module.split(".")[0]
    return next(number for number, names in enumerate(FLOORS) if top in names)


def test_every_module_has_its_floor() -> None:
    assert set.union(*FLOORS) == {module.split(".")[0] for module in MODULES}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_its_own_package_and_from_floors_below(module: str) -> None:
    package = module.split(".")[0]
    above = {name for name in imports(module)[0] if name.split(".")[0] != package and floor(name) >= floor(module)}
    assert not above, f"{module} imports {sorted(above)}, which are not below it"


def test_no_import_goes_round_in_a_circle() -> None:
    TopologicalSorter({module: imports(module)[0] - {module} for module in MODULES}).prepare()


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_a_library_at_the_edge_has_one_owner(library: str) -> None:
    assert {module for module in MODULES if library in imports(module)[1]} == OWNERS[library]


def test_the_environment_is_read_in_one_place_and_where_others_variables_count() -> None:
    readers = {module for module, path in MODULES.items() if "os.environ" in path.read_text()}
    assert readers == {
        "settings.environment",
        "machine.launch",
        "storage.s3_session",  # AWS_REGION, which botocore does not know; whether the user chose checksums and retries
        "machine.supervisor",  # hands it on
        "report.trackers",  # whether MLflow's and W&B's own variables ask for them
    }


RUN_WHAT_THEY_READ = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def test_nothing_that_is_read_can_run() -> None:
    """No pickle, neither named nor by way of torch and numpy."""
    unsafe = re.compile(
        r"(?<![.\w])(eval|exec)\(|(all_gather|broadcast|gather|scatter|send|recv)_object|allow_pickle=True|weights_only=False"
        r"|torch\.load\((?!.*weights_only=True)|np\.load\((?!.*allow_pickle=False)|yaml\.load\("
    )
    for module, path in MODULES.items():
        assert not imports(module)[1] & RUN_WHAT_THEY_READ, module
        assert not (found := [line for line in path.read_text().splitlines() if unsafe.search(line)]), (module, found)
