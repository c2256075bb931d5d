"""The pictures beside the results show something, and in letters that they have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from crowdlayer.report.pictures import write_pictures
from tests.crowds import simulate
from tests.test_view import made_up


def test_the_pictures_are_pictures(beside: Path) -> None:
    pictures = [path for path in beside.iterdir() if path.suffix in (".png", ".jpg")]
    assert len(pictures) == 6
    for path in pictures:
        with Image.open(path) as picture:
            assert min(picture.size) > 100
            assert len(picture.convert("RGB").getcolors(10**7) or []) > 20


def test_a_class_whose_letters_the_pictures_lack_is_its_number_there(tmp_path: Path) -> None:
    dataset, outcome, images = made_up(simulate(0, n_classes=3, n_tasks=200, n_workers=10, per_task=2))
    for folder, classes in (("named", ["cat", "Bär", "猫"]), ("numbered", ["cat", "#1", "#2"])):
        (tmp_path / folder).mkdir()
        names = write_pictures(tmp_path / folder, replace(dataset, classes=classes), outcome, images)
    for name in names:
        assert (tmp_path / "named" / name).read_bytes() == (tmp_path / "numbered" / name).read_bytes()
