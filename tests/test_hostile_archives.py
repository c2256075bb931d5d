"""Hostile archives: whatever is in them, nothing is written outside of the folder, and nothing but files in it."""

from __future__ import annotations

import io
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from crowdlayer.data.layout import belongs
from crowdlayer.errors import DataError
from crowdlayer.storage.sync import sync
from tests.catalogue.images import WHOLE
from tests.test_fuzz import folder, one_line_each

Make = Callable[[], bytes]
X = "train/x-9.png"

NAMES = {
    "up": "../x-9.png",
    "up from within": "train/../../../x-9.png",
    "up at the end": "train/..",
    "absolute": "/tmp/owned/x-9.png",
    "twice absolute": "//tmp/owned/x-9.png",
    "a drive": "C:/x-9.png",
    "a drive, backslashes": "C:\\train\\x-9.png",
    "backslashes up": "train\\..\\..\\x-9.png",
    "an empty part": "train//x-9.png",
    "a dot": "train/./x-9.png",
    "a null": "train/x-9.png\0.txt",
    "a line break": "train/x\n-9.png",
    "an escape": "train/\x1b[31mx-9.png",
    "255 bytes and more": f"train/{'n' * 300}-9.png",
    "4096 bytes and more": "train/" + "d/" * 2100 + "x-9.png",
    "a full-width up": "train/\uff0e\uff0e/x-9.png",
    "a two-dot leader": "train/\u2025/x-9.png",
    "a division slash": "..\u2215x-9.png",
    "right to left": "train/\u202egnp.9-x.png",
    "a home": "~/x-9.png",
    "a variable": "train/$HOME/x-9.png",
    "an option": "train/--checkpoint-action=exec=sh-9.png",
    "a command": "train/`touch owned`;$(touch owned)-9.png",
    "half a surrogate": "train/\udcff-9.png",
    "a device of Windows": "train/CON/NUL-9.png",
    "the working folder's own": ".crowdlayer",
    "the manifest": "train/../manifest.jsonl",
}


