"""Any classification model of torchvision, with our head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from crowdlayer.errors import SettingsError
from crowdlayer.learning.classifier import _default_weights, build_classifier, has_small_stem, head, n_weights

FAMILIES = [
    ("alexnet", 64),
    ("convnext_tiny", 32),
    ("densenet121", 32),
    ("efficientnet_b0", 32),
    ("googlenet", 64),
    ("inception_v3", 96),
    ("mnasnet0_5", 32),
    ("mobilenet_v3_small", 32),
    ("regnet_y_400mf", 32),
    ("resnet18", 64),
    ("resnext50_32x4d", 32),
    ("shufflenet_v2_x0_5", 32),
    ("squeezenet1_1", 32),
    ("swin_t", 32),
    ("vgg11", 32),
    ("vit_b_16", 32),
]


@pytest.mark.parametrize(("name", "size"), FAMILIES)
def test_every_family_gets_the_head_and_freeze_leaves_only_it(name: str, size: int) -> None:
    model = build_classifier(name, 5, size, pretrained=False, freeze=True, small_images="auto")
    with torch.inference_mode():
        assert model.eval()(torch.zeros(2, 3, size, size)).shape == (2, 5)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in head(model).parameters()}
    assert not any(isinstance(m, nn.Linear) and m.out_features == 1000 for m in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", models.list_models(module=models))
def test_every_model_works(name: str) -> None:
    model = build_classifier(name, 7, 224, pretrained=False, freeze=False, small_images="auto")
    with torch.inference_mode():
        assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 7)


def test_how_many_weights_there_are_is_known_before_a_network_is_built() -> None:
    for name in models.list_models(module=models):
        assert n_weights(name) > 10**6
    thousand = build_classifier("resnet18", 1000, 224, pretrained=False, freeze=False, small_images="auto")
    assert n_weights("resnet18") == sum(weight.numel() for weight in thousand.parameters())


def test_an_image_size_that_the_model_cannot_take_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"IMG_SIZE: MODEL=inception_v3 must be able to take .* got 32"):
        build_classifier("inception_v3", 5, 32, pretrained=False, freeze=False, small_images="auto")


def test_small_images_get_a_stem_that_keeps_the_resolution() -> None:
    small = build_classifier("resnet18", 5, 32, pretrained=False, freeze=False, small_images="auto")
    assert has_small_stem(small)
    stem = small.get_submodule("conv1")
    with torch.inference_mode():
        assert stem(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    for size, choice in ((64, "auto"), (32, "false")):
        assert not has_small_stem(build_classifier("resnet18", 5, size, False, False, choice))
    assert has_small_stem(build_classifier("resnet18", 5, 64, False, False, "true"))


def test_models_without_such_a_stem_refuse_it_only_when_asked() -> None:
    build_classifier("squeezenet1_1", 5, 32, pretrained=False, freeze=False, small_images="auto")
    with pytest.raises(SettingsError, match="SMALL_IMAGES: true needs a resnet-like MODEL"):
        build_classifier("squeezenet1_1", 5, 32, pretrained=False, freeze=False, small_images="true")


def test_pretrained_weights_load_offline_and_the_head_is_new(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = models.resnet18(num_classes=1000)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    torch.manual_seed(0)
    model = build_classifier("resnet18", 5, 64, tmp_path / "w.pth", False, "auto")
    assert torch.equal(model.get_parameter("layer1.0.conv1.weight"), source.layer1[0].conv1.weight)
    assert model.get_parameter("fc.weight").shape == (5, 512)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 96)])
def test_torchvisions_weights_see_the_pixels_that_they_see_in_torchvisions_network(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = models.get_model(name, weights=None, init_weights=False).state_dict()
    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", lambda *_, **__: state)
    theirs, ours = models.get_model(name, weights="DEFAULT"), build_classifier(name, 1000, size, True, False, "auto")
    for module in [*theirs.modules(), *ours.modules()]:
        module.training = isinstance(module, nn.BatchNorm2d)  # by statistics of random weights all images are alike
    images = torch.randn(4, 3, size, size)
    torch.testing.assert_close(ours(images), theirs(images))
    assert not caplog.records
    torch.save(state, tmp_path / "w.pth")
    for pretrained in (False, tmp_path / "w.pth"):
        assert not build_classifier(name, 5, size, pretrained, False, "auto").transform_input
    assert "torchvision's own weights want PRETRAINED=true" in caplog.text


def test_weights_that_want_other_pixels_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", lambda *_, **__: {})
    told = []
    for name in models.list_models(module=models):
        caplog.clear()
        _default_weights(name)
        told += [name] if "and get ImageNet's" in caplog.text else []
    assert told == ["efficientnet_v2_l"]


def test_auxiliary_outputs_of_pretrained_weights_are_left_away(tmp_path: Path) -> None:
    source = models.googlenet(num_classes=1000, aux_logits=True, init_weights=False)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = build_classifier("googlenet", 5, 64, tmp_path / "w.pth", False, "auto")
    assert torch.equal(model.get_parameter("conv1.conv.weight"), source.conv1.conv.weight)


def test_a_best_model_of_ours_is_a_start_too(tmp_path: Path) -> None:
    first = build_classifier("resnet18", 5, 64, pretrained=False, freeze=False, small_images="auto")
    torch.save({"confusion": torch.eye(5)[None], "classifier": first.state_dict()}, tmp_path / "best.pth")
    second = build_classifier("resnet18", 5, 64, tmp_path / "best.pth", False, "auto")
    assert torch.equal(second.get_parameter("fc.weight"), first.get_parameter("fc.weight"))


@pytest.mark.parametrize("content", ["text", "other model", "list", "model", "sparse", "empty"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "w.pth"
    weights = models.resnet18().state_dict()
    match content:
        case "text":
            path.write_text("not a state dict")
        case "list":
            torch.save([1, 2], path)
        case "other model":
            torch.save(models.squeezenet1_1().state_dict(), path)
        case "model":
            torch.save(models.resnet18(), path)
        case "sparse":
            torch.save(weights | {"layer1.0.bn1.bias": torch.zeros(64).to_sparse()}, path)
        case "empty":
            torch.save(weights | {"layer1.0.bn1.bias": torch.empty(64, device="meta")}, path)
    with pytest.raises(SettingsError, match="PRETRAINED") as refused:
        build_classifier("resnet18", 5, 64, path, False, "auto")
    assert "two options" not in str(refused.value)  # torch's, of which the job has none


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "owned",))  # type: ignore[return-value]

    torch.save({"w": Evil()}, tmp_path / "w.pth")
    with pytest.raises(SettingsError, match="weights_only=True"):
        build_classifier("resnet18", 5, 64, tmp_path / "w.pth", False, "auto")
    assert not (tmp_path / "owned").exists()
