"""A run that is killed again and again comes back by itself; `make soak` does the same with 50 kills."""

from tests.trainer.soak import soak


def test_four_kills_change_nothing(faces, tmp_path):
    print(soak(tmp_path, faces, kills=4, seed=2))
