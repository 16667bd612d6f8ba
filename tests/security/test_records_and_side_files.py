"""Poisoned records and side files: they are skipped and reported, and a run that has trained succeeds."""

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline.formats.container import DatasetError
from data_pipeline.formats.int64_labels import write_labels
from data_pipeline.formats.recordio_writer import FlatWriter
from data_pipeline.formats.tar_index import ShardError, index_shard
from data_pipeline.formats.tar_writer import sample
from data_pipeline.indexed.catalog import open_catalog
from data_pipeline.quarantine import BadRecord, Quarantine
from data_pipeline.streaming.samples import RemoteError, _label
from data_pipeline.synthetic import dataset as synthetic
from trainer.evaluation.compare import known_threshold
from trainer.evaluation.metrics.verification import verify_similarities
from trainer.evaluation.protocol import Histogram, Scores
from trainer.evaluation.protocols.pairs import scores_of
from trainer.monitoring import metrics_log
from trainer.report import evaluation as evaluation_report
from trainer.report import summary
from trainer.report.training import write_report
from trainer.run_log import RunLog

ROOT = Path(__file__).parents[2]
GOOD = {"kind": "train", "step": 1, "loss": 2.5, "step_s": 0.1, "data_wait_s": 0.0, "learning_rate": 0.1}
DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "1" + "0" * 400
POISON = {
    "a huge number": f'{{"kind": "train", "step": 2, "loss": {HUGE}}}',
    "a huge step": f'{{"kind": "train", "step": {HUGE}, "loss": 1}}',
    "a negative step": '{"kind": "train", "step": -1, "loss": 1}',
    "a step of many digits": f'{{"kind": "train", "step": {"9" * 5000}, "loss": 1}}',
    "a large number": '{"kind": "train", "step": 2, "loss": 1e308, "step_s": -1e308}',
    "a tiny number": '{"kind": "train", "step": 2, "loss": 5e-324, "step_s": 5e-324}',
    "deep nesting": f'{{"kind": "train", "step": 2, "loss": {DEEP}}}',
    "only deep nesting": DEEP,
    "a list": "[1, 2]",
    "a number": "17",
    "no step": '{"kind": "train"}',
    "a kind that is no text": '{"kind": ["train"], "step": 2}',
    "a long line": '{"kind": "train", "step": 2, "set": "' + "x" * 300_000 + '"}',
    "bytes that are no text": b'{"kind": "train", "step": 2, "set": "\xff"}',
    "a truncated line": '{"kind": "train", "st{"kind": "train", "step": 2, "loss": 1}',
}


@pytest.fixture(params=POISON)
def poisoned(request, tmp_path):
    """A run directory with a good record, a poisoned line and another good record."""
    line = POISON[request.param]
    content = [json.dumps(GOOD), line, json.dumps({**GOOD, "step": 3})]
    lines = b"".join((one if isinstance(one, bytes) else one.encode()) + b"\n" for one in content)
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    return tmp_path


def test_a_poisoned_line_is_skipped_and_counted(poisoned):
    records, unreadable = metrics_log.read_counted(poisoned)
    assert ([record["step"] for record in records], unreadable) == ([1, 3], 1)
    page = write_report(poisoned).read_text()
    assert "1 lines of metrics.jsonl could not be read" in page


def test_the_count_is_shown_when_a_run_resumes(poisoned, capsys):
    quarantine = Quarantine(None, 0.1)
    RunLog(poisoned, steps=9, first_step=3, global_batch=8, quarantine=quarantine, is_first=True)
    assert "metrics.jsonl: 1 lines were no records and are removed" in capsys.readouterr().err
    assert len((poisoned / "metrics.jsonl").read_text().splitlines()) == 2


def conclude(run_dir, evaluation=None, faces=lambda count: []):
    summary.conclude(
        run_dir,
        config_text="",
        schedule=SimpleNamespace(log_every=1, steps=3),
        global_batch=8,
        source=SimpleNamespace(faces=faces),
        evaluation=evaluation or SimpleNamespace(verified={}, results={}, sets={}),
        ranks=SimpleNamespace(world_size=1, device=torch.device("cpu")),
    )
    return json.loads((run_dir / "result.json").read_text())


