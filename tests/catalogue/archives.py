"""Archives that are damaged, hostile, or unusual."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.catalogue.case import Case, Spoil, both
from tests.catalogue.images import WHOLE
from tests.catalogue.names import FORTY_TWO


def archived(kind: str, spoil_body: Callable[[bytes], bytes] = lambda body: body, prefix: str = "") -> Spoil:
    """The data set as data.<kind>, beside its folder."""

    def spoil(data: Path) -> None:
        names = sorted(path.relative_to(data) for path in data.rglob("*") if path.is_file())
        path = data.parent / f"data.{kind}"
        if kind == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                for name in names:
                    archive.write(data / name, f"{prefix}{name}")
        else:
            with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as tar:
                for name in names:
                    tar.add(data / name, f"{prefix}{name}")
        path.write_bytes(spoil_body(path.read_bytes()))

    return spoil


def tar_with(*members: tuple[tarfile.TarInfo, bytes], packed: bool = False) -> Spoil:
    """The data set as data.tar, or data.tar.gz, with further members."""

    def spoil(data: Path) -> None:
        with tarfile.open(data.parent / ("data.tar.gz" if packed else "data.tar"), "w:gz" if packed else "w") as tar:
            tar.add(data, "")
            for info, body in members:
                tar.addfile(info, io.BytesIO(body))

    return spoil


def member(
    name: str, body: bytes = WHOLE, kind: bytes = tarfile.REGTYPE, to: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(body) if kind == tarfile.REGTYPE else 0, kind, to
    return info, body


def zip_with(name: str, body: bytes = WHOLE, mode: int = 0) -> Spoil:
    def spoil(data: Path) -> None:
        archived("zip")(data)
        with zipfile.ZipFile(data.parent / "data.zip", "a") as archive:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, body)

    return spoil


def zip_bomb(data: Path) -> None:
    """More than a gigabyte in a megabyte."""
    with zipfile.ZipFile(data.parent / "data.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for i in range(10):
            archive.writestr(f"train/{i}.png", bytes(2**27))


def tar_of_zeros(data: Path, info: tarfile.TarInfo) -> None:
    """A tar.gz with a header, and what it declares, of zeros; gzip's parts may be the same many times."""
    zeros = gzip.compress(bytes(2**24))
    (data.parent / "data.tar.gz").write_bytes(gzip.compress(info.tobuf()) + zeros * (info.size // 2**24))


def tar_bomb(data: Path) -> None:
    """Two gigabytes in two megabytes."""
    info = tarfile.TarInfo("train/x-0.png")
    info.size = 2**31
    tar_of_zeros(data, info)


def header_bomb(data: Path) -> None:
    """A long name of half a gigabyte, which tarfile would read at once."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**29
    tar_of_zeros(data, info)


def sparse_bomb(data: Path) -> None:
    """A file of eight terabytes that has no bytes at all."""
    info = tarfile.TarInfo("train/x-0.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": info.name,
                        "GNU.sparse.realsize": str(2**43)}  # fmt: skip
    info.size = 512
    with tarfile.open(data.parent / "data.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"0\n".ljust(512, b"\0")))


def negative_tar(data: Path) -> None:
    """A member of a negative size, with which some Pythons go round in circles (CVE-2025-8194)."""
    good, bad = tarfile.TarInfo("train/x-0.png"), tarfile.TarInfo("train/x-1.png")
    body = bytearray(bad.tobuf(tarfile.GNU_FORMAT))
    body[124:136] = tarfile.itn(-1024, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    body[148:156] = b"        "
    body[148:156] = b"%06o\0 " % sum(body[:512])
    (data.parent / "data.tar").write_bytes(good.tobuf() + bytes(body) + bytes(10240))


TAR, GZ, ZIP = ({"TASKS": f"{{tmp}}/data.{kind}"} for kind in ("tar", "tar.gz", "zip"))


ARCHIVES = [
    *(Case(f"a good {kind}, with a folder around it", 0, FORTY_TWO, at, archived(kind, prefix="shapes/"))
      for kind, at in [("tar", TAR), ("tar.gz", GZ), ("zip", ZIP)]),
    *(Case(f"a {kind} cut in half", 65, "must be a whole archive", at, archived(kind, lambda b: b[: len(b) // 2]))
      for kind, at in [("tar", TAR), ("tar.gz", GZ), ("zip", ZIP)]),
    *(Case(f"an empty {kind}", 65, "must be a whole archive", at, archived(kind, lambda b: b""))
      for kind, at in [("tar", TAR), ("tar.gz", GZ), ("zip", ZIP)]),
    Case("a page named .zip", 65, "must be a whole archive", ZIP, archived("zip", lambda b: b"<html>")),
    Case("a tar named .zip", 65, "must be a whole archive", ZIP,
         both(archived("tar"), lambda data: (data.parent / "data.tar").rename(data.parent / "data.zip"))),
    *(Case(f"a tar with {name}", 65, f"{name!r}: a name must", TAR, tar_with(member(name)))
      for name in ("../x-1.png", "/etc/x-1.png", "train/../../x-1.png", "C:x-1.png", "train\\..\\x-1.png")),
    Case("a zip with ../", 65, "'../x-1.png': a name must have no empty part", ZIP, zip_with("../x-1.png")),
    Case("a zip with an absolute name", 65, "'/x-1.png': a name must be relative", ZIP, zip_with("/x-1.png")),
    Case("a name with a line break in a zip", 65, "a name must have no control character", ZIP,
         zip_with("train/a\nb.png")),
    Case("a symbolic link in a tar", 0, FORTY_TWO, TAR, tar_with(
        member("train/red/x-99.png", b"", tarfile.SYMTYPE, "/etc/passwd"))),
    Case("a file through a symbolic link in a tar", 0, FORTY_TWO, TAR, tar_with(
        member("train/out", b"", tarfile.SYMTYPE, "../.."), member("train/out/x-99.png"))),
    Case("a hard link in a tar", 0, FORTY_TWO, TAR, tar_with(
        member("train/red/x-99.png", b"", tarfile.LNKTYPE, "/etc/passwd"))),
    Case("devices and pipes in a tar", 0, FORTY_TWO, TAR, tar_with(
        member("train/red/x-97.png", b"", tarfile.CHRTYPE), member("train/red/x-98.png", b"", tarfile.BLKTYPE),
        member("train/red/x-99.png", b"", tarfile.FIFOTYPE))),
    Case("a symbolic link in a zip", 0, FORTY_TWO, ZIP, zip_with("train/red/x-99.png", b"/etc/passwd", 0o120777)),
    Case("a file that is there twice", 65, "'answers.json': must be in the archive once", TAR,
         tar_with(member("answers.json", b"{}"))),
    Case("a file and a folder of one name", 65, "must be a file or a folder, is both", TAR,
         tar_with(member("train/red", b"x"))),
    Case("a zip that is a bomb", 65, "must not unpack to more than 1.1 GB, declares more", ZIP, zip_bomb),
    Case("a tar.gz that is a bomb", 65, "must not unpack to more than 1.1 GB", GZ, tar_bomb),
    Case("a tar.gz with a header that is a bomb", 65, "a header claims an impossible size", GZ, header_bomb),
    Case("a tar with a sparse file of terabytes", 65, "must not unpack to more than 1.1 GB, declares more", TAR,
         sparse_bomb),
    Case("a tar with a negative size", 65, "must be a whole archive", TAR, negative_tar),
    Case("an archive of nothing that belongs", 65, "must hold train/ and answers.json", ZIP, lambda data: (
        zipfile.ZipFile(data.parent / "data.zip", "w").writestr("x", b""))),
]  # fmt: skip
