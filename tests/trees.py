"""Data sets for whoever does not decode their images: as a folder, a bucket, an archive; and what has come of them."""

from __future__ import annotations

import hashlib
import io
import tarfile
import unicodedata
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tests.conftest import Store
from tests.objects import written

TREE = {
    "answers.json": b'{"0": {"w": 0}, "1": {"w": 1}}',
    "metadata.json": b"{}",
    "train/cat/cat-0.png": b"a cat",
    "train/dog/dog-1.PNG": b"a dog",
    "train/no class-2.jpeg": b"no class",
    "val/cat/x.png": b"another cat",
    "test/dog/y.png": b"",
}
"""A data set for whoever does not decode its images."""
STRANGERS = {
    "README.md": b"hello",
    "results/run.json": b"{}",
    "train/notes.txt": b"notes",
    "train/.hidden.png": b"hidden",
    "__MACOSX/train/._cat-0.png": b"fork",
    "elsewhere/train/z.png": b"z",
}
ODD = [
    "train/a b/c  d .png",
    "train/+%&?#=;,$@!'()*~-1.png",
    "train/%2e%2e/%2Fx-2.png",
    f"train/{unicodedata.normalize('NFC', 'é')}-3.png",
    f"train/{unicodedata.normalize('NFD', 'é')}-4.png",
    "train/猫/🐈-5.png",
    "train/...png",
    'train/"quoted" <x>|y-6.png',
    "train/" + "n" * 251 + ".png",
]
"""Names that are strange but harmless; `train/...png` starts with a dot and is hidden."""
UNSAFE = {
    "../x.png": "'..'",
    "train/../../x.png": "'..'",
    "train/..": "'..'",
    "./train/x.png": "'.'",
    "train/./x.png": "'.'",
    "/abs.png": "relative",
    "train//x.png": "empty part",
    "C:/x.png": "relative",
    "c:x.png": "relative",
    "train/a\\b.png": "backslash",
    "..\\x.png": "backslash",
    "train/a\tb.png": "control character",
    "train/a\x1b[2Jb.png": "control character",
    "train/a\x7fb.png": "control character",
    "train/" + "n" * 252 + ".png": "255 bytes",
    "train/" + "猫" * 84 + ".png": "255 bytes",
}
"""Names that no file may get, and what is said of them."""
KINDS = (".tar", ".tar.gz", ".zip")


def write(root: Path, tree: Mapping[str, bytes]) -> Path:
    for name, body in tree.items():
        written(root / name, body)
    return root


def put(store: Store, tree: Mapping[str, bytes], prefix: str = "data") -> str:
    for name, body in tree.items():
        store.put(f"{prefix}/{name}", body)
    return f"s3://{store.bucket}/{prefix}"


def pack(path: Path, tree: Mapping[str, bytes], top: str = "") -> str:
    """Write an archive; returns its location."""
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, body in tree.items():
                archive.writestr(top + name, body)
        return str(path)
    with tarfile.open(path, "w" if path.name.endswith(".tar") else "w:gz") as tar:
        for name, body in tree.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return str(path)


def upload(store: Store, archive: str) -> str:
    key = f"archives/{Path(archive).name}"
    store.put(key, Path(archive).read_bytes())
    return f"s3://{store.bucket}/{key}"


class Unpacked(NamedTuple):
    """What there is of a file."""

    inode: int
    modified: int
    body: bytes


def state(root: Path) -> dict[str, Unpacked]:
    """Every file below `root`."""
    return {
        str(path.relative_to(root)): Unpacked(path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def bodies(root: Path) -> dict[str, bytes]:
    return {name: file.body for name, file in state(root).items()}


def digests(tree: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(body).hexdigest() for name, body in tree.items()}


def outside(tmp_path: Path, workdir: Path) -> list[str]:
    """The files that are not in `workdir`."""
    return [str(path) for path in sorted(tmp_path.rglob("*")) if not path.is_relative_to(workdir) and path.is_file()]
