"""Reads pickles of plain data: lists, tuples, bytes, text, integers, booleans, and uint8 arrays as bytes.

A pickle is a program for a stack machine whose instructions import and call. Here only the instructions of
plain data are carried out, and the few globals that bytes and arrays need are functions of this file.
`pickle.Unpickler`, in C, cannot serve: nine bytes make its memo reserve 32 GiB. `pickle._Unpickler`, the same
class in Python, holds a small multiple of the file's size.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from typing import ClassVar

_PLAIN = """
    PROTO MARK STOP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
    UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL BUILD
"""
_CODES = {op.name: ord(op.code) for op in pickletools.opcodes}
_NAMES = {code: name for name, code in _CODES.items()}
_NDARRAY = "numpy.ndarray"  # only an argument of _reconstruct
_MAX_ARGUMENTS = 4
_UINT8 = ("u1", b"u1", "|u1", b"|u1")
# The exceptions of pickle's own instructions for malformed operands.
_MALFORMED = (pickle.UnpicklingError, ValueError, TypeError, AttributeError, IndexError, struct.error)


class PickleError(ValueError):
    """A pickle is damaged or needs more than plain data; the message tells the reason and the byte."""


class Array:
    """A one-dimensional uint8 array; `raw` is None until the pickle gives its bytes."""

    raw: bytes | None = None

    def __setstate__(self, state: object) -> None:
        match state:
            # An optional version number comes first.
            case (shape, dtype, _, raw) | (_, shape, dtype, _, raw):
                _fill(self, raw, dtype, shape)
            case _:
                raise PickleError(f"an array with the state {kind_of(state)}")


class _Dtype:
    """Stand-in for numpy.dtype('uint8'), the only accepted one."""

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and alignment: one byte has none."""


def load(data: bytes) -> object:
    """Return the content of the pickle `data`, of any protocol; strings of Python 2 are returned as bytes.

    Raises PickleError for anything but plain data.
    """
    file = io.BytesIO(data)
    try:
        return _Unpickler(file, len(data)).load()
    except EOFError:
        raise PickleError(f"truncated at byte {len(data)}") from None
    except KeyError as error:
        code = error.args[0]
        raise PickleError(
            f"the forbidden instruction {_NAMES.get(code, code)} (byte {file.tell()})"
        ) from None
    except _MALFORMED as error:
        raise PickleError(f"{error} (byte {file.tell()})"[:400]) from None


def kind_of(item: object) -> str:
    """Return the description of an object for a message, without its contents, which may be large."""
    return type(item).__name__.strip("_")


def _dtype(name: object, *_: object) -> _Dtype:
    if not isinstance(name, str | bytes) or name not in _UINT8:
        shown = repr(name[:20]) if isinstance(name, str | bytes) else kind_of(name)
        raise PickleError(f"an array of numpy.dtype {shown}, expected uint8")
    return _Dtype()


def _fill(array: Array, raw: object, dtype: object, shape: object) -> Array:
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes):
        raise PickleError(f"an array of {kind_of(dtype)} made from a {kind_of(raw)}")
    if array.raw is not None:
        raise PickleError("an array that is filled twice")
    # A row or a column. Numbers may be as long as the file: they are compared, not multiplied.
    rows = [n for n in shape if n != 1] if isinstance(shape, tuple) and len(shape) <= 2 else None
    if rows != [len(raw)][len(raw) == 1 :]:
        raise PickleError(f"an array with {len(raw)} bytes in another shape, expected one row of bytes")
    array.raw = raw
    return array


class _Unpickler(pickle._Unpickler):
    """Python's stack machine, reduced to the instructions and globals of plain data."""

    stack: list[object]

    def __init__(self, file: io.BytesIO, size_bytes: int) -> None:
        super().__init__(file, fix_imports=False, encoding="bytes")
        self._encodable_chars = size_bytes

    def find_class(self, module: str, name: str) -> object:
        """Return the stand-in for a global; nothing is imported."""
        match module, name:
            case "numpy", "ndarray":
                return _NDARRAY
            case "numpy", "dtype":
                return _dtype
            case "numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct":
                return lambda *_: Array()
            case "numpy.core.numeric" | "numpy._core.numeric", "_frombuffer":
                return lambda raw, dtype, shape, _: _fill(Array(), raw, dtype, shape)
            case "_codecs", "encode":
                return self._encode
        raise PickleError(f"the forbidden global {module[:100]}.{name[:100]}")

    def _encode(self, text: object, encoding: object) -> bytes:
        """Encode a text: Python 3 writes bytes this way in the protocols of Python 2."""
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise PickleError(f"_codecs.encode of {kind_of(text)}, expected text and 'latin1'")
        self._encodable_chars -= len(text)
        if self._encodable_chars < 0:
            raise PickleError("one text is encoded again and again, to more bytes than the file has")
        return text.encode("latin1")

    def _call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        # Copying a long list of arguments for every call would take quadratic time.
        if not callable(function) or not isinstance(arguments, tuple) or len(arguments) > _MAX_ARGUMENTS:
            raise PickleError(f"a call of {kind_of(function)} with {kind_of(arguments)}")
        self.stack.append(function(*arguments))

    dispatch: ClassVar = {
        _CODES[name]: pickle._Unpickler.dispatch[_CODES[name]] for name in _PLAIN.split()
    } | {
        _CODES["REDUCE"]: _call,
        # A frame only announces how much could be read at once.
        _CODES["FRAME"]: lambda self: self.read(8),
        # pickle's own instruction reserves the announced size before it reads.
        _CODES["BYTEARRAY8"]: pickle._Unpickler.dispatch[_CODES["BINBYTES8"]],
    }
