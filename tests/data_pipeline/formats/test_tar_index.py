"""Tar shards: webdataset, DALI and Python's tarfile are the second opinions, in both directions."""

import io
import itertools
import os
import re
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st
from nvidia.dali import fn, pipeline_def

from data_pipeline.formats.tar_index import BLOCK, ShardError, index_shard
from data_pipeline.formats.tar_writer import ShardWriter

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar_of(path, members, form=tarfile.USTAR_FORMAT, **options):
    """Writes (name, content) pairs with tarfile; a content of None makes a directory."""
    with tarfile.open(path, "w", format=form, **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    return path


def samples_in(path):
    """(image bytes, label) of every sample, read as the index says."""
    data, index = path.read_bytes(), index_shard(path)
    assert all(array.dtype == np.int64 for array in index)
    spans = zip(index.offset_N, index.length_N, strict=True)
    return [(data[o : o + n], label) for (o, n), label in zip(spans, index.label_N.tolist(), strict=True)]


@pytest.fixture
def shards(tmp_path, jpeg):
    """A folder of ten samples in shards of four, and the samples."""
    samples = [(jpeg(i), 10**i) for i in range(10)]
    with ShardWriter(tmp_path / "shards", samples=4) as writer:
        for image, label in samples:
            writer.add(image, label)
    return tmp_path / "shards", samples


def paths_of(folder):
    return sorted(folder.iterdir())


def test_webdataset_reads_what_is_written(shards):
    folder, samples = shards
    urls = [str(path) for path in paths_of(folder)]
    dataset = wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil").to_tuple("cls", "jpg")
    raw = wds.WebDataset(urls, shardshuffle=False, empty_check=False)
    assert [(sample["jpg"], int(sample["cls"])) for sample in raw] == samples
    assert [sample["__key__"] for sample in raw] == [f"{i:09d}" for i in range(10)]
    for (label, image), (encoded, expected) in zip(dataset, samples, strict=True):
        assert label == expected
        assert image.size == (48, 48)
        assert encoded[:2] == b"\xff\xd8"


def test_dali_reads_what_is_written(shards):
    folder, samples = shards

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph():
        return tuple(fn.readers.webdataset(paths=[str(p) for p in paths_of(folder)], ext=["jpg", "cls"]))

    pipeline = graph()
    for image, label in samples:
        encoded, digits = (output.at(0).tobytes() for output in pipeline.run())
        assert (encoded, int(digits)) == (image, label)


def test_tarfile_reads_what_is_written_and_so_do_we(shards):
    folder, samples = shards
    names = [path.name for path in paths_of(folder)]
    assert names == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert [sample for path in paths_of(folder) for sample in samples_in(path)] == samples
    with tarfile.open(folder / names[0]) as tar:
        assert [m.name for m in tar][:2] == ["000000000.jpg", "000000000.cls"]
        assert {(m.mtime, m.uid, m.uname, m.mode) for m in tar} == {(0, 0, "", 0o644)}


def test_the_same_samples_give_the_same_bytes(shards, tmp_path):
    folder, samples = shards
    with ShardWriter(tmp_path / "again", samples=4, first_shard=1, first_sample=4) as writer:
        for image, label in samples[4:]:
            writer.add(image, label)
    again = {path.name: path.read_bytes() for path in paths_of(tmp_path / "again")}
    assert again == {path.name: path.read_bytes() for path in paths_of(folder)[1:]}


@given(st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=20), st.integers(3000, 12000))
def test_a_shard_ends_before_it_is_too_large(tmp_path_factory, images, size_bytes):
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, size_bytes=size_bytes) as writer:
        for image in images:
            writer.add(image, 1)
    counts = [len(samples_in(path)) for path in paths_of(folder)]
    sizes = [path.stat().st_size for path in paths_of(folder)]
    assert sum(counts) == len(images)
    assert all(size <= size_bytes or count == 1 for size, count in zip(sizes, counts, strict=True))
    # and none ends early: the next sample would have been too much
    first_images = itertools.accumulate(counts[:-1])
    for size, first in zip(sizes, first_images, strict=False):
        assert size + 3 * BLOCK + len(images[first]) + BLOCK > size_bytes


