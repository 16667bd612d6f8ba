"""Bad records: replaced from their step, the same on any ranks; listed, counted, tolerated up to a share."""

import io
import itertools
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline import shuffle
from data_pipeline.batch import RankSlice
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.indexed.catalog import open_catalog
from data_pipeline.indexed.loader import Loader
from data_pipeline.loader import LoaderContext
from data_pipeline.quarantine import BadRecord, Quarantine, QuarantineError, substitutes

SEED, RECORDS, BATCH = 3, 12, 6


def encoded(side, kind="JPEG"):
    file = io.BytesIO()
    Image.effect_noise(side, 80).convert("RGB").save(file, kind)
    return file.getvalue()


BAD = {
    "not an image": (
        b"no image at all",
        "expected a JPEG, PNG, WebP or BMP image, found one that begins with b'no image'",
    ),
    "truncated in its tables": (encoded((48, 48))[:400], "Truncated File Read"),
    "truncated in its pixels": (encoded((48, 48))[:-90], "image file is truncated"),
    "without its last two bytes": (encoded((48, 48))[:-2], "image file is truncated"),
    "a wrong header": (b"\xff\xd8\xff\xe0" + bytes(200), ""),
    "too small": (encoded((48, 8)), "48x8 pixels, expected 16 to 4096 a side"),
    "too large": (encoded((5000, 20), "PNG"), "5000x20 pixels, expected 16 to 4096 a side"),
}


@pytest.fixture
def bad_dataset(tmp_path, write_records, jpeg):
    """A function that writes twelve records with labels 0 to 11; `contents` replaces the images of some."""

    def write(contents):
        return write_records(tmp_path, [(i, float(i), contents.get(i, jpeg(i))) for i in range(RECORDS)])

    return write


def load(folder, share, steps, *, prefetch_batches=2, quarantine=None, first_step=0, augment=None):
    config = DataConfig(
        path=folder,
        image_size=48,
        threads=1,
        prefetch_batches=prefetch_batches,
        augment=augment or AugmentConfig(flip_probability=0),
    )
    context = LoaderContext(share, SEED, first_step, cursor=None, ranks_on_node=1, device_id=None)
    loader = Loader(
        config, open_catalog(folder), context, Quarantine(None, 0.0) if quarantine is None else quarantine
    )
    batches = itertools.islice(loader, steps * share.accumulation)
    seen = {
        int(sample): (image, int(label))
        for batch in batches
        for image, label, sample in zip(*batch, strict=True)
    }
    return loader, seen


def record_of(sample):
    return int(shuffle.record_of(SEED, np.array([sample]), RECORDS)[0])


