"""Every variant of a dataset that occurs; damage: one record stays in and is named, a heap is refused."""

import contextlib
import os
import re
import shutil
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.formats import image_folder, recordio, recordio_folder
from data_pipeline.formats.container import Records, table_of
from data_pipeline.formats.int64_labels import LABELS_SUFFIX, read_labels, write_labels
from data_pipeline.indexed import catalog as catalog_module
from data_pipeline.indexed.catalog import DatasetError, RecordError, open_catalog

MAGIC = recordio.MAGIC_BYTES


def contents(catalog):
    return [
        (int(key), int(label), catalog.image(i).tobytes())
        for i, (key, label) in enumerate(zip(catalog.key_N, catalog.label_N, strict=True))
    ]


def overwrite(path, at, replacement):
    data = bytearray(path.read_bytes())
    data[at : at + len(replacement)] = replacement
    path.write_bytes(data)


# ---- no index ----


def test_without_an_index_the_file_tells_the_same(dataset):
    expected = contents(open_catalog(dataset))
    (dataset / "train.idx").unlink()
    assert contents(open_catalog(dataset)) == expected


@given(
    images=st.lists(
        st.lists(st.sampled_from([MAGIC, b"", b"z", b"1234"]), max_size=6).map(b"".join),
        min_size=1,
        max_size=12,
    ).filter(any),
    chunk_bytes=st.sampled_from([16, 40, 64, 1 << 24]),
)
def test_parts_are_found_without_an_index_wherever_chunks_end(
    images, chunk_bytes, tmp_path_factory, write_records
):
    labels = [float(key) if key % 2 else (float(key), 1.0) for key in range(len(images))]
    records = [(key, label, image) for key, (label, image) in enumerate(zip(labels, images, strict=True))]
    folder = write_records(tmp_path_factory.mktemp("parts"), records)
    (folder / "train.idx").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.formats.recordio_scan._CHUNK_BYTES", chunk_bytes)
        found = contents(open_catalog(folder))
    assert found == [(key, key, image) for key, image in enumerate(images) if image]


def test_a_header_that_holds_the_magic_is_cut_and_read_all_the_same(tmp_path, write_records, jpeg):
    # The magic as an id: the writer cuts in the header, before the labels.
    key = recordio.MAGIC
    folder = write_records(tmp_path, [(key, (1.0, 1.0), jpeg(0)), (7, 0.0, jpeg(1)), (key, (5.0, 1.0), b"")])
    assert contents(open_catalog(folder)) == [(key, 1, jpeg(0)), (7, 0, jpeg(1))]
    (folder / "train.idx").unlink()
    assert contents(open_catalog(folder)) == [(key, 1, jpeg(0)), (7, 0, jpeg(1))]


@pytest.mark.parametrize("has_index", [True, False])
def test_a_writer_that_does_not_cut_is_read_too(tmp_path, has_index):
    images = [b"head" + MAGIC + b"tail", b"plain123"]
    blob, lines = b"", []
    for key, image in enumerate(images):
        payload = recordio.pack(float(key), key, image)
        lines.append(f"{key}\t{len(blob)}\n")
        blob += struct.pack("<II", recordio.MAGIC, len(payload)) + payload
    (tmp_path / "train.rec").write_bytes(blob)
    if has_index:
        (tmp_path / "train.idx").write_text("".join(lines))
    assert contents(open_catalog(tmp_path)) == [(0, 0, images[0]), (1, 1, images[1])]


@pytest.mark.parametrize("missing", [1, 5, 30, 880])
def test_a_truncated_file_without_an_index(tmp_path, write_records, jpeg, missing):
    folder = write_records(tmp_path, [(1, 0.0, jpeg(0)), (2, 1.0, jpeg(1) + b"x" * (-len(jpeg(1)) % 4))])
    (folder / "train.idx").unlink()
    (folder / "train.rec").write_bytes((folder / "train.rec").read_bytes()[:-missing])
    with pytest.raises(DatasetError, match=r"train.rec: truncated: its last"):
        open_catalog(folder)


# ---- several files, labels from elsewhere ----


