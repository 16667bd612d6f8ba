"""A catalog of five million records: memory while it is built, and time to open it.

Times are printed (pytest -s), not asserted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
RECORDS = 5_000_000
# Measured: 80 with an index, 68 without. A Python object per record would take hundreds.
MOST_BYTES = 120

WRITE = np.dtype(
    [
        ("magic", "<u4"),
        ("length", "<u4"),
        ("flag", "<u4"),
        ("label", "<f4"),
        ("id", "<u8", 2),
        ("image", "S8"),
    ]
)

MEASURE = """
import json, sys, time
from pathlib import Path
from data_pipeline.indexed.catalog import open_catalog

def status_bytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

before, start = status_bytes("VmRSS"), time.perf_counter()
catalog = open_catalog(Path(sys.argv[1]), 1_000_000)
start, built_s, peak = time.perf_counter(), time.perf_counter() - start, status_bytes("VmHWM")
catalog = open_catalog(Path(sys.argv[1]), 1_000_000)
fingerprint = catalog.fingerprint
opened_s = time.perf_counter() - start
record_N = [(i * 7919) % len(catalog) for i in range(200_000)]
start = time.perf_counter()
for record in record_N:
    catalog.image(record)
rate = len(record_N) / (time.perf_counter() - start)
at = [0, 1, 2_500_000, len(catalog) - 1]
print(json.dumps({
    "built_s": built_s, "opened_s": opened_s, "bytes": peak - before, "images_per_s": rate,
    "identity": fingerprint, "labels": catalog.label_N[at].tolist(), "keys": catalog.key_N[at].tolist(),
    "image": catalog.image(2_500_000).tobytes().decode(),
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    key_N = np.arange(RECORDS)
    records = np.zeros(RECORDS, WRITE)
    records["magic"], records["length"] = 0xCED7230A, WRITE.itemsize - 8
    records["label"], records["id"][:, 0], records["image"] = key_N % 999_983, key_N, b"tinyface"
    records.tofile(folder / "train.rec")
    with open(folder / "train.idx", "w") as file:
        for start in range(0, RECORDS, 500_000):
            keys = range(start, start + 500_000)
            file.write("".join([f"{key}\t{key * WRITE.itemsize}\n" for key in keys]))
    yield folder
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()


@pytest.mark.parametrize("has_index", [True, False])
def test_five_million_records(folder, has_index):
    if not has_index:
        (folder / "train.idx").unlink()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    per_record = said["bytes"] / RECORDS
    print(
        f"{'with' if has_index else 'without'} an index: {said['built_s'] / RECORDS * 1e6:.2f} s per million "
        f"records, {per_record:.0f} bytes per record at the peak; opened in {said['opened_s'] * 1e3:.1f} ms; "
        f"{said['images_per_s']:.0f} images/s"
    )
    assert per_record < MOST_BYTES
    assert said["labels"] == [0, 1, 2_500_000 % 999_983, (RECORDS - 1) % 999_983]
    assert said["keys"] == [0, 1, 2_500_000, RECORDS - 1]
    assert said["image"] == "tinyface"
    assert (said["identity"]["images"], said["identity"]["classes"]) == (RECORDS, 1_000_000)
