"""Reads pickles of plain data: lists, tuples, bytes, text, whole numbers, truths, and uint8 arrays as bytes.

A pickle is a program for a stack machine, whose instructions can import and call anything. Python's own
machine can be told what to import, but not what to allocate: nine bytes make it reserve 32 GiB. So this is a
machine of our own. It knows the instructions that plain data needs, has nothing to import or to call, and
holds no more than a small multiple of the file's size. The few globals that bytes and arrays need are names
here; all that can be done with them is in `_call` and `_build`.

Source: pickletools.py of Python, which documents every instruction, read as a description.
"""

from __future__ import annotations

import codecs
import pickletools
import struct
from collections.abc import Callable

_RECONSTRUCT, _FROM_BUFFER, _DTYPE, _NDARRAY, _ENCODE = (
    "reconstruct",
    "from buffer",
    "dtype",
    "ndarray",
    "encode",
)
_GLOBALS = {
    "numpy.ndarray": _NDARRAY,
    "numpy.dtype": _DTYPE,
    "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy.core.numeric._frombuffer": _FROM_BUFFER,
    "numpy._core.numeric._frombuffer": _FROM_BUFFER,
    "_codecs.encode": _ENCODE,
}
_NAMES: dict[bytes, object] = {op.code.encode("latin1"): op.name for op in pickletools.opcodes}
_UINT8 = ("u1", b"u1", "|u1", b"|u1")


class PickleError(ValueError):
    """A pickle that is damaged or wants more than plain data; says what, and at which byte."""


class Array:
    """An array of uint8 in one dimension; `raw` is None until the pickle has said what it holds."""

    raw: bytes | None = None


class _Global:
    """A permitted name."""

    def __init__(self, what: str) -> None:
        self.what = what


class _Dtype:
    """numpy.dtype('uint8'), the only one that is let in."""


class _Mark:
    """Where on the stack a list or tuple of any length begins."""


def load(data: bytes) -> object:
    """What the pickle `data`, of any protocol, holds; strings of Python 2 come as bytes.

    Raises PickleError for anything but plain data.
    """
    return _Machine(data).run()


def kind_of(item: object) -> str:
    """What a message says of an object; never its contents, which may be large."""
    return type(item).__name__.strip("_")


class _Machine:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._stack: list[object] = []
        self._memo: dict[int, object] = {}
        self._encoded_bytes = 0

    def run(self) -> object:
        begin = 0
        try:
            while True:
                begin = self._at
                code = self._take(1)
                if code == b".":
                    return self._pop()
                instruction = _INSTRUCTIONS.get(code)
                if instruction is None:
                    raise PickleError(f"the forbidden instruction {_NAMES.get(code, code)}")
                instruction(self)
        # What numbers and texts raise that are none.
        except (ValueError, struct.error) as error:
            raise PickleError(f"{error} (byte {begin})"[:400]) from None

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise PickleError(
                f"truncated: {count} bytes were promised, {len(self._data) - self._at} are left"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def _line(self) -> bytes:
        end = self._data.find(b"\n", self._at)
        if end < 0:
            raise PickleError("truncated: a line without an end")
        return self._take(end + 1 - self._at)[:-1]

    def _number(self, form: str) -> int:
        number = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        assert isinstance(number, int)
        return number

    def _counted(self, form: str) -> bytes:
        return self._take(self._number(form))

    def _push(self, item: object) -> None:
        self._stack.append(item)

    def _pop(self) -> object:
        if not self._stack or isinstance(self._stack[-1], _Mark):
            raise PickleError("an instruction without its operand")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[object]:
        at = len(self._stack) - 1
        while at >= 0 and not isinstance(self._stack[at], _Mark):
            at -= 1
        if at < 0:
            raise PickleError("a list or tuple without a beginning")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _extend(self, items: list[object]) -> None:
        target = self._pop()
        if not isinstance(target, list):
            raise PickleError(f"items for {kind_of(target)}, expected a list")
        target.extend(items)
        self._push(target)

    def _pop_tuple(self, count: int) -> tuple[object, ...]:
        return tuple(reversed([self._pop() for _ in range(count)]))

    def _remember(self, number: int) -> None:
        self._memo[number] = self._push_back(self._pop())

    def _push_back(self, item: object) -> object:
        self._push(item)
        return item

    def _recall(self, number: int) -> None:
        if number not in self._memo:
            raise PickleError(f"a reference to the unknown object {number}")
        self._push(self._memo[number])

    def _int_or_truth(self) -> None:
        line = self._line()
        self._push(line == b"01" if line in (b"00", b"01") else int(line))

    def _string(self) -> None:
        line = self._line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise PickleError("a string without quotes")
        self._push(codecs.escape_decode(line[1:-1])[0])

    def _global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError(f"a global named by {kind_of(module)} and {kind_of(name)}, expected text")
        full = f"{module[:100]}.{name[:100]}"
        if full not in _GLOBALS:
            raise PickleError(f"the forbidden global {full}")
        self._push(_Global(_GLOBALS[full]))

    def _stack_global(self) -> None:
        self._global(*self._pop_tuple(2))

    def _call(self) -> None:
        called, arguments = self._pop_tuple(2)
        what = called.what if isinstance(called, _Global) else None
        match what, arguments:
            case "reconstruct", (_Global(what="ndarray"), *_):
                self._push(Array())
            case "dtype", (name, *_):
                if not isinstance(name, str | bytes) or name not in _UINT8:
                    shown = repr(name[:20]) if isinstance(name, str | bytes) else kind_of(name)
                    raise PickleError(f"an array of numpy.dtype {shown}, expected uint8")
                self._push(_Dtype())
            case "from buffer", (raw, dtype, shape, _):
                self._push(_filled(Array(), raw, dtype, shape))
            case "encode", (str() as text, str() | b"latin1" as encoding):
                self._push(self._encode(text, encoding))
            case _:
                shown = kind_of(called) if what is None else what
                raise PickleError(
                    f"a call of {shown} with {kind_of(arguments)}, which plain data does not need"
                )

    def _encode(self, text: str, encoding: str | bytes) -> bytes:
        """Python 3 writes bytes this way in the protocols of Python 2."""
        if encoding not in ("latin1", b"latin1"):
            raise PickleError(f"_codecs.encode with {encoding[:20]!r}, expected 'latin1'")
        self._encoded_bytes += len(text)
        if self._encoded_bytes > len(self._data):
            raise PickleError("one text is encoded again and again, to more bytes than the file has")
        return text.encode("latin1")

    def _build(self) -> None:
        target, state = self._pop_tuple(2)
        match target, state:
            # An optional version number comes first.
            case Array(), (shape, dtype, _, raw) | (_, shape, dtype, _, raw):
                self._push(_filled(target, raw, dtype, shape))
            # Byte order and alignment: one byte has none.
            case _Dtype(), _:
                self._push(target)
            case _:
                raise PickleError(f"a state for {kind_of(target)}, which has none")


def _filled(array: Array, raw: object, dtype: object, shape: object) -> Array:
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes):
        raise PickleError(f"an array of {kind_of(dtype)} made from a {kind_of(raw)}")
    if array.raw is not None:
        raise PickleError("an array that is filled twice")
    if not isinstance(shape, tuple) or not all(isinstance(n, int) for n in shape):
        raise PickleError(f"an array whose shape is {kind_of(shape)}, expected whole numbers")
    # A row or a column; compared, not multiplied, since numbers may be as long as the file.
    if [n for n in shape if n != 1] != [len(raw)][len(raw) == 1 :]:
        shown = tuple(n if abs(n) < 1 << 63 else "a huge number" for n in shape[:4])
        raise PickleError(f"an array of shape {shown} with {len(raw)} bytes, expected one row of bytes")
    array.raw = raw
    return array


