"""Alignment of a face by five landmarks.

    image_112 = aligned(image, landmark_52, 112, "folder/1.jpg")

The similarity transform (rotation, uniform scale, translation; no reflection) that maps the landmarks to a
template with the least squared error has a closed form. The image is resampled through its inverse. The
origin of coordinates is the centre of the top left pixel, as in detectors and OpenCV.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

# Eyes, tip of the nose, corners of the mouth in a 112 x 112 image, as x and y: InsightFace's `arcface_dst`,
# python-package/insightface/utils/face_align.py in https://github.com/deepinsight/insightface .
TEMPLATE_SIZE = 112
TEMPLATE_52 = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def aligned(image: Image.Image, landmark_52: np.ndarray, image_size: int, name: str) -> Image.Image:
    """Return the aligned face as a square of `image_size` pixels; pixels outside the image are black.

    Resampling is bilinear without antialiasing, as for the published training sets and results. Raises
    ValueError, with `name` for the image, if the landmarks do not determine a transform.
    """
    try:
        forward_23 = similarity_transform(landmark_52, TEMPLATE_52 * (image_size / TEMPLATE_SIZE))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    linear_22 = np.linalg.inv(forward_23[:, :2])
    # Pillow's origin is the corner of the top left pixel, half a pixel from its centre.
    shift_2 = 0.5 - linear_22 @ (forward_23[:, 2] + 0.5)
    return image.transform(
        (image_size, image_size),
        Image.Transform.AFFINE,
        tuple(np.column_stack([linear_22, shift_2]).ravel()),
        Image.Resampling.BILINEAR,
    )


def similarity_transform(from_N2: np.ndarray, to_N2: np.ndarray) -> np.ndarray:
    """Return the matrix, float64 [2, 3], that maps (x, y, 1) of `from_N2` to `to_N2` by least squares.

    S. Umeyama, Least-squares estimation of transformation parameters between two point patterns, IEEE PAMI
    13(4), 1991, eq. 40 to 43. Raises ValueError if points are non-finite or determine no rotation.
    """
    from_N2, to_N2 = np.asarray(from_N2, np.float64), np.asarray(to_N2, np.float64)
    mean_from_2, mean_to_2 = from_N2.mean(0), to_N2.mean(0)
    from_N2, to_N2 = from_N2 - mean_from_2, to_N2 - mean_to_2
    variance = (from_N2**2).sum()
    left_22, size_2, right_22 = np.linalg.svd(np.nan_to_num(to_N2.T @ from_N2))
    sign_2 = np.array([1.0, np.sign(np.linalg.det(left_22 @ right_22))])
    spread = float(size_2 @ sign_2)
    # For points that fit well, spread is near sqrt(variance * (to_N2 ** 2).sum()).
    if not np.isfinite(variance) or spread <= 1e-6 * np.sqrt(variance * (to_N2**2).sum()):
        points = np.round(from_N2 + mean_from_2, 2).tolist()
        raise ValueError(
            f"expected the five landmarks of a face, found {points}, which determine no rotation and scale; "
            "correct them, or remove the image"
        )
    linear_22 = spread / variance * (left_22 * sign_2) @ right_22
    return np.column_stack([linear_22, mean_to_2 - linear_22 @ mean_from_2])
