"""Configurations as older versions of lgaf have saved them, in manifests and in files of networks."""

from __future__ import annotations

from typing import Any

from trainer.config import RunConfig


def from_saved(saved: dict[str, Any]) -> RunConfig:
    """Return the configuration that a checkpoint's manifest holds, as any version of lgaf has written it.

    Keys that are newer than the checkpoint take their defaults. Raises ValidationError.
    """
    tree = {**saved, "backbone": translated_backbone(saved.get("backbone", {}))}
    margin = saved.get("head", {}).get("margin", {})
    if "magface" in margin and margin.get("kind") in _MARGIN_KEYS:
        tree["head"] = {**saved["head"], "margin": _of_its_kind(margin, "kind", _MARGIN_KEYS)}
    return RunConfig.model_validate(tree)


# Before kinds owned their keys, every table held those of all kinds, some in a table by the kind's name.
_MARGIN_KEYS: dict[str, set[str]] = {
    "arcface": {"m"},
    "arcface-straight-through": {"m"},
    "cosface": {"m"},
    "combined": set(),
    "adaface": {"m"},
    "magface": set(),
    "curricularface": {"m"},
}
_BACKBONE_KEYS: dict[str, set[str]] = {
    "iresnet": {"depth", "blocks", "width", "stem_stride"},
    "lgaf": {"depth", "blocks", "width", "stem_stride", "local_only", "mhms", "lgf"},
    "vit": set(),
}


def translated_backbone(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a saved backbone in the present form, whatever version of lgaf has written them."""
    is_old = "vit" in saved or ("mhms" in saved and saved.get("name") != "lgaf")
    if not is_old or saved.get("name") not in _BACKBONE_KEYS:
        return saved
    shared = {"embedding_size", "dropout", "weights", "recompute"}
    keys = {name: own | shared for name, own in _BACKBONE_KEYS.items()}
    return _of_its_kind(saved, "name", keys)


def _of_its_kind(saved: dict[str, Any], tag: str, keys: dict[str, set[str]]) -> dict[str, Any]:
    kind = saved[tag]
    own = saved.get(kind, {})
    if not isinstance(own, dict):
        raise ValueError(f"{kind}: expected a table, found {own!r:.80}")
    return {tag: kind, **{key: saved[key] for key in keys[kind] if key in saved}, **own}
