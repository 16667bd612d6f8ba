"""docs/extending.md: the code of every section works in a copy of the packages."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_pipeline", "partial_fc", "trainer", "slurm", "configs")
SECTIONS = dict(
    section.split("\n", 1) for section in (ROOT / "docs" / "extending.md").read_text().split("\n## ")[1:]
)
BLOCK = re.compile(
    r"<!-- (into|as|check) ?(\S*?)(?: above \"(.*?)\")? -->\n```(?:python|yaml)\n(.*?)```\n", re.DOTALL
)


@pytest.mark.parametrize("name", SECTIONS)
def test_the_example_works(name, tmp_path):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = BLOCK.findall(SECTIONS[name])
    assert [kind for kind, *_ in blocks].count("check") == 1
    for kind, file, above, code in blocks:
        path = tmp_path / file
        if kind == "as":
            assert not path.exists()
            path.parent.mkdir(exist_ok=True)
            path.write_text(code)
        elif kind == "into":
            text = path.read_text()
            assert text.count(f"\n{above}") == 1
            path.write_text(text.replace(f"\n{above}", f"\n{code}\n\n{above}"))
    done = subprocess.run(
        [sys.executable, "-P", "-c", blocks[-1][-1]],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stderr
