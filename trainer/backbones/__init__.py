"""Networks: plain modules, independent of ranks.

A module of this package holds a network and, beside it, its configuration, a subclass of `BackboneConfig`.
`AnyBackbone` contains every such subclass that defines a `name`: a new network is one new module.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args

from pydantic import BeforeValidator, Field, TypeAdapter

from trainer.backbones.base import Backbone, BackboneConfig, Features, parameter_groups

__all__ = [
    "AnyBackbone",
    "Backbone",
    "BackboneConfig",
    "Features",
    "build",
    "default",
    "parameter_groups",
    "parse",
]

_DEFAULT = "lgaf"

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def _named(config: type[BackboneConfig]) -> Iterator[type[BackboneConfig]]:
    for one in config.__subclasses__():
        if get_args(one.model_fields["name"].annotation):
            yield one
        yield from _named(one)


def _with_name(value: Any) -> Any:
    """Set the default network's name in a table without a `name`."""
    return {"name": _DEFAULT, **value} if isinstance(value, dict) else value


if TYPE_CHECKING:
    AnyBackbone = BackboneConfig
else:
    # Every network's configuration, chosen by `name`.
    AnyBackbone = Annotated[
        Union[tuple(_named(BackboneConfig))],  # noqa: UP007
        Field(discriminator="name"),
        BeforeValidator(_with_name),
    ]


def parse(keys: dict[str, Any]) -> BackboneConfig:
    """Return the configuration that a table of keys describes. Raises ValueError for invalid keys."""
    found: BackboneConfig = TypeAdapter(AnyBackbone).validate_python(keys)
    return found


def default() -> BackboneConfig:
    """Return the configuration of the default network."""
    return parse({})


def build(config: BackboneConfig, image_size: int) -> Backbone:
    """Return the network that `config` describes, for images of `image_size` pixels."""
    return config.build(image_size)
