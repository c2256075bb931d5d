"""Files → bytes, once."""

from __future__ import annotations

import copy
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torchvision import transforms

from crowdlayer.data import picture as module
from crowdlayer.data.decoding import Decoded, decode_all
from crowdlayer.data.images import Rows
from crowdlayer.data.picture import BrokenImageError, decode, decode_with_aspect
from crowdlayer.data.pixels import MEAN, STD, normalise
from crowdlayer.errors import DeviceMemoryError, StoreError
from crowdlayer.inputs import read_inputs
from crowdlayer.learning.experiment import Phases, load_images
from crowdlayer.machine import memory
from crowdlayer.settings import Settings
from crowdlayer.storage.files import SPARE, file_digest
from tests.test_images import CPU, picture


def test_images_are_decoded_and_normalised_as_peerannot_does(tmp_path: Path) -> None:
    picture().resize((50, 40)).save(tmp_path / "x.png")
    theirs = transforms.Compose(
        [transforms.Resize((24, 24)), transforms.ToTensor(), transforms.Normalize(list(MEAN), list(STD))]
    )(Image.open(tmp_path / "x.png").convert("RGB"))
    ours = normalise(torch.from_numpy(decode(tmp_path / "x.png", 24).copy())[None], CPU)
    torch.testing.assert_close(ours[0], theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode in ("CMYK", "YCbCr") else "x.png")
    picture().convert(mode).save(path)
    pixels = decode(path, 16)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    expected = np.asarray(picture().convert(mode).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR))
    assert np.abs(pixels.astype(int) - expected).mean() < 12


def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path) -> None:
    wide = (np.linspace(0, 65535, 256).reshape(16, 16)).astype(np.uint16)
    for name in ("x.png", "x.tif"):
        Image.fromarray(wide).save(tmp_path / name)
        assert np.abs(decode(tmp_path / name, 16)[..., 0].astype(int) - (wide >> 8)).max() <= 1


@pytest.mark.parametrize("value", [-1000, 2**20])
def test_integers_of_another_range_are_none(tmp_path: Path, value: int) -> None:
    """Below 0 they would be white, as air in a CT slice."""
    Image.fromarray(np.array([[40, value]], dtype=np.int32)).save(tmp_path / "x.tiff")
    with pytest.raises(BrokenImageError, match=f"must be from 0 to 65535, one is {value}"):
        decode(tmp_path / "x.tiff", 8)


@pytest.mark.parametrize("most", [1023, 65535])
def test_a_grey_map_says_itself_what_its_white_is(tmp_path: Path, most: int) -> None:
    wide = np.linspace(0, most, 64).reshape(8, 8).astype(">u2")
    (tmp_path / "x.pgm").write_bytes(b"P5 8 8 %d\n" % most + wide.tobytes())
    assert decode(tmp_path / "x.pgm", 8)[..., 0].ravel()[[0, -1]].tolist() == [0, 255]


def test_float_images_are_taken_from_zero_to_one(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "x.tiff")
    assert decode(tmp_path / "x.tiff", 8)[..., 0].ravel()[[0, -1]].tolist() == [0, 255]


