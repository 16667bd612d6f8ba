"""The configuration files of the repository, and what is refused."""

import re
from pathlib import Path

import pytest

from trainer import config_file
from trainer.config import RunConfig, differences, micro_batch

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*.toml") if path.name != "demo_data.toml")


def load(*overrides):
    return config_file.load(RunConfig, CONFIGS / "demo.toml", overrides)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_are_valid(path):
    config = config_file.load(RunConfig, path)
    assert config.backbone.name == ("vit" if path.stem.startswith("vit") else "lgaf")
    assert config.total_steps(images=1_000_000) > 0


def test_an_unknown_key_is_named_with_the_nearest_valid_one():
    with pytest.raises(
        ValueError, match=r"unknown key optimizer\.learning_rat; did you mean .*learning_rate"
    ):
        load("optimizer.learning_rat=0.1")


@pytest.mark.parametrize(("override", "found"), [("epochs=2", "both"), ("steps=0", "steps")])
def test_the_length_is_said_once(override, found):
    with pytest.raises(ValueError, match=found):
        load(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("engine.compile=true", "engine.zero_stage=3"), r"engine\.compile and engine\.zero_stage = 3: .*"),
        (("engine.compile=true", "backbone.recompute=true"), r"engine\.compile and backbone\.recompute: .*"),
        (("engine.channels_last=true", "backbone.width=8"), r"width = 8: expected a width of at least 16"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load(*overrides)


def test_epochs_become_whole_steps():
    config = config_file.load(RunConfig, CONFIGS / "lgaf_r100_webface42m.toml")
    assert config.total_steps(42_474_557) == 207_396  # 20 x 42,474,557 / 4096 = 207,395.3


def test_epochs_of_a_stream_are_refused():
    config = config_file.load(RunConfig, CONFIGS / "lgaf_r100_webface42m.toml")
    with pytest.raises(ValueError, match=r"epochs: .*, found streamed shards, .* set steps"):
        config.total_steps(None)


@pytest.mark.parametrize(
    ("world_size", "micro", "expected"), [(1, 64, 64), (2, 64, 64), (2, 50, 32), (4, 64, 32), (1, 1000, 128)]
)
def test_micro_batch(world_size, micro, expected):
    assert micro_batch(load(f"micro_batch={micro}"), world_size) == expected


def test_a_global_batch_that_does_not_divide_names_the_sizes_that_work():
    sizes = "1, 2, 4, 8, 16, 32, 64, 128"
    with pytest.raises(
        ValueError, match=rf"global_batch of 128 does not divide by 3 ranks: use one of {sizes} ranks, or"
    ):
        micro_batch(load(), 3)


def test_differences_name_only_what_changes_the_result():
    before = load().model_dump(mode="json")
    now = load("optimizer.learning_rate=0.3", "metrics.port=1", "run_dir=elsewhere").model_dump(mode="json")
    assert differences(before, now) == ["optimizer.learning_rate: 0.1 -> 0.3"]
    assert differences(before, before) == []


def test_a_key_that_is_new_or_gone_is_a_difference():
    before = load().model_dump(mode="json")
    now = {key: value for key, value in before.items() if key != "seed"}
    assert differences(before, now) == ["seed: 1 -> absent"]
    assert differences(now, before) == ["seed: absent -> 1"]


def test_verification_files_are_looked_for_in_all_datasets(tmp_path):
    for folder, name in (("a", "lfw.bin"), ("b", "lfw.bin"), ("b", "cfp_fp.bin")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).touch()
    sets = 'evaluation.sets=["lfw.bin", "cfp_fp.bin", "absent.bin"]'
    config = load(f'data.path=["{tmp_path / "a"}", "{tmp_path / "b"}"]', sets)
    assert config.verification_files() == {
        "lfw": tmp_path / "a" / "lfw.bin",
        "cfp_fp": tmp_path / "b" / "cfp_fp.bin",
        "absent": tmp_path / "a" / "absent.bin",
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["head={margin={kind='magface', m=0.3}}"],
            "unknown key head.margin.m; it belongs to arcface and arcface-straight-through and cosface and "
            "adaface and curricularface. Valid keys of [head.margin] here: kind, norm_low, norm_high, ",
        ),
        (
            ["head={margin={kind='arcface', magface={m_low=0.1}}}"],
            "unknown key head.margin.magface; the keys of magface belong to [head.margin] itself. Valid keys "
            "of [head.margin] here: kind, m",
        ),
        (
            ["backbone={name='vit', width=32}"],
            "unknown key backbone.width; it belongs to iresnet and lgaf. Valid",
        ),
        (
            ["backbone={vit={size='B'}}"],
            "unknown key backbone.vit; the keys of vit belong to [backbone] itself.",
        ),
        (
            ["backbone={name='lgav'}"],
            "backbone.name: expected one of 'iresnet', 'lgaf', 'vit', found 'lgav' (did ",
        ),
        (
            ["head={margin={kind='magface', m_low=-1}}"],
            "head.margin.m_low: expected greater than or equal to 0",
        ),
        (
            ["optimizer.beta2=0.9"],
            "unknown key optimizer.beta2; it belongs to adamw. Valid keys of [optimizer] here: kind, "
            "learning_rate, weight_decay, clip_norm, warmup_steps, power, momentum",
        ),
        (
            ["optimizer={kind='adamw', momentum=0.9}"],
            "unknown key optimizer.momentum; it belongs to sgd. Valid keys of [optimizer] here: kind, "
            "learning_rate, weight_decay, clip_norm, warmup_steps, power, beta1, beta2",
        ),
        (
            ["head.optimizer={kind='sgd', beta1=0.9}"],
            "unknown key head.optimizer.beta1; it belongs to adamw. Valid keys of [head.optimizer] here: "
            "kind, weight_decay, moments, momentum",
        ),
        (
            ["backbone={mhms={staeg=2}}"],
            "unknown key backbone.mhms.staeg; did you mean backbone.mhms.stage? Valid",
        ),
    ],
)
def test_a_key_of_another_kind_is_refused_by_its_name(overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(*overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("head.optimizer=adamw", "found 'adamw'; set head.optimizer.kind to one of 'sgd', 'adamw'"),
        ("head.margin=cosface", "found 'cosface'; set head.margin.kind to one of 'combined', 'arcface', "),
        ("backbone=vit", "found 'vit'; set backbone.name to one of 'iresnet', 'lgaf', 'vit'"),
    ],
)
def test_a_kind_in_place_of_its_table_is_answered_with_its_key(override, message):
    with pytest.raises(ValueError, match=f"expected a table, {re.escape(message)}"):
        load(override)


