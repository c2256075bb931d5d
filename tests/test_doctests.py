"""The examples in the docstrings of the public names run as they stand, one after the other."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import crowdlayer
from tests.crowds import write_shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the data set `shapes` in it; a model is trained there by the first example."""
    path = tmp_path_factory.mktemp("examples")
    write_shapes(path / "shapes")
    return path


@pytest.mark.parametrize("name", ["Crowdlayer", "CrowdLayer", "load"])
def test_the_example_of_a_public_name(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    public = getattr(crowdlayer, name)
    module = importlib.import_module(public.__module__)
    (example,) = [test for test in doctest.DocTestFinder(recurse=False).find(public, name, module) if test.examples]
    assert len(example.examples) <= 10
    assert doctest.DocTestRunner().run(example).failed == 0


def test_every_public_name_has_an_example() -> None:
    assert {name for name in crowdlayer.__all__ if name != "__version__"} == {"Crowdlayer", "CrowdLayer", "load"}


def test_an_import_has_no_side_effect() -> None:
    """Neither a log handler, nor a thread, nor torch, nor a changed random number."""
    program = """
import logging, random, sys, threading, warnings
before = random.getstate(), warnings.filters[:], dict(logging.root.manager.loggerDict)
import crowdlayer
assert (random.getstate(), warnings.filters[:], dict(logging.root.manager.loggerDict)) == before
assert "torch" not in sys.modules and threading.active_count() == 1 and not logging.root.handlers
from crowdlayer import CrowdLayer, Crowdlayer, load
assert not logging.root.handlers and not logging.getLogger("crowdlayer").handlers
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=120)
