"""A cached catalog that someone else wrote or changed is checked first, and its links are not followed."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.formats.recordio_writer import FlatWriter
from data_pipeline.indexed import catalog as catalog_module
from data_pipeline.indexed import catalog_cache
from data_pipeline.indexed.catalog import DatasetError, open_catalog

ROOT = Path(__file__).parents[2]
LABELS = np.repeat(range(300), 4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A dataset whose catalog has been built; `open_catalog` counts further builds in `builds`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with FlatWriter(tmp_path / "faces", image_size=(8, 8)) as writer:
        for label in LABELS.tolist():
            writer.add(b"image", label)
    open_catalog(tmp_path / "faces")
    return tmp_path / "faces"


@pytest.fixture
def builds(folder, monkeypatch):
    made, build = [], catalog_module._build
    monkeypatch.setattr(catalog_module, "_build", lambda datasets: made.append(datasets) or build(datasets))
    return made


def entry_of(folder):
    [entry] = (path for path in (folder / ".lgaf_catalog").iterdir() if path.is_dir())
    return entry


def replace(entry, column, array):
    """Write another array, and the size of its file, which alone is compared without the checks."""
    np.save(entry / column, array, allow_pickle=True)
    set_facts(entry, bytes=facts(entry)["bytes"] | {column: (entry / f"{column}.npy").stat().st_size})


def facts(entry):
    return json.loads((entry / "facts.json").read_text())


def set_facts(entry, **values):
    (entry / "facts.json").write_text(json.dumps(facts(entry) | values))


POISONS = {
    "permuted labels": lambda entry: replace(entry, "label_N", LABELS[::-1].copy()),
    "labels of another type": lambda entry: replace(entry, "label_N", LABELS.astype("<f8")),
    "objects": lambda entry: replace(entry, "label_N", np.array([entry.name] * 1200, object)),
    "two dimensions": lambda entry: replace(entry, "label_N", LABELS[:, None]),
    "too few": lambda entry: replace(entry, "offset_N", np.arange(3)),
    "no labels": lambda entry: replace(entry, "label_N", LABELS[:0]),
    "files that do not exist": lambda entry: replace(entry, "file_N", np.full(1200, 7, "<i4")),
    "negative files": lambda entry: replace(entry, "file_N", np.full(1200, -1, "<i4")),
    "negative offsets": lambda entry: replace(entry, "offset_N", np.full(1200, -(1 << 62))),
    "negative lengths": lambda entry: replace(entry, "length_N", np.full(1200, -5, "<i4")),
    "damage beyond the end": lambda entry: replace(entry, "damaged_K", np.array([1200])),
    "damage in disorder": lambda entry: replace(entry, "damaged_K", np.array([5, 3])),
    "a number for classes": lambda entry: set_facts(entry, classes="300"),
    "more classes": lambda entry: set_facts(entry, classes=10**9),
    "another largest": lambda entry: set_facts(entry, largest=[1 << 70]),
    "text for largest": lambda entry: set_facts(entry, largest="x"),
    "no facts": lambda entry: (entry / "facts.json").write_text("[]"),
    "nested facts": lambda entry: (entry / "facts.json").write_text('{"bytes": ' + 100_000 * "["),
}


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_catalog_is_rebuilt(folder, builds, poison):
    POISONS[poison](entry_of(folder))
    for _ in range(2):
        catalog = open_catalog(folder)
        assert catalog.label_N.tolist() == LABELS.tolist()
        assert catalog.fingerprint["labels_crc32"] == zlib.crc32(LABELS.astype("<i8").data)
    assert len(builds) == 1
    assert sorted(path.suffix for path in (folder / ".lgaf_catalog").iterdir()) == ["", ".lock"]


def test_a_header_that_claims_petabytes_allocates_nothing(folder, builds):
    path = entry_of(folder) / "damaged_K.npy"
    path.write_bytes(path.read_bytes().replace(b"(0,), ", b"(99999999999999,), ")[: path.stat().st_size])
    assert open_catalog(folder).label_N.tolist() == LABELS.tolist()
    assert len(builds) == 1


@pytest.mark.parametrize("name", ["facts.json", "label_N.npy", "damaged_K.npy"])
@pytest.mark.parametrize("kind", ["pipe", "link", "endless", "folder"])
def test_only_regular_files_are_read(folder, builds, tmp_path, name, kind):
    path = entry_of(folder) / name
    path.rename(tmp_path / "moved")
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "link":
            path.symlink_to(tmp_path / "moved")
        case "endless":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
    assert open_catalog(folder).label_N.tolist() == LABELS.tolist()
    assert len(builds) == 1


def test_an_entry_that_others_can_write_or_own_is_rebuilt(folder, builds, monkeypatch):
    (entry_of(folder) / "label_N.npy").chmod(0o666)
    open_catalog(folder)
    entry_of(folder).chmod(0o777)
    open_catalog(folder)
    assert len(builds) == 2
    open_catalog(folder)
    assert len(builds) == 2
    monkeypatch.setattr(catalog_module, "_trusted_owners", lambda folders: frozenset({os.geteuid() + 1}))
    open_catalog(folder)
    assert len(builds) == 3


def test_files_stay_unwritable_for_others_under_any_umask(folder, builds):
    shutil.rmtree(folder / ".lgaf_catalog")
    before = os.umask(0)
    try:
        open_catalog(folder)
    finally:
        os.umask(before)
    for path in (folder / ".lgaf_catalog", *(folder / ".lgaf_catalog").rglob("*")):
        assert path.stat().st_mode & 0o022 == 0
    assert (folder / ".lgaf_catalog" / "catalog.lock").stat().st_mode & 0o077 == 0
    open_catalog(folder)
    assert len(builds) == 1


def test_a_place_of_another_user_is_not_written_to(folder, monkeypatch):
    shutil.rmtree(entry_of(folder))
    own = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: own + 1)
    with pytest.raises(DatasetError, match=rf"found none: .*\.lgaf_catalog \(of user {own}\)"):
        open_catalog(folder)


def test_the_owner_of_the_datasets_and_root_are_trusted_and_nobody_else(tmp_path):
    assert catalog_module._trusted_owners([tmp_path, tmp_path]) == {0, os.geteuid()}
    root = Path("/")
    assert catalog_module._trusted_owners([root, tmp_path]) == {0, os.geteuid()}
    trust = catalog_cache.Trust(frozenset({0, 77}), lambda arrays, facts: True)
    for mode, owner, is_allowed in [
        (0o644, 77, True),
        (0o644, 78, False),
        (0o664, 77, False),
        (0o646, 0, False),
    ]:
        assert trust.allows(os.stat_result((mode, 0, 0, 1, owner, 0, 0, 0, 0, 0))) == is_allowed


def test_a_link_as_the_place_removes_and_writes_nothing_elsewhere(folder, builds, tmp_path):
    victim = tmp_path / "victim" / "catalog-0123456789abcdef0123"
    (folder / ".lgaf_catalog").rename(tmp_path / "victim")
    victim.mkdir()
    (victim / "thesis.txt").write_text("years of work")
    shutil.rmtree(next(path for path in victim.parent.iterdir() if path.is_dir() and path != victim))
    before = sorted(os.listdir(victim.parent))
    (folder / ".lgaf_catalog").symlink_to(victim.parent)
    assert open_catalog(folder).label_N.tolist() == LABELS.tolist()
    assert sorted(os.listdir(victim.parent)) == before
    assert (victim / "thesis.txt").exists()


@pytest.mark.parametrize("planted", ["entry", "old entry", "remains"])
def test_planted_links_in_the_place_are_removed_and_their_targets_are_not(folder, builds, tmp_path, planted):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("years of work")
    entry = entry_of(folder)
    shutil.rmtree(entry)
    host = os.uname().nodename
    names = {"entry": entry.name, "old entry": f"catalog-{20 * 'a'}", "remains": f"catalog.{host}.abc.part"}
    link = entry.with_name(names[planted])
    link.symlink_to(victim)
    open_catalog(folder)
    assert (victim / "thesis.txt").exists()
    assert entry_of(folder) == entry
    assert not link.is_symlink()


def test_other_folders_in_the_place_are_kept(folder, builds):
    other = folder / ".lgaf_catalog" / "catalog-of-my-own"
    shutil.rmtree(entry_of(folder))
    other.mkdir()
    open_catalog(folder)
    assert other.is_dir()


def test_a_link_at_the_name_of_the_lock_is_not_followed(folder, builds, tmp_path):
    shutil.rmtree(entry_of(folder))
    lock = folder / ".lgaf_catalog" / "catalog.lock"
    lock.unlink()
    lock.symlink_to(tmp_path / "created")
    assert open_catalog(folder).label_N.tolist() == LABELS.tolist()
    assert not (tmp_path / "created").exists()
    assert (tmp_path / "cache" / "lgaf").is_dir()


OPEN = """
import sys
from pathlib import Path
from data_pipeline.indexed import catalog, catalog_cache
catalog_cache._SILENT_S = 0.2
print(len(catalog.open_catalog(Path(sys.argv[1]))))
"""


@pytest.mark.parametrize(
    ("holder", "named"),
    [
        (b"process 12 on node7", "process 12 on node7"),
        (b"\x1b[2J", "an unknown process"),
        (b"", "an unknown"),
    ],
)
def test_a_wait_says_for_whom(folder, holder, named):
    shutil.rmtree(entry_of(folder))
    lock = folder / ".lgaf_catalog" / "catalog.lock"
    lock.write_bytes(holder)
    with open(lock, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = subprocess.Popen(
            [sys.executable, "-c", OPEN, folder],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = waiting.stderr.readline()
    assert f"waiting for {named}" in line
    assert f"which has locked {lock}" in line
    assert waiting.communicate(timeout=60)[0] == "1200\n"


def test_the_holder_of_the_lock_writes_its_name(folder):
    text = (folder / ".lgaf_catalog" / "catalog.lock").read_text()
    assert text == f"process {os.getpid()} on {os.uname().nodename}"
