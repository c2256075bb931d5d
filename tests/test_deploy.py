"""A model written for other programs computes what the trained one does, in every format."""

from __future__ import annotations

import io
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import ExifTags, Image, ImageOps
from safetensors.torch import load_file

from crowdlayer import Crowdlayer
from crowdlayer.data.picture import decode
from crowdlayer.data.pixels import normalise
from crowdlayer.deployment.export import Format, export
from crowdlayer.deployment.model_files import Deployed, Description, read_model, write_model
from crowdlayer.deployment.predictor import Predictor, load, model_folder
from crowdlayer.errors import AccessError, DataError, SettingsError, StoreError
from crowdlayer.learning.classifier import build_classifier
from tests.conftest import ROOT, Store, forbid
from tests.test_readme import DOCS, blocks

SIZE = 24
CLASSES = ["cat", "dog", "a bird, perhaps"]


def a_classifier(small_stem: bool = True, architecture: str = "resnet18") -> torch.nn.Module:
    """Random weights, batch norm's too, ready to predict."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = build_classifier(architecture, len(CLASSES), SIZE, False, False, "true" if small_stem else "false")
        made.train()(torch.randn(8, 3, SIZE, SIZE))
    return made.eval()


def written(folder: Path, temperature: float = 1.0, small_stem: bool = True) -> torch.nn.Module:
    """Write `a_classifier` into `folder`, and return it."""
    classifier = a_classifier(small_stem)
    write_model(folder, Description("resnet18", CLASSES, SIZE, small_stem, temperature), classifier.state_dict())
    return classifier


@contextmanager
def no_room() -> Iterator[None]:
    """For no file of more than a megabyte."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_room_for_the_model_is_told(tmp_path: Path) -> None:
    with no_room(), pytest.raises(StoreError, match="the model must be written whole"):
        written(tmp_path)


def some_images(folder: Path, n: int = 5) -> list[Path]:
    """Images of several sizes and modes."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(n)]
    for i, path in enumerate(paths):
        pixels = rng.integers(0, 256, (10 + 7 * i, 40 - 3 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(["RGB", "L", "RGBA"][i % 3]).save(path)
    return paths


@pytest.mark.parametrize("small_stem", [True, False])
def test_a_loaded_model_gives_the_trained_models_probabilities(tmp_path: Path, small_stem: bool) -> None:
    classifier = written(tmp_path / "model", temperature=1.7, small_stem=small_stem)
    images = some_images(tmp_path)

    found = load(tmp_path / "model").predict_proba(images, batch_size=2)

    pixels = torch.from_numpy(np.stack([decode(path, SIZE) for path in images]))
    with torch.inference_mode():
        wanted = (classifier(normalise(pixels, torch.device("cpu"))) / 1.7).softmax(1)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("architecture", ["googlenet", "resnet18"])
def test_a_run_with_torchvisions_weights_is_loaded_as_it_was_trained(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    """Googlenet's transform their input, and no weight says so."""
    data = shutil.copytree(shapes, tmp_path / "data")
    source = build_classifier(architecture, 1000, 64, False, False, "false").train()
    for module in source.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a mean of all batches: of weights that saw none, all images are alike
    source(torch.randn(8, 3, 64, 64))
    state = source.state_dict()
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *_, **__: state)
    strategy = Crowdlayer(data, None, architecture, 3, "sgd", 1, pretrained=True, img_size=64, lr=1e-3, verbose=False)
    temperature = strategy.run()["temperature"]
    model = load(data / "best_models/crowdlayer")
    test = sorted((data / "test").rglob("*.png"))
    pixels = normalise(torch.from_numpy(np.stack([decode(path, 64) for path in test])), torch.device("cpu"))
    with torch.inference_mode():
        wanted = (strategy.model.eval()(pixels) / temperature).softmax(1)
    np.testing.assert_allclose(model.predict_proba(test), wanted, atol=1e-5)
    assert model.description.transform_input == (architecture == "googlenet")


