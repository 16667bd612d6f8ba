"""A set that is streamed in parts while it is rendered has the images of the written set, each once."""

import io
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from data_pipeline.indexed.catalog import open_catalog
from data_pipeline.streaming.samples import RemoteSamples, shard_urls
from data_pipeline.synthetic.dataset import write_set
from data_pipeline.synthetic.identities import SynthConfig

ROOT = Path(__file__).parents[3]
CONFIG = SynthConfig(
    seed=3, identities=7, images_per_identity=11, held_out_identities=2, pairs=2, image_size=32
)
RENDER = f"{shlex.quote(sys.executable)} -m trainer data render"
KEYS = "--set seed=3 --set identities=7 --set images_per_identity=11 --set image_size=32"


@pytest.fixture(autouse=True)
def find_the_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_the_parts_are_the_set(tmp_path):
    write_set(tmp_path / "set", CONFIG)
    catalog = open_catalog([tmp_path / "set"])
    stored = {catalog.image(record).tobytes(): label for record, label in enumerate(catalog.label_N.tolist())}
    assert len(stored) == CONFIG.images
    urls = shard_urls([f"pipe:{RENDER} {{0..2}}/3 {KEYS}"])
    with RemoteSamples(urls, seed=1, rank=0, world_size=1, window=8) as samples:
        streamed = [next(samples) for _ in range(CONFIG.images)]
    assert {one.encoded.tobytes(): one.label for one in streamed} == stored


def test_a_part_is_the_same_bytes_on_any_number_of_processes():
    one, three = (
        subprocess.run(
            f"{RENDER} 1/2 {KEYS} --set processes={n}", shell=True, capture_output=True, check=True
        )
        for n in (1, 3)
    )
    assert one.stdout == three.stdout
    with tarfile.open(fileobj=io.BytesIO(one.stdout)) as archive:
        labels = [int(archive.extractfile(m).read()) for m in archive if m.name.endswith(".cls")]
    assert len(labels) == CONFIG.images // 2
    assert sorted(labels) not in (labels, labels[::-1])
    assert max(map(labels.count, labels)) < CONFIG.images_per_identity


def test_more_parts_than_images_are_refused():
    done = subprocess.run([*shlex.split(RENDER), "0/78", *KEYS.split()], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("lgaf: 0/78: expected at most as many parts as images, found 77 images (")
    assert not done.stdout


@pytest.mark.parametrize("part", ["3/3", "1", "-1/3", "a/b"])
def test_an_invalid_part_is_refused(part):
    done = subprocess.run([*shlex.split(RENDER), "--", part], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"lgaf: {part}: expected a part and the number of parts, such as 0/50 or 49/50\n"
    assert not done.stdout


def test_a_reader_that_ends_early_causes_no_error():
    reading = subprocess.Popen(
        f"{RENDER} 0/1 {KEYS} --set identities=5000 | head -c 5000 | wc -c",
        shell=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    output, errors = reading.communicate(timeout=60)
    assert (output.strip(), errors) == ("5000", "")
