"""Translation of configurations that older versions of lgaf saved in manifests and in files of networks."""

from __future__ import annotations

from typing import Any

from trainer.config import RunConfig


def from_saved(saved: dict[str, Any]) -> RunConfig:
    """Return the configuration of a checkpoint's manifest, which any version of lgaf may have written.

    Keys that are newer than the checkpoint have their defaults. Raises ValueError.
    """
    try:
        tree = _translated(saved)
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"a table of another form: {error}") from error
    return RunConfig.model_validate(tree)


def _translated(saved: dict[str, Any]) -> dict[str, Any]:
    tree = {**saved}
    for name, translated in (
        ("backbone", translated_backbone),
        ("head", _translated_head),
        ("optimizer", _translated_optimizer),
    ):
        if isinstance(saved.get(name), dict):
            tree[name] = translated(saved[name])
    return tree


def _translated_head(saved: dict[str, Any]) -> dict[str, Any]:
    head, margin = {**saved}, saved.get("margin", {})
    if "magface" in margin and margin.get("kind") in _MARGIN_KEYS:
        head["margin"] = _of_its_kind(margin, "kind", _MARGIN_KEYS)
    # The optimizer of the class rows was a name, and its keys stood in [head].
    if not isinstance(saved.get("optimizer"), dict):
        own = {"kind": saved.get("optimizer", "sgd")}
        own |= {key: head.pop(key) for key in _ROW_OPTIMIZER_KEYS if key in head}
        head["optimizer"] = _translated_optimizer(own)
    return head


def _translated_optimizer(saved: dict[str, Any]) -> dict[str, Any]:
    """Rename the former `momentum` of adamw to beta1, and remove the former `beta2` of sgd."""
    optimizer = {**saved}
    if saved.get("kind") == "adamw" and "momentum" in saved:
        optimizer["beta1"] = optimizer.pop("momentum")
    elif saved.get("kind") != "adamw":
        optimizer.pop("beta2", None)
    return optimizer


_ROW_OPTIMIZER_KEYS = ("moments", "momentum", "beta2", "weight_decay")
# Before each kind had its own keys, a table held the keys of all kinds, some in a table named after the kind.
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
    """Return a saved backbone in the present form; any version of lgaf may have written it."""
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
