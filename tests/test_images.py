"""Files → bytes → batches."""

from __future__ import annotations

import math
import threading
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms

from crowdlayer.answers import Answers
from crowdlayer.data.decoding import decode_all
from crowdlayer.data.images import CrowdLoader, ImageLoader, ahead
from crowdlayer.data.pixels import DRAWS, MEAN, STD, affine, augment, normalise
from crowdlayer.errors import DataError

CPU = torch.device("cpu")


def picture(size: int = 40) -> Image.Image:
    """A smooth picture whose corners differ."""
    y, x = np.mgrid[0:size, 0:size] / size
    return Image.fromarray((np.stack([x, y, x * y], -1) * 255).astype(np.uint8))


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


def test_batches_lie_as_the_cpus_convolutions_want_them() -> None:
    batch = next(iter(CrowdLoader(numbered(8), uneven(8), 8, 0, False, CPU)))
    assert batch.images.is_contiguous()


def test_evaluation_takes_every_image_once_in_order() -> None:
    loader = ImageLoader(numbered(10), torch.arange(10), 4, CPU)
    batches = list(loader)
    assert [i for images, _ in batches for i in identities(images)] == list(range(10))
    assert [int(label) for _, labels in batches for label in labels] == list(range(10))
    assert len(loader) == len(batches) == 3


def test_batches_made_ahead_are_the_same_and_their_errors_arrive() -> None:
    def numbers(n: int) -> Generator[int, None, None]:
        yield from range(n)
        raise DataError("no more")

    made = ahead(numbers(5))
    assert [next(made) for _ in range(5)] == list(range(5))
    with pytest.raises(DataError, match="no more"):
        next(made)


def test_an_epoch_that_is_left_early_leaves_no_thread() -> None:
    before = threading.active_count()
    made = ahead(iter(range(5)))
    assert next(made) == 0
    made.close()
    assert threading.active_count() == before


def test_images_that_are_decoded_again_give_the_same_batches(tmp_path: Path) -> None:
    for i in range(9):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"{i}.png")
    names = [f"{i}.png" for i in range(9)]
    epochs = []
    for at_most in (math.inf, 0):
        images, _ = decode_all(tmp_path, names, 4, 2, None, at_most=at_most)
        loader = CrowdLoader(images, uneven(9), 4, 0, True, CPU)
        epochs.append([batch.images for _ in range(2) for batch in loader])
        predicted = [images for images, _ in ImageLoader(images, None, 4, CPU)]
        assert [i for part in predicted for i in identities(part)] == list(range(9))
    for held, again in zip(*epochs, strict=True):
        assert torch.equal(held, again)


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
    out = augment(images, affine(draws(400, FLIP), torch.ones(400)))
    same = (out - images).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (out - images.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    assert (same ^ mirrored).all()
    assert 0.4 < mirrored.float().mean() < 0.6


@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (96, 32)], ids=str)
def test_a_shear_is_torchvisions_at_the_same_angle(shape: tuple[int, int]) -> None:
    """Which peerannot does to the picture as it is, and resizes afterwards."""
    height, width = shape
    whole = F.interpolate(image_batch(1, 24), size=shape, mode="bilinear")  # smooth: what resizing loses is little
    images = F.interpolate(whole, size=64, mode="bilinear").expand(5, -1, -1, -1)
    table = draws(5, SHEAR)
    table[:, 1] = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.999])  # -15° … 15°
    out = augment(images, affine(table, torch.full((5,), width / height)))
    black = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)]).view(3, 1, 1)
    for row, angle in enumerate([-15.0, -7.5, 0.0, 7.5, 14.97]):
        candidates = [
            transforms.functional.affine(
                whole[0] - black,
                angle=0.0,
                translate=[0, 0],
                scale=1.0,
                shear=[sign * angle, 0.0],
                interpolation=transforms.InterpolationMode.BILINEAR,
            )
            for sign in (1, -1)
        ]
        theirs = [F.interpolate(sheared[None], size=64, mode="bilinear")[0] + black for sheared in candidates]
        assert min(float((out[row] - sheared).abs().mean()) for sheared in theirs) < 0.05


def test_what_a_shear_brings_in_is_black() -> None:
    table = draws(1, SHEAR)
    table[:, 1] = 0.0
    out = augment(image_batch(1), affine(table, torch.ones(1)))
    black = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)])
    corners = torch.stack([out[0, :, 0, 0], out[0, :, 0, -1], out[0, :, -1, 0], out[0, :, -1, -1]])
    assert ((corners - black).abs().amax(1) < 1e-4).sum() == 2


@pytest.mark.parametrize("shape", [(256, 256), (480, 640), (200, 400), (800, 200)], ids=str)
def test_crops_have_the_areas_ratios_and_places_of_torchvisions(shape: tuple[int, int]) -> None:
    """Of pictures that are not square, too, of which the longest ones often have none that fits."""
    n, size, (high, wide) = 6000, 64, shape
    whole = torch.empty(3, *shape)
    boxes = [transforms.RandomResizedCrop.get_params(whole, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    i, j, h, w = torch.tensor(boxes).T / torch.tensor([high, wide, high, wide])[:, None]
    theta = affine(draws(n, CROP), torch.full((n,), wide / high))
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    ramp = torch.stack([x, y, x]).expand(n, 3, size, size)  # pixel values tell their own coordinates
    black = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)]).view(1, 3, 1, 1)
    out = augment(ramp + black, theta) - black
    width = (out[:, 0, :, -8] - out[:, 0, :, 7]).mean(1) / (2 * (size - 15) / (size - 1))
    height = (out[:, 1, -8, :] - out[:, 1, 7, :]).mean(1) / (2 * (size - 15) / (size - 1))
    left, top = (out[:, axis, size // 2, size // 2] - side for axis, side in enumerate((width, height)))
    ours = torch.stack([width * height, (width / height).log(), width, height, left, top])
    theirs = torch.stack([h * w, (w / h).log(), w, h, 2 * j - 1, 2 * i - 1])
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        torch.testing.assert_close(ours.quantile(q, dim=1), theirs.quantile(q, dim=1), atol=0.06, rtol=0)


def test_the_three_choices_are_equally_likely() -> None:
    choice = (torch.rand(30000, generator=torch.Generator().manual_seed(0)) * 3).long()
    counts = torch.bincount(choice, minlength=3)
    assert (counts / 30000 - 1 / 3).abs().max() < 0.02
    images = image_batch(2)
    sheared, cropped = (augment(images, affine(draws(2, choice), torch.ones(2))) for choice in (SHEAR, CROP))
    assert F.mse_loss(sheared, cropped) > 0


def test_augmented_batches_are_the_same_for_the_same_seed_and_differ_between_epochs() -> None:
    def epoch_images(seed: int) -> list[torch.Tensor]:
        pixels = torch.from_numpy(np.asarray(picture(16)).copy()).expand(12, 16, 16, 3).contiguous()
        loader = CrowdLoader(pixels, uneven(12), 12, seed, True, CPU)
        return [next(iter(loader)).images for _ in range(2)]

    torch.testing.assert_close(epoch_images(0), epoch_images(0), atol=0, rtol=0)
    assert not torch.equal(*epoch_images(0))