@pytest.mark.parametrize("key", ["moments", "beta2", "weight_decay"])
def test_a_former_key_of_the_head_is_answered_with_its_place(key):
    with pytest.raises(ValueError, match=rf"unknown key head\.{key}; did you mean head\.optimizer\.{key}\?"):
        load(f"head.{key}=0.1")


def test_a_table_without_its_kind_is_of_the_default_kind():
    config = load("head={margin={m=0.25}, optimizer={momentum=0.5}}", "backbone={width=16}")
    assert (config.head.optimizer.kind, config.head.optimizer.momentum) == ("sgd", 0.5)
    assert config.optimizer.kind == "sgd"
    assert config.head.margin.model_dump() == {"kind": "arcface", "m": 0.25}
    assert (config.backbone.name, config.backbone.width) == ("lgaf", 16)


def test_help_lists_keys_by_kind():
    keys = {key.name: key for key in config_file.describe(RunConfig)}
    assert keys["head.margin.kind"].default == '"arcface"'
    assert keys["head.margin.norm_low"].description.startswith("[magface] ")
    assert keys["backbone.width"].description.startswith("[iresnet, lgaf] ")
    assert keys["backbone.mhms.stage"].description.startswith("[lgaf] ")
    assert keys["head.optimizer.beta2"].description.startswith("[adamw] ")
    assert keys["optimizer.momentum"].description.startswith("[sgd] ")
    assert not keys["optimizer.power"].description.startswith("[")
    assert not keys["backbone.dropout"].description.startswith("[")
