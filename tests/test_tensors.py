"""Whatever is where tensors should be: it is recognised, nothing in it is run, and it takes no memory to speak of."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from crowdlayer.deployment.predictor import load
from crowdlayer.errors import CrowdlayerError, DataError, SettingsError
from crowdlayer.learning.checkpoint import Checkpoints
from crowdlayer.learning.classifier import build_classifier
from crowdlayer.learning.spool import FORMAT, PARTS, Identity, Spool, going_on, read_state
from crowdlayer.learning.tensors import read_tensors
from crowdlayer.storage.places import Folder
from tests.test_fuzz import folder, fuzzed, mutated, one_line_each


class Runs:
    """What does something when it is unpickled without care."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


def saved(content: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zipped(data: bytes, packing: int = zipfile.ZIP_STORED, others: dict[str, bytes] | None = None) -> bytes:
    """A file as torch.save makes it, around this pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for name, body in {"data.pkl": data, "version": b"3\n", "byteorder": b"little", **(others or {})}.items():
            archive.writestr(f"archive/{name}", body)
    return buffer.getvalue()


def opcodes(command: str) -> dict[str, bytes]:
    """Pickles that call os.system by every opcode that calls something."""
    text = command.encode()
    long = b"X" + len(text).to_bytes(4, "little") + text
    return {
        "REDUCE": b"cposix\nsystem\n(" + long + b"tR.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + long + b"\x85R.",
        "OBJ": b"(cposix\nsystem\n" + long + b"o.",
        "INST": b"(S'" + text.replace(b"'", b"\\'") + b"'\niposix\nsystem\n.",
        "NEWOBJ": b"\x80\x02cposix\nsystem\n" + long + b"\x85\x81.",
        "BUILD": b"ctorch.nn.modules.linear\nLinear\n)\x81}X\x0c\x00\x00\x00__setstate__cposix\nsystem\nsb"
        + long
        + b"b.",
        "EXT1": b"\x82\x01" + long + b"\x85R.",
        "PERSID": b"P" + text + b"\n.",
        "GLOBAL of builtins": b"cbuiltins\neval\n(X\x12\x00\x00\x00__import__('this')tR.",
        "GLOBAL of torch": b"ctorch.hub\nload\n(" + long + b"X\x01\x00\x00\x00xtR.",
        "GLOBAL with dots": b"\x80\x04\x8c\x05torch\x8c\x0dos.path.os.system\x93" + long + b"\x85R.",
        "getattr": b"cbuiltins\ngetattr\n(cposix\nX\x06\x00\x00\x00systemtR(" + long + b"tR.",
        "copyreg": b"ccopyreg\n_reconstructor\n(cposix\nsystem\ncbuiltins\nobject\nNtR(" + long + b"tR.",
        "torch's own loader": b"ctorch.serialization\nload\n(" + long + b"tR.",
        "runpy": b"crunpy\nrun_path\n(" + long + b"tR.",
    }


def pickles(mark: Path) -> dict[str, bytes]:
    """Fifty files that would make `mark`, or take all the memory, if they were run."""
    command = f"touch {mark}"
    harmful = {
        "system": Runs(os.system, command),
        "open": Runs(open, str(mark), "w"),
        "exec": Runs(exec, f"open({str(mark)!r}, 'w')"),
        "mkdir": Runs(os.mkdir, str(mark)),
        "load": Runs(torch.load, str(mark)),
    }
    files = {f"{name}, protocol {p}": pickle.dumps(what, p) for name, what in harmful.items() for p in (0, 2, 4)}
    files |= {f"{name} in torch's file": saved({"w": what}) for name, what in harmful.items()}
    files |= {
        f"{name} in torch's old file": saved([what], _use_new_zipfile_serialization=False)
        for name, what in harmful.items()
    }
    files |= opcodes(command)
    files |= {f"{name} in torch's file": zipped(body) for name, body in opcodes(command).items()}
    files["a module"] = saved(nn.Linear(2, 2))
    files["a key that runs"] = saved({Runs(os.system, command): torch.zeros(1)})
    files["a packed one"] = zipped(pickle.dumps(harmful["system"]), zipfile.ZIP_DEFLATED)
    files["a bomb"] = zipped(bytes(2**27), zipfile.ZIP_DEFLATED)
    files["a tensor of zettabytes"] = saved({"w": torch.zeros(1)}).replace(
        b"K\x01\x85", b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85"
    )
    files["a tuple in a tuple, deep"] = b"\x80\x02" + b")" * 1 + b"\x85" * 200_000 + b"."
    files["a text of exabytes"] = b"\x80\x04\x8d" + b"\xff" * 7 + b"\x0f" + b"x."
    files["memo of billions"] = b"\x80\x02Nr\xff\xff\xff\xff."
    files["a script"] = zipped(
        b"\x80\x02}.", others={"code/__torch__.py": b"import os", "constants.pkl": b"\x80\x02)."}
    )
    files["nothing"] = b""
    files["a page"] = b"<html>404</html>"
    old = io.BytesIO()
    with tarfile.open(fileobj=old, mode="w") as tar:
        for name, body in {"sys_info": pickle.dumps({}), "pickle": pickle.dumps(harmful["system"]),
                           "storages": pickle.dumps(0), "tensors": pickle.dumps(0)}.items():  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    files["torch's oldest file"] = old.getvalue()
    return files


IDENTITY = Identity({"lr": 0.1}, "data")


def planted(root: Path, body: bytes) -> None:
    """A checkpoint whose index and digests fit, and whose parts are `body`."""
    name = f"{hashlib.sha256(body).hexdigest()}.pt"
    there = root / "checkpoints/run"
    there.mkdir(parents=True)
    (there / name).write_bytes(body)
    index = {"format": FORMAT, "epoch": 1, "step": 0, "settings": IDENTITY.settings, "data_digest": "data"}
    (there / "00000001.json").write_text(json.dumps(index | {"parts": {part: [name, len(body)] for part in PARTS}}))


def test_fifty_hostile_pickles_and_more_are_recognised_and_none_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    files = pickles(mark)
    assert len(files) >= 50
    not_refused = []
    for number, (name, body) in enumerate(files.items()):
        here = tmp_path / str(number)
        planted(here, body)
        path = here / "weights.pth"
        path.write_bytes(body)
        with pytest.raises(SettingsError, match="PRETRAINED: weights") as raised:
            build_classifier("squeezenet1_1", 3, 32, path, False, "false")
        one_line_each(raised.value)
        found = Checkpoints(Folder(here), "run").find(IDENTITY, "auto", here)
        with pytest.raises(SettingsError, match="RESUME: the checkpoint must be one that this program wrote") as raised:
            resume({part: file.read_bytes() for part, file in found.parts.items()})
        one_line_each(raised.value)
        (here / "best_models/run").mkdir(parents=True)
        (here / "best_models/run.pth").write_bytes(body)
        for model in ("model.safetensors", "model.json"):
            (here / "best_models/run" / model).write_bytes(body)
        with pytest.raises(DataError) as refused:
            load(here / "best_models/run.pth")
        one_line_each(refused.value)
        if mark.exists():
            not_refused.append(name)
            mark.unlink()
    assert not_refused == []


def resume(parts: dict[str, bytes]) -> None:
    """What a run does with a checkpoint, down to where its parts are looked at."""
    with going_on():
        state = read_state(parts)
        nn.Linear(2, 2).load_state_dict(state["model"])
        assert isinstance(state["progress"]["epoch"], int)


# --- damage ----------------------------------------------------------------------------------------------------------

WHOLE = saved({"model": {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, "progress": {"epoch": 1}, "best": None})
OLD = saved({"model": {"weight": torch.zeros(2, 2)}}, _use_new_zipfile_serialization=False)
HUGE = st.sampled_from([b"\xff" * 8, b"\xff\xff\xff\x7f", b"\x00" * 8]).flatmap(
    lambda number: st.integers(0, len(WHOLE)).map(lambda at: WHOLE[:at] + number + WHOLE[at + len(number) :])
)
CUT = st.integers(0, len(WHOLE)).map(lambda at: WHOLE[:at])
FOREIGN = st.sampled_from(
    [pickle.dumps({"model": {}}), saved([1]), saved({"model": 3}), saved({}), b"PK\x05\x06" + bytes(18)]
)


@pytest.mark.filterwarnings("ignore")  # torch's, of what is in the file
@fuzzed
@given(mutated(WHOLE) | mutated(OLD) | HUGE | CUT | FOREIGN | st.binary(max_size=200))
def test_any_bytes_are_a_state_or_refused(body: bytes) -> None:
    try:
        read_tensors(io.BytesIO(body))
    except ValueError as error:
        one_line_each(error)
    try:
        resume({"run": body, "best": body})
    except SettingsError as error:
        one_line_each(error)


INDEX = json.dumps(
    {"format": FORMAT, "epoch": 1, "step": 0, "settings": {"lr": 0.1}, "data_digest": "data",
     "parts": {part: ["0" * 64 + ".pt", 5] for part in PARTS}}
).encode()  # fmt: skip
ODD_INDEXES = [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    INDEX.replace(b"5", b"Infinity"),
    INDEX.replace(b"5", b"9" * 5000),
    INDEX.replace(b'"0', b'"../../../0'),
    INDEX.replace(b"0" * 64, b"\\u0000"),
    INDEX.replace(b"0.1", b'"' + b"x" * 10**6 + b'"'),
]


@fuzzed
@given(mutated(INDEX) | st.sampled_from(ODD_INDEXES) | st.binary(max_size=99))
def test_any_bytes_are_an_index_or_left_out(body: bytes) -> None:
    with folder() as root:
        there = root / "checkpoints/run"
        there.mkdir(parents=True)
        (there / "00000001.json").write_bytes(body)
        try:
            assert not Checkpoints(Folder(root), "run").find(IDENTITY, "auto", root).parts
        except CrowdlayerError as error:
            one_line_each(error)


def test_a_state_that_is_whole_is_read(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    spool = Spool(tmp_path / "spool", IDENTITY)
    spool.write(
        {
            "progress": {"epoch": 1, "step": 0},
            "best": None,
            "model": {"weight": torch.ones(2, 2), "bias": torch.ones(2)},
        }
    )
    checkpoints = Checkpoints(Folder(tmp_path / "out"), "run")
    checkpoints.put(spool.folder, "00000001.json")
    found = checkpoints.find(IDENTITY, "must", tmp_path)
    resume({part: file.read_bytes() for part, file in found.parts.items()})
