"""Batches: the pixels and labels of each sample, the same on any number of ranks; errors name the record."""

import io
import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline import augment, shuffle
from data_pipeline.batch import RankSlice
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.decode import Decoder
from data_pipeline.indexed.catalog import open_catalog
from data_pipeline.indexed.loader import Loader
from data_pipeline.loader import LoaderContext
from data_pipeline.quarantine import Quarantine

SEED = 5
# Between two JPEG libraries; with the same one there is no difference at all.
TOLERANCE = 1.01 / 127.5
CHANGES = [name for name in AugmentConfig.model_fields if name != "flip_probability"]
ALL_CHANGES = AugmentConfig(**{name: {"probability": 0.5} for name in CHANGES})


def loader(folder, share, *, first_step=0, changes=ALL_CHANGES, image_size=48, threads=1, prefetch_batches=2):
    config = DataConfig(
        path=folder,
        augment=changes,
        image_size=image_size,
        threads=threads,
        prefetch_batches=prefetch_batches,
    )
    context = LoaderContext(share, SEED, first_step, cursor=None, ranks_on_node=1, device_id=None)
    return Loader(config, open_catalog(folder), context, Quarantine(None, 0.0))


def pixels_of(encoded):
    """Return the network's input for an image, decoded by Pillow: [3, H, W] in [-1, 1]."""
    image_HWC = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), np.float32)
    return torch.from_numpy(image_HWC.transpose(2, 0, 1) / 127.5 - 1)


def samples(batches, steps):
    """Return sample position -> (pixels, label) of the first `steps` batches."""
    return {
        int(sample): (image, int(label))
        for batch in itertools.islice(batches, steps)
        for image, label, sample in zip(*batch, strict=True)
    }


def test_images_and_labels_are_those_of_the_order(dataset, jpeg):
    plain = AugmentConfig(flip_probability=0)
    seen = samples(loader(dataset, RankSlice(0, 1, 6, 6), changes=plain), 4)
    assert list(seen) == list(range(24))
    for sample, record in enumerate(shuffle.record_of(SEED, np.arange(24), 12)):
        image, label = seen[sample]
        assert label == record // 4
        assert (image - pixels_of(jpeg(record))).abs().max() <= TOLERANCE


def test_a_batch_has_the_types_of_the_contract(dataset):
    images, labels, positions = next(loader(dataset, RankSlice(0, 1, 6, 6)))
    assert (images.shape, images.dtype) == ((6, 3, 48, 48), torch.float32)
    assert (labels.shape, labels.dtype) == ((6,), torch.int64)
    assert (positions.shape, positions.dtype) == ((6,), torch.int64)
    assert images.abs().max() <= 1


def test_a_sample_is_mirrored_as_drawn(dataset, jpeg):
    seen = samples(loader(dataset, RankSlice(0, 1, 12, 12), changes=AugmentConfig()), 5)
    mirror_N = augment.of_samples(AugmentConfig(), SEED, np.arange(60)).mirror_B
    assert 0.2 < mirror_N.mean() < 0.8
    for sample, record in enumerate(shuffle.record_of(SEED, np.arange(60), 12)):
        expected = pixels_of(jpeg(record))
        expected = expected.flip(2) if mirror_N[sample] else expected
        assert (seen[sample][0] - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "options"),
    [
        (1, 4, {}),
        (1, 12, {"prefetch_batches": 4, "threads": 3}),
        (2, 3, {"prefetch_batches": 1}),
        (3, 2, {"threads": 2}),
        (4, 3, {}),
        (12, 1, {}),
    ],
)
def test_a_sample_has_the_same_pixels_wherever_it_is_loaded(dataset, ranks, micro_batch, options):
    expected = samples(loader(dataset, RankSlice(0, 1, 12, 12), first_step=3), 2)
    seen = {}
    for rank in range(ranks):
        share = RankSlice(rank, ranks, 12, micro_batch)
        part = samples(loader(dataset, share, first_step=3, **options), 2 * share.accumulation)
        assert not seen.keys() & part.keys()
        seen |= part
    assert seen.keys() == expected.keys() == set(range(36, 60))
    for sample, (image, label) in expected.items():
        assert torch.equal(seen[sample][0], image)
        assert seen[sample][1] == label


@given(
    ranks=st.sampled_from([1, 2, 3, 4]),
    micro_batch=st.integers(1, 5),
    rounds=st.integers(1, 4),
    step=st.integers(0, 1000),
)
def test_a_step_is_the_same_samples_on_any_number_of_ranks(ranks, micro_batch, rounds, step):
    total = ranks * micro_batch * rounds
    shares = [RankSlice(rank, ranks, total, micro_batch) for rank in range(ranks)]
    parts = [share.samples(step * rounds + m) for m in range(rounds) for share in shares]
    assert np.array_equal(np.concatenate(parts), np.arange(step * total, (step + 1) * total))


