"""A staged file appears complete or not at all, and the error for a full disk names it."""

import errno
import os

import pytest

from data_pipeline.common.atomic_write import staged_file


def test_a_file_gets_its_name_at_the_end(tmp_path):
    out = tmp_path / "faces.npz"
    out.write_text("of yesterday")
    with staged_file(out) as partial:
        partial.write_text("of today")
        assert (partial.suffix, out.read_text()) == (".npz", "of yesterday")
    assert out.read_text() == "of today"
    assert os.listdir(tmp_path) == ["faces.npz"]


def fills_the_disk(out):
    with staged_file(out) as partial:
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_the_error_for_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"faces\.npz: expected space to write, found none \(No space left"):
        fills_the_disk(tmp_path / "faces.npz")
    assert os.listdir(tmp_path) == []
