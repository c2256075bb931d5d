"""Files → bytes → batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms

from crowdlayer.answers import Answers
from crowdlayer.errors import StoreError
from crowdlayer.images import (
    DRAWS,
    MEAN,
    STD,
    BrokenImageError,
    CrowdLoader,
    ImageLoader,
    augment,
    decode,
    decode_all,
    normalise,
)

CPU = torch.device("cpu")


def picture(size: int = 40) -> Image.Image:
    """A smooth picture whose corners differ."""
    y, x = np.mgrid[0:size, 0:size] / size
    return Image.fromarray((np.stack([x, y, x * y], -1) * 255).astype(np.uint8))


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


def test_float_images_are_taken_from_zero_to_one(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "x.tiff")
    assert decode(tmp_path / "x.tiff", 8)[..., 0].ravel()[[0, -1]].tolist() == [0, 255]


def test_a_palette_with_transparency_does_not_warn(tmp_path: Path) -> None:
    picture().convert("P").save(tmp_path / "x.png", transparency=bytes([0, 128, 255]))
    assert decode(tmp_path / "x.png", 8).shape == (8, 8, 3)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "x.jpg", exif=exif, quality=95)
    upright = np.asarray(picture().rotate(-90).resize((8, 8), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(decode(tmp_path / "x.jpg", 8) - upright).mean() < 6


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
    assert images.tolist() == [decode(tmp_path / "good.png", 8).tolist()] * 2


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 2**20
    with pytest.raises(BrokenImageError, match="900000000 pixels"):
        decode(tmp_path / "bomb.png", 8)


def test_a_format_that_starts_other_programs_is_no_image(tmp_path: Path) -> None:
    picture().save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.jpg")
    with pytest.raises(BrokenImageError, match="no known format"):
        decode(tmp_path / "x.jpg", 8)


def test_a_file_that_is_gone_is_a_failing_disk_and_no_broken_image(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"x\.png: No such file"):
        decode_all(tmp_path, ["x.png"], 8, 1, None)


def test_disk_space_is_checked_before_decoding(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"disk: .* GB are needed for 1000000000 decoded images"):
        decode_all(tmp_path, range(10**9), 4096, 1, None)  # type: ignore[arg-type]


def test_decoded_images_leave_no_file_behind(tmp_path: Path) -> None:
    picture().save(tmp_path / "x.png")
    (tmp_path / "work").mkdir()
    images, _ = decode_all(tmp_path, ["x.png"], 8, 1, tmp_path / "work")
    assert images.shape == (1, 8, 8, 3)
    assert list((tmp_path / "work").iterdir()) == []


# --- batches ---------------------------------------------------------------------------------------------------------


def numbered(n: int) -> torch.Tensor:
    """Images that can be told apart: image i has every byte i."""
    return torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 4, 4, 3).contiguous()


def uneven(n: int) -> Answers:
    """Task i has i % 4 answers; worker and label tell the task."""
    task = np.repeat(np.arange(n), np.arange(n) % 4)
    return Answers(n, n, task, task.copy(), task % 3)


def identities(batch: torch.Tensor) -> list[int]:
    raw = (batch[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255
    return [round(float(value)) for value in raw]


@pytest.mark.parametrize(("n", "batch_size"), [(65, 64), (10, 3), (7, 7), (5, 100), (9, 2)])
def test_an_epoch_has_each_task_once_with_its_answers(n: int, batch_size: int) -> None:
    answers = uneven(n)
    loader = CrowdLoader(numbered(n), answers, batch_size, 0, False, CPU)
    seen, sizes = [], []
    for batch in loader:
        rows = identities(batch.images)
        seen += rows
        sizes.append(len(rows))
        for task, worker, label in zip(batch.task, batch.worker, batch.label, strict=True):
            assert rows[task] == int(worker)
            assert int(label) == rows[task] % 3
        assert len(batch.task) == sum(row % 4 for row in rows)
    assert sorted(seen) == list(range(n))
    assert len(sizes) == len(loader) == -(-n // batch_size)
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= batch_size


def test_no_batch_is_left_with_one_image() -> None:
    loader = CrowdLoader(numbered(65), uneven(65), 64, 0, False, CPU)
    assert [len(batch.images) for batch in loader] == [33, 32]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def orders(seed: int) -> list[list[int]]:
        loader = CrowdLoader(numbered(30), uneven(30), 8, seed, False, CPU)
        return [[i for batch in loader for i in identities(batch.images)] for _ in range(2)]

    assert orders(0) == orders(0)
    assert orders(0)[0] != orders(0)[1]
    assert orders(0) != orders(1)
    torch.manual_seed(5)  # the global stream plays no part
    assert orders(0) == orders(0)


def test_batches_lie_channels_last() -> None:
    batch = next(iter(CrowdLoader(numbered(8), uneven(8), 8, 0, False, CPU)))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_evaluation_takes_every_image_once_in_order() -> None:
    loader = ImageLoader(numbered(10), torch.arange(10), 4, CPU)
    batches = list(loader)
    assert [i for images, _ in batches for i in identities(images)] == list(range(10))
    assert [int(label) for _, labels in batches for label in labels] == list(range(10))
    assert len(loader) == len(batches) == 3


# --- augmentation ----------------------------------------------------------------------------------------------------


def draws(n: int, choice: float, seed: int = 0) -> torch.Tensor:
    table = torch.rand(n, DRAWS, generator=torch.Generator().manual_seed(seed))
    table[:, 0] = choice
    return table


SHEAR, FLIP, CROP = 0.1, 0.5, 0.9


def image_batch(n: int, size: int = 64) -> torch.Tensor:
    array = torch.from_numpy(np.asarray(picture(size)).copy())
    return normalise(array.expand(n, size, size, 3).contiguous(), CPU)


def test_half_of_the_flips_mirror_the_image_and_half_leave_it() -> None:
    images = image_batch(400)
    out = augment(images, draws(400, FLIP))
    same = (out - images).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (out - images.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    assert (same ^ mirrored).all()
    assert 0.4 < mirrored.float().mean() < 0.6


def test_a_shear_is_torchvisions_at_the_same_angle() -> None:
    images = image_batch(5)
    table = draws(5, SHEAR)
    table[:, 1] = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.999])  # -15° … 15°
    out = augment(images, table)
    pixels = (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).clamp(0, 1)
    for row, angle in enumerate([-15.0, -7.5, 0.0, 7.5, 14.97]):
        candidates = [
            transforms.functional.affine(
                pixels[row],
                angle=0.0,
                translate=[0, 0],
                scale=1.0,
                shear=[sign * angle, 0.0],
                interpolation=transforms.InterpolationMode.BILINEAR,
            )
            for sign in (1, -1)
        ]
        ours = out[row] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        assert min(float((ours - theirs).abs().mean()) for theirs in candidates) < 0.01


def test_what_a_shear_brings_in_is_black() -> None:
    table = draws(1, SHEAR)
    table[:, 1] = 0.0
    out = augment(image_batch(1), table)
    black = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)])
    corners = torch.stack([out[0, :, 0, 0], out[0, :, 0, -1], out[0, :, -1, 0], out[0, :, -1, -1]])
    assert ((corners - black).abs().amax(1) < 1e-4).sum() == 2


def test_crops_have_the_areas_ratios_and_places_of_torchvisions() -> None:
    n, size = 3000, 64
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    ramp = torch.stack([x, y, x]).expand(n, 3, size, size).contiguous()  # pixel values tell their own coordinates
    black = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)]).view(1, 3, 1, 1)
    out = augment(ramp + black, draws(n, CROP)) - black
    width = (out[:, 0, :, -8] - out[:, 0, :, 7]).mean(1) / (2 * (size - 15) / (size - 1))
    height = (out[:, 1, -8, :] - out[:, 1, 7, :]).mean(1) / (2 * (size - 15) / (size - 1))
    ours = torch.stack([width * height, (width / height).log()])
    boxes = [
        transforms.RandomResizedCrop.get_params(torch.empty(3, 256, 256), [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)
    ]
    i, j, h, w = torch.tensor(boxes).T / 256
    theirs = torch.stack([h * w, (w / h).log()])
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        torch.testing.assert_close(ours.quantile(q, dim=1), theirs.quantile(q, dim=1), atol=0.05, rtol=0)
    centre_x, centre_y = out[:, 0, size // 2, size // 2], out[:, 1, size // 2, size // 2]
    assert abs(float(centre_x.mean())) < 0.05
    assert float((centre_x.std() - (2 * (j + w / 2) - 1).std()).abs()) < 0.05
    assert float((centre_y.std() - (2 * (i + h / 2) - 1).std()).abs()) < 0.05


def test_the_three_choices_are_equally_likely() -> None:
    choice = (torch.rand(30000, generator=torch.Generator().manual_seed(0)) * 3).long()
    counts = torch.bincount(choice, minlength=3)
    assert (counts / 30000 - 1 / 3).abs().max() < 0.02
    images = image_batch(2)
    assert F.mse_loss(augment(images, draws(2, SHEAR)), augment(images, draws(2, CROP))) > 0


def test_augmented_batches_are_the_same_for_the_same_seed_and_differ_between_epochs() -> None:
    def epoch_images(seed: int) -> list[torch.Tensor]:
        pixels = torch.from_numpy(np.asarray(picture(16)).copy()).expand(12, 16, 16, 3).contiguous()
        loader = CrowdLoader(pixels, uneven(12), 12, seed, True, CPU)
        return [next(iter(loader)).images for _ in range(2)]

    torch.testing.assert_close(epoch_images(0), epoch_images(0), atol=0, rtol=0)
    assert not torch.equal(*epoch_images(0))
