"""Hostile images: formats that start programs or crash a decoder, and files that decode to gigabytes."""

import contextlib
import faulthandler
import io
import os
import re
import resource
import signal
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import augment
from data_pipeline.batch import RankSlice
from data_pipeline.common import image_header, pillow_decode
from data_pipeline.common.pillow_decode import DecodeError, decoded
from data_pipeline.common.process_pool import WorkerDiedError, in_order
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.decode import Decoder, UndecodableError
from data_pipeline.formats.image_folder import listed
from data_pipeline.indexed.catalog import open_catalog
from data_pipeline.indexed.loader import Loader
from data_pipeline.loader import LoaderContext
from data_pipeline.quarantine import Quarantine
from data_pipeline.tools import pack, validate
from trainer.inference.images import open_image

ROOT = Path(__file__).parents[2]
SIDE = 48
FOREIGN = ("JPEG2000", "TIFF", "GIF", "AVIF", "PPM", "ICO", "PDF", "EPS")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 48\n%%EndComments\nshowpage\n%%EOF\n"


def encoded(kind, size=(SIDE, SIDE), mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, size, "grey").save(file, kind, **options)
    return file.getvalue()


def bomb(kind):
    """Return a small image of 13,000 x 13,000 pixels."""
    side = 13_000
    if kind == "PNG":
        deflate = zlib.compressobj(9)
        rows = b"".join(deflate.compress(bytes(side // 8 + 1)) for _ in range(side)) + deflate.flush()
        chunks = (
            (b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)),
            (b"IDAT", rows),
            (b"IEND", b""),
        )
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
    if kind == "WEBP":  # the pixels do not matter: the header is enough to allocate gigabytes
        data = bytearray(encoded("WEBP", lossless=True))
        struct.pack_into("<I", data, 21, (side - 1) | (side - 1) << 14)
        return bytes(data)
    if kind == "WEBP canvas":
        data = bytearray(encoded("WEBP", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))]))
        assert data[12:16] == b"VP8X"
        data[24:30] = 2 * (side - 1).to_bytes(3, "little")
        return bytes(data)
    data = bytearray(encoded(kind))
    at = data.index(b"\xff\xc0") + 5 if kind == "JPEG" else 18
    struct.pack_into(">HH" if kind == "JPEG" else "<ii", data, at, side, side)
    return bytes(data)


BOMBS = ("JPEG", "PNG", "WEBP", "WEBP canvas", "BMP")


def array(data):
    return np.frombuffer(data, np.uint8)


def decode(*images, max_side=image_header.SIDES_PX[1]):
    """Return the first micro-batch of DALI's decoder."""
    decoder = Decoder(
        lambda i: ([array(image) for image in images], augment.none(len(images))),
        lambda i, row: f"row {row}",
        batch_size=len(images),
        image_size=SIDE,
        threads=1,
        prefetch_batches=1,
        device_id=None,
        changes=AugmentConfig(flip_probability=0),
        max_side=max_side,
    )
    return next(decoder)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """The file that a Ghostscript of the PATH would write if it were started."""
    trace, program = tmp_path / "started", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{trace}'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return trace