def test_the_pages_lines_put_the_weights_of_small_images_into_torchvisions_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    classifier = a_classifier(small_stem=True)
    Path("best_models").mkdir()
    torch.save({"classifier": classifier.state_dict()}, "best_models/crowdlayer.pth")
    (lines,) = [block for block in blocks(DOCS / "using-the-model.md", "python") if "network.conv1" in block]
    names: dict[str, Any] = {"torch": torch, "torchvision": torchvision}
    exec(lines, names)
    images = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(names["network"].eval()(images), classifier(images))


def test_paths_pillow_images_and_arrays_are_the_same_to_it(tmp_path: Path) -> None:
    written(tmp_path / "model")
    model, paths = load(tmp_path / "model"), some_images(tmp_path)
    opened = [Image.open(path) for path in paths]
    arrays = [np.asarray(image) for image in opened]

    from_paths = model.predict_proba(paths)

    np.testing.assert_array_equal(model.predict_proba(map(str, paths)), from_paths)
    np.testing.assert_array_equal(model.predict_proba(opened), from_paths)
    np.testing.assert_array_equal(model.predict_proba(arrays), from_paths)
    assert model.predict(paths) == [CLASSES[i] for i in from_paths.argmax(1)]
    assert model.predict_proba([]).shape == (0, len(CLASSES))


def test_a_grey_array_may_have_an_axis_for_its_channel(tmp_path: Path) -> None:
    written(tmp_path / "model")
    model, grey = load(tmp_path / "model"), np.arange(30, dtype=np.uint8).reshape(5, 6)
    np.testing.assert_array_equal(model.predict_proba([grey[..., None]]), model.predict_proba([grey]))


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    written(tmp_path / "model")
    (tmp_path / "torn.jpg").write_bytes(b"no image")
    model = load(tmp_path / "model")
    with pytest.raises(DataError, match=r"torn\.jpg: must be an image"):
        model.predict_proba([*some_images(tmp_path), tmp_path / "torn.jpg"])
    with pytest.raises(TypeError, match="must be a sequence of images, got one str"):
        model.predict_proba("torn.jpg")


@pytest.mark.parametrize(
    "image", [None, b"bytes", io.BytesIO(), torch.zeros(8, 8, 3), np.zeros((8, 8, 3)), float("nan")]
)
def test_what_is_no_image_and_has_no_name_is_told_by_its_place(tmp_path: Path, image: Any) -> None:
    written(tmp_path / "model")
    with pytest.raises(DataError, match=r"^image 3: must be an image: "):
        load(tmp_path / "model").predict_proba([*some_images(tmp_path, 3), image], batch_size=2)


def test_an_image_without_pixels_is_none(tmp_path: Path) -> None:
    written(tmp_path / "model")
    for image in (np.zeros((0, 5, 3), np.uint8), Image.new("RGB", (9, 9)).crop((5, 5, 5, 5))):
        with pytest.raises(DataError, match="image 0: must be an image: it has no pixels"):
            load(tmp_path / "model").predict([image])


