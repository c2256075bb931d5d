"""Folders and buckets behind one interface: what is put in a folder is whole, what is read is what is there."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from crowdlayer.errors import AccessError, DataError, SettingsError, StoreError
from crowdlayer.storage.files import Stored
from crowdlayer.storage.places import Folder, place
from crowdlayer.storage.s3 import Bucket
from tests.conftest import forbid
from tests.objects import written

MB = 2**20


# --- which place -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "bucket", "prefix", "shown"),
    [
        ("s3://b", "b", "", "s3://b"),
        ("s3://b/", "b", "", "s3://b"),
        ("s3://b/data", "b", "data/", "s3://b/data"),
        ("s3://b/a/data/", "b", "a/data/", "s3://b/a/data"),
        *(
            (
                f"s3://arn:aws:s3:eu-west-1:1:accesspoint{mark}p/a",
                "arn:aws:s3:eu-west-1:1:accesspoint:p",
                "a/",
                "s3://arn:aws:s3:eu-west-1:1:accesspoint:p/a",
            )
            for mark in ":/"
        ),
    ],
)
def test_an_s3_uri_names_a_bucket_and_a_prefix_with_or_without_slashes(
    location: str, bucket: str, prefix: str, shown: str
) -> None:
    found = place(location)
    assert isinstance(found, Bucket)
    assert (found.bucket, found.prefix, found.location) == (bucket, prefix, shown)


def test_anything_else_names_a_folder(tmp_path: Path) -> None:
    found = place(str(tmp_path))
    assert isinstance(found, Folder)
    assert (found.path, found.location) == (tmp_path, str(tmp_path))


# --- what is in a folder ---------------------------------------------------------------------------------------------


def test_a_folder_lists_all_files_below_with_their_sizes(tmp_path: Path) -> None:
    written(tmp_path / "b" / "two.txt", b"22")
    written(tmp_path / "one", b"1")
    (tmp_path / "empty").mkdir()
    assert Folder(tmp_path).listing() == [Stored("b/two.txt", 2, ""), Stored("one", 1, "")]


def test_links_in_a_folder_are_followed_and_a_loop_ends(tmp_path: Path) -> None:
    written(tmp_path / "elsewhere" / "x.png", b"x")
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "train" / "file.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "data" / "train" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "train" / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "data" / "itself").symlink_to("itself")
    names = [stored.name for stored in Folder(tmp_path / "data").listing()]
    assert names == ["train/file.png", "train/linked/x.png"]


def test_a_folder_that_two_links_lead_to_is_there_twice(tmp_path: Path) -> None:
    written(tmp_path / "val" / "cat" / "x.png", b"x")
    (tmp_path / "test").symlink_to("val")
    assert [stored.name for stored in Folder(tmp_path).listing()] == ["test/cat/x.png", "val/cat/x.png"]


def test_a_folder_deeper_than_any_name_is_refused(tmp_path: Path) -> None:
    """A bucket's names and an archive's are as long; beyond, Python's own stack would end."""
    (tmp_path / "/".join(11 * ["d" * 100])).mkdir(parents=True)
    with pytest.raises(DataError, match="a name must have at most 1024 bytes"):
        Folder(tmp_path).listing()


def test_a_folder_that_is_not_entered_is_not_read(tmp_path: Path) -> None:
    for name in ("lost+found/#12", "train/lost+found/x", "train/x"):
        written(tmp_path / name, b"")
    names = [stored.name for stored in Folder(tmp_path).listing(lambda name: name == "train")]
    assert names == ["train/x"]


def test_a_file_in_the_place_of_a_folder_is_a_wrong_setting(tmp_path: Path) -> None:
    source = written(tmp_path / "file", b"x")
    for location in (source, source / "deeper"):
        with pytest.raises(SettingsError, match=f"{location}: must be a folder, a file is in its place: {source}$"):
            Folder(location).upload(source, "results/x")


