"""Packing of images into datasets: classes, pixels, and files that are stored unchanged."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.formats import recordio
from data_pipeline.formats.int64_labels import read_labels
from data_pipeline.formats.pair_file import read_pairs
from data_pipeline.formats.tar_index import index_shard
from data_pipeline.indexed.catalog import open_catalog
from data_pipeline.tools.pack import PackOptions, PackSummary, pack_folder, pack_list


@pytest.fixture
def people(tmp_path):
    """A folder of three identities, in natural order a, s2, s10, with images of several formats and sizes."""
    folder = tmp_path / "people"
    for name, files in {
        "s10": {"1.pgm": ("L", (92, 112), 40)},
        "s2": {"1.png": ("RGB", (200, 100), (10, 200, 30)), "10.png": ("RGB", (64, 64), (0, 0, 255))},
        "a": {"x.jpg": ("RGB", (64, 64), (250, 0, 0)), "y.png": ("P", (64, 64), 3)},
    }.items():
        (folder / name).mkdir(parents=True)
        for file, (mode, size, colour) in files.items():
            Image.new(mode, size, colour).save(folder / name / file)
    (folder / ".cache").mkdir()
    (folder / "a" / ".DS_Store").write_bytes(b"x")
    (folder / "notes.txt").write_text("not a person")
    return folder


def decoded(catalog, record):
    return Image.open(io.BytesIO(catalog.image(record).tobytes()))


def test_sub_folders_in_natural_order_are_the_classes(people, tmp_path):
    done = pack_folder(people, tmp_path / "out", PackOptions(size=64))
    catalog = open_catalog(tmp_path / "out")
    assert catalog.label_N.tolist() == [0, 0, 1, 1, 2]
    assert (tmp_path / "out" / "identities.tsv").read_text() == (
        "class\tfolder\timages\n0\ta\t2\n1\ts2\t2\n2\ts10\t1\n"
    )
    stored_bytes = sum(len(catalog.image(i)) for i in range(5))
    assert done == PackSummary(
        tmp_path / "out", identities=3, images=5, kept_images=1, image_bytes=stored_bytes
    )


def test_images_are_colour_jpegs_of_the_size_and_keep_their_colours(people, tmp_path):
    pack_folder(people, tmp_path / "out", PackOptions(size=64))
    catalog = open_catalog(tmp_path / "out")
    for record, colour in {0: (250, 0, 0), 2: (10, 200, 30), 3: (0, 0, 255), 4: (40, 40, 40)}.items():
        image = decoded(catalog, record)
        assert (image.format, image.size, image.mode) == ("JPEG", (64, 64), "RGB")
        assert np.abs(np.asarray(image, int) - colour).max() <= 4


def test_a_jpeg_of_the_right_size_is_kept_byte_for_byte(people, tmp_path):
    original = (people / "a" / "x.jpg").read_bytes()
    pack_folder(people, tmp_path / "same", PackOptions(size=64, quality=10))
    assert open_catalog(tmp_path / "same").image(0).tobytes() == original
    assert pack_folder(people, tmp_path / "other", PackOptions(size=32)).kept_images == 0


def test_the_central_square_is_taken(tmp_path):
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste("white", (32, 0, 64, 32))
    (tmp_path / "in" / "a").mkdir(parents=True)
    wide.save(tmp_path / "in" / "a" / "wide.png")
    pack_folder(tmp_path / "in", tmp_path / "out", PackOptions(size=32))
    assert np.asarray(decoded(open_catalog(tmp_path / "out"), 0)).min() > 200


def test_a_photograph_is_turned_upright_and_16_bits_of_grey_are_kept(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    lying = Image.new("RGB", (32, 32), "black")
    lying.paste("white", (0, 0, 32, 16))  # the upper half, but EXIF turns the image upside down
    exif = Image.Exif()
    exif[0x0112] = 3
    lying.save(tmp_path / "in" / "a" / "1.jpg", exif=exif, quality=95)
    ramp_HW = np.repeat(np.linspace(0, 65535, 32).astype(np.uint16)[:, None], 32, axis=1)
    Image.fromarray(ramp_HW).save(tmp_path / "in" / "a" / "2.png")
    pack_folder(tmp_path / "in", tmp_path / "out", PackOptions(size=32))
    upright, ramp = (np.asarray(decoded(open_catalog(tmp_path / "out"), i), int) for i in (0, 1))
    assert upright[:12].max() < 60
    assert upright[20:].min() > 200
    assert np.abs(ramp[:, 16, 0] - np.linspace(0, 255, 32)).max() < 8


def test_progress_counts_every_image(people, tmp_path):
    seen = []
    pack_folder(people, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 5) for i in range(1, 6)]


def refused(folder, out, message):
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.raises(ValueError, match=message):
        pack_folder(folder, out)
    assert sorted(out.rglob("*")) == (before or [])


def test_a_file_that_cannot_be_packed_is_named_and_nothing_is_left(people, tmp_path):
    out = tmp_path / "out"
    (people / "s2" / "1.png").write_bytes(b"not an image")
    refused(people, out, r"s2/1.png: expected an image, found: .*repair it, or remove it")
    (people / "s2" / "1.png").unlink()
    (people / "s2" / "10.png").unlink()
    refused(people, out, r"s2: expected the images of one identity, found none; remove it")
    refused(
        tmp_path / "nowhere", out, r"nowhere: expected a folder with one sub-folder .*found no such folder"
    )
    (tmp_path / "flat").mkdir()
    refused(tmp_path / "flat", out, r"flat: expected a folder with one sub-folder .*found no sub-folder")


def test_an_output_folder_with_content_is_refused(people, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.rec").write_bytes(b"precious")
    refused(people, out, r"out: expected an empty folder to write into, found 1 entries \(train.rec\)")
    assert (out / "train.rec").read_bytes() == b"precious"


def test_the_last_identities_are_held_out_as_pairs(tmp_path):
    for person in range(5):
        (tmp_path / "in" / f"p{person}").mkdir(parents=True)
        for number in range(4):
            colour = (40 + 40 * person, 10 * number, 90)
            Image.new("RGB", (32, 32), colour).save(tmp_path / "in" / f"p{person}" / f"{number}.png")
    done = pack_folder(tmp_path / "in", tmp_path / "out", PackOptions(size=32), hold_out=3)
    assert (done.identities, done.images, done.pairs) == (
        2,
        8,
        36,
    )  # 3 identities x 6 genuine pairs, and as many impostor pairs
    assert open_catalog(tmp_path / "out").num_classes == 2
    pairs = read_pairs(tmp_path / "out" / "held_out.bin")
    reds = [np.asarray(Image.open(io.BytesIO(image)), int)[..., 0].mean() for image in pairs.images]
    person_2P = np.rint((np.array(reds) - 40) / 40).astype(int)
    assert set(person_2P) == {2, 3, 4}
    np.testing.assert_array_equal(person_2P[::2] == person_2P[1::2], pairs.issame_P)
    assert pairs.issame_P.tolist() == [True, False] * 18
    shown = {frozenset(pair) for pair in zip(pairs.images[::2], pairs.images[1::2], strict=True)}
    assert len(shown) == 36
    assert all(len(pair) == 2 for pair in shown)


@pytest.mark.parametrize("hold_out", [1, 3])
def test_too_few_held_out_or_left(people, tmp_path, hold_out):
    with pytest.raises(ValueError, match=rf"hold out 2 to 2 of its 3 identities, found {hold_out};"):
        pack_folder(people, tmp_path / "out", hold_out=hold_out)
    assert not (tmp_path / "out").exists()


def test_a_held_out_image_that_cannot_be_read_leaves_nothing(people, tmp_path):
    (people / "s10" / "1.pgm").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.pgm: expected an image"):
        pack_folder(people, tmp_path / "out", hold_out=2)
    assert not list((tmp_path / "out").glob("*"))


def listed(tmp_path, name, text, jpeg, count=4):
    """Write a list file beside the images 0.jpg, 1.jpg, ..."""
    for i in range(count):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    (tmp_path / name).write_text(text)
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "3.jpg\t5\n0.jpg\t0\n\n1.jpg\t5\n"),
        ("list.csv", "path,label\n3.jpg,5\n0.jpg,0\n1.jpg,5"),
        ("train.tsv", 'idx\tpath\tlabel\n0\t"3.jpg"\t5\n1\t0.jpg\t0\n2\t1.jpg\t 5\n'),
    ],
)
def test_a_list_is_packed_in_its_order_with_its_labels(tmp_path, jpeg, name, text):
    done = pack_list(listed(tmp_path, name, text, jpeg), tmp_path / "out", PackOptions(size=48))
    catalog = open_catalog(tmp_path / "out")
    assert [catalog.image(i).tobytes() for i in range(3)] == [jpeg(3), jpeg(0), jpeg(1)]
    assert (catalog.label_N.tolist(), catalog.num_classes) == ([5, 0, 5], 6)
    assert (done.images, done.identities, done.kept_images) == (3, 2, 3)
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == [
        "property",
        "train.idx",
        "train.rec",
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.tsv", "0.jpg\t0\n1.jpg 1\n", r"l\.tsv: line 2 is '1\.jpg 1', expected 'path<TAB>label'"),
        ("l.csv", "0.jpg,0\n1.jpg,1,2\n", r"l\.csv: line 2 is '1\.jpg,1,2', expected 'path,label'"),
        ("l.tsv", "0.jpg\t-1\n", r"line 1 is .* with a whole number from 0 to 922"),
        ("l.tsv", "0.jpg\t1.0\n", r"line 1 is"),
        ("l.tsv", "0.jpg\t9223372036854775808\n", r"line 1 is"),
        ("l.tsv", "\t1\n", r"line 1 is"),
        ("l.tsv", f"{'x' * 200_000}\t1\n", r"line 1 is not a table row: field larger than"),
        ("l.tsv", "", r"l\.tsv: expected lines 'path<TAB>label', found none"),
        ("l.tsv", "absent.jpg\t1\n", r"absent\.jpg: expected an image, found: .*No such file"),
    ],
)
def test_a_list_that_is_none_is_named_and_leaves_nothing(tmp_path, jpeg, name, text, message):
    with pytest.raises(ValueError, match=message):
        pack_list(listed(tmp_path, name, text, jpeg), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_that_float32_cannot_hold_go_into_a_sidecar(tmp_path, jpeg):
    labels = [(1 << 24) + 1, 3, (1 << 62) + 1, 1 << 24]
    text = "".join(f"{i}.jpg\t{label}\n" for i, label in enumerate(labels))
    pack_list(listed(tmp_path, "l.tsv", text, jpeg), tmp_path / "out", PackOptions(size=48))
    keys, found = read_labels(tmp_path / "out" / "train.rec")
    assert (keys.tolist(), found.tolist()) == (list(range(len(labels))), labels)
    data = (tmp_path / "out" / "train.rec").read_bytes()
    _, offset_N = recordio.read_index(tmp_path / "out" / "train.idx")
    spans = zip(offset_N, [*offset_N[1:], len(data)], strict=True)
    stored = [recordio.unpack(recordio.join_frames(data[a:b], ""), "").labels[0] for a, b in spans]
    np.testing.assert_array_equal(stored, [np.nan, 3, np.nan, 1 << 24])


def test_shards_hold_the_same_images_and_labels_as_records(people, tmp_path):
    pack_folder(people, tmp_path / "rec", PackOptions(size=64), hold_out=2)
    done = pack_folder(people, tmp_path / "tar", PackOptions("tar", 64, shard_samples=1), hold_out=2)
    catalog = open_catalog(tmp_path / "rec")
    shards = sorted((tmp_path / "tar").glob("*.tar"))
    assert len(shards) == done.images == 2
    for i, path in enumerate(shards):
        offset, length, label = (int(array[0]) for array in index_shard(path))
        assert path.read_bytes()[offset : offset + length] == catalog.image(i).tobytes()
        assert label == catalog.label_N[i]
    for name in ("identities.tsv", "held_out.bin"):
        assert (tmp_path / "tar" / name).read_bytes() == (tmp_path / "rec" / name).read_bytes()


def test_many_images_keep_their_order_over_all_processes(tmp_path):
    for i in range(75):
        (tmp_path / "in" / f"{i // 5}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (3 * i, 0, 0)).save(tmp_path / "in" / f"{i // 5}" / f"{i}.png")
    pack_folder(tmp_path / "in", tmp_path / "out", PackOptions(size=32))
    catalog = open_catalog(tmp_path / "out")
    reds = [np.asarray(decoded(catalog, i), int)[..., 0].mean() for i in range(75)]
    assert np.abs(np.array(reds) - 3 * np.arange(75)).max() < 1.5
    assert catalog.label_N.tolist() == [i // 5 for i in range(75)]