def tar_of(*members: tuple[tarfile.TarInfo, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, body in (("train/a-0.png", WHOLE), ("answers.json", b'{"0": {"w": 0}}')):
            tar.addfile(*regular(name, body))
        for info, body in members:
            tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def regular(name: str, body: bytes = WHOLE) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(body)
    return info, io.BytesIO(body)


def plain(name: str) -> tuple[tarfile.TarInfo, bytes]:
    return regular(name)[0], WHOLE


def special(name: str, kind: bytes, to: str = "", mode: int = 0o644) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, to, mode
    return info, b""


def zip_of(*members: tuple[str, bytes, int], packing: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for name, body, mode in (("train/a-0.png", WHOLE, 0), ("answers.json", b'{"0": {"w": 0}}', 0), *members):
            info = zipfile.ZipInfo("placeholder")
            info.filename, info.external_attr, info.compress_type = name, mode << 16, packing
            archive.writestr(info, body)
    return buffer.getvalue()


def patched(whole: bytes, mark: bytes, at: int, value: bytes) -> bytes:
    """With other bytes `at` so many after the last `mark`."""
    start = whole.rindex(mark) + at
    return whole[:start] + value + whole[start + len(value) :]


def setuid() -> bytes:
    info, body = plain(X)
    info.mode, info.uid, info.gid, info.uname = 0o6777, 0, 0, "root"
    return tar_of((info, body))


TARS: dict[str, Make] = {
    **{name: partial(tar_of, plain(text)) for name, text in NAMES.items()},
    "a link out, then through it": lambda: tar_of(
        special("train/out", tarfile.SYMTYPE, "../../.."), plain("train/out/x-9.png")
    ),
    "an absolute link, then through it": lambda: tar_of(
        special("train/out", tarfile.SYMTYPE, "/tmp"), plain("train/out/x-9.png")
    ),
    "a link in the place of a file": lambda: tar_of(special(X, tarfile.SYMTYPE, "/etc/passwd"), plain(X)),
    "a chain of links": lambda: tar_of(
        *(special(f"train/{i}", tarfile.SYMTYPE, f"{i + 1}") for i in range(50)),
        special("train/50", tarfile.SYMTYPE, "../.."),
    ),
    "a link to itself": lambda: tar_of(special(X, tarfile.SYMTYPE, "x-9.png")),
    "a link as train": lambda: tar_of(special("train", tarfile.SYMTYPE, "/etc")),
    "a hard link out": lambda: tar_of(special(X, tarfile.LNKTYPE, "../../../../etc/passwd")),
    "a hard link within": lambda: tar_of(special(X, tarfile.LNKTYPE, "answers.json")),
    "a device": lambda: tar_of(special(X, tarfile.CHRTYPE), special("train/y-9.png", tarfile.BLKTYPE)),
    "a pipe": lambda: tar_of(special(X, tarfile.FIFOTYPE)),
    "a file of no known type": lambda: tar_of(special(X, b"Z")),
    "a folder that is a file too": lambda: tar_of(special(X, tarfile.DIRTYPE), plain(X)),
    "a file twice": lambda: tar_of(plain(X), plain(X)),
    "a file twice, in two cases": lambda: tar_of(plain(X), plain("train/X-9.PNG")),
    "a file twice, in two forms": lambda: tar_of(plain("train/\u00e9-9.png"), plain("train/e\u0301-9.png")),
    "setuid, of root": setuid,
    "a folder nobody may enter": lambda: tar_of(special("train/d", tarfile.DIRTYPE, mode=0), plain("train/d/x-9.png")),
    "a name by pax": lambda: tar_of(*[named("path", "../../x-9.png")]),
    "a link by pax": lambda: tar_of(*[named("linkpath", "../../x-9.png")]),
    "a size by pax": lambda: tar_of(*[named("size", "9" * 30)]),
    "a negative size by pax": lambda: tar_of(*[named("size", "-512")]),
    "no number by pax": lambda: tar_of(*[named("size", "1e3"), named("mtime", "nan")]),
    "a sparse map": lambda: tar_of(*[named("GNU.sparse.map", "0,99999999999999,5")]),
    "a size of exabytes": lambda: patched(tar_of(plain(X)), X.encode(), 124, b"\x80" + b"\xff" * 11),
    "cut in a header": lambda: tar_of(plain(X))[:2600],
    "a megabyte of nulls": lambda: bytes(2**20),
}  # fmt: skip


def named(key: str, value: str) -> tuple[tarfile.TarInfo, bytes]:
    info, body = plain(X)
    info.pax_headers = {key: value}
    return info, body


def overlapping() -> bytes:
    """Two names for the same bytes: such archives unpack to far more than they are."""
    whole = zip_of(("train/x-8.png", WHOLE, 0), (X, WHOLE, 0))
    central = [at for at in range(len(whole)) if whole.startswith(b"PK\1\2", at)]
    return whole[: central[3] + 42] + whole[central[2] + 42 : central[2] + 46] + whole[central[3] + 46 :]


def one() -> bytes:
    return zip_of((X, WHOLE, 0))


ZIPS: dict[str, Make] = {
    **{name: partial(zip_of, (text, WHOLE, 0)) for name, text in NAMES.items() if name != "half a surrogate"},
    "a link out": lambda: zip_of((X, b"../../../etc/passwd", stat.S_IFLNK | 0o777)),
    "a link out, then through it": lambda: zip_of(
        ("train/out", b"../../..", stat.S_IFLNK | 0o777), ("train/out/x-9.png", WHOLE, 0)
    ),
    "a device": lambda: zip_of((X, b"", stat.S_IFCHR | 0o666)),
    "setuid": lambda: zip_of((X, WHOLE, stat.S_IFREG | 0o6777)),
    "a folder with content": lambda: zip_of(("train/x-9.png/", WHOLE, 0)),
    "a file that is a folder too": lambda: zip_of(("train/x", WHOLE, 0), ("train/x/y-9.png", WHOLE, 0)),
    "another name in its header": lambda: one().replace(X.encode(), b"../../x-9.png", 1),
    "encrypted": lambda: patched(one(), b"PK\1\2", 8, b"\1\0"),
    "packed in a way that is none": lambda: patched(one(), b"PK\1\2", 10, b"\x63\0"),
    "a wrong checksum": lambda: patched(one(), b"PK\1\2", 16, b"\0\0\0\0"),
    "a size that is too small": lambda: patched(
        zip_of((X, bytes(9999), 0), packing=zipfile.ZIP_DEFLATED), b"PK\1\2", 24, struct.pack("<I", 9)
    ),
    "a size that is too large": lambda: patched(
        one(), b"PK\1\2", 20, struct.pack("<II", 2**32 - 2, 2**32 - 2)
    ),
    "an offset out of the file": lambda: patched(one(), b"PK\1\2", 42, b"\xff\xff\xff\x7f"),
    "two names for the same bytes": overlapping,
    "a million members that are not there": lambda: patched(zip_of(), b"PK\5\6", 8, b"\xff\xff\xff\xff"),
    "a zip in a zip": lambda: zip_of(("train/x.zip", zip_of(), 0)),
    "a comment that is another zip": lambda: (
        patched(zip_of(), b"PK\5\6", 20, b"\xff\xff") + zip_of(("../x-9.png", WHOLE, 0))
    ),
}  # fmt: skip

CASES = [("tar", name, make) for name, make in TARS.items()] + [("zip", name, make) for name, make in ZIPS.items()]


def test_there_are_fifty_of_each_kind_or_nearly() -> None:
    assert len(TARS) >= 50
    assert len(CASES) >= 95


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("kind", "make"), [pytest.param(kind, make, id=f"{kind}: {name}") for kind, name, make in CASES]
)
def test_a_hostile_archive_writes_nothing_outside_and_nothing_but_files(kind: str, make: Make) -> None:
    body = make()
    with folder() as root:  # and looks at what is around it afterwards
        (root / f"data.{kind}").write_bytes(body)
        try:
            found = sync(str(root / f"data.{kind}"), root / "work", belongs).digests
        except DataError as error:
            one_line_each(error)
        else:
            files = [path for path in (root / "work/data").rglob("*") if not path.is_dir()]
            assert sorted(str(path.relative_to(root / "work/data")) for path in files) == sorted(found)
        for path in (root / "work").rglob("*"):
            mode = path.lstat().st_mode
            assert stat.S_ISREG(mode) or stat.S_ISDIR(mode)
            assert not mode & 0o7022
            assert path.lstat().st_nlink == 1 or path.is_dir()
        assert sum(path.stat().st_size for path in (root / "work").rglob("*") if path.is_file()) < 2**20
    assert not Path("/tmp/owned").exists()
