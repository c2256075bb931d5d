"""The files of a tar or zip: nothing but these comes out, and of a damaged archive nothing at all."""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import subprocess
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest

from crowdlayer.data.layout import belongs
from crowdlayer.errors import DataError
from crowdlayer.storage.sync import sync
from tests.crowds import write_shapes
from tests.trees import KINDS, TREE, bodies, digests, outside, pack, state, write

# --- what is in it ---------------------------------------------------------------------------------------------------


def test_a_real_tar_of_a_folder_with_its_folders_and_owners_is_unpacked(tmp_path: Path, workdir: Path) -> None:
    folder = write_shapes(tmp_path / "shapes")
    expected = sync(str(folder), workdir, belongs).digest()
    for arguments in (["-C", str(folder), "."], ["-C", str(tmp_path), "shapes"], ["--posix", "-C", str(folder), "."]):
        subprocess.run(["tar", "-czf", str(tmp_path / "x.tar.gz"), *arguments], check=True)
        assert sync(str(tmp_path / "x.tar.gz"), workdir, belongs).digest() == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", ["./", "set/", "./my set.v2/"])
def test_the_folder_that_an_archive_was_made_of_does_not_matter(
    top: str, kind: str, tmp_path: Path, workdir: Path
) -> None:
    archive = pack(tmp_path / f"data{kind}", TREE | {"results/x.json": b"{}"}, top)
    assert sync(archive, workdir, belongs).digests == digests(TREE)


def test_a_forks_folder_beside_the_top_one_is_ignored(tmp_path: Path, workdir: Path) -> None:
    tree = {f"set/{name}": body for name, body in TREE.items()} | {"__MACOSX/set/train/._cat-0.png": b"fork"}
    assert sync(pack(tmp_path / "data.zip", tree), workdir, belongs).digests == digests(TREE)


def test_an_archive_with_two_data_sets_is_unusable(tmp_path: Path, workdir: Path) -> None:
    tree = {f"{top}/{name}": body for top in ("a", "b") for name, body in TREE.items()}
    with pytest.raises(DataError, match=r"two.tar: must hold train/ and answers.json"):
        sync(pack(tmp_path / "two.tar", tree), workdir, belongs)