@pytest.mark.parametrize(("share", "such_as"), [(RankSlice(0, 3, 100, 8), 96), (RankSlice(0, 2, 10, 8), 16)])
def test_a_global_batch_that_does_not_divide(share, such_as):
    message = rf"{share.global_batch} does not divide .*multiple of \d+, such as {such_as}$"
    with pytest.raises(ValueError, match=message):
        _ = share.accumulation


def test_every_rank_knows_the_labels_of_the_whole_step(dataset):
    ranks = [loader(dataset, RankSlice(rank, 2, 8, 2), first_step=3) for rank in range(2)]
    seen = [int(label) for rank in ranks for batch in itertools.islice(rank, 2) for label in batch.label_B]
    for rank in ranks:
        assert sorted(rank.labels_of_step(3).tolist()) == sorted(seen)
    assert len(seen) == 8


def test_a_loader_continues_where_it_stopped(dataset):
    uninterrupted = samples(loader(dataset, RankSlice(0, 1, 4, 4)), 6)
    cut = loader(dataset, RankSlice(0, 1, 4, 4))
    first, second = samples(cut, 2), samples(cut, 4)
    assert [*first, *second] == list(uninterrupted)
    assert all(
        torch.equal(image, uninterrupted[sample][0]) for sample, (image, _) in (first | second).items()
    )


def test_images_are_resized_to_the_configured_size(dataset):
    images, *_ = next(loader(dataset, RankSlice(0, 1, 4, 4), image_size=32))
    assert images.shape == (4, 3, 32, 32)


@pytest.mark.parametrize("error", [ValueError("no such bytes"), OSError("gone"), RuntimeError("not DALI's")])
@pytest.mark.parametrize("prefetch_batches", [1, 3])
def test_an_error_of_the_source_ends_the_iteration_as_it_is(jpeg, error, prefetch_batches):
    def source(i):
        if i == 4:
            raise error
        return [np.frombuffer(jpeg(i), np.uint8)], augment.none(1)

    decoder = Decoder(
        source,
        lambda i, row: f"{i} {row}",
        batch_size=1,
        image_size=48,
        threads=1,
        prefetch_batches=prefetch_batches,
        device_id=None,
        changes=AugmentConfig(),
    )
    with pytest.raises(type(error)) as raised:
        list(decoder)
    assert raised.value is error


PROGRAM = """
import sys
from pathlib import Path
from data_pipeline.indexed.catalog import open_catalog
from data_pipeline.config import DataConfig
from data_pipeline.indexed.loader import Loader
from data_pipeline.batch import RankSlice
from data_pipeline.loader import LoaderContext
from data_pipeline.quarantine import Quarantine

folder = Path(sys.argv[1])
changes = {name: {"probability": 0.5} for name in ("crop", "motion_blur", "low_resolution", "jpeg")}
config = DataConfig(path=folder, prefetch_batches=4, threads=3, augment=changes)
context = LoaderContext(RankSlice(0, 1, 4, 4), 0, 0, cursor=None, ranks_on_node=1, device_id=None)
batches = Loader(config, open_catalog(folder), context, Quarantine(None, 0.0))
"""
ENDINGS = {
    "before the first batch": "sys.exit(7)",
    "out of a loop": "for batch in batches: break\nsys.exit(7)",
    "with a batch in hand": "images = next(batches).images_BCHW; del batches; images.sum(); sys.exit(7)",
    "with an error": "next(batches)\ntry: raise KeyError\nfinally: sys.exit(7)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_may_end_while_batches_are_being_decoded(dataset, ending):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + ENDINGS[ending], dataset], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


def test_the_loader_may_be_abandoned_and_opened_again_many_times(dataset):
    threads = threading.active_count()
    for _ in range(10):
        batches = loader(dataset, RankSlice(0, 1, 4, 4), prefetch_batches=3)
        first = next(batches)
        del batches
    assert torch.equal(first.images_BCHW, next(loader(dataset, RankSlice(0, 1, 4, 4))).images_BCHW)
    assert threading.active_count() == threads


def test_a_batch_stays_as_it_is_while_others_are_decoded(dataset):
    batches = loader(dataset, RankSlice(0, 1, 4, 4), prefetch_batches=1)
    kept = list(itertools.islice(batches, 20))
    copies = [batch.images_BCHW.clone() for batch in kept]
    for _ in range(20):
        next(batches)
    del batches
    assert all(torch.equal(batch.images_BCHW, copy) for batch, copy in zip(kept, copies, strict=True))
    again = loader(dataset, RankSlice(0, 1, 4, 4))
    assert all(torch.equal(batch.images_BCHW, next(again).images_BCHW) for batch in kept)
