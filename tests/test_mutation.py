"""Mutants have one fault each."""

from __future__ import annotations

import ast

from tests.mutation import mutants

SOURCE = """
def f(a: int | None) -> bool:
    if a < 2 and a:
        raise ValueError
    g(a)
    return not a
"""


def test_a_mutant_is_the_module_with_one_fault_and_types_are_left_alone() -> None:
    found = mutants(SOURCE)
    assert {(mutant.line, mutant.before, mutant.after) for mutant in found} == {
        (3, "if a < 2 and a:", "if not (a < 2 and a):"),
        (3, "a < 2 and a", "a < 2 or a"),
        (3, "a < 2", "a <= 2"),
        (3, "2", "3"),
        (4, "raise ValueError", "pass"),
        (5, "g(a)", "pass"),
        (6, "return not a", "return None"),
        (6, "not a", "a"),
    }
    whole = ast.unparse(ast.parse(SOURCE)).splitlines()
    for mutant in found:
        lines = mutant.source.splitlines()
        assert [at for at, line in enumerate(lines, 2) if line != whole[at - 2]] == [mutant.line]


def test_what_is_the_same_program_is_no_mutant() -> None:
    assert mutants("def f() -> None:\n    return None\n") == []