@pytest.mark.parametrize("encoding", ["utf-8", "cp437"])
def test_a_zip_that_does_not_say_what_its_names_are_in_is_read_all_the_same(
    encoding: str, tmp_path: Path, workdir: Path
) -> None:
    """UTF-8 as Info-ZIP's zip writes it, and the code page of DOS."""
    name = "train/Äpfel-0.png"
    said = name.encode(encoding)
    asked = re.sub(rb"[^ -~]", b"X", said)  # in ASCII zipfile says nothing; its own bytes may be in a time of day
    packed = Path(pack(tmp_path / "data.zip", {asked.decode(): b"apples"}))
    packed.write_bytes(packed.read_bytes().replace(asked, said))
    assert sync(str(packed), workdir, belongs).digests == digests({name: b"apples"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_above_the_top_folder_is_never_written(kind: str, tmp_path: Path, workdir: Path) -> None:
    tree = {f"set/{name}": body for name, body in TREE.items()}
    archive = pack(tmp_path / f"data{kind}", tree | {"../x.png": b"evil", "/abs.png": b"evil", "set": b"evil"})
    before = outside(tmp_path, workdir)
    assert sync(archive, workdir, belongs).digests == digests(TREE)
    assert outside(tmp_path, workdir) == before


@pytest.mark.parametrize("kind", KINDS)
def test_links_in_an_archive_are_left_out_and_told(
    kind: str, tmp_path: Path, workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"data{kind}"
    if kind == ".zip":
        pack(path, TREE)
        with zipfile.ZipFile(path, "a") as archive:
            for name in ("val/cat/link.png", "notes/link"):
                info = zipfile.ZipInfo(name)
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
                archive.writestr(info, "../../train/cat/cat-0.png")
    else:
        root = tmp_path / "tree"
        write(root, TREE)
        (root / "notes").mkdir()
        for name in ("val/cat/link.png", "notes/link"):
            (root / name).symlink_to("../../train/cat/cat-0.png")
        with tarfile.open(path, "w:gz" if kind.endswith("gz") else "w") as tar:
            tar.add(root, ".")
    assert sync(str(path), workdir, belongs).digests == digests(TREE)
    assert f"data{kind}: 1 links are left out; tar --dereference" in caplog.text


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_ignored(kind: bytes, tmp_path: Path, workdir: Path) -> None:
    secret = write(tmp_path, {"secret.png": b"secret"}) / "secret.png"
    archive = pack(tmp_path / "data.tar", TREE)
    with tarfile.open(archive, "a") as tar:
        for name in ("train/x-7.png", "train/linked"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret) if name.endswith(".png") else str(tmp_path)
            tar.addfile(info)
        info = tarfile.TarInfo("train/linked/x-8.png")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"file"))
    before = state(tmp_path)
    expected = TREE | {"train/linked/x-8.png": b"file"}
    assert sync(archive, workdir, belongs).digests == digests(expected)
    assert bodies(workdir / "data") == expected
    assert not (workdir / "data/train/linked").is_symlink()
    assert {name: file for name, file in state(tmp_path).items() if name in before} == before
    assert outside(tmp_path, workdir) == [archive, str(secret)]


def test_links_in_a_zip_are_ignored(tmp_path: Path, workdir: Path) -> None:
    archive = pack(tmp_path / "data.zip", TREE)
    with zipfile.ZipFile(archive, "a") as file:
        info = zipfile.ZipInfo("train/x-7.png")
        info.external_attr = 0o120777 << 16
        file.writestr(info, "/etc/passwd")
    assert sync(archive, workdir, belongs).digests == digests(TREE)


@pytest.mark.parametrize("kind", [".tar", ".zip"])
def test_a_member_that_is_there_twice_is_refused(kind: str, tmp_path: Path, workdir: Path) -> None:
    path = tmp_path / f"data{kind}"
    pack(path, TREE)
    if kind == ".zip":
        with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as file:
            warnings.simplefilter("ignore")
            file.writestr("train/cat/cat-0.png", b"another")
    else:
        with tarfile.open(path, "a") as tar:
            info = tarfile.TarInfo("train/cat/cat-0.png")
            tar.addfile(info, io.BytesIO())
    with pytest.raises(DataError, match=r"'train/cat/cat-0.png': must be in the archive once"):
        sync(str(path), workdir, belongs)


# --- damaged ---------------------------------------------------------------------------------------------------------


def refusal(path: Path, workdir: Path) -> str | None:
    """Why the archive is refused; None where it gives all of `TREE`."""
    try:
        synced = sync(str(path), workdir, belongs)
    except DataError as error:
        return str(error)
    assert synced.digests == digests(TREE)
    return None


@pytest.mark.parametrize("kind", [".tar", ".tar.gz", ".zip"])
def test_a_cut_archive_is_never_taken_for_a_whole_one(kind: str, tmp_path: Path, workdir: Path) -> None:
    whole = Path(pack(tmp_path / f"whole{kind}", TREE)).read_bytes()
    path = tmp_path / f"data{kind}"
    refusals = []
    for n in sorted({*range(0, len(whole), 512), *range(0, len(whole), max(1, len(whole) // 37)), len(whole) - 1}):
        path.write_bytes(whole[:n])
        refusals.append(refusal(path, workdir))
    assert sum(why is not None for why in refusals) > 10
    assert all(why.startswith(f"{path}: must be a whole archive: ") for why in refusals if why is not None)


@pytest.mark.parametrize("kind", [".tar", ".tar.gz"])
def test_a_tar_with_a_flipped_bit_in_a_header_is_never_taken_for_a_shorter_one(
    kind: str, tmp_path: Path, workdir: Path
) -> None:
    body = bytearray(Path(pack(tmp_path / "whole.tar", TREE)).read_bytes())
    body[2 * 1024 + 150] ^= 1  # the checksum of the third header
    path = tmp_path / f"data{kind}"
    path.write_bytes(gzip.compress(body) if kind == ".tar.gz" else body)
    with pytest.raises(DataError, match="must be a whole archive"):
        sync(str(path), workdir, belongs)


def test_a_damaged_header_just_before_the_end_is_not_it(tmp_path: Path, workdir: Path) -> None:
    """An empty file's: after it there are the nulls that mark the end."""
    path = Path(pack(tmp_path / "data.tar", TREE | {"train/empty-99.png": b""}))
    body = bytearray(path.read_bytes())
    at = body.index(b"train/empty-99.png")
    assert not any(body[at + tarfile.BLOCKSIZE :])
    body[at + 150] ^= 1
    path.write_bytes(body)
    with pytest.raises(DataError, match="breaks off or a header is damaged"):
        sync(str(path), workdir, belongs)


@pytest.mark.parametrize("level", [0, 9])
def test_a_flipped_bit_in_a_compressed_tar_is_noticed(level: int, tmp_path: Path, workdir: Path) -> None:
    tar = Path(pack(tmp_path / "whole.tar", TREE)).read_bytes()
    whole = gzip.compress(tar, level)
    path = tmp_path / "data.tar.gz"
    for position in range(10, len(whole), max(1, len(whole) // 61)):
        body = bytearray(whole)
        body[position] ^= 4
        path.write_bytes(body)
        assert "must be a whole archive" in (refusal(path, workdir) or "")


def test_a_flipped_bit_in_a_zipped_file_is_noticed(tmp_path: Path, workdir: Path) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("train/x-0.png", b"a body to be found")
    body = path.read_bytes()
    path.write_bytes(body.replace(b"a body", b"A body"))
    with pytest.raises(DataError, match="must be a whole archive: Bad CRC-32"):
        sync(str(path), workdir, belongs)


@pytest.mark.parametrize("packing", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_flipped_bit_in_a_compressed_zip_is_noticed(packing: int, tmp_path: Path, workdir: Path) -> None:
    name, path = "train/x-0.png", tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr(name, os.urandom(1000))
    body = bytearray(path.read_bytes())
    body[30 + len(name) + 100] ^= 4
    path.write_bytes(body)
    with pytest.raises(DataError, match="must be a whole archive"):
        sync(str(path), workdir, belongs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", [b"", b"no archive at all" * 100, bytes(10240)], ids=["empty", "text", "zeros"])
def test_what_is_no_archive_is_refused(body: bytes, kind: str, tmp_path: Path, workdir: Path) -> None:
    path = tmp_path / f"data{kind}"
    path.write_bytes(body)
    with pytest.raises(DataError, match=rf"data{kind}: must "):
        sync(str(path), workdir, belongs)


def test_an_encrypted_zip_is_refused(tmp_path: Path, workdir: Path) -> None:
    path = Path(pack(tmp_path / "data.zip", TREE))
    body = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := body.find(mark, at + 1)) >= 0:
            body[at + flags] |= 1
    path.write_bytes(body)
    with pytest.raises(DataError, match=r"must be a whole archive: .*encrypted"):
        sync(str(path), workdir, belongs)


def test_a_zip_with_an_impossible_name_or_offset_is_refused(tmp_path: Path, workdir: Path) -> None:
    nameless = Path(pack(tmp_path / "nameless.zip", TREE | {"?": b"nameless"}))
    nameless.write_bytes(nameless.read_bytes().replace(b"?", b"\0"))  # a name ends where a zero is
    with pytest.raises(DataError, match="a name must have no empty part"):
        sync(str(nameless), workdir, belongs)
    undecodable = Path(pack(tmp_path / "undecodable.zip", TREE | {"é": b""}))
    undecodable.write_bytes(undecodable.read_bytes().replace("é".encode(), b"\xff\xff"))
    with pytest.raises(DataError, match="must be a whole archive"):
        sync(str(undecodable), workdir, belongs)
    path = Path(pack(tmp_path / "offset.zip", TREE))
    body = bytearray(path.read_bytes())
    body[-6:-2] = (len(body) + 100).to_bytes(4, "little")  # where the directory is said to start
    path.write_bytes(body)
    with pytest.raises(DataError, match="must be a whole archive"):
        sync(str(path), workdir, belongs)


def lying_zip(path: Path, body: bytes, declared: int, crc: int) -> str:
    """A zip whose one member has `body`, but declares another size and CRC."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/x-0.png", body)
    packed = path.read_bytes()
    for true, lie in ((len(body), declared), (zlib.crc32(body), crc)):
        old = true.to_bytes(4, "little")
        assert packed.count(old) == 2
        packed = packed.replace(old, lie.to_bytes(4, "little"))
    path.write_bytes(packed)
    return str(path)


def test_a_zipped_file_larger_than_it_declares_is_refused(tmp_path: Path, workdir: Path) -> None:
    body = bytes(1_000_000)
    with pytest.raises(DataError, match="must be a whole archive: Bad CRC-32"):
        sync(lying_zip(tmp_path / "bomb.zip", body, 1000, zlib.crc32(body)), workdir, belongs)
    assert all(len(file) <= 1000 for file in bodies(workdir / "data").values())


def test_a_zipped_file_smaller_than_it_declares_is_refused(tmp_path: Path, workdir: Path) -> None:
    body = os.urandom(100_000)
    with pytest.raises(DataError, match=r"'train/x-0.png': must have the 100001 bytes it declares, has 100000"):
        sync(lying_zip(tmp_path / "short.zip", body, 100_001, zlib.crc32(body)), workdir, belongs)
