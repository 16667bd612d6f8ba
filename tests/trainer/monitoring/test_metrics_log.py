"""metrics.jsonl over several processes of a run."""

import json

from trainer.monitoring import metrics_log


def test_what_is_written_is_read(tmp_path):
    log = metrics_log.MetricsLog(tmp_path, first_step=0)
    log.write("train", 1, loss=2.5)
    log.write("evaluation", 1, set="a", accuracy=0.5)
    assert metrics_log.read(tmp_path) == [
        {"kind": "train", "step": 1, "loss": 2.5},
        {"kind": "evaluation", "step": 1, "set": "a", "accuracy": 0.5},
    ]


def test_a_continued_run_drops_what_came_after_its_checkpoint(tmp_path):
    log = metrics_log.MetricsLog(tmp_path, first_step=0)
    for step in range(0, 9):
        log.write("train", step, loss=float(step))
    again = metrics_log.MetricsLog(tmp_path, first_step=5)
    again.write("train", 6, loss=60.0)
    assert [(record["step"], record["loss"]) for record in metrics_log.read(tmp_path)] == [
        *((step, float(step)) for step in range(0, 6)),
        (6, 60.0),
    ]


def test_a_new_run_in_an_old_folder_drops_its_lines(tmp_path):
    metrics_log.MetricsLog(tmp_path, first_step=0).write("train", 3, loss=1.0)
    metrics_log.MetricsLog(tmp_path, first_step=0)
    assert metrics_log.read(tmp_path) == []


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    metrics_log.MetricsLog(tmp_path, first_step=0).write("train", 1, loss=1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tra')
    assert len(metrics_log.read(tmp_path)) == 1
    metrics_log.MetricsLog(tmp_path, first_step=1).write("train", 2, loss=0.5)
    assert [record["step"] for record in metrics_log.read(tmp_path)] == [1, 2]


def test_the_result_replaces_the_one_before(tmp_path):
    metrics_log.write_result(tmp_path, {"steps": 1})
    metrics_log.write_result(tmp_path, {"steps": 2})
    assert json.loads((tmp_path / "result.json").read_text()) == {"steps": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
