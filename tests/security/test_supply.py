"""Programs and packages of others: none is run by an import, and those that CI installs are pinned."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.trainer.conftest import ROOT, environment

COMPILERS = ("gcc", "cc", "g++", "c++", "clang", "clang++", "nvcc", "hipcc", "ld", "numactl", "ninja")
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==(\S+)", re.MULTILINE)


def test_no_compiler_of_the_path_is_run_by_an_import(tmp_path):
    log = tmp_path / "log"
    for name in COMPILERS:
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "$0 $*" >> "{log}"\nexit 1\n')
        program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    # The first line shows that a program of this folder would be found and listed.
    code = "import subprocess; subprocess.run(['gcc', 'seen']); import trainer.engine, trainer.entrypoints"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment() | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert log.read_text() == f"{tmp_path}/gcc seen\n"


def pins(file):
    return {canonicalize_name(name): version for name, version in PIN.findall((ROOT / file).read_text())}


def installed_for(requirements):
    """Return the installed packages, by name, that these requirements name, directly or not."""
    found, seen, waiting = {}, set(), [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), ("", *sorted(requirement.extras))
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = package
        if (name, extras) not in seen:
            seen.add((name, extras))
            inner = map(Requirement, package.requires or [])
            waiting += [
                one
                for one in inner
                if not one.marker or any(one.marker.evaluate({"extra": extra}) for extra in extras)
            ]
    return found


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def licence(package):
    """Return the licence that a package's metadata name."""
    single, text = package.metadata.get("License-Expression"), package.metadata.get("License") or ""
    kinds = [kind for kind in package.metadata.get_all("Classifier") or [] if kind.startswith("License ::")]
    if single or (text and "\n" not in text and len(text) <= 80):
        return single or text
    return ", ".join(kind.rpartition(" :: ")[2] for kind in kinds) or text.partition("\n")[0].strip()


def listed():
    """Return version and licence of every package in docs/licences.md."""
    lines = (ROOT / "docs" / "licences.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: (row[1], row[2]) for row in rows if row[0] not in ("package", "---")}


def test_every_installed_dependency_is_in_the_list_of_licences():
    rows, found = listed(), installed_for(project()["project"]["dependencies"])
    assert {"torch", "deepspeed", "nvidia-dali-cuda130", "nvidia-nvjpeg", "aiosignal"} <= {*found}
    from_nvidia = re.compile(r"nvidia-|cuda-")  # of torch's builds for GPUs: see the text above the tables
    wanted = {name: package for name, package in found.items() if name in rows or not from_nvidia.match(name)}
    for name, package in wanted.items():
        version = package.version.partition("+")[0]
        row = f"| {name} | {version} | {licence(package)} |"
        assert name in rows, f"docs/licences.md lacks: {row}"
        if rows[name][0] == version:
            assert rows[name][1] == licence(package), f"docs/licences.md: expected {row}"


def test_the_proprietary_packages_are_named():
    text = (ROOT / "docs" / "licences.md").read_text().partition("## ")[0]
    of_dali = installed_for(["nvidia-dali-cuda130"])
    proprietary = {name for name, package in of_dali.items() if "NVIDIA" in licence(package).replace("_", "")}
    assert len(proprietary) == 4
    assert all(f"`{name}`" in text for name in proprietary)


def test_the_list_of_licences_has_the_versions_of_the_constraints():
    constraints = pins("constraints.txt")
    rows = {name: version for name, (version, _) in listed().items()}
    assert len(rows) > 80
    assert rows.items() <= constraints.items()


def test_the_build_takes_one_version_of_setuptools():
    (requirement,) = project()["build-system"]["requires"]
    assert requirement == f"setuptools=={pins('constraints.txt')['setuptools']}"


def test_every_package_that_ci_installs_has_a_hash():
    files = [".ci/hashes/build.txt", ".ci/hashes/packages.txt"]
    text = "".join((ROOT / file).read_text() for file in files)
    hashed, constraints = pins(files[0]) | pins(files[1]), pins("constraints.txt")
    assert hashed.items() <= constraints.items()
    with_hash = re.findall(r"^\S+==\S+ \\\n    --hash=sha256:[0-9a-f]{64}\b", text, re.MULTILINE)
    assert len(with_hash) == len(hashed)
    extras = project()["project"]["optional-dependencies"]
    wanted = project()["project"]["dependencies"] + extras["dev"][1:] + extras["export"] + extras["parquet"]
    assert extras["dev"][0] == "lgaf[export,parquet]"
    found = {name for name in installed_for(wanted) if name in constraints}
    assert len(found) > 60
    # torch: the reason is at the head of packages.txt.
    assert found <= {*hashed, "torch"}


def test_ci_installs_with_hashes_and_everyone_with_constraints():
    assert "export HASHES=.ci/hashes\n" in (ROOT / ".ci" / "run").read_text()
    for variable, hashed in (("HASHES=.ci/hashes", 2), ("HASHES=", 0)):
        command = ["make", "-n", "-W", "pyproject.toml", variable, "install"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        installs = [line for line in done.stdout.splitlines() if "pip install" in line]
        assert len(installs) == hashed + 1
        assert all("--require-hashes --no-deps" in line for line in installs[:-1])
        assert "PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt" in installs[-1]
        assert ("--no-build-isolation" in installs[-1]) == bool(hashed)


def test_the_compilers_cache_is_a_folder_that_only_its_user_can_write(tmp_path, monkeypatch):
    from trainer.engine import _compiler_cache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = tmp_path / "lgaf" / "compiled"
    assert _compiler_cache() == str(place)
    assert place.stat().st_mode & 0o077 == 0
    place.chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    other = _compiler_cache()
    assert other != str(place)
    assert os.stat(other).st_mode & 0o077 == 0
    place.rmdir()
    place.symlink_to(other)
    assert _compiler_cache() not in (str(place), other)
