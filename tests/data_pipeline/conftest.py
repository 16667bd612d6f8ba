"""Small datasets for the tests of the data pipeline."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.formats import recordio
from data_pipeline.formats.recordio_writer import InsightFaceWriter

SIZE = 48


def _jpeg(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture(scope="session")
def jpeg():
    """A function that returns a smooth colour image of 48x48 pixels, a different one for every number."""
    return _jpeg


@pytest.fixture(scope="session")
def write_records():
    """A function that writes (key, labels, image) as train.rec and train.idx."""

    def write(folder, records):
        folder.mkdir(parents=True, exist_ok=True)
        with recordio.RecordWriter(folder / "train.rec") as writer:
            for key, labels, image in records:
                writer.write(key, recordio.pack(labels, key, image))
        return folder

    return write


@pytest.fixture
def dataset(tmp_path):
    """An InsightFace folder of 3 classes with 4 images each; labels alternate: scalar, [class, aligned]."""
    with InsightFaceWriter(tmp_path / "faces", size=SIZE) as writer:
        for i in range(12):
            label = float(i // 4)
            writer.add(_jpeg(i), label if i % 2 else (label, 1.0))
    return tmp_path / "faces"