def test_a_run_with_a_poisoned_record_ends_well(poisoned):
    result = conclude(poisoned)
    assert (result["final_loss"], result["samples_per_s"]) == (2.5, pytest.approx(80))
    assert (poisoned / "report.html").is_file()


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "train", "step": 2},
        {"kind": "train", "step": 2, "loss": "x", "step_s": "x", "data_wait_s": None},
        {"kind": "evaluation", "step": 0},
        {"kind": "evaluation", "step": 0, "set": "a", "accuracy": "x"},
        {"kind": "evaluation", "step": 2, "set": "[/red]", "accuracy": float("nan"), "threshold": "x"},
    ],
)
def test_a_record_without_what_its_kind_has_ends_no_run(record, tmp_path):
    lines = [json.dumps(GOOD), json.dumps(record)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    evaluation = evaluation_of(tmp_path)
    assert conclude(tmp_path, evaluation)["verification_accuracy_untrained"] is None
    assert (tmp_path / "report.html").is_file()
    assert known_threshold(tmp_path, record["step"]) is None


def evaluation_of(folder):
    """A fake of the evaluation of one set of four pairs in a folder."""
    similarity_P, issame_P = np.array([0.9, 0.8, 0.1, 0.2]), np.array([True, True, False, False])
    result = verify_similarities(similarity_P, issame_P, folds=2)
    pairs = SimpleNamespace(path=folder / "held_out.bin", images=[b""] * 8)
    return SimpleNamespace(
        verified={"a": result},
        results={"a": {"1:1": scores_of(result)}},
        sets={"a": SimpleNamespace(path=pairs.path, pairs=pairs)},
    )


JUNK = {
    "text": b"junk",
    "bytes": bytes(range(256)),
    "no rows": "\t".join(synthetic._COLUMNS.names).encode() + b"\n",
    "too large": b"x" * 20_000,
    "rows of text": ("\t".join(synthetic._COLUMNS.names) + "\nx\n").encode(),
}


@pytest.mark.parametrize("kind", JUNK)
def test_junk_beside_a_set_of_pairs_ends_no_run(kind, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(GOOD))
    (tmp_path / "held_out_nuisances.tsv").write_bytes(JUNK[kind])
    conclude(tmp_path, evaluation_of(tmp_path))
    assert "held_out_nuisances.tsv is not used in the report: " in capsys.readouterr().err
    assert "Verification" in (tmp_path / "report.html").read_text()


def test_what_only_the_report_needs_ends_no_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(GOOD))

    def faces(count):
        raise DatasetError("the dataset is gone")

    assert conclude(tmp_path, faces=faces)["steps"] == 3
    assert "report.html could not be written: DatasetError: the dataset is gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", [DEEP, "[]", f'{{"steps": {HUGE}}}', f'{{"versions": {"[" * 70 + "]" * 70}}}']
)
def test_a_poisoned_result_is_refused_with_its_name(text, tmp_path):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=r"result\.json: "):
        write_report(tmp_path)


@pytest.mark.parametrize("text", [DEEP, "[]", '{"config": {}, "bytes": ' + "[" * 70 + "]" * 70 + "}"])
def test_a_poisoned_description_of_a_synthetic_set_is_none(text, tmp_path):
    (tmp_path / "synth.json").write_text(text)
    assert synthetic._description(tmp_path) is None


def test_a_list_of_bad_records_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    path = tmp_path / "quarantine.jsonl"
    path.symlink_to(tmp_path / "elsewhere")
    quarantine = Quarantine(path, 0.1)
    for record in range(3):
        quarantine.add(record, BadRecord("train.rec", record, 0, "bad"))
    assert quarantine.listed() == 3
    assert capsys.readouterr().err.count("not listed") == 1
    assert not (tmp_path / "elsewhere").exists()


# Names of plots.


def test_plots_have_different_names(tmp_path):
    one = np.array([0, 1])
    scores = Scores({}, "a convention", histogram=Histogram(np.array([-1.0, 0, 1]), one, one))
    names = ["A B", "a_b", "a b", "a_b-2", "../../x", "x" * 300, "x" * 301, "\u738b", "[/red]"]
    about = {"suite": "[/red]", "checkpoint": "c"}
    evaluation_report.write(tmp_path, {name: {"1:1": scores} for name in names}, about)
    plots = [path for path in tmp_path.iterdir() if path.suffix == ".svg"]
    assert len(plots) == len(names)
    assert Counter(path.name.lower() for path in plots).most_common(1)[0][1] == 1


