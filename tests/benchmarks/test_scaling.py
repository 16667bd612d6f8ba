"""The cost model: its formulas against figures computed by hand and against the bytes of real ranks."""

import pytest

from benchmarks import scaling


def test_formulas():
    # WebFace42M's 2,059,906 identities on 32 GPUs, 4,096 rows, 512 numbers each.
    assert (
        scaling.sampled(2_059_906, 32, 1, 4096) == 64_373
    )  # 32 x 64,373 = 2,059,936, the last rank has fewer
    assert scaling.sampled(2_059_906, 32, 0.1, 4096) == pytest.approx(6_437.3 + 0.9 * 128)
    assert scaling.sampled(100, 2, 0.1, 4096) == 50  # at most all classes
    assert scaling.flop(4096, 64_373, 512) == 8 * 4096 * 64_373 * 512
    assert scaling.held_bytes(64_373, 512) == 64_373 * 4096
    assert scaling.held_bytes(64_373, 512, moment_bytes=2) == 64_373 * 3072
    assert scaling.moved_bytes(1, 512) == 20 * 512
    assert scaling.payloads(4096, 512, norms=2) == {
        "all_gather": 4096 * 2064,
        "all_reduce": 65_536,
        "reduce_scatter": 4096 * 2048,
    }
    assert scaling.sent_bytes({"all_gather": 8, "all_reduce": 4, "reduce_scatter": 16}, 4) == 24
    assert scaling.sent_bytes(scaling.payloads(8, 4), 1) == 0


def test_two_ranks_send_the_bytes_of_the_formula_with_any_number_of_classes():
    expected = list(scaling.payloads(2 * scaling.ROWS_OF_RANK, scaling.DIM).items())
    assert scaling.count(2) == [expected] * len(scaling.CLASSES)
