"""Interrupted runs end as uninterrupted ones do: to the last bit on as many ranks, to rounding on others."""

import json
import re
import subprocess

import pytest
import torch

from tests.trainer.conftest import command, environment, losses, run, train_words
from tests.trainer.processes import kill_all, patched, start, state_of, wait_for

STEPS = 9
COMMON = (
    f"steps={STEPS}",
    "checkpoint.every_steps=3",
    "checkpoint.keep=9",
    "evaluation.sets=[]",
    "log_every_steps=1",
    "backbone.dropout=0.3",
    "data.augment.photometric.probability=0.5",
    "data.augment.occlusion.probability=0.5",
)
# Between them: every ZeRO stage, both sampling rates, a margin with statistics, moments of both kinds,
# accumulation, both optimizers of backbone and head.
COMBINATIONS = {
    "0": ("engine.zero_stage=0", "head.sample_rate=0.1", "head.margin.kind=adaface"),
    "1": ("engine.zero_stage=1", "micro_batch=8"),
    "2": (
        "engine.zero_stage=2",
        "head.sample_rate=0.1",
        "head.optimizer.kind=adamw",
        "optimizer.kind=adamw",
        "optimizer.clip_norm=1",
        "optimizer.learning_rate=0.01",
    ),
    "3": ("engine.zero_stage=3", "head.optimizer.moments=bf16", "head.margin.kind=curricularface"),
}


@pytest.fixture(scope="module")
def straight_run(faces, tmp_path_factory):
    """The folder of a combination's run from start to end, made when first asked for."""
    folder = tmp_path_factory.mktemp("straight")

    def of(combination):
        run_dir = folder / combination
        if not run_dir.exists():
            done = run(*train_words(run_dir, faces, *COMMON, *COMBINATIONS[combination]), ranks=2)
            assert done.returncode == 0, done.stderr
        return run_dir

    return of


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_run_that_was_killed_ends_with_the_same_bits(combination, straight_run, faces, tmp_path):
    straight, killed = straight_run(combination), tmp_path / "killed"
    words = train_words(killed, faces, *COMMON, *COMBINATIONS[combination])
    process = start(command(*words, ranks=2))
    wait_for(lambda: list(killed.glob("checkpoints/step-*3")), process)
    kill_all(process)
    assert len(losses(killed)) < STEPS, "killed too late"
    done = run(*words, ranks=2)
    assert done.returncode == 0, done.stderr
    assert re.search(r"steps [36] to 9", done.stderr)
    assert losses(killed) == losses(straight)
    assert len(losses(killed)) == STEPS
    found, expected = (
        state_of(run_dir / "checkpoints" / f"step-{STEPS:08d}") for run_dir in (killed, straight)
    )
    assert found.keys() == expected.keys()
    kinds = {name.partition(".")[0] for name in found}
    moments = {"backbone_momentum"}
    if combination == "2":
        moments = {"backbone_first_moment", "backbone_second_moment", "backbone_updates"}
    assert kinds == {"backbone_weight", "backbone_buffer", "head", *moments}
    for name, tensor in expected.items():
        if "running_" in name:
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found[name], tensor), name


# A network without batch statistics: with them, how many images a rank sees at once is part of the result.
# STOP is the step during which the run is told to stop.
ELASTIC = """
    import os, signal, torch
    from trainer import backbones, loop
    class Network(backbones.Backbone):
        embedding_size, branches = 32, 0
        def __init__(self, image_size):
            super().__init__()
            inputs = 3 * (image_size // 4) ** 2
            self.layers = torch.nn.Sequential(
                torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(inputs, 64), torch.nn.PReLU(64),
                torch.nn.LayerNorm(64), torch.nn.Linear(64, 32),
            )
        def forward(self, images_BCHW):
            emb_BD = self.layers(images_BCHW)
            return backbones.Features(emb_BD, emb_BD.new_empty(len(emb_BD), 0))
    backbones.build = lambda config, image_size: Network(image_size)
    step = loop.train_step
    def stop_during(*arguments, **named):
        if named["step"] == int(os.environ.get("STOP", -1)):
            signal.raise_signal(signal.SIGUSR1)
            named["signal"] = signal.SIGUSR1
        return step(*arguments, **named)
    loop.train_step = stop_during
"""


