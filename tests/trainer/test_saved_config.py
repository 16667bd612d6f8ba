"""Configurations saved before each kind had its own keys: margin, network and optimizers stay the same."""

import pytest

from partial_fc.optim import RowAdamWConfig, RowSGDConfig
from trainer.config import AdamWConfig, RunConfig, SGDConfig
from trainer.saved_config import from_saved, translated_backbone

# As the manifests of format 1 and the first of format 2 hold them: every kind's keys side by side.
MARGIN = {
    "kind": "arcface",
    "m": 0.4,
    "combined": {"m1": 1.5, "m2": 0.3, "m3": 0.2},
    "adaface": {"h": 0.5, "momentum": 0.02},
    "magface": {"norm_low": 9.0, "norm_high": 110.0, "m_low": 0.45, "m_high": 0.8, "regulariser": 35.0},
    "curricularface": {"momentum": 0.03},
}
BACKBONE = {
    "name": "lgaf",
    "depth": 18,
    "blocks": [1, 1, 1, 1],
    "width": 16,
    "stem_stride": 2,
    "embedding_size": 32,
    "dropout": 0.1,
    "weights": None,
    "recompute": True,
    "vit": {"size": "S", "patch": 8, "drop_path": 0.1, "mask_ratio": 0.0},
    "local_only": True,
    "mhms": {"stage": 3, "heads": [[1, 3]]},
    "lgf": {"clip": 2.0},
}
SAVED = {"run_dir": "run", "global_batch": 8, "steps": 1, "data": {"path": ["data"]}}


def saved(kind, name):
    head = {"margin": {**MARGIN, "kind": kind}, "scale": 32.0}
    return {**SAVED, "head": head, "backbone": {**BACKBONE, "name": name}}


MARGINS = {
    "arcface": {"m": 0.4},
    "arcface-straight-through": {"m": 0.4},
    "cosface": {"m": 0.4},
    "combined": MARGIN["combined"],
    "adaface": {"m": 0.4, **MARGIN["adaface"]},
    "magface": MARGIN["magface"],
    "curricularface": {"m": 0.4, "momentum": 0.03},
}


@pytest.mark.parametrize("kind", MARGINS)
def test_a_saved_margin_keeps_the_keys_of_its_kind(kind):
    found = from_saved(saved(kind, "lgaf"))
    assert found.head.margin.model_dump() == {"kind": kind, **MARGINS[kind]}
    assert found.head.scale == 32


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("lgaf", ("depth", "width", "stem_stride", "local_only", "mhms", "lgf")),
        ("iresnet", ("depth", "width", "stem_stride")),
        ("vit", ("size", "patch", "drop_path", "mask_ratio")),
    ],
)
def test_a_saved_network_keeps_the_keys_of_its_name(name, own):
    found = from_saved(saved("arcface", name)).backbone
    dumped, expected = found.model_dump(mode="json"), {**BACKBONE, **BACKBONE["vit"]}
    assert dumped["name"] == name
    for key in (*own, "embedding_size", "dropout", "recompute"):
        part = {k: dumped[key][k] for k in expected[key]} if isinstance(expected[key], dict) else dumped[key]
        assert part == expected[key], key
    assert not set(dumped) & ({"depth", "size", "mhms"} - set(own))


# As they were saved when `momentum` was also the beta1 of adamw.
ROWS = {"optimizer": "sgd", "moments": "fp32", "momentum": 0.8, "beta2": 0.99, "weight_decay": 0.1}
OPTIMIZER = {"kind": "sgd", "learning_rate": 0.3, "momentum": 0.7, "beta2": 0.98, "weight_decay": 0.2}


def test_saved_optimizers_keep_the_keys_of_their_kind():
    found = from_saved({**SAVED, "head": {"scale": 32.0, **ROWS}, "optimizer": OPTIMIZER})
    assert found.head.scale == 32
    assert found.head.optimizer == RowSGDConfig(momentum=0.8, weight_decay=0.1)
    assert found.optimizer == SGDConfig(learning_rate=0.3, momentum=0.7, weight_decay=0.2)


def test_the_momentum_of_a_saved_adamw_is_its_beta1():
    rows = {**ROWS, "optimizer": "adamw", "moments": "bf16"}
    found = from_saved({**SAVED, "head": rows, "optimizer": {**OPTIMIZER, "kind": "adamw"}})
    assert found.head.optimizer == RowAdamWConfig(beta1=0.8, beta2=0.99, weight_decay=0.1, moments="bf16")
    assert found.optimizer == AdamWConfig(learning_rate=0.3, beta1=0.7, beta2=0.98, weight_decay=0.2)


def test_optimizers_from_before_adamw_are_sgd():
    rows = {"momentum": 0.8, "weight_decay": 0.1}
    found = from_saved({**SAVED, "head": rows, "optimizer": {"learning_rate": 0.3, "momentum": 0.7}})
    assert found.head.optimizer == RowSGDConfig(momentum=0.8, weight_decay=0.1)
    assert found.optimizer == SGDConfig(learning_rate=0.3, momentum=0.7)


def test_the_present_form_stays_as_it_is():
    optimizers = {"optimizer": {"kind": "adamw", "beta1": 0.7}}
    config = from_saved({**saved("magface", "vit"), **optimizers})
    config = config.model_copy(
        update={"head": config.head.model_copy(update={"optimizer": RowAdamWConfig()})}
    )
    dumped = config.model_dump(mode="json")
    assert from_saved(dumped) == config == RunConfig.model_validate(dumped)
    assert translated_backbone(dumped["backbone"]) == dumped["backbone"]


def test_an_iresnet_from_before_the_vit_is_read():
    old = {key: value for key, value in BACKBONE.items() if key not in ("vit", "local_only")}
    found = from_saved({**SAVED, "backbone": {**old, "name": "iresnet"}}).backbone
    assert (found.name, found.width, found.dropout) == ("iresnet", 16, 0.1)
