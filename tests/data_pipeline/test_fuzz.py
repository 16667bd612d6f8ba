"""Damaged files raise our errors within limits of time and memory; `make fuzz` searches for more."""

import signal
import struct
import tracemalloc
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from tests.data_pipeline.fuzz import TARGETS, check

LONGEST_S = 10
EXTREMES = [
    struct.pack(form, value)
    for form, values in {
        "<I": (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x1FFFFFFF, 0xCED7230A),
        "<Q": ((1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 40),
        ">Q": (1 << 63, 1 << 40),
        "<f": (float("nan"), float("inf"), -1.0, 0.5, 1e30),
    }.items()
    for value in values
] + [
    b"9" * 30,
    b"-1",
    b"\n",
    b"\t",
    b"0\t0\n",
    b"77777777777\0",
    b"\x80" + b"\xff" * 11,
    b"\0" * 512,
]


def damaged(seeds, dice):
    """Return a valid file with a few changes: bits, numbers, inserted or removed bytes, an early end."""
    data = bytearray(dice.choice(seeds))
    # Mostly one change: readers rarely get past the first damage.
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        at, length = dice.randrange(len(data) + 1), dice.choice([1, 2, 4, 8, 100, 512])
        match dice.choice(["bit", "extreme", "insert", "remove", "repeat", "end"]):
            case "bit" if at < len(data):
                data[at] ^= 1 << dice.randrange(8)
            case "extreme":
                extreme = dice.choice(EXTREMES)
                data[at : at + len(extreme)] = extreme
            case "insert":
                data[at:at] = dice.choice([dice.choice(EXTREMES), dice.randbytes(length)])
            case "remove":
                del data[at : at + length]
            case "repeat":
                data[at:at] = data[at : at + length]
            case "end":
                del data[at:]
    return bytes(data)


@contextmanager
def limited(size_bytes):
    """Fail if memory is out of proportion to a file of this size, or if reading does not end."""

    def late(*_):
        raise TimeoutError(f"still reading after {LONGEST_S} s")

    former = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST_S)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
        # The readers for millions of records read chunks of some megabytes.
        assert peak < 32_000_000 + 100 * size_bytes, f"{peak} bytes of memory for a file of {size_bytes}"
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


@pytest.mark.parametrize("name", TARGETS)
def test_the_valid_files_are_read(tmp_path, name):
    target = TARGETS[name]
    for which, seed in enumerate(target.seeds):
        check(target._replace(errors=()), seed, tmp_path, which)


# Inputs derived from findings of the fuzzers.
FOUND = {
    "a number beyond 64 bits": ("idx alone", b"1\t99999999999999999999\n", r"line 1 is '1\\t9{20}"),
    "more digits than Python takes": ("idx alone", b"1\t" + b"9" * 5000 + b"\n", r"line 1 is '1\\t9{50}"),
    "a comment of numpy's": ("idx alone", b"1\t0 # x\n", r"line 1 is '1\\t0 # x"),
    "empty lines only": ("idx alone", b"\n\n", r"no records are listed"),
    "a lone carriage return": (
        "idx alone",
        b"0\t0\n1\t44\r2\t100\n",
        r"line 2 is '1\\t44\\r2\\t100'",
    ),
}


@pytest.mark.parametrize(("name", "data", "message"), FOUND.values(), ids=FOUND)
@pytest.mark.filterwarnings("error")
def test_earlier_findings_raise_our_errors(tmp_path, name, data, message):
    target = TARGETS[name]
    (tmp_path / target.name).write_bytes(data)
    with pytest.raises(target.errors, match=message):
        target.read(tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_any_damage_raises_one_of_our_errors_or_gives_valid_data(tmp_path, name):
    target = TARGETS[name]

    # Hypothesis' own integers are mostly small and would change the first bytes only. `derandomize` repeats
    # the same changes in every run; `make fuzz` tries new ones.
    @settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=True), st.integers(0, 1))
    def damage(dice, which):
        data = damaged(target.seeds, dice) if dice.random() < 0.9 else dice.randbytes(dice.randrange(2000))
        note(f"{data!r}")
        with limited(len(data)):
            check(target, data, tmp_path, which)

    damage()
