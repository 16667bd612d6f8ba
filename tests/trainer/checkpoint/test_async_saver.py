"""Asynchronous saving: a checkpoint holds the state at its step, and every failure is reported."""

import gc
import os
import resource
import threading

import pytest
import torch
import torch.distributed as dist

from partial_fc.collectives import logical
from partial_fc.partition import class_range
from tests.ranks import run_ranks
from trainer.checkpoint import directory, sharded
from trainer.checkpoint.async_saver import Saver
from trainer.checkpoint.directory import CheckpointError, Header
from trainer.config import CheckpointConfig
from trainer.monitoring.prometheus import Metrics

CLASSES, WORLD = 7, 2


class Run:
    """A training of one rank that holds a state; its thread writes when `gate` is open."""

    def __init__(self, rank, run_dir, **config):
        rows = class_range(CLASSES, rank, dist.get_world_size())
        self.live = {
            "backbone_weight": {"conv": torch.zeros(4, 2), "fc": torch.zeros(3)},
            "backbone_buffer": {"count": torch.tensor(0)},
            "head": {"weight": torch.zeros(len(rows), 3)},
        }
        self.said, self.metrics, self.run_dir = [], Metrics(), run_dir
        self.gate = threading.Event()
        self.gate.set()
        self.saver = Saver(
            run_dir,
            CheckpointConfig(**config),
            group=dist.group.WORLD,
            metrics=self.metrics,
            say=self.said.append,
        )
        self.saver._write = self._gated

    def _gated(self, copied, header):
        assert self.gate.wait(60)
        return Saver._write(self.saver, copied, header)

    def state(self):
        head = logical(self.live["head"]["weight"], CLASSES, dist.group.WORLD)
        return {**self.live, "head": {"weight": head}}

    def train(self, step):
        """In place, as optimizers do; every number is then the step."""
        for part in self.live.values():
            for tensor in part.values():
                tensor.fill_(step)

    def save(self, step, **options):
        self.train(step)
        self.saver.save(self.state, Header(step, {}, {}, {}), **options)
        self.train(-step)  # later changes must not reach the copy

    def failures(self):
        return self.metrics.registry.get_sample_value("lgaf_failed_checkpoints_total")


def all_cases(rank, folder):
    """One start of the ranks for all of them."""
    cases = (save_while_training, save_twice, save_while_busy, fail_and_recover)
    return {case.__name__: case(rank, folder / case.__name__) for case in cases}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def results(folder):
    """Return the results of each case on each rank, by its name."""
    found = run_ranks(all_cases, WORLD, folder)
    return {name: [of_rank[name] for of_rank in found] for name in found[0]}


def loaded(run):
    """The numbers in each of the run's checkpoints."""
    found = {}
    for path in directory.all_of(run.run_dir):
        assert directory.damage(path) is None
        run.train(-1)
        sharded.load(path, run.state(), group=dist.group.WORLD)
        numbers = {float(n) for part in run.live.values() for t in part.values() for n in t.flatten()}
        found[directory.step_of(path)] = numbers
    return found


def save_while_training(rank, run_dir):
    run = Run(rank, run_dir, keep=5)
    run.saver.prepare(run.state())
    for step in (10, 20):
        run.gate.clear()
        run.save(step)
        run.gate.set()  # only now is anything written
        run.saver.wait()
    run.save(30)
    run.save(40, is_last=True)
    run.saver.close()
    return loaded(run), run.said


def test_a_checkpoint_is_the_state_of_its_step_though_training_went_on(results, folder):
    for found, said in results["save_while_training"]:
        assert found == {step: {float(step)} for step in (10, 20, 30, 40)}
        assert said == [
            f"saved {directory.final_path(folder / 'save_while_training', step)}" for step in (10, 20, 30, 40)
        ]


def save_twice(rank, run_dir):
    """The bytes of a checkpoint written beside the training and of one written at once."""
    run = Run(rank, run_dir / "beside")
    run.save(10)
    run.saver.close()
    run.train(10)
    rank_state = sharded.share_out(run.state(), rank, WORLD)
    sharded.save(run_dir / "at_once", rank_state, Header(10, {}, {}, {}), keep=1, group=dist.group.WORLD)


def test_it_is_the_same_as_one_written_at_once(results, folder):
    sums = [
        directory.read_manifest(directory.final_path(folder / "save_twice" / name, 10)).files
        for name in ("beside", "at_once")
    ]
    tensors = [{name: one for name, one in found.items() if name.endswith(".bin")} for found in sums]
    assert len(tensors[0]) == WORLD
    assert tensors[0] == tensors[1]


def save_while_busy(rank, run_dir):
    run = Run(rank, run_dir, when_busy="skip")
    if rank == 1:
        run.gate.clear()  # one rank that is slow is enough
    run.save(10)
    run.save(20)
    assert not run.saver.must_retry()
    run.gate.set()
    run.saver.wait()
    run.save(30)
    run.save(40, is_last=True)
    run.saver.close()
    return list(loaded(run)), run.said


def test_a_save_that_comes_too_soon_is_skipped_on_all_ranks_but_the_last_is_not(results):
    for found, said in results["save_while_busy"]:
        assert found == [10, 30, 40]
        assert [line for line in said if "step 20 is not saved: the previous save is still running" in line]
        assert len(said) == 4


def threads():
    return len(os.listdir("/proc/self/task"))


def fail_and_recover(rank, run_dir):
    gc.disable()  # or whether a thread is left is a matter of luck
    before = threads()
    run = Run(rank, run_dir)
    run.save(10)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    run.saver.wait()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    run.save(20)
    run.saver._writing._thread.join()
    dist.barrier()
    assert run.saver.must_retry()
    run.save(21)
    run.saver.wait()
    dist.barrier()  # rank 0 has removed the incomplete save
    kept = sorted(os.listdir(directory.folder_of(run_dir)))
    dist.barrier()
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    run.save(22)
    run.saver.wait()
    dist.barrier()
    assert not run.saver.must_retry()
    run.saver.close()
    left = threads() - before
    gc.enable()
    return kept, run.failures(), run.said, list(loaded(run)), left


def test_a_failure_is_said_once_counted_and_made_good(results):
    for kept, failures, said, found, left in results["fail_and_recover"]:
        assert kept == ["step-00000010"]
        assert failures == 2
        assert "step-00000020 could not be written by rank 1" in said[1]
        assert [line.split("/")[-1] for line in (said[0], said[2])] == ["step-00000010", "step-00000022"]
        assert len(said) == 3
        assert found == [10, 22]
        assert left == 0  # threads that live on when Python ends abort it


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def no_room(monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(directory, "publish", full)


def test_the_last_save_must_not_fail(tmp_path, alone, no_room):
    run = Run(0, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"step-00000010 could not be written by rank 0: .*No space left"
    ):
        run.save(10, is_last=True)
    assert run.failures() == 1
    assert list(directory.folder_of(tmp_path).iterdir()) == []


def test_what_is_no_fault_of_the_disk_comes_out(tmp_path, alone, monkeypatch):
    run = Run(0, tmp_path)
    monkeypatch.setattr(sharded, "save", lambda *arguments, **options: 1 // 0)
    run.save(10)
    run.saver._writing._thread.join()
    with pytest.raises(ZeroDivisionError):
        run.saver.must_retry()


def test_copies_are_kept_and_used_again(tmp_path, alone):
    run = Run(0, tmp_path)
    run.saver.prepare(run.state())
    before = {key: copy.data_ptr() for key, copy in run.saver._copies.items()}
    run.save(10, is_last=True)
    assert {key: copy.data_ptr() for key, copy in run.saver._copies.items()} == before
