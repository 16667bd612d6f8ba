"""The Triton backend against the dense twin, and the choice between backends.

Triton decides at its import whether to interpret, so the steps run in a process of their own: this file as
a script, on the GPU if there is one, else in Triton's interpreter. There "tf32" is float32 to the last bit,
and some of bf16 is cut off where a GPU rounds to the nearest.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from partial_fc import head
from partial_fc.config import HeadConfig
from partial_fc.head import PartialFC
from partial_fc.streaming import Streaming
from partial_fc.targets import Embeddings

TIMEOUT_S = 240
ON_GPU = torch.cuda.is_available()
# The error of a cosine; times the scale, that of a logit and so, relatively, of a probability.
STEP = {"bf16": 2**-8, "tf32": 2**-11 if ON_GPU else 2**-21}
SHAPE = {"classes": 90, "rows": 21, "width": 20, "micro_batches": 1, "ignored": 0}
COSFACE = {"kind": "cosface", "m": 0.3}

CASES = {
    "less than a block": {"classes": 5, "rows": 3, "width": 4},
    "one class": {"classes": 1, "rows": 3, "width": 2},
    "whole blocks": {"classes": 256, "rows": 128, "width": 64},
    "parts of blocks": {"classes": 300, "rows": 131, "width": 37},
    "several tiles": {"classes": 500, "width": 33, "head": {"tile": 96}},
    "tiles larger than a block": {"classes": 700, "head": {"tile": 201}},
    "sampled": {"classes": 400, "head": {"sample_rate": 0.3, "tile": 50}},
    "positives only": {"classes": 300, "head": {"sample_rate": 1e-6}},
    "ignored rows": {"ignored": 7},
    "all rows ignored": {"ignored": 21},
    "accumulated": {"micro_batches": 2, "ignored": 1, "head": {"sample_rate": 0.5, "tile": 32}},
    "filter": {"head": {"interclass_filter": 0.2, "tile": 32}},
    "everything filtered": {"head": {"interclass_filter": -1.0}},
    "combined": {"head": {"margin": {"kind": "combined"}}},
    "adaface": {"head": {"margin": {"kind": "adaface"}}},
    "magface": {"head": {"margin": {"kind": "magface", "norm_low": 5.0}}},
    "straight through": {"head": {"margin": {"kind": "arcface-straight-through"}}},
}
CASES |= {
    f"bf16, {name}": {**CASES[name], "head": {"matrix_inputs": "bf16", "scale": 16.0, **CASES[name]["head"]}}
    for name in ("several tiles", "sampled", "accumulated", "magface")
}
BACKENDS = {"found": {"backend": "kernels"}, "expected": {"backend": "dense", "matrix_inputs": "fp32"}}


def config_of(case, backend):
    defaults = {"margin": COSFACE, "matrix_inputs": "tf32", "deterministic": True}
    return HeadConfig(**{**defaults, **case.get("head", {}), **BACKENDS[backend]})


def make_head(case, backend):
    shape = {**SHAPE, **case}
    return PartialFC(
        config_of(case, backend),
        num_classes=shape["classes"],
        embedding_size=shape["width"],
        seed=5,
        group=None,
        device="cuda" if ON_GPU else "cpu",
    )


def micro_batches(case, step):
    """Embeddings and labels of a step; labels repeat and the last rows are ignored."""
    shape, dice = {**SHAPE, **case}, torch.Generator().manual_seed(step)
    for _ in range(shape["micro_batches"]):
        emb_GD = torch.randn(shape["rows"], shape["width"], generator=dice) * 3
        label_G = torch.randint(0, shape["classes"], (shape["rows"],), generator=dice)
        label_G[1] = label_G[0]
        label_G[len(label_G) - shape["ignored"] :] = -1
        yield emb_GD, label_G


def train(head, case, steps=2):
    """Losses, embedding gradients and state after `steps`."""
    device, seen = head.weight_RD.device, {}
    for step in range(steps):
        parts = [[part.to(device) for part in parts] for parts in micro_batches(case, step)]
        head.begin_step(step, torch.cat([label_G for _, label_G in parts]))
        for i, (emb_GD, label_G) in enumerate(parts):
            loss, grad_GD = head.forward_backward(emb_GD, label_G, share=1 / len(parts))
            seen |= {f"loss {step} {i}": loss, f"gradient {step} {i}": grad_GD}
        head.step(0.1)
    return seen | head.logical_state()


def opposite_rows():
    """Every other class at a cosine of about -1 or 1, at the largest scale: exponentials of -64 and 64."""
    for backend in BACKENDS:
        case = {"classes": 3, "width": 2, "head": {"scale": 64.0}}
        softmax = make_head(case, backend)
        softmax.weight_RD.copy_(torch.tensor([[1.0, 0.0], [1.0, 1e-2], [1.0, 3e-2]]))
        emb_GD = (torch.tensor([[-2.0, 0.0], [3.0, 0.0]])).to(softmax.weight_RD.device)
        loss, grad_GD = softmax.forward_backward(emb_GD, torch.tensor([0, 0], device=emb_GD.device))
        softmax.step(1e-3)
        yield {"loss": loss, "gradient": grad_GD, **softmax.logical_state()}


def zero_rows():
    """An embedding and a class of zeros."""
    for backend in BACKENDS:
        softmax = make_head({}, backend)
        softmax.weight_RD[4] = 0
        (emb_GD, label_G), *_ = micro_batches({}, 0)
        emb_GD[2] = 0
        loss, grad_GD = softmax.forward_backward(
            emb_GD.to(softmax.weight_RD.device), label_G.to(softmax.weight_RD.device)
        )
        softmax.step(0.1)
        yield {"loss": loss, "gradient": grad_GD, **softmax.logical_state()}


def one_shard_of_many(rows):
    """The three phases on a shard of `rows` classes, by kernels and by streaming; lse is of all shards."""
    from partial_fc.kernels import Kernels
    from partial_fc.sampling import Sample

    chosen = HeadConfig().margin.build("cpu")
    device = "cuda" if ON_GPU else "cpu"
    dice = torch.Generator().manual_seed(2)
    weight_RD = torch.randn(rows, 12, generator=dice).to(device)
    emb_GD = torch.randn(9, 12, generator=dice).to(device)
    label_G = torch.randint(-1, max(rows, 1), (9,), generator=dice).clamp(max=rows - 1).to(device)
    common = (chosen, 30.0, None, 16)
    for softmax in (Kernels(*common, "tf32", True), Streaming(*common, "fp32", torch.float32)):
        local = softmax.local_softmax(weight_RD, Sample(rows), Embeddings(emb_GD, label_G))
        lse_G = torch.logaddexp(local.others_lse_G, torch.full_like(local.target_G, 29.0))
        grad_GD = softmax.embedding_gradient(local, lse_G, torch.full_like(lse_G, 1 / 9))
        grads = [grad_TD for _, grad_TD in softmax.weight_gradients(weight_RD)]
        yield {
            "lse": local.others_lse_G,
            "target": local.target_G,
            "gradient": grad_GD,
            "weight": torch.cat([weight_RD[:0], *grads]),
        }


def not_a_number():
    softmax = make_head({}, "found")
    (emb_GD, label_G), *_ = micro_batches({}, 0)
    emb_GD[5, 3] = torch.nan
    return softmax.forward_backward(emb_GD.to(softmax.weight_RD.device), label_G.to(softmax.weight_RD.device))


def main(path):
    torch.set_num_threads(1)
    seen = {
        name: tuple(train(make_head(case, backend), case) for backend in BACKENDS)
        for name, case in CASES.items()
    }
    seen["opposite"], seen["zeros"] = tuple(opposite_rows()), tuple(zero_rows())
    seen |= {f"shard of {rows}": tuple(one_shard_of_many(rows)) for rows in (0, 50)}
    case = CASES["bf16, accumulated"]
    seen["twice"] = tuple(train(make_head(case, "found"), case) for _ in range(2))
    seen["nan"] = not_a_number()
    torch.save(seen, path)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "seen.pt"
    interpret = {"TRITON_INTERPRET": "0" if ON_GPU else "1"}
    command = [sys.executable, "-W", "ignore", __file__, str(path)]
    subprocess.run(command, env={**os.environ, **interpret}, check=True, timeout=TIMEOUT_S)
    return torch.load(path, map_location="cpu")


def assert_close(found, expected, tolerance, least=0.0):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if found.numel():
        error, largest = (found - expected).abs().max(), max(float(expected.abs().max()), least)
        assert error <= tolerance * largest, f"error {error:.1e} in numbers up to {largest:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_dense_twin(seen, name):
    found, expected = seen[name]
    config = config_of(CASES[name], "found")
    tolerance = config.scale * STEP[config.matrix_inputs]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key.startswith("loss"):
            assert abs(float(found[key] - value)) <= tolerance + 1e-6 * abs(float(value))
        else:
            assert_close(found[key], value, tolerance, least=1e-6)


def test_the_cases_hold_gradients_of_some_size(seen):
    for name in set(CASES) - {"all rows ignored", "everything filtered", "one class"}:
        _, expected = seen[name]
        assert expected["gradient 1 0"].abs().max() > 0.01
        assert expected["momentum"].abs().max() > 0.01


def test_the_ends_of_the_exponentials_range(seen):
    found, expected = seen["opposite"]
    # Rows almost parallel to their embeddings: the projections lose digits in both backends.
    for key, value in expected.items():
        assert_close(found[key], value, 1e-3)
    assert 0 < expected["loss"] < 100
    assert expected["gradient"].abs().max() > 0.01


def test_zeros_have_no_gradient(seen):
    found, expected = seen["zeros"]
    assert (found["gradient"][2] == 0).all()
    assert (found["weight"][4] == 0).all()
    for key, value in expected.items():
        assert_close(found[key], value, 64 * STEP["tf32"])


@pytest.mark.parametrize("rows", [0, 50])
def test_one_shard_equals_streaming(seen, rows):
    found, expected = seen[f"shard of {rows}"]
    assert found["weight"].shape == (rows, 12)
    assert torch.equal(found["lse"].isinf(), expected["lse"].isinf())
    assert bool(found["lse"].isinf().all()) == (rows == 0)
    for key in ("target", "gradient", "weight"):
        assert_close(found[key], expected[key], 30 * STEP["tf32"])
    finite_G = expected["lse"].isfinite()
    assert_close(found["lse"][finite_G], expected["lse"][finite_G], 30 * STEP["tf32"])


def test_with_fixed_blocks_a_run_repeats_bit_for_bit(seen):
    one, other = seen["twice"]
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_what_is_not_a_number_shows_in_loss_and_gradient(seen):
    loss, grad_GD = seen["nan"]
    assert loss.isnan()
    assert grad_GD.isnan().all()


@pytest.mark.parametrize("matrix_type", ["bf16", "fp32"])
def test_the_kernels_compile_for_a_hopper_and_fit_its_shared_memory(matrix_type, tmp_path, monkeypatch):
    """Compile the kernels, which the interpreter does not; it needs no GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from partial_fc import kernels

    def compiled(kernel, types, constants, **options):
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        target = GPUTarget("cuda", 90, 32)
        return triton.compile(ASTSource(kernel, signature, constants), target=target, options=options)

    floats = dict.fromkeys(
        ["weight_ptr", "grad_ptr", "inverse_norm_ptr", "log2_offset_ptr", "at_target_ptr", "sum_ptr"], "*fp32"
    )
    factors = dict.fromkeys(["unit_ptr", "class_unit_ptr", "exp_ptr"], f"*{matrix_type}")
    numbers = dict.fromkeys(["scale", "log2_scale", "filter_above"], "fp32")
    counts = dict.fromkeys(["G", "T", "start", "exp_stride"], "i32")
    types = {**floats, **factors, **numbers, **counts, "rows_ptr": "*i64", "label_ptr": "*i64"}
    rows = {"D": 500, "SAMPLED": True, "BLOCK_T": 8, "BLOCK_D": 512}
    fixed = dict(kernels._FIXED)
    options = {name: fixed.pop(name) for name in ("num_warps", "num_stages")}
    dot_type = triton.language.bfloat16 if matrix_type == "bf16" else triton.language.float32
    fused = compiled(
        kernels._exponentials,
        types,
        {**fixed, "D": 500, "WITH_SUMS": True, "DOT_TYPE": dot_type},
        **options,
    )
    assert "wgmma.mma_async" in fused.asm["ptx"]
    assert fused.metadata.shared <= 227 << 10
    for kernel in (kernels._unit_rows, kernels._through_unit):
        assert "st.global" in compiled(kernel, types, rows).asm["ptx"]


