"""Names and answers → a data set: what peerannot trips over, and what nobody should."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from crowdlayer.data.classes import best_order
from crowdlayer.data.dataset import Dataset, without_broken
from crowdlayer.data.layout import belongs, image_types, read_dataset
from crowdlayer.errors import DataError, SettingsError
from crowdlayer.settings import DataSettings


def names(**splits: list[str]) -> list[str]:
    return [f"{split}/{name}" for split, images in splits.items() for name in images]


Read = Callable[..., Dataset]


def test_images_are_what_torchvision_takes_for_them() -> None:
    assert image_types() == IMG_EXTENSIONS


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Read a data set of these names and answers; images are not opened at this stage."""

    def reader(
        images: list[str],
        answers: Any,
        metadata: Any = None,
        removed: str | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Dataset:
        (tmp_path / "answers.json").write_text(json.dumps(answers))
        if metadata is not None:
            (tmp_path / "metadata.json").write_text(metadata if isinstance(metadata, str) else json.dumps(metadata))
        path = None
        if removed is not None:
            path = tmp_path / "remove.txt"
            path.write_text(removed)
        group = DataSettings(tasks=str(tmp_path), **settings)
        return read_dataset(tmp_path, images, group, tmp_path / "answers.json", path, seed)

    return reader


VAL = ["a/v-0.png", "b/v-1.png"]


def votes(data: Dataset, name: str) -> dict[str, str]:
    """What each worker answered about the image, by names."""
    row = list(data.train.names).index(name)
    chosen = data.train.answers.task == row
    return {
        data.workers[w]: data.classes[label]
        for w, label in zip(data.train.answers.worker[chosen], data.train.answers.label[chosen], strict=True)
    }


def test_ids_from_one_are_not_shifted(read: Read) -> None:
    data = read(names(train=["a/x-1.png", "b/x-2.png"], val=VAL), {"1": {"0": 0}, "2": {"0": 1}, "3": {"0": 0}})
    assert votes(data, "train/a/x-1.png") == {"0": "a"}
    assert votes(data, "train/b/x-2.png") == {"0": "b"}


def test_gaps_and_text_ids_and_leading_zeros_find_their_images(read: Read) -> None:
    images = names(train=["a/x-007.png", "b/cell_é.png", "b/x-4000.png"], val=VAL)
    data = read(images, {"7": {"ann": 0}, "cell_é": {"bob": "b"}, "04000": {"ann": 1, "bob": 0}})
    assert votes(data, "train/a/x-007.png") == {"ann": "a"}
    assert votes(data, "train/b/cell_é.png") == {"bob": "b"}
    assert votes(data, "train/b/x-4000.png") == {"ann": "b", "bob": "a"}


def test_the_whole_stem_goes_before_its_last_part(read: Read) -> None:
    data = read(
        names(train=["a/scan-3.png", "a/other-4.png"], val=VAL), {"scan-3": {"0": 0}, "3": {"0": 1}, "4": {"0": 1}}
    )
    assert votes(data, "train/a/scan-3.png") == {"0": "a"}
    assert data.left_out["answered_tasks_without_image"] == 1


def test_images_without_answers_and_answers_without_images_are_counted_and_said(
    read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        data = read(
            names(train=["a/x-1.png", "a/x-2.png", "a/x-3.png"], val=VAL), {"1": {"0": 0}, "3": {}, "9": {"0": 1}}
        )
    assert data.left_out == {
        "images_without_answers": 2,
        "answered_tasks_without_image": 1,
        "tasks_removed": 0,
        "broken_images": 0,
    }
    assert data.train.names == ["train/a/x-1.png"]
    assert "2 images without answers" in caplog.text
    assert "1 answered tasks without image" in caplog.text


def test_workers_whose_tasks_were_all_left_out_have_no_matrix(read: Read) -> None:
    data = read(names(train=["a/x-1.png"], val=VAL), {"1": {"5": 0}, "9": {"3": 1}})
    assert data.workers == ["5"]


def test_without_val_a_share_of_the_tasks_is_held_out(read: Read) -> None:
    images = names(train=[f"x-{i}.png" for i in range(40)])
    answers = {str(i): {"0": i % 2, "1": 0} for i in range(40)}
    data = read(images, answers, val_fraction=0.25)
    assert data.val is None
    assert data.held_out is not None
    assert (len(data.train.names), len(data.held_out.names)) == (30, 10)
    assert not set(data.train.names) & set(data.held_out.names)
    assert read(images, answers, val_fraction=0.25).held_out.names == data.held_out.names  # type: ignore[union-attr]
    assert read(images, answers, val_fraction=0.25, seed=1).held_out.names != data.held_out.names  # type: ignore[union-attr]


def test_without_test_there_is_none(read: Read) -> None:
    assert read(names(train=["x-1.png"], val=VAL), {"1": {"0": 0}}).test is None


def test_classes_have_names_of_any_script(read: Read) -> None:
    """With the joiners of Persian, Hindi and emoji, and the space of Japan."""
    classes = ["गुलाब\u200dजल", "گربه\u200cها", "三毛\u3000猫", "👩\u200d🌾"]
    data = read(
        names(train=["x-1.png", "x-2.png"], val=[f"{name}/0.png" for name in classes]), {"1": {"0": classes[1]}}
    )
    assert sorted(data.classes) == sorted(classes)
    assert votes(data, "train/x-1.png") == {"0": classes[1]}


def test_train_needs_no_class_folders(read: Read) -> None:
    data = read(names(train=["x-1.png", "deep/er/x-2.png"], val=VAL), {"1": {"0": 0}, "2": {"0": 1}})
    assert data.classes == ["a", "b"]
    assert data.train.truth.tolist() == [-1, -1]


def test_true_labels_go_by_name_so_a_split_may_lack_a_class(read: Read) -> None:
    images = names(train=["x-1.png"], val=["a/v.png", "c/v.png"], test=["b/t.png", "c/t.png"])
    data = read(images, {"1": {"0": 2}})
    assert data.classes == ["a", "b", "c"]
    assert data.val is not None
    assert data.test is not None
    assert (data.val.labels.tolist(), data.test.labels.tolist()) == ([0, 2], [1, 2])


def test_a_class_may_be_in_train_alone(read: Read) -> None:
    data = read(names(train=["a/x-1.png", "c/x-2.png"], val=VAL), {"1": {"0": 0}, "2": {"0": "c"}})
    assert data.classes == ["a", "b", "c"]


def test_folders_of_train_that_name_no_class_are_no_classes(read: Read) -> None:
    data = read(names(train=["batch1/x-1.png", "batch2/x-2.png"], val=VAL), {"1": {"0": 0}, "2": {"0": 1}})
    assert data.classes == ["a", "b"]


@pytest.mark.parametrize("n_classes", [1, 7])
def test_metadata_with_another_class_count_is_warned_about(
    read: Read, caplog: pytest.LogCaptureFixture, n_classes: int
) -> None:
    data = read(names(train=["x-1.png"], val=VAL), {"1": {"0": 0}}, {"n_classes": n_classes})
    assert data.classes == ["a", "b"]
    assert f"n_classes={n_classes}, the data set has 2: a, b" in caplog.text


def test_n_classes_must_agree(read: Read) -> None:
    with pytest.raises(SettingsError, match=r"N_CLASSES: must agree with the data set's 2 classes \(a, b\), got 3"):
        read(names(train=["x-1.png"], val=VAL), {"1": {"0": 0}}, n_classes=3)


def test_classes_come_from_the_setting_then_metadata_then_folders_then_numbers(read: Read) -> None:
    images, answers, metadata = names(train=["x-1.png"], val=VAL), {"1": {"0": 0}}, {"classes": ["b", "a", "z"]}
    assert read(images, answers, metadata, classes=("b", "a")).classes == ["b", "a"]
    assert read(images, answers, metadata).classes == ["b", "a", "z"]
    assert read(images, answers, {}).classes == ["a", "b"]
    flat = names(train=["x-1.png", "x-2.png"])
    answers = {"1": {"0": 0}, "2": {"0": 1}}
    assert read(flat, answers, {"n_classes": 3}).classes == ["0", "1", "2"]
    assert read(flat, {"1": {"0": 0}, "2": {"0": 4}}, {}).classes == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("labels", "said"), [(range(12), True), (map(str, range(1, 12)), False), (map(str, range(11)), False)]
)
def test_folders_that_are_numbers_and_labels_that_count_them_are_said(
    read: Read, caplog: pytest.LogCaptureFixture, labels: Iterable[int | str], said: bool
) -> None:
    """As text 10 goes before 2; labels that name the folders, as all of a .csv may, mean what they say."""
    answers = {str(task): {"0": label} for task, label in enumerate(labels)}
    images = names(train=[f"x-{task}.png" for task in answers], val=[f"{i}/v-{i}.png" for i in range(12)])
    data = read(images, answers)
    assert data.classes[:4] == ["0", "1", "10", "11"]
    warning = "label 2 means class 10; if it shall mean 2, set CLASSES=0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11"
    assert (warning in caplog.text) is said


def test_n_workers_of_metadata_is_a_hint(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    data = read(names(train=["x-1.png"], val=VAL), {"1": {"0": 0, "far-beyond": 1}}, {"n_workers": 1})
    assert data.workers == ["0", "far-beyond"]
    assert "n_workers=1, 2 answered" in caplog.text


@pytest.mark.parametrize("word", ["cifar", "labelme", "music"])
def test_a_word_in_the_path_changes_nothing(word: str, tmp_path: Path) -> None:
    root = tmp_path / word
    root.mkdir()
    (root / "answers.json").write_text('{"1": {"0": 1}}')
    data = read_dataset(
        root, names(train=["a/x-1.png"], val=VAL), DataSettings(tasks=str(root)), root / "answers.json", None, 0
    )
    assert data.classes == ["a", "b"]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (names(train=["x-1.png"], val=["loose.png"]), "val/: must be named for one of the classes"),
        (
            names(train=["a/x-8.png"], val=VAL),
            "train/: at least one image must belong to an answered task, of 1 images",
        ),
        (names(train=["a/x-1.png", "b/y-1.jpg"], val=VAL), "task 1 must have one image, has train/a/x-1.png too"),
        (names(train=["x-1.png"]), "at least 2 answered tasks are needed"),
    ],
)
def test_what_cannot_be_used_is_named(read: Read, images: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(images, {"1": {"0": 0}}, classes=("a", "b"))


@pytest.mark.parametrize(
    "metadata",
    ["[]", "{", '{"n_classes": "8"}', '{"classes": ["a", "a"]}', '{"classes": ["a"]}', '{"n_classes": -1.5}'],
)
def test_metadata_of_the_wrong_form_is_refused(read: Read, metadata: str) -> None:
    with pytest.raises(DataError, match=r"metadata\.json"):
        read(names(train=["x-1.png"], val=VAL), {"1": {"0": 0}}, metadata)


def test_path_remove_takes_tasks_whatever_their_positions(read: Read) -> None:
    images = names(train=["a/x-5.png", "a/x-6.png", "b/x-7.png"], val=VAL)
    answers = {"5": {"0": 0}, "6": {"0": 0}, "7": {"0": 1}}
    by_task = read(images, answers, removed="-1 6\n-1 7\n")
    assert by_task.train.tasks == ["5"]
    assert by_task.left_out["tasks_removed"] == 2
    assert read(images, answers, removed="0 5\n2 7\n").train.tasks == ["6"]
    assert read(images, answers, removed="1 5\n0 7\n").train.tasks == ["6"]
    with pytest.raises(DataError, match="two integers per line"):
        read(images, answers, removed="hello\n")


def test_path_remove_leaves_a_task_whose_id_only_ends_like_that(read: Read) -> None:
    images = names(train=["5.png", "2019-5.png", "2020-7.png", "a-8.png"], val=VAL)
    answers = {"5": {"0": 0}, "2019-5": {"0": 0}, "7": {"0": 1}, "8": {"0": 1}}
    found = read(images, answers, removed="0 5\n0 7\n")
    assert sorted(found.train.tasks) == ["2019-5", "8"]
    assert found.left_out["tasks_removed"] == 2


def test_a_file_of_peerannots_takes_the_images_that_peerannot_would(read: Read, tmp_path: Path) -> None:
    """Its positions are ImageFolder's, which has a folder's own images before those of the folders in it."""
    images = ["train/a/x-5.png", "train/a/more/x-6.png", "train/a/more/x-7.png", "train/b/x-8.png"]
    for name in images:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    theirs = [path for path, _ in ImageFolder(tmp_path / "train").samples]
    removed = "".join(
        f"{theirs.index(str(tmp_path / f'train/{name}'))} {name[-5]}\n" for name in ("a/x-5.png", "b/x-8.png")
    )
    assert removed == "0 5\n3 8\n"
    data = read([*images, *names(val=VAL)], {str(task): {"0": 0} for task in range(5, 9)}, removed=removed)
    assert data.train.tasks == ["6", "7"]


def test_what_belongs_to_a_data_set() -> None:
    assert belongs("train/a/b/x-1.JPG")
    assert belongs("answers.json")
    assert belongs("val/a/x.webp")
    for stranger in [
        "train/Thumbs.db", "train/a/.x.png", "train/__MACOSX/a/x.png", "extra/x.png", "x.png", "train/x.gif",
        "train", "results/crowdlayer.json", "val/a/notes.txt", "train/.ipynb_checkpoints/x.png",
    ]:  # fmt: skip
        assert not belongs(stranger), stranger


# --- answers that count the classes in another order than the folders ------------------------------------------------

FOLDERS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PEERANNOT = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def crowd_labelled(
    classes: list[str], label_of: Mapping[str, int | str], n: int, right: float
) -> tuple[list[str], Any]:
    rng = np.random.default_rng(0)
    images, answers = [], {}
    for task in range(n):
        name = classes[task % len(classes)]
        images.append(f"train/{name}/x-{task}.png")
        answers[str(task)] = {
            str(w): label_of[name] if rng.random() < right else int(rng.integers(len(classes))) for w in range(3)
        }
    return images, answers


def test_classes_counted_in_another_order_stop_the_job_with_the_order_to_set(read: Read) -> None:
    order = {name: label for label, name in enumerate(PEERANNOT)}
    images, answers = crowd_labelled(PEERANNOT, order, 300, 0.9)
    with pytest.raises(DataError, match=f"CROWDLAYER_CLASSES={','.join(PEERANNOT)}"):
        read(images, answers)
    assert read(images, answers, classes=tuple(PEERANNOT)).classes == PEERANNOT


def test_the_order_to_set_can_be_set_whatever_the_names(read: Read) -> None:
    classes = ["dark, red", "[x]", "green"]
    images, answers = crowd_labelled(classes, {name: label for label, name in enumerate(classes)}, 90, 0.9)
    with pytest.raises(DataError) as raised:
        read(images, answers)
    suggestion = str(raised.value).rpartition("CROWDLAYER_CLASSES=")[2]
    assert DataSettings(tasks="data", classes=suggestion).classes == tuple(classes)


def test_a_folder_that_may_be_no_class_is_named_beside_the_order(read: Read) -> None:
    """Of train/Cat and val/cat one is a typing error; to put either somewhere in the order mends nothing."""
    order = {"cat": 0, "dog": 1, "owl": 2}
    images, answers = crowd_labelled(list(order), order, 90, 0.9)
    with pytest.raises(DataError, match="CROWDLAYER_CLASSES=cat,dog,owl,Cat; nothing tells the place of Cat: is it"):
        read([*images, "val/Cat/v-0.png", "val/dog/v-1.png", "val/owl/v-2.png"], answers)


def test_reversed_labels_stop_the_job(read: Read) -> None:
    reversed_order = {name: 9 - i for i, name in enumerate(FOLDERS)}
    images, answers = crowd_labelled(FOLDERS, reversed_order, 200, 0.7)
    with pytest.raises(DataError, match=f"CROWDLAYER_CLASSES={','.join(reversed(FOLDERS))}"):
        read(images, answers)


@pytest.mark.parametrize("right", [0.0, 0.15, 0.3, 0.9])
def test_a_bad_crowd_that_counts_as_we_do_is_let_through(read: Read, right: float) -> None:
    order = {name: i for i, name in enumerate(FOLDERS)}
    for n in (10, 40, 400):
        images, answers = crowd_labelled(FOLDERS, order, n, right)
        assert read(images, answers).classes == FOLDERS


def test_two_classes_that_the_crowd_confuses_are_let_through(read: Read) -> None:
    order = {name: i for i, name in enumerate(FOLDERS)} | {"cat": 5, "dog": 3}
    images, answers = crowd_labelled(FOLDERS, order, 300, 0.9)
    assert read(images, answers).classes == FOLDERS


def test_images_in_one_folder_that_is_named_like_a_class_agree_with_no_order(read: Read) -> None:
    """Suspects all, of which the crowd confirms a quarter: any order agrees as chance does."""
    images = names(train=[f"tumour/x-{i}.png" for i in range(80)], val=["normal/v-0.png", "tumour/v-1.png"])
    answers = {str(i): {"a": int(i % 4 == 0), "b": int(i % 4 == 0)} for i in range(80)}
    assert read(images, answers).classes == ["normal", "tumour"]


def test_folders_that_have_nothing_to_do_with_the_answers_agree_with_no_order(read: Read) -> None:
    """Two sites of unlike size, and two labels of unlike frequency."""
    rng = np.random.default_rng(0)
    images = [f"train/{int(rng.random() < 0.15)}/x-{i}.png" for i in range(300)]
    answers = {str(i): {"w": int(rng.random() < 0.85)} for i in range(300)}
    assert read(images, answers).classes == ["0", "1"]


def test_answers_that_name_the_classes_count_them_in_no_order(read: Read) -> None:
    """However wrong they are, to set another order would change nothing."""
    order = {"a": "b", "b": "c", "c": "a"}
    images, answers = crowd_labelled(list(order), order, 300, 0.95)
    named = {task: {w: x if isinstance(x, str) else "abc"[x] for w, x in by.items()} for task, by in answers.items()}
    assert read(images, named).classes == ["a", "b", "c"]
    counted = {task: {w: "abc".index(label) for w, label in by.items()} for task, by in named.items()}
    with pytest.raises(DataError, match="CROWDLAYER_CLASSES=c,a,b"):
        read(images, counted)


def test_two_classes_in_the_other_order_stop_the_job_though_one_is_rare(read: Read) -> None:
    rng = np.random.default_rng(0)
    truth = [int(rng.random() < 0.2) for _ in range(300)]
    images = [f"train/{'ab'[label]}/x-{i}.png" for i, label in enumerate(truth)]
    answers = {str(i): {"w": 1 - label if rng.random() < 0.95 else label} for i, label in enumerate(truth)}
    with pytest.raises(DataError, match="under the order CROWDLAYER_CLASSES=b,a"):
        read(images, answers)


def test_the_best_order_takes_the_largest_counts_first() -> None:
    assert best_order(np.array([[1, 9, 0], [8, 9, 0], [0, 0, 5]])).tolist() == [1, 0, 2]
    assert best_order(np.array([[0, 0, 0], [0, 0, 4], [0, 0, 9]])).tolist() == [0, 1, 2]
    assert best_order(np.zeros((3, 3), dtype=np.int64)).tolist() == [0, 1, 2]


def test_folders_of_train_that_are_no_classes_are_said(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    images = names(train=[f"day {i}/x-{i}.png" for i in range(5)])
    answers = {str(i): {"w": i % 3} for i in range(5)}
    assert len(read(images, answers).classes) == 5
    assert "the 5 folders of train/ are taken for the classes, the answers have the labels up to 2" in caplog.text
    caplog.clear()
    assert read(images, answers, n_classes=3).classes == ["0", "1", "2"]
    assert "the 5 folders of train/ are no classes: n_classes is 3" in caplog.text


def test_folders_and_names_are_the_same_in_both_forms_of_their_letters(read: Read) -> None:
    """The file systems of some machines write é in two letters."""
    one, two = "h\u00e9ron", "he\u0301ron"
    images = names(train=[f"{two}/{two}-a.png", "owl/x-b.png"], val=[f"{one}/v-0.png", f"{two}/v-1.png", "owl/v-2.png"])
    data = read(images, {f"{one}-a": {"w": one}, "b": {"w": two}})
    assert data.classes == [one, "owl"]
    assert data.val is not None
    assert data.val.labels.tolist() == [0, 0, 1]
    assert data.train.truth.tolist() == [0, 1]
    assert len(data.train.names) == 2
    with pytest.raises(DataError, match="must differ in more than the form of their letters"):
        read(images, {"b": {"w": 0}}, classes=(one, two, "owl"))


# --- broken images ---------------------------------------------------------------------------------------------------


def hundred(read: Read, val: list[str]) -> Dataset:
    return read(
        names(train=[f"x-{i}.png" for i in range(100 - len(val))], val=val), {str(i): {str(i): 0} for i in range(100)}
    )


def test_broken_images_are_left_out_with_their_answers_and_lone_workers(read: Read) -> None:
    data = without_broken(hundred(read, VAL), {"train/x-3.png": "cut", "val/a/v-0.png": "empty"}, 0.02)
    assert data.val is not None
    assert data.val.names == ["val/b/v-1.png"]
    assert (data.val.labels.tolist(), len(data.train.names)) == ([1], 97)
    assert "3" not in data.workers
    assert votes(data, "train/x-4.png") == {"4": "a"}
    assert data.left_out["broken_images"] == 2
    assert data.broken == {"train/x-3.png": "cut", "val/a/v-0.png": "empty"}


def test_held_out_images_may_be_broken_too(read: Read) -> None:
    data = hundred(read, [])
    assert data.held_out is not None
    first = data.held_out.names[0]
    left = without_broken(data, {first: "cut"}, 1)
    assert left.held_out is not None
    assert len(left.held_out.names) == len(data.held_out.names) - 1
    assert first not in left.held_out.names


@pytest.mark.parametrize(("at_most", "allowed"), [(0.0, False), (0.01, False), (0.02, True), (1.0, False), (2.0, True)])
def test_more_broken_images_than_a_share_or_a_number_are_refused(read: Read, at_most: float, allowed: bool) -> None:
    broken = {"train/x-3.png": "cut", "train/x-4.png": "empty"}
    if allowed:
        assert without_broken(hundred(read, VAL), broken, at_most).broken == broken
        return
    with pytest.raises(
        DataError, match=rf"2 of 100 images are broken, more than MAX_BAD_IMAGES={at_most:g} allows"
    ) as told:
        without_broken(hundred(read, VAL), broken, at_most)
    assert "train/x-3.png: must be an image: cut; train/x-4.png: must be an image: empty" in str(told.value)


def test_a_split_without_a_whole_image_is_refused(read: Read) -> None:
    with pytest.raises(DataError, match="val/: at least one image must be whole, none is"):
        without_broken(hundred(read, VAL), dict.fromkeys(["val/a/v-0.png", "val/b/v-1.png"], "cut"), 5)


def test_all_that_is_wrong_is_said_at_once(read: Read) -> None:
    with pytest.raises(DataError) as told:
        read(
            names(train=["a/x-1.png", "b/y-1.jpg"], val=["c/v-0.png"], test=["d/v-0.png"]),
            {"1": {"0": 7, "1": "cow"}},
            classes=("a", "b"),
        )
    assert str(told.value).count(";") == 4
    for said in (
        "label 7 is not below",
        "label cow is not",
        "val/c/: must be",
        "test/d/: must be",
        "must have one image",
    ):
        assert said in str(told.value)
