"""make mutation: how many of the small faults that are put into a module do its tests find?

    python -m tests.mutation                                   # 40 mutants of each module of TESTS, by seed
    python -m tests.mutation --sample 1000 answers/files.py    # all of one module
    python -m tests.mutation --json mutants.json

A mutant has one fault: a comparison, a condition or a number is another, a value is not returned, an error not raised,
a call left out. Texts stay. Its tests run in a fork of this process, which has imported torch once, in a copy of the
checkout. What survives is the same program in other words, or a test is missing; which, somebody must look.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAID_ONCE = ("accelerate", "boto3", "pyarrow.parquet", "pydantic_settings", "torchvision")
"""What takes long to import and is no plugin of pytest; every fork has it."""
SELECTED = "not container and not store and not slow"

ARCHIVES = ["test_archive", "test_files", "test_unpacking", "test_hostile_archives"]
BUCKETS = ["test_s3", "test_s3_errors", "test_s3_session", "test_s3_stream", "test_etags"]
TESTS = {
    "answers/__init__.py": ["test_answers"],
    "answers/convert.py": ["test_convert"],
    "answers/files.py": ["test_answers"],
    "answers/label_studio.py": ["test_convert"],
    "storage/archive.py": ARCHIVES,
    "storage/etags.py": ["test_etags", "test_s3"],
    "storage/fast.py": ["test_fast", *BUCKETS],
    "storage/files.py": ["test_files", "test_archive", "test_manifest", "test_places", "test_sync"],
    "storage/handover.py": ["test_handover"],
    "storage/places.py": ["test_places"],
    "storage/s3.py": BUCKETS,
    "storage/s3_errors.py": BUCKETS,
    "storage/s3_session.py": [*BUCKETS, "test_credentials"],
    "storage/s3_stream.py": [*BUCKETS, "test_unpacking"],
    "storage/buckets.py": ["test_buckets", "test_files", "test_manifest"],
    "storage/manifest.py": ["test_buckets", "test_manifest"],
    "storage/sync.py": ["test_sync", "test_buckets", "test_files", "test_unpacking"],
    "storage/unpacking.py": [*ARCHIVES, "test_manifest"],
    "storage/workdir.py": ["test_workdir", "test_buckets", "test_unpacking"],
    "learning/checkpoint.py": ["test_checkpoint"],
    "learning/spool.py": ["test_checkpoint", "test_tensors", "test_uploads"],
    "learning/uploads.py": ["test_uploads"],
    "report/publishing.py": ["test_publishing", "test_results", "test_verify"],
    "report/results.py": ["test_results", "test_verify"],
}
"""The modules that decide what is read and what is published, and the tests that are theirs."""

COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A module with one fault in it."""

    line: int
    before: str
    after: str
    source: str


def changed(node: ast.AST, **parts: object) -> ast.AST:
    other = copy(node)
    for name, part in parts.items():
        setattr(other, name, part)
    return other