def test_png_and_webp_get_their_own_suffix(tmp_path):
    images = [b"\x89PNG\r\n\x1a\nrest", b"RIFF\x10\0\0\0WEBPrest", b"RIFF....WAVE"]
    with ShardWriter(tmp_path) as writer:
        for image in images:
            writer.add(image, 0)
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        assert [name.partition(".")[2] for name in tar.getnames()[::2]] == ["png", "webp", "jpg"]
    assert [image for image, _ in samples_in(tmp_path / "train-000000.tar")] == images


@pytest.mark.parametrize(("image", "label"), [(b"", 0), (b"x", -1), (b"x", 1 << 63)])
def test_an_error_leaves_whole_shards_only(tmp_path, image, label):
    def write():
        with ShardWriter(tmp_path, samples=2) as writer:
            for sample in [(b"image", 7)] * 3 + [(image, label)]:
                writer.add(*sample)

    with pytest.raises(ValueError, match=r"sample 3: expected an image and a label"):
        write()
    assert [path.name for path in paths_of(tmp_path)] == ["train-000000.tar"]
    assert samples_in(tmp_path / "train-000000.tar") == 2 * [(b"image", 7)]


def test_a_killed_writer_leaves_whole_shards_under_their_names(tmp_path):
    script = (
        "import os, sys, pathlib; from data_pipeline.formats.tar_writer import ShardWriter\n"
        f"with ShardWriter(pathlib.Path({str(tmp_path)!r}), samples=3) as writer:\n"
        "    for i in range(8): writer.add(os.urandom(5000), i)\n"
        f"    os.kill(os.getpid(), {signal.SIGKILL})"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    left, *shards = paths_of(tmp_path)
    assert re.fullmatch(r"\.train-000002\.tar\.[0-9a-f]{16}\.part", left.name)
    assert [path.name for path in shards] == ["train-000000.tar", "train-000001.tar"]
    assert [len(samples_in(path)) for path in shards] == [3, 3]


# Reading what others write.


def test_webdataset_s_shard_writer_is_read(tmp_path, jpeg):
    samples = [(jpeg(i), 100 + i) for i in range(7)]
    with wds.ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=3, verbose=0) as writer:
        for i, (image, label) in enumerate(samples):
            writer.write({"__key__": f"people/a/{i}", "jpg": image, "cls": label, "txt": "a face"})
    assert [sample for path in paths_of(tmp_path) for sample in samples_in(path)] == samples


def test_webdataset_s_tar_writer_with_json_is_read(tmp_path, jpeg):
    with wds.TarWriter(str(tmp_path / "s.tar")) as writer:
        writer.write({"__key__": "a", "png": np.zeros((4, 4, 3)), "json": {"cls": 4, "label": 3}})
        writer.write({"__key__": "b", "webp": jpeg(0), "json": {"cls": 4, "name": "x"}})
        writer.write({"__key__": "c", "jpeg": jpeg(1), "json": {"label": 5}, "cls": 6})
    assert [label for _, label in samples_in(tmp_path / "s.tar")] == [3, 4, 6]


LONG = {
    "short": "000",
    "99 letters": "x" * 95,
    "split by ustar": "a" * 90 + "/" + "b" * 80,
    "folders with dots": "./v1.0/people/Zoë",
}
VERY_LONG = {"over 255": "d" * 150 + "/" + "e" * 200, "several blocks": ("f" * 100 + "/") * 12 + "g"}


# ustar cannot hold the very long ones.
CASES = [(form, name) for form in FORMATS for name in (LONG if form == "ustar" else LONG | VERY_LONG)]


