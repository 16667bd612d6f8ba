"""Readers whose time or memory a small hostile file could make explode: they count what they do.

The cost of a file twice as long is at most about twice as high; that of a quadratic reader is four times.
"""

import io
import os
import struct
import tarfile
import tracemalloc

import numpy as np
import pytest
from braceexpand import braceexpand

from data_pipeline.formats import recordio, recordio_scan, tar_index
from data_pipeline.formats.container import DatasetError, RecordError
from data_pipeline.formats.recordio import END, IMAGE_HEADER, MAGIC, MAGIC_BYTES, MIDDLE, START, WHOLE
from data_pipeline.formats.recordio_folder import image_of
from data_pipeline.streaming import braces
from data_pipeline.streaming.samples import shard_urls
from data_pipeline.synthetic.identities import SynthConfig
from trainer import config_file


class Counted(np.ndarray):
    """An array that counts the entries of all its slices."""

    entries = 0

    def __getitem__(self, key):
        found = super().__getitem__(key)
        Counted.entries += np.size(found)
        return found


def headers(kinds, lengths=0):
    """Return frames without payload; `lengths` are what they claim."""
    words = np.empty((len(kinds), 2), "<u4")
    words[:, 0], words[:, 1] = MAGIC, np.asarray(kinds) << 29 | lengths
    return words.tobytes()


def pointing_at_the_last(n):
    """Frames of 8 bytes, each of which claims to end where the last one begins, as only one does."""
    lengths = 8 * np.arange(n - 2, -2, -1)
    return headers(np.full(n, WHOLE), np.maximum(lengths, 0))