def choice(device="cpu", dtype=torch.float32, **config):
    config = HeadConfig(**config)
    weight_RD = SimpleNamespace(is_cuda=device.startswith("cuda"), device=device, dtype=dtype)
    return head._softmax(config, config.margin.build("cpu"), weight_RD)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_auto_takes_kernels_on_a_gpu_and_streaming_elsewhere(hopper, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert type(choice("cuda:0")).__name__ == "Kernels"
    assert type(choice("cpu")) is Streaming
    assert type(choice("cpu", matrix_inputs="bf16")) is Streaming
    assert type(choice("cuda:0", backend="streaming")) is Streaming


OBSTACLES = {
    "rows of torch.float32, found torch.float64": {"dtype": torch.float64},
    "matrix_inputs = bf16 or tf32, found fp32": {"matrix_inputs": "fp32"},
    "found curricularface": {"margin": {"kind": "curricularface"}},
    "scale <= 64, where .* found 65": {"scale": 65.0},
}


@pytest.mark.parametrize("message", OBSTACLES)
def test_what_kernels_cannot_do_falls_back_unless_forced(message, hopper):
    pytest.importorskip("triton")
    assert type(choice("cuda:0", **OBSTACLES[message])) is Streaming
    with pytest.raises(ValueError, match=f"backend = kernels: expected .*{message}.* set backend = auto"):
        choice("cuda:0", backend="kernels", **OBSTACLES[message])


def test_an_old_gpu_gets_streaming(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert type(choice("cuda:0")) is Streaming
    with pytest.raises(ValueError, match=r"compute capability 8.0 or more, found 7.0"):
        choice("cuda:0", backend="kernels")


def test_kernels_without_a_gpu_are_an_error(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"expected a GPU .* found device cpu"):
        choice("cpu", backend="kernels")


def test_without_triton_all_but_kernels_works(hopper, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert type(choice("cuda:0")) is Streaming
    with pytest.raises(ValueError, match="expected the package triton, found none"):
        choice("cuda:0", backend="kernels")


def test_the_dense_twin_rounds_nothing():
    with pytest.raises(ValueError, match="expected matrix_inputs = auto or fp32, found bf16"):
        choice(backend="dense", matrix_inputs="bf16")


def test_the_head_can_be_imported_without_triton():
    without = "import sys; sys.modules['triton'] = None; import partial_fc.head"
    subprocess.run([sys.executable, "-c", without], check=True, timeout=TIMEOUT_S)


if __name__ == "__main__":
    main(sys.argv[1])
