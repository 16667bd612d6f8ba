"""Verification sets (`lfw.bin`, `cfp_fp.bin`, ...): pairs of encoded images, labelled as genuine or impostor.

The file is a pickle of `(images, issame)`: pair i is images[2i] and images[2i+1]. Python's unpickling can run
code that a file names, and these files come from untrusted sources. So `safe_pickle` reads them, which
accepts only plain data; then the counts and types of the content are checked.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.common.atomic_write import private_file
from data_pipeline.common.data_file import read_data_file
from data_pipeline.formats.safe_pickle import Array, PickleError, kind_of, load

# Every Python 3 reads protocol 4; from protocol 3 on, pickles store bytes without an encoding.
_PROTOCOL = 4
# The published sets have less than half a gigabyte. Reading takes a small multiple of the size in memory.
_MOST_BYTES = 1 << 31


class VerificationFileError(ValueError):
    """A verification file does not follow its format, or is unsafe to read; the message names the file."""


@dataclass(frozen=True, eq=False)
class PairSet:
    """P pairs: 2P encoded images, and bool [P], true where both images show the same identity."""

    images: list[bytes]
    issame_P: np.ndarray

    @property
    def pairs(self) -> int:
        """The number of pairs, P."""
        return len(self.issame_P)


def read_pairs(path: Path) -> PairSet:
    """Read a verification file written by Python 2 or 3, without running code that it names.

    Raises VerificationFileError, which names the file, the expected and the found content, if the file is
    missing or damaged, if it needs more than bytes and uint8 arrays, or if the counts differ.
    """
    try:
        content = load(read_data_file(path, _MOST_BYTES))
    except (FileNotFoundError, IsADirectoryError):
        raise VerificationFileError(
            f"{path}: expected a verification file, found none; correct its path"
        ) from None
    except OSError as error:
        raise VerificationFileError(
            f"{path}: expected a verification file, found: {error.strerror}"
        ) from error
    except PickleError as error:
        raise VerificationFileError(
            f"{path}: expected a pickle of two lists, encoded images (bytes or uint8 arrays) and booleans; "
            f"found: {error}"
        ) from error
    match content:
        case [list() | tuple() as images, list() | tuple() as issame]:
            return _checked(images, issame, path)
    raise VerificationFileError(f"{path}: expected a pair of lists (images, issame), found {_name(content)}")


def write_pairs(path: Path, images: Sequence[bytes], issame: Sequence[bool]) -> None:
    """Write a verification file of 2P encoded images and P booleans; it appears only when complete.

    Raises VerificationFileError if the counts differ, an image is not bytes, or an `issame` is not a boolean.
    """
    pairs = _checked(images, issame, path)
    with private_file(path) as partial, open(partial, "wb") as file:
        pickle.dump((pairs.images, pairs.issame_P.tolist()), file, protocol=_PROTOCOL)


def _checked(images: Sequence[object], issame: Sequence[object], path: Path) -> PairSet:
    if len(images) != 2 * len(issame) or len(issame) == 0:
        raise VerificationFileError(
            f"{path}: expected two images for each of at least one pair, "
            f"found {len(images)} images and {len(issame)} booleans"
        )
    images_bytes = [_image(item, f"{path}: image {i}") for i, item in enumerate(images)]
    truths = [_truth(item, f"{path}: issame {i}") for i, item in enumerate(issame)]
    return PairSet(images_bytes, np.array(truths, bool))


def _image(item: object, where: str) -> bytes:
    raw = (item.raw or b"") if isinstance(item, Array) else item
    if not isinstance(raw, bytes) or not raw:
        raise VerificationFileError(f"{where}: expected the bytes of an encoded image, found {_name(raw)}")
    return raw


def _truth(item: object, where: str) -> bool:
    if not isinstance(item, int | np.bool_) or item not in (0, 1):
        raise VerificationFileError(f"{where}: expected true or false, found {_name(item)}")
    return bool(item)


def _name(item: object) -> str:
    """Return the description of an object for errors, without its contents, which may be large."""
    if isinstance(item, tuple | list):
        return f"a {kind_of(item)} of {len(item)}: {[kind_of(part) for part in item[:4]]}"
    return "no bytes" if item == b"" else kind_of(item)
