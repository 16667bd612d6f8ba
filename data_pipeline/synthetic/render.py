"""Rendering of a synthetic face: pose, deformation, position, filling, light, colour, noise and blur.

`render_face(face, nuisances, size)` fills the polygons of the sketch at twice the size over a background, and
then applies the effects of light and camera. Background, clothes and noise are functions of the image's scene
number.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data_pipeline import philox
from data_pipeline.synthetic import face as faces
from data_pipeline.synthetic.face import Face, Nuisances

_SUPERSAMPLING = 2
_UNIT = 0.335  # one face unit, as a share of the image's width
_CENTRE_Y = 0.53
_GRID = 28  # cells per side of the light map, which is smooth


def render_face(face: Face, nuisances: Nuisances, size: int) -> Image.Image:
    """Render `face` as an RGB image, `size` pixels wide and high, before compression."""
    big = size * _SUPERSAMPLING
    colour_P3 = 255 * philox.uniform(nuisances.scene, np.arange(30), 0)[:3].T
    image = _background(colour_P3, big)
    draw = ImageDraw.Draw(image, "RGBA")
    point_K3, ends, fills = faces.sketch(face, nuisances, colour_P3[9]).polygons()
    flat = _project(point_K3, nuisances, big).ravel().tolist()
    for start, end, fill in zip([0, *ends], ends, fills, strict=False):
        draw.polygon(flat[2 * start : 2 * end], fill)
    return _photograph(image.reduce(_SUPERSAMPLING), nuisances, size)


def _background(colour_P3: np.ndarray, size: int) -> Image.Image:
    """Return a background of nine blended colours with translucent rectangles before them."""
    tile = Image.fromarray(colour_P3[:9].reshape(3, 3, 3).astype(np.uint8))
    image = tile.resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image, "RGBA")
    for centre, extent, colour in zip(colour_P3[10:16], colour_P3[16:22], colour_P3[22:28], strict=True):
        (x, y), (w, h) = centre[:2] * size / 255, extent[:2] * size / 600
        draw.rectangle((x - w, y - h, x + w, y + h), (*colour.astype(int).tolist(), 150))
    return image


def _project(point_K3: np.ndarray, n: Nuisances, size: int) -> np.ndarray:
    """Return pixels [K, 2] of points [K, 3] in face units, after pose, deformation, roll and shift."""
    x, y, z = point_K3.T
    yaw, pitch, roll = math.radians(n.yaw_deg), math.radians(n.pitch_deg), math.radians(n.roll_deg)
    x, z = x * math.cos(yaw) + z * math.sin(yaw), z * math.cos(yaw) - x * math.sin(yaw)
    y = y * math.cos(pitch) + z * math.sin(pitch)
    x, y = x + n.warp * np.sin(2.6 * y + n.warp_phase), y + n.warp * np.sin(2.2 * x + 2 * n.warp_phase)
    x, y = x * math.cos(roll) - y * math.sin(roll), x * math.sin(roll) + y * math.cos(roll)
    unit = _UNIT * n.scale
    return size * np.column_stack([0.5 + n.shift_x + unit * x, _CENTRE_Y + n.shift_y + unit * y])


def _photograph(image: Image.Image, n: Nuisances, size: int) -> Image.Image:
    """Apply light, colour, noise, blur and low resolution."""
    light = Image.fromarray(_light(n)).resize((size, size), Image.Resampling.BILINEAR)
    pixel_HWC = np.asarray(image, np.float32) * np.asarray(light)[:, :, None]
    pixel_HWC = pixel_HWC @ _colours(n)
    grain = philox.words(n.scene, np.arange(-(-size * size // 16)), 1).view(np.uint8).ravel()
    grain_HW1 = grain[: size * size].reshape(size, size, 1).astype(np.float32)
    pixel_HWC += (grain_HW1 / 127.5 - 1) * np.float32(n.noise)
    image = Image.fromarray(np.clip(pixel_HWC, 0, 255).astype(np.uint8))
    if n.blur_px > 0:
        image = image.filter(ImageFilter.GaussianBlur(n.blur_px * size / 112))
    if n.resolution < 1:
        small = max(1, round(size * n.resolution))
        image = image.resize((small, small), Image.Resampling.BILINEAR)
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return image


def _colours(n: Nuisances) -> np.ndarray:
    """Return the matrix [3, 3] float32 to multiply rows of RGB by: saturation, then exposure and tint."""
    saturation_33 = n.saturation * np.eye(3) + (1 - n.saturation) / 3
    stops_3 = n.exposure_stops + np.array([n.warmth_stops, n.tint_stops, -n.warmth_stops])
    return (saturation_33 * np.exp2(stops_3)).astype(np.float32)


def _light(n: Nuisances) -> np.ndarray:
    """Return brightness [28, 28] float32: Lambert's law on an ellipsoid, then the edge of a cast shadow."""
    at = (np.arange(_GRID) + 0.5) / _GRID
    x = (at[None, :] - 0.5 - n.shift_x) / (_UNIT * 1.15)
    y = (at[:, None] - _CENTRE_Y - n.shift_y) / (_UNIT * 1.5)
    z = np.sqrt(np.clip(1 - x**2 - y**2, 0, 1))
    direction = np.array([n.light_side, n.light_height, 0.8])
    direction /= np.linalg.norm(direction)
    lambert = np.clip(x * direction[0] + y * direction[1] + z * direction[2], 0, 1.2)
    light = 1 - n.light_strength + 1.4 * n.light_strength * lambert
    angle = math.radians(n.shadow_angle_deg)
    edge = x * math.cos(angle) + y * math.sin(angle) - 0.15
    shadow = max(n.shadow, 0.0) / (1 + np.exp(-12 * edge))
    return (light * (1 - shadow)).astype(np.float32)