def test_a_folder_that_is_not_there_is_a_wrong_setting(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nothing: must be a folder, an s3:// URI or an archive"):
        Folder(tmp_path / "nothing").listing()


def test_a_folder_finds_and_reads_its_files_and_misses_others(tmp_path: Path) -> None:
    written(tmp_path / "a" / "x", b"body")
    folder = Folder(tmp_path)
    assert folder.find("a/x") == Stored("a/x", 4, "")
    assert folder.read("a/x") == b"body"
    for missing in ("a/y", "a", "a/x/y"):
        assert folder.find(missing) is None
        assert folder.read(missing) is None


def test_a_folder_copies_a_file_with_its_digest(tmp_path: Path) -> None:
    body = os.urandom(3 * MB + 1)
    written(tmp_path / "x", body)
    with tempfile.TemporaryFile() as file:
        assert Folder(tmp_path).download(Stored("x", len(body), ""), file) == hashlib.sha256(body).hexdigest()
        file.seek(0)
        assert file.read() == body


def test_a_folder_that_may_not_be_read_is_refused_access(nobody: Path) -> None:
    forbid(nobody)
    folder, below = Folder(nobody), Folder(nobody / "below")
    actions: list[Callable[[], object]] = [
        folder.listing,
        below.listing,
        lambda: folder.find("x"),
        lambda: folder.read("x"),
        lambda: folder.delete("x"),
    ]
    for action in actions:
        with pytest.raises(AccessError, match="Permission denied"):
            action()


# --- what is put in it, and deleted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"small", os.urandom(3 * MB)], ids=["empty", "small", "three chunks"])
def test_an_upload_to_a_folder_is_whole_and_leaves_no_litter(tmp_path: Path, body: bytes) -> None:
    source = written(tmp_path / "source", body)
    out = Folder(tmp_path / "out")
    for _ in range(2):  # the second replaces the first
        out.upload(source, "results/run.json")
    assert out.read("results/run.json") == body
    assert [stored.name for stored in out.listing()] == ["results/run.json"]


def test_an_upload_to_a_folder_is_never_half_visible(tmp_path: Path) -> None:
    old, new = written(tmp_path / "old", b"o" * 8 * MB), written(tmp_path / "new", b"n" * 8 * MB)
    out = Folder(tmp_path / "out")
    out.upload(old, "x")
    seen: set[bytes] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            body = (tmp_path / "out" / "x").read_bytes()
            seen.add(body[:1] + str(len(body)).encode() + bytes({body[-1]}))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for source in (new, old, new, old):
        out.upload(source, "x")
    done.set()
    watcher.join()
    assert seen <= {b"o8388608o", b"n8388608n"}


def test_an_upload_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    out = Folder(tmp_path / "out")
    out.upload(written(tmp_path / "source", b"old"), "x")
    with pytest.raises(StoreError, match="No such file"):
        out.upload(tmp_path / "gone", "x")
    assert out.read("x") == b"old"
    assert [stored.name for stored in out.listing()] == ["x"]


def test_an_upload_that_fails_leaves_no_folder_that_was_not_there(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for folder in ("there", "new"):
        with pytest.raises(StoreError, match="No such file"):
            Folder(tmp_path / folder).upload(tmp_path / "gone", "results/crowdlayer/.probe")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["there"]


def test_a_disk_that_fails_on_the_way_to_a_file_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, flushed = written(tmp_path / "source", b"x"), os.fsync

    def failing(descriptor: int) -> None:
        if (tmp_path / "out/results").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flushed(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StoreError, match=r"out/results/crowdlayer/x\.json: Input/output error"):
        Folder(tmp_path / "out").upload(source, "results/crowdlayer/x.json")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_another_run_tidies_away_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elements of an array begin at once in one output, which each of them leaves as it was before its probe."""
    results, flushed, others = tmp_path / "out/results", os.fsync, iter(range(5))

    def meanwhile(descriptor: int) -> None:
        flushed(descriptor)
        if results.exists() and next(others, None) is not None:
            results.rmdir()

    monkeypatch.setattr(os, "fsync", meanwhile)
    Folder(tmp_path / "out").upload(written(tmp_path / "source", b"x"), "results/run/.probe")
    assert (results / "run/.probe").read_bytes() == b"x"
    assert next(others, None) is None


def test_folders_that_are_empty_go_and_others_stay(tmp_path: Path) -> None:
    folder = place(str(tmp_path))
    for kept in ("a", "a/b/c"):
        (tmp_path / kept).mkdir(parents=True)
    (tmp_path / "a/file").touch()
    folder.prune("a/b/c")
    folder.prune("never/there")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "file"]


def test_a_thread_that_deletes_takes_no_folder_away_from_one_that_uploads(tmp_path: Path) -> None:
    """Checkpoints are put and deleted in a thread of their own while the results are put."""
    out, source, over = Folder(tmp_path / "out"), written(tmp_path / "source", b"x"), threading.Event()

    def checkpoints() -> None:
        for number in range(10_000):
            out.upload(source, f"checkpoints/{number}")
            out.delete(f"checkpoints/{number}")
            if over.is_set():
                return

    thread = threading.Thread(target=checkpoints)
    thread.start()
    try:
        for number in range(200):
            out.upload(source, f"results/{number}/report.html")
    finally:
        over.set()
        thread.join()
    assert len(out.below("results")) == 200


def test_an_uploaded_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    source = written(tmp_path / "source", b"x")
    source.chmod(0o600)
    mask = os.umask(0o027)
    try:
        Folder(tmp_path / "out").upload(source, "x")
    finally:
        assert os.umask(mask) == 0o027
    assert (tmp_path / "out" / "x").stat().st_mode & 0o777 == 0o640


def test_a_name_may_be_as_long_as_the_disk_allows(tmp_path: Path) -> None:
    name = "n" * 250 + ".json"
    Folder(tmp_path / "out").upload(written(tmp_path / "source", b"x"), name)
    assert (tmp_path / "out" / name).read_bytes() == b"x"


@pytest.mark.parametrize("back", [False, True])
def test_a_folder_that_others_tidy_away_while_it_is_made_is_made_again(
    tmp_path: Path, back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There for mkdir, gone for its next question, and perhaps there again for ours."""
    source, folder, make = written(tmp_path / "source", b"x"), tmp_path / "out/a", os.mkdir
    times: list[int] = []

    def just_then(path: Path, mode: int = 0o777) -> None:
        if Path(path) == folder and not times:
            times.append(1)
            if back:
                monkeypatch.setattr(Path, "is_dir", once_not(folder))
                make(path, mode)
            raise FileExistsError(17, "File exists", str(path))
        make(path, mode)

    def once_not(gone: Path) -> Callable[[Path], bool]:
        is_dir, asked = Path.is_dir, list[int]()

        def there(path: Path) -> bool:
            if path == gone and not asked:
                asked.append(1)
                return False
            return is_dir(path)

        return there

    monkeypatch.setattr(os, "mkdir", just_then)
    Folder(tmp_path / "out").upload(source, "a/x")
    assert (folder / "x").read_bytes() == b"x"
    assert times == [1]


def test_a_file_that_is_replaced_stays_for_those_who_might_read_it(tmp_path: Path) -> None:
    source = written(tmp_path / "source", b"new")
    written(tmp_path / "out", b"old").chmod(0o600)
    Folder(tmp_path).upload(source, "out")
    assert (tmp_path / "out").read_bytes() == b"new"
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600


def test_a_file_where_a_folder_is_needed_is_a_wrong_place_and_a_folder_for_a_file_a_failing_disk(
    tmp_path: Path,
) -> None:
    source = written(tmp_path / "results", b"a file")
    for name in ("results/run.json", "results/run/labels.csv"):
        with pytest.raises(SettingsError, match=f"must be a folder, a file is in its place: {source}$"):
            Folder(tmp_path).upload(source, name)
    (tmp_path / "out" / "x").mkdir(parents=True)
    with pytest.raises(StoreError, match="x: Is a directory"):
        Folder(tmp_path / "out").upload(source, "x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]


def test_a_file_that_is_not_there_can_be_deleted(tmp_path: Path) -> None:
    written(tmp_path / "x", b"x")
    for _ in range(2):
        Folder(tmp_path).delete("x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written_is_refused_access(nobody: Path) -> None:
    source = Path(__file__)
    for name in ("x", "results/x"):
        with pytest.raises(AccessError, match="must be accessible: Permission denied") as raised:
            Folder(nobody).upload(source, name)
        assert raised.value.exit_code == 77
    assert list(nobody.iterdir()) == []


def test_a_link_into_a_folder_that_may_not_be_searched_is_told(nobody: Path) -> None:
    inner = nobody / "inner"
    forbid(nobody, 0o755)
    user = os.geteuid()
    os.seteuid(os.getuid())
    inner.mkdir()
    written(inner / "a.png", b"x")
    (nobody / "a-1.png").symlink_to(inner / "a.png")
    inner.chmod(0)
    os.seteuid(user)
    with pytest.raises(AccessError, match=r"a-1\.png: must be accessible"):
        list(Folder(nobody).listing(lambda name: name != "inner"))


def test_a_file_that_is_not_what_was_put_is_told(tmp_path: Path) -> None:
    source, folder = written(tmp_path / "source", b"ours"), Folder(tmp_path / "out")
    folder.upload(source, "a/file")
    folder.compare(source, "a/file")
    written(tmp_path / "out/a/file", b"not!")
    with pytest.raises(StoreError, match="a/file: must be there as it was put, it is not"):
        folder.compare(source, "a/file")