def test_float_images_of_another_range_are_none(tmp_path: Path) -> None:
    """Above 1 all would be white."""
    Image.fromarray(np.linspace(0, 255, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "x.tiff")
    with pytest.raises(BrokenImageError, match="must be from 0 to 1, one is 255"):
        decode(tmp_path / "x.tiff", 8)
    Image.fromarray(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "x.tiff")
    with pytest.raises(BrokenImageError, match="must be from 0 to 1, one is -1"):
        decode(tmp_path / "x.tiff", 8)


def test_a_palette_with_transparency_does_not_warn(tmp_path: Path) -> None:
    picture().convert("P").save(tmp_path / "x.png", transparency=bytes([0, 128, 255]))
    assert decode(tmp_path / "x.png", 8).shape == (8, 8, 3)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "x.jpg", exif=exif, quality=95)
    upright = np.asarray(picture().rotate(-90).resize((8, 8), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(decode(tmp_path / "x.jpg", 8) - upright).mean() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_put_upright_as_pillow_does(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture().resize((24, 16)).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        upright = ImageOps.exif_transpose(image)
    pixels, aspect = decode_with_aspect(tmp_path / "x.png", 8)
    assert pixels.tolist() == np.asarray(upright.resize((8, 8), Image.Resampling.BILINEAR)).tolist()
    assert aspect == float(f"{upright.width / upright.height:.4g}")


def exif_of(*entries: tuple[int, int, bytes]) -> bytes:
    """A block of (tag, type, four bytes)."""
    packed = b"".join(struct.pack("<HHI4s", tag, kind, 1, value) for tag, kind, value in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (exif_of((0x112, 1, b"\6\0\0\0")), False),  # a byte
        (exif_of((0x112, 2, b"6\0\0\0")), False),  # text
        (exif_of((0x112, 3, b"\x63\0\0\0")), False),  # 99
        (b"Exif\0\0no TIFF at all", False),
        (exif_of((0x112, 3, b"\6\0\0\0"), (0x128, 2, b"2\0\0\0")), True),  # another tag is odd
    ],
    ids=["byte", "text", "99", "no block", "another"],
)
def test_odd_exif_makes_no_picture_broken(tmp_path: Path, kind: str, exif: bytes, turned: bool) -> None:
    picture().resize((24, 16)).save(tmp_path / f"x.{kind}", exif=exif)
    with Image.open(tmp_path / f"x.{kind}") as image:
        plain = image.convert("RGB")
    expected = (plain.transpose(Image.Transpose.ROTATE_270) if turned else plain).resize((8, 8), 2)
    assert decode(tmp_path / f"x.{kind}", 8).tolist() == np.asarray(expected).tolist()


def test_files_that_are_no_images_are_all_named(tmp_path: Path) -> None:
    picture().save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "empty.png").touch()
    (tmp_path / "other.png").write_bytes(whole)
    images, broken = decode_all(tmp_path, ["cut.png", "good.png", "page.jpg", "empty.png", "other.png"], 8, 2, None)
    assert list(broken) == ["cut.png", "page.jpg", "empty.png"]
    assert all(reason and str(tmp_path) not in reason for reason in broken.values())
    assert images[:].tolist() == [decode(tmp_path / "good.png", 8).tolist()] * 2


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 2**20
    with pytest.raises(BrokenImageError, match="900000000 pixels"):
        decode(tmp_path / "bomb.png", 8)


def test_a_picture_that_there_is_no_memory_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would kill the process, and nobody would know for which picture."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("LA", (5000, 4000)).save(tmp_path / "large.png", exif=exif)
    Image.new("L", (5000, 4000)).save(tmp_path / "grey.png")
    with monkeypatch.context() as small:
        small.setattr(module, "free_memory", lambda: 230_000_000)
        small.setattr(Image.Image, "load", None)  # decoded it would have its memory already
        with pytest.raises(DeviceMemoryError, match=r"large\.png: 5000 × 4000 pixels take up to 240 MB, 230 are free"):
            decode(tmp_path / "large.png", 8)
    monkeypatch.setattr(module, "free_memory", lambda: 21_000_000)
    assert decode(tmp_path / "grey.png", 8).shape == (8, 8, 3)
    monkeypatch.setattr(module, "free_memory", lambda: 250_000_000)
    assert decode(tmp_path / "large.png", 8).shape == (8, 8, 3)


def test_a_format_that_starts_other_programs_is_no_image(tmp_path: Path) -> None:
    picture().save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.jpg")
    with pytest.raises(BrokenImageError, match="no known format"):
        decode(tmp_path / "x.jpg", 8)


def test_a_file_that_is_gone_is_a_failing_disk_and_no_broken_image(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"x\.png: No such file"):
        decode_all(tmp_path, ["x.png"], 8, 1, None)


def test_decoded_images_leave_no_file_behind(tmp_path: Path) -> None:
    picture().save(tmp_path / "x.png")
    (tmp_path / "work").mkdir()
    images, _ = decode_all(tmp_path, ["x.png"], 8, 1, tmp_path / "work")
    assert images[:].shape == (1, 8, 8, 3)
    assert list((tmp_path / "work").iterdir()) == []


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path: Path) -> None:
    picture(512).save(tmp_path / "x.jpg", quality=95)
    whole = np.asarray(Image.open(tmp_path / "x.jpg").resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(decode(tmp_path / "x.jpg", 32) - whole).mean() < 1


# --- held, kept, or decoded again ------------------------------------------------------------------------------------


def some_files(folder: Path, n: int = 6) -> tuple[list[str], list[str]]:
    """Images that can be told apart, the third broken; their names and digests."""
    names = [f"{i}.png" for i in range(n)]
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / name)
    (folder / names[2]).write_bytes(b"no image")
    return names, [file_digest(folder / name) for name in names]