def test_several_files_of_any_names_share_their_classes(tmp_path, write_records, jpeg):
    for part, name in enumerate(["b_1", "a"]):
        source = write_records(tmp_path / name, [(k, float(2 * part + k % 2), jpeg(k)) for k in range(3)])
        for suffix in (".rec", ".idx"):
            shutil.copy(source / f"train{suffix}", tmp_path / f"{name}{suffix}")
    (tmp_path / "b_1.idx").unlink()
    (tmp_path / "property").write_text("4,48,48\n")
    catalog = open_catalog(tmp_path)
    assert catalog.label_N.tolist() == [2, 3, 2, 0, 1, 0]
    assert [catalog.image(i).tobytes() for i in range(6)] == 2 * [jpeg(k) for k in range(3)]
    assert catalog.name_of(4) == f"{tmp_path / 'b_1.rec'}: key 1 at byte {catalog.offset_N[4]}"


def test_labels_beyond_float32_come_from_their_file(tmp_path, write_records, jpeg):
    folder = write_records(tmp_path, [(k, 0.0, jpeg(k)) for k in (4, 5, 6)])
    label_N = np.array([(1 << 24) + 1, 0, 40_000_000])
    write_labels(folder / "train.rec", np.array([6, 4, 5]), label_N[[2, 0, 1]])
    assert [column.tolist() for column in read_labels(folder / "train.rec")] == [
        [6, 4, 5],
        [40_000_000, 16777217, 0],
    ]
    catalog = open_catalog(folder)
    assert catalog.label_N.tolist() == label_N.tolist()
    assert catalog.num_classes == 40_000_001


@pytest.mark.parametrize(
    ("keys", "labels", "message"),
    [
        ([4, 5], [0, 1], "train.labels.npy: no label for key 6, expected a class of every image"),
        ([4, 5, 6], [0, 1, -1], "train.labels.npy: label -1 for key 6"),
        ([], [], "no label for key 4.*3 such records"),
    ],
)
def test_a_labels_file_that_does_not_fit(tmp_path, write_records, jpeg, keys, labels, message):
    folder = write_records(tmp_path, [(k, 0.0, jpeg(k)) for k in (4, 5, 6)])
    write_labels(folder / "train.rec", np.array(keys, int), np.array(labels, int))
    with pytest.raises(DatasetError, match=message):
        open_catalog(folder)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"4\t0\n"])
def test_a_labels_file_that_is_none(tmp_path, write_records, jpeg, content):
    folder = write_records(tmp_path, [(4, 0.0, jpeg(4))])
    (folder / f"train{LABELS_SUFFIX}").write_bytes(content)
    with pytest.raises(
        DatasetError, match=r"train.labels.npy: expected int64 \[N, 2\], keys and labels; found"
    ):
        open_catalog(folder)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_cvlface_s_list_has_the_labels(tmp_path, write_records, jpeg, line_end):
    folder = write_records(tmp_path, [(k, 0.0, jpeg(k)) for k in range(3)])
    rows = ["2\tb/x y.jpg\t1", "0\ta/1.jpg\t0", "1\tb/2.jpg\t12"]
    (folder / "train.tsv").write_bytes("".join(row + line_end for row in rows).encode())
    assert open_catalog(folder).label_N.tolist() == [0, 12, 1]
    (folder / "train.tsv").write_text("0\ta\t0\n1\t5\n")
    with pytest.raises(
        DatasetError, match=r"train.tsv: line 2 is '1\\t5', expected 'key<TAB>path<TAB>label'"
    ):
        open_catalog(folder)


@given(
    rows=st.lists(st.tuples(st.integers(0, 10**18 - 1), st.integers(0, 10**18 - 1)), min_size=1, max_size=30),
    line_end=st.sampled_from(["\n", "\r\n"]),
    end=st.sampled_from(["", "\n"]),
)
def test_an_index_is_read_in_the_order_of_offsets(rows, line_end, end, tmp_path_factory):
    path = tmp_path_factory.mktemp("idx") / "x.idx"
    path.write_bytes((line_end.join(f"{key}\t{offset}" for key, offset in rows) + end).encode())
    key_N, offset_N = recordio.read_index(path)
    ordered = sorted(rows, key=lambda row: row[1])
    assert list(zip(key_N.tolist(), offset_N.tolist(), strict=True)) == ordered


