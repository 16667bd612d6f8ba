"""Fuzzing of the readers: any bytes must give a valid result, or one of our errors.

    python tests/data_pipeline/fuzz.py [SECONDS [TARGET...]]

A target is a reader and some valid files. `check` passes given bytes to the reader, which must return data
that lies inside the file, or raise one of our errors, which names the file. Atheris searches for bytes that
violate this, for SECONDS per target; `test_fuzz.py` does the same with a few hundred mutations.
"""

import contextlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __name__ == "__main__":
    import atheris

    # Atheris' instrumentation of comparisons keeps numpy's results: megabytes for a chunk of records.
    compares_arrays = ["data_pipeline.formats.recordio_scan"]
    instrumented = atheris.instrument_imports(include=["data_pipeline"], exclude=compares_arrays)
else:
    instrumented = contextlib.nullcontext()

with instrumented:
    from data_pipeline.formats import recordio
    from data_pipeline.formats.container import RecordError
    from data_pipeline.formats.int64_labels import LABELS_SUFFIX, read_labels, write_labels
    from data_pipeline.formats.pair_file import VerificationFileError, read_pairs, write_pairs
    from data_pipeline.formats.recordio_writer import FlatWriter, InsightFaceWriter
    from data_pipeline.formats.tar_index import BLOCK, ShardError, index_shard
    from data_pipeline.formats.tar_writer import ShardWriter
    from data_pipeline.indexed.catalog import DatasetError, open_catalog

# The folder for the bytes that Atheris finds; ignored by git.
FOUND = Path("build/fuzz")
IMAGES = (b"\xff\xd8 an image", recordio.MAGIC_BYTES * 2 + b"in parts", b"\x89PNG")


class Target(NamedTuple):
    """A reader of the file `name` in a folder with the files of one of `folders`."""

    name: str
    read: Callable[[Path], None]
    errors: tuple[type[ValueError], ...]
    folders: tuple[dict[str, bytes], ...]

    @property
    def seeds(self) -> list[bytes]:
        """The valid files."""
        return [folder[self.name] for folder in self.folders]


def check(target: Target, data: bytes, folder: Path, which: int = 0) -> None:
    """Read `data` as the target's file, among the other files of folder number `which`.

    Raises any error that the target does not allow, and AssertionError for one that does not name the file.
    """
    for name, content in {**target.folders[which % len(target.folders)], target.name: data}.items():
        # A new file each time, because truncating an existing one can wait for the disk.
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
    message = ""
    try:
        target.read(folder)
    except target.errors as error:
        message = str(error)
    assert not message or str(folder) in message, f"an error that does not name its file: {message}"
    assert len(message) < 2000, f"an error of {len(message)} characters"


def read_dataset(folder: Path) -> None:
    """Read the catalog and all of its images."""
    catalog = open_catalog(folder)
    assert catalog.label_N.max() < catalog.num_classes
    for i in range(len(catalog)):
        assert len(catalog.image(i)) > 0


def read_records(folder: Path) -> None:
    """Read the records in sequence, without the index."""
    data, where = (folder / "train.rec").read_bytes(), str(folder / "train.rec")
    begin = 0
    for kind, _, end in recordio.walk_frames(data, where):
        assert end <= len(data)
        if kind in (recordio.WHOLE, recordio.END):
            stop = recordio.pad4(end)
            recordio.unpack(recordio.join_frames(data[begin:stop], where, begin), where)
            begin = stop


def read_index(folder: Path) -> None:
    """Read the index alone."""
    key_N, offset_N = recordio.read_index(folder / "train.idx")
    assert len(key_N) == len(offset_N)
    assert (np.diff(offset_N) >= 0).all()


def read_shard(folder: Path) -> None:
    """Index a shard after correcting its checksums, because few inputs would pass them."""
    path = folder / "train-000000.tar"
    data = bytearray(path.read_bytes())
    for at in range(0, len(data) - BLOCK, BLOCK):
        header = memoryview(data)[at : at + BLOCK]
        if header[257:262] == b"ustar" and header[0] % 16:
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(data)
    index = index_shard(path)
    assert (index.offset_N >= BLOCK).all()
    assert (index.length_N > 0).all()
    assert (index.offset_N + index.length_N <= len(data)).all()
    assert (index.label_N >= 0).all()


def read_verification(folder: Path) -> None:
    """Read the pairs, and require that all images are bytes."""
    pairs = read_pairs(folder / "set.bin")
    assert len(pairs.images) == 2 * pairs.pairs
    assert all(isinstance(image, bytes) and image for image in pairs.images)