def folder_of(root, images):
    for name, data in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_an_eps_file_named_jpg_starts_no_program(tmp_path, started, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # Pillow remembers whether there is one
    with Image.open(io.BytesIO(EPS)) as unrestricted, contextlib.suppress(Exception):
        unrestricted.load()
    assert started.exists()
    started.unlink()
    folder = folder_of(tmp_path / "in", {"a/1.jpg": EPS, "b/1.jpg": encoded("JPEG")})
    with pytest.raises(
        DecodeError, match=r"1\.jpg cannot be decoded: expected a JPEG, PNG, WebP or BMP image"
    ):
        open_image(folder / "a" / "1.jpg")
    with pytest.raises(ValueError, match=r"a/1\.jpg: expected an image, found: no known image format"):
        pack.pack_folder(folder, tmp_path / "out")
    (bad,) = validate.validate([folder], None, lambda *_: None, 1).bad
    assert "expected a JPEG, PNG, WebP or BMP image, found one that begins with b'%!PS-Ado'" in bad.reason
    with pytest.raises(UndecodableError, match="row 0 cannot be decoded: expected a JPEG"):
        decode(EPS)
    assert not started.exists()


def test_pillow_opens_images_in_one_place_only():
    lines = subprocess.run(
        ["grep", "-rnE", "--include=*.py", r"Image\.open\(|ImageFile\.Parser|PIL\.[A-Z]\w+Plugin"]
        + [ROOT / name for name in ("data_pipeline", "partial_fc", "trainer", "slurm", "benchmarks")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    (line,) = lines
    assert line.startswith(f"{ROOT}/data_pipeline/common/pillow_decode.py:")
    assert "formats=[" in line


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_formats_reach_no_decoder(kind, monkeypatch):
    data = encoded(kind)
    opened = []
    monkeypatch.setattr(pillow_decode.Image, "open", lambda *_, **__: opened.append(kind))
    with pytest.raises(DecodeError, match="`lgaf data pack` converts other formats"):
        decoded(array(data), "x")
    assert not opened
    monkeypatch.undo()
    with pytest.raises(UndecodableError) as raised:
        decode(encoded("JPEG"), data, encoded("PNG"))
    assert list(raised.value.reasons) == [1]
    assert f"found one that begins with {data[:8]!r}" in raised.value.reasons[1]


@pytest.mark.parametrize("kind", ["JPEG2000", "TIFF", "GIF", "AVIF", "PPM"])
def test_pack_converts_formats_that_training_does_not_read(kind, tmp_path):
    folder = folder_of(tmp_path / "in", {"a/1.jpg": encoded(kind), "b/1.jpg": encoded("JPEG")})
    assert pack.pack_folder(folder, tmp_path / "out", pack.PackOptions(size=SIDE)).images == 2
    record = open_catalog(tmp_path / "out").image(0)
    assert np.abs(np.asarray(decoded(record, ""), int) - 128).max() <= 3


def peak_kib():
    """Return the peak memory of this process since the last call."""
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    Path("/proc/self/clear_refs").write_text("5")
    return peak


@pytest.mark.parametrize(
    "attempt", [decode, lambda data: decoded(array(data), "row 0")], ids=["DALI", "Pillow"]
)
def test_a_small_file_of_13_000_x_13_000_pixels_takes_no_memory(attempt):
    data = bomb("PNG")
    attempt(encoded("PNG"))
    peak_kib()
    before = peak_kib()
    with pytest.raises(DecodeError, match="row 0 cannot be decoded: 13000x13000 pixels, expected "):
        attempt(data)
    assert peak_kib() - before < 60 << 10  # one byte per pixel would be 161 MiB


@pytest.mark.parametrize("kind", BOMBS)
def test_the_size_is_read_before_a_decoder_sees_the_image(kind, monkeypatch):
    data = bomb(kind)
    assert len(data) < 30_000
    assert image_header.image_size(array(data)) == (13_000, 13_000)
    opened = []
    monkeypatch.setattr(pillow_decode.Image, "open", lambda *_, **__: opened.append(kind))
    for formats in ((), ("TIFF",)):
        with pytest.raises(DecodeError, match="13000x13000 pixels, expected 1 to 4096 a side"):
            decoded(array(data), "x", other_formats=formats)
    assert not opened
    with pytest.raises(UndecodableError, match="13000x13000 pixels, expected 16 to 4096 a side"):
        decode(data)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PPM", "JPEG2000", "AVIF"])
def test_the_size_of_a_converted_format_is_read_before_its_pixels(kind, tmp_path, monkeypatch):
    data = encoded(kind, (5000, 17))
    folder = folder_of(tmp_path / "in", {"a/1.x": data})
    loaded = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: loaded.append(image))
    with pytest.raises(DecodeError, match="5000x17 pixels"):
        decoded(array(data), "x", other_formats=(kind,))
    assert not loaded
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"1\.x: .* 5000x17 pixels, .* raise --max-image-side, or remove"):
        pack.pack_folder(folder, tmp_path / "out")
    assert pack.pack_folder(folder, tmp_path / "out", pack.PackOptions(max_side=5000)).images == 1


def test_a_tile_larger_than_its_image_is_read_before_its_pixels(monkeypatch):
    def tiff(side):
        tags = {256: 100, 257: 100, 258: 8, 259: 5, 262: 1, 277: 1, 322: side, 323: side, 324: 134, 325: 64}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(68)

    loaded = []
    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", lambda image: loaded.append(image))
    with pytest.raises(DecodeError, match="x cannot be decoded: a tile of 46000x46000 pixels"):
        decoded(array(tiff(46000)), "x", other_formats=("TIFF",))
    assert not loaded
    decoded(array(tiff(256)), "x", other_formats=("TIFF",))
    assert loaded


@pytest.mark.parametrize("kind", ["progressive", "sequential"])
def test_a_jpeg_of_thousands_of_scans_is_refused(kind):
    data = bytearray(encoded("JPEG", (4096, 4096), "L", progressive=kind == "progressive"))
    at = data.rindex(b"\xff\xda")
    scan = bytes(data[at : at + 30])
    bomb = bytes(data[:at]) + scan * 100 + bytes(data[at:])
    for attempt in (decode, lambda data: decoded(array(data), "row 0")):
        with pytest.raises(DecodeError, match=r"a JPEG of 1\d\d scans, expected at most 64"):
            attempt(bomb)
    assert image_header.image_size(array(data)) == (4096, 4096)
    appended = bytes(data) + b"\xff\xda\xff\xff" * 100  # as in a video behind a photograph
    assert image_header.image_size(array(appended)) == (4096, 4096)


def test_the_limit_is_a_key(tmp_path):
    folder = folder_of(tmp_path, {"a/1.png": encoded("PNG", (5000, 17)), "a/2.png": encoded("PNG")})
    context = LoaderContext(
        RankSlice(0, 1, 2, 2), seed=1, first_step=0, cursor=None, ranks_on_node=1, device_id=None
    )
    for limit, bad in ((4096, 1), (5000, 0)):
        config = DataConfig(path=folder, image_size=SIDE, threads=1, max_image_side=limit)
        quarantine = Quarantine(None, 1.0)
        next(Loader(config, open_catalog(folder), context, quarantine))
        assert len(quarantine) == bad
        assert len(validate.validate([folder], None, lambda *_: None, 1, limit).bad) == bad


def test_headers_state_the_size_of_every_kind_of_file():
    size = (70, 33)
    files = [
        encoded("JPEG", size),
        encoded("JPEG", size, progressive=True, comment=b"\xff\xc0" * 40, exif=bytes(60_000)),
        encoded("JPEG", size, "CMYK"),
        encoded("PNG", size, "L"),
        encoded("WEBP", size),
        encoded("WEBP", size, lossless=True),
        encoded("WEBP", size, xmp=b"<x/>"),
        encoded("WEBP", size, save_all=True, append_images=[Image.new("RGB", size)]),
        encoded("BMP", size),
    ]
    upside_down = bytearray(files[-1])
    struct.pack_into("<i", upside_down, 22, -33)
    core = struct.pack("<2sIIIIHHHH", b"BM", 0, 0, 26, 12, 70, 33, 1, 24) + files[-1][54:]
    jpeg = files[0]
    fill = jpeg[:20] + b"\xff" * 9 + jpeg[20:]
    for data in (*files, bytes(upside_down), core, fill):
        assert image_header.image_size(array(data)) == size == decoded(array(data), "").size
        decode(data)


def test_a_second_size_in_a_file_is_no_way_around_the_limit():
    small, large = encoded("JPEG"), encoded("JPEG", (5000, 17))
    at = small.index(b"\xff\xc0")
    frame = small[at : at + 2 + struct.unpack_from(">H", small, at + 2)[0]]
    header = encoded("PNG")[:33]
    canvas = bytearray(encoded("WEBP", (5000, 17), xmp=b"<x/>"))
    canvas[24:30] = 2 * (SIDE - 1).to_bytes(3, "little")
    for data in (small[:2] + frame + large[2:], header + encoded("PNG", (5000, 17))[8:], bytes(canvas)):
        assert image_header.image_size(array(data)) == (SIDE, SIDE)
        with pytest.raises(DecodeError):
            decoded(array(data), "x")
        with pytest.raises(UndecodableError):
            decode(data)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0", b"RIFF", b"BM"])
def test_a_cut_header_is_refused(data):
    assert image_header.refusal(array(data), 4096)
    for end in range(40):
        for kind in image_header.FORMATS:
            assert image_header.refusal(array(encoded(kind)[:end]), 4096) or end >= 18


def test_a_jpeg_of_many_segments_is_read_in_bounded_steps(monkeypatch):
    steps = []
    marker = image_header._JPEG_MARKER

    class Counting:
        def search(self, data, at):
            steps.append(at)
            return marker.search(data, at)

    monkeypatch.setattr(image_header, "_JPEG_MARKER", Counting())
    for filler in (b"\xff\xe1\0\2", b"\xff\xd0", b"\xff\0", b"\xff", b"\0"):
        steps.clear()
        assert image_header.refusal(array(b"\xff\xd8\xff" + filler * 100_000), 4096)
        assert len(steps) <= 1001
        assert steps == sorted(steps)


@pytest.fixture
def crashing(monkeypatch):
    """Images whose first bytes are JPEG 2000's end the process that decodes them, as a bad pointer does."""
    real = Image.open
    parent = os.getpid()

    def crash(file, **options):
        if file.getvalue()[4:6] == b"jP" and os.getpid() != parent:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler.disable()
            os.kill(os.getpid(), signal.SIGSEGV)
        return real(file, **options)

    monkeypatch.setattr(pillow_decode.Image, "open", crash)
    return encoded("JPEG2000")


@pytest.mark.parametrize("hold_out", [0, 2])
def test_an_image_that_crashes_its_decoder_is_named_by_pack(crashing, hold_out, tmp_path):
    images = {f"{label}/{i}.jpg": encoded("JPEG") for label in range(9) for i in range(5)}
    folder = folder_of(tmp_path / "in", images | {"7/3.jpg": crashing})
    with pytest.raises(
        ValueError, match=r"7/3\.jpg: expected an image, found one that ends the process that decodes it"
    ):
        pack.pack_folder(folder, tmp_path / "out", hold_out=hold_out)
    assert not listed(tmp_path / "out") if (tmp_path / "out").exists() else True


def test_an_image_that_crashes_its_decoder_is_named_by_validate(crashing, tmp_path, monkeypatch):
    monkeypatch.setattr(pillow_decode, "_check_header", lambda *_, **__: None)
    monkeypatch.setattr(validate, "_AT_ONCE", 8)
    images = {f"0/{i}.jpg": encoded("JPEG") for i in range(30)}
    folder = folder_of(tmp_path / "in", images | {"0/21.jpg": crashing})
    with pytest.raises(ValueError, match=r"0/21\.jpg.*: expected an image, found one that ends the process"):
        validate.validate([folder], None, lambda *_: None, 2)


def _ends(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_worker_that_dies_is_an_error_with_the_arguments_of_its_call():
    done = []
    with pytest.raises(WorkerDiedError, match="a worker process ended unexpectedly") as raised:
        done.extend(in_order(_ends, ((i,) for i in range(1000)), 2))
    assert raised.value.arguments == (5,)
    assert done == list(range(len(done)))


def test_a_pipe_and_an_endless_file_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(20 << 30)
    for name in ("pipe.jpg", "zero.jpg", "sparse.jpg"):
        with pytest.raises(DecodeError, match=f"{name} cannot be decoded: .*(regular file|at most)"):
            open_image(tmp_path / name)
