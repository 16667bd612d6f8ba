"""Streamed shards: of what a server sends without end, a rank reads little and ends with an error."""

import gzip
import io
import itertools
import lzma
import tarfile

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.streaming import connection
from data_pipeline.streaming.bounded_tar import LimitError, files_in, key_and_suffix
from data_pipeline.streaming.samples import RemoteSamples

MIB = 1 << 20


class Endless:
    """A stream of `head` and then of repeated `block`s, that counts its bytes and fails at a limit."""

    def __init__(self, head, blocks, limit=4 * MIB):
        self._blocks = itertools.chain(self._of(head), blocks)
        self.count, self._limit = 0, limit

    @staticmethod
    def _of(head):
        return (head[at : at + 512] for at in range(0, len(head), 512))

    def read(self, size=-1):
        block = next(self._blocks, b"")
        self.count += len(block)
        assert self.count < self._limit, f"more than {self._limit} bytes were read"
        return block


def header(name, size=0, kind=tarfile.REGTYPE, form=tarfile.GNU_FORMAT, **pax):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.pax_headers = size, kind, pax
    return info.tobuf(form)


def pax(**fields):
    records = b"".join(b"%d %s=%s\n" % (len(k) + len(v) + 5, k.encode(), v) for k, v in fields.items())
    assert all(10 <= len(k) + len(v) + 5 < 100 for k, v in fields.items())
    return header("pax", len(records), tarfile.XHDTYPE) + records.ljust(-(-len(records) // 512) * 512, b"\0")


def fixed(head):
    """Return a header with its right checksum."""
    blank = head[:148] + 8 * b" " + head[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


SPARSE = fixed(header("a.jpg", 0, tarfile.GNUTYPE_SPARSE)[:482] + b"\1" + bytes(29))
FILLED = itertools.repeat(b"x" * 512)
IMAGE = header("a.jpg", 5) + b"image".ljust(512, b"\0")
GLOBALS = (
    header("g", 512, tarfile.XGLTYPE)
    + b"".join([b"512 comment%06d=" % i]).ljust(511, b"v")
    + b"\n"
    + header("d/")
    for i in itertools.count()
)
ATTACKS = {
    "member": (header("a.jpg", 1 << 40), FILLED),
    "directory's member": (header("a", 1 << 40, b"Z"), FILLED),
    "long name": (header("././@LongLink", 1 << 40, tarfile.GNUTYPE_LONGNAME), FILLED),
    "long link": (header("././@LongLink", 1 << 40, tarfile.GNUTYPE_LONGLINK), FILLED),
    "pax header": (header("pax", 1 << 40, tarfile.XHDTYPE), FILLED),
    "global pax header": (header("pax", 1 << 40, tarfile.XGLTYPE), FILLED),
    "Solaris' pax header": (header("pax", 1 << 40, tarfile.SOLARIS_XHDTYPE), FILLED),
    "chain of long names": (
        b"",
        itertools.cycle([header("././@LongLink", 512, tarfile.GNUTYPE_LONGNAME), b"n" * 512]),
    ),
    "chain of empty pax headers": (b"", itertools.repeat(header("pax", 0, tarfile.XHDTYPE))),
    "global pax headers": (b"", (part[i : i + 512] for part in GLOBALS for i in range(0, len(part), 512))),
    "key without end, empty members": (b"", (header(f"a.{i}") for i in itertools.count())),
    "key without end": (
        b"",
        itertools.chain.from_iterable(
            (header(f"a.{i}", 100 << 10), *[b"x" * 512] * 200) for i in itertools.count()
        ),
    ),
    "sparse": (SPARSE, itertools.repeat(21 * (2 * b"00000000001\0") + b"\1" + bytes(7))),
    "sparse 1.0": (
        pax(**{"GNU.sparse.major": b"1", "GNU.sparse.minor": b"0"})
        + header("a.jpg", 512)
        + b"9999999999\n".ljust(512, b"0"),
        itertools.repeat(256 * b"1\n"),
    ),
    "sparse 0.1": (pax(**{"GNU.sparse.map": b"0,1"}) + header("a.jpg", 512), FILLED),
    "pax size": (pax(path=b"a.jpg", size=b"1" + 15 * b"0") + header("a.jpg", 512), FILLED),
    "negative pax size": (pax(path=b"a.jpg", size=b"-51200") + header("a.jpg", 512), FILLED),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_little_is_read_of_what_never_ends(attack):
    head, blocks = ATTACKS[attack]
    stream = Endless(head, blocks)
    with pytest.raises(tarfile.TarError) as caught:
        list(files_in(stream, MIB))
    assert isinstance(caught.value, LimitError) or "size" in attack


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_compressed_archives_are_refused_before_anything_is_decompressed(compress):
    packed = compress(IMAGE + bytes(64 * MIB))
    stream = Endless(packed, iter(()))
    with pytest.raises(tarfile.TarError):
        list(files_in(stream, MIB))
    assert stream.count <= 1024


def test_a_name_with_many_slashes_takes_linear_time():
    name = 200_000 * "a/"
    assert key_and_suffix(name) == (None, None)
    assert key_and_suffix(f"{name}b.jpg") == (f"{name}b", "jpg")
    long = io.BytesIO()
    with tarfile.open(fileobj=long, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(5000 * "a/" + "b.jpg"))
    with pytest.raises(LimitError, match=r"expected names of at most 4096 characters, found one of 10005"):
        list(files_in(io.BytesIO(long.getvalue()), MIB))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_large_members_and_long_names_within_the_limits_are_read(form):
    names = ["d" * 90 + "/" + "e" * 80 + ".jpg", "short.cls", "x/__meta__.txt", "__meta__/x.txt"]
    if form != tarfile.USTAR_FORMAT:
        names.append(40 * ("f" * 90 + "/") + "long.jpg")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = MIB - 512
            archive.addfile(info, io.BytesIO(name.encode() + bytes(MIB)))
    found = {one["fname"]: one["data"] for one in files_in(io.BytesIO(file.getvalue()), MIB)}
    assert list(found) == [name for name in names if not name.startswith("__")]
    assert all(data.rstrip(b"\0") == name.encode() and len(data) == MIB - 512 for name, data in found.items())


def test_the_limit_is_a_key_and_the_error_names_it(tmp_path):
    assert DataConfig(shards=["a.tar"], num_classes=1).max_sample_mb == 64
    (tmp_path / "a.tar").write_bytes(header("a.jpg", 2 * MIB) + bytes(2 * MIB) + bytes(1024))
    urls = [str(tmp_path / "a.tar")]
    options = {"seed": 0, "rank": 0, "world_size": 1, "window": 4}
    with (
        RemoteSamples(urls, max_sample_bytes=MIB, **options) as samples,
        pytest.raises(
            connection.RemoteError,
            match=r"a\.tar: expected members of at most 1048576 bytes \(data\.max_sample_mb\), found one of "
            r"2097152: 'a\.jpg', before byte 512; write the shard again",
        ),
    ):
        next(samples)


def test_zeros_after_the_archive_end(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "_LONGEST_PADDING", 1 << 16)
    label = header("a.cls", 1) + b"1".ljust(512, b"\0")
    content = IMAGE + label
    options = {"seed": 0, "rank": 0, "world_size": 1, "window": 4}
    for padding, is_read in ((1 << 15, True), (1 << 17, False)):
        (tmp_path / "a.tar").write_bytes(content + bytes(padding))
        with RemoteSamples([str(tmp_path / "a.tar")], **options) as samples:
            if is_read:
                assert next(samples).label == 1
            else:
                with pytest.raises(connection.RemoteError, match=r"at most 65536 zeros after the end"):
                    next(samples)