@pytest.mark.parametrize(
    "bad", ["1\t2\t3", "x\t1", "1\t-2", "\t5", "5", "1\t99999999999999999999", "1.0\t1", "0" * 5000 + "\t1"]
)
def test_a_bad_line_of_an_index_is_counted(tmp_path, bad):
    (tmp_path / "x.idx").write_text(f"0\t0\n1\t10\n2\t20\n{bad}\n3\t30\n")
    with pytest.raises(RecordError, match=r"x.idx: line 4 is '"):
        recordio.read_index(tmp_path / "x.idx")


# ---- folders of images, several datasets ----


@pytest.fixture
def people(tmp_path, jpeg):
    folder = tmp_path / "people"
    for i, name in enumerate(["s10/1", "s2/10", "s2/9", "a/x"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jpg").write_bytes(jpeg(i))
    (folder / "a" / ".DS_Store").touch()
    (folder / "notes.txt").touch()
    return folder


def test_a_folder_of_images(people, jpeg):
    catalog = open_catalog(people)
    assert contents(catalog) == [(0, 0, jpeg(3)), (1, 1, jpeg(2)), (2, 1, jpeg(1)), (3, 2, jpeg(0))]
    assert catalog.name_of(1) == f"{people / 's2' / '9.jpg'}: key 1 at byte 0"


def test_a_folder_of_images_may_have_more_files_than_a_process_may_open(people, jpeg, monkeypatch):
    monkeypatch.setattr("data_pipeline.indexed.byte_ranges._MOST_OPEN", 1)
    before = len(os.listdir("/proc/self/fd"))
    catalog = open_catalog(people)
    assert len(contents(catalog)) == 4
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del catalog
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_empty_image_is_a_damaged_record(people):
    (people / "s2" / "9.jpg").write_bytes(b"")
    catalog = open_catalog(people)
    assert catalog.damaged_K.tolist() == [1]
    with pytest.raises(
        RecordError, match=r"s2/9.jpg: key 1 at byte 0: expected an image, found an empty file"
    ):
        catalog.image(1)


def test_folders_that_are_no_folder_of_images(people, dataset, tmp_path):
    (people / "b").mkdir()
    with pytest.raises(DatasetError, match=r"people/b: expected the images of one identity, found none"):
        open_catalog(people)
    # The folder above a dataset.
    shutil.rmtree(people)
    with pytest.raises(
        DatasetError, match=r"faces/\w+.*: expected an image in the sub-folder of an identity"
    ):
        open_catalog(tmp_path)


def test_classes_of_several_datasets_follow_each_other(dataset, people, jpeg, tmp_path):
    catalog = open_catalog([people, dataset, people])
    assert catalog.num_classes == 3 + 3 + 3
    assert catalog.label_N.tolist() == [0, 1, 1, 2, *np.repeat([3, 4, 5], 4), 6, 7, 7, 8]
    expected = [
        *contents(open_catalog(people)),
        *contents(open_catalog(dataset)),
        *contents(open_catalog(people)),
    ]
    assert [(key, image) for key, _, image in contents(catalog)] == [
        (key, image) for key, _, image in expected
    ]
    assert catalog.name_of(5) == f"{dataset / 'train.rec'}: key 2 at byte {catalog.offset_N[5]}"
    assert open_catalog([people, dataset], num_classes=10).num_classes == 10
    with pytest.raises(
        DatasetError, match=r"train.rec: key 9 at byte \d+ has label 5, outside the 5 classes"
    ):
        open_catalog([people, dataset], num_classes=5)
    (dataset / "property").write_text("9,48,48\n")
    with pytest.raises(DatasetError, match=r"property gives 9 classes, but .* has label 2, the largest"):
        open_catalog([people, dataset])


# ---- damage ----


def damaged(catalog):
    """Number of each damaged record -> what its image raises; all others have images."""
    raised = {}
    for record in range(len(catalog)):
        try:
            assert len(catalog.image(record))
        except RecordError as error:
            raised[record] = str(error)
    assert list(raised) == catalog.damaged_K.tolist()
    return raised


@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.parametrize("record", [0, 5, 11])
@pytest.mark.parametrize(
    ("at", "replacement", "reason"),
    [
        (0, b"\0\0\0\0", "no RecordIO frame at byte .*found 0x00000000"),
        (4, b"\x08\0\0\0", "header, this one 8 bytes|no RecordIO frame"),
        (4, b"\xff\xff\xff\x1f", "truncated: the frame at byte"),
        (7, b"\xe0", "part kind 7, expected 0 to 3"),
        (7, b"\x60", "part kind 3 out of order"),
        (8, b"\xff\xff\xff\xff", "the header announces 4294967295 labels"),
    ],
    ids=["magic", "short", "long", "no kind", "no start", "flag"],
)
def test_one_damaged_record_stays_in_and_says_what_it_is(dataset, has_index, record, at, replacement, reason):
    before = open_catalog(dataset)
    offset, expected = int(before.offset_N[record]), contents(before)
    overwrite(dataset / "train.rec", offset + at, replacement)
    if not has_index:
        (dataset / "train.idx").unlink()
    catalog = open_catalog(dataset)
    raised = damaged(catalog)
    # Without an index, the rest of a record that has become too short looks like one more.
    rest = not has_index and replacement == b"\x08\0\0\0"
    assert set(raised) == {record, record + 1} if rest else {record}
    assert raised[record].startswith(f"{dataset / 'train.rec'}: key ")
    assert f"at byte {offset}: " in raised[record]
    assert re.search(reason, raised[record])
    found = [
        (int(label), catalog.image(i).tobytes()) for i, label in enumerate(catalog.label_N) if i not in raised
    ]
    assert found == [(label, image) for i, (_, label, image) in enumerate(expected) if i != record]
    if has_index:
        assert catalog.key_N[record] == record + 1
    assert catalog.label_N[record] in (0, record // 4)


def test_neighbours_may_both_be_damaged(dataset):
    offset_N = open_catalog(dataset).offset_N.tolist()
    for record in (3, 4, 5):
        overwrite(dataset / "train.rec", offset_N[record], b"\0\0\0\0")
    catalog = open_catalog(dataset)
    assert list(damaged(catalog)) == [3, 4, 5]
    assert catalog.key_N.tolist() == list(range(1, 13))


def test_a_long_zeroed_stretch_costs_its_records_only(dataset):
    offset_N = open_catalog(dataset).offset_N.tolist()
    overwrite(dataset / "train.rec", offset_N[2] + 100, bytes(offset_N[7] - offset_N[2] - 50))
    catalog = open_catalog(dataset)
    assert set(damaged(catalog)) >= {3, 4, 5, 6, 7}
    assert len(catalog) == 12


def many(folder, write_records, images, broken):
    write_records(folder, [(key, float(key % 3), b"image of a face") for key in range(images)])
    _, offset_N = recordio.read_index(folder / "train.idx")
    with open(folder / "train.rec", "r+b") as file:
        for record in range(0, 2 * broken, 2):
            file.seek(int(offset_N[record]))
            file.write(b"XXXX")
    return folder


def test_a_heap_of_damage_is_refused_with_its_first_ten(tmp_path, write_records):
    assert len(open_catalog(many(tmp_path / "ten", write_records, 100, 10)).damaged_K) == 10
    assert len(open_catalog(many(tmp_path / "share", write_records, 2000, 20)).damaged_K) == 20
    for images, broken in ((100, 11), (2000, 21)):
        folder = many(tmp_path / f"{images}", write_records, images, broken)
        with pytest.raises(
            DatasetError, match=rf"{broken} of {images} records are damaged, more than 1%"
        ) as raised:
            open_catalog(folder)
        lines = str(raised.value).splitlines()
        assert len(lines) == 11
        assert "key 0 at byte 0: no RecordIO frame" in lines[1]
        assert "key 18 at byte" in lines[10]


# ---- what changes while it is used ----


def test_a_file_that_becomes_shorter_is_said_not_a_crash(dataset):
    catalog = open_catalog(dataset)
    catalog.image(0)
    os.truncate(dataset / "train.rec", 5000)
    with pytest.raises(
        DatasetError, match=r"train.rec is shorter than when its catalog was made \(\d+ bytes then, 5000"
    ):
        catalog.image(11)
    with pytest.raises(DatasetError, match=r"train.rec is shorter than when its catalog was made"):
        catalog.image(0)


def test_a_file_that_is_written_replaced_or_removed(dataset):
    catalog = open_catalog(dataset)
    catalog.image(0)
    os.utime(dataset / "train.rec", ns=(1, 1))
    with pytest.raises(DatasetError, match=r"train.rec has been written to since its catalog was made"):
        catalog.image(0)
    catalog = open_catalog(dataset)
    catalog.image(0)
    shutil.copy2(dataset / "train.rec", dataset / "copy")
    os.replace(dataset / "copy", dataset / "train.rec")
    with pytest.raises(
        DatasetError, match=r"train.rec has been deleted or replaced since its catalog was made"
    ):
        catalog.image(0)
    catalog = open_catalog(dataset)
    (dataset / "train.rec").unlink()
    with pytest.raises(DatasetError, match=r"train.rec existed .* cannot be read now: No such file"):
        catalog.image(0)


def test_a_dataset_that_changes_while_it_is_read_is_refused(dataset, monkeypatch):
    read = recordio_folder.read_records

    def slow(files, progress):
        records = read(files, progress)
        os.utime(dataset / "train.rec", ns=(1, 1))
        return records

    monkeypatch.setattr(recordio_folder, "read_records", slow)
    with pytest.raises(DatasetError, match=r"has changed while its catalog was being made"):
        open_catalog(dataset)


class Lines:
    """A container of `.txt` files, one image per line, labelled by its first byte."""

    image_of = staticmethod(image_folder.image_of)

    def list_files(self, folder):
        names = sorted(path.name for path in folder.glob("*.txt"))
        return table_of(folder, names) if names else None

    def read_records(self, files, progress):
        lengths = [[len(line) for line in files.path(i).open("rb")] for i in range(len(files))]
        ends = [np.cumsum(row) for row in lengths]
        length_N = np.concatenate(lengths)
        return Records(
            file_N=np.repeat(np.arange(len(files)), [len(row) for row in lengths]),
            offset_N=np.concatenate(ends) - length_N,
            length_N=length_N,
            label_N=np.concatenate(
                [[line[0] - 48 for line in files.path(i).open("rb")] for i in range(len(files))]
            ),
            key_N=np.arange(len(length_N)),
            damaged_K=np.empty(0, np.int64),
        )


def test_a_container_is_three_functions(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog_module, "CONTAINERS", {"lines": Lines(), **catalog_module.CONTAINERS})
    (tmp_path / "a.txt").write_bytes(b"0 one\n2 two\n")
    (tmp_path / "b.txt").write_bytes(b"1 three\n")
    catalog = open_catalog([tmp_path, tmp_path])
    assert contents(catalog)[2:4] == [(2, 1, b"1 three\n"), (0, 3, b"0 one\n")]
    assert catalog.label_N.tolist() == [0, 2, 1, 3, 5, 4]


@given(
    damage=st.lists(
        st.tuples(
            st.floats(0, 1), st.sampled_from([MAGIC, bytes(4), b"\xff" * 4, b"\x01\0\0\0", b"\x20\0\0\x20"])
        ),
        min_size=1,
        max_size=4,
    ),
    has_index=st.booleans(),
)
def test_damage_anywhere_leaves_the_other_records_as_they_are(
    damage, has_index, tmp_path_factory, write_records
):
    images = [bytes([65 + key]) * (20 + 3 * key) + (MAGIC if key % 3 else b"") + b"end" for key in range(9)]
    records = [
        (key, (float(key % 3), 1.0) if key % 2 else float(key % 3), image) for key, image in enumerate(images)
    ]
    folder = write_records(tmp_path_factory.mktemp("fuzz"), [*records, (9, (1.0, 2.0), b"")])
    _, offset_N = recordio.read_index(folder / "train.idx")
    size = (folder / "train.rec").stat().st_size
    touched = set()
    for where, replacement in damage:
        at = int(where * (size - 4)) // 4 * 4
        overwrite(folder / "train.rec", at, replacement)
        touched.add(int(np.searchsorted(offset_N, at, side="right")) - 1)
    if not has_index:
        (folder / "train.idx").unlink()
    try:
        catalog = open_catalog(folder)
    except (DatasetError, RecordError):
        return
    found = {}
    for record, offset in enumerate(catalog.offset_N.tolist()):
        with contextlib.suppress(RecordError):
            found[offset] = (int(catalog.label_N[record]), catalog.image(record).tobytes())
    for key, image in enumerate(images):
        if key not in touched:
            assert found[int(offset_N[key])] == (key % 3, image)
