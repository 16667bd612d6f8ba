"""Weights, networks and checkpoints from strangers: no code is executed, and no file reserves gigabytes."""

import ast
import io
import json
import os
import pickle
import resource
import shutil
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from data_pipeline.common import bounded_json
from tests.trainer.checkpoint.test_directory import write as write_checkpoint
from tests.trainer.checkpoint.test_sharded import reseal
from tests.trainer.networks import small_network
from trainer.backbones import weights
from trainer.checkpoint import convert, directory, pt_file, sharded
from trainer.checkpoint.directory import CheckpointError
from trainer.inference import network as network_module
from trainer.inference.network import network_of, read_network, write_pt
from trainer.runtime.ranks import join
from trainer.runtime.watchdog import Pulse, _Life

ROOT = Path(__file__).parents[2]
PACKAGES = ("trainer", "data_pipeline", "partial_fc", "slurm")
DEEP = "[" * 100_000 + "]" * 100_000
ROOM_BYTES = 1 << 30


@pytest.fixture(autouse=True)
def little_memory():
    """Let this process reserve one more GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def network():
    return small_network()


@pytest.fixture(scope="module")
def alone():
    with join() as ranks:
        yield ranks


# Code.

# Subclasses of unpicklers that import nothing.
SAFE = {"data_pipeline/formats/safe_pickle.py", "trainer/checkpoint/convert.py"}
FORBIDDEN_MODULES = {"marshal", "shelve", "joblib", "dill", "cloudpickle", "yaml"}
UNPICKLERS = {"load", "loads", "Unpickler", "_Unpickler"}


def forbidden_in(tree):
    """Yield the line and the kind of everything that can execute code in a file or a message."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            yield from ((node.lineno, name) for name in names if name.partition(".")[0] in FORBIDDEN_MODULES)
            if getattr(node, "module", None) == "pickle":
                yield node.lineno, "names of pickle without the module's name"
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if owner in ("pickle", "_pickle") and node.attr in UNPICKLERS:
                yield node.lineno, f"pickle.{node.attr}"
            if "_object" in node.attr and node.attr.partition("_")[0] in (
                "all", "broadcast", "gather", "scatter", "send", "recv",
            ):  # fmt: skip
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in ("eval", "exec", "compile", "__import__"):
                yield node.lineno, name
            if name.endswith("torch.load") and given.get("weights_only") != "True":
                yield node.lineno, "torch.load without weights_only=True"
            if given.get("allow_pickle", "False") != "False":
                yield node.lineno, "allow_pickle"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_executes_what_it_reads(package):
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    found = {
        (str(path.relative_to(ROOT)), line, kind)
        for path in paths
        for line, kind in forbidden_in(ast.parse(path.read_text()))
    }
    assert {one for one in found if one[0] not in SAFE or "Unpickler" not in one[2]} == set()


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "pickle.loads(data)",
        "from pickle import loads",
        "class A(pickle.Unpickler): pass",
        "import marshal",
        "import yaml",
        "from joblib import load",
        "np.load(file, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "dist.all_gather_object(a, b)",
        "dist.broadcast_object_list(a)",
    ],
)
def test_the_search_finds_each_kind(code):
    assert [*forbidden_in(ast.parse(code))]


# Files of networks.


