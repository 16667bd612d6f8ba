"""The catalog: every published layout is read, and an unusable dataset is refused before the first step."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.formats import recordio
from data_pipeline.indexed.catalog import open_catalog, read_property

MAGIC = recordio.MAGIC_BYTES


def contents(catalog):
    return [
        (int(key), int(label), catalog.image(i).tobytes())
        for i, (key, label) in enumerate(zip(catalog.key_N, catalog.label_N, strict=True))
    ]


def test_an_insightface_folder_without_its_index_records(dataset, jpeg):
    catalog = open_catalog(dataset)
    assert contents(catalog) == [(i + 1, i // 4, jpeg(i)) for i in range(12)]
    assert (len(catalog), catalog.num_classes) == (12, 3)


def test_a_file_of_im2rec_has_neither_index_records_nor_property(tmp_path, write_records, jpeg):
    folder = write_records(tmp_path / "im2rec", [(key, float(key % 5), jpeg(key)) for key in range(10)])
    catalog = open_catalog(folder)
    assert contents(catalog) == [(key, key % 5, jpeg(key)) for key in range(10)]
    assert catalog.num_classes == 5


def test_key_0_may_be_an_image_with_an_array_label(tmp_path, write_records, jpeg):
    records = [(key, (float(key), 1.0), jpeg(key)) for key in range(3)]
    assert contents(open_catalog(write_records(tmp_path, records))) == [(k, k, jpeg(k)) for k in range(3)]


def test_index_records_may_stand_anywhere(tmp_path, write_records, jpeg):
    meta = [(0, (3, 4), b""), (3, (1, 3), b"")]
    images = [(1, 0.0, jpeg(1)), (2, (0.0, 1.0), jpeg(2))]
    for i, records in enumerate([meta + images, images + meta, [*images[:1], *meta, *images[1:]]]):
        catalog = open_catalog(write_records(tmp_path / str(i), records))
        assert contents(catalog) == [(1, 0, jpeg(1)), (2, 0, jpeg(2))]


@given(
    records=st.lists(
        st.tuples(
            st.integers(0, 9),
            st.sampled_from(["scalar", "array", "long array"]),
            st.lists(st.sampled_from([MAGIC, b"", b"z", b"1234"]), max_size=6).map(b"".join),
        ),
        min_size=1,
        max_size=12,
    ).filter(lambda records: any(image for *_, image in records))
)
def test_records_of_several_parts_and_of_any_length(records, tmp_path_factory, write_records):
    def stored(label, kind):
        return {
            "scalar": float(label),
            "array": (float(label), 1.0),
            "long array": (float(label), *[0.5] * 9),
        }[kind]

    folder = write_records(
        tmp_path_factory.mktemp("parts"),
        [(key, stored(label, kind), image) for key, (label, kind, image) in enumerate(records)],
    )
    expected = [(key, label, image) for key, (label, _, image) in enumerate(records) if image]
    assert contents(open_catalog(folder)) == expected


def test_the_configuration_may_name_more_classes_but_not_fewer(dataset):
    assert open_catalog(dataset, num_classes=7).num_classes == 7
    message = r"key 9 at byte \d+ has label 2, outside the 2 classes .* set it to at least 3"
    with pytest.raises(ValueError, match=message):
        open_catalog(dataset, num_classes=2)


def test_property_may_have_more_lines(dataset):
    (dataset / "property").write_text("3,48,48\n12\nshuffled\n")
    assert read_property(dataset) == (3, 48, 48)


def test_no_dataset(tmp_path):
    with pytest.raises(
        ValueError, match=rf"no dataset at {tmp_path}.*train.rec, .*name such .*data.path .*`lgaf data synth`"
    ):
        open_catalog(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 0\n", r"train.idx: line 1 is '1 0', expected 'key<TAB>offset'"),
        ("1\t0\n2\tx\n", "line 2 is '2\\\\tx"),
        ("", "no records are listed"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_idx_is_not_an_index(dataset, text, message):
    (dataset / "train.idx").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_catalog(dataset)


def rewrite_index(folder, change):
    """Change the (key, offset) rows of the index."""
    lines = (folder / "train.idx").read_text().splitlines()
    rows = change([tuple(map(int, line.split("\t"))) for line in lines])
    (folder / "train.idx").write_text("".join(f"{key}\t{offset}\n" for key, offset in rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [(k, o + 4 * (k == 5)) for k, o in rows], "do not match at byte .*different datasets"),
        (lambda rows: rows[:4] + rows[5:], "do not match at byte .*key 4"),
        (lambda rows: rows[1:], "do not match at byte 0: in the index, the first record lies at byte"),
        (lambda rows: [*rows, (99, rows[3][1])], "found the keys 4 and 99 at byte"),
        (lambda rows: [*rows, (99, 1 << 40)], "but train.idx lists key 99 at byte 1099511627776"),
    ],
    ids=["shifted", "one missing", "first missing", "twice", "beyond the end"],
)
def test_idx_does_not_match_rec(dataset, change, message):
    rewrite_index(dataset, change)
    with pytest.raises(ValueError, match=message):
        open_catalog(dataset)


def test_property_contradicts_the_labels(dataset):
    (dataset / "property").write_text("5,112,112\n")
    message = r"property gives 5 classes, but .*key 9 at byte \d+ has label 2.*so there are 3"
    with pytest.raises(ValueError, match=message):
        open_catalog(dataset)


def test_property_is_not_one(dataset):
    (dataset / "property").write_text("three,112,112\n")
    with pytest.raises(ValueError, match=r"first line is 'three,112,112', expected 'classes,height,width'"):
        open_catalog(dataset)


@pytest.mark.parametrize("label", [-1.0, 0.5, float("nan"), float("inf"), 2.0**25])
def test_a_label_that_is_no_class(tmp_path, write_records, jpeg, label):
    folder = write_records(tmp_path, [(7, 0.0, jpeg(0)), (8, label, jpeg(1))])
    with pytest.raises(ValueError, match=r"train.rec: key 8 at byte \d+ has label .*expected a whole number"):
        open_catalog(folder)


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
def test_a_truncated_rec(dataset, kept):
    data = (dataset / "train.rec").read_bytes()
    (dataset / "train.rec").write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=r"train.rec ends at byte \d+, but train.idx lists key .*truncated"):
        open_catalog(dataset)


@pytest.mark.parametrize("missing", [1, 30, 900])
def test_a_rec_truncated_in_its_last_record(tmp_path, write_records, jpeg, missing):
    folder = write_records(tmp_path, [(1, 0.0, jpeg(0)), (2, 1.0, jpeg(1) + b"x" * (-len(jpeg(1)) % 4))])
    data = (folder / "train.rec").read_bytes()
    (folder / "train.rec").write_bytes(data[:-missing])
    with pytest.raises(ValueError, match=r"train.rec \(key 2 of train.idx\): truncated"):
        open_catalog(folder)


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(5000), struct.pack("<I", 1) * 2000])
def test_not_recordio(dataset, content):
    (dataset / "train.rec").write_bytes(content * 9)
    with pytest.raises(
        ValueError, match=r"train.rec is not RecordIO: it begins with 0x.*expected 0xced7230a"
    ):
        open_catalog(dataset)


def test_an_empty_rec(dataset):
    (dataset / "train.rec").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train.rec: 0 bytes, too short for one record"):
        open_catalog(dataset)


def test_a_dataset_without_images(tmp_path, write_records):
    folder = write_records(tmp_path, [(0, (1, 2), b""), (1, (1, 1), b"")])
    with pytest.raises(ValueError, match=r"expected images, found none in its 2 records"):
        open_catalog(folder)


def test_arrays_are_integers(dataset):
    catalog = open_catalog(dataset)
    for array in (catalog.offset_N, catalog.label_N, catalog.key_N, catalog.damaged_K):
        assert array.dtype == np.int64
    assert catalog.file_N.dtype == catalog.length_N.dtype == np.int32
