"""Configuration files: valid ones are read, and errors name the key and its source."""

from enum import Enum
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_pipeline.config import DataConfig
from trainer.config_file import describe, help_text, load


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Inner(Strict):
    probability: float = Field(0.5, ge=0, le=1, description="chance of it")
    sizes: list[int] = Field([1, 2], description="sizes, pixels")


class Optional(Strict):
    depth: int = Field(description="depth in layers")


class Item(Strict):
    number: int = Field(0, description="a number")


class Config(Strict):
    seed: int = Field(0, ge=0, description="where all begins")
    path: Path = Field(description="folder of the data")
    kind: Literal["small", "large"] = Field("small", description="how large")
    name: str = Field("x", description="a name")
    is_on: bool = Field(True, description="whether it is on")
    limit: float | None = Field(None, gt=0, lt=9, description="an upper limit")
    colour: Colour = Field(Colour.RED, description="which colour")
    inner: Inner = Field(Inner(probability=0.25), description="the inner part")
    optional: Optional | None = Field(None, description="a part that may be absent")
    items: list[Item] = Field([], description="parts in a list")

    @model_validator(mode="after")
    def _thirteen(self) -> "Config":
        if self.seed == 13:
            raise ValueError("seed 13 brings bad luck; take another")
        return self


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return write


def messages(path, overrides=()):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        load(Config, path, overrides)
    assert type(raised.value) is ValueError
    return str(raised.value).splitlines()


def test_a_file_fills_the_model_and_defaults_stay(file):
    config = load(Config, file('path = "/d"\nlimit = 2\n[inner]\nsizes = [3]\n[[items]]\nnumber = 4\n'))
    assert (config.path, config.limit, config.seed) == (Path("/d"), 2.0, 0)
    assert config.inner.sizes == [3]
    assert config.items[0].number == 4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=7", {"seed": 7}),
        (" seed = 7 ", {"seed": 7}),
        ("path=/a/b=c d", {"path": Path("/a/b=c d")}),
        ('name="7"', {"name": "7"}),
        ("name=a # b", {"name": "a # b"}),
        ("name=1\nseed=3", {"name": "1\nseed=3", "seed": 0}),
        ("is_on=false", {"is_on": False}),
        ("limit=1e-3", {"limit": 0.001}),
        ("kind=large", {"kind": "large"}),
        ("colour=blue", {"colour": Colour.BLUE}),
        ("inner.sizes=[4, 5]", {"inner": Inner(sizes=[4, 5])}),
        ("inner={probability = 1}", {"inner": Inner(probability=1)}),
        ("optional.depth=3", {"optional": Optional(depth=3)}),
    ],
)
def test_an_override_is_toml_or_else_a_string(file, override, expected):
    config = load(Config, file('path = "p"\nname = "before"\n'), [override])
    assert {name: getattr(config, name) for name in expected} == expected


def test_overrides_alone_are_enough_and_the_last_one_counts():
    config = load(Config, None, ["path=x", "inner.probability=0.1", "seed=1", "seed=2"])
    assert (config.path, config.inner.probability, config.seed) == (Path("x"), 0.1, 2)


def test_all_that_is_wrong_is_said_at_once(file):
    path = file('sead = 1\nkind = "huge"\n[inner]\nprobability = 2\n[[items]]\nnumber = "two"\n')
    is_unknown = "unknown key sead; did you mean seed? Valid keys of the file"
    no_integer = "expected a valid integer, unable to parse string as an integer"
    assert messages(path, ["limit=0", "name=3"]) == [
        f"{path}: path: expected a value, found none (folder of the data)",
        f"{path}: kind: expected 'small' or 'large', found 'huge'",
        "--set: name: expected a valid string, found 3",
        "--set: limit: expected greater than 0, found 0",
        f"{path}: inner.probability: expected less than or equal to 1, found 2",
        f"{path}: items.0.number: {no_integer}, found 'two'",
        f"{path}: {is_unknown}: seed, path, kind, name, is_on, limit, colour, inner, optional, items",
    ]


