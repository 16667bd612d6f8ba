"""Comparison of two images, and the source of the decision threshold."""

import json

import numpy as np
import pytest
from PIL import Image, ImageOps
from typer.testing import CliRunner

from tests.trainer.inference.test_embed import SIZE, one_by_one, write_image
from tests.trainer.networks import small_network
from trainer.__main__ import app
from trainer.evaluation import compare
from trainer.inference.network import write_pt


@pytest.fixture(scope="module")
def network():
    return small_network(image_size=SIZE)


@pytest.fixture
def faces(tmp_path):
    for seed in (1, 2):
        write_image(tmp_path / f"{seed}.png", seed=seed)
    return tmp_path / "1.png", tmp_path / "2.png"


def test_similarity_and_quality_are_those_of_the_embeddings(network, faces):
    similarity, quality = compare.compare(network, *faces)
    first_D, second_D = (one_by_one(network, path, flip=True) for path in faces)
    lengths = np.linalg.norm(first_D), np.linalg.norm(second_D)
    assert similarity == pytest.approx(first_D @ second_D / (lengths[0] * lengths[1]), abs=1e-4)
    assert quality == pytest.approx(lengths, rel=1e-4)


def test_a_face_and_its_mirror_image_are_one(network, faces, tmp_path):
    ImageOps.mirror(Image.open(faces[0])).save(tmp_path / "mirrored.png")
    similarity, (quality, mirrored) = compare.compare(network, faces[0], tmp_path / "mirrored.png")
    assert similarity == pytest.approx(1, abs=1e-6)
    assert mirrored == pytest.approx(quality, rel=1e-5)


def test_a_run_knows_the_threshold_of_each_step_it_evaluated(tmp_path):
    records = [
        {"kind": "train", "step": 20, "loss": 1.0},
        {"kind": "evaluation", "step": 10, "set": "lfw", "threshold": 0.9},
        {"kind": "evaluation", "step": 20, "set": "lfw", "threshold": 0.25},
        {"kind": "evaluation", "step": 20, "set": "agedb", "threshold": 0.35},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    checkpoint = tmp_path / "checkpoints" / "step-00000020"
    checkpoint.mkdir(parents=True)
    for path in (tmp_path, checkpoint):
        found = compare.known_threshold(path, 20)
        assert found.value == pytest.approx(0.3)
        assert found.source == f"evaluation on lfw, agedb at step 20 of {tmp_path}"
    assert compare.known_threshold(checkpoint, 10).value == 0.9
    assert compare.known_threshold(checkpoint, 15) is None
    alone = tmp_path / "checkpoints" / "n.pt"
    alone.touch()
    assert compare.known_threshold(alone, 20) is None


def test_the_command_judges_only_by_a_threshold_it_knows(network, faces, tmp_path):
    write_pt(network, tmp_path / "n.pt")

    def call(*words):
        done = CliRunner().invoke(
            app, ["compare", *map(str, faces), "--checkpoint", str(tmp_path / "n.pt"), *words]
        )
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    free = call()
    assert free.keys() == {"similarity", "quality"}
    similarity = free["similarity"]
    judged = call("--threshold", str(similarity))
    assert judged == free | {"same_person": True, "threshold": similarity, "threshold_from": "--threshold"}
    assert call("--threshold", str(similarity + 1e-6))["same_person"] is False
