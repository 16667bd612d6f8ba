"""Micro-batches from streamed shards: complete, in order, resumable, with bad images replaced."""

import itertools

import pytest
import torch
import webdataset as wds

from data_pipeline.batch import RankSlice
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import LoaderContext
from data_pipeline.quarantine import Quarantine, QuarantineError
from data_pipeline.streaming.connection import RemoteError
from data_pipeline.streaming.loader import RemoteLoader
from data_pipeline.streaming.samples import shard_urls

SHARDS, SAMPLES = 3, 10


@pytest.fixture
def shards(tmp_path, jpeg):
    """A function that writes three shards of ten images, labelled 0 to 29; `bad`: label -> content."""

    def write(bad=()):
        for shard in range(SHARDS):
            with wds.TarWriter(str(tmp_path / f"s-{shard}.tar")) as tar:
                for i in range(SAMPLES):
                    label = shard * SAMPLES + i
                    content = dict(bad).get(label, jpeg(label))
                    tar.write({"__key__": f"{label:05d}", "jpg": content, "cls": str(label).encode()})
        return shard_urls([f"{tmp_path}/s-{{0..{SHARDS - 1}}}.tar"])

    return write


def load(
    urls, share, *, cursor=None, classes=SHARDS * SAMPLES, quarantine=None, gather=lambda labels: labels
):
    changes = AugmentConfig(occlusion={"probability": 0.5})
    config = DataConfig(
        shards=urls, num_classes=classes, image_size=48, threads=1, shards_window=4, augment=changes
    )
    context = LoaderContext(share, 1, first_step=0, cursor=cursor, ranks_on_node=1, device_id=None)
    if quarantine is None:
        quarantine = Quarantine(None, 0.0)
    return RemoteLoader(config, urls, classes, context, quarantine, gather)


def taken(loader, batches):
    """Return sample -> (pixels, label) of so many batches, and close the loader."""
    found = {
        int(sample): (image, int(label))
        for batch in itertools.islice(loader, batches)
        for image, label, sample in zip(*batch, strict=True)
    }
    loader.close()
    return found


def assert_same(found, expected):
    assert list(found) == list(expected)
    for sample, (image, label) in expected.items():
        assert torch.equal(found[sample][0], image)
        assert found[sample][1] == label


def test_an_epoch_over_all_ranks_has_every_sample_once(shards):
    urls = shards()
    labels = []
    for rank in range(3):
        labels += [label for _, label in taken(load(urls, RankSlice(rank, 3, 6, 2)), SAMPLES // 2).values()]
    assert sorted(labels) == list(range(SHARDS * SAMPLES))


@pytest.mark.parametrize("done", [1, 4, 7])
def test_a_run_resumes_at_exactly_the_next_sample(shards, done):
    urls, share = shards(), RankSlice(0, 1, 4, 4)
    uninterrupted = taken(load(urls, share), 12)
    first = load(urls, share)
    before = list(itertools.islice(first, done))
    cursor = [list(first.cursor)]
    first.close()
    rest = taken(load(urls, share, cursor=cursor), 12 - done)
    assert len(before) == done
    assert_same(rest, dict(list(uninterrupted.items())[4 * done :]))


def test_labels_of_a_step_are_known_before_it_and_gathered(shards):
    urls = shards()
    loaders = [load(urls, RankSlice(rank, 2, 8, 2), gather=lambda labels: labels * 1) for rank in range(2)]
    for loader in loaders:
        for step in range(3):
            known = loader.labels_of_step(step)
            seen = torch.cat([batch.label_B for batch in itertools.islice(loader, 2)])
            assert torch.equal(known, seen)
        loader.close()


def test_a_bad_image_is_replaced_by_the_next_of_its_micro_batch(shards):
    share = RankSlice(0, 1, 5, 5)
    expected = [label for _, label in taken(load(shards(), share), 6).values()]
    bad = {expected[1]: b"no image", expected[2]: b"\xff\xd8 none", expected[9]: b"none"}
    quarantine = Quarantine(None, 0.0)
    found = taken(load(shards(bad), share, quarantine=quarantine), 6)
    expected[1] = expected[2] = expected[3]
    expected[9] = expected[5]
    assert [label for _, label in found.values()] == expected
    assert len(quarantine) == 3


def test_a_micro_batch_without_a_good_image_ends_the_run(shards):
    loader = load(shards({label: b"none" for label in range(30)}), RankSlice(0, 1, 4, 4))
    with pytest.raises(QuarantineError, match=r"no image of the 4 from .*s-\d.tar: sample '\d+' on can be"):
        next(loader)
    loader.close()


def test_a_label_outside_the_classes_is_named(shards):
    loader = load(shards(), RankSlice(0, 1, 30, 30), classes=29)
    with pytest.raises(RemoteError, match=r"s-2.tar: sample '00029': label 29 is outside the 29 classes"):
        next(loader)
    loader.close()
