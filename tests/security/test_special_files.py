"""Files that never end, or whose opening never returns, in place of the files of a user's dataset.

A named pipe blocks its reader, a link to /dev/zero is endless, and a sparse file has any size.
"""

import os
import signal
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from data_pipeline.common.data_file import lines_of, open_data_file, read_data_file
from data_pipeline.formats import recordio
from data_pipeline.formats.container import RecordError
from data_pipeline.formats.int64_labels import read_labels, write_labels
from data_pipeline.formats.pair_file import VerificationFileError, read_pairs
from data_pipeline.formats.recordio_writer import FlatWriter
from data_pipeline.formats.tar_index import ShardError, index_shard
from data_pipeline.formats.tar_writer import ShardWriter
from data_pipeline.indexed import catalog as catalog_module
from data_pipeline.indexed.catalog import DatasetError, open_catalog, read_property
from data_pipeline.synthetic.identities import SynthConfig
from data_pipeline.tools.convert import convert
from data_pipeline.tools.pack import pack_folder, pack_list
from data_pipeline.tools.validate import validate
from trainer import config_file
from trainer.evaluation.protocol import ProtocolFileError
from trainer.evaluation.protocols.lists import read_table
from trainer.evaluation.protocols.megaface import MegaFace
from trainer.inference.embed import find_files, read_image

SPECIAL = ("a named pipe", "a device")
HOLES_BYTES = 1 << 30


@pytest.fixture(autouse=True)
def _guard():
    """End a test that hangs, as all of these did."""

    def hung(*_):
        raise AssertionError("the reader hangs")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make(path, kind):
    path.unlink(missing_ok=True)
    if kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    return path


def holes(path, start=b"", size=HOLES_BYTES):
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)
    return path


