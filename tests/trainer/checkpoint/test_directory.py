"""Retention and removal of checkpoints, damaged files, and kills at any time."""

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.checkpoint import directory
from trainer.checkpoint.checksummed_file import FileSum
from trainer.checkpoint.directory import Header


def write(run_dir, step, content=b"tensors", config=()):
    final = directory.final_path(run_dir, step)
    partial = directory.begin(final)
    (partial / "data").write_bytes(content)
    sums = {"data": FileSum(len(content), f"{zlib.crc32(content):08x}")}
    directory.publish(partial, final, Header(step, dict(config), {}, {}), sums, {})
    return final


def steps(run_dir):
    return [directory.step_of(path) for path in directory.all_of(run_dir)]


def superfluous(run_dir, keep, every_steps=None, until_step=None):
    found = directory.superfluous(
        run_dir, keep=keep, every_steps=every_steps, check=directory.wrong_size, until_step=until_step
    )
    return [directory.step_of(path) for path in found]


def test_the_newest_and_the_multiples_stay(tmp_path):
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step)
    assert superfluous(tmp_path, keep=2) == [30, 20, 10]
    assert superfluous(tmp_path, keep=2, every_steps=20) == [30, 10]


def test_a_broken_one_does_not_count_and_goes_only_when_it_is_old(tmp_path):
    paths = [write(tmp_path, step) for step in (10, 20, 30, 40)]
    (paths[3] / "data").unlink()
    (paths[1] / "checkpoint.json").unlink()
    assert superfluous(tmp_path, keep=1) == [20, 10]
    assert superfluous(tmp_path, keep=2) == []
    assert superfluous(tmp_path, keep=3) == []


def test_those_of_another_future_neither_count_nor_go(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step)
    assert superfluous(tmp_path, keep=1, until_step=20) == [10]


@given(
    st.dictionaries(st.integers(1, 60), st.booleans(), max_size=12),
    st.integers(1, 4),
    st.none() | st.integers(1, 9),
)
def test_never_is_a_good_one_lost_that_is_wanted(tmp_path_factory, are_good, keep, every_steps):
    run_dir = tmp_path_factory.mktemp("run")
    for step in are_good:
        directory.final_path(run_dir, step).mkdir(parents=True)
    gone = directory.superfluous(
        run_dir,
        keep=keep,
        every_steps=every_steps,
        check=lambda path, part=0, parts=1: None if are_good[directory.step_of(path)] else "broken",
    )
    left = set(are_good) - {directory.step_of(path) for path in gone}
    good = sorted(step for step in are_good if are_good[step])
    assert set(good[-keep:]) <= left
    assert all(step in left for step in are_good if every_steps and step % every_steps == 0)
    assert all(good and step < good[-1] for step in set(are_good) - left)


def test_leftovers_go_and_checkpoints_do_not(tmp_path):
    write(tmp_path, 10)
    (directory.begin(directory.final_path(tmp_path, 20)) / "data").write_bytes(b"half")
    (directory.folder_of(tmp_path) / ".step-00000010.old").mkdir()
    directory.clean(tmp_path)
    assert [path.name for path in directory.folder_of(tmp_path).iterdir()] == ["step-00000010"]


def test_a_kill_between_the_renames_is_mended(tmp_path):
    final = write(tmp_path, 10)
    final.rename(final.with_name(f".{final.name}.old"))
    directory.clean(tmp_path)
    assert directory.damage(final) is None


def test_a_removal_that_is_killed_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    final = write(tmp_path, 10)

    def killed(path, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(directory.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            directory.remove(final)
    assert steps(tmp_path) == []
    directory.clean(tmp_path)
    assert not list(directory.folder_of(tmp_path).iterdir())


def test_any_changed_byte_of_the_manifest_is_seen(tmp_path):
    path = write(tmp_path, 10) / "checkpoint.json"
    before = path.read_bytes()
    for position in range(len(before)):
        changed = bytearray(before)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert "checkpoint.json: expected a checkpoint's manifest, found" in directory.damage(path.parent)
    path.write_bytes(before)
    assert directory.damage(path.parent) is None


def test_the_parts_of_a_check_cover_every_file(tmp_path):
    run_dir = tmp_path
    final = write(run_dir, 10)
    (final / "data").write_bytes(b"tensorz")
    assert [directory.wrong_size(final, part, 3) for part in range(3)] == [None] * 3
    found = [directory.wrong_sum(final, part, 3) for part in range(3)]
    assert sum(problem is not None for problem in found) == 1
