"""Verification sets: what is written is read, old writers are understood, and hostile files run nothing."""

import copyreg
import functools
import importlib
import operator
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.formats.pair_file import VerificationFileError, read_pairs, write_pairs

IMAGES = [b"\xff\xd8first", b"\x00\n'\\\"second", b"\x89PNG third", bytes(range(256)) * 2]
SAME = [True, False]


def saved(tmp_path, content):
    path = tmp_path / "set.bin"
    path.write_bytes(content)
    return path


def assert_is_the_set(pairs):
    assert pairs.images == IMAGES
    assert pairs.issame_P.dtype == bool
    assert pairs.issame_P.tolist() == SAME
    assert pairs.pairs == 2


@given(
    pairs=st.lists(
        st.tuples(st.binary(min_size=1), st.binary(min_size=1), st.booleans()), min_size=1, max_size=9
    )
)
def test_what_is_written_is_read(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("sets") / "set.bin"
    images = [image for left, right, _ in pairs for image in (left, right)]
    write_pairs(path, images, [same for *_, same in pairs])
    read = read_pairs(path)
    assert read.images == images
    assert read.issame_P.tolist() == [same for *_, same in pairs]


def test_numpy_booleans_are_written_too_and_no_partial_file_stays(tmp_path):
    write_pairs(tmp_path / "set.bin", IMAGES, np.array(SAME))
    assert_is_the_set(read_pairs(tmp_path / "set.bin"))
    assert [p.name for p in tmp_path.iterdir()] == ["set.bin"]


def test_insightface_s_own_way_of_reading_agrees(tmp_path):
    write_pairs(tmp_path / "set.bin", IMAGES, SAME)
    with open(tmp_path / "set.bin", "rb") as file:
        assert pickle.load(file, encoding="bytes") == (IMAGES, SAME)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "item",
    [
        bytes,
        lambda image: np.frombuffer(image, np.uint8),
        lambda image: np.frombuffer(image, np.uint8).copy().reshape(-1, 1),
    ],
    ids=["bytes", "array", "column"],
)
def test_every_protocol_of_python_3_is_read(tmp_path, protocol, item):
    content = ([item(image) for image in IMAGES], SAME)
    assert_is_the_set(read_pairs(saved(tmp_path, pickle.dumps(content, protocol=protocol))))


@pytest.mark.parametrize("wrap", [list, tuple])
def test_lists_and_tuples_are_equal_and_so_are_ones_and_truths(tmp_path, wrap):
    content = wrap([wrap(map(bytearray, IMAGES)), wrap([1, 0])])
    assert_is_the_set(read_pairs(saved(tmp_path, pickle.dumps(content, protocol=5))))


def test_the_former_home_of_numpy_s_functions_is_known(tmp_path):
    content = ([np.frombuffer(image, np.uint8) for image in IMAGES], SAME)
    old = pickle.dumps(content, protocol=2).replace(b"numpy._core", b"numpy.core")
    assert_is_the_set(read_pairs(saved(tmp_path, old)))
    newer = pickle.dumps(content, protocol=5)
    frame_bytes = struct.unpack("<Q", newer[3:11])[0]
    old = newer[:3] + struct.pack("<Q", frame_bytes - 1) + newer[11:]
    old = old.replace(b"\x13numpy._core.numeric", b"\x12numpy.core.numeric")
    assert_is_the_set(read_pairs(saved(tmp_path, old)))


def python2_string(data):
    """Protocol 0's way to write a str: its repr, which is that of Python 3 without the b."""
    return b"S" + repr(data)[1:].encode() + b"\n"


def python2_array(data):
    """Numpy's array as Python 2 pickled it in protocol 2."""
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01J" + struct.pack("<i", len(data)) + b"\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<i", len(data))
        + data
        + b"tb"
    )


