"""Our RecordIO and MXNet's: each reads the files of the other, and both write the same bytes."""

import io
import json
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.formats import recordio
from data_pipeline.formats.recordio_writer import InsightFaceWriter
from data_pipeline.formats.tar_writer import ShardWriter
from data_pipeline.tools.convert import convert

MAGIC = recordio.MAGIC_BYTES


def jpeg(seed, size=(48, 64)):
    """Return a smooth colour image whose three channels differ."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


def images():
    """Yield payloads for the edge cases of the format: empty, unaligned, and with the frame magic."""
    yield from (b"", b"x", b"four", b"not a multiple of four", jpeg(0), jpeg(1))
    yield from (MAGIC, MAGIC * 2, MAGIC * 5, MAGIC[:3], MAGIC[1:] + MAGIC)
    yield from (MAGIC + b"tail", b"head" + MAGIC, b"head" + MAGIC + b"tail", b"head" + MAGIC * 3 + b"t")
    for shift in (1, 2, 3):
        yield b"?" * shift + MAGIC + b"between"
        yield b"?" * shift + MAGIC * 2 + MAGIC[:shift] + MAGIC
    dice = random.Random(5)
    for _ in range(200):
        yield b"".join(dice.choice((MAGIC, b"", b"z", b"\0\0", b"1234")) for _ in range(dice.randrange(12)))
    yield dice.randbytes(1 << 20) + MAGIC + dice.randbytes(1 << 20)


def labels_of(i):
    """Return scalars and arrays in turn, also the magic as a float label and the largest exact float32."""
    magic = np.frombuffer(MAGIC, "<f4").item()
    return (float(i), (float(i), 1.0), 0.1, (magic,), float(1 << 24), (magic, -1.5, magic, 3.0), magic)[i % 7]


RECORDS = [(key, labels_of(i), image) for i, image in enumerate(images()) for key in (3 * i + 1,)]


def as_float32(labels):
    return np.atleast_1d(labels).astype(np.float32).tolist()


def run(python, command, folder):
    script = Path(__file__).with_name("mxnet_oracle.py")
    done = subprocess.run([python, script, command, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def theirs(mxnet_python, tmp_path_factory):
    """The folder that MXNet writes."""
    folder = tmp_path_factory.mktemp("theirs")
    described = [{"key": k, "labels": labels, "image": image.hex()} for k, labels, image in RECORDS]
    (folder / "records.json").write_text(json.dumps(described))
    run(mxnet_python, "write", folder)
    return folder


@pytest.fixture(scope="module")
def ours(mxnet_python, tmp_path_factory):
    """The folder that we write, with MXNet's reading of it."""
    folder = tmp_path_factory.mktemp("ours")
    with recordio.RecordWriter(folder / "train.rec") as writer:
        for key, labels, image in RECORDS:
            writer.write(key, recordio.pack(labels, key, image))
    run(mxnet_python, "read", folder)
    return folder


def test_we_read_mxnet_s_files(theirs):
    key_N, offset_N = recordio.read_index(theirs / "train.idx")
    assert key_N.tolist() == [key for key, *_ in RECORDS]
    data = (theirs / "train.rec").read_bytes()
    for (key, labels, image), start, end in zip(RECORDS, offset_N, [*offset_N[1:], len(data)], strict=True):
        record = recordio.unpack(recordio.join_frames(data[start:end], "train.rec", start), "train.rec")
        assert (record.key, record.image, record.is_meta) == (key, image, not image)
        np.testing.assert_array_equal(record.labels, as_float32(labels))


@pytest.mark.parametrize("way", ["by_key", "in_sequence"])
def test_mxnet_reads_our_files(ours, way):
    seen = json.loads((ours / "seen.json").read_text())[way]
    for record, (key, labels, image) in zip(seen, RECORDS, strict=True):
        assert record == {
            "key": key if way == "by_key" else None,
            "flag": len(labels) if isinstance(labels, tuple) else 0,
            "labels": as_float32(labels),
            "id": key,
            "id2": 0,
            "image": image.hex(),
        }


@pytest.mark.parametrize("name", ["train.rec", "train.idx"])
def test_both_write_the_same_bytes(ours, theirs, name):
    assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_the_records_do_test_the_splitting():
    frames = [list(recordio.walk_frames(recordio.frame(image), "")) for *_, image in RECORDS]
    assert sum(len(parts) > 1 for parts in frames) > 50
    assert max(map(len, frames)) > 5


def test_mxnet_decodes_our_jpegs_to_the_same_pixels(ours):
    jpegs = {str(key): image for key, _, image in RECORDS if image.startswith(b"\xff\xd8")}
    with np.load(ours / "pixels.npz") as pixels:
        assert sorted(pixels) == sorted(jpegs)
        for key, image in jpegs.items():
            expected_HWC = np.asarray(Image.open(io.BytesIO(image)), int)
            # Two JPEG libraries may round differently.
            assert np.abs(pixels[key] - expected_HWC).max() <= 3


def test_insightface_s_index_records_lead_mxnet_to_every_image(mxnet_python, tmp_path):
    images_by_class = [[jpeg(10), jpeg(11), b"head" + MAGIC], [jpeg(12)], [MAGIC * 2, jpeg(13)]]
    with InsightFaceWriter(tmp_path, size=64) as writer:
        for identity, its_images in enumerate(images_by_class):
            for image in its_images:
                writer.add(image, (float(identity), 1.0))
    run(mxnet_python, "read", tmp_path)
    seen = json.loads((tmp_path / "seen.json").read_text())
    record_at = {record["key"]: record for record in seen["by_key"]}
    # As InsightFace's reader: key 0 has the keys of the identities, and each identity the keys of its images.
    first, last = map(int, record_at[0]["labels"])
    assert (record_at[0]["flag"], last - first) == (2, 3)
    for identity, key in enumerate(range(first, last)):
        keys = range(*map(int, record_at[key]["labels"]))
        found = [bytes.fromhex(record_at[k]["image"]) for k in keys]
        assert found == images_by_class[identity]
        assert {record_at[k]["labels"][0] for k in keys} == {identity}
    assert [record["id"] for record in seen["in_sequence"]] == [*range(1, 7), 0, *range(7, 10)]


def test_mxnet_reads_records_converted_from_shards(mxnet_python, tmp_path):
    samples = [(image, 7 * i % 5) for i, image in enumerate([jpeg(20), *filter(None, images())])]
    samples += [(jpeg(21), 1 << 24), (jpeg(22), (1 << 24) + 1)]
    with ShardWriter(tmp_path / "shards", samples=50) as writer:
        for image, label in samples:
            writer.add(image, label)
    convert(tmp_path / "shards", tmp_path / "records")
    run(mxnet_python, "read", tmp_path / "records")
    seen = json.loads((tmp_path / "records" / "seen.json").read_text())["by_key"]
    assert [(bytes.fromhex(record["image"]), record["key"], record["flag"]) for record in seen] == [
        (image, key, 0) for key, (image, _) in enumerate(samples)
    ]
    # The last label is not exact in float32, so it is in the sidecar.
    np.testing.assert_array_equal([record["labels"] for record in seen[:-1]], [[n] for _, n in samples[:-1]])
    assert np.isnan(seen[-1]["labels"]).all()