def test_an_unknown_key_is_answered_at_its_own_level(file):
    path = file('path = "p"\n[inner]\nsize = 1\n[optional]\ndept = 2\ndepth = 2\n[[items]]\nnumbr = 1\n')
    assert messages(path) == [
        f"{path}: unknown key inner.size; did you mean inner.sizes? "
        "Valid keys of [inner]: probability, sizes",
        f"{path}: unknown key optional.dept; did you mean optional.depth? Valid keys of [optional]: depth",
        f"{path}: unknown key items.0.numbr; did you mean items.0.number? Valid keys of [items.0]: number",
    ]


def test_a_key_of_another_table_is_found_and_a_strange_one_gets_the_list():
    assert messages(None, ["path=p", "depth=3", "qqq.zzz=1"]) == [
        "--set: unknown key depth; did you mean optional.depth? Valid keys of the file: seed, path, kind, "
        "name, is_on, limit, colour, inner, optional, items",
        "--set: unknown key qqq; valid keys of the file: seed, path, kind, name, is_on, limit, colour, "
        "inner, optional, items",
    ]


def test_what_the_model_itself_refuses_keeps_its_words(file):
    path = file('path = "p"\nseed = 13\n')
    assert messages(path) == [f"{path}: seed 13 brings bad luck; take another"]
    assert messages(path, ["kind=large"]) == [f"{path} and --set: seed 13 brings bad luck; take another"]


@pytest.mark.parametrize("override", ["seed", "=3", "inner.=3", ".seed=3", "inner..sizes=3"])
def test_an_override_that_is_none(override):
    assert messages(None, [override]) == [f"--set {override!r}: expected key=value, as in --set seed=7"]


def test_an_override_below_a_value(file):
    assert messages(file('path = "p"\nname = "n"\n'), ["name.first=1"]) == [
        "--set 'name.first=1': expected name to be a table, found 'n'"
    ]


def test_files_that_cannot_be_read(tmp_path, file):
    missing = tmp_path / "no.toml"
    assert messages(missing) == [
        f"{missing}: expected a configuration file (TOML), found: No such file or directory"
    ]
    assert "Is a directory" in messages(tmp_path)[0]
    path = file("seed = \n")
    assert messages(path)[0].startswith(f"{path}: expected TOML, found: Invalid value (at line 1, column 8)")
    path.write_bytes(b"\xff\xfe")
    assert messages(path)[0].startswith(f"{path}: expected TOML, found: 'utf-8' codec can't decode")


def test_all_keys_are_described_with_type_default_and_meaning():
    assert [tuple(key) for key in describe(Config)] == [
        ("seed", "int, >= 0", "0", "where all begins"),
        ("path", "path", "required", "folder of the data"),
        ("kind", '"small" | "large"', '"small"', "how large"),
        ("name", "str", '"x"', "a name"),
        ("is_on", "bool", "true", "whether it is on"),
        ("limit", "float, > 0, < 9", "not set", "an upper limit"),
        ("colour", '"red" | "blue"', '"red"', "which colour"),
        ("inner.probability", "float, >= 0, <= 1", "0.25", "chance of it"),
        ("inner.sizes", "list[int]", "[1, 2]", "sizes, pixels"),
        ("optional.depth", "int", "required", "depth in layers"),
        ("items", "list[item]", "[]", "parts in a list"),
    ]


def test_the_help_names_every_key_and_keeps_the_width():
    text = help_text(Config, width=30)
    assert "inner.probability = 0.25  (float, >= 0, <= 1)\n    chance of it\n" in text
    assert all(f"{key.name} = {key.default}" in text for key in describe(Config))


def test_one_dataset_may_be_given_without_brackets():
    assert load(DataConfig, None, ["path=/a/b"]).path == [Path("/a/b")]
    assert load(DataConfig, None, ['path=["/a", "b"]']).path == [Path("/a"), Path("b")]
    for nothing in ("path=[]", "path=3"):
        with pytest.raises(
            ValueError,
            match=r"^--set: (path: expected a valid list|expected either path or shards, found neither)",
        ):
            load(DataConfig, None, [nothing])