def levels(images: Rows) -> list[int]:
    return [int(image[0, 0, 0]) for image in images[:]]


def test_the_shape_that_a_picture_had_is_known(tmp_path: Path) -> None:
    """Upright, and not that of a JPEG's draft; to the next start, too."""
    Image.new("RGB", (1003, 401)).save(tmp_path / "a.jpg")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (100, 40)).save(tmp_path / "b.jpg", exif=exif)
    (tmp_path / "c.png").write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(tmp_path / "d.png")
    Image.new("RGB", (100, 40)).save(tmp_path / "e.tiff", exif=exif)
    names = ["a.jpg", "b.jpg", "c.png", "d.png", "e.tiff"]
    expected = torch.tensor([2.501, 0.4, 1.0, 0.4])
    for _ in range(2):
        images, _ = decode_all(tmp_path, names, 8, 2, tmp_path / "work", ("train", names))
        assert torch.equal(images.aspect, expected)
    assert torch.equal(images.chosen(torch.tensor([1, 0])).aspect, expected[[1, 0]])


@pytest.mark.parametrize("held", [0, 1, 3, 5])
def test_images_that_find_no_room_are_decoded_when_asked_for(
    tmp_path: Path, held: int, caplog: pytest.LogCaptureFixture
) -> None:
    names, _ = some_files(tmp_path)
    images, broken = decode_all(tmp_path, names, 8, 2, None, at_most=held * 8 * 8 * 3)
    assert list(broken) == ["2.png"]
    assert levels(images) == [0, 1, 3, 4, 5]
    some = images.chosen(torch.tensor([4, 0, 2]))
    assert (levels(some), len(some)) == ([5, 0, 3], 3)
    assert [int(image[0, 0, 0]) for image in some[torch.tensor([2, 2, 1])]] == [3, 3, 0]
    assert not images.all_held
    assert f"{held} of 6 decoded images of 192 bytes are held" in caplog.text


