"""Pictures beside the results, under the names that people look for: curves, confusion matrices, sheets of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..data.dataset import Dataset
from ..data.decoding import Decoded
from ..learning import metrics
from ..learning.experiment import Images, Outcome
from . import charts
from .drawing import LIGHT, Drawing, Text, beside, shortened, to_picture

ON_A_SHEET = 16
SIDE = 150
"""Pixels of an image on a sheet."""
LINE = 18
"""Pixels of a line below it."""
MOST_CLASSES = 200
"""Of more classes there is no picture of the confusion matrix."""


def write_pictures(folder: Path, dataset: Dataset, outcome: Outcome, images: Images) -> list[str]:
    """Write all pictures into `folder`; returns their names."""
    history, classes = outcome.history, legible(dataset.classes)
    drawn = [charts.curves("loss", {"train": history.train_loss, "val": history.val_loss}, outcome.best.epoch, "loss")]
    if any(value is not None for value in history.val_accuracy):
        drawn.append(charts.curves("accuracy", {"val accuracy": history.val_accuracy}, outcome.best.epoch, "%"))
    pictures = {"results.png": to_picture(beside(drawn))}

    predictions = outcome.predictions
    split, part, logits = "test", dataset.test, predictions.test
    if part is None or logits is None:
        split, part, logits = "val", dataset.val, predictions.validation
    if part is not None and len(classes) <= MOST_CLASSES:
        table = metrics.confusion_matrix(logits.argmax(1), torch.from_numpy(part.labels), len(classes)).tolist()
        for name, normalised in (("confusion_matrix.png", False), ("confusion_matrix_normalized.png", True)):
            pictures[name] = to_picture(titled(charts.matrix(classes, table, normalised, size=600), split, normalised))

    labels = outcome.inferred.labels.label
    held = torch.from_numpy(dataset.val.labels) if dataset.val is not None else labels[len(dataset.train.names) :]
    pictures["train_batch0.jpg"] = sheet(images.train, labels, classes)
    pictures["val_batch0_labels.jpg"] = sheet(images.validation, held, classes)
    pictures["val_batch0_pred.jpg"] = sheet(images.validation, predictions.validation.argmax(1), classes)
    for name, picture in pictures.items():
        picture.save(folder / name)
    return list(pictures)


def titled(drawing: Drawing, split: str, normalised: bool) -> Drawing:
    """The drawing with a line below that says what it is."""
    what = f"{split}/, {'percent of each true class' if normalised else 'images'}"
    drawing.add(Text(8, drawing.height + 8, what))
    drawing.width = max(drawing.width, 14 + 6.4 * len(what))
    drawing.height += 20
    return drawing


def legible(names: Sequence[str]) -> list[str]:
    """The names as a picture can show them: one with a letter that its font lacks is its number, `#2`, from 0."""
    font = ImageFont.load_default(13)
    box = bytes(font.getmask("\uffff"))  # no letter, and what all look like that are not there
    missing = {letter for letter in set("".join(names)) if bytes(font.getmask(letter)) == box}
    return [name if missing.isdisjoint(name) else f"#{number}" for number, name in enumerate(names)]


def sheet(images: Decoded, labels: Tensor, classes: Sequence[str]) -> Image.Image:
    """Images from all over, each with the class that `labels` (n,) gives it below."""
    rows = np.unique(np.linspace(0, len(images) - 1, ON_A_SHEET).round().astype(int)).tolist()
    across = min(4, len(rows))
    gap, cell = 6, SIDE + LINE
    size = (across * (SIDE + gap) + gap, -(-len(rows) // across) * (cell + gap) + gap)
    page = Image.new("RGB", size, LIGHT["paper"])
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    shown = images[torch.tensor(rows)].numpy()
    for place, (row, pixels) in enumerate(zip(rows, shown, strict=True)):
        x, y = gap + place % across * (SIDE + gap), gap + place // across * (cell + gap)
        page.paste(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR), (x, y))
        name = shortened(classes[int(labels[row])], 20)
        draw.text((x + SIDE / 2, y + SIDE + LINE / 2), name, LIGHT["ink"], font, anchor="mm")
    return page