@pytest.mark.parametrize(("form", "name"), CASES)
def test_every_dialect_of_tarfile_is_read(tmp_path, form, name, jpeg):
    prefix = (LONG | VERY_LONG)[name]
    members = [("folder", None), ("folder/", None)]
    for i in range(3):
        members += [
            (f"{prefix}{i}.JPG", jpeg(i)),
            (f"{prefix}{i}.txt", b"text"),
            (f"{prefix}{i}.cls", b"%d\n" % i),
        ]
    path = tar_of(tmp_path / "s.tar", members, FORMATS[form])
    assert samples_in(path) == [(jpeg(i), i) for i in range(3)]


def test_pax_headers_for_one_and_for_all_members(tmp_path, jpeg):
    path = tmp_path / "s.tar"
    for_all = {"comment": "all", "mtime": "1.5"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=for_all) as tar:
        for name, content in [("1.jpg", jpeg(0)), ("1.cls", b"12")]:
            info = tarfile.TarInfo("other name")
            info.pax_headers = {"path": name, "size": str(len(content)), "x": "\n3 a=\n" * 99}
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        tar.addfile(tarfile.TarInfo("2.txt"))
    assert samples_in(path) == [(jpeg(0), 12)]


def test_a_member_beyond_8_gib_is_passed_over(tmp_path, jpeg):
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path, size_bytes = tmp_path / f"{form}.tar", (9 << 30) + 5
        with open(path, "wb") as file:
            large = tarfile.TarInfo("large.bin")
            large.size = size_bytes
            file.write(large.tobuf(form))
            file.seek(size_bytes + BLOCK - 5, os.SEEK_CUR)  # a hole, which takes no space
            for name, content in (("1.jpg", jpeg(0)), ("1.cls", b"3")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.write(info.tobuf(form) + content + bytes(-len(content) % BLOCK))
            file.write(bytes(2 * BLOCK))
        index = index_shard(path)
        assert (index.offset_N > 9 << 30).all()
        assert (index.length_N.tolist(), index.label_N.tolist()) == ([len(jpeg(0))], [3])


def test_what_is_no_sample_is_left_out(tmp_path, jpeg):
    members = [
        ("__meta__/1.jpg", b"x"),
        ("__info__", b"x"),
        ("README", b"x"),
        (".hidden.jpg", b"x"),
        ("notes.json", b"[no label, but no image either]"),
        ("1.jpg", jpeg(1)),
        ("README", b"a member without a key does not end a sample"),
        ("1.cls", b" 7 \n"),
        ("1.seg.png", b"not the image"),
        ("dir.jpg", None),
    ]
    assert samples_in(tar_of(tmp_path / "s.tar", members)) == [(jpeg(1), 7)]
    with tarfile.open(tmp_path / "s.tar", "a") as tar:
        link = tarfile.TarInfo("2.jpg")
        link.type, link.linkname, link.size = tarfile.SYMTYPE, "1.jpg", 0
        tar.addfile(link)
    assert len(samples_in(tmp_path / "s.tar")) == 1


def test_a_shard_without_samples_has_an_empty_index(tmp_path):
    index = index_shard(tar_of(tmp_path / "s.tar", [("folder", None)]))
    assert [array.shape for array in index] == [(0,)] * 3


# Without names that begin with a dot: those we ignore, while webdataset gives them the folder as their key.
names = st.from_regex(r"([abé-][abé.-]*/){0,2}[abé-][abé.-]{0,3}", fullmatch=True)


@given(
    form=st.sampled_from(sorted(FORMATS.values())),
    members=st.lists(
        st.tuples(names, st.sampled_from([".jpg", ".cls", ".PNG", ".txt", ".json", ""])),
        max_size=12,
        unique=True,
    ),
)
def test_samples_are_those_of_webdataset(tmp_path_factory, form, members):
    contents = [(n + s, b'{"label": 3}' if s == ".json" else b"%d" % i) for i, (n, s) in enumerate(members)]
    path = tar_of(tmp_path_factory.mktemp("tar") / "s.tar", contents, form)
    theirs, complete = [], True
    for sample in wds.WebDataset(str(path), shardshuffle=False, empty_check=False):
        images = [sample[suffix] for suffix in ("jpg", "png") if suffix in sample]
        has_label = "cls" in sample or "json" in sample
        complete &= len(images) == has_label if images or "cls" in sample else True
        theirs += [(image, int(sample.get("cls", b"3"))) for image in images]
    if complete:
        assert samples_in(path) == theirs
    else:
        with pytest.raises(ShardError, match=r"has no |has a second "):
            index_shard(path)


# What is refused.


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a/1.jpg", b"x"), ("a/2.cls", b"1")], r"sample 'a/1' at byte 512 has no label .*--sort=name"),
        ([("1.jpg", b"x")], r"sample '1' at byte 512 has no label \(.cls or .json\); add it, or leave"),
        ([("1.cls", b"1")], r"sample '1' at byte 512 has no image \(.jpg, .jpeg, .png or .webp\)"),
        ([("1.cls", b"1"), ("1.jpg", b"")], r"sample '1' at byte 512 has no image"),
        ([("1.jpg", b"x"), ("1.png", b"y"), ("1.cls", b"1")], r"a second image at byte 1536, after .* 512;"),
        ([("1.jpg", b"x"), ("1.cls", b"1"), ("1.CLS", b"1")], r"a second cls at byte 2560, after .* 1536;"),
    ],
)  # fmt: skip
def test_a_sample_that_is_none_is_named(tmp_path, members, message):
    with pytest.raises(ShardError, match=r"s\.tar: .*" + message):
        index_shard(tar_of(tmp_path / "s.tar", members))


