"""`lgaf data`, as one types it."""

import io

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_pipeline import augment
from data_pipeline.common.pillow_decode import DecodeError, decoded
from data_pipeline.indexed.catalog import open_catalog
from data_pipeline.synthetic.identities import SynthConfig
from data_pipeline.tools import inspect as inspection
from trainer import config_file
from trainer.cli import data as commands


def run(*words):
    """Return the output of a command; its error is raised here."""
    # Help is formatted for a terminal of this width on every machine.
    runner = CliRunner(env={"TERMINAL_WIDTH": "100", "_TYPER_FORCE_DISABLE_TERMINAL": "1"})
    done = runner.invoke(commands.app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


SMALL = ("identities=3", "images_per_identity=4", "held_out_identities=2", "pairs=4", "image_size=32")
SETS = [word for assignment in SMALL for word in ("--set", assignment)]


def test_synth_writes_a_set_and_writes_it_once(tmp_path):
    said = run("synth", tmp_path / "a", *SETS)
    assert said.startswith(f"{tmp_path / 'a'}: 12 images of 3 identities, 4 pairs of 2 held-out identities (")
    assert open_catalog(tmp_path / "a").num_classes == 3
    assert (
        run("synth", tmp_path / "a", *SETS) == f"{tmp_path / 'a'} holds this dataset already; nothing to do\n"
    )


def test_synth_takes_a_file_and_then_the_overrides(tmp_path):
    (tmp_path / "c.toml").write_text(
        'identities = 2\nimages_per_identity = 3\nheld_out_identities = "2"\npairs = 2\n'
    )
    run("synth", tmp_path / "a", "--config", tmp_path / "c.toml", "--set", "image_size=32", "--set", "seed=4")
    assert len(open_catalog(tmp_path / "a")) == 6


def test_synth_refuses_an_unknown_key_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"--set: unknown key pears; did you mean pairs\?"):
        run("synth", tmp_path / "a", "--set", "pears=3")
    assert not (tmp_path / "a").exists()


def test_the_demo_s_configuration_is_valid(pytestconfig):
    config = config_file.load(SynthConfig, pytestconfig.rootpath / "configs" / "demo_data.toml")
    assert config.identities > 100


def test_inspect_says_what_there_is_and_draws_it(dataset, tmp_path):
    said = run("inspect", dataset, "--sheet", tmp_path / "sheets" / "sheet.png")
    facts = {line[:18].strip(): line[18:] for line in said.splitlines()}
    size_mb = sum((dataset / name).stat().st_size for name in ("train.rec", "train.idx")) / 1e6
    assert facts == {
        "images": "12 (keys 1 to 12)",
        "files": f"train.idx, train.rec in {dataset}, {size_mb:.1f} MB",
        "classes": "3",
        "property": "3 classes, 48x48 pixels",
        "labels": "0 to 2",
        "images per class": "4 to 4, median 4, 0 empty",
        "damaged records": "0",
        "image sizes": "JPEG 48x48 RGB (12) in a sample of 12",
        "contact sheet": str(tmp_path / "sheets" / "sheet.png"),
    }
    with Image.open(tmp_path / "sheets" / "sheet.png") as sheet:
        assert (sheet.format, sheet.width) == ("PNG", 1120)


def test_inspect_shows_the_augmentation_of_a_training_configuration(dataset, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        'run_dir = "x"\n[data]\npath = "y"\n[data.augment]\ngrey.probability = 1\nflip_probability = 0\n'
    )
    for name, options in (("plain", []), ("grey", ["--augment", config])):
        run("inspect", dataset, "--sheet", tmp_path / f"{name}.png", *options)
    plain, grey = (Image.open(tmp_path / f"{name}.png") for name in ("plain", "grey"))
    grey_HWC = np.asarray(grey, int)
    assert np.all(grey_HWC == grey_HWC[..., :1])
    # The plain sheet was enlarged by Pillow, the other by DALI.
    assert np.abs(grey_HWC[..., 0] - np.asarray(plain.convert("L"), int)).mean() < 2


