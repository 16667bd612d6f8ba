"""Configuration files: TOML, changed by `key=value` overrides and validated by a pydantic model.

    load(SynthConfig, Path("configs/demo_data.toml"), ["seed=7", "augment.flip_probability=0"])

One ValueError reports all errors, a line for each key: its source, its dotted name, the expected and the
found value; for an unknown key also the valid keys and the nearest match. `describe` and `help_text` list the
keys of a model, so that the help matches the accepted keys.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from data_pipeline.common.data_file import read_data_file
from data_pipeline.common.redaction import redacted, redacted_text, redacted_values

M = TypeVar("M", bound=BaseModel)
# Configurations have a few kilobytes; lists of shards can be longer.
_MOST_BYTES = 1 << 20
_MOST_PARTS = 32
_MOST_SHOWN = 4096
# tomllib takes quadratic time and memory for a dotted key of many parts. No key begins behind a backslash:
# without this condition, every escaped quote of a long line would be tried up to the line's end.
_LONG_KEY = re.compile(
    rf"""(?<![\w\\-])(?:(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{_MOST_PARTS}}}"""
)
_DOTTED = re.compile(r"[\w-]++(?:\.[\w-]++)*+")
_MOST_ERRORS = 50
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class Key(NamedTuple):
    """One key of a configuration: dotted name, type with bounds, default as TOML, description."""

    name: str
    type: str
    default: str
    description: str


def load(model: type[M], path: Path | None, overrides: Sequence[str] = ()) -> M:
    """Return the configuration in the TOML file `path` (None: an empty one), changed by `overrides`.

    An override is `dotted.key=value`; a value that is not valid TOML is a string.

    Raises ValueError if the file cannot be read as TOML or is too large for a configuration, if an override
    has no "=" or names a key below a value that is not a table, or if keys are unknown, missing or invalid.
    """
    tree = {} if path is None else _read_toml(path)
    overridden = [_apply(tree, override) for override in overrides]
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        errors = error.errors()
        lines = [_explain(model, item, path, overridden) for item in errors[:_MOST_ERRORS]]
        if len(errors) > _MOST_ERRORS:
            lines.append(f"and {len(errors) - _MOST_ERRORS} more errors")
    raise ValueError("\n".join(lines))


def describe(model: type[BaseModel]) -> list[Key]:
    """Return all keys of a model in the order of definition; keys of nested models have dotted names."""
    return list(_keys(model, None, ""))


def help_text(model: type[BaseModel], width: int = 100) -> str:
    """Return the keys of a model as text, wrapped at `width` columns."""
    blocks = []
    for key in describe(model):
        indented = textwrap.fill(key.description, width, initial_indent="    ", subsequent_indent="    ")
        blocks.append(f"{key.name} = {key.default}  ({key.type})\n{indented}")
    return "\n".join(blocks)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text = read_data_file(path, _MOST_BYTES).decode()
        if found := _LONG_KEY.search(text):
            line = text.count("\n", 0, found.start()) + 1
            raise ValueError(f"a key of more than {_MOST_PARTS} parts (at line {line})")
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(
            f"{path}: expected TOML, found: values nested too deeply; correct it there"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{path}: expected a configuration file (TOML), found: {error.strerror or error}"
        ) from error
    except ValueError as error:  # both tomllib's and the decoder's
        raise ValueError(
            f"{path}: expected TOML, found: {redacted_text(str(error))}; correct it there"
        ) from error


def _apply(tree: dict[str, Any], override: str) -> str:
    """Apply one override to the tree; return its dotted key."""
    name, equals, text = override.partition("=")
    name = name.strip()
    *tables, last = name.split(".")
    if not equals or not _DOTTED.fullmatch(name):
        raise ValueError(f"--set {_shown(override)}: expected key=value, as in --set seed=7")
    for depth, table in enumerate(tables, 1):
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise ValueError(
                f"--set {_shown(override)}: expected {'.'.join(tables[:depth])} to be a table, "
                f"found {_shown(tree)}"
            )
    tree[last] = _toml_value(text.strip())
    return name


def _toml_value(text: str) -> Any:
    try:
        match tomllib.loads(f"value = {text}"):
            case {"value": value, **others} if not others:
                return value
    except (ValueError, RecursionError):
        pass
    return text


def _explain(
    model: type[BaseModel], error: Mapping[str, Any], path: Path | None, overridden: list[str]
) -> str:
    """Return a line of text for one of pydantic's errors."""
    loc, table = _resolve(model, error["loc"])
    name = ".".join(map(str, loc))
    where = _where(name, path, overridden)
    name = redacted(name[:_MOST_SHOWN])
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key {name}{_nearest(model, table, error['loc'], loc)}"
    if error["type"] == "union_tag_invalid":
        tag, found = error["ctx"]["discriminator"].strip("'"), error["ctx"]["tag"]
        nearest = difflib.get_close_matches(found, re.findall(r"'([^']+)'", error["ctx"]["expected_tags"]), 1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        expected = f"{name}.{tag}: expected one of {error['ctx']['expected_tags']}"
        return f"{where}: {expected}, found {_shown(found)}{hint}"
    subject = f"{where}: {name}" if name else where
    if error["type"] == "model_attributes_type":  # of tables with kinds only
        kinds = _kinds(table.model_fields[str(loc[-1])].annotation)
        tag, names = _tag_of(next(iter(kinds.values()))), ", ".join(map(repr, kinds))
        return (
            f"{subject}: expected a table, found {_shown(error['input'])}; set {name}.{tag} to one of {names}"
        )
    if error["type"] == "missing":
        field = table.model_fields[str(error["loc"][-1])]
        return f"{subject}: expected a value, found none ({field.description})"
    if error["type"] in ("value_error", "assertion_error"):
        return f"{subject}: {error['ctx']['error']}"
    message = re.sub(r"^Input should (be )?", "expected ", error["msg"])
    return f"{subject}: {message}, found {_shown(error['input'])}"


def _shown(value: Any) -> str:
    """Return a value for a message, cut off after 80 characters."""
    return repr(redacted_values(_shortened(value)))[:80]


def _shortened(value: Any, levels: int = 3) -> Any:
    """Return the beginning of a value, so that a long one takes no long time to be shown."""
    match value:
        case str():
            return value[:_MOST_SHOWN]
        case list() | dict() if not levels:
            return "..."
        case list():
            return [_shortened(item, levels - 1) for item in value[:_MOST_PARTS]]
        case dict():
            first = itertools.islice(value.items(), _MOST_PARTS)
            return {key[:_MOST_SHOWN]: _shortened(item, levels - 1) for key, item in first}
    return value


def _where(name: str, path: Path | None, overridden: list[str]) -> str:
    """Return the source of a key's value: the file, --set, or both for a table."""
    if any(name == key or name.startswith(f"{key}.") for key in overridden) or path is None:
        return "--set" if overridden else "configuration"
    is_above = any(not name or key.startswith(f"{name}.") for key in overridden)
    return f"{path} and --set" if is_above else str(path)


def _nearest(
    model: type[BaseModel], table: type[BaseModel], raw: tuple[str | int, ...], loc: tuple[str | int, ...]
) -> str:
    """Return suggestions for an unknown key of `table`: the same key below it or elsewhere, similar keys."""
    *outer, last = loc
    prefix = "".join(f"{part}." for part in outer)
    beside = list(table.model_fields)
    owners = _kinds_with(model, raw, str(last))
    if owners:
        is_table = last in owners
        hint = (
            f"the keys of {last} belong to [{prefix[:-1]}] itself"
            if is_table
            else f"it belongs to {' and '.join(owners)}"
        )
        return f"; {hint}. Valid keys of [{prefix[:-1]}] here: {', '.join(beside)}"
    namesakes = [key.name for key in describe(model) if key.name.rpartition(".")[2] == last]
    namesakes = [name for name in namesakes if name.startswith(prefix)] or namesakes
    similar = [prefix + name for name in difflib.get_close_matches(str(last), beside, 3, 0.7)]
    hints = list(dict.fromkeys(namesakes + similar))
    hint = f"; did you mean {' or '.join(hints)}? Valid" if hints else "; valid"
    return f"{hint} keys of {f'[{prefix[:-1]}]' if outer else 'the file'}: {', '.join(beside)}"


def _resolve(
    model: type[BaseModel], loc: tuple[str | int, ...]
) -> tuple[tuple[str | int, ...], type[BaseModel]]:
    """Return an error's location without the kinds that pydantic puts into it, and the model of its table."""
    found: list[str | int] = []
    kinds: dict[str, type[BaseModel]] = {}
    table = model
    for part in loc:
        if part in kinds:
            model, kinds = kinds[str(part)], {}
            table = model
            continue
        found.append(part)
        table = model
        field = model.model_fields.get(str(part))
        if field is not None:
            kinds = _kinds(field.annotation)
            model = _inner_model(field.annotation) or model
    return tuple(found), table


def _kinds_with(model: type[BaseModel], loc: tuple[str | int, ...], key: str) -> list[str]:
    """Return the kinds, other than the chosen one, that have the key at `loc` or are named by it."""
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is None:
            return []
        kinds = _kinds(field.annotation)
        if kinds:
            return [name for name, one in kinds.items() if key in one.model_fields or name == key]
        model = _inner_model(field.annotation) or model
    return []


def _kinds(annotation: Any) -> dict[str, type[BaseModel]]:
    """Return kind -> model of a discriminated union; nothing for any other annotation."""
    models = [
        arg for arg in typing.get_args(annotation) if isinstance(arg, type) and issubclass(arg, BaseModel)
    ]
    return {
        typing.get_args(one.model_fields[_tag_of(one)].annotation)[0]: one
        for one in models
        if len(models) > 1
    }


def _tag_of(model: type[BaseModel]) -> str:
    """Return the name of the field that selects the kind: the one with a single allowed value."""
    return next(
        name for name, field in model.model_fields.items() if len(typing.get_args(field.annotation)) == 1
    )


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model inside `Model`, `Model | None`, `list[Model]`..., None where there is no model."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_inner_model, typing.get_args(annotation))), None)


def _keys(model: type[BaseModel], defaults: BaseModel | None, prefix: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        default = (
            getattr(defaults, name) if defaults is not None else field.get_default(call_default_factory=True)
        )
        inner, kinds = _table(field.annotation), _kinds(field.annotation)
        if kinds:
            yield from _keys_of_kinds(kinds, default, prefix + name, field)
        elif inner is not None:
            yield from _keys(inner, default if isinstance(default, inner) else None, f"{prefix}{name}.")
        else:
            is_required = defaults is None and field.is_required()
            shown = "required" if is_required else _as_toml(default)
            yield Key(prefix + name, _type_text(field), shown, field.description or "")


def _keys_of_kinds(
    kinds: dict[str, type[BaseModel]], default: Any, name: str, field: FieldInfo
) -> Iterator[Key]:
    """Yield the key that selects the kind, then the keys of all kinds with the kinds that have them."""
    tag = _tag_of(type(default))
    about = "; ".join(f"{kind}: {one.model_fields[tag].description}" for kind, one in kinds.items())
    yield Key(f"{name}.{tag}", " | ".join(map(_as_toml, kinds)), _as_toml(getattr(default, tag)), about)
    shared: dict[Key, list[str]] = {}
    for kind, one in kinds.items():
        for key in _keys(one, None, f"{name}."):
            if key.name != f"{name}.{tag}":
                shared.setdefault(key, []).append(kind)
    for key, of_kinds in shared.items():
        where = "" if len(of_kinds) == len(kinds) else f"[{', '.join(of_kinds)}] "
        yield key._replace(description=where + key.description)


def _table(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a field that is a table, possibly optional; None for any other field."""
    args = [arg for arg in typing.get_args(annotation) if arg is not types.NoneType]
    is_optional = typing.get_origin(annotation) in (typing.Union, types.UnionType) and len(args) == 1
    candidate = args[0] if is_optional else annotation
    return candidate if isinstance(candidate, type) and issubclass(candidate, BaseModel) else None


def _type_text(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(constraint, name):g}"
        for constraint in field.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(constraint, name)
    ]
    return ", ".join([_annotation_text(field.annotation), *bounds])


def _annotation_text(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _annotation_text(args[0])
    if origin is typing.Literal:
        return " | ".join(map(_as_toml, args))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_annotation_text(arg) for arg in args if arg is not types.NoneType)
    if origin is not None:
        inside = ", ".join("..." if arg is ... else _annotation_text(arg) for arg in args)
        return f"{origin.__name__}[{inside}]"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " | ".join(_as_toml(member) for member in annotation)
    return annotation.__name__.lower()


def _as_toml(value: Any) -> str:
    """Return a default as it is written in a file; TOML has no null, so that None is "not set"."""
    match value:
        case None:
            return "not set"
        case Enum():
            return _as_toml(value.value)
        case bool():
            return str(value).lower()
        case str() | Path():
            return json.dumps(str(value), ensure_ascii=False)
        case list() | tuple() | set():
            return f"[{', '.join(map(_as_toml, value))}]"
        case dict():
            return "{" + ", ".join(f"{name} = {_as_toml(item)}" for name, item in value.items()) + "}"
    return str(value)
