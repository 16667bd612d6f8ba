"""Real faces, where they are at hand: the AT&T (ORL) set, F. Samaria and A. Harter, 1994, packed and learnt.

The folder has one sub-folder of grey images per person, s1 to s40; it is not part of the repository. It is
looked for beside the checkout (../shared/data/orl), or where LGAF_ORL says.
"""

import json
import os
from pathlib import Path

import pytest

from tests.trainer.conftest import CONFIG, ROOT, run

ORL = Path(os.environ.get("LGAF_ORL", ROOT.parent / "shared" / "data" / "orl"))
pytestmark = pytest.mark.skipif(
    not ORL.is_dir(), reason=f"no ORL faces at {ORL}; set LGAF_ORL to their folder"
)
# A network small enough for 300 images, and steps enough for it to learn them.
OVERRIDES = ("backbone.embedding_size=64", "data.image_size=64", "global_batch=64", "steps=120")


def test_pack_train_and_verify_people_left_out(tmp_path):
    people = tmp_path / "people"
    people.mkdir()
    for path in ORL.iterdir():
        if path.is_dir():
            (people / path.name).symlink_to(path)
    packed = run("data", "pack", people, tmp_path / "orl", "--hold-out", 10)
    assert packed.returncode == 0, packed.stderr
    assert "300 images of 30 identities" in packed.stdout
    assert "900 pairs of 10 held-out identities" in packed.stdout

    given = (f"run_dir={tmp_path / 'run'}", f"data.path={tmp_path / 'orl'}", "metrics.port=0", *OVERRIDES)
    done = run("train", CONFIG, *(word for value in given for word in ("--set", value)), ranks=2)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["verification_accuracy"] > 0.8
    assert result["verification_accuracy"] > result["verification_accuracy_untrained"] + 0.05
