"""Verification sets (`lfw.bin`, `cfp_fp.bin`, ...): pairs of encoded images, and whether each is one person.

The file is a pickle of `(images, issame)`: pair i is images[2i] and images[2i+1]. Unpickling runs whatever
code the file names, and these files come from strangers. So no name in a file is ever looked up: the few
names that bytes and uint8 arrays need are answered by stand-ins defined here, which hold bytes and can do
nothing else; any other name ends the reading. Then the counts and types of what came out are checked.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Readable by every Python 3; from 3 on, pickles hold bytes as they are.
_PROTOCOL = 4


class VerificationFileError(ValueError):
    """A verification file that is not what the format says, or not safe to read; names the file."""


@dataclass(frozen=True, eq=False)
class PairSet:
    """P pairs: 2P encoded images, and bool [P], true where both show one person."""

    images: list[bytes]
    issame_P: np.ndarray

    @property
    def pairs(self) -> int:
        """The number of pairs, P."""
        return len(self.issame_P)


def read_pairs(path: Path) -> PairSet:
    """Read a verification file written by Python 2 or 3, without running anything it names.

    Raises VerificationFileError, which names the file, what was expected and what was found, if the file
    is missing, damaged, names a global other than those of bytes and uint8 arrays, or if the counts differ.
    """
    if not path.is_file():
        raise VerificationFileError(f"{path}: expected a verification file, found none; correct its path")
    try:
        with open(path, "rb") as file:
            content = _BytesOnlyUnpickler(file, encoding="bytes").load()
    # A damaged pickle can raise nearly anything: the documentation of pickle gives no complete list.
    except Exception as error:
        raise VerificationFileError(
            f"{path}: expected a pickle of two lists, encoded images (bytes or uint8 arrays) and booleans; "
            f"found: {str(error) or type(error).__name__}"
        ) from error
    match content:
        case [list() | tuple() as images, list() | tuple() as issame]:
            return _checked(images, issame, path)
    raise VerificationFileError(f"{path}: expected a pair of lists (images, issame), found {_name(content)}")


def write_pairs(path: Path, images: Sequence[bytes], issame: Sequence[bool]) -> None:
    """Write a verification file of 2P encoded images and P booleans; it appears only when complete.

    Raises VerificationFileError if the counts differ, an image is not bytes, or a truth is not a boolean.
    """
    pairs = _checked(images, issame, path)
    partial = path.with_name(path.name + ".part")
    try:
        with open(partial, "wb") as file:
            pickle.dump((pairs.images, pairs.issame_P.tolist()), file, protocol=_PROTOCOL)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
    raw = item.raw if isinstance(item, _Array) else item
    if not isinstance(raw, bytes | bytearray) or not raw:
        raise VerificationFileError(f"{where}: expected the bytes of an encoded image, found {_name(raw)}")
    return bytes(raw)


def _truth(item: object, where: str) -> bool:
    if not isinstance(item, int | np.bool_) or item not in (0, 1):
        raise VerificationFileError(f"{where}: expected true or false, found {_name(item)}")
    return bool(item)


def _name(item: object) -> str:
    """What an error says of an object; never its contents, which may be large."""
    if isinstance(item, tuple | list):
        return f"a {type(item).__name__} of {len(item)}: {[type(part).__name__ for part in item[:4]]}"
    return "no bytes" if item in (b"", bytearray()) else type(item).__name__.strip("_")


class _Dtype:
    """Stands for numpy.dtype('uint8'), the only one that is let in."""

    def __init__(self, name: object, *_: object) -> None:
        if name not in ("u1", b"u1", "|u1", b"|u1"):
            raise pickle.UnpicklingError(f"an array of numpy.dtype {name!r:.40}, expected uint8")

    def __setstate__(self, _: object) -> None:
        """Ignore byte order and alignment: one byte has none."""


class _Array:
    """Stands for a numpy array of uint8 that holds one encoded image."""

    raw = b""

    def __setstate__(self, state: tuple) -> None:
        shape, dtype, _, raw = state[-4:]  # an optional version number comes first
        self._fill(raw, dtype, shape)

    @classmethod
    def from_buffer(cls, raw: object, dtype: object, shape: object, _order: object) -> _Array:
        array = cls()
        array._fill(raw, dtype, shape)
        return array

    def _fill(self, raw: object, dtype: object, shape: Any) -> None:
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray):
            raise pickle.UnpicklingError(f"an array of {_name(dtype)} made from {_name(raw)}")
        if max(shape, default=0) != len(raw) or math.prod(shape) != len(raw):
            raise pickle.UnpicklingError(
                f"an array of shape {shape!r:.60} with {len(raw)} bytes, expected one row of bytes"
            )
        self.raw = bytes(raw)


def _encode(text: str, encoding: object) -> bytes:
    """Python 3 writes bytes this way in the protocols of Python 2; `codecs.encode` itself can do far more."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"_codecs.encode with {encoding!r:.40}, expected 'latin1'")
    return text.encode("latin1")


class _StandIn:
    """What a permitted global is for the pickle: something to call, without attributes it could change."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call

    def __call__(self, *args: object) -> object:
        return self._call(*args)

    def __setstate__(self, _: object) -> None:
        raise pickle.UnpicklingError("an attempt to change a global")


_RECONSTRUCT = _StandIn(lambda *_: _Array())
_FROM_BUFFER = _StandIn(_Array.from_buffer)
_STAND_INS = {
    "numpy.ndarray": _RECONSTRUCT,
    "numpy.dtype": _StandIn(_Dtype),
    "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy.core.numeric._frombuffer": _FROM_BUFFER,
    "numpy._core.numeric._frombuffer": _FROM_BUFFER,
    "_codecs.encode": _StandIn(_encode),
}


class _BytesOnlyUnpickler(pickle.Unpickler):
    """An unpickler that imports nothing."""

    def find_class(self, module: str, name: str) -> object:
        """The stand-in of a permitted global. Raises UnpicklingError for any other, naming it."""
        try:
            return _STAND_INS[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"the forbidden global {module}.{name}"[:200]) from None
