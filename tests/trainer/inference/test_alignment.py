"""Alignment by five points: known transforms are found again, least squares by brute force agrees, and
pixels land where they should."""

import numpy as np
import pytest
from PIL import Image

from trainer.inference.alignment import TEMPLATE_52, aligned, similarity_transform


def moved(points_N2, degrees, scale, shift):
    turn = np.deg2rad(degrees)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return scale * points_N2 @ rotation.T + shift


def same_pixels(image, pixels_HWC):
    # Pillow cuts off fractions, so that 42.9999 is 42.
    np.testing.assert_allclose(np.asarray(image, int), pixels_HWC, rtol=0, atol=1)


def test_a_known_transform_is_found_again():
    quarter = similarity_transform(TEMPLATE_52, moved(TEMPLATE_52, 90, 2.0, (10, -5)))
    np.testing.assert_allclose(quarter, [[0, -2, 10], [2, 0, -5]], atol=1e-10)


def test_noisy_points_fit_as_by_solving_the_normal_equations():
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = rng.normal(50, 30, (5, 2))
        # x' = a x - b y + c, y' = b x + a y + d: linear in a, b, c, d.
        rows = [row for x, y in points for row in ([x, -y, 1, 0], [y, x, 0, 1])]
        a, b, c, d = np.linalg.lstsq(np.array(rows), TEMPLATE_52.ravel(), rcond=None)[0]
        np.testing.assert_allclose(similarity_transform(points, TEMPLATE_52), [[a, -b, c], [b, a, d]])


def test_a_mirrored_face_is_turned_and_not_reflected():
    mirrored = TEMPLATE_52 * [-1, 1]
    assert np.linalg.det(similarity_transform(mirrored, TEMPLATE_52)[:, :2]) > 0


def test_a_face_in_place_is_left_as_it_is():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8))
    same_pixels(aligned(image, TEMPLATE_52, 112, "a"), np.asarray(image))


def test_pixels_move_by_whole_steps_without_blur():
    pixels = np.random.default_rng(0).integers(0, 256, (150, 150, 3), np.uint8)
    placed = aligned(Image.fromarray(pixels), TEMPLATE_52 + np.array([7, 12]), 112, "a")
    same_pixels(placed, pixels[12:124, 7:119])
    # A quarter turn about the centre of the image, also without blur.
    turned = moved(TEMPLATE_52 - 55.5, 90, 1, (55.5, 55.5))
    whole = Image.fromarray(pixels[:112, :112])
    same_pixels(aligned(whole, turned, 112, "a"), np.rot90(pixels[:112, :112]))


def test_eyes_are_found_in_the_same_place_at_any_size():
    eye = np.zeros((400, 400, 3), np.uint8)
    landmark = moved(TEMPLATE_52, 20, 2.5, (60, 20))
    x, y = landmark[0].round().astype(int)
    eye[y - 6 : y + 7, x - 6 : x + 7] = 255
    for size in (112, 224):
        bright = np.argwhere(np.asarray(aligned(Image.fromarray(eye), landmark, size, "a"))[..., 0] > 128)
        np.testing.assert_allclose(bright.mean(0)[::-1], TEMPLATE_52[0] * size / 112, atol=0.7)


@pytest.mark.parametrize("points", [np.full((5, 2), 3.0), np.full((5, 2), np.nan), np.array([[0, 0]] * 5)])
def test_invalid_landmarks_name_the_image(points):
    with pytest.raises(ValueError, match=r"folder/9\.jpg: expected the five landmarks of a face, found"):
        aligned(Image.new("RGB", (40, 40)), points, 112, "folder/9.jpg")