PYTHON_2 = {
    "protocol 0": b"((lp0\n" + b"".join(python2_string(i) + b"a" for i in IMAGES) + b"(lp1\nI01\naI00\nat.",
    "protocol 0, integers": b"((l" + b"".join(python2_string(i) + b"a" for i in IMAGES) + b"(lI1\naI0\nat.",
    "protocol 2": b"\x80\x02](" + b"".join(b"T" + struct.pack("<i", len(i)) + i for i in IMAGES) + b"e]("
    b"\x88\x89e\x86.",
    "protocol 2, arrays": b"\x80\x02](" + b"".join(map(python2_array, IMAGES)) + b"e](\x88\x89e\x86.",
}  # fmt: skip


@pytest.mark.parametrize("content", PYTHON_2.values(), ids=PYTHON_2)
def test_files_of_python_2_are_read(tmp_path, content):
    assert_is_the_set(read_pairs(saved(tmp_path, content)))


class Exploit:
    """Calls something when it is unpickled."""

    def __init__(self, call, *args):
        self.reduced = call, args

    def __reduce__(self):
        return self.reduced


def set_with(item):
    return [item, *IMAGES[1:]], SAME


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("call", "argument", "name"),
    [
        (os.system, "touch {}", "posix.system"),
        (eval, "open({!r}, 'w')", "eval"),
        (exec, "open({!r}, 'w')", "exec"),
        (open, "{}", "open"),
        (functools.partial(open, mode="w"), "{}", "functools.partial"),
        (operator.methodcaller("touch"), "{}", "operator.methodcaller"),
        (getattr, "{}", "getattr"),
        (importlib.import_module, "this", "import_module"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_pickle_that_calls_is_refused(tmp_path, protocol, call, argument, name):
    target = tmp_path / "ran"
    exploit = Exploit(call, argument.format(str(target)))
    path = saved(tmp_path, pickle.dumps(set_with(exploit), protocol=protocol))
    with pytest.raises(VerificationFileError, match=rf"set\.bin: .*forbidden global .*{name}"):
        read_pairs(path)
    assert not target.exists()


def test_an_object_array_is_refused_before_its_items_are_made(tmp_path):
    target = tmp_path / "ran"
    array = np.array([Exploit(os.system, f"touch {target}")], dtype=object)
    for protocol in range(6):
        with pytest.raises(VerificationFileError, match=r"set\.bin: .*dtype 'O8'"):
            read_pairs(saved(tmp_path, pickle.dumps(set_with(array), protocol=protocol)))
    assert not target.exists()


NDARRAY, RECONSTRUCT, DTYPE = "cnumpy\nndarray\n", "cnumpy.core.multiarray\n_reconstruct\n", "cnumpy\ndtype\n"
ARRAY = RECONSTRUCT + f"({NDARRAY}(I0\ntS'b'\ntR"
BY_HAND = {
    "python 2 names": ("c__builtin__\neval\n(S'1'\ntR.", r"__builtin__\.eval"),
    "instance opcode": ("(S'true'\nios\nsystem\n.", "instruction INST"),
    "object opcode": ("(cos\nsystem\nS'true'\no.", r"os\.system"),
    "stack global": ("\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", r"os\.system"),
    "attribute of a permitted module": (
        "\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.",
        r"numpy\.ndarray\.__class__",
    ),
    "globals of a permitted function": (
        "\x80\x04\x8c\x15numpy.core.multiarray\x8c\x18_reconstruct.__globals__\x93.",
        r"_reconstruct\.__globals__",
    ),
    "numpy's own way to run text": ("cnumpy.testing._private.utils\nrunstring\n(S'1'\n(dtR.", "runstring"),
    "getattr through copyreg": ("ccopy_reg\n_reconstructor\n(c__builtin__\nobject\nNtR.", "_reconstructor"),
    "a dictionary": (RECONSTRUCT + "(dS'_call'\n" + NDARRAY + "sb.", "instruction DICT"),
    "a global changed by a state": (RECONSTRUCT + "(NNtb.", "expected a pair of lists .* found function"),
    "a list changed by a state": ("]Nb.", "found a list of 0"),
    "a call of what is none": ("]]R.", "a call of list"),
    "a call of a name that makes nothing": (NDARRAY + ")R.", "a call of str"),
    "new object of a stand-in": ("\x80\x02" + NDARRAY + ")\x81.", "instruction NEWOBJ"),
    "persistent id": ("Pos.system\n.", "instruction PERSID"),
    "extension code": ("\x80\x02\x82\xf0.", "instruction EXT1"),
    "codec other than latin1": ("c_codecs\nencode\n(Vimages\nVrot13\ntR.", "encode of str, expected text"),
    "codec by default": ("c_codecs\nencode\n(Vimages\ntR.", "missing 1 required positional argument"),
    "codecs by its other name": ("ccodecs\nencode\n(Vimages\nVlatin1\ntR.", r"codecs\.encode"),
    "structured dtype": (DTYPE + "(S'V8'\nI0\nI1\ntR.", r"dtype b'V8'"),
    "dtype from a list of fields": (DTYPE + "((lp0\n(S'x'\nS'O'\ntatR.", "dtype list"),
    "array without dtype": (ARRAY + "(I1\n(I1\ntNI00\nS'x'\ntb.", "NoneType"),
    "array with objects for bytes": (
        ARRAY + "(I1\n(I1\nt" + DTYPE + "(S'u1'\ntRI00\n(lp0\nI1\natb.",
        "made from a list",
    ),
    "array larger than its bytes": (
        ARRAY + "(I1\n(I1000000\nt" + DTYPE + "(S'u1'\ntRI00\nS'x'\ntb.",
        "with 1 bytes in another shape",
    ),
    "array of pixels": (
        ARRAY + "(I1\n(I2\nI2\nt" + DTYPE + "(S'u1'\ntRI00\nS'abcd'\ntb.",
        "with 4 bytes in another shape, expected one row",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "complaint"), BY_HAND.values(), ids=BY_HAND)
def test_a_hostile_file_put_together_by_hand_is_refused(tmp_path, content, complaint):
    with pytest.raises(VerificationFileError, match=rf"set\.bin: .*{complaint}"):
        read_pairs(saved(tmp_path, content.encode("latin1")))
    # and it has changed nothing for the next file
    assert_is_the_set(read_pairs(saved(tmp_path, PYTHON_2["protocol 2, arrays"])))


def text(words):
    return b"S'" + words.encode() + b"'\n"


TOUCH = "touch {}"
# Runs the command when its items are asked for.
MAP = b"cbuiltins\nmap\n(cos\nsystem\n(" + text(TOUCH) + b"lt\x81"
REAL_EXPLOITS = {
    "REDUCE": b"cos\nsystem\n(" + text(TOUCH) + b"tR.",
    "eval": b"cbuiltins\neval\n(" + text('open("{}", "w")') + b"tR.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text(TOUCH) + b"\x85R.",
    "INST": b"(" + text(TOUCH) + b"ios\nsystem\n.",
    "OBJ": b"(cos\nsystem\n" + text(TOUCH) + b"o.",
    "NEWOBJ": b"\x80\x02cbuiltins\ntuple\n" + MAP + b"\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04cbuiltins\ntuple\n" + MAP + b"\x85}\x92.",
    "BUILD": b"\x80\x02cfunctools\npartial\ncbuiltins\nprint\n\x85\x81(cos\nsystem\n"
    + text(TOUCH)
    + b"\x85}}tb)R.",
    "EXT1": b"\x80\x02\x82\xf0(" + text(TOUCH) + b"tR.",
    "copyreg": b"ccopyreg\n_reconstructor\n(cbuiltins\ntuple\ncbuiltins\ntuple\n" + MAP + b"tR.",
    "importlib": b"cimportlib\nimport_module\n(" + text("os") + b"tRcoperator\nmethodcaller\n("
    + text("system")
    + text(TOUCH)
    + b"tRp0\n0p1\n0g0\n(g1\ntR.",
    "itself": b"c_pickle\nloads\n(c_codecs\nencode\n(Vcos\\u000asystem\\u000a(S'touch {}'\\u000atR.\n"
    b"Vlatin1\ntRtR.",
}  # fmt: skip


@pytest.fixture
def registered_extension():
    copyreg.add_extension("os", "system", 0xF0)
    yield
    copyreg.remove_extension("os", "system", 0xF0)
    copyreg.clear_extension_cache()


@pytest.mark.parametrize("content", REAL_EXPLOITS.values(), ids=REAL_EXPLOITS)
@pytest.mark.usefixtures("registered_extension")
def test_what_python_s_unpickler_runs_does_not_run(tmp_path, content):
    target = tmp_path / "ran"
    content = content.replace(b"{}", str(target).encode())
    pickle.loads(content, encoding="latin1")
    assert target.exists()
    target.unlink()
    with pytest.raises(
        VerificationFileError, match=r"set\.bin: .*forbidden (global|instruction) .*\(byte \d+\)"
    ):
        read_pairs(saved(tmp_path, content))
    assert not target.exists()


def test_an_object_array_of_numpy_s_own_format_runs_nothing(tmp_path):
    target = tmp_path / "ran"
    array = np.array([Exploit(os.system, f"touch {target}")], dtype=object)
    np.save(tmp_path / "set.npy", array)
    np.savez(tmp_path / "set.npz", array)
    for name in ("set.npy", "set.npz"):
        with pytest.raises(VerificationFileError, match="expected a pickle"):
            read_pairs(tmp_path / name)
    assert not target.exists()


HUGE = b"\xff" * 7 + b"\x7f"
# Object 60 is a list of two times object 59, that one of two times object 58...
LAUGHS = b"\x80\x02(]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b"l"
BOMBS = {
    "LONG4": b"\x80\x02\x8b" + HUGE[4:] + b".",
    "BINBYTES": b"\x80\x03B\xff\xff\xff\xff.",
    "BINBYTES8": b"\x80\x04\x8e" + HUGE + b".",
    "BYTEARRAY8": b"\x80\x05\x96" + HUGE + b".",
    "BINUNICODE8": b"\x80\x04\x8d" + HUGE + b".",
    "BINSTRING": b"\x80\x02T" + HUGE[4:] + b".",
    "FRAME": b"\x80\x04\x95" + HUGE + b"N.",
    "memo": b"\x80\x02]r" + HUGE[4:] + b".",
    "memo in digits": b"]p9999999999999\n.",
    "digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "one text encoded many times": b"V" + b"x" * 100_000 + b"\np0\n"
    + b"c_codecs\nencode\n(g0\nVlatin1\ntR" * 10_000,
    "2^60 items as dtype": LAUGHS + b"cnumpy\ndtype\nh\x3c\x85R.",
    "2^60 items as arguments": LAUGHS + b"cnumpy\ndtype\nh\x3cR.",
    "2^60 items as shape": LAUGHS + ARRAY.encode() + b"(h\x3ccnumpy\ndtype\nU\x02u1\x85RNU\x01xtb.",
    "2^60 items in a shape": LAUGHS + ARRAY.encode() + b"(h\x3c\x85cnumpy\ndtype\nU\x02u1\x85RNU\x01xtb.",
    "2^60 items as key": LAUGHS.replace(b"](", b"(").replace(b"e", b"t") + b"}h\x3cNs.",
    "2^60 items as image": LAUGHS + b"](h\x3ch\x00e](\x88e\x86.",
    "huge shape": ARRAY.encode() + b"((" + b"K\x02" * 100_000 + b"tcnumpy\ndtype\n(S'u1'\ntRI00\nS'xx'\ntb.",
    "negative shape": ARRAY.encode() + b"((" + b"J\0\0\0\x80" * 9 + b"K\x01t"
    + b"cnumpy\ndtype\n(S'u1'\ntRI0\nS'x'\ntb.",
    "2^60 tuples in a shape": LAUGHS.replace(b"](", b"(").replace(b"e", b"t") + ARRAY.encode()
    + b"(h\x3c\x85cnumpy\ndtype\nU\x02u1\x85RNU\x01xtb.",
    "arguments without end": b"((" + b"N" * 100_000 + b"tp0\n" + b"cnumpy\ndtype\ng0\nR" * 10_000 + b".",
    "deep lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuples": b")" + b"\x85" * 100_000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_with_memory_in_proportion_to_the_file(tmp_path, content):
    path = saved(tmp_path, content)
    tracemalloc.start()
    try:
        with pytest.raises(VerificationFileError, match=r"set\.bin: "):
            read_pairs(path)
        assert tracemalloc.get_traced_memory()[1] < 200_000 + 100 * len(content)
    finally:
        tracemalloc.stop()


def test_an_array_never_filled_is_not_an_image(tmp_path):
    content = f"((l{ARRAY}aS'b'\na(lI1\nat."
    with pytest.raises(VerificationFileError, match=r"set\.bin: image 0: .* found no bytes"):
        read_pairs(saved(tmp_path, content.encode()))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(VerificationFileError, match=r"absent\.bin: expected a verification file, found none"):
        read_pairs(tmp_path / "absent.bin")


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\xff\xd8\xff\xe0 a JPEG"])
def test_a_file_that_is_no_pickle_is_named(tmp_path, content):
    with pytest.raises(VerificationFileError, match=r"set\.bin: expected a pickle"):
        read_pairs(saved(tmp_path, content))


def test_a_file_truncated_anywhere_is_refused(tmp_path):
    path = tmp_path / "set.bin"
    write_pairs(path, IMAGES, SAME)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(VerificationFileError, match=r"set\.bin: expected a pickle of .* found: \w+"):
            read_pairs(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ((IMAGES[:3], SAME), "two images for each .* found 3 images and 2 booleans"),
        ((IMAGES, [True]), "found 4 images and 1 booleans"),
        (([], []), "at least one pair, found 0 images"),
        ((IMAGES, SAME, SAME), "expected a pair of lists .* found a tuple of 3"),
        (IMAGES, "expected a pair of lists .* found a list of 4"),
        ({"images": IMAGES}, "forbidden instruction EMPTY_DICT"),
        (([*IMAGES[:3], 7], SAME), "image 3: expected the bytes of an encoded image, found int"),
        (([*IMAGES[:3], b""], SAME), "image 3: .* found no bytes"),
        ((IMAGES, [True, 2]), "issame 1: expected true or false, found int"),
        ((IMAGES, [True, None]), "issame 1: expected true or false, found NoneType"),
    ],
)
def test_contents_that_do_not_fit_are_refused(tmp_path, content, complaint):
    with pytest.raises(VerificationFileError, match=rf"set\.bin: .*{complaint}"):
        read_pairs(saved(tmp_path, pickle.dumps(content, protocol=4)))


@pytest.mark.parametrize(
    ("images", "same"),
    [(IMAGES[:3], SAME), (IMAGES, [True]), ([*IMAGES[:3], "text"], SAME), (IMAGES, [0, 2])],
)
def test_a_refused_set_leaves_the_old_file_as_it_was(tmp_path, images, same):
    write_pairs(tmp_path / "set.bin", IMAGES, SAME)
    with pytest.raises(VerificationFileError, match=r"set\.bin: "):
        write_pairs(tmp_path / "set.bin", images, same)
    assert_is_the_set(read_pairs(tmp_path / "set.bin"))
    assert [p.name for p in tmp_path.iterdir()] == ["set.bin"]
