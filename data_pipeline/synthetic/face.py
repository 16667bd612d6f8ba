"""A synthetic face as coloured polygons, from the numbers of an identity and the nuisances of an image.

`sketch(face, nuisances, cloth)` returns the polygons from back to front, in face units: half a face is about
1 wide; x to the right, y down, z towards the viewer; the origin lies between the cheeks. Parts on the skin
follow an ellipsoid, so that yaw and pitch move nose and eyes against the outline. `render.render_face` fills
the polygons. An identity (`Face`) and the nuisances of an image (`Nuisances`) are plain numbers; this module
draws no random numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple, get_type_hints

import numpy as np

Colour = np.ndarray  # RGB, float, 0 to 255


class Face(NamedTuple):
    """Properties of an identity: lengths in face units, shades from 0 to 1. A field has its (low, high)."""

    skin_shade: Annotated[float, (0.0, 1.0)]  # light to dark
    skin_redness: Annotated[float, (-1.0, 1.0)]
    hair_shade: Annotated[float, (0.0, 1.0)]  # along HAIR
    iris_shade: Annotated[float, (0.0, 1.0)]  # along IRIS
    temple_width: Annotated[float, (0.84, 1.0)]
    cheek_width: Annotated[float, (0.82, 1.04)]
    jaw_width: Annotated[float, (0.55, 0.92)]
    chin_width: Annotated[float, (0.18, 0.46)]
    chin_y: Annotated[float, (1.02, 1.34)]
    ear_size: Annotated[float, (0.10, 0.24)]
    eye_x: Annotated[float, (0.33, 0.50)]
    eye_y: Annotated[float, (-0.24, 0.02)]
    eye_width: Annotated[float, (0.14, 0.25)]
    eye_height: Annotated[float, (0.06, 0.15)]
    eye_slant: Annotated[float, (-0.35, 0.35)]
    iris_size: Annotated[float, (0.08, 0.115)]
    brow_gap: Annotated[float, (0.17, 0.34)]
    brow_thickness: Annotated[float, (0.018, 0.085)]
    brow_length: Annotated[float, (0.16, 0.30)]
    brow_slant: Annotated[float, (-0.35, 0.35)]
    brow_arch: Annotated[float, (0.0, 0.14)]
    nose_y: Annotated[float, (0.22, 0.46)]
    nose_width: Annotated[float, (0.10, 0.25)]
    nose_ridge: Annotated[float, (0.03, 0.09)]
    lip_gap: Annotated[float, (0.17, 0.32)]
    mouth_width: Annotated[float, (0.20, 0.44)]
    upper_lip: Annotated[float, (0.02, 0.09)]
    lower_lip: Annotated[float, (0.03, 0.12)]
    lip_redness: Annotated[float, (0.0, 1.0)]
    hairline_y: Annotated[float, (-1.10, -0.55)]
    hair_volume: Annotated[float, (-0.05, 0.32)]  # none below 0
    hair_length: Annotated[float, (-0.7, 1.5)]  # y of the lower end
    hair_parting: Annotated[float, (-1.0, 1.0)]
    hair_waves: Annotated[float, (0.0, 0.10)]
    moustache: Annotated[float, (-1.5, 1.0)]  # none below 0
    beard: Annotated[float, (-1.8, 1.0)]  # none below 0
    glasses: Annotated[float, (-2.0, 1.0)]  # none below 0; thickness of the frame
    glasses_roundness: Annotated[float, (0.0, 1.0)]
    freckles: Annotated[float, (-1.5, 1.0)]  # none below 0
    mole_x: Annotated[float, (-0.5, 0.5)]
    mole_y: Annotated[float, (-0.5, 0.75)]
    mole_size: Annotated[float, (-0.03, 0.06)]  # none below 0.01; the second mole's size is 0.03 minus this
    second_mole_x: Annotated[float, (-0.5, 0.5)]
    second_mole_y: Annotated[float, (-0.5, 0.75)]


OCCLUSIONS = ("none", "block", "mask", "sunglasses", "hand")


class Nuisances(NamedTuple):
    """Nuisances of one image. Each number has its (neutral, low, high) at difficulty 1."""

    yaw_deg: Annotated[float, (0.0, -24.0, 24.0)]
    pitch_deg: Annotated[float, (0.0, -12.0, 12.0)]
    roll_deg: Annotated[float, (0.0, -16.0, 16.0)]
    scale: Annotated[float, (1.0, 0.88, 1.12)]
    shift_x: Annotated[float, (0.0, -0.07, 0.07)]  # shares of the image's width
    shift_y: Annotated[float, (0.0, -0.07, 0.07)]
    warp: Annotated[float, (0.0, 0.0, 0.05)]  # face units
    warp_phase: Annotated[float, (0.0, -3.1, 3.1)]  # radians
    mouth_open: Annotated[float, (0.0, -0.10, 0.22)]  # face units; closed below 0
    smile: Annotated[float, (0.0, -0.06, 0.10)]  # face units
    brow_raise: Annotated[float, (0.0, -0.05, 0.08)]  # face units
    eye_open: Annotated[float, (1.0, 0.5, 1.3)]  # share of the identity's eye_height
    gaze: Annotated[float, (0.0, -0.06, 0.06)]  # face units
    light_side: Annotated[float, (0.0, -1.0, 1.0)]  # -1 from the left, 1 from the right
    light_height: Annotated[float, (-0.2, -1.0, 0.5)]  # -1 from above, 1 from below
    light_strength: Annotated[float, (0.2, 0.0, 0.8)]  # share of directed light
    shadow: Annotated[float, (0.0, -0.4, 0.6)]  # darkness of a cast shadow; none below 0
    shadow_angle_deg: Annotated[float, (0.0, -180.0, 180.0)]
    exposure_stops: Annotated[float, (0.0, -0.9, 0.7)]
    warmth_stops: Annotated[float, (0.0, -0.55, 0.55)]  # red against blue
    tint_stops: Annotated[float, (0.0, -0.25, 0.25)]  # green against red and blue
    saturation: Annotated[float, (1.0, 0.35, 1.4)]
    blur_px: Annotated[float, (0.0, -0.6, 0.9)]  # at 112 pixels; none below 0
    resolution: Annotated[float, (1.0, 0.6, 1.4)]  # share of the full resolution; full above 1
    noise: Annotated[float, (0.0, 0.0, 8.0)]  # grey levels
    jpeg_quality: Annotated[float, (92.0, 40.0, 95.0)]
    occlusion_x: Annotated[float, (0.0, -0.9, 0.9)]  # face units
    occlusion_y: Annotated[float, (0.0, -0.9, 0.9)]
    occlusion_size: Annotated[float, (0.4, 0.25, 0.6)]
    occlusion: str  # one of OCCLUSIONS
    scene: int  # number of the background, the clothes and the noise


@functools.cache
def ranges(model: type) -> dict[str, tuple[float, ...]]:
    """Return the range of each number of `Face` (low, high) or of `Nuisances` (neutral, low, high)."""
    hints = get_type_hints(model, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


# Support points of the ranges of natural colours.
SKIN = np.array([[250, 224, 200], [236, 192, 158], [206, 150, 112], [158, 104, 72], [98, 62, 44]], float)
HAIR = np.array(
    [[26, 22, 24], [62, 40, 28], [112, 70, 40], [150, 70, 34], [206, 164, 96], [190, 188, 186]], float
)
IRIS = np.array([[50, 30, 20], [112, 70, 34], [90, 120, 60], [70, 120, 170], [140, 160, 175]], float)


class Sketch:
    """Polygons in face units with their colours, in the order of rendering."""

    def __init__(self) -> None:
        self._points: list[np.ndarray] = []
        self._depths: list[np.ndarray] = []
        self._is_on_skin: list[bool] = []
        self._colours: list[Colour] = []
        self._opacities: list[float] = []

    def flat(
        self, point_K2: np.ndarray, colour: Colour, depth: np.ndarray | float = 0.0, opacity: float = 1.0
    ) -> None:
        """Add a polygon at one depth, or with one depth for every point."""
        self._add(point_K2, colour, depth, opacity, False)

    def on_skin(self, point_K2: np.ndarray, colour: Colour, opacity: float = 1.0, lift: float = 0.0) -> None:
        """Add a polygon that follows the ellipsoid of the face, raised by `lift`."""
        self._add(point_K2, colour, lift, opacity, True)

    def _add(
        self, point_K2: np.ndarray, colour: Colour, depth: np.ndarray | float, opacity: float, on_skin: bool
    ) -> None:
        self._points.append(point_K2)
        self._depths.append(np.full(len(point_K2), depth, float))
        self._is_on_skin.append(on_skin)
        self._colours.append(colour)
        self._opacities.append(opacity)

    def polygons(self) -> tuple[np.ndarray, list[int], list[tuple[int, ...]]]:
        """Return all points [K, 3], the index after each polygon's last point, and each polygon's RGBA."""
        lengths = [len(points) for points in self._points]
        point_K2 = np.concatenate(self._points)
        radius_K = (point_K2[:, 0] / 1.05) ** 2 + (point_K2[:, 1] / 1.45) ** 2
        skin_K = 0.85 * np.sqrt(np.clip(1 - radius_K, 0.0, 1.0)) * np.repeat(self._is_on_skin, lengths)
        colours = np.clip(self._colours, 0, 255).astype(int).tolist()
        fills = [(*rgb, round(255 * a)) for rgb, a in zip(colours, self._opacities, strict=True)]
        point_K3 = np.column_stack([point_K2, skin_K + np.concatenate(self._depths)])
        return point_K3, np.cumsum(lengths).tolist(), fills


def shade(palette_P3: np.ndarray, position: float) -> Colour:
    """Return the colour at `position` (0 to 1) of a row of colours."""
    at = position * (len(palette_P3) - 1)
    low = min(int(at), len(palette_P3) - 2)
    return palette_P3[low] + (at - low) * (palette_P3[low + 1] - palette_P3[low])


def curve(x_K: np.ndarray, y_K: np.ndarray) -> np.ndarray:
    """Return the curve [K, 2] of two rows of coordinates."""
    return np.array((x_K, y_K)).T


def between(x_K: np.ndarray, upper_K: np.ndarray, lower_K: np.ndarray) -> np.ndarray:
    """Return the polygon [2K, 2] between two curves over the same x."""
    return np.concatenate([curve(x_K, upper_K), curve(x_K, lower_K)[::-1]])


@functools.cache
def _circle(points: int) -> np.ndarray:
    angle = np.arange(points) * (2 * math.pi / points)
    return curve(np.cos(angle), np.sin(angle))


def ellipse(x: float, y: float, rx: float, ry: float, points: int = 14, power: float = 1.0) -> np.ndarray:
    """Return a closed curve [points, 2]; `power` below 1 makes it more rectangular."""
    circle = _circle(points)
    if power != 1:
        circle = np.sign(circle) * np.abs(circle) ** power
    return circle * (rx, ry) + (x, y)


def ribbon(x_K: np.ndarray, y_K: np.ndarray, width_K: np.ndarray | float) -> np.ndarray:
    """Return the polygon that reaches `width_K` above and below a curve."""
    return between(x_K, y_K - width_K, y_K + width_K)


def bar(start: tuple[float, float], end: tuple[float, float], width: float) -> np.ndarray:
    """Return the ribbon [4, 2] along a straight line."""
    (x0, y0), (x1, y1) = start, end
    return ribbon(np.array((x0, x1)), np.array((y0, y1)), width)


@functools.cache
def _catmull_rom(count: int, steps: int) -> np.ndarray:
    """Return the weights [count * steps, count] from control points to points of their closed curve."""
    p1 = np.eye(count)
    p0, p2, p3 = (np.roll(p1, shift, 0)[:, None] for shift in (1, -1, -2))
    p1 = p1[:, None]
    t = (np.arange(steps) / steps)[None, :, None]
    weights = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return weights.reshape(-1, count)


def smooth(control_K2: np.ndarray, steps: int = 5) -> np.ndarray:
    """Return the closed Catmull-Rom curve through the control points: [K * steps, 2]."""
    return _catmull_rom(len(control_K2), steps) @ control_K2


def mirrored(half_K2: Sequence[Sequence[float]]) -> np.ndarray:
    """Return a closed outline from its right half, which is listed from the top down."""
    right = np.asarray(half_K2, float)
    return np.concatenate([right, right[::-1] * (-1, 1)])


_U = np.linspace(-1, 1, 9)  # along a lid, a lip, a brow
_BOW = 1 - _U**2  # 0 at both ends


def sketch(f: Face, n: Nuisances, cloth: Colour) -> Sketch:
    """Return all polygons of a face, its clothes and its occlusion; `cloth` is the colour of the clothes."""
    canvas = Sketch()
    skin = shade(SKIN, f.skin_shade) + f.skin_redness * np.array([12.0, -8, -12])
    hair = shade(HAIR, f.hair_shade)
    _head(canvas, f, skin, hair, cloth)
    _marks(canvas, f, skin)
    _beard(canvas, f, n, hair)
    for side in (-1, 1):
        _eye(canvas, f, n, skin, side)
        _brow(canvas, f, n, hair, side)
    _nose(canvas, f, skin)
    _mouth(canvas, f, n, skin)
    _hair(canvas, f, hair)
    _glasses(canvas, f)
    _occlusion(canvas, f, n, cloth[::-1])
    return canvas


def _head(canvas: Sketch, f: Face, skin: Colour, hair: Colour, cloth: Colour) -> None:
    """Add hair behind the head, shoulders, neck, ears, skin."""
    if f.hair_volume > 0 and f.hair_length > 0:
        wide = f.temple_width + 0.7 * f.hair_volume
        top, low = -1.15 - f.hair_volume, f.hair_length
        back = [(0.55 * wide, top + 0.1), (wide, -0.6), (wide * 1.06, 0.1 + low / 2), (0.9 * wide, low)]
        canvas.flat(smooth(mirrored(back)), hair * 0.75, -0.35)
    canvas.flat(mirrored([(0.3, 1.15), (0.7, 1.5), (1.5, 1.72), (1.7, 2.8)]), cloth, -0.3)
    canvas.flat(mirrored([(0.48, 0.3), (0.44, 1.3), (0.3, 1.75)]), skin * 0.72, -0.25)
    for side in (-1, 1):
        x, y = side * (f.cheek_width + 0.25 * f.ear_size), f.eye_y + 0.16
        canvas.flat(ellipse(x, y, 0.5 * f.ear_size + 0.04, f.ear_size + 0.06), skin * 0.9, -0.1)
        canvas.flat(ellipse(x, y, 0.25 * f.ear_size, 0.6 * f.ear_size), skin * 0.72, -0.1)
    outline = [(0.5, -1.08), (f.temple_width, -0.5), (f.cheek_width, 0.08), (f.jaw_width, 0.66)]
    canvas.flat(smooth(mirrored([*outline, (f.chin_width, f.chin_y - 0.05)])), skin)


def _marks(canvas: Sketch, f: Face, skin: Colour) -> None:
    """Add freckles over nose and cheeks, and moles."""
    if f.freckles > 0:
        for i in range(16):
            across, down = (i * 0.618 + f.mole_x) % 1, (i * 0.755 + f.mole_y) % 1
            spot = ellipse(1.1 * across - 0.55, 0.02 + 0.42 * down, 0.018 + 0.018 * f.freckles, 0.022, 6)
            canvas.on_skin(spot, skin * 0.62, 0.8)
    moles = ((f.mole_x, f.mole_y, f.mole_size), (f.second_mole_x, f.second_mole_y, 0.03 - f.mole_size))
    for x, y, size in moles:
        if size > 0.01:
            canvas.on_skin(ellipse(x, y, size, size, 8), skin * 0.25)


def _beard(canvas: Sketch, f: Face, n: Nuisances, hair: Colour) -> None:
    mouth_y = f.nose_y + f.lip_gap
    if f.beard > 0:
        below = mouth_y + f.lower_lip + max(n.mouth_open, 0.0) + 0.03
        inner = [(0.05, below), (0.9 * f.mouth_width, mouth_y + 0.04), (f.mouth_width + 0.1, mouth_y - 0.1)]
        jaw = [(0.98 * f.jaw_width, 0.62 - 0.2 * f.beard), (f.jaw_width, 0.72)]
        ring = smooth(mirrored([*inner, *jaw, (f.chin_width + 0.05, f.chin_y + 0.03)]))
        # The outline of the head has depth 0, and the beard must end there.
        depth = 0.5 * (1 - np.abs(ring[:, 0]) / f.jaw_width).clip(0)
        canvas.flat(ring, hair, depth, 0.45 + 0.5 * f.beard)
    if f.moustache > 0:
        droop = 0.05 + (0.10 * f.moustache - n.smile) * _U**2
        thickness = (0.02 + 0.05 * f.moustache) * (1.1 - np.abs(_U))
        hairs = ribbon(_U * (f.mouth_width + 0.04), mouth_y - 0.13 + droop, thickness)
        canvas.on_skin(hairs, hair * 0.95, 0.95, 0.05)


def _eye(canvas: Sketch, f: Face, n: Nuisances, skin: Colour, side: int) -> None:
    """Add white, iris and pupil cut off by the lids, lash line and fold."""
    height = f.eye_height * n.eye_open
    x = f.eye_x * side + _U * f.eye_width
    base = f.eye_y - f.eye_slant * f.eye_width * _U * side
    top, bottom = base - height * _BOW**0.7, base + 0.65 * height * _BOW**0.7
    socket = ellipse(f.eye_x * side, f.eye_y - 0.03, 1.25 * f.eye_width, 2.1 * f.eye_height)
    canvas.on_skin(socket, skin * 0.78, 0.45)
    canvas.on_skin(between(x, top, bottom), np.array([244.0, 242, 238]))
    discs = ((f.iris_size, shade(IRIS, f.iris_shade)), (0.5 * f.iris_size, np.array([16.0] * 3)))
    for radius, colour in discs:
        disc = ellipse(f.eye_x * side + n.gaze, f.eye_y - 0.01, radius, radius, 12)
        disc[:, 1] = disc[:, 1].clip(*(np.interp(disc[:, 0], x, lid) for lid in (top, bottom)))
        canvas.on_skin(disc, colour)
    canvas.on_skin(ribbon(x, top, 0.022), skin * 0.22)
    canvas.on_skin(ribbon(x, bottom, 0.008), skin * 0.5)
    canvas.on_skin(ribbon(x, top - 0.35 * f.eye_height, 0.008), skin * 0.55)


def _brow(canvas: Sketch, f: Face, n: Nuisances, hair: Colour, side: int) -> None:
    height = f.brow_gap + n.brow_raise + f.brow_arch * (_BOW - 0.5) + f.brow_slant * f.brow_length * _U * side
    taper = f.brow_thickness * (1.0 - 0.45 * (1 + _U * side) / 2)
    hairs = ribbon(f.eye_x * side * 1.04 + _U * f.brow_length, f.eye_y - height, taper)
    canvas.on_skin(hairs, hair * 0.7)


def _nose(canvas: Sketch, f: Face, skin: Colour) -> None:
    top, tip, wide = f.eye_y - 0.02, f.nose_y, f.nose_width
    shape = [(f.nose_ridge, top), (f.nose_ridge, tip - 0.2), (wide, tip - 0.04), (0.6 * wide, tip + 0.05)]
    ridge = [(0.5 * f.nose_ridge, top), (0.6 * f.nose_ridge, tip - 0.05)]
    canvas.on_skin(smooth(mirrored(shape), 3), skin * 0.84, 0.8, 0.06)
    canvas.on_skin(mirrored(ridge), skin * 1.08, 0.9, 0.14)
    canvas.on_skin(ellipse(0, tip - 0.06, 0.5 * wide, 0.09), skin * 1.05, 0.9, 0.16)
    for side in (-1, 1):
        canvas.on_skin(ellipse(0.5 * wide * side, tip + 0.005, 0.24 * wide, 0.03, 10), skin * 0.35, 1.0, 0.1)


def _mouth(canvas: Sketch, f: Face, n: Nuisances, skin: Colour) -> None:
    """Add lips, and the upper teeth if the mouth is open."""
    gap = max(n.mouth_open, 0.0)
    lip = skin * 0.72 + f.lip_redness * np.array([40.0, -22, -10])
    x = _U * f.mouth_width * (1 - 0.5 * gap)
    middle = f.nose_y + f.lip_gap - n.smile * _U**2
    upper = middle - f.upper_lip * _BOW**0.6 + 0.25 * f.upper_lip * np.exp(-((_U / 0.2) ** 2))
    inner = middle + gap * _BOW
    if gap > 0:
        canvas.on_skin(between(x, middle, inner), np.array([60.0, 18, 20]))
        teeth = between(x, middle, np.minimum(middle + 0.06 * _BOW, inner))
        canvas.on_skin(teeth, np.array([238.0, 234, 224]))
    canvas.on_skin(between(x, upper, middle), lip * 0.9)
    canvas.on_skin(between(x, inner, inner + f.lower_lip * _BOW**0.6), lip)
    canvas.on_skin(ribbon(x, middle, 0.014), skin * 0.3)


def _hair(canvas: Sketch, f: Face, hair: Colour) -> None:
    """Add hair over the forehead, from the outline of the skull to the hairline, with strands."""
    if f.hair_volume <= 0:
        return
    wide, tall = f.temple_width + 0.06 + 0.45 * f.hair_volume, 0.95 + f.hair_volume
    angle = np.linspace(math.pi, 2 * math.pi, 15)
    outer = curve(wide * np.cos(angle), -0.25 + tall * np.sin(angle))
    u = np.linspace(-1, 1, 13)
    x = 0.93 * f.temple_width * u
    line = f.hairline_y + 0.32 * f.hair_parting * u + (0.55 + 0.3 * f.hairline_y) * np.abs(u) ** 3
    line = line + f.hair_waves * np.sin(9 * u + 4 * f.hair_parting)
    side_y = min(0.25, 0.3 * f.hair_length)
    skull = -0.25 - tall * np.sqrt(1 - (x / wide) ** 2)
    edge = np.maximum(np.minimum(line, side_y), skull + 0.05)
    burn = np.array([(wide, side_y), (0.95 * wide, side_y + 0.1), (x[-1], side_y)])
    # Like the outline of the head, the outer edge has depth 0; the hairline lies on the forehead.
    outside = np.concatenate([burn[::-1] * (-1, 1), outer, burn])
    depth = np.concatenate([np.zeros(len(outside)), 0.3 * (1 - np.abs(u))])
    canvas.flat(np.concatenate([outside, curve(x, edge)[::-1]]), hair, depth)
    for part in (0.2, 0.45, 0.7):
        strand = ribbon(x[1:-1], (skull + part * (edge - skull))[1:-1], 0.012)
        canvas.flat(strand, hair * 1.25 + 8, 0.3 * part, 0.55)


def _glasses(canvas: Sketch, f: Face) -> None:
    if f.glasses <= 0:
        return
    frame, thick, y = np.array([30.0, 28, 34]), 0.014 + 0.03 * f.glasses, f.eye_y + 0.03
    height, power = 0.2 + 0.06 * f.glasses_roundness, 0.5 + 0.5 * f.glasses_roundness
    hollow = 1 - thick / 0.15
    for side in (-1, 1):
        rim = ellipse(f.eye_x * side, y, 0.29, height, 20, power)
        hole = ellipse(f.eye_x * side, y, 0.29 * hollow, height * hollow, 20, power)
        canvas.on_skin(np.concatenate([rim, rim[:1], hole[:1], hole[::-1]]), frame, 1.0, 0.1)
        arm = bar((side * (f.eye_x + 0.28), f.eye_y), (side, f.eye_y - 0.03), thick)
        canvas.flat(arm, frame, 0.3)
    bridge = bar((0.28 - f.eye_x, f.eye_y), (f.eye_x - 0.28, f.eye_y), thick)
    canvas.on_skin(bridge, frame, 1.0, 0.14)


def _occlusion(canvas: Sketch, f: Face, n: Nuisances, colour: Colour) -> None:
    """Add an occlusion: a block, a mask, sunglasses or a hand."""
    x, y, size = n.occlusion_x, n.occlusion_y, n.occlusion_size
    if n.occlusion == "block":
        canvas.flat(np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * size + (x, y), colour, 0.5)
    elif n.occlusion == "mask":
        half = [(0.25, f.nose_y - 0.22), (0.75, f.nose_y - 0.1), (f.jaw_width, 0.75), (0.35, f.chin_y + 0.05)]
        canvas.on_skin(smooth(mirrored(half)), colour * 0.4 + 150, 1.0, 0.15)
    elif n.occlusion == "sunglasses":
        for side in (-1, 1):
            lens = ellipse(f.eye_x * side, f.eye_y + 0.03, 0.33, 0.24)
            canvas.on_skin(lens, np.array([20.0, 20, 24]), 1.0, 0.12)
        bridge = bar((-0.9, f.eye_y - 0.05), (0.9, f.eye_y - 0.05), 0.03)
        canvas.on_skin(bridge, colour * 0.2, 1.0, 0.12)
    elif n.occlusion == "hand":
        _hand(canvas, x, y, size, shade(SKIN, f.skin_shade) * 0.92)


def _hand(canvas: Sketch, x: float, y: float, size: float, skin: Colour) -> None:
    """Add four fingers that reach up to (x, y) from below."""
    lean = math.copysign(0.6, x)
    for finger in range(4):
        tip_x, tip_y = x + 0.38 * size * (finger - 1.5), y - size * (0.8 + 0.1 * (finger in (1, 2)))
        top = [(tip_x - 0.15 * size, tip_y), (tip_x, tip_y - 0.1), (tip_x + 0.15 * size, tip_y)]
        base_x, base_y = tip_x + lean, tip_y + 2.2
        polygon = np.array([*top, (base_x + 0.2 * size, base_y), (base_x - 0.2 * size, base_y)])
        canvas.flat(polygon, skin * (0.94 + 0.04 * (finger % 2)), 0.6)