def read_sidecar(folder: Path) -> None:
    """Read the labels."""
    key_N, label_N = read_labels(folder / "train.rec")
    assert len(key_N) == len(label_N)
    key_N.sum(), label_N.sum()


def written(write: Callable[[Path], object]) -> dict[str, bytes]:
    """Return the files that `write` writes into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def write_insightface(folder: Path) -> None:
    """Write index records, and records with scalar and with array labels."""
    with InsightFaceWriter(folder, size=112) as writer:
        for i, image in enumerate(IMAGES * 2):
            writer.add(image, float(i // 3) if i % 2 else (float(i // 3), 1.0))


def write_flat(folder: Path) -> None:
    """Write unordered labels."""
    with FlatWriter(folder, image_size=(112, 112)) as writer:
        for label, image in zip((2, 0, 1), IMAGES, strict=True):
            writer.add(image, label)


def write_shard(folder: Path) -> None:
    """Write a shard with our writer."""
    with ShardWriter(folder) as writer:
        for label, image in enumerate(IMAGES):
            writer.add(image, label)


def write_foreign_shard(form: int) -> Callable[[Path], None]:
    """Return a writer of long names, folders and JSON in one of tarfile's formats."""

    def write(folder: Path) -> None:
        with tarfile.open(folder / "train-000000.tar", "w", format=form, pax_headers={"comment": "x"}) as tar:
            for name, content in (
                ("a" * 120 + "/1.jpg", IMAGES[0]),
                ("a" * 120 + "/1.json", b'{"label": 12, "a": [1.5, null]}'),
                ("2.cls", b"7"),
                ("2.png", IMAGES[2]),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    return write


def written_pickle(protocol: int) -> Callable[[Path], object]:
    """Return a writer of bytes and an array in one set, each twice, so that the second one is a reference."""
    image, array = IMAGES[0], np.frombuffer(IMAGES[1], np.uint8)
    content = [image, array, image, array], [True, False]
    return lambda folder: (folder / "set.bin").write_bytes(pickle.dumps(content, protocol=protocol))


DATASETS = (written(write_insightface), written(write_flat))
DATASET_ERRORS = (DatasetError, RecordError)
SHARDS = (
    written(write_shard),
    *(
        written(write_foreign_shard(form))
        for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    ),
)
PICKLES = (
    written(lambda folder: write_pairs(folder / "set.bin", IMAGES * 2, [True, False, True])),
    *(written(written_pickle(protocol)) for protocol in range(6)),
)
SIDECARS = (written(lambda folder: write_labels(folder / "train.rec", np.arange(5), np.arange(5) % 2)),)
TARGETS = {
    "rec": Target("train.rec", read_dataset, DATASET_ERRORS, DATASETS),
    "rec without idx": Target("train.rec", read_records, (RecordError,), DATASETS),
    "idx": Target("train.idx", read_dataset, DATASET_ERRORS, DATASETS),
    "idx alone": Target("train.idx", read_index, (RecordError,), DATASETS),
    "property": Target("property", read_dataset, DATASET_ERRORS, DATASETS),
    "tar": Target("train-000000.tar", read_shard, (ShardError,), SHARDS),
    "bin": Target("set.bin", read_verification, (VerificationFileError,), PICKLES),
    "labels": Target(f"train{LABELS_SUFFIX}", read_sidecar, (DatasetError,), SIDECARS),
}


def run_all(seconds: str, *names: str) -> None:
    """Fuzz each target in its own process, one after the other, up to the first failure."""
    for name in names or TARGETS:
        print(f"--- {name}, {seconds} s", flush=True)
        done = subprocess.run([sys.executable, __file__, "--one", seconds, name], check=False)
        if done.returncode:
            sys.exit(f"{name}: the failing bytes are in {FOUND}; add them to test_fuzz.py")


def run_one(seconds: str, name: str) -> None:
    """Run Atheris on one target; it ends this process."""
    target = TARGETS[name]
    found, scratch = FOUND / name.replace(" ", "_"), Path(tempfile.mkdtemp())
    shutil.rmtree(found, ignore_errors=True)
    (found / "corpus").mkdir(parents=True)
    for i, seed in enumerate(target.seeds):
        (found / "corpus" / f"seed-{i}").write_bytes(seed)

    def one_input(data: bytes) -> None:
        check(target, data, scratch, which=len(data))

    limits = ("-timeout=10", "-rss_limit_mb=1024", "-malloc_limit_mb=256", "-max_len=16384")
    options = (f"-max_total_time={seconds}", f"-artifact_prefix={found}{os.sep}", "-print_final_stats=1")
    atheris.Setup([name, *limits, *options, str(found / "corpus")], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["--one"]:
        run_one(*words[1:])
    else:
        run_all(*words or ["60"])
