"""A file's sum is that of all its bytes however they come, and the cache is told to forget them in time."""

import errno
import os
import threading
import zlib

import pytest

from trainer.checkpoint import checksummed_file as summed_files
from trainer.checkpoint.checksummed_file import FileSum, SummedFile, WriteThroughFile

SMALL, LARGE = 1000, 3 * summed_files._PIECE + 17


@pytest.mark.parametrize("sizes", [(), (SMALL, SMALL), (LARGE,), (SMALL, LARGE, SMALL, LARGE)])
def test_the_sum_is_that_of_the_bytes_on_the_disk(tmp_path, sizes):
    parts = [os.urandom(size) for size in sizes]
    path = tmp_path / "file"
    with open(path, "wb") as raw:
        file = SummedFile(raw)
        assert [file.write(memoryview(part)) for part in parts] == list(sizes)
        assert file.tell() == sum(sizes)
    content = b"".join(parts)
    assert path.read_bytes() == content
    assert file.sum == FileSum.of(path) == FileSum(len(content), f"{zlib.crc32(content):08x}")


def test_a_full_disk_is_told_while_a_thread_sums():
    full = os.strerror(errno.ENOSPC)
    with open("/dev/full", "wb", buffering=0) as raw, pytest.raises(OSError, match=full):
        SummedFile(raw).write(os.urandom(LARGE))


def test_bytes_without_a_sum_do_not_pass_for_summed_ones(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(summed_files.zlib, "crc32", fail)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with open(tmp_path / "file", "wb") as raw, pytest.raises(ValueError, match="not enough values"):
        SummedFile(raw).write(bytes(LARGE))


def test_a_descriptor_is_asked_for_when_the_system_has_all_bytes(tmp_path):
    with open(tmp_path / "file", "wb") as raw:
        file = WriteThroughFile(raw)
        file.write(bytes(SMALL))
        assert os.fstat(file.fileno()).st_size == SMALL


def test_advice_that_is_not_taken_is_no_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    with open(tmp_path / "file", "wb") as raw:
        file = WriteThroughFile(raw)
        for _ in range(9):
            file.write(bytes(1 << 20))
        file.close()
    assert (tmp_path / "file").stat().st_size == 9 << 20


def test_each_window_is_begun_when_it_is_written_and_let_go_once_it_is_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(summed_files, "_PIECE", 7)
    monkeypatch.setattr(summed_files, "_WINDOW", 10)
    monkeypatch.setattr(summed_files, "_BEGUN", 30)
    advised = []
    with open(tmp_path / "file", "wb", buffering=0) as raw:

        def advise(handle, start, length, advice):
            assert (handle, advice) == (raw.fileno(), os.POSIX_FADV_DONTNEED)
            assert start + length <= raw.tell()
            advised.append((start, length))

        monkeypatch.setattr(os, "posix_fadvise", advise)
        file = WriteThroughFile(raw)
        for size in (5, 40, 1, 19):
            file.write(bytes(size))
        file.close()
    assert advised[:-1] == [(start, 10) for start in (0, 10, 20, 30, 0, 40, 10, 50, 20)]
    assert advised[-1] == (0, 65)
