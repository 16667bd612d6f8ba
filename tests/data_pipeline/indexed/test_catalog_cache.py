"""The catalog's cache: built once by the first process, complete or not at all, and rebuilt when stale."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.indexed import catalog as catalog_module
from data_pipeline.indexed.catalog import DatasetError, open_catalog

ROOT = Path(__file__).parents[3]
# Opens a catalog and logs every build to a file; with "slowly" it creates a file and never finishes writing.
OPEN = """
import os, sys, time
from pathlib import Path
from data_pipeline.indexed import catalog
from data_pipeline.indexed import catalog_cache

folder, log, manner = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
build, rename = catalog._build, catalog_cache._rename

def logged(datasets):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(0.3)
    return build(datasets)

def never(partial, final):
    log.with_suffix(".ready").touch()
    time.sleep(600)

catalog._build = logged
if manner == "slowly":
    catalog_cache._rename = never
opened = catalog.open_catalog(folder)
print(len(opened), int(opened.label_N.sum()))
"""


def start(folder, log, manner="plain"):
    return subprocess.Popen(
        [sys.executable, "-c", OPEN, folder, log, manner],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def builds(monkeypatch):
    """A list that grows by one with every catalog that this process builds."""
    made, build = [], catalog_module._build
    monkeypatch.setattr(catalog_module, "_build", lambda datasets: made.append(datasets) or build(datasets))
    return made


def entries(place):
    return sorted(path.name for path in place.iterdir() if path.is_dir())


def labels(folder, **options):
    return open_catalog(folder, **options).label_N.tolist()


LABELS = np.repeat(range(3), 4).tolist()


def test_built_once_and_then_mapped(dataset, builds):
    crc32 = zlib.crc32(np.array(LABELS, np.int64).tobytes())
    for _ in range(3):
        catalog = open_catalog(dataset)
        assert catalog.label_N.tolist() == LABELS
        assert catalog.fingerprint == {"images": 12, "classes": 3, "labels_crc32": crc32}
    assert len(builds) == 1
    assert len(entries(dataset / ".lgaf_catalog")) == 1


def test_columns_larger_than_a_page_are_memory_maps(tmp_path, write_records):
    folder = write_records(tmp_path, [(k, 0.0, b"face") for k in range(3000)])
    catalog = open_catalog(folder)
    for column in (catalog.file_N, catalog.offset_N, catalog.length_N, catalog.label_N, catalog.key_N):
        assert type(column) is np.ndarray
        assert isinstance(column.base, np.memmap)


@pytest.mark.parametrize("file", ["train.rec", "train.idx"])
def test_a_changed_file_means_a_new_catalog(dataset, builds, file):
    open_catalog(dataset)
    os.utime(dataset / file, ns=(1, 12345))
    open_catalog(dataset)
    (dataset / "train.labels.npy").touch()
    with pytest.raises(DatasetError, match="expected int64"):
        open_catalog(dataset)
    assert len(builds) == 3
    assert len(entries(dataset / ".lgaf_catalog")) == 1


def test_changed_classes_do_not(dataset, builds):
    open_catalog(dataset)
    (dataset / "property").write_text("3,48,48\nshuffled\n")
    assert open_catalog(dataset, num_classes=9).num_classes == 9
    assert open_catalog(dataset).num_classes == 3
    assert len(builds) == 1


def test_a_moved_dataset_keeps_its_catalog(dataset, builds, tmp_path):
    open_catalog(dataset)
    dataset.rename(tmp_path / "elsewhere")
    catalog = open_catalog(tmp_path / "elsewhere")
    assert len(catalog.image(3)) > 0
    assert len(builds) == 1


def test_a_changed_image_folder_means_a_new_catalog(tmp_path, builds):
    for name in ("a/1.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"image")
    assert labels(tmp_path) == labels(tmp_path) == [0, 1]
    (tmp_path / "a" / "2.jpg").write_bytes(b"image")
    assert labels(tmp_path) == [0, 0, 1]
    os.utime(tmp_path / "b" / "1.jpg", ns=(1, 1))
    assert labels(tmp_path) == [0, 0, 1]
    assert len(builds) == 3


def test_catalogs_may_be_kept_elsewhere(dataset, builds, tmp_path):
    kept = tmp_path / "kept"
    twin = shutil.copytree(dataset, tmp_path / "twin" / "faces")
    (twin / "train.idx").unlink()
    for folder in (dataset, twin, dataset, twin):
        assert labels(folder, catalog_dir=kept) == LABELS
    assert len(builds) == 2
    assert len(entries(kept)) == 2
    assert not (dataset / ".lgaf_catalog").exists()


def test_the_user_s_cache_takes_what_the_dataset_s_folder_cannot(dataset, builds, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (dataset / ".lgaf_catalog").touch()  # so that no folder of this name can be created
    assert labels(dataset) == labels(dataset) == LABELS
    assert len(builds) == 1
    (name,) = entries(tmp_path / "cache" / "lgaf")
    assert name.startswith("faces-")


def test_no_place_at_all(dataset, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=r"found none: .*file/.*; set data.catalog_dir"):
        open_catalog(dataset, catalog_dir=tmp_path / "file")


@pytest.mark.parametrize("file", ["label_N.npy", "damaged_K.npy", "facts.json"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99, 1.5, None])
def test_a_damaged_cache_is_rebuilt(dataset, builds, file, kept):
    open_catalog(dataset)
    place = dataset / ".lgaf_catalog"
    path = place / entries(place)[0] / file
    content = path.read_bytes()
    if kept is None:
        path.unlink()
    else:
        path.write_bytes((content + content)[: int(kept * len(content))])
    assert labels(dataset) == labels(dataset) == LABELS
    assert len(builds) == 2
    assert path.read_bytes() == content


def test_several_processes_build_once(dataset, tmp_path):
    log = tmp_path / "log"
    running = [start(dataset, log) for _ in range(4)]
    assert [process.communicate(timeout=60)[0] for process in running] == ["12 12\n"] * 4
    assert len(log.read_text().split()) == 1


def test_a_killed_builder_leaves_nothing_and_holds_nobody_up(dataset, tmp_path):
    log, place = tmp_path / "log", dataset / ".lgaf_catalog"
    killed = start(dataset, log, "slowly")
    deadline = time.monotonic() + 60
    while not log.with_suffix(".ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    waiting = start(dataset, log)
    assert [name for name in entries(place) if not name.endswith(".part")] == []
    assert len(entries(place)) == 1
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert waiting.communicate(timeout=60)[0] == "12 12\n"
    assert labels(dataset) == LABELS
    assert len(log.read_text().split()) == 2
    (entry,) = entries(place)
    assert not entry.endswith(".part")


def test_a_failed_build_leaves_nothing(dataset, monkeypatch):
    def full(path, pieces):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.indexed.catalog_cache._write", full)
        with pytest.raises(DatasetError, match=r"cannot be written to .*: No space left on device"):
            open_catalog(dataset)
    assert entries(dataset / ".lgaf_catalog") == []
    assert labels(dataset) == LABELS


def test_a_file_system_without_locks_will_do(dataset, monkeypatch):
    def refuse(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert labels(dataset) == LABELS