def faults(node: ast.AST) -> Iterator[ast.AST]:
    """What could be there by mistake in place of a node."""
    match node:
        case ast.Compare(ops=[first, *others]):
            yield changed(node, ops=[COMPARED[type(first)](), *others])
        case ast.BoolOp(op=op):
            yield changed(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in COMPUTED:
            yield changed(node, op=COMPUTED[type(op)]())
        case ast.Constant(value=bool(value)):
            yield changed(node, value=not value)
        case ast.Constant(value=int(number) | float(number)):
            yield changed(node, value=number + 1)
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            yield changed(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.Return(value=ast.expr()):
            yield changed(node, value=ast.Constant(None))
        case ast.Raise() | ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()


class Put(ast.NodeTransformer):
    """One node in the place of another."""

    def __init__(self, new: ast.AST, old: ast.AST) -> None:
        self.new, self.old = new, old

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def mutants(source: str) -> list[Mutant]:
    """All there are of a module."""
    tree = ast.parse(source)
    whole = ast.unparse(tree)
    types = {id(part) for annotation in said_types(tree) for part in ast.walk(annotation)}
    found = []
    for node in [node for node in ast.walk(tree) if id(node) not in types]:
        for fault in faults(node):
            line, before = getattr(node, "lineno", 0), shown(node)
            Put(fault, node).visit(tree)
            mutated = ast.unparse(ast.fix_missing_locations(tree))
            Put(node, fault).visit(tree)
            if mutated != whole:  # `return None` has no value to leave out
                found.append(Mutant(line, before, shown(fault), mutated))
    assert ast.unparse(tree) == whole
    return found


def said_types(tree: ast.Module) -> Iterator[ast.AST]:
    """What nobody looks at while the program runs."""
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if annotation := getattr(node, field, None):
                yield annotation


def shown(node: ast.AST) -> str:
    return ast.unparse(node).partition("\n")[0][:100]


def passes(checkout: Path, tests: Sequence[str], timeout: float) -> bool:
    """Whether all of the tests pass, in a process of its own, which has `timeout` seconds."""
    child = os.fork()
    if not child:
        try:
            os.setsid()
            os.chdir(checkout)
            sys.path.insert(0, str(checkout))
            for name in [name for name in sys.modules if name.partition(".")[0] in ("crowdlayer", "tests")]:
                del sys.modules[name]
            said = os.open(checkout / "said", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            for stream in range(3):
                os.dup2(said, stream)
            files = [f"tests/{test}.py" for test in tests]
            code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", SELECTED, *files]))
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    deadline = time.monotonic() + timeout
    ended, status = 0, 0
    while not ended and time.monotonic() < deadline:
        time.sleep(0.02)
        ended, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # it, or the servers that it has left
    if not ended:
        os.waitpid(child, 0)
    return bool(ended) and status == 0


def put(path: Path, source: str) -> None:
    """Write the module and forget what is compiled of it: a mutant may be as long and as old as the one before."""
    path.write_text(source)
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()


def tried(checkout: Path, module: str, sample: int, seed: int) -> dict[str, object]:
    """The score of a module and what survived."""
    path = checkout / "crowdlayer" / module
    source = path.read_text()
    possible = mutants(source)
    chosen = random.Random(f"{seed} {module}").sample(possible, min(sample, len(possible)))
    put(path, ast.unparse(ast.parse(source)))
    started = time.monotonic()
    if not passes(checkout, TESTS[module], 1200):
        raise SystemExit(f"{(checkout / 'said').read_text()}\n{module}: its tests must pass without a fault")
    timeout = 60 + 4 * (time.monotonic() - started)
    survivors = []
    for mutant in chosen:
        put(path, mutant.source)
        if passes(checkout, TESTS[module], timeout):
            survivors.append(mutant)
            print(f"crowdlayer/{module}:{mutant.line}: {mutant.before}  →  {mutant.after}", flush=True)
    put(path, source)
    print(f"{module}: {len(chosen) - len(survivors)} of {len(chosen)} found, {len(possible)} possible", flush=True)
    lines = [{k: v for k, v in asdict(mutant).items() if k != "source"} for mutant in survivors]
    return {"possible": len(possible), "tried": len(chosen), "found": len(chosen) - len(lines), "survivors": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", default=list(TESTS), help="below crowdlayer/")
    parser.add_argument("--sample", type=int, default=40, help="mutants of each module (default: 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the scores and the survivors go")
    options = parser.parse_args()
    if unknown := set(options.modules) - TESTS.keys():
        parser.error(f"MODULE must be one of {', '.join(TESTS)}, not {', '.join(sorted(unknown))}")
    os.environ["OMP_NUM_THREADS"] = "1"
    for package in PAID_ONCE:
        importlib.import_module(package)
    scores = {}
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        checkout = Path(folder) / "checkout"
        shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".venv", ".git", "demo", ".*_cache"))
        for module in options.modules:
            scores[module] = tried(checkout, module, options.sample, options.seed)
            if options.json:
                options.json.write_text(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
