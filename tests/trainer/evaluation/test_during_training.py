"""A run is evaluated on its suite as on its sets, and a signal does not wait until an evaluation is over."""

import json
import os
import re
import signal

import pytest

from tests.trainer.conftest import run, train_words
from tests.trainer.processes import children, patched, start, wait_for
from tests.trainer.report.test_training import Page
from trainer.evaluation.during_training import Evaluation
from trainer.monitoring.prometheus import Metrics
from trainer.runtime.signals import EXIT_CODE

STEPS = 4
OPTIONS = (f"steps={STEPS}", "checkpoint.every_steps=1000", "evaluation.every_steps=2", "log_every_steps=1")


@pytest.fixture(scope="module")
def suite(faces, tmp_path_factory):
    """The held-out pairs under another name, and their average."""
    path = tmp_path_factory.mktemp("suites") / "suite.toml"
    path.write_text(
        f'folder = "{faces}"\n[[pairs]]\nname = "again"\npath = "held_out.bin"\n'
        '[[average]]\nname = "mean"\nof = ["again"]\n'
    )
    return path


def evaluations(run_dir):
    """(step, set) -> accuracy."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {(r["step"], r["set"]): r["accuracy"] for r in records if r["kind"] == "evaluation"}


@pytest.mark.parametrize(("step", "ranks"), [(0, 1), (2, 2)])
def test_a_signal_to_one_rank_ends_an_evaluation_on_all(step, ranks, faces, suite, tmp_path):
    run_dir, begun = tmp_path / "run", tmp_path / "begun"
    words = train_words(run_dir, faces, *OPTIONS, f"evaluation.suite={suite}", "evaluation.batch_size=4")
    slow = f"""
        import pathlib, time
        from trainer.loop import Training
        embed = Training._embed
        def slowly(self, step, images_BCHW):
            if step == {step}:
                pathlib.Path({str(begun)!r}).touch()
                time.sleep(0.1)
            return embed(self, step, images_BCHW)
        Training._embed = slowly
    """
    with start([*patched(tmp_path, slow, ranks=ranks), *words]) as process:
        wait_for(begun.exists, process, timeout_s=300)
        os.kill(children(process)[1] if ranks > 1 else process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    what = "nothing has changed since step 0" if step == 0 else f"saved at step {step}"
    assert len(re.findall(f"SIGTERM: {what}; leaving with exit code {EXIT_CODE}", said)) == 1, said
    assert "lgaf: rank" not in said
    assert {of_step for of_step, _ in evaluations(run_dir)} == set(range(0, step, 2))
    if step:
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{step:08d}"]
        again = run(*words)
        assert again.returncode == 0, again.stderr
        check_the_finished(run_dir)


def check_the_finished(run_dir):
    found = evaluations(run_dir)
    assert list(found) == [(step, name) for step in (0, 2, 4) for name in ("held_out", "again", "mean")]
    for step in (0, 2, 4):
        assert found[step, "held_out"] == found[step, "again"] == found[step, "mean"]
    result = json.loads((run_dir / "result.json").read_text())
    assert list(result["verification"]) == ["held_out"]
    assert list(result["suite"]) == ["again", "mean"]
    assert result["verification_accuracy_untrained"] == found[0, "held_out"]
    assert result["suite"]["again"]["verification"]["figures"] == result["verification"]["held_out"]
    assert "Similarity of pairs: again, verification" in Page(run_dir / "report.html").in_("h3")


def test_sets_and_suite_must_have_different_names(faces, suite):
    with pytest.raises(ValueError, match=r"suite.toml: expected other names than those of .*, found again"):
        Evaluation({"again": faces / "held_out.bin"}, suite, image_size=48, batch_size=8)


def test_prometheus_sees_the_figures_by_protocol_and_task():
    metrics = Metrics()
    metrics.evaluated("IJB-C", "1:N", {"rank_1": 0.5})
    metrics.evaluated("IJB-C", "1:N", {"rank_1": 0.75})
    labels = {"protocol": "IJB-C", "task": "1:N", "figure": "rank_1"}
    assert metrics.registry.get_sample_value("lgaf_evaluation", labels) == 0.75