def rezipped(path, change):
    """Write the archive again; `change` returns the compression and the content of an entry."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, *change(name, content))


def compressed(path):
    torch.save({"state": {"a": torch.zeros(1 << 21)}}, path)
    rezipped(path, lambda name, content: (content, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 100_000


def overlapping(path):
    """Let a thousand entries have the same bytes."""
    torch.save({"state": {"a": torch.zeros(1 << 18)}}, path)
    rezipped(path, lambda name, content: (content,))
    with zipfile.ZipFile(path, "a") as archive:
        [large] = (one for one in archive.infolist() if one.file_size >= 1 << 20)
        for number in range(1000):
            copy = zipfile.ZipInfo(f"archive/data/{number + 7}")
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(copy, name, getattr(large, name))
            archive.filelist.append(copy)
            archive.NameToInfo[copy.filename] = copy
        archive._didModify = True


def two_directories(path):
    """Hide an archive behind another: Python finds the second, torch the first if it follows the offsets."""
    torch.save({"state": {}}, path)
    content = path.read_bytes()
    path.write_bytes(content + content)


def calling(name, argument):
    """Write a file whose pickle calls a function that torch.load allows."""

    def make(path):
        torch.save({"state": {}}, path)
        module, _, function = name.rpartition(".")
        program = b"\x80\x02c" + f"{module}\n{function}\n".encode() + argument + b"\x85R."
        rezipped(path, lambda name, content: (program if name.endswith("data.pkl") else content,))

    return make


HUGE = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
BOMBS = {
    "compressed": (compressed, "compressed or overlapping"),
    "overlapping": (overlapping, "compressed or overlapping"),
    "two directories": (two_directories, "between its records"),
    "bytearray": (calling("builtins.bytearray", HUGE), "builtins.bytearray, expected only tensors"),
    "Tensor": (calling("torch.Tensor", HUGE), "torch.Tensor, expected only tensors"),
    "quantized": (calling("torch._utils._rebuild_qtensor", HUGE), "expected only tensors"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_file_that_grows_when_read_is_refused(kind, network, tmp_path):
    make, message = BOMBS[kind]
    make(tmp_path / "n.pt")
    with pytest.raises(ValueError, match=f"n.pt: expected a network.*{message}"):
        read_network(tmp_path / "n.pt")
    with pytest.raises(ValueError, match=f"n.pt: expected a state dict.*{message}"):
        weights.load(network.model, tmp_path / "n.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("strides", [(0, 0), (1, 1)])
def test_views_of_a_few_elements_are_refused_before_anything_is_allocated(
    strides, zipped, network, tmp_path, monkeypatch
):
    path = tmp_path / "n.pt"
    config = network.config.model_copy(update={"embedding_size": 200_000})
    with torch.device("meta"):
        wanted = network_module.backbones.build(config, 32).state_dict()
    large = {
        name: torch.zeros(sum(tensor.shape[:2]), dtype=tensor.dtype).as_strided(tensor.shape, strides)
        if tensor.ndim == 2
        else torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        for name, tensor in wanted.items()
    }
    content = {"backbone": config.model_dump(mode="json"), "image_size": 32, "step": 1, "state": large}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.setattr(network_module.backbones, "build", None)
    with pytest.raises(ValueError, match=r"expected a network.*tensors of \d{9,} bytes in a file of \d{6,7}"):
        read_network(path)
    with pytest.raises(ValueError, match=r"expected a state dict.*tensors of \d{9,} bytes in a file of"):
        weights.load(network.model, path)
    with pytest.raises(ValueError, match=r"tensors of \d{9,} bytes in a file of"):
        pt_file.load_bytes(bytearray(path.read_bytes()))


def test_shared_and_permuted_tensors_are_still_read(tmp_path):
    tied = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    torch.save({"state": {"a": tied, "b": tied, "c": torch.randn(4, 8).T}}, tmp_path / "n.pt")
    assert torch.equal(pt_file.load(tmp_path / "n.pt")["state"]["b"], tied)


def test_methods_that_a_pickle_replaces_hide_no_tensor(tmp_path):
    state = OrderedDict(a=torch.zeros(()).expand(1 << 20))
    state.values = torch.Size
    torch.save(state, tmp_path / "n.pt")
    with pytest.raises(ValueError, match="tensors of 4194304 bytes in a file of"):
        pt_file.load(tmp_path / "n.pt")


def test_a_call_in_the_older_format_is_refused_too(tmp_path):
    parts = [pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {})]
    program = b"\x80\x02cbuiltins\nbytearray\n" + HUGE + b"\x85R."
    (tmp_path / "n.pt").write_bytes(b"".join(parts) + program + pickle.dumps([], protocol=2))
    with pytest.raises(ValueError, match=r"builtins\.bytearray, expected only tensors"):
        read_network(tmp_path / "n.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_writes_is_still_read(zipped, tmp_path):
    state = {"a": torch.nn.Parameter(torch.arange(3.0)), "b": torch.tensor(3), "c": torch.zeros(2).half()}
    torch.save(state, tmp_path / "n.pt", _use_new_zipfile_serialization=zipped)
    found = pt_file.load(tmp_path / "n.pt")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def doubled(item, join):
    """Return the instructions for an object of 60 levels, each with twice the one below it."""
    levels = (b"h%ch%c" % (i, i) + join + b"q%c" % (i + 1) for i in range(60))
    return item + b"q\0" + b"".join(levels) + b"h\x3c"


TREES = {
    "key": b"}" + doubled(b")", b"\x86") + b"Ns",
    "storage": doubled(b")", b"\x86") + b"Q",
    "shown": doubled(b"]", b"\x86") + b")R",
    "copies": b"](" + b"K\1" * 10_000 + b"eq\0ctorch\nSize\nq\1" + b"h\1h\0\x85R" * 1000,
    "deep": b"}" + b")" + b"\x85" * 100_000 + b"Ns",
    "scalar": b"K\1q\0(" + b"K\1" * 100 + b"e",
    "extended": b"]q\0h\0\x85q\1h\0(" + b"K\1" * 100 + b"e",
}


@pytest.mark.parametrize("kind", TREES)
def test_a_pickle_that_grows_when_hashed_copied_or_shown_is_refused(kind, tmp_path, monkeypatch):
    """All values are counted before torch sees them: torch would take 2**60 steps."""
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(convert, "_Unpickler", None)
    program = b"\x80\2" + TREES[kind] + b"."
    torch.save({}, tmp_path / "n.pt")
    rezipped(tmp_path / "n.pt", lambda name, content: (program if name.endswith("data.pkl") else content,))
    (tmp_path / "metadata").write_bytes(program)
    for read in (lambda: pt_file.load(tmp_path / "n.pt"), lambda: convert._described(tmp_path / "metadata")):
        with pytest.raises(ValueError, match=r"a pickle (of more than \d+ (values|levels)|that extends)"):
            read()


def test_a_doubled_key_by_dup_is_refused(tmp_path):
    (tmp_path / "metadata").write_bytes(b"\x80\2})" + b"2\x86" * 60 + b"Ns.")
    with pytest.raises(ValueError, match="the instruction DUP"):
        convert._described(tmp_path / "metadata")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_state_with_shared_objects_is_still_read(zipped, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    groups = [{"params": [parameter], "betas": (0.8, 0.9)} for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(groups)
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    state, shared = model.state_dict(), [1, (2, 3)]
    content = {"model": state, "ema": state, "optimizer": optimizer.state_dict(), "a": shared, "b": [shared]}
    torch.save(content, tmp_path / "n.pt", _use_new_zipfile_serialization=zipped)
    found = pt_file.load(tmp_path / "n.pt")
    assert found["b"] == [shared]
    assert found["ema"]._metadata == state._metadata
    assert found["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]


def test_a_pipe_and_an_endless_file_are_refused(network, tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    for name in ("pipe.pt", "zero.pt"):
        with pytest.raises(ValueError, match=f"{name}: .*regular file"):
            weights.load(network.model, tmp_path / name)


ABSURD = {
    "embedding_size": 4_000_000,
    "width": 1 << 40,
    "blocks": [1, 1, 10**9, 1],
    "dropout": 10**400,
    "mhms": {"heads": [[1]] * 2_000, "attention_reduction": 4},
}


@pytest.mark.parametrize("key", [*ABSURD, "image_size"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_absurd_configuration_is_refused_before_anything_is_allocated(
    key, suffix, network, tmp_path, monkeypatch
):
    path, built = tmp_path / f"n{suffix}", []
    config = network.config.model_dump(mode="json")
    facts = {"backbone": config, "image_size": 32, "step": 1}
    facts |= {"image_size": 10**9} if key == "image_size" else {"backbone": {**config, key: ABSURD[key]}}
    state = network.model.state_dict()
    if suffix == ".pt":
        facts["backbone"] = facts["backbone"] if key != "dropout" else {**config, "dropout": float("inf")}
        torch.save({**facts, "state": state}, path)
    else:
        texts = {name: json.dumps(value) for name, value in facts.items()}
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, texts)

    def build(config, image_size, original=network_module.backbones.build):
        built.append(torch.get_default_device().type)
        return original(config, image_size)

    monkeypatch.setattr(network_module.backbones, "build", build)
    with pytest.raises(ValueError, match=r"expected a network .*, found: .*(shape|tensors|overflow|dropout)"):
        read_network(path)
    assert built in ([], ["meta"])


def test_a_huge_header_of_safetensors_is_refused(tmp_path):
    (tmp_path / "n.safetensors").write_bytes(struct.pack("<Q", 9 << 20) + b"{}".ljust(9 << 20))
    with pytest.raises(ValueError, match="a header of 9437184 bytes"):
        read_network(tmp_path / "n.safetensors")


def test_overlapping_tensors_of_safetensors_are_refused(tmp_path):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (tmp_path / "n.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ValueError, match="found: Error while deserializing header: invalid offset"):
        read_network(tmp_path / "n.safetensors")


def test_deep_metadata_of_safetensors_is_refused(tmp_path):
    facts = {"backbone": DEEP, "image_size": "32", "step": "1"}
    save_file({"a": torch.zeros(1)}, tmp_path / "n.safetensors", facts)
    with pytest.raises(ValueError, match="found: JSON of more than 64 levels"):
        read_network(tmp_path / "n.safetensors")


@pytest.mark.parametrize("state", [None, [], {"a": 1}, torch.zeros(3)])
def test_a_state_of_something_else_is_refused(state, network, tmp_path):
    config = network.config.model_dump(mode="json")
    torch.save({"backbone": config, "image_size": 32, "step": 1, "state": state}, tmp_path / "n.pt")
    with pytest.raises(ValueError, match="expected a network"):
        read_network(tmp_path / "n.pt")


# Checkpoints.


@pytest.mark.parametrize(
    "text",
    [DEEP, '{"a": ' * 100_000 + "1" + "}" * 100_000, "[" * 65 + "]" * 65],
)
def test_deep_json_is_refused_by_the_manifest(text, tmp_path):
    checkpoint = write_checkpoint(tmp_path, 10)
    (checkpoint / "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError, match="more than 64 levels"):
        directory.read_manifest(checkpoint)
    assert bounded_json.parse("[" * 63 + "1" + "]" * 63)


@pytest.mark.parametrize("value", [1e300, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(value, tmp_path):
    checkpoint = write_checkpoint(tmp_path, 10)
    reseal(checkpoint, lambda manifest: manifest.update(time_s=value))
    with pytest.raises(CheckpointError, match="written at"):
        directory.read_manifest(checkpoint)


def named(checkpoint, name, size):
    def change(manifest):
        [entry] = manifest["files"].values()
        manifest["files"] = {name: {**entry, "size": size}}

    reseal(checkpoint, change)


@pytest.mark.parametrize("name", ["../../etc/hostname", "/etc/hostname", "..", "a/b", "a\nb", "\x1b[2J"])
def test_a_manifest_names_only_files_of_its_folder(name, tmp_path):
    checkpoint = write_checkpoint(tmp_path, 10)
    named(checkpoint, name, 7)
    assert "invalid file name" in directory.damage(checkpoint)


@pytest.mark.parametrize("kind", ["pipe", "zero", "link"])
def test_special_files_and_links_in_a_checkpoint_are_damage(kind, tmp_path):
    checkpoint = write_checkpoint(tmp_path, 10)
    data = checkpoint / "data"
    content = data.read_bytes()
    data.unlink()
    if kind == "pipe":
        os.mkfifo(data)
    elif kind == "zero":
        data.symlink_to("/dev/zero")
    else:
        (tmp_path / "elsewhere").write_bytes(content)
        data.symlink_to(tmp_path / "elsewhere")
    if kind != "link":
        named(checkpoint, "data", 0)
    assert "data: expected a readable file" in directory.damage(checkpoint)


def checkpoint_of(network, run_dir, alone, **changes):
    config = {
        "backbone": {**network.config.model_dump(mode="json"), **changes},
        "data": {"path": "faces", "image_size": 32},
        "run_dir": "run",
        "global_batch": 8,
        "steps": 9,
    }
    header = directory.Header(7, config, {}, {})
    return sharded.save(run_dir, sharded.backbone_state(network.model), header, keep=1, group=alone.group)


@pytest.mark.parametrize("key", ["embedding_size", "width", "blocks", "mhms"])
def test_an_absurd_configuration_of_a_checkpoint_is_refused(key, network, alone, tmp_path):
    checkpoint_of(network, tmp_path, alone, **{key: ABSURD[key]})
    with pytest.raises(CheckpointError, match=r"found(: a config|: Storage size| another model's: backbone)"):
        network_of(tmp_path, alone)


@pytest.mark.parametrize("table", [[1], "text", {"head": {"margin": 5}}, {"head": {"margin": ["magface"]}}])
def test_a_configuration_of_another_form_is_refused(table, network, alone, tmp_path):
    checkpoint = checkpoint_of(network, tmp_path, alone)
    change = table if isinstance(table, dict) else {"backbone": table}
    reseal(checkpoint, lambda manifest: manifest["config"].update(change))
    with pytest.raises(CheckpointError, match="expected the configuration of a run"):
        network_of(tmp_path, alone)


def test_chunks_with_the_same_bytes_are_refused(network, alone, tmp_path):
    checkpoint = checkpoint_of(network, tmp_path, alone)

    def overlap(manifest):
        for tensor in manifest["tensors"].values():
            for chunk in tensor["chunks"]:
                chunk["offset"] = 0

    reseal(checkpoint, overlap)
    with pytest.raises(CheckpointError, match="overlaps another chunk"):
        network_of(checkpoint, alone)


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
def test_a_network_larger_than_the_memory_is_reported(kind, network, alone, tmp_path, monkeypatch):
    checkpoint_of(network, tmp_path, alone)

    def build(config, image_size, original=network_module.backbones.build):
        if torch.get_default_device().type != "meta":
            raise kind("no memory")
        return original(config, image_size)

    monkeypatch.setattr(network_module.backbones, "build", build)
    with pytest.raises(CheckpointError, match="expected enough memory for its network, found: no memory"):
        network_of(tmp_path, alone)


def test_chunks_of_format_1_with_the_same_bytes_are_refused(tmp_path):
    [archive] = (ROOT / "tests/trainer/checkpoint/format_1").glob("*3.11.2*.zip")
    shutil.unpack_archive(archive, tmp_path / "checkpoints")
    [checkpoint] = directory.all_of(tmp_path)
    described = convert._described

    def overlap(metadata):
        shapes, chunks = described(metadata)
        return shapes, {name: [*of_file, of_file[-1]] for name, of_file in chunks.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "_described", overlap)
        with pytest.raises(CheckpointError, match=r"overlapping chunks of the file '.*distcp'"):
            convert.convert(checkpoint)


def test_a_checkpoint_of_a_run_is_still_read(network, alone, tmp_path):
    checkpoint_of(network, tmp_path, alone)
    found = network_of(tmp_path, alone).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in network.model.state_dict().items())


@pytest.mark.parametrize(
    "program",
    [b"\x80\x04Nr" + struct.pack("<I", 1 << 31) + b".", b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"."],
)
def test_format_1_metadata_reserve_no_memory(program):
    with pytest.raises((KeyError, AttributeError, TypeError)):
        convert._Unpickler(io.BytesIO(program)).load()["state_dict_metadata"]


def test_write_and_read(network, tmp_path):
    write_pt(network, tmp_path / "n.pt")
    assert read_network(tmp_path / "n.pt").config == network.config


# Heartbeats.


@pytest.mark.parametrize(
    "value",
    [
        b"5", b"null", b"{", b"\xff", b"[]", b'[1, 2, 3, "a"]', b"[1, 2, 3, 4, 5, 6]",
        b"[1, 2, 3, 4, true]", b'["a", 2, 3, "a", true]', b'{"a": 1}',
        b"[" + b"1" * 5000 + b', 1, 1, "a", false]', DEEP.encode(),
    ],
    ids=lambda value: value[:8],
)  # fmt: skip
def test_a_heartbeat_of_another_form_is_ignored(value):
    store = dist.HashStore()
    pulse = Pulse(store, 0, 2, keeper="nobody", end=print)
    store.set("lgaf/life/1", value)
    assert pulse._read(1) == _Life()
    store.set("lgaf/life/1", '[7, 1, 2, "computing", false]')
    assert pulse._read(1) == _Life(7, 1, 2, "computing", False)