def test_inspect_refuses_a_configuration_without_augmentation(dataset, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text('[data]\npath = "y"\n')
    with pytest.raises(ValueError, match=r"run.toml: data.augment: expected a value, found none"):
        run("inspect", dataset, "--sheet", tmp_path / "sheet.png", "--augment", config)
    assert not (tmp_path / "sheet.png").exists()


def test_the_augmentation_of_a_recipe_can_be_looked_at(pytestconfig):
    recipe = pytestconfig.rootpath / "configs" / "lgaf_r100_webface4m.toml"
    config = config_file.load(commands._AugmentFile, recipe).data.augment
    assert augment.of_samples(config, 0, np.arange(1)).changes.keys() == {
        "crop",
        "low_resolution",
        "photometric",
    }


def test_inspect_counts_classes_without_images_and_sizes_of_every_kind(tmp_path, write_records, jpeg):
    png = io.BytesIO()
    Image.new("L", (20, 10)).save(png, "PNG")
    folder = write_records(tmp_path / "d", [(4, 0.0, jpeg(0)), (5, 3.0, png.getvalue()), (6, 3.0, jpeg(1))])
    said = run("inspect", folder, "--sheet", tmp_path / "s.png")
    assert "images            3 (keys 4 to 6)" in said
    assert "property          none" in said
    assert "images per class  0 to 2, median 0.5, 2 empty" in said
    assert "JPEG 48x48 RGB (2), PNG 20x10 L (1) in a sample of 3" in said


def test_inspect_takes_any_datasets_and_names_what_is_damaged(dataset, tmp_path, jpeg):
    offset = int(open_catalog(dataset).offset_N[2])
    with open(dataset / "train.rec", "r+b") as file:
        file.seek(offset)
        file.write(b"XXXX")
    for i, name in enumerate(["p/1.jpg", "q/1.jpg"]):
        (tmp_path / "people" / name).parent.mkdir(parents=True)
        (tmp_path / "people" / name).write_bytes(jpeg(i))
    said = run("inspect", dataset, tmp_path / "people", "--sheet", tmp_path / "s.png")
    size_mb = 2 * len(jpeg(0)) / 1e6
    assert f"files             p/1.jpg, q/1.jpg in {tmp_path / 'people'}, {size_mb:.1f} MB" in said
    assert "classes           5\n" in said
    assert "damaged records   1\n" in said
    assert f"{dataset / 'train.rec'}: key 3 at byte {offset}: no RecordIO frame at byte {offset}" in said
    assert "JPEG 48x48 RGB (13) in a sample of 13" in said


def test_a_contact_sheet_has_one_class_per_row_with_its_first_images(dataset, jpeg):
    sheet = inspection.contact_sheet(open_catalog(dataset), classes=2, images=3, size=48)
    assert sheet.size == (3 * 48, 2 * (48 + 12))
    pixel_HWC = np.asarray(sheet, int)
    for row, label in enumerate((0, 2)):
        for column in range(3):
            top, left = row * 60, column * 48
            expected = np.asarray(Image.open(io.BytesIO(jpeg(4 * label + column))), int)
            assert np.abs(pixel_HWC[top : top + 48, left : left + 48] - expected).max() == 0
            caption = pixel_HWC[top + 48 : top + 60, left : left + 48]
            assert caption.max() == 255
            assert caption.min() < 100


def test_a_sample_is_spread_from_the_first_to_the_last(tmp_path, write_records, jpeg):
    sizes = [jpeg(i) if i in (0, 99) else b"undecodable" for i in range(100)]
    folder = write_records(tmp_path, [(i, 0.0, image) for i, image in enumerate(sizes)])
    assert inspection.image_kinds(open_catalog(folder), 2) == {"JPEG 48x48 RGB": 2}
    with pytest.raises(
        DecodeError, match=r"key 49 at byte \d+ cannot be decoded: expected a JPEG, PNG, WebP or BMP image"
    ):
        inspection.image_kinds(open_catalog(folder), 3)


def test_a_cut_image_is_named(jpeg):
    with pytest.raises(DecodeError, match=r"^image 3 cannot be decoded: .*remove or repair it$"):
        decoded(np.frombuffer(jpeg(0)[:500], np.uint8), "image 3")


def test_pack(tmp_path, jpeg):
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.jpg").write_bytes(jpeg(1))
    said = run("pack", tmp_path / "in", tmp_path / "out", "--size", 48)
    size_mb = 2 * len(jpeg(1)) / 1e6
    assert said == f"{tmp_path / 'out'}: 2 images of 2 identities, {size_mb:.1f} MB (2 copied unchanged)\n"
    assert open_catalog(tmp_path / "out").image(1).tobytes() == jpeg(1)


def test_pack_a_list_into_shards_and_convert_them(tmp_path, jpeg):
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "list.csv").write_text("1.jpg,0\n1.jpg,1\n1.jpg,2\n")
    with pytest.raises(ValueError, match=r"list\.csv: --hold-out 2 expects a folder of identities"):
        run("pack", tmp_path / "list.csv", tmp_path / "out", "--hold-out", 2)
    said = run("pack", tmp_path / "list.csv", tmp_path / "out", "--format", "tar", "--shard-samples", 2)
    assert said.startswith(f"{tmp_path / 'out'}: 3 images of 3 identities, ")
    assert run("convert", tmp_path / "out", tmp_path / "rec") == f"{tmp_path / 'rec'}: 3 images\n"
    words = ("convert", tmp_path / "rec", tmp_path / "tar", "--shard-samples", 2)
    assert run(*words) == f"{tmp_path / 'tar'}: 3 images\n"
    assert run(*words) == f"{tmp_path / 'tar'}: 3 images, 3 of them converted before\n"
    shards = [{path.name: path.read_bytes() for path in (tmp_path / d).glob("[!.]*")} for d in ("out", "tar")]
    assert shards[0] == shards[1]


@pytest.mark.parametrize("command", ["synth", "inspect", "pack", "convert"])
def test_every_option_has_its_help(command):
    said = run(command, "--help")
    parameters = next(c for c in commands.app.registered_commands if c.callback.__name__ == command)
    assert parameters.callback.__doc__.split("\n")[0].split(":")[0] in " ".join(said.split())
    for option in {
        "synth": ["--config", "--set", "--help-config"],
        "inspect": ["--sheet"],
        "pack": ["--format", "--size", "--quality", "--hold-out", "--shard-samples"],
        "convert": ["--shard-samples"],
    }[command]:
        assert option in said


def test_the_keys_of_a_set_are_explained():
    said = run("synth", "--help-config")
    assert all(f"{name} = " in said for name in SynthConfig.model_fields)
    assert "difficulty = 1.0  (float, >= 0, <= 1.5)" in said
