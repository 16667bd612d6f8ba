"""Augmentation: its configuration keys, and its parameters, ranges and probabilities as pure functions."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import augment
from data_pipeline.config import AugmentConfig, DataConfig
from trainer import config_file

CHANGES = [name for name in AugmentConfig.model_fields if name != "flip_probability"]
MANY = np.arange(10_000)


def config(probability, *names, **keys):
    return AugmentConfig(**{name: {"probability": probability, **keys} for name in names})


def drawn(name, **keys):
    """Return the parameters of one augmentation that is applied to all of many samples."""
    return augment.of_samples(config(1, name, **keys), 3, MANY).changes[name]


def is_equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@given(st.integers(0, 2**63), st.lists(st.integers(0, 2**62), min_size=1, max_size=9), st.data())
def test_parameters_are_a_function_of_seed_and_sample(seed, samples, data):
    everything = config(0.5, *CHANGES)
    together = augment.of_samples(everything, seed, np.array(samples))
    i = data.draw(st.integers(0, len(samples) - 1))
    alone = augment.of_samples(everything, seed, np.array(samples[i : i + 1]))
    assert alone.mirror_B[0] == together.mirror_B[i]
    for name in CHANGES:
        rows = {key: column[i : i + 1] for key, column in together.changes[name].items()}
        assert is_equal(rows, alone.changes[name])


def test_the_plain_recipe_only_mirrors():
    plain = augment.of_samples(AugmentConfig(), 3, MANY)
    assert plain.changes == {}
    assert abs(plain.mirror_B.mean() - 0.5) < 0.02
    none = augment.none(5)
    assert (none.mirror_B.tolist(), none.changes) == ([0] * 5, {})


@pytest.mark.parametrize("probability", [0.05, 0.2, 0.9, 1.0])
def test_a_change_is_made_as_often_as_asked_for(probability):
    wanted = AugmentConfig(
        flip_probability=probability, **{name: {"probability": probability} for name in CHANGES}
    )
    made = augment.of_samples(wanted, 3, MANY)
    assert list(made.changes) == CHANGES
    for on_N in (made.mirror_B, *(change["on"] for change in made.changes.values())):
        assert abs(on_N.mean() - probability) <= 4 * (probability * (1 - probability) / len(MANY)) ** 0.5


def test_changes_are_independent_of_each_other():
    everything = augment.of_samples(config(0.5, *CHANGES), 3, MANY)
    on = [everything.mirror_B, *(change["on"] for change in everything.changes.values())]
    for one, other in itertools.combinations(on, 2):
        assert abs(np.mean(one == other) - 0.5) < 0.03
    for name in CHANGES:
        alone = augment.of_samples(config(0.5, name), 3, MANY)
        assert is_equal(alone.changes[name], everything.changes[name])


def test_another_seed_draws_other_numbers():
    for name in CHANGES:
        other = augment.of_samples(config(0.5, name), 4, MANY).changes[name]["on"]
        assert (
            0.45 < np.mean(other == augment.of_samples(config(0.5, name), 3, MANY).changes[name]["on"]) < 0.55
        )


@pytest.mark.parametrize(
    ("name", "keys", "parameter", "lowest", "highest"),
    [
        ("blur", {"sigma": [0.5, 3]}, "sigma", 0.5, 3),
        ("low_resolution", {"scale": [0.2, 0.7]}, "scale", 0.2, 0.7),
        ("photometric", {"brightness": 0.3}, "brightness", 0.7, 1.3),
        ("photometric", {"contrast": 0.4}, "contrast", 0.6, 1.4),
        ("photometric", {"saturation": 1}, "saturation", 0, 2),
        ("photometric", {"hue": 20}, "hue", -20, 20),
        ("jpeg", {"quality": [30, 40]}, "quality", 30, 40),
    ],
)
def test_a_range_is_used_from_end_to_end(name, keys, parameter, lowest, highest):
    value_N = drawn(name, **keys)[parameter].astype(float)
    tolerance = 0 if name == "jpeg" else 0.001 * (highest - lowest)
    assert lowest - 1e-6 <= value_N.min() <= lowest + tolerance
    assert highest - tolerance <= value_N.max() <= highest + 1e-6
    assert abs(value_N.mean() - (lowest + highest) / 2) < 0.02 * (highest - lowest)


def test_each_quality_and_interpolation_is_as_frequent_as_the_others():
    quality_N = drawn("jpeg", quality=[30, 39])["quality"]
    low_resolution = drawn("low_resolution")
    for value_N, kinds in (
        (quality_N - 30, 10),
        (low_resolution["down"], 5),
        (low_resolution["up"], 5),
        (low_resolution["down"] * 5 + low_resolution["up"], 25),
    ):
        count_K = np.bincount(value_N)
        assert len(count_K) == kinds
        assert abs(count_K * kinds / len(MANY) - 1).max() < 0.25


@pytest.mark.parametrize("name", ["occlusion", "crop"])
def test_rectangles_have_the_area_and_aspect_asked_for_and_lie_inside(name):
    parameters = drawn(name, area=[0.1, 0.5], aspect=[0.5, 2])
    if name == "occlusion":
        top, left = parameters["anchor"].T
        height, width = parameters["shape"].T
        assert (parameters["fill"].min(), parameters["fill"].max()) == (0, 255)
    else:  # the strips above, below, left and right of it
        top, left = parameters["shape"][:, 0], parameters["shape"][:, 5]
        height, width = parameters["anchor"][:, 2] - top, parameters["anchor"][:, 7] - left
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 1 + 1e-6
    area, aspect = height * width, width / height
    assert 0.1 - 1e-5 <= area.min() <= 0.102
    assert 0.495 <= area.max() <= 0.5 + 1e-5
    assert abs(np.exp(np.log(aspect).mean()) - 1) < 0.02
    assert 0.5 - 1e-5 <= aspect.min() <= 0.51
    assert 1.96 <= aspect.max() <= 2 + 1e-5
    # Positions are symmetric about the centre.
    for free, start in ((1 - height, top), (1 - width, left)):
        assert abs((start / free).mean() - 0.5) < 0.02


def test_a_rectangle_wider_than_the_image_is_cut_to_it():
    crop = drawn("crop", area=[1, 1], aspect=[4, 4])
    assert np.all(crop["shape"][:, 5] == 0)
    assert np.all(crop["anchor"][:, 7] == 1)


def test_motion_kernels_are_lines_that_keep_the_brightness():
    kernel_NKK = drawn("motion_blur", length=[1, 9.5])["kernel"]
    assert kernel_NKK.shape == (len(MANY), 11, 11)
    assert np.abs(kernel_NKK.sum((1, 2)) - 1).max() < 1e-6
    assert kernel_NKK.min() >= 0
    assert np.abs(kernel_NKK - kernel_NKK[:, ::-1, ::-1]).max() < 1e-6
    y, x = np.mgrid[-5:6, -5:6]
    spread = np.stack([(kernel_NKK * a * b).sum((1, 2)) for a, b in ((x, x), (x, y), (x, y), (y, y))], 1)
    along, across = np.linalg.eigvalsh(spread.reshape(-1, 2, 2)).T[::-1]
    # A line of length L has the variance L * L / 12; its pixels add 1 / 12, and smear it slightly.
    assert across.max() < 0.4
    assert 6 < along.max() < 9.5**2 / 12 + 0.5
    rising, falling = (spread[:, 1] > 0.1).mean(), (spread[:, 1] < -0.1).mean()
    assert abs(rising - falling) < 0.04 < min(rising, falling)
    single = drawn("motion_blur", length=[1, 1])["kernel"]
    assert np.all(single == 1)
    assert single.shape == (len(MANY), 1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[augment.crop]\narea = [0.9, 0.2]", r"area: expected \[lowest, highest\], found \[0.9, 0.2\]"),
        ("[augment.crop]\narea = [0.0, 0.2]", r"augment.crop.area.0: expected greater than 0, found 0.0"),
        ("[augment.jpeg]\nquality = [20, 101]", r"quality.1: expected less than or equal to 100, found 101"),
        ("[augment.jpeg]\nquality = 20", r"augment.jpeg.quality: expected a valid tuple, found 20"),
        ("[augment.blur]\nprobability = 1.5", r"augment.blur.probability: expected less than or equal to 1"),
        ("[augment]\nblurr = 1", r"unknown key augment.blurr; did you mean augment.blur\?"),
        ("[augment]\nbrightness = 1", r"did you mean augment.photometric.brightness\?"),
        (
            "[augment.grey]\nsigma = 1",
            r"did you mean augment.blur.sigma\? .*: probability$",
        ),
    ],
)
def test_a_wrong_key_is_named_with_what_was_expected(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(f'path = "x"\n{text}\n')
    with pytest.raises(ValueError, match=message):
        config_file.load(DataConfig, tmp_path / "c.toml")


def test_every_key_is_described():
    keys = config_file.describe(AugmentConfig)
    assert all(key.description for key in keys)
    probabilities = {key.name: key.default for key in keys if key.name.endswith("probability")}
    assert probabilities == {"flip_probability": "0.5"} | {f"{name}.probability": "0.0" for name in CHANGES}
