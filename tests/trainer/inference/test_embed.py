"""Embedding files of folders of images: a row for every file, in order, with the network's own outputs."""

import os
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data_pipeline import augment
from data_pipeline.common.pillow_decode import DecodeError
from data_pipeline.config import AugmentConfig
from data_pipeline.decode import Decoder
from tests.trainer.networks import STEP, embedded, small_network
from trainer.__main__ import app
from trainer.inference import embed, embedding_file
from trainer.inference.network import write_pt

SIZE = 32
ORDER = [
    "a/s2.png",
    "a/s10.jpg",
    "b/broken.jpg",
    "b/deeper/grey.png",
    "b/deeper/large.png",
    "b/notes.txt",
    "c.png",
]
BAD = {"b/broken.jpg", "b/notes.txt"}


def write_image(path, size=(SIZE, SIZE), mode="RGB", seed=0, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path, **how)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_image(folder / "a/s10.jpg", seed=1)
    write_image(folder / "a/s2.png", seed=2)
    write_image(folder / "b/deeper/grey.png", seed=3, mode="L")
    write_image(folder / "b/deeper/large.png", seed=4, size=(90, 70))
    write_image(folder / "c.png", seed=5)
    write_image(folder / ".hidden.png", seed=6)
    whole = (folder / "a/s10.jpg").read_bytes()
    (folder / "b/broken.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "b/notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def network():
    return small_network(image_size=SIZE)


def embed_into(out, network, paths, *, batch_size=3, flip=False):
    seen = []
    done = embed.embed(
        network,
        paths,
        out,
        batch_size=batch_size,
        flip=flip,
        facts={"checkpoint": "runs/x"},
        report=lambda *counts: seen.append(counts),
    )
    assert seen[-1] == (done.files, done.files)
    return done


def read(out):
    if out.suffix == ".npz":
        return dict(np.load(out))
    table = pyarrow.parquet.read_table(out)
    facts = {name.decode(): np.array(text.decode()) for name, text in table.schema.metadata.items()}
    return {name: np.array(table[name].to_pylist()) for name in table.column_names} | facts


def one_by_one(network, path, flip):
    """Return the embedding of one image, computed directly."""
    image = Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    image_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    emb_BD = embedded(network, torch.stack([image_CHW, image_CHW.flip(2)]))
    return emb_BD.mean(0).numpy() if flip else emb_BD[0].numpy()


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
@pytest.mark.parametrize("flip", [False, True])
def test_every_file_has_its_row(folder, network, tmp_path, suffix, flip):
    out = tmp_path / f"faces{suffix}"
    done = embed_into(out, network, [folder], flip=flip)
    found = read(out)
    assert found["path"].tolist() == [str(folder / name) for name in ORDER]
    assert done.files == len(ORDER)
    assert {path for path, _ in done.bad} == {str(folder / name) for name in BAD}
    for row, name in enumerate(ORDER):
        numbers = [found[key][row] for key in ("embedding", "quality", "branch_norm", "branch_weight")]
        if name in BAD:
            assert all(np.isnan(values).all() for values in numbers)
            assert found["error"][row] == dict(done.bad)[str(folder / name)] != ""
            continue
        expected_D = one_by_one(network, folder / name, flip)
        np.testing.assert_allclose(found["embedding"][row], expected_D, atol=1e-4)
        assert found["quality"][row] == pytest.approx(np.linalg.norm(expected_D), rel=1e-4)
        assert found["branch_weight"][row].sum() == pytest.approx(1)
        assert found["error"][row] == ""
    assert found["embedding"].dtype == np.float32 or suffix == ".parquet"
    assert (str(found["checkpoint"]), str(found["step"])) == ("runs/x", str(STEP))
    assert (str(found["image_size"]), str(found["flip"])) == (str(SIZE), str(flip).lower())
    assert os.listdir(tmp_path) == [out.name]


def test_branches_are_what_lgf_says(folder, network, tmp_path):
    embed_into(tmp_path / "faces.npz", network, [folder / "c.png"])
    found = read(tmp_path / "faces.npz")
    image = np.asarray(Image.open(folder / "c.png"))
    with torch.no_grad():
        fusion = network.model.fuse((torch.tensor(image).permute(2, 0, 1)[None] - 127.5) / 127.5)
    for name in ("norm", "quality", "weight"):
        expected = getattr(fusion, f"{name}_BK").numpy()
        np.testing.assert_allclose(found[f"branch_{name}"], expected, rtol=1e-5)


def test_batches_do_not_matter(folder, network, tmp_path):
    embed_into(tmp_path / "one.npz", network, [folder], batch_size=1)
    embed_into(tmp_path / "all.npz", network, [folder], batch_size=64)
    one, all_ = read(tmp_path / "one.npz"), read(tmp_path / "all.npz")
    assert one.keys() == all_.keys()
    assert one["path"].tolist() == all_["path"].tolist()
    np.testing.assert_allclose(one["embedding"], all_["embedding"], atol=1e-4)


def test_a_network_without_branches_has_no_such_columns(folder, tmp_path):
    embed_into(tmp_path / "faces.parquet", small_network("iresnet"), [folder / "a"])
    names = pyarrow.parquet.read_schema(tmp_path / "faces.parquet").names
    assert names == ["path", "embedding", "quality", "error"]


def test_parquet_is_written_in_groups_as_it_comes(folder, network, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_file, "_GROUP_ROWS", 4)
    out = tmp_path / "faces.parquet"
    embed_into(out, network, [folder], batch_size=2)
    file = pyarrow.parquet.ParquetFile(out)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4, 3]
    assert str(file.schema_arrow.field("embedding").type) == "fixed_size_list<element: float>[16]"