# Commands of streams.


def test_a_command_of_a_stream_ends_with_the_process(tmp_path):
    """The process ends as the watchdog ends it: without cleaning up."""
    os.mkfifo(tmp_path / "alive")
    command = f"exec 9> {tmp_path}/alive; head -c 600 /dev/zero; (sleep 600; true) & sleep 600"
    code = textwrap.dedent(f"""
        import os
        from data_pipeline.streaming.connection import Patience, Stream, Waits
        assert len(Stream("pipe:" + {command!r}, Patience(), Waits()).read()) == 512
        os._exit(1)
    """)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    with open(tmp_path / "alive", "rb") as alive:
        assert process.wait() == 1
        assert alive.read() == b""  # returns when the last process that holds the pipe has ended


@pytest.mark.parametrize("status", [0, 3])
def test_a_command_of_a_stream_has_its_own_status_and_input(status, tmp_path):
    from data_pipeline.streaming.connection import Patience, Stream, Waits

    command = f"wc -c > {tmp_path}/input; head -c 512 /dev/zero; echo '$1 and \"two\"' >&2; exit {status}"
    stream = Stream(f"pipe:{command}", Patience(attempts=1), Waits())
    assert stream.read() == bytes(512)
    if status:
        with pytest.raises(RemoteError, match=r"status 3 .*, with the output: \$1 and \"two\""):
            stream.read()
    else:
        assert stream.read() == b""
    assert (tmp_path / "input").read_text().strip() == "0"


# Labels.

TOO_LARGE, LARGEST = (1 << 63) - 1, (1 << 63) - 2


@pytest.fixture
def rec(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with FlatWriter(tmp_path / "faces", image_size=(8, 8)) as writer:
        for _ in range(2):
            writer.add(b"image", 0)
    return tmp_path / "faces"


def test_a_label_without_a_number_of_classes_is_refused_in_recordio(rec):
    (rec / "property").unlink()
    write_labels(rec / "train.rec", np.arange(2), np.array([0, TOO_LARGE]))
    with pytest.raises(DatasetError, match=r"train\.labels\.npy: label 9223372036854775807 for"):
        open_catalog(rec)
    (rec / "train.labels.npy").unlink()
    (rec / "train.tsv").write_text(f"0\ta\t0\n1\tb\t{TOO_LARGE}\n")
    with pytest.raises(DatasetError, match=r"train.tsv: label 9223372036854775807 for key 1, expected"):
        open_catalog(rec)


def test_the_classes_of_several_datasets_do_not_overflow(rec, tmp_path):
    (rec / "property").unlink()
    write_labels(rec / "train.rec", np.arange(2), np.array([0, LARGEST]))
    assert open_catalog(rec).num_classes == TOO_LARGE
    with pytest.raises(DatasetError, match="expected a sum of at most 9223372036854775806"):
        open_catalog([rec, rec])


@pytest.mark.parametrize("member", ["cls", "json"])
def test_such_a_label_is_refused_in_shards(member, tmp_path):
    content = str(TOO_LARGE) if member == "cls" else json.dumps({"label": TOO_LARGE})
    (tmp_path / "a.jpg").write_bytes(b"image")
    (tmp_path / f"a.{member}").write_text(content)
    subprocess.run(["tar", "-cf", "s.tar", "a.jpg", f"a.{member}"], cwd=tmp_path, check=True)
    with pytest.raises(ShardError, match="expected an integer from 0 to 9223372036854775806"):
        index_shard(tmp_path / "s.tar")
    with pytest.raises(RemoteError, match="expected a whole number from 0 to 9223372036854775806"):
        _label({member: content.encode()}, "s.tar: a")


def test_no_writer_writes_such_a_label(tmp_path):
    with pytest.raises(ValueError, match="a label from 0 to 9223372036854775806"):
        FlatWriter(tmp_path, image_size=(8, 8)).add(b"image", TOO_LARGE)
    with pytest.raises(ValueError, match="a label from 0 to 9223372036854775806"):
        sample(0, b"image", TOO_LARGE)
