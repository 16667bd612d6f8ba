"""Conversion between RecordIO and tar shards: image bytes do not change, also after a kill."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from data_pipeline.common.atomic_write import locked
from data_pipeline.formats.recordio import MAGIC_BYTES
from data_pipeline.formats.tar_index import index_shard
from data_pipeline.formats.tar_writer import ShardWriter
from data_pipeline.indexed.catalog import open_catalog
from data_pipeline.tools.convert import convert
from tests.conftest import skip_without_right


def samples_of_shards(folder):
    found = []
    for path in sorted(folder.iterdir()):
        data, index = path.read_bytes(), index_shard(path)
        for start, length, label in zip(*map(np.ndarray.tolist, index), strict=True):
            found.append((data[start : start + length], label))
    return found


def samples_of_records(folder):
    catalog = open_catalog(folder)
    return [(catalog.image(i).tobytes(), int(label)) for i, label in enumerate(catalog.label_N)]


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


def killed_after(count, source, out):
    """Run a conversion in its own process, which kills itself after `count` images."""
    script = (
        "import os, pathlib, sys; from data_pipeline.tools.convert import convert\n"
        "def progress(done, total):\n"
        f"    if done == {count}: os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "convert(*map(pathlib.Path, sys.argv[1:]), shard_samples=3, progress=progress)"
    )
    done = subprocess.run([sys.executable, "-c", script, source, out], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.fixture
def records(tmp_path, write_records, jpeg):
    """Records with scalar and array labels, index records, unordered classes, images with the frame magic."""
    images = [jpeg(i) for i in range(8)] + [MAGIC_BYTES * 2 + b"x", b"head" + MAGIC_BYTES]
    rows = [(0, (11, 13), b"")]
    rows += [(i, float(i * 7 % 4) if i % 2 else (float(i * 7 % 4), 1.0), x) for i, x in enumerate(images, 1)]
    return write_records(tmp_path / "records", [*rows, (11, (1, 6), b""), (12, (6, 11), b"")])


def test_there_and_back_the_images_stay_byte_for_byte(records, tmp_path):
    expected = samples_of_records(records)
    assert convert(records, tmp_path / "shards", shard_samples=4) == (10, 0)
    assert samples_of_shards(tmp_path / "shards") == expected
    assert sorted(files_in(tmp_path / "shards")) == [f"train-00000{i}.tar" for i in range(3)]
    assert convert(tmp_path / "shards", tmp_path / "back") == (10, 0)
    assert samples_of_records(tmp_path / "back") == expected
    assert files_in(tmp_path / "back").keys() == {"train.rec", "train.idx", "property"}
    assert (tmp_path / "back" / "property").read_text() == "4,48,48\n"


def test_the_same_records_give_the_same_bytes(records, tmp_path):
    for name in ("a", "b"):
        convert(records, tmp_path / name, shard_samples=4)
        convert(tmp_path / name, tmp_path / f"{name} back")
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    assert files_in(tmp_path / "a back") == files_in(tmp_path / "b back")


@pytest.mark.parametrize(("count", "there"), [(1, 0), (3, 0), (4, 3), (9, 6), (10, 9)])
def test_a_killed_conversion_to_shards_resumes_after_the_last_complete_one(records, tmp_path, count, there):
    convert(records, tmp_path / "uninterrupted", shard_samples=3)
    out = tmp_path / "shards"
    killed_after(count, records, out)
    finished = {path: path.stat().st_ino for path in out.glob("*.tar")}
    assert sum(len(index_shard(path).label_N) for path in finished) == there
    with pytest.raises(ValueError, match=r"part: .* is not complete; finish its conversion"):
        convert(out, tmp_path / "too early")
    assert convert(records, out, shard_samples=3) == (10, there)
    assert {path: path.stat().st_ino for path in finished} == finished
    assert files_in(out) == files_in(tmp_path / "uninterrupted")
    assert convert(records, out, shard_samples=3) == (10, 10)


def test_a_killed_conversion_to_records_restarts(records, tmp_path):
    convert(records, tmp_path / "shards")
    convert(tmp_path / "shards", tmp_path / "uninterrupted")
    killed_after(7, tmp_path / "shards", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    convert(tmp_path / "shards", tmp_path / "back")
    assert files_in(tmp_path / "back") == files_in(tmp_path / "uninterrupted")
    assert not list(tmp_path.glob(".*"))


def test_a_folder_with_other_content_is_refused_and_stays_unchanged(records, dataset, tmp_path):
    out = tmp_path / "shards"
    convert(dataset, out, shard_samples=4)
    before = files_in(out)
    with pytest.raises(
        ValueError, match=r"train-000000\.tar: expected 4 samples that follow .*from another dataset"
    ):
        convert(records, out, shard_samples=4)
    (out / "train-000003.tar").write_bytes((out / "train-000002.tar").read_bytes())
    with pytest.raises(
        ValueError, match=r"train-000003\.tar: expected 4 samples that follow the first 12 of 12"
    ):
        convert(dataset, out)
    (out / "train-000003.tar").unlink()
    (out / "train-000001.tar").rename(out / "train-000007.tar")
    with pytest.raises(
        ValueError, match=r"the first shards of this conversion; found .*, but no train-000001"
    ):
        convert(dataset, out)
    (out / "train-000007.tar").rename(out / "train-000001.tar")
    assert files_in(out) == before
    convert(records, tmp_path / "full")
    with pytest.raises(ValueError, match=r"full: expected an empty folder .* found 1 entries"):
        convert(out, tmp_path / "full")


def test_a_shard_with_the_same_labels_but_other_images_is_refused(dataset, tmp_path):
    with ShardWriter(tmp_path / "shards", samples=4) as writer:
        for i in range(4):
            writer.add(b"other image" if i == 3 else open_catalog(dataset).image(i).tobytes(), 0)
    with pytest.raises(ValueError, match=r"it comes from another dataset"):
        convert(dataset, tmp_path / "shards", shard_samples=4)


def test_only_one_process_writes(dataset, tmp_path):
    with (
        locked(tmp_path / "shards"),
        pytest.raises(ValueError, match=r"shards: another process is writing it"),
    ):
        convert(dataset, tmp_path / "shards")
    convert(dataset, tmp_path / "shards")
    with (
        locked(tmp_path / ".back.0123456789abcdef.part"),
        pytest.raises(ValueError, match=r"back: another process is writing it"),
    ):
        convert(tmp_path / "shards", tmp_path / "back")


def test_a_folder_without_a_dataset_is_named(tmp_path, records):
    with pytest.raises(ValueError, match=r"no dataset at .*nowhere: .* found no such folder"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    convert(records, tmp_path / "shards")
    (tmp_path / "shards" / "train-000001.tar.gz").write_bytes(b"\x1f\x8b compressed")
    with pytest.raises(ValueError, match=r"train-000001\.tar\.gz: expected uncompressed shards"):
        convert(tmp_path / "shards", tmp_path / "out")
    assert not (tmp_path / "out").exists()


LIMITED = """
import pathlib, resource, sys
from data_pipeline.tools.convert import convert
from data_pipeline.tools.pack import PackOptions, pack_folder, pack_list
command, limit, *paths = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
pack_tar = lambda source, out: pack_folder(source, out, PackOptions(form="tar"))
call = {"pack": pack_folder, "pack tar": pack_tar, "pack list": pack_list}.get(command, convert)
call(*map(pathlib.Path, paths))
"""


@pytest.mark.parametrize("limit", [0, 3000, 9000])
@pytest.mark.parametrize("command", ["to shards", "to records", "pack", "pack tar", "pack list"])
def test_a_full_disk_is_named_and_leaves_nothing_unfinished(dataset, tmp_path, jpeg, command, limit):
    convert(dataset, tmp_path / "shards")
    open_catalog(tmp_path / "shards")  # builds the catalog before the disk is full
    for i in range(30):
        (tmp_path / "people" / str(i)).mkdir(parents=True)
        (tmp_path / "people" / str(i) / "1.jpg").write_bytes(jpeg(i))
    (tmp_path / "list.tsv").write_text("".join(f"people/{i}/1.jpg\t{i}\n" for i in range(30)))
    source = {"to shards": dataset, "to records": tmp_path / "shards", "pack list": tmp_path / "list.tsv"}
    words = [command, str(limit), source.get(command, tmp_path / "people"), tmp_path / "full"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *words], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "full: expected space to write, found none (File too large" in done.stderr.splitlines()[-1]
    left = sorted(path.name for path in (tmp_path / "full").glob("*"))
    assert left == (["unfinished.part"] if command == "to shards" else [])
    assert not list(tmp_path.glob(".*"))


def test_a_full_file_system_is_named_as_well(dataset, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12k", "none", disk], check=False).returncode:
        skip_without_right("no file system can be mounted here")
    try:
        with pytest.raises(OSError, match=r"out: expected space to write, found none \(No space left"):
            convert(dataset, disk / "out", shard_samples=2)
        assert all(len(index_shard(path).label_N) == 2 for path in (disk / "out").glob("*.tar"))
        assert not list((disk / "out").glob(".*"))
    finally:
        subprocess.run(["umount", disk], check=True)
