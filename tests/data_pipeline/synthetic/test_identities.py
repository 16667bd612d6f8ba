"""Synthetic sets: pure functions of (seed, identity, number), written completely or not at all."""

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.common.atomic_write import locked
from data_pipeline.formats import recordio
from data_pipeline.formats.pair_file import read_pairs
from data_pipeline.indexed.catalog import open_catalog, read_property
from data_pipeline.synthetic.dataset import (
    PAIRS_FILE,
    PAIRS_NUISANCES,
    RENDERER_VERSION,
    TRAIN_NUISANCES,
    read_nuisances,
    rendered_images,
    write_set,
)
from data_pipeline.synthetic.face import OCCLUSIONS, Face, Nuisances, ranges
from data_pipeline.synthetic.identities import (
    HELD_OUT,
    SynthConfig,
    faces_of,
    nuisances_of,
    pairs_of,
    render_images,
)

# More images than a process renders per message, and identities that messages split.
SMALL = SynthConfig(
    seed=7, identities=5, images_per_identity=9, held_out_identities=3, pairs=10, image_size=48, processes=2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "small"
    assert write_set(folder, SMALL)
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_draws_have_not_changed():
    """A change of these numbers, or of the rendering, requires a new RENDERER_VERSION."""
    assert RENDERER_VERSION == 1
    assert faces_of(7, np.array([3]))[0][:3] == pytest.approx((0.242444, 0.999947, 0.119909), rel=1e-4)
    nuisances = nuisances_of(7, np.array([3]), np.array([11]), 1.0)[0]
    assert nuisances[:3] == pytest.approx((18.8188, -1.25478, 4.13804), rel=1e-4)
    assert (nuisances.occlusion, nuisances.scene) == ("none", 2746320856)
    assert (pairs_of(SMALL).identity_2P - HELD_OUT).tolist()[:8] == [0, 0, 2, 1, 0, 0, 2, 0]


def test_an_image_does_not_depend_on_the_other_requested_images():
    identity_N, number_N = np.array([4, 0, HELD_OUT + 2, 4]), np.array([8, 1, 3, 7])
    together = render_images(SMALL, identity_N, number_N)
    for i in range(4):
        assert render_images(SMALL, identity_N[i : i + 1], number_N[i : i + 1]) == together[i : i + 1]
    larger = SMALL.model_copy(update={"identities": 900, "pairs": 77, "held_out_identities": 8})
    assert render_images(larger, identity_N, number_N) == together
    other = render_images(SMALL.model_copy(update={"seed": 8}), identity_N, number_N)
    assert all(a.jpeg != b.jpeg for a, b in zip(together, other, strict=True))
    assert len({image.jpeg for image in together}) == 4


def test_a_fixed_jpeg_quality_is_that_of_every_image():
    config = SMALL.model_copy(update={"jpeg_quality": 95})
    for image in render_images(config, np.arange(6), np.arange(6)):
        again = io.BytesIO()
        Image.new("RGB", (8, 8)).save(again, "JPEG", quality=95)
        tables = [Image.open(io.BytesIO(jpeg)).quantization for jpeg in (image.jpeg, again.getvalue())]
        assert tables[0] == tables[1]
        assert image.nuisances.jpeg_quality == 95


def test_people_fill_the_ranges_evenly():
    value_NF = np.array(faces_of(1, np.arange(2000)))
    low_F, high_F = np.array(list(ranges(Face).values())).T
    part_NF = (value_NF - low_F) / (high_F - low_F)
    assert part_NF.min() >= 0
    assert part_NF.max() < 1
    assert np.abs(part_NF.mean(axis=0) - 0.5).max() < 0.03
    assert np.abs(np.corrcoef(part_NF.T) - np.eye(len(low_F))).max() < 0.1


def test_difficulty_leads_from_a_portrait_to_the_full_ranges():
    one_N, number_N = np.ones(2000, int), np.arange(2000)
    neutral_F, low_F, high_F = np.array(list(ranges(Nuisances).values())).T
    for difficulty in (0.0, 0.5, 1.0):
        drawn = nuisances_of(3, one_N, number_N, difficulty)
        value_NF = np.array([n[: len(low_F)] for n in drawn])
        for ends_F, found_F in ((low_F, value_NF.min(axis=0)), (high_F, value_NF.max(axis=0))):
            expected_F = neutral_F + difficulty * (ends_F - neutral_F)
            assert np.abs(found_F - expected_F).max() <= 0.01 * difficulty * (high_F - low_F).max()
        share = np.mean([n.occlusion != "none" for n in drawn])
        assert share == pytest.approx(0.35 * difficulty, abs=0.03)
    assert {n.occlusion for n in drawn} == set(OCCLUSIONS)
    assert len({n.scene for n in drawn}) == 2000


def test_half_of_the_pairs_are_genuine_and_no_image_occurs_twice():
    config = SMALL.model_copy(update={"pairs": 3000, "held_out_identities": 7})
    pairs = pairs_of(config)
    left_P, right_P = pairs.identity_2P[::2], pairs.identity_2P[1::2]
    assert np.array_equal(left_P == right_P, pairs.issame_P)
    assert pairs.issame_P.mean() == 0.5
    assert len(set(zip(pairs.identity_2P.tolist(), pairs.number_2P.tolist(), strict=True))) == 6000
    for same in (True, False):
        for side_P in (left_P, right_P):
            count_I = np.bincount(side_P[pairs.issame_P == same] - HELD_OUT, minlength=7)
            assert len(count_I) == 7
            assert count_I.min() > 150
    fewer = pairs_of(SMALL.model_copy(update={"pairs": 100, "held_out_identities": 7}))
    assert np.array_equal(fewer.identity_2P, pairs.identity_2P[:200])


def test_the_folder_is_an_insightface_dataset(folder):
    catalog = open_catalog(folder)
    assert (len(catalog), catalog.num_classes) == (45, 5)
    assert catalog.label_N.tolist() == [i // 9 for i in range(45)]
    assert read_property(folder) == (5, 48, 48)
    for i in (0, 44):
        image = Image.open(io.BytesIO(catalog.image(i).tobytes()))
        assert (image.format, image.size, image.mode) == ("JPEG", (48, 48), "RGB")


def test_labels_of_both_kinds_and_the_index_records_are_in_one_file(folder):
    data = (folder / "train.rec").read_bytes()
    key_N, offset_N = recordio.read_index(folder / "train.idx")
    records = {
        int(key): recordio.unpack(recordio.join_frames(data[start:end], ""), "")
        for key, start, end in zip(key_N, offset_N, [*offset_N[1:], len(data)], strict=True)
    }
    assert records[0].labels == (46, 51)
    assert records[47].labels == (10, 19)
    labels = [records[key].labels for key in range(1, 46)]
    assert {len(label) for label in labels} == {1, 2}
    assert all(label[1:] in ((), (1.0,)) for label in labels)


def test_every_record_is_the_image_of_its_row(folder):
    catalog, rows = open_catalog(folder), read_nuisances(folder / TRAIN_NUISANCES)
    assert rows["key"].tolist() == catalog.key_N.tolist()
    assert rows["identity"].tolist() == catalog.label_N.tolist()
    for record in (0, 8, 9, 31, 32, 44):
        row = rows[record]
        image = render_images(SMALL, np.array([row["identity"]]), np.array([row["number"]]))[0]
        assert image.jpeg == catalog.image(record).tobytes()
        assert_is_the_row(image.nuisances, row)


def test_every_image_of_the_pairs_is_that_of_its_row(folder):
    pairs, rows = read_pairs(folder / PAIRS_FILE), read_nuisances(folder / PAIRS_NUISANCES)
    assert pairs.issame_P.tolist() == [True, False] * 5
    assert rows["key"].tolist() == list(range(20))
    assert np.array_equal(rows["identity"][::2] == rows["identity"][1::2], pairs.issame_P)
    assert rows["identity"].min() >= HELD_OUT
    again = render_images(SMALL, rows["identity"], rows["number"])
    assert [image.jpeg for image in again] == pairs.images
    for image, row in zip(again, rows, strict=True):
        assert_is_the_row(image.nuisances, row)


def assert_is_the_row(nuisances, row):
    for name, value in nuisances._asdict().items():
        assert row[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)


def test_a_table_of_something_else_is_refused(tmp_path):
    (tmp_path / "t.tsv").write_text("key\tname\n1\tx\n")
    with pytest.raises(
        ValueError, match=r"t.tsv: expected the columns key identity .*found \['key', 'name'\]"
    ):
        read_nuisances(tmp_path / "t.tsv")


def test_the_number_of_processes_changes_nothing(folder, tmp_path):
    assert write_set(tmp_path / "alone", SMALL.model_copy(update={"processes": 1}))
    assert files_of(tmp_path / "alone") == files_of(folder)


def test_the_same_set_is_not_written_again(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert not write_set(folder, SMALL.model_copy(update={"processes": 3}))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_another_set_is_refused_with_the_keys_that_differ(folder):
    before = files_of(folder)
    message = r"found a set with seed = 7, requested 8; pairs = 10, requested 11; choose another folder"
    with pytest.raises(ValueError, match=message):
        write_set(folder, SMALL.model_copy(update={"seed": 8, "pairs": 11}))
    assert files_of(folder) == before


def test_other_content_is_refused_and_stays(tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(ValueError, match=rf"{tmp_path}: expected a new or empty folder.*letters.txt.*remove"):
        write_set(tmp_path, SMALL)
    assert files_of(tmp_path) == {"letters.txt": b"dear"}
    with pytest.raises(ValueError, match=r"found other content \(letters.txt\)"):
        write_set(tmp_path / "letters.txt", SMALL)


def test_a_damaged_set_is_noticed(folder, tmp_path):
    for name, content in files_of(folder).items():
        (tmp_path / name).write_bytes(content)
    with open(tmp_path / "train.rec", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"train.rec: expected \d+ bytes, found \d+; choose"):
        write_set(tmp_path, SMALL)
    (tmp_path / "train.rec").unlink()
    with pytest.raises(ValueError, match=r"train.rec: expected \d+ bytes, found no such file"):
        write_set(tmp_path, SMALL)


def test_an_interrupted_set_leaves_nothing(tmp_path):
    def interrupt(done, total):
        if done > 40:
            raise KeyboardInterrupt

    (tmp_path / "set").mkdir()
    with pytest.raises(KeyboardInterrupt):
        write_set(tmp_path / "set", SMALL, interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert files_of(tmp_path / "set") == {}
    assert write_set(tmp_path / "set", SMALL)


PROGRAM = """
import sys
from pathlib import Path
from data_pipeline.synthetic.identities import SynthConfig
from data_pipeline.synthetic.dataset import write_set

config = SynthConfig(identities=100_000, processes=2)
write_set(Path(sys.argv[1]), config, lambda done, total: print(done, flush=True))
"""


def test_rendering_processes_end_with_a_killed_parent_and_no_final_name_appears(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tmp_path / "set"], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout.readline() == "32\n"
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        assert len(children) == 2
        parent.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/exe").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in children)
    [left] = tmp_path.iterdir()
    assert re.fullmatch(r"\.set\.[0-9a-f]{16}\.part", left.name)
    # The children hold the lock of the folder for a moment after their memory is gone.
    while not (tmp_path / "set").exists() and time.monotonic() < deadline:
        with contextlib.suppress(ValueError):
            write_set(tmp_path / "set", SMALL)
    assert os.listdir(tmp_path) == ["set"]


def test_two_at_once_do_not_mix(tmp_path):
    with (
        locked(tmp_path / ".set.0123456789abcdef.part"),
        pytest.raises(ValueError, match=r"set: another process is writing it \(\.set\..*\.part\); wait"),
    ):
        write_set(tmp_path / "set", SMALL)
    assert (tmp_path / ".set.0123456789abcdef.part").is_dir()


def test_progress_counts_every_image(tmp_path):
    seen = []
    write_set(tmp_path / "set", SMALL, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (65, 65)
    assert seen == sorted(seen)


def test_images_are_rendered_on_demand():
    huge = SMALL.model_copy(update={"identities": 100_000, "images_per_identity": 150})
    images = rendered_images(huge, lambda done, total: None)
    first = list(islice(images, 40))
    images.close()
    assert [(p.identity, p.number) for p in first] == [(0, number) for number in range(40)]


def test_a_set_beyond_float32_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"counts exactly up to 16777216 .*found 20200000; write several"):
        write_set(tmp_path / "set", SynthConfig(identities=200_000, images_per_identity=100))
    assert not list(tmp_path.iterdir())


def test_pixels_do_not_identify():
    """Grey thumbnails as embeddings reach less than 70 % accuracy even with the best threshold."""
    config = SynthConfig(pairs=200, held_out_identities=60)
    pairs = pairs_of(config)
    images = render_images(config, pairs.identity_2P, pairs.number_2P)
    grey_ND = np.array([thumbnail(image.jpeg) for image in images])
    grey_ND -= grey_ND.mean(axis=1, keepdims=True)
    grey_ND /= np.linalg.norm(grey_ND, axis=1, keepdims=True)
    cosine_P = (grey_ND[::2] * grey_ND[1::2]).sum(axis=1)
    accuracy = max(((cosine_P >= t) == pairs.issame_P).mean() for t in cosine_P)
    assert accuracy < 0.7


def thumbnail(jpeg):
    image = Image.open(io.BytesIO(jpeg)).convert("L").resize((16, 16), Image.Resampling.BOX)
    return np.asarray(image, float).ravel()