def test_images_leave_room_on_the_disk_for_the_checkpoints(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of 22 MB: a run that fills its disk with images would end at its first."""
    settings = Settings(tasks=str(shapes), model="shufflenet_v2_x0_5", img_size=16)
    inputs = read_inputs(settings, tmp_path, Phases())
    usage = shutil.disk_usage(tmp_path)
    for megabytes, held in ((60, False), (70, True)):
        free = SPARE + megabytes * 10**6
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        _, images = load_images(inputs.dataset, inputs.synced.root, settings, 0, None)
        assert isinstance(images.train, Decoded)
        assert images.train.all_held == held


def test_an_image_that_is_gone_when_asked_for_is_a_failing_disk(tmp_path: Path) -> None:
    names, _ = some_files(tmp_path)
    images, _ = decode_all(tmp_path, names, 8, 2, None, at_most=0)
    (tmp_path / "5.png").unlink()
    with pytest.raises(StoreError, match=r"5\.png: No such file"):
        images[:]


def test_kept_images_are_found_by_the_next_start_without_the_files(tmp_path: Path) -> None:
    work = tmp_path / "work"
    names, digests = some_files(tmp_path)
    first, broken = decode_all(tmp_path, names, 8, 2, work, ("train", digests))
    for name in names:
        (tmp_path / name).unlink()
    second, again = decode_all(tmp_path, names, 8, 2, work, ("train", digests))
    assert levels(first) == levels(second) == [0, 1, 3, 4, 5]
    assert again == broken


def test_images_that_found_no_room_are_held_when_there_is_some_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = tmp_path / "work"
    names, digests = some_files(tmp_path)
    for room, held in ((0, 0), (3 * 192, 0), (5 * 192, 0), (6 * 192, 6), (0, 6)):  # some more would not be worth a pass
        caplog.clear()
        images, broken = decode_all(tmp_path, names, 8, 2, work, ("train", digests), at_most=room)
        assert (images.all_held, levels(images), list(broken)) == (held == 6, [0, 1, 3, 4, 5], ["2.png"])
        assert (f"{held} of 6 decoded images of 192 bytes are held" in caplog.text) == (held < 6)


@pytest.mark.parametrize("harm", ["killed while decoding", "cut", "another size", "another file"])
def test_what_was_kept_of_other_images_or_not_whole_is_not_used(tmp_path: Path, harm: str) -> None:
    work, size = tmp_path / "work", 8
    names, digests = some_files(tmp_path)
    decode_all(tmp_path, names, 8, 2, work, ("val", digests))
    decode_all(tmp_path, names, 8, 2, work, ("train", digests))
    (kept,) = (path for path in (work / "cache").glob("images-train-*") if path.suffix == "")
    match harm:
        case "killed while decoding":
            kept.with_suffix(".json").unlink()
            kept.write_bytes(bytes(kept.stat().st_size))
        case "cut":
            kept.write_bytes(kept.read_bytes()[:-1])
        case "another size":
            size = 16
        case _:
            Image.new("RGB", (8, 8), (99, 99, 99)).save(tmp_path / names[0])
            digests[0] = file_digest(tmp_path / names[0])
    images, _ = decode_all(tmp_path, names, size, 2, work, ("train", digests))
    assert levels(images) == [99 if harm == "another file" else 0, 1, 3, 4, 5]
    assert len([path for path in (work / "cache").iterdir() if path.suffix == ""]) == 2  # of val and of train


def test_of_several_processes_one_decodes_and_all_see_the_same(tmp_path: Path) -> None:
    names, digests = some_files(tmp_path)
    (tmp_path / "work").mkdir()
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys, logging, pathlib; from crowdlayer.data.decoding import decode_all\n"
                "logging.basicConfig(level=logging.INFO)\n"
                f"folder = pathlib.Path({str(tmp_path)!r})\n"
                f"images, _ = decode_all(folder, {names!r}, 8, 1, folder / 'work', ('train', {digests!r}))\n"
                "print([int(i[0, 0, 0]) for i in images[:]])",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert [out.strip() for out, _ in said] == ["[0, 1, 3, 4, 5]"] * 3
    assert sum("decoded images found" in err for _, err in said) == 2


@pytest.mark.parametrize("available", [0, 2**40], ids=["too little memory", "enough memory"])
def test_what_memory_cannot_hold_is_the_same_images(
    available: int, tmp_path: Path, cgroup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if memory.in_memory(tmp_path):
        pytest.skip("the folder for temporary files is in memory: it has no room for what memory cannot hold")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text(f"MemAvailable: {available // 1024} kB\n")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 50, 50, 3), dtype=np.uint8)  # no multiple of a page
    for row, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{row}.png")
    images, broken = decode_all(tmp_path, [f"{row}.png" for row in range(9)], 50, 1, None)
    assert not broken
    assert (images._held.mapping is None) == (available > 0)
    copied = copy.deepcopy(images)
    assert copied._held.rows.data_ptr() == images._held.rows.data_ptr()
    for rows in (torch.tensor([8, 0, 3, 3]), slice(5, 9), torch.arange(9)):
        assert np.array_equal(images[rows].numpy(), pixels[rows])
        assert np.array_equal(copied[rows].numpy(), pixels[rows])