@pytest.mark.parametrize(
    "text",
    [b"", b"-1", b"1.0", b"cat", "٣".encode(), b"1 2", b"9" * 19, b"9" * 5000, b"0" * 99 + b"1", b"\0"],
)
def test_a_label_that_is_no_whole_number_is_named(tmp_path, text):
    with pytest.raises(ShardError, match=r"s\.tar: sample 'k' has the label .* at byte 1536, expected an"):
        index_shard(tar_of(tmp_path / "s.tar", [("k.jpg", b"x"), ("k.cls", text)]))


@pytest.mark.parametrize(
    "text",
    [b"", b"3", b"[]", b"{}", b'{"label": "3"}', b'{"label": true}', b'{"label": 1.5}', b'{"label": -1}',
     b'{"cls": null}', b"[" * 100_000, b"\xff\xfe", b'{"label": 1' + b"0" * 5000 + b"}",
     b'{"label": 1}' + b" " * (1 << 20)],
)  # fmt: skip
def test_json_without_a_label_is_named(tmp_path, text):
    with pytest.raises(
        ShardError, match=r"'k' has the label .* expected an integer .* under 'label' or 'cls'"
    ):
        index_shard(tar_of(tmp_path / "s.tar", [("k.jpg", b"x"), ("k.json", text)]))