def test_a_first_batch_without_images(folder, network, tmp_path):
    out = tmp_path / "faces.parquet"
    done = embed_into(out, network, [folder / "b/broken.jpg", folder / "c.png"], batch_size=1)
    assert np.isnan(read(out)["quality"]).tolist() == [True, False]
    assert len(done.bad) == 1


def test_no_image_at_all_is_an_error(folder, network, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"found 1 files of which none could be read as an image; .*: .*notes\.txt: expected a JPEG",
    ):
        embed_into(tmp_path / "faces.npz", network, [folder / "b/notes.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found 0 files"):
        embed_into(tmp_path / "faces.npz", network, [tmp_path / "empty"])
    assert os.listdir(tmp_path) == ["empty"]


def test_a_path_that_is_not_there_is_named(folder, network, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: expected an image or a folder"):
        embed_into(tmp_path / "faces.npz", network, [folder, tmp_path / "nowhere"])


def test_links_and_odd_names(folder, network, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "dangling.png").symlink_to(tmp_path / "nowhere")
    os.symlink(folder / "c.png", os.fsencode(images) + b"/odd \xff.png")
    out = tmp_path / "faces.parquet"
    done = embed_into(out, network, [images])
    assert read(out)["path"].tolist() == [f"{images}/dangling.png", f"{images}/odd \\udcff.png"]
    assert done.bad == [(f"{images}/dangling.png", "No such file or directory")]


def test_images_are_read_as_in_training(tmp_path):
    path = tmp_path / "lying.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    write_image(path, size=(100, 80), quality=95, exif=exif)
    images_BCHW = next(
        Decoder(
            lambda i: ([np.frombuffer(path.read_bytes(), np.uint8)], augment.none(1)),
            lambda i, row: "",
            batch_size=1,
            image_size=SIZE,
            threads=1,
            prefetch_batches=1,
            device_id=None,
            changes=AugmentConfig(),
        )
    )
    expected = (images_BCHW[0] * 127.5 + 127.5).permute(1, 2, 0).numpy()
    assert (
        np.abs(embed.read_image(path, SIZE) - expected).max() <= 3
    )  # of 255: other decoders, other rounding
    write_image(path, size=(8, 200))
    with pytest.raises(DecodeError, match=r"lying\.jpg cannot be decoded: 8x200 pixels, expected 16 to 4096"):
        embed.read_image(path, SIZE)


def test_unknown_suffixes_and_missing_packages(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"ends in \.npz or \.parquet, found '\.csv'"):
        embedding_file.opener(tmp_path / "faces.csv")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"package pyarrow, .* pip install -e '\.\[parquet\]'"):
        embedding_file.opener(tmp_path / "faces.parquet")


def test_the_command_goes_on_and_says_what_is_bad(folder, network, tmp_path):
    write_pt(network, tmp_path / "n.pt")
    out = tmp_path / "faces.npz"
    done = CliRunner().invoke(
        app, ["embed", str(folder), "--checkpoint", str(tmp_path / "n.pt"), "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert f"lgaf: {folder}/b/notes.txt: expected a JPEG, PNG, WebP or BMP image" in done.stderr
    assert f"lgaf: 2 of 7 files could not be read as images; {out} lists all of them" in done.stderr
    assert done.stdout == f"{out}: 5 images\n"
    assert str(read(out)["checkpoint"]) == str(tmp_path / "n.pt")
