"""Runs of the version before the modules moved into departments resume with that version's losses.

An archive in `format_2` holds a dataset of 12 images and a run of four steps as that version wrote it: the
checkpoint of step 2, whose configuration has the keys of all kinds side by side, and the losses of all steps.
"""

import shutil
from pathlib import Path

import pytest

from tests.trainer.conftest import losses, run
from trainer.checkpoint import directory

RUN = """
    run_dir = "run"
    steps = 4
    global_batch = 8
    log_every_steps = 1
    metrics.port = 0
    checkpoint.every_steps = 2
    data = { path = "data", image_size = 16, threads = 1 }
"""
CONFIG = {
    "lgaf-adaface-sgd": """
        [backbone]
        name = "lgaf"
        blocks = [1, 1, 1, 1]
        width = 1
        embedding_size = 8
        dropout = 0.3
        mhms = { heads = [[1, 3]], attention_reduction = 1, grid = 2 }
        [head]
        scale = 32.0
        sample_rate = 0.6
        margin = { kind = "adaface", m = 0.3, h = 0.4 }
        [optimizer]
        learning_rate = 0.02
        power = 1.5
    """,
    "iresnet-curricularface-adamw": """
        [backbone]
        name = "iresnet"
        blocks = [1, 1, 1, 1]
        width = 1
        embedding_size = 8
        dropout = 0.3
        [head]
        scale = 32.0
        optimizer = { kind = "adamw", moments = "bf16", beta2 = 0.99 }
        margin = { kind = "curricularface", m = 0.3, momentum = 0.3 }
        [optimizer]
        kind = "adamw"
        learning_rate = 0.02
        power = 1.5
    """,
}


@pytest.mark.parametrize("name", CONFIG)
def test_a_run_from_before_the_departments_resumes_with_the_same_losses(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.unpack_archive(Path(__file__).parent / "format_2" / f"{name}.zip")
    [checkpoint] = directory.all_of(Path("run"))
    saved = directory.read_manifest(checkpoint).header.config
    assert "magface" in saved["head"]["margin"]
    assert "vit" in saved["backbone"]
    assert isinstance(saved["head"]["optimizer"], str)
    expected = losses(Path("run"))
    assert list(expected) == [1, 2, 3, 4]
    Path("config.toml").write_text(RUN + CONFIG[name])
    done = run("train", "config.toml")
    assert done.returncode == 0, done.stderr
    assert "steps 2 to 4" in done.stderr
    assert losses(Path("run")) == pytest.approx(expected, rel=1e-4)