@pytest.mark.parametrize(("mode", "name"), [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")])
def test_a_compressed_shard_is_refused(tmp_path, mode, name):
    path = tmp_path / "s.tar.gz"
    with tarfile.open(path, f"w:{mode}") as tar:
        tar.add(__file__)
    with pytest.raises(ShardError, match=rf"s\.tar\.gz: compressed with {name}; .*: decompress it"):
        index_shard(path)


def test_a_truncated_shard_is_refused_wherever_it_ends(shards):
    path = paths_of(shards[0])[0]
    whole = path.read_bytes()
    end = len(whole) - 2 * BLOCK
    for kept in [*range(1, len(whole), 97), *range(BLOCK, end + 1, BLOCK)]:
        path.write_bytes(whole[:kept])
        if kept >= end + BLOCK:  # the first block of zeros is there, and so is all that matters
            assert len(samples_in(path)) == 4
            continue
        with pytest.raises(ShardError, match=r"train-000000\.tar: (truncated|.*is truncated)"):
            index_shard(path)
    path.write_bytes(b"")
    with pytest.raises(ShardError, match="found an empty file; copy it again"):
        index_shard(path)


def patched(at, content, fix_checksum=True):
    """The bytes of a shard of one sample, changed in the header of its second member."""
    samples = [tarfile.TarInfo("1.jpg"), tarfile.TarInfo("1.cls")]
    header = bytearray(samples[1].tobuf(tarfile.USTAR_FORMAT))
    header[124:135] = b"00000000001"
    header[at : at + len(content)] = content
    if fix_checksum:
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    first = samples[0]
    first.size = 1
    block = b"1" + bytes(BLOCK - 1)
    return first.tobuf(tarfile.USTAR_FORMAT) + block + bytes(header) + block + bytes(2 * BLOCK)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (patched(0, b"2", fix_checksum=False), r"no tar header at byte 1024: its checksum does not match"),
        (patched(148, b"junkjunk", fix_checksum=False), r"no tar header at byte 1024"),
        (patched(124, b"-0000000001\0"), r".* 1024 has the size '-0000000001.*', expected an"),
        (patched(124, b"0000000000x\0"), r"the member at byte 1024 has the size"),
        (patched(124, b"\xff" * 12), r"the member at byte 1024 has the size"),
        (patched(124, b"\x80" + b"\xff" * 11), r"truncated: the .* 1024 needs \d{27} bytes, 1536 are"),
        (patched(124, b"77777777777\0"), r"truncated: the member at byte 1024 needs 8589934591 bytes"),
        (patched(156, b"S"), r".*found a sparse one at byte 1536"),
        (patched(156, b"x"), r"a pax record at byte 1536 begins with '1', expected 'length key=value'"),
    ],
)  # fmt: skip
def test_a_damaged_header_is_named(tmp_path, content, message):
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(ShardError, match=r"s\.tar: " + message):
        index_shard(tmp_path / "s.tar")


def test_a_name_too_long_to_be_one_is_refused_unread(tmp_path):
    content = tar_of(tmp_path / "s.tar", [("n" * (1 << 21) + ".jpg", b"x")], tarfile.GNU_FORMAT)
    with pytest.raises(ShardError, match=r"a name or pax header of 2097157 bytes at byte 512"):
        index_shard(content)


@pytest.mark.parametrize("checksum", [b"%07o\0", b"%6o\0 ", b"%06o  ", b" %o\0 "])
def test_checksums_may_be_written_in_several_ways(tmp_path, checksum):
    content = bytearray(patched(0, b"1"))
    total = int(content[1024 + 148 : 1024 + 154], 8)
    content[1024 + 148 : 1024 + 156] = (checksum % total)[:8].ljust(8, b"\0")
    (tmp_path / "s.tar").write_bytes(content)
    assert index_shard(tmp_path / "s.tar").label_N.tolist() == [1]


def test_a_checksum_of_signed_bytes_is_accepted(tmp_path):
    content = bytearray(patched(300, b"\xe9" * 5))  # in the owner's name
    total = int(content[1024 + 148 : 1024 + 154], 8)
    content[1024 + 148 : 1024 + 154] = b"%06o" % (total - 5 * 256)
    (tmp_path / "s.tar").write_bytes(content)
    assert index_shard(tmp_path / "s.tar").label_N.tolist() == [1]


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(ShardError, match=r"s\.tar: expected a tar shard, found no such file"):
        index_shard(tmp_path / "s.tar")


def test_concatenated_archives_are_refused_and_padding_is_not(shards):
    path = paths_of(shards[0])[0]
    content = path.read_bytes()
    path.write_bytes(content + bytes(1 << 20))
    assert len(samples_in(path)) == 4
    path.write_bytes(content + content)
    with pytest.raises(ShardError, match="expected nothing after the end of the archive at byte"):
        index_shard(path)