def test_one_array_is_no_sequence_of_images(tmp_path: Path) -> None:
    written(tmp_path / "model")
    with pytest.raises(TypeError, match="must be a sequence of images, got one ndarray"):
        load(tmp_path / "model").predict_proba(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_has_at_least_one_image(tmp_path: Path, batch_size: int) -> None:
    written(tmp_path / "model")
    with pytest.raises(ValueError, match=f"batch_size: must be at least 1, got {batch_size}"):
        load(tmp_path / "model").predict_proba(some_images(tmp_path, 1), batch_size)


def test_a_callers_image_stays_as_it_is_and_may_be_there_twice(tmp_path: Path) -> None:
    """Pillow reads a file when its pixels are asked for: threads that ask at once would tear it."""
    written(tmp_path / "model")
    model = load(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (640, 480, 3), dtype=np.uint8)
    for name in ("x.jpg", "x.png", "x.webp"):
        Image.fromarray(pixels).save(tmp_path / name)
        for _ in range(3):
            opened = Image.open(tmp_path / name)
            found = model.predict_proba([opened] * 8)
            assert opened.size == (480, 640)
            np.testing.assert_allclose(found, found[:1].repeat(8, 0), atol=1e-6)


def test_many_batches_keep_their_order(tmp_path: Path) -> None:
    written(tmp_path / "model")
    model, paths = load(tmp_path / "model"), some_images(tmp_path)
    once = model.predict_proba(paths)
    np.testing.assert_allclose(model.predict_proba(paths * 7, batch_size=3), np.tile(once, (7, 1)), atol=1e-6)


def test_the_documents_recipe_prepares_a_photo_as_we_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A phone's: which way up it is stands in its EXIF data."""
    exif, pixels = Image.Exif(), np.zeros((30, 40, 3), np.uint8)
    exif[ExifTags.Base.Orientation], pixels[:15] = 6, (200, 30, 30)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    text = (ROOT / "crowdlayer/docs/using-the-model.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("image = ")]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"Image": Image, "ImageOps": ImageOps, "size": SIZE}
    exec(line, names)
    assert np.abs(np.asarray(names["image"]).astype(int) - decode(tmp_path / "a.jpg", SIZE)).max() <= 1


def test_other_programs_find_all_they_need(tmp_path: Path) -> None:
    classifier = written(tmp_path, temperature=2.0)
    said = json.loads((tmp_path / "model.json").read_text())
    assert (said["architecture"], said["classes"], said["image_size"]) == ("resnet18", CLASSES, SIZE)
    assert (said["small_stem"], said["temperature"]) == (True, 2.0)
    assert said["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == classifier.state_dict().keys()


@pytest.mark.parametrize(
    ("location", "folder"),
    [
        ("s3://bucket/p/results/run.json", "s3://bucket/p/best_models/run"),
        ("results/run.json", "best_models/run"),
        ("/out/best_models/run.pth", "/out/best_models/run"),
        ("/out/best_models/run/", "/out/best_models/run"),
        ("/out/best_models/run/model.safetensors", "/out/best_models/run"),
        ("/out/results/run.pth.json", "/out/best_models/run.pth"),
        ("/out/results/model.json", "/out/best_models/model"),  # of OUTPUT_NAME=model
        ("/out/best_models/model/model.json", "/out/best_models/model"),
        ("/out/best_models/results/model.json", "/out/best_models/results"),  # of OUTPUT_NAME=results
        ("s3://best_models/results/run.json", "s3://best_models/best_models/run"),
    ],
)
def test_a_model_is_found_by_whatever_of_the_run_is_named(location: str, folder: str) -> None:
    assert model_folder(location) == folder


@pytest.mark.parametrize("spoilt", ["model.json", "model.safetensors"])
def test_what_is_no_model_is_refused(tmp_path: Path, spoilt: str) -> None:
    written(tmp_path)
    (tmp_path / spoilt).write_bytes(b"{}")
    with pytest.raises(DataError, match=r"must hold model\.safetensors and model\.json"):
        read_model(tmp_path)


@pytest.mark.parametrize("missing", ["model.json", "model.safetensors"])
def test_a_model_of_which_a_file_is_missing_is_refused_with_its_name(tmp_path: Path, missing: str) -> None:
    written(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(DataError, match=rf"{tmp_path}: must hold .*{missing} is missing"):
        load(tmp_path)


@pytest.mark.parametrize("unreadable", ["model.json", "model.safetensors"])
def test_a_model_that_may_not_be_read_is_refused_access(nobody: Path, unreadable: str) -> None:
    forbid(nobody, 0o777)
    for name in ("model.json", "model.safetensors"):
        (nobody / name).write_bytes(b"{}")
    (nobody / unreadable).chmod(0)
    with pytest.raises(AccessError, match="must be accessible: Permission denied"):
        load(nobody)


def test_a_model_of_a_bucket_that_finds_no_room_here_is_a_failing_disk(tmp_path: Path, store: Store) -> None:
    written(tmp_path)
    location = store.put_tree(tmp_path, "out/best_models/run")
    with no_room(), pytest.raises(StoreError, match="File too large"):
        load(location)
    assert load(location).classes == tuple(CLASSES)


def test_a_model_that_prepares_images_in_another_way_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    said = json.loads((tmp_path / "model.json").read_text())
    said["preprocessing"]["mean"] = [0.5, 0.5, 0.5]
    (tmp_path / "model.json").write_text(json.dumps(said))
    with pytest.raises(DataError, match="preprocessing must be what crowdlayer"):
        load(tmp_path)


def test_a_model_is_found_from_within_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "best_models/run")
    (tmp_path / "results").mkdir()
    for folder, name in (("results", "run.json"), ("best_models", "run.pth"), ("best_models/run", ".")):
        monkeypatch.chdir(tmp_path / folder)
        assert load(name).classes == tuple(CLASSES)


def test_a_model_is_single_precision_whatever_the_programs_numbers_are(tmp_path: Path) -> None:
    written(tmp_path / "model")
    image = some_images(tmp_path, 1)
    wanted = load(tmp_path / "model").predict_proba(image)
    torch.set_default_dtype(torch.float64)
    try:
        np.testing.assert_allclose(load(tmp_path / "model").predict_proba(image), wanted, atol=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


def test_loading_leaves_the_programs_random_numbers_alone(tmp_path: Path) -> None:
    written(tmp_path)
    before = torch.get_rng_state()
    load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_exports_take_bytes_of_any_number_of_images_and_give_the_same_probabilities(tmp_path: Path) -> None:
    """In a process that has neither this package nor the weights."""
    (tmp_path / "model").mkdir()
    deployed = Deployed(a_classifier(small_stem=False, architecture="squeezenet1_1"), 1.5)
    names = export(tmp_path / "model", deployed, SIZE, ["onnx", "torch_export"])
    assert names == ["model.onnx", "model.pt2"]
    pixels = np.stack([decode(path, SIZE) for path in some_images(tmp_path, 3)])
    np.save(tmp_path / "pixels.npy", pixels)
    program = """
import numpy, onnxruntime, torch
pixels = numpy.load("pixels.npy")
session = onnxruntime.InferenceSession("model/model.onnx", providers=["CPUExecutionProvider"])
numpy.save("onnx.npy", session.run(["probabilities"], {"images": pixels})[0])
module = torch.export.load("model/model.pt2").module()
numpy.save("torch_export.npy", torch.cat([module(torch.from_numpy(p[None])) for p in pixels]).detach().numpy())
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=300)
    wanted = Predictor(deployed, Description("squeezenet1_1", CLASSES, SIZE, False, 1.5)).predict_proba(list(pixels))
    for name in ("onnx", "torch_export"):
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), wanted, atol=1e-4)


class Moody(torch.nn.Module):
    """Never the same answer twice: no export can be right."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.rand_like(images.mean((2, 3)))


class Branching(torch.nn.Module):
    """Decides by a value of its input, which no graph can hold."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores = images.mean((2, 3))
        return scores if float(scores.sum()) > 0 else -scores


@pytest.mark.parametrize(("network", "reason"), [(Moody(), "is off by"), (Branching(), "cannot hold this MODEL")])
def test_an_export_that_computes_something_else_is_refused(
    tmp_path: Path, network: torch.nn.Module, reason: str
) -> None:
    with pytest.raises(SettingsError, match=reason):
        export(tmp_path, Deployed(network, 1.0), SIZE, ["torch_export"])


@pytest.mark.parametrize("form", ["onnx", "torch_export"])
def test_an_export_that_finds_no_room_is_a_failing_disk(tmp_path: Path, form: Format) -> None:
    """No fault of the model's; and torch's own writer aborts the process."""
    model = Deployed(a_classifier(small_stem=False, architecture="squeezenet1_1"), 1.0)
    with no_room(), pytest.raises(StoreError, match=f"^{tmp_path}: "):
        export(tmp_path, model, SIZE, [form])