@pytest.fixture
def little_memory():
    """Fail a test that needs as much memory as a part of the holes."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < HOLES_BYTES / 8


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (112, 112), "red").save(path, "JPEG")
    return path


@pytest.fixture
def records(tmp_path):
    """A dataset of two images in train.rec."""
    encoded = image(tmp_path / "x.jpg").read_bytes()
    with FlatWriter(tmp_path / "faces", image_size=(112, 112)) as writer:
        writer.add(encoded, 0)
        writer.add(encoded, 1)
    return tmp_path / "faces"


@pytest.fixture
def images(tmp_path):
    """A folder of two identities with two images each."""
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"):
        image(tmp_path / "images" / name)
    return tmp_path / "images"


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    "read", [open_data_file, lambda path: read_data_file(path, 10), lambda path: [*lines_of(path, 10)]]
)
def test_only_regular_files_are_opened(tmp_path, kind, read):
    path, before = make(tmp_path / "x", kind), len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=f"{kind} instead of a regular file; replace or remove it: '{path}'"):
        read(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_links_to_regular_files_are_followed_and_read_without_surprise(tmp_path):
    (tmp_path / "x").write_text("one\ntwo")
    (tmp_path / "link").symlink_to("x")
    with open_data_file(tmp_path / "link") as file:
        assert file.read() == b"one\ntwo"
        assert os.get_blocking(file.fileno())
    assert read_data_file(tmp_path / "link", 7) == b"one\ntwo"
    with pytest.raises(OSError, match="7 bytes, expected at most 6"):
        read_data_file(tmp_path / "link", 6)
    assert [*lines_of(tmp_path / "link", 3)] == ["one", "\n", "two"]


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["train.rec", "train.idx", "train.tsv", "train.labels.npy", "property"])
def test_a_special_file_in_a_dataset_of_records_is_refused(records, kind, name):
    path = make(records / name, kind)
    with pytest.raises(DatasetError, match=f"{path}: expected .*, found: {kind} instead of a regular file"):
        open_catalog(records)


@pytest.mark.parametrize("name", ["train.rec", "train.idx", "train.labels.npy"])
def test_a_broken_link_is_not_taken_for_a_missing_file(records, name):
    (records / name).unlink(missing_ok=True)
    (records / name).symlink_to("absent")
    with pytest.raises(DatasetError, match=rf"{name}: expected a file of the dataset, found: No such file"):
        open_catalog(records)


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_among_shards_is_refused(tmp_path, records, kind):
    path = make(tmp_path / "x.tar", kind)
    with pytest.raises(ShardError, match=f"{path}: expected a tar shard, found: {kind} instead of a"):
        index_shard(path)
    shards = tmp_path / "shards"
    with ShardWriter(shards) as writer:
        writer.add(b"\xff\xd8", 0)
    make(shards / "train-000001.tar", kind)
    with pytest.raises(
        DatasetError, match=f"train-000001.tar: expected a file of the dataset, found: {kind}"
    ):
        open_catalog(shards)
    # A conversion compares the shards that exist.
    make(tmp_path / "out.tar", kind)
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / "train-000000.tar", kind)
    with pytest.raises(ShardError, match=f"train-000000.tar: expected a tar shard, found: {kind}"):
        convert(records, tmp_path / "out")


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_in_the_folder_of_an_identity_is_refused_by_every_command(tmp_path, images, kind):
    path = make(images / "a" / "0.jpg", kind)
    found = f"{path}: expected .*{kind} instead of a regular file"
    with pytest.raises(DatasetError, match=found):
        open_catalog(images)
    with pytest.raises(DatasetError, match=found):
        validate([images], None, lambda done, total: None, processes=1)
    with pytest.raises(ValueError, match=found):
        pack_folder(images, tmp_path / "out")
    [first, *_] = find_files([images])
    with pytest.raises(ValueError, match=f"{path} cannot be decoded: {kind} instead of a regular file"):
        read_image(first, 112)


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_as_a_list_or_in_it_is_refused(tmp_path, kind):
    path = make(tmp_path / "x.jpg", kind)
    (tmp_path / "list.tsv").write_text("x.jpg\t0\n")
    with pytest.raises(ValueError, match=f"{path}: expected an image, found: {kind}"):
        pack_list(tmp_path / "list.tsv", tmp_path / "out")
    with pytest.raises(OSError, match=f"{kind} instead of a regular file.*list2.tsv"):
        pack_list(make(tmp_path / "list2.tsv", kind), tmp_path / "out")


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_in_place_of_a_file_for_evaluation_is_refused(tmp_path, kind):
    path = make(tmp_path / "lfw.bin", kind)
    with pytest.raises(VerificationFileError, match=f"{path}: expected a verification file, found: {kind}"):
        read_pairs(path)
    with pytest.raises(ProtocolFileError, match=f"{path}: expected the official layout, found: {kind}"):
        read_table(path, [("name", "S8")])
    lists = tmp_path / "devkit" / "templatelists"
    lists.mkdir(parents=True)
    make(lists / "facescrub_features_list.json", kind)
    with pytest.raises(
        ProtocolFileError, match=f"features_list.json: expected the official layout, found: {kind}"
    ):
        MegaFace(tmp_path)
    make(tmp_path / "facescrub_noises.txt", kind)
    with pytest.raises(ProtocolFileError, match=f"facescrub_noises.txt: expected the .*, found: {kind}"):
        MegaFace(tmp_path)


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_as_configuration_is_refused(tmp_path, kind):
    path = make(tmp_path / "x.toml", kind)
    with pytest.raises(ValueError, match=rf"{path}: expected a configuration file \(TOML\), found: {kind}"):
        config_file.load(SynthConfig, path)


@pytest.mark.parametrize("kind", SPECIAL)
def test_an_image_that_becomes_a_special_file_after_the_catalog_was_made_is_refused(images, kind):
    catalog = open_catalog(images)
    make(images / "a" / "1.jpg", kind)
    with pytest.raises(DatasetError, match=rf"1.jpg existed when .* cannot be read now: {kind} instead"):
        catalog.image(0)


@pytest.mark.usefixtures("little_memory")
def test_files_of_holes_are_refused_without_reading_them(tmp_path, records, images):
    with pytest.raises(RecordError, match=r"train.idx: line 1 is '\\x00"):
        recordio.read_index(holes(records / "train.idx"))
    with pytest.raises(DatasetError, match=r"property: first line is '\\x00"):
        read_property(holes(records / "property").parent)
    assert read_property(holes(records / "property", b"2,112,112\n").parent) == (2, 112, 112)
    with pytest.raises(ValueError, match=f"{HOLES_BYTES} bytes, expected at most"):
        config_file.load(SynthConfig, holes(tmp_path / "x.toml"))
    with pytest.raises(ProtocolFileError, match=r"list.txt, line 2: expected a, b, found '\\x00"):
        read_table(holes(tmp_path / "list.txt", b"1 2\n"), [("a", "i4"), ("b", "i4")])
    with pytest.raises(ValueError, match=r"list.tsv: line 1 is"):
        pack_list(holes(tmp_path / "list.tsv"), tmp_path / "out")
    (tmp_path / "devkit" / "templatelists").mkdir(parents=True)
    holes(tmp_path / "devkit" / "templatelists" / "facescrub_features_list.json")
    with pytest.raises(ProtocolFileError, match=f"found: {HOLES_BYTES} bytes, expected at most"):
        MegaFace(tmp_path)
    holes(tmp_path / "facescrub_noises.txt")
    with pytest.raises(
        ProtocolFileError, match=f"noises.txt: .* found: {HOLES_BYTES} bytes, expected at most"
    ):
        MegaFace(tmp_path)
    holes(images / "a" / "1.jpg", (images / "a" / "1.jpg").read_bytes())
    with pytest.raises(RecordError, match=f"expected an image, found a record of {HOLES_BYTES} bytes"):
        open_catalog(images).image(0)
    with pytest.raises(
        ValueError, match=f"1.jpg: expected an image, found: {HOLES_BYTES} bytes, expected at"
    ):
        pack_folder(images, tmp_path / "out")


@pytest.mark.usefixtures("little_memory")
def test_sizes_are_compared_before_holes_are_read(tmp_path, records, monkeypatch):
    monkeypatch.setattr("data_pipeline.formats.pair_file._MOST_BYTES", 1 << 20)
    with pytest.raises(VerificationFileError, match=f"found: {HOLES_BYTES} bytes, expected at most 1048576"):
        read_pairs(holes(tmp_path / "lfw.bin"))
    # A labels file of the right form, for more records than the .rec can have.
    write_labels(records / "train.rec", np.arange(2), np.arange(2))
    path = records / "train.labels.npy"
    text, count = path.read_bytes()[:128], (HOLES_BYTES - 128) // 16
    holes(path, text.replace(b"(2, 2), }" + b" " * 7, b"(%d, 2), }" % count))
    assert len(text) == 128
    with pytest.raises(
        DatasetError, match=rf"labels.npy: expected the labels of at most \d+ records, found {count}"
    ):
        open_catalog(records)
    path.unlink()
    write_labels(records / "train.rec", np.arange(2), np.array([1, 0]))
    assert [column.tolist() for column in read_labels(records / "train.rec", 2)] == [[0, 1], [1, 0]]
    assert open_catalog(records).label_N.tolist() == [1, 0]


def test_links_that_repeat_a_folder_end_the_search_for_images(tmp_path):
    """Two links to the parent make 2^40 paths; so do forty folders, each with two links to the next one."""
    path = image(tmp_path / "images" / "1.jpg")
    for name in "ab":
        (path.parent / name).symlink_to("..")
    with pytest.raises(ValueError, match=rf"a/images: expected every folder once, found {path.parent} again"):
        list(find_files([path.parent]))
    for i in range(40):
        (tmp_path / "deep" / str(i)).mkdir(parents=True)
        for name in "ab":
            (tmp_path / "deep" / str(i) / name).symlink_to(f"../{i + 1}")
    (tmp_path / "deep" / "40").mkdir()
    with pytest.raises(ValueError, match=r"expected every folder once, found .*; remove this link"):
        list(find_files([tmp_path / "deep" / "0"]))
    # The same folder may be named twice, and a file may be linked.
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "2.jpg").symlink_to(path)
    assert [*find_files([tmp_path / "plain"] * 2)] == [tmp_path / "plain" / "2.jpg"] * 2


def test_the_limit_for_records_is_far_above_those_of_images():
    assert catalog_module._LARGEST_RECORD >= 4096 * 4096 * 8