@pytest.mark.parametrize("prefetch_batches", [1, 3])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_is_replaced_by_the_next_of_its_step_and_is_listed(
    bad_dataset, tmp_path, kind, prefetch_batches
):
    content, reason = BAD[kind]
    folder = bad_dataset({record_of(8): content})
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.0)
    _, seen = load(
        folder, RankSlice(0, 1, BATCH, 3), 4, quarantine=quarantine, prefetch_batches=prefetch_batches
    )
    assert list(seen) == list(range(24))
    expected = [record_of(sample) for sample in range(24)]
    expected[8] = expected[9]
    again = expected.index(record_of(8))  # in the second epoch
    expected[again] = expected[again + 1 if (again + 1) % BATCH else again + 1 - BATCH]
    assert [label for _, label in seen.values()] == expected
    assert torch.equal(seen[8][0], seen[9][0])
    (line,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert line["file"] == str(folder / "train.rec")
    assert line["key"] == record_of(8)
    assert line["offset"] == open_catalog(folder).offset_N[record_of(8)]
    assert reason in line["reason"]
    assert len(quarantine) == quarantine.listed() == 1


def test_several_bad_records_in_one_batch_and_the_last_of_a_step(bad_dataset):
    bad = {record_of(sample): b"bad" for sample in (3, 4, 5)}
    _, seen = load(bad_dataset(bad), RankSlice(0, 1, BATCH, BATCH), 1)
    labels = [label for _, label in seen.values()]
    # The substitutes of 3, 4 and 5 wrap around from the end of the step to its start.
    assert labels == [record_of(0), record_of(1), record_of(2), *[record_of(0)] * 3]


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 2), (2, 3), (3, 1), (6, 1)])
def test_the_substitute_of_a_bad_record_is_the_same_on_any_ranks(bad_dataset, ranks, micro_batch):
    changes = AugmentConfig(occlusion={"probability": 0.5}, blur={"probability": 0.5})
    folder = bad_dataset({record_of(sample): b"bad" for sample in (1, 2, 11)})
    _, expected = load(folder, RankSlice(0, 1, BATCH, BATCH), 4, augment=changes)
    seen = {}
    for rank in range(ranks):
        loader, part = load(folder, RankSlice(rank, ranks, BATCH, micro_batch), 4, augment=changes)
        for step in range(4):
            known = set(loader.labels_of_step(step).tolist())
            assert {label for sample, (_, label) in part.items() if sample // BATCH == step} <= known
        seen |= part
    assert seen.keys() == expected.keys()
    for sample, (image, label) in expected.items():
        assert torch.equal(seen[sample][0], image)
        assert seen[sample][1] == label


def test_a_resumed_run_lists_nothing_twice(bad_dataset, tmp_path):
    folder, path = bad_dataset({record_of(8): b"bad", record_of(20): b"bad"}), tmp_path / "list.jsonl"
    _, uninterrupted = load(folder, RankSlice(0, 1, BATCH, 3), 4, quarantine=Quarantine(path, 0.0))
    before = path.read_text()
    _, rest = load(folder, RankSlice(0, 1, BATCH, 3), 3, quarantine=Quarantine(path, 0.0), first_step=1)
    assert path.read_text() == before
    for sample, (image, label) in rest.items():
        assert torch.equal(uninterrupted[sample][0], image)
        assert uninterrupted[sample][1] == label


def test_a_record_that_breaks_while_training_is_replaced(tmp_path, write_records, jpeg):
    magic = b"\x0a\x23\xd7\xce"
    images = [b"head" + magic + b"tail" if i == record_of(4) else jpeg(i) for i in range(RECORDS)]
    folder = write_records(tmp_path, [(i, float(i), image) for i, image in enumerate(images)])
    catalog = open_catalog(folder)
    data = bytearray((folder / "train.rec").read_bytes())
    at = int(catalog.offset_N[record_of(4)])
    at = data.index(magic, at + 8)  # that of the second part
    data[at : at + 4] = bytes(4)
    was = (folder / "train.rec").stat()
    with open(folder / "train.rec", "r+b") as file:
        file.write(data)
    os.utime(folder / "train.rec", ns=(was.st_atime_ns, was.st_mtime_ns))  # like damage by a failing disk
    quarantine = Quarantine(None, 0.0)
    rank_slice = RankSlice(0, 1, BATCH, BATCH)
    context = LoaderContext(rank_slice, SEED, first_step=0, cursor=None, ranks_on_node=1, device_id=None)
    loader = Loader(DataConfig(path=folder, image_size=48, threads=1), catalog, context, quarantine)
    assert next(loader).label_B[4] == record_of(5)
    assert record_of(4) in quarantine


def test_a_step_without_a_readable_sample_ends_the_run(bad_dataset):
    folder = bad_dataset({record_of(sample): b"bad" for sample in range(BATCH)})
    with pytest.raises(QuarantineError, match="no sample of step 0 can be read"):
        load(folder, RankSlice(0, 1, BATCH, 2), 1)


def test_more_than_the_share_is_an_error_that_names_the_first_ten():
    quarantine = Quarantine(None, 0.01)
    quarantine.count_seen(1300)
    for i in range(13):
        quarantine.add(i, BadRecord("a.rec", i, 8 * i, "zero bytes"))
    with pytest.raises(QuarantineError, match=r"14 of the first 1300 samples .* exceeds .* = 0.01") as raised:
        quarantine.add(13, BadRecord("a.rec", 13, 104, "zero bytes"))
    lines = str(raised.value).splitlines()[1:]
    assert lines == [f"  a.rec: key {i} at byte {8 * i}: zero bytes" for i in range(10)]


def test_ten_are_tolerated_in_any_case():
    quarantine = Quarantine(None, 0.0)
    for i in range(10):
        quarantine.add(i, BadRecord("a.rec", i, 0, "cut"))
    with pytest.raises(QuarantineError):
        quarantine.add(10, BadRecord("a.rec", 10, 0, "cut"))


@given(step=st.integers(0, 10**12), within=st.integers(0, 63), batch=st.integers(1, 64))
def test_substitutes_are_the_samples_of_the_step_each_once(step, within, batch):
    sample = step * batch + within % batch
    found = list(substitutes(sample, batch))
    assert found[0] == sample
    assert sorted(found) == list(range(step * batch, (step + 1) * batch))
