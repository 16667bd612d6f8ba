"""Training runs in real processes: output, learning, resume after a kill, failure of all ranks together."""

import fcntl
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import time
import urllib.request

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from data_pipeline.formats import recordio
from data_pipeline.formats.pair_file import read_pairs
from data_pipeline.formats.recordio_writer import InsightFaceWriter
from data_pipeline.synthetic.dataset import write_set
from tests.conftest import skip_without_right
from tests.trainer.conftest import SMALL, command, environment, losses, run, train_words
from tests.trainer.processes import children, kill_all, patched, start, state_of, wait_for
from trainer.checkpoint import directory
from trainer.inference import network

STEPS = 24
SMALL_DISK = 128 << 10
EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH = 0x8004587D, 2  # of Linux's fs/ext4/ext4.h
OPTIONS = (
    f"steps={STEPS}",
    "optimizer.warmup_steps=4",
    "checkpoint.every_steps=8",
    "checkpoint.keep=2",
    # Other state of the head, and parts that depend on the step.
    "head.margin.kind=adaface",
    "head.sample_rate=0.5",
    "head.optimizer.moments=bf16",
)


@pytest.fixture(scope="module")
def straight(faces, tmp_path_factory):
    """A run of two ranks, start to end."""
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    done = run(*train_words(run_dir, faces, *OPTIONS), ranks=2)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture(scope="module")
def killed(faces, tmp_path_factory):
    """The same run, all of whose processes were killed after the first checkpoint."""
    run_dir = tmp_path_factory.mktemp("runs") / "killed"
    words = command(*train_words(run_dir, faces, *OPTIONS), ranks=2)
    with subprocess.Popen(
        words, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_for(lambda: list(run_dir.glob("checkpoints/step-*")), process)
        kill_all(process)
    assert not (run_dir / "result.json").exists()
    return run_dir


def test_a_training_learns_and_leaves_what_it_should(straight):
    found = losses(straight)
    assert list(found) == list(range(1, STEPS + 1))
    assert sum(found[step] for step in range(STEPS - 3, STEPS + 1)) / 4 < 0.8 * found[1]
    result = json.loads((straight / "result.json").read_text())
    assert result["steps"] == STEPS
    assert result["world_size"] == 2
    assert result["samples_per_s"] > 0
    assert 0 <= result["verification_accuracy_untrained"] <= 1
    assert result["verification_accuracy"] == result["verification"]["held_out"]["accuracy"]
    assert {"python", "torch", "deepspeed", "nvidia-dali-cuda130", "lgaf"} <= set(result["versions"])
    kept = sorted(path.name for path in (straight / "checkpoints").iterdir())
    assert kept == ["step-00000016", f"step-{STEPS:08d}"]
    report = (straight / "report.html").read_text()
    assert "identity 0" in report
    assert "occlusion" in report


def test_a_killed_run_goes_on_to_the_same_losses(killed, straight, faces, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(killed, run_dir)
    done = run(*train_words(run_dir, faces, *OPTIONS), ranks=2)
    assert done.returncode == 0, done.stderr
    assert re.search(r"steps (8|16) to 24", done.stderr)
    assert losses(run_dir) == losses(straight)


def test_one_rank_goes_on_with_what_two_have_saved(killed, straight, faces, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(killed, run_dir)
    done = run(*train_words(run_dir, faces, *OPTIONS))
    assert done.returncode == 0, done.stderr
    found, expected = losses(run_dir), losses(straight)
    assert list(found) == list(expected)
    # Batch normalisation sees one batch of 32 instead of two of 16, so it is near and not the same.
    assert found[STEPS] == pytest.approx(expected[STEPS], rel=0.3)


def test_a_finished_run_only_says_so_again(straight, faces, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    before = (run_dir / "metrics.jsonl").read_text()
    done = run(*train_words(run_dir, faces, *OPTIONS), ranks=2)
    assert done.returncode == 0, done.stderr
    assert losses(run_dir) == losses(straight)
    assert (run_dir / "metrics.jsonl").read_text().startswith(before)
    results = [json.loads((path / "result.json").read_text()) for path in (run_dir, straight)]
    assert results[0]["verification_accuracy"] == results[1]["verification_accuracy"]


def test_a_changed_configuration_is_refused_once(straight, faces):
    words = train_words(straight, faces, *OPTIONS, "optimizer.learning_rate=0.3", "head.scale=16")
    done = run(*words, ranks=2)
    assert done.returncode != 0
    for changed in ("optimizer.learning_rate: 0.1 -> 0.3", "head.scale: 32.0 -> 16.0"):
        assert done.stderr.count(changed) == 1, done.stderr
    # torchrun has a traceback of its own, after ours if there were one.
    assert "Traceback" not in done.stderr[: done.stderr.index("lgaf: rank")]


def test_another_dataset_is_refused(straight, faces, tmp_path):
    other = tmp_path / "other"
    write_set(other, SMALL.model_copy(update={"images_per_identity": 9}))
    done = run(*train_words(straight, other, *OPTIONS))
    assert done.returncode == 1
    assert "dataset.images: 160 -> 180; dataset.labels_crc32: " in done.stderr


def test_a_key_newer_than_the_checkpoint_has_its_default(straight, faces, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)

    def forget(config):
        del config["optimizer"]["power"], config["skip_limit"]

    change_config(run_dir / "checkpoints" / f"step-{STEPS:08d}", forget)
    # The demo's power is not the default, so it is a difference; the limit is the default, and is none.
    done = run(*train_words(run_dir, faces, *OPTIONS))
    assert done.returncode == 1
    assert "changed keys: optimizer.power: 2.0 -> 1.5;" in done.stderr


def test_a_full_disk_ends_the_run_only_at_its_last_step(faces, tmp_path):
    run_dir = tmp_path / "run"
    words = command(*train_words(run_dir, faces, *OPTIONS, "log_every_steps=3"), ranks=2)
    limited = ["bash", "-c", 'ulimit -f 60; exec "$@"', "-", *words]
    done = subprocess.run(limited, env=environment(), text=True, capture_output=True, timeout=120)
    assert done.returncode != 0
    unsaved = r"step-0*(\d+) could not be written by rank [01]:.*"
    assert re.findall(unsaved + "Training continues", done.stderr) == ["8"]
    assert re.findall("lgaf: rank [01]: .*" + unsaved, done.stderr) == [str(STEPS)]
    assert done.stderr.count("lgaf: rank") == 1, done.stderr
    assert list(losses(run_dir)) == list(range(1, STEPS + 1))
    assert not list((run_dir / "checkpoints").iterdir())


def mount_or_skip(*words):
    done = subprocess.run(["mount", *map(str, words)], text=True, capture_output=True)
    if done.returncode != 0:
        skip_without_right(f"no file system can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """Where a file system can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    yield folder
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", folder], check=True)


# At any speed, the saves at 16 to 40 fail, and those from 48 on do not.
WAITS = """
import pathlib, time
from trainer import loop
seed = loop.seed_dropout
def seed_when_it_is_time(of_run, step, rank):
    while not pathlib.Path({folder!r}, "mended" if step >= 44 else "spoiled" if step >= 12 else "").exists():
        time.sleep(0.02)
    seed(of_run, step, rank)
loop.seed_dropout = seed_when_it_is_time
"""


def wait_out(run_dir, faces, folder, problem, mend, spoil=lambda process: None):
    """Train until a failed save is reported, remove its cause, and check that nothing else failed."""
    words = train_words(run_dir, faces, *OPTIONS, "log_every_steps=2", "steps=60")
    with start([*patched(folder, WAITS.format(folder=str(folder)), ranks=2), *words]) as process:
        spoil(process)
        (folder / "spoiled").touch()
        said = next(line for line in process.stderr if "Training continues" in line)
        assert problem in said, said
        mend()
        (folder / "mended").touch()
        _, said_later = process.communicate(timeout=180)
    assert process.returncode == 0, said_later
    assert "Training continues" not in said_later
    assert list(losses(run_dir)) == list(range(1, 61))
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert kept == ["step-00000056", "step-00000060"]
    assert all(directory.damage(run_dir / "checkpoints" / name) is None for name in kept)


def test_a_full_disk_is_waited_out(disk, faces, tmp_path):
    # Room for a run's records and for no checkpoint.
    mount_or_skip("-t", "tmpfs", "-o", f"size={SMALL_DISK}", "none", disk)

    def mend():
        assert not list(disk.glob("run/checkpoints/step-*"))
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)

    wait_out(disk / "run", faces, tmp_path, "No space left on device", mend)


def test_a_lost_file_system_is_waited_out(disk, faces, tmp_path):
    if shutil.which("mkfs.ext4") is None:
        skip_without_right("there is no mkfs.ext4 here")
    image, run_dir = tmp_path / "image", tmp_path / "run"
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    mount_or_skip("-o", "loop", image, disk)
    (disk / "held").mkdir()
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(disk / "held")

    def lose(process):
        """Shut the file system down, as the kernel does if the device is gone: then every access fails."""
        wait_for((disk / "held" / "step-00000008").exists, process)
        handle = os.open(disk, os.O_RDONLY)
        fcntl.ioctl(handle, EXT4_IOC_SHUTDOWN, struct.pack("I", EXT4_GOING_FLAGS_NOLOGFLUSH))
        os.close(handle)

    def mend():
        """Mount it again. While a rank still has a file open there, the kernel mounts the lost one."""
        for _ in range(600):
            subprocess.run(["umount", "--lazy", disk], check=True)
            subprocess.run(["mount", "-o", "loop", image, disk], check=True)
            try:
                return (disk / "works").touch()
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the file system stays lost")

    wait_out(run_dir, faces, tmp_path, "Input/output error", mend, spoil=lose)


def test_ranks_killed_while_they_save_go_on_from_the_checkpoint_before(straight, faces, tmp_path):
    run_dir = tmp_path / "run"
    words = command(*train_words(run_dir, faces, *OPTIONS), ranks=2)
    with subprocess.Popen(
        words, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_for(lambda: list(run_dir.glob("checkpoints/step-*")), process)
        ranks = children(process)
        folder = run_dir / "checkpoints"
        wait_for(lambda: (folder / ".step-00000016.part").exists(), process, pause_s=0)
        for pid in [process.pid, *ranks]:
            os.kill(pid, signal.SIGKILL)
    # That which a kill at another instant would have left.
    shutil.copytree(folder / "step-00000008", folder / ".step-00000032.part")
    done = run(*train_words(run_dir, faces, *OPTIONS), ranks=2)
    assert done.returncode == 0, done.stderr
    assert re.search(r"steps (8|16) to 24", done.stderr)
    assert losses(run_dir) == losses(straight)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000016", "step-00000024"]


def test_a_damaged_checkpoint_is_passed_over_and_said_once(straight, faces, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    damaged = run_dir / "checkpoints" / f"step-{STEPS:08d}" / "rank-1.bin"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    done = run(*train_words(run_dir, faces, *OPTIONS), ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"lgaf: {damaged}: expected CRC-32 ") == 1, done.stderr
    assert "steps 16 to 24" in done.stderr
    assert losses(run_dir) == losses(straight)
    assert directory.damage(damaged.parent) is None


def change_config(checkpoint, change):
    """Change the configuration in a checkpoint's manifest."""
    manifest = directory.read_manifest(checkpoint)
    change(manifest.header.config)
    (checkpoint / "checkpoint.json").write_text(directory._sealed(manifest))


def test_torchrun_restarts_go_on_from_the_checkpoint(straight, faces, tmp_path):
    run_dir = tmp_path / "run"
    words = command(*train_words(run_dir, faces, *OPTIONS), ranks=2)
    words.insert(words.index("--standalone"), "--max-restarts=1")
    with subprocess.Popen(
        words, env=environment(), text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        wait_for(lambda: list(run_dir.glob("checkpoints/step-*")), process)
        listed = subprocess.run(["pgrep", "-P", str(process.pid)], text=True, capture_output=True)
        os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)
        _, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert re.search(r"steps (8|16) to 24", said)
    assert losses(run_dir) == losses(straight)


def test_a_killed_rank_is_spoken_of(faces, tmp_path):
    words = command(*train_words(tmp_path / "run", faces, "steps=100000", "log_every_steps=1"), ranks=2)
    with subprocess.Popen(
        words, env=environment(), text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and "train" in metrics.read_text(), process)
        listed = subprocess.run(["pgrep", "-P", str(process.pid)], text=True, capture_output=True)
        os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)
        _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    # torchrun may end the other rank before it notices.
    assert said.count("lgaf: rank") <= 1, said
    assert "Signal 9 (SIGKILL)" in said


def test_eval_repeats_the_accuracy_of_the_run(straight, faces):
    done = run("eval", straight, "--pairs", faces / "held_out.bin")
    assert done.returncode == 0, done.stderr
    expected = json.loads((straight / "result.json").read_text())["verification"]["held_out"]
    assert json.loads(done.stdout)["held_out"]["accuracy"] == pytest.approx(expected["accuracy"], abs=0.02)
    both = run("eval", straight, "--pairs", faces / "held_out.bin", ranks=2)
    assert json.loads(both.stdout)["held_out"] == pytest.approx(json.loads(done.stdout)["held_out"])


def test_the_network_can_be_taken_out_and_begun_with(straight, faces, tmp_path):
    out = tmp_path / "network.pt"
    done = run("checkpoint", "extract", straight, "--out", out)
    assert done.returncode == 0, done.stderr
    held = torch.load(out, weights_only=True)
    assert held["step"] == STEPS
    saved = state_of(straight / "checkpoints" / f"step-{STEPS:08d}")
    weights = network.load_backbone(out).state_dict()
    trained = {name: tensor for name, tensor in saved.items() if name.startswith("backbone_weight.")}
    assert len(trained) > 50
    for name, tensor in trained.items():
        assert torch.equal(weights[name.removeprefix("backbone_weight.")], tensor), name
    begun = run(
        *train_words(tmp_path / "run", faces, *OPTIONS, "steps=1", f"backbone.weights={out}"), ranks=2
    )
    assert begun.returncode == 0, begun.stderr
    before, after = (
        json.loads((run_dir / "result.json").read_text()) for run_dir in (straight, tmp_path / "run")
    )
    assert after["verification_accuracy_untrained"] == before["verification_accuracy"]
    out.unlink()
    again = run(*train_words(tmp_path / "run", faces, *OPTIONS, "steps=1", f"backbone.weights={out}"))
    assert again.returncode == 0, again.stderr


def test_two_faces_are_judged_as_the_run_judged_its_pairs(straight, faces, tmp_path):
    for name, image in zip("ab", read_pairs(faces / "held_out.bin").images, strict=False):
        (tmp_path / name).write_bytes(image)
    done = run("compare", tmp_path / "a", tmp_path / "b", "--checkpoint", straight)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = json.loads((straight / "result.json").read_text())["verification"]["held_out"]
    assert found["threshold"] == expected["threshold"]
    assert found["same_person"] == (found["similarity"] >= expected["threshold"])
    assert found["threshold_from"] == f"evaluation on held_out at step {STEPS} of {straight}"


def test_a_checkpoint_of_another_model_is_refused(straight, faces, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(straight / "checkpoints" / f"step-{STEPS:08d}", checkpoint)
    change_config(checkpoint, lambda config: config["backbone"].update(width=12))
    done = run("eval", checkpoint, "--pairs", faces / "held_out.bin")
    assert done.returncode == 1
    assert re.search(
        rf"lgaf: {checkpoint}: expected the tensors of this model, found .* has shape \(.*\), expected",
        done.stderr,
    )


def test_metrics_move_while_it_trains(faces, tmp_path):
    words = command(
        *train_words(
            tmp_path / "run", faces, "steps=100000", "log_every_steps=1", "checkpoint.every_steps=4"
        ),
        ranks=2,
    )
    with subprocess.Popen(
        words, env=environment(), text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:
            url = next(m[0] for m in (re.search(r"http://\S+/metrics", line) for line in process.stderr) if m)
            wait_for(lambda: scrape(url)["lgaf_steps_total"] >= 2, process)
            first = scrape(url)
            wait_for(lambda: scrape(url)["lgaf_steps_total"] >= first["lgaf_steps_total"] + 5, process)
            second = scrape(url)
        finally:
            process.terminate()
            process.communicate()
    assert second["lgaf_samples_total"] == 32 * second["lgaf_steps_total"]
    assert second["lgaf_step_seconds_count"] == second["lgaf_steps_total"] == second["lgaf_step"]
    assert second["lgaf_step_seconds_sum"] > first["lgaf_step_seconds_sum"] > 0
    assert second["lgaf_data_wait_seconds_total"] > first["lgaf_data_wait_seconds_total"]
    assert second["lgaf_loss"] != first["lgaf_loss"]
    assert second["lgaf_learning_rate"] != first["lgaf_learning_rate"]
    assert second["lgaf_samples_per_second"] > 0
    assert second["lgaf_checkpoint_seconds_count"] > first["lgaf_checkpoint_seconds_count"]
    assert second["lgaf_skipped_steps_total"] == second["lgaf_failed_checkpoints_total"] == 0


def scrape(url):
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "le" not in sample.labels
    }


def test_a_run_dir_that_cannot_be_made(faces):
    done = run(*train_words("/proc/nowhere", faces, *OPTIONS))
    assert done.returncode == 1
    assert "lgaf: run_dir /proc/nowhere: expected a folder that can be written, found: " in done.stderr


def test_two_verification_files_of_one_name(straight, faces):
    pairs = faces / "held_out.bin"
    done = run("eval", straight, "--pairs", pairs, "--pairs", pairs)
    assert done.returncode == 1
    assert "expected different names; rename one" in done.stderr


def test_a_bad_image_is_listed_and_the_run_goes_on(faces, tmp_path):
    broken, run_dir = tmp_path / "broken", tmp_path / "run"
    (key,) = copy_with_broken_images(faces, broken, 1)
    done = run(*train_words(run_dir, broken, *OPTIONS), ranks=2, timeout_s=120)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {key}
    assert f"1 bad records so far: {run_dir / 'quarantine.jsonl'}" in done.stderr


def test_too_many_bad_images_end_the_job_with_one_message(faces, tmp_path):
    broken = tmp_path / "broken"
    keys = copy_with_broken_images(faces, broken, 30)
    done = run(*train_words(tmp_path / "run", broken, *OPTIONS), ranks=2, timeout_s=120)
    assert done.returncode != 0
    said = re.findall(r"lgaf: rank [01]: 11 of the first \d+ samples cannot be read or decoded", done.stderr)
    assert len(said) == 1, done.stderr
    assert done.stderr.count("lgaf: rank") == 1, done.stderr
    named = re.findall(r"^  .*train\.rec: key (\d+) at byte \d+: ", done.stderr, re.MULTILINE)
    assert len(named) == 10
    assert set(map(int, named)) <= set(keys)


def copy_with_broken_images(faces, folder, count):
    """The same dataset, `count` of whose images begin like a JPEG and are none; returns their keys."""
    _, offset_N = recordio.read_index(faces / "train.idx")
    data = (faces / "train.rec").read_bytes()
    broken = set(range(20, 20 + count))
    with InsightFaceWriter(folder, size=112) as writer:
        for number, (start, end) in enumerate(zip(offset_N, [*offset_N[1:], len(data)], strict=True)):
            record = recordio.unpack(recordio.join_frames(data[start:end], "", start), "")
            if not record.is_meta:
                image = record.image[:60] if number in broken else record.image
                writer.add(image, record.labels if len(record.labels) > 1 else record.labels[0])
    shutil.copy(faces / "held_out.bin", folder)
    return [number + 1 for number in broken]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=/nowhere", "no dataset at /nowhere: expected /nowhere/train.rec"),
        ("global_batch=33", "a global_batch of 33 does not divide by 2 ranks"),
        ("optimizer.learning_rat=1", "unknown key optimizer.learning_rat; did you mean"),
        ("backbone.weights=absent.pt", "backbone.weights = absent.pt: expected a state dict"),
        ('evaluation.sets=["absent.bin"]', "absent.bin: expected a verification file, found none"),
    ],
)
def test_bad_input_is_said_once_by_two_ranks(faces, tmp_path, override, message):
    done = run(*train_words(tmp_path / "run", faces, *OPTIONS, override), ranks=2, timeout_s=120)
    assert done.returncode != 0
    assert done.stderr.count(message) == 1, done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_steps_that_are_not_finite_are_skipped_recorded_and_after_some_diagnosed_once(faces, tmp_path):
    run_dir = tmp_path / "run"
    overrides = ("optimizer.learning_rate=1e30", "optimizer.warmup_steps=0", "skip_limit=3", "steps=50")
    done = run(*train_words(run_dir, faces, *overrides), ranks=2, timeout_s=120)
    assert done.returncode != 0
    said = re.findall(
        r"lgaf: rank [01]: steps (\d+) to (\d+): .* non-finite \w+ in each of these 3", done.stderr
    )
    assert len(said) == 1, done.stderr
    for clue in ("optimizer.learning_rate", "the labels", "head.scale, now 32"):
        assert done.stderr.count(clue) == 1, done.stderr
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kinds = [record["kind"] for record in records if record["kind"] in ("train", "skipped")]
    assert kinds == ["train"] * (len(kinds) - 3) + ["skipped"] * 3
    assert len(kinds) == int(said[0][1]) > 3
    assert all(record["loss"] is None for record in records if record["kind"] == "skipped")
