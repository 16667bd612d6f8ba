"""Faces are embedded in their order by any number of ranks, as one loop over them would."""

import errno
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from data_pipeline.common.pillow_decode import DecodeError
from tests.ranks import run_ranks
from trainer.evaluation.protocol import Face
from trainer.inference import embedder as embedding
from trainer.inference.alignment import TEMPLATE_52, aligned
from trainer.inference.embedder import Embedder, Interrupted
from trainer.runtime.ranks import Placement, Ranks

SIZE, WORLD = 32, 2
COUNTS = (1, 2, 7, 29)


def image_bytes(i, mode="RGB", kind="PNG", size=40):
    """Return a smooth encoded image, different for every number."""
    coarse = np.random.default_rng(i).integers(0, 256, (5, 5, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(coarse).resize((size, size)).convert(mode).save(encoded, kind)
    return encoded.getvalue()


def write_faces(folder, count):
    """Of all kinds: files and bytes, with points and without, grey and with a palette."""
    kinds = [("RGB", "PNG"), ("L", "BMP"), ("RGB", "JPEG"), ("P", "PNG")]
    faces = []
    for i in range(count):
        encoded = image_bytes(i, *kinds[i % len(kinds)])
        path = folder / f"{i}.{kinds[i % len(kinds)][1].lower()}"
        landmark_52 = TEMPLATE_52 * 0.3 + i / 9 if i % 2 else None
        if i % 3:
            path.write_bytes(encoded)
        faces.append(Face(path, landmark_52, None if i % 3 else encoded))
    return faces


def network(images_BCHW):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 3 * SIZE * SIZE, generator=generator)
    return images_BCHW.flatten(1) @ weight.T


def plain(faces):
    """One face after the other."""
    rows = []
    for face in faces:
        image = Image.open(face.path if face.encoded is None else io.BytesIO(face.encoded)).convert("RGB")
        if face.landmark_52 is None:
            image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        else:
            image = aligned(image, face.landmark_52, SIZE, "")
        pixels = (np.asarray(image, np.float32) - 127.5) / 127.5
        both = np.stack([pixels, pixels[:, ::-1]]).transpose(0, 3, 1, 2)
        rows.append(network(torch.from_numpy(both.copy())).sum(0).numpy())
    return np.stack(rows)


def embedder(rank, network, **more):
    place = Placement(rank, WORLD, rank, WORLD, "", 0)
    ranks = Ranks(place, dist.group.WORLD, torch.device("cpu"), None)
    return Embedder(network, SIZE, more.pop("batch_size", 4), ranks, **more)


def watched(rank, faces):
    """Return embeddings, the number of calls of the network, and the last progress report."""
    calls, told = [], []

    def counting(images_BCHW):
        calls.append(len(images_BCHW))
        return network(images_BCHW)

    working = embedder(rank, counting, batch_size=1, progress=lambda *progress: told.append(progress))
    return working.embed(faces), len(calls), told[-1]


def on_a_rank(rank, faces):
    """All cases, in one set of processes."""
    found = {count: watched(rank, faces[:count]) for count in COUNTS}
    embedding._MOST_IN_MEMORY = 0
    of_file = embedder(rank, network).embed(faces)
    found["memory map"] = isinstance(of_file, np.memmap), None if of_file is None else np.array(of_file)
    try:
        embedder(rank, network, signal=lambda: 15 if rank == 1 else 0).embed(faces)
    except Interrupted as interrupted:
        found["interrupted by"] = interrupted.number
    return found


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return write_faces(tmp_path_factory.mktemp("faces"), COUNTS[-1])


@pytest.fixture(scope="module")
def found(faces):
    return run_ranks(on_a_rank, WORLD, faces)


@pytest.mark.parametrize("count", COUNTS)
def test_ranks_embed_what_one_loop_does_in_its_order(count, found, faces):
    embedded, calls, told = zip(*(of_rank[count] for of_rank in found), strict=True)
    np.testing.assert_allclose(embedded[0], plain(faces[:count]), rtol=1e-4, atol=1e-3)
    assert embedded[1:] == (None,) * (WORLD - 1)
    # ZeRO's stage 3 needs all ranks in every forward pass: two for each batch of one.
    assert set(calls) == {2 * -(-count // WORLD)}
    assert set(told) == {(count, count)}


def test_many_embeddings_are_kept_in_a_file(found, faces):
    is_map, emb_ND = found[0]["memory map"]
    assert is_map
    np.testing.assert_allclose(emb_ND, plain(faces), rtol=1e-4, atol=1e-3)


def test_a_disk_too_small_for_the_embeddings_is_told_before_they_are_written(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(embedding.os, "posix_fallocate", full)
    with pytest.raises(
        OSError, match=r"expected 2\.0 GB of free space for embeddings, found less \(No space left"
    ):
        embedding._array(1_000_000, 512)


def test_a_signal_to_one_rank_interrupts_all(found):
    assert [of_rank["interrupted by"] for of_rank in found] == [15] * WORLD


@pytest.mark.parametrize(
    ("face", "complaint"),
    [
        (Face("absent.jpg", None), "absent.jpg cannot be decoded: No such file"),
        (Face("x/lfw.bin/image 3", None, b"\xff\xd8 broken"), "x/lfw.bin/image 3 cannot be decoded"),
        (Face("flat.png", np.zeros((5, 2)), image_bytes(0)), "flat.png: "),
    ],
)
def test_a_face_that_cannot_be_had_is_named(face, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    face = face._replace(path=Path(face.path))
    with pytest.raises((DecodeError, ValueError), match=complaint):
        embedder(0, network)._pixels(face)