_Instruction = Callable[[_Machine], object]
_INSTRUCTIONS: dict[bytes, _Instruction] = {
    b"\x80": lambda m: m._number("<B"),  # the protocol, and next the length of a frame, do not matter
    b"\x95": lambda m: m._number("<Q"),
    b"(": lambda m: m._push(_Mark()),
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"I": _Machine._int_or_truth,
    b"J": lambda m: m._push(m._number("<i")),
    b"K": lambda m: m._push(m._number("<B")),
    b"M": lambda m: m._push(m._number("<H")),
    b"L": lambda m: m._push(int(m._line().removesuffix(b"L"))),
    b"\x8a": lambda m: m._push(int.from_bytes(m._counted("<B"), "little", signed=True)),
    b"S": _Machine._string,
    b"T": lambda m: m._push(m._counted("<I")),
    b"U": lambda m: m._push(m._counted("<B")),
    b"B": lambda m: m._push(m._counted("<I")),
    b"C": lambda m: m._push(m._counted("<B")),
    b"\x8e": lambda m: m._push(m._counted("<Q")),
    b"\x96": lambda m: m._push(m._counted("<Q")),
    b"V": lambda m: m._push(m._line().decode("raw-unicode-escape")),
    b"X": lambda m: m._push(m._counted("<I").decode("utf-8", "surrogatepass")),
    b"\x8c": lambda m: m._push(m._counted("<B").decode("utf-8", "surrogatepass")),
    b"\x8d": lambda m: m._push(m._counted("<Q").decode("utf-8", "surrogatepass")),
    b"]": lambda m: m._push([]),
    b"l": lambda m: m._push(m._pop_to_mark()),
    b"a": lambda m: m._extend([m._pop()]),
    b"e": lambda m: m._extend(m._pop_to_mark()),
    b")": lambda m: m._push(()),
    b"t": lambda m: m._push(tuple(m._pop_to_mark())),
    b"\x85": lambda m: m._push(m._pop_tuple(1)),
    b"\x86": lambda m: m._push(m._pop_tuple(2)),
    b"\x87": lambda m: m._push(m._pop_tuple(3)),
    b"p": lambda m: m._remember(int(m._line())),
    b"q": lambda m: m._remember(m._number("<B")),
    b"r": lambda m: m._remember(m._number("<I")),
    b"\x94": lambda m: m._remember(len(m._memo)),
    b"g": lambda m: m._recall(int(m._line())),
    b"h": lambda m: m._recall(m._number("<B")),
    b"j": lambda m: m._recall(m._number("<I")),
    b"c": lambda m: m._global(*(m._line().decode("utf-8") for _ in range(2))),
    b"\x93": _Machine._stack_global,
    b"R": _Machine._call,
    b"b": _Machine._build,
}