def split_headers(n):
    """Records of two frames without payload: their headers are missing."""
    return headers([START, END] * (n // 2))


def cut_off(n):
    """Records that begin and do not end."""
    return headers([START] * n)


def many_parts(n):
    """One record of many parts without payload."""
    return headers([START, *[MIDDLE] * (n - 2), END])


def cost_of_scan(path, data, monkeypatch):
    """Return the number of array entries and of bytes that a scan reads, beside the file itself."""
    path.write_bytes(data)
    Counted.entries = read = 0
    join, pread = recordio_scan._join_columns, os.pread

    def counted_pread(descriptor, count, offset):
        nonlocal read
        found = pread(descriptor, count, offset)
        read += len(found)
        return found

    with monkeypatch.context() as patch:
        counted = lambda chunks: recordio_scan._Frames(*(c.view(Counted) for c in join(chunks)))  # noqa: E731
        patch.setattr(recordio_scan, "_join_columns", counted)
        patch.setattr(os, "pread", counted_pread)
        recordio_scan.scan(path, lambda done, total: None)
    return Counted.entries + read


@pytest.mark.parametrize(
    "build", [pointing_at_the_last, split_headers, cut_off, many_parts, lambda n: MAGIC_BYTES * n]
)
def test_a_scan_of_a_file_twice_as_long_costs_twice_as_much(tmp_path, monkeypatch, build):
    once, twice = (cost_of_scan(tmp_path / "x.rec", build(n), monkeypatch) for n in (2000, 4000))
    assert 0 < twice < 2.2 * once


@pytest.fixture
def peak_bytes():
    """A function that returns the most memory that was in use since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def test_a_file_of_nothing_but_frames_is_refused_with_little_memory(tmp_path, peak_bytes):
    path = tmp_path / "x.rec"
    path.write_bytes(MAGIC_BYTES * (1 << 21))
    with pytest.raises(
        DatasetError, match=r"x.rec: expected image records, found 2097152 frames in 16777216"
    ):
        recordio_scan.scan(path, lambda done, total: None)
    assert peak_bytes() < 8 * path.stat().st_size


def test_the_shortest_records_are_not_too_many(tmp_path):
    """InsightFace's index records have two labels and no image."""
    least = len(recordio.frame(recordio.pack((1.0, 2.0), 0, b"")))
    assert recordio_scan._CHUNK_BYTES // least < recordio_scan._MOST_FRAMES


@pytest.mark.parametrize("flag", [0, 1, 3])
@pytest.mark.parametrize("image", [b"", b"image"])
@pytest.mark.parametrize("key", [7, MAGIC | MAGIC << 32, (1 << 64) - 1])
def test_a_record_that_is_split_inside_its_labels_is_read(tmp_path, flag, image, key):
    """Magics in the key and in the labels split the header into as many parts as it can have."""
    value = struct.unpack("<f", MAGIC_BYTES)[0]
    labels = np.full(flag, value, "<f4").tobytes()
    payload = IMAGE_HEADER.pack(flag, 2.0, key, MAGIC | MAGIC << 32) + labels + image
    path = tmp_path / "x.rec"
    path.write_bytes(recordio.frame(payload) * 2)
    found = recordio_scan.scan(path, lambda done, total: None)
    assert not found.damaged_R.any()
    assert found.has_image_R.tolist() == [bool(image)] * 2
    assert found.label_R.tolist() == [value if flag else 2.0] * 2
    assert found.key_R.view(np.uint64).tolist() == [key] * 2
    if image:
        assert image_of(recordio.frame(payload), "x", 0).tobytes() == image


def test_a_record_with_millions_of_labels_needs_no_python_object_for_each(peak_bytes):
    """The labels of a record in two parts; the reader of an image needs none of them."""
    payload = IMAGE_HEADER.pack(1 << 20, 0.0, 0, 0) + MAGIC_BYTES + bytes(4 * (1 << 20) - 4) + b"image"
    span = recordio.frame(payload)
    assert image_of(span, "x", 0).tobytes() == b"image"
    assert peak_bytes() < 8 * len(span)
    with pytest.raises(RecordError, match="x: expected an image, found a record without one"):
        image_of(recordio.frame(payload[:-5]), "x", 0)


def test_a_name_for_all_members_is_short(tmp_path):
    """A global pax header of a megabyte would be searched again for each member of half a kilobyte."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "x" * 5000}) as tar:
        tar.addfile(tarfile.TarInfo("1.jpg"), io.BytesIO())
    with pytest.raises(
        tar_index.ShardError, match=r"x.tar: a name of 5000 bytes at byte 512, expected at most 4096"
    ):
        tar_index.index_shard(path)


PATTERNS = [
    "a-{0..9}.tar",
    "{000..099}/{a,b}/{0..20..5}.tar",
    "{a-{0..9},b-{5..-3},c{x,y}{x,y}}",
    "{a..e}{Z..b}{e..a..2}",
    "pipe:cat {a}.tar | awk '{print $1}'",
    "{,}{a,}{}",
    "{1..a}{0..3..0}{..}",
    "{{0..2}}",
    "plain",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_braces_are_counted_as_they_are_expanded(pattern):
    assert braces.count_of(pattern) == len(list(braceexpand(pattern, escape=False)))


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..99999999999}",
        "{-99999999999..0}.tar",
        "{0..999}{0..999}{0..999}",
        "{a,{b,{0..9999999}}}",
        "{" + ",".join(["{a,b}" * 40, "c"]) + "}",
        "{%s1..2}" % ("0" * 5000),
        "{0..1%s}" % ("0" * 5000),
        "{0..999999}" + "x" * 1000,
        "{" * 30 + "0..1" + "}" * 30,
        "{" * 100_000 + "}" * 100_000,
    ],
)
def test_braces_that_expand_to_too_many_texts_are_refused_before(monkeypatch, pattern):
    expanded = []
    monkeypatch.setattr(
        "data_pipeline.streaming.samples.braceexpand", lambda *a, **k: expanded.append(a) or []
    )
    with pytest.raises(
        ValueError, match=r"data\.shards: expected (at most 1000000 shards|braces on at most 16)"
    ):
        shard_urls(["fine.tar", pattern])
    assert not expanded


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a = " + "[" * 100_000, "values nested too deeply"),
        ("a = " + "{a=" * 100_000, "values nested too deeply"),
        ("\n" + "a." * 30_000 + "a = 1", r"a key of more than 32 parts \(at line 2\)"),
        ("[" + '"\\"" . ' * 30_000 + "a]", r"a key of more than 32 parts \(at line 1\)"),
        ("a = {" + "'a'.\t" * 30_000 + "a = 1}", r"a key of more than 32 parts \(at line 1\)"),
        ("#" * ((1 << 20) + 1), "1048577 bytes, expected at most 1048576"),
    ],
)
def test_a_configuration_for_which_tomllib_needs_quadratic_time_or_a_deep_stack_is_refused(
    tmp_path, monkeypatch, text, found
):
    path = tmp_path / "x.toml"
    path.write_text(text)
    parsed = []
    loads = config_file.tomllib.loads
    monkeypatch.setattr(config_file.tomllib, "loads", lambda text: parsed.append(text) or loads(text))
    with pytest.raises(ValueError, match=rf"x\.toml: expected .*, found: {found}"):
        config_file.load(SynthConfig, path)
    assert not parsed or "nested" in found


@pytest.mark.parametrize("line", ["# " + '\\"' * 500_000, "# '" + '"\\"' * 300_000, '#" ' * 300_000])
def test_quotes_in_a_long_comment_are_searched_once(tmp_path, line):
    """Before, the search for long keys took more than ten minutes."""
    (tmp_path / "x.toml").write_text(f"{line}\nseed = 7\n")
    assert config_file.load(SynthConfig, tmp_path / "x.toml").seed == 7


def test_a_configuration_of_unknown_keys_ends_with_a_short_message(tmp_path):
    (tmp_path / "x.toml").write_text("".join(f"a{i} = 1\n" for i in range(1000)))
    with pytest.raises(ValueError, match=r"and 950 more errors$") as error:
        config_file.load(SynthConfig, tmp_path / "x.toml")
    assert str(error.value).count("\n") == 50


@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5000])
def test_an_override_that_tomllib_cannot_read_is_a_text(value):
    with pytest.raises(ValueError, match=r"--set: seed: .* integer"):
        config_file.load(SynthConfig, None, [f"seed={value}"])
