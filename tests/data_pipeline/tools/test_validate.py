"""`lgaf data validate`: every record is read and decoded, and bad records are listed with their position."""

import json

import pytest
from typer.testing import CliRunner

from data_pipeline.indexed.catalog import open_catalog
from trainer.cli.data import app


@pytest.fixture
def validate(tmp_path):
    def call(*words):
        return CliRunner().invoke(app, ["validate", *map(str, words)])

    return call


def test_a_whole_dataset_is_counted(tmp_path, write_records, jpeg, validate):
    folder = write_records(tmp_path / "a", [(i, float(i % 3), jpeg(i)) for i in range(2500)])
    done = validate(folder, folder, "--processes", 3)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[0].split() == ["JPEG", "48x48", "RGB", "5000"]
    assert "bad               0 of 5000" in done.output


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_records_are_listed_in_order_with_their_places(
    tmp_path, write_records, jpeg, validate, processes
):
    bad = {5: b"no image", 1400: jpeg(1)[:300], 1401: jpeg(2)[:-2]}
    records = [(100 + i, 0.0, bad.get(i, jpeg(i % 7))) for i in range(2100)]
    folder = write_records(tmp_path / "a", records)
    done = validate(folder, "--report", tmp_path / "bad.jsonl", "--processes", processes)
    assert done.exit_code == 1
    listed = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [line["key"] for line in listed] == [100 + i for i in bad]
    offset_N = open_catalog(folder).offset_N
    assert [line["offset"] for line in listed] == [offset_N[i] for i in bad]
    assert listed[0]["reason"].endswith(
        "found one that begins with b'no image'; `lgaf data pack` converts other formats"
    )
    assert "truncated" in listed[2]["reason"].lower()
    assert (
        f"  {folder / 'train.rec'}: key 105 at byte {offset_N[5]}: expected a JPEG, PNG, WebP or BMP image"
        in done.output
    )
    assert "bad               3 of 2100" in done.output


def test_a_record_damaged_in_its_frame_is_listed_too(tmp_path, write_records, jpeg, validate):
    folder = write_records(tmp_path / "a", [(i, 0.0, jpeg(i)) for i in range(20)])
    at = int(open_catalog(folder).offset_N[7])
    data = bytearray((folder / "train.rec").read_bytes())
    data[at : at + 4] = bytes(4)
    (folder / "train.rec").write_bytes(data)
    done = validate(folder)
    assert done.exit_code == 1
    assert "bad               1 of 20" in done.output
    assert f"key 7 at byte {at}: " in done.output
