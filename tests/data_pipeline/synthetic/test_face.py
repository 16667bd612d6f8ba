"""Rendering: every property of an identity and every nuisance changes the image."""

import numpy as np
import pytest

from data_pipeline.synthetic.face import OCCLUSIONS, Face, Nuisances, ranges
from data_pipeline.synthetic.render import render_face

SIZE = 112
# An identity with all optional properties, in the middle of all ranges.
PERSON = Face(**{name: (low + high) / 2 for name, (low, high) in ranges(Face).items()})._replace(
    hair_volume=0.15,
    moustache=0.5,
    beard=0.5,
    glasses=0.5,
    freckles=0.5,
    mole_x=0.4,
    mole_y=0.3,
)
PORTRAIT = Nuisances(
    **{name: neutral for name, (neutral, _, _) in ranges(Nuisances).items()}, occlusion="none", scene=3
)
# Values that are visible only together with others.
NEEDS = {
    "mole_x": {"mole_size": 0.05},
    "mole_y": {"mole_size": 0.05},
    "second_mole_x": {"mole_size": -0.02},
    "second_mole_y": {"mole_size": -0.02},
    "warp_phase": {"warp": 0.05},
    "shadow_angle_deg": {"shadow": 0.5},
    "occlusion_x": {"occlusion": "block"},
    "occlusion_y": {"occlusion": "block"},
    "occlusion_size": {"occlusion": "block"},
}
ALTERED_BY_THE_ENCODER = {"jpeg_quality"}


def pixels(face=PERSON, nuisances=PORTRAIT, size=SIZE):
    return np.asarray(render_face(face, nuisances, size), int)


@pytest.fixture(scope="module")
def portrait():
    return pixels()


@pytest.mark.parametrize("name", Face._fields)
def test_every_property_of_a_person_shows(name):
    low, high = ranges(Face)[name]
    base = PERSON._replace(**NEEDS.get(name, {}))
    one, other = (pixels(base._replace(**{name: value})) for value in (low, high))
    assert (np.abs(one - other).max(axis=2) > 20).sum() >= 4


@pytest.mark.parametrize("name", sorted(ranges(Nuisances).keys() - ALTERED_BY_THE_ENCODER))
def test_every_nuisance_shows(name):
    _, low, high = ranges(Nuisances)[name]
    base = PORTRAIT._replace(**NEEDS.get(name, {}))
    # Not `high`: for an angle it is the same as `low`.
    values = (low, low + 0.6 * (high - low))
    one, other = (pixels(nuisances=base._replace(**{name: value})) for value in values)
    assert np.abs(one - other).mean() > 0.05


@pytest.mark.parametrize("occlusion", OCCLUSIONS[1:])
def test_every_occlusion_hides_a_part_of_the_face(occlusion, portrait):
    hidden = pixels(nuisances=PORTRAIT._replace(occlusion=occlusion))
    share = (np.abs(hidden - portrait).max(axis=2) > 10).mean()
    assert 0.02 < share < 0.5


def test_another_scene_changes_the_background_and_not_the_face(portrait):
    changed = np.abs(pixels(nuisances=PORTRAIT._replace(scene=4)) - portrait).max(axis=2) > 10
    assert changed[:10].mean() > 0.8
    assert changed[45:85, 40:72].mean() < 0.01


def test_rendering_is_a_pure_function(portrait):
    pixels(PERSON._replace(skin_shade=0.0, glasses=-1.0), PORTRAIT._replace(scene=9, yaw_deg=10.0))
    assert np.array_equal(pixels(), portrait)


def test_a_face_keeps_its_proportions_at_any_size(portrait):
    large = pixels(size=224)
    assert large.shape == (224, 224, 3)
    # Four pixels of the large image are one of the small image, except for edges and rounding.
    shrunk = large.reshape(112, 2, 112, 2, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - portrait).mean() < 3