def test_a_run_goes_on_with_4_2_3_and_1_ranks(faces, tmp_path):
    options = ("steps=12", "global_batch=24", "micro_batch=4", "head.sample_rate=0.5")
    options = (*COMMON, *options, "checkpoint.every_steps=1000", "optimizer.learning_rate=0.05")

    def train(name, ranks, **variables):
        words = [*patched(tmp_path, ELASTIC, ranks=ranks), *train_words(tmp_path / name, faces, *options)]
        return subprocess.run(words, env=environment() | variables, text=True, capture_output=True)

    for ranks, stop in ((4, 2), (2, 5), (3, 8)):
        said = train("elastic", ranks, STOP=str(stop)).stderr
        assert f"SIGUSR1: saved at step {stop + 1}" in said, said
        assert f"{ranks} ranks on cpu, {24 // ranks // 4} x 4 images each" in said or ranks == 4, said
    last = train("elastic", 1)
    assert last.returncode == 0, last.stderr
    assert "steps 9 to 12" in last.stderr
    straight = train("straight", 1)
    assert straight.returncode == 0, straight.stderr
    found, expected = losses(tmp_path / "elastic"), losses(tmp_path / "straight")
    assert list(found) == list(range(1, 13))
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected[12] < expected[1]


# WHEN is a step (counted from 0) at which a row of the classifier on rank 1 is spoilt, TIMES how often.
POISON = """
    import atexit, os
    from trainer import loop, run_log
    step, times, made = loop.train_step, [], []
    def poisoned(engine, head, *arguments, **named):
        if named["step"] == WHEN and len(times) < TIMES:
            times.append(1)
            if os.environ["RANK"] == "1":
                head.weight_RD[0] = float("nan")
                next(engine.model.parameters()).data.fill_(float("nan"))
        return step(engine, head, *arguments, **named)
    loop.train_step = poisoned
    class Kept(run_log.Metrics):
        def __init__(self):
            super().__init__()
            made.append(self)
    run_log.Metrics = Kept
    # In one write each: two ranks share the pipe.
    count = lambda: made[0].registry.get_sample_value("lgaf_rollbacks_total")
    atexit.register(lambda: os.write(1, f"rollbacks {count()}\\n".encode()))
"""


def poisoned(run_dir, faces, folder, when, times, *overrides):
    code = POISON.replace("WHEN", str(when)).replace("TIMES", str(times))
    words = train_words(run_dir, faces, *COMMON, "skip_limit=2", *overrides)
    done = subprocess.run(
        [*patched(folder, code, ranks=2), *words], env=environment(), text=True, capture_output=True
    )
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return done, [record for record in records if record["kind"] == "rollback"]


@pytest.mark.parametrize("combination", ["0", "3"])
def test_a_run_whose_numbers_go_bad_once_goes_back_and_loses_nothing(
    combination, straight_run, faces, tmp_path
):
    done, rollbacks = poisoned(tmp_path / "run", faces, tmp_path, 4, 1, *COMBINATIONS[combination])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 steps in a row were skipped: back to ") == 1
    assert done.stdout.count("rollbacks 1.0") == 2
    assert [(record["step"], record["failed_step"]) for record in rollbacks] == [(3, 6)]
    assert losses(tmp_path / "run") == losses(straight_run(combination))


def test_a_run_that_fails_again_where_it_failed_gives_up(faces, tmp_path):
    done, rollbacks = poisoned(tmp_path / "run", faces, tmp_path, 4, 100)
    assert done.returncode == 1
    expected = r"lgaf: rank [01]: steps 5 to 6: .* after 1 rollback\(s\) to a checkpoint"
    assert len(re.findall(expected, done.stderr)) == 1, done.stderr
    assert len(rollbacks) == 1


def test_the_limit_of_going_back(faces, tmp_path):
    done, rollbacks = poisoned(tmp_path / "run", faces, tmp_path, 4, 1, "rollback_limit=0")
    assert done.returncode == 1
    assert "training has diverged" in done.stderr
    assert rollbacks == []
