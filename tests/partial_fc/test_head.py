"""The head in one process: streaming against the dense twin, accumulation, ignored rows, memory, errors."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.profiler import ProfilerActivity, profile

from partial_fc import sampling
from partial_fc.config import HeadConfig
from partial_fc.head import PartialFC

# Largest error relative to the largest value. Logits of 64 turn float32's rounding of 6e-8 into 4e-6 of a
# probability, and ArcFace's slope at cosines up to POLE turns it into 1e-4 of a gradient.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
POLE = 0.999
ARCFACE, COSFACE = {"kind": "arcface", "m": 0.5}, {"kind": "cosface", "m": 0.4}
MARGINS = [
    ARCFACE,
    COSFACE,
    {"kind": "arcface-straight-through", "m": 0.5},
    {"kind": "combined", "m1": 1.3, "m2": 0.3, "m3": 0.2},
    {"kind": "adaface", "m": 0.4, "h": 5.0},
    {"kind": "magface", "norm_low": 3.0, "norm_high": 9.0},
    {"kind": "curricularface", "m": 0.5, "momentum": 0.5},
]
# The others leave out a part of the derivative on purpose.
DIFFERENTIABLE = [kind for kind in MARGINS if kind["kind"] not in ("arcface-straight-through", "adaface")]
OPTIMIZERS = [
    {},
    {"moments": "bf16"},
    {"kind": "adamw", "weight_decay": 0.05},
    {"kind": "adamw", "beta2": 0.99, "moments": "bf16"},
]
PLAIN_SGD = {"momentum": 0.0, "weight_decay": 0.0}


def make_head(classes, width, dtype=torch.float64, **config):
    return PartialFC(
        HeadConfig(**config),
        num_classes=classes,
        embedding_size=width,
        seed=5,
        group=None,
        device="cpu",
        dtype=dtype,
    )


def batch(rows, classes, width, seed=0, dtype=torch.float64):
    dice = torch.Generator().manual_seed(seed)
    emb_GD = torch.randn(rows, width, generator=dice, dtype=torch.float64) * 2
    return emb_GD.to(dtype), torch.randint(0, classes, (rows,), generator=dice)


def assert_close(found, expected, tolerance, least=0.0):
    error, largest = (found - expected).abs().max(), max(float(expected.abs().max()), least)
    assert error <= tolerance * largest, f"error {error:.1e} in numbers up to {largest:.1e}"


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 20),
    classes=st.integers(1, 60),
    width=st.integers(2, 24),
    tile=st.none() | st.integers(1, 64),
    kind=st.sampled_from(MARGINS),
    rate=st.sampled_from([1.0, 0.3, 0.01]),
    interclass_filter=st.none() | st.floats(-0.2, 0.9),
    optimizer=st.sampled_from(OPTIMIZERS),
    scale=st.sampled_from([1.0, 30.0, 64.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    ignored=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_streaming_equals_the_dense_twin(
    rows, classes, width, tile, kind, rate, interclass_filter, optimizer, scale, dtype, ignored, seed
):
    """Float32 without decisions that rounding can change: hard negatives, filter, AdamW's sign near 0."""
    if dtype == torch.float32:
        assume(kind["kind"] != "curricularface" and interclass_filter is None)
        assume(optimizer.get("kind") != "adamw" and optimizer.get("moments") != "bf16")
    emb_GD, label_G = batch(rows, classes, width, seed, dtype)
    label_G[:ignored] = -1
    found, expected = (
        make_head(
            classes,
            width,
            dtype,
            margin=kind,
            scale=scale,
            backend=backend,
            tile=tile,
            sample_rate=rate,
            interclass_filter=interclass_filter,
            optimizer=optimizer,
        )
        for backend in ("streaming", "dense")
    )
    for step in range(2):
        target_cos_G = torch.cosine_similarity(emb_GD, found.weight_RD[label_G.clamp(min=0)])
        assume(dtype == torch.float64 or target_cos_G.abs().max() < POLE)
        for head in (found, expected):
            head.begin_step(step, label_G)
        (loss, grad_GD), (expected_loss, expected_grad_GD) = (
            head.forward_backward(emb_GD, label_G) for head in (found, expected)
        )
        assert loss.dtype == grad_GD.dtype == dtype
        assert_close(loss, expected_loss, TOLERANCE[dtype], least=scale)
        assert_close(grad_GD, expected_grad_GD, TOLERANCE[dtype], least=1e-2 * scale / rows)
        found.step(1e-3)
        expected.step(1e-3)
    for name, tensor in expected.logical_state().items():
        # A moment that rounds to either of two neighbours in bfloat16 takes its row along.
        tolerance = 1e-2 if "moments" in optimizer else TOLERANCE[dtype]
        assert_close(found.logical_state()[name].double(), tensor.double(), tolerance, least=scale * 1e-2)


@pytest.mark.parametrize("kind", MARGINS[:-1])  # which negatives are hard may fall either way
@pytest.mark.parametrize("settings", [{}, {"sample_rate": 0.3}, {"scale": 64.0}])
def test_streaming_in_bfloat16_equals_the_dense_twin_up_to_its_rounding(kind, settings):
    """2^-8 of a cosine: factors are rounded to 2^-9 of themselves and, on a CPU, products once more."""
    classes, width, rows = 300, 48, 24
    config = {"margin": kind, "scale": 16.0, "tile": 64, **settings}
    found = make_head(classes, width, torch.float32, matrix_inputs="bf16", **config)
    expected = make_head(classes, width, torch.float32, backend="dense", **config)
    tolerance = config["scale"] * 2**-8
    for step in range(2):
        emb_GD, label_G = batch(rows, classes, width, seed=step, dtype=torch.float32)
        for head in (found, expected):
            head.begin_step(step, label_G)
        (loss, grad_GD), (expected_loss, expected_grad_GD) = (
            head.forward_backward(emb_GD, label_G) for head in (found, expected)
        )
        assert abs(float(loss - expected_loss)) <= tolerance
        assert_close(grad_GD, expected_grad_GD, tolerance)
        found.step(1e-3)
        expected.step(1e-3)
    for name, rows_RD in expected.logical_state().items():
        assert_close(found.logical_state()[name], rows_RD, tolerance)


@pytest.mark.parametrize("at", [1.0, -1.0])
def test_logits_whose_exponentials_float32_cannot_hold(at):
    """exp(150) is beyond its range, exp(-150) below it: a maximum is taken off."""
    dice = torch.Generator().manual_seed(3)
    found, expected = (
        make_head(12, 6, dtype, scale=150.0, tile=5, margin=COSFACE, backend=backend)
        for dtype, backend in ((torch.float32, "streaming"), (torch.float64, "dense"))
    )
    near_R6 = torch.randn(6, generator=dice) + 0.1 * torch.randn(12, 6, generator=dice)
    for head in (found, expected):
        head.weight_RD.copy_(near_R6)
    emb_GD, label_G = at * near_R6[:4], torch.arange(4)
    (loss, grad_GD), (expected_loss, expected_grad_GD) = (
        head.forward_backward(emb_GD.to(head.weight_RD.dtype), label_G) for head in (found, expected)
    )
    assert abs(float(loss) - float(expected_loss)) < 1e-3
    assert_close(grad_GD.double(), expected_grad_GD, 1e-3)
    for head in (found, expected):
        head.step(1e-3)
    assert_close(found.weight_RD.double(), expected.weight_RD, 1e-4)


@pytest.mark.parametrize("backend", ["streaming", "dense"])
@pytest.mark.parametrize("kind", DIFFERENTIABLE)
def test_gradients_are_those_of_the_loss_that_is_returned(backend, kind):
    """By finite differences, so that nothing is shared with either backend."""
    head = make_head(9, 6, margin=kind, scale=10.0, backend=backend, tile=4, optimizer=PLAIN_SGD)
    emb_GD, label_G = batch(5, 9, 6)
    label_G[3] = -1
    h, before_RD = 1e-6, head.weight_RD.clone()

    def loss_at(emb_GD, weight_RD):
        head.weight_RD.copy_(weight_RD)
        return head.forward_backward(emb_GD, label_G)[0].item()

    def slope(of, tensor):
        numbers, slopes = tensor.clone(), torch.empty_like(tensor)
        for i in range(tensor.numel()):
            at = numbers.view(-1)
            middle = at[i].item()
            at[i] = middle + h
            above = of(numbers)
            at[i] = middle - h
            slopes.view(-1)[i] = (above - of(numbers)) / (2 * h)
            at[i] = middle
        return slopes

    by_emb_GD = slope(lambda emb_GD: loss_at(emb_GD, before_RD), emb_GD)
    by_weight_RD = slope(lambda weight_RD: loss_at(emb_GD, weight_RD), before_RD)
    head = make_head(9, 6, margin=kind, scale=10.0, backend=backend, tile=4, optimizer=PLAIN_SGD)
    _, grad_GD = head.forward_backward(emb_GD, label_G)
    head.step(1.0)
    assert_close(grad_GD, by_emb_GD, 1e-6)
    assert_close(before_RD - head.weight_RD, by_weight_RD, 1e-6)


@pytest.mark.parametrize("backend", ["streaming", "dense"])
def test_micro_batches_give_what_their_concatenation_gives(backend):
    parts, whole = (make_head(30, 8, backend=backend, tile=7) for _ in range(2))
    for step in range(3):
        emb_GD, label_G = batch(35, 30, 8, seed=step)
        loss, grad_GD = whole.forward_backward(emb_GD, label_G)
        micro = [parts.forward_backward(emb_GD[i::7], label_G[i::7], share=1 / 7) for i in range(7)]
        assert_close(torch.stack([part[0] for part in micro]).mean(), loss, 1e-12)
        for i in range(7):
            assert_close(micro[i][1], grad_GD[i::7], 1e-12)
        whole.step(0.1)
        parts.step(0.1)
    for name, tensor in whole.logical_state().items():
        assert_close(parts.logical_state()[name], tensor, 1e-12)


def test_micro_batches_average_over_their_own_counted_rows():
    """The documented weights when numbers of ignored rows differ: 1/2 per micro-batch, not 1/4 per row."""
    emb_GD, label_G = batch(6, 10, 8)
    label_G[3:5] = -1
    head, one, other = (make_head(10, 8, optimizer=PLAIN_SGD) for _ in range(3))
    for part in (slice(0, 3), slice(3, 6)):
        head.forward_backward(emb_GD[part], label_G[part], share=0.5)
    one.forward_backward(emb_GD[:3], label_G[:3])
    other.forward_backward(emb_GD[5:], label_G[5:])
    before_RD = head.weight_RD.clone()
    for each in (head, one, other):
        each.step(1.0)
    assert_close(head.weight_RD, before_RD + ((one.weight_RD + other.weight_RD) / 2 - before_RD), 1e-12)


@pytest.mark.parametrize("backend", ["streaming", "dense"])
@pytest.mark.parametrize("held", [1.0, float("nan"), float("inf")])
def test_ignored_rows_add_neither_loss_nor_gradient_whatever_they_hold(backend, held):
    emb_GD, label_G = batch(8, 20, 6)
    without, with_ignored = (make_head(20, 6, backend=backend, tile=6) for _ in range(2))
    loss, grad_GD = without.forward_backward(emb_GD[:5], label_G[:5])
    emb_GD[5:], label_G[5:] = held, -1
    loss_too, grad_too_GD = with_ignored.forward_backward(emb_GD, label_G)
    assert_close(loss_too, loss, 1e-12)
    assert_close(grad_too_GD[:5], grad_GD, 1e-12)
    assert (grad_too_GD[5:] == 0).all()
    without.step(0.1)
    with_ignored.step(0.1)
    assert_close(with_ignored.weight_RD, without.weight_RD, 1e-12)


@pytest.mark.parametrize("backend", ["streaming", "dense"])
def test_a_batch_without_a_counted_row_moves_rows_by_decay_alone(backend):
    head = make_head(20, 6, backend=backend, optimizer={"weight_decay": 0.01})
    before_RD = head.weight_RD.clone()
    loss, grad_GD = head.forward_backward(torch.randn(3, 6), torch.full((3,), -1))
    head.step(0.5)
    assert loss == 0
    assert (grad_GD == 0).all()
    assert_close(head.weight_RD, before_RD * (1 - 0.5 * 0.01), 1e-12)


@pytest.mark.parametrize("backend", ["streaming", "dense"])
def test_an_embedding_of_zeros_has_no_gradient(backend):
    head = make_head(20, 6, backend=backend)
    loss, grad_GD = head.forward_backward(torch.zeros(2, 6), torch.tensor([3, 4]))
    assert loss.isfinite()
    assert (grad_GD == 0).all()


@pytest.mark.parametrize("label", [-2, 20, 2**40])
def test_a_label_outside_the_classes_is_an_error_that_names_the_row(label):
    emb_GD, label_G = batch(8, 20, 6)
    label_G[4] = label
    with pytest.raises(ValueError, match=rf"row 4 .* label {label}: expected 0 to 19, or -1"):
        make_head(20, 6).forward_backward(emb_GD, label_G)


@pytest.mark.parametrize(
    ("emb_GD", "label_G"),
    [
        (torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 6), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(3, 6), torch.zeros(3, 1, dtype=torch.int64)),
        (torch.zeros(3, 6), torch.zeros(3, dtype=torch.int32)),
    ],
)
def test_other_shapes_and_types_are_refused(emb_GD, label_G):
    with pytest.raises(ValueError, match=r"expected embeddings \[G, 6\] and int64 labels \[G\], found"):
        make_head(20, 6).forward_backward(emb_GD, label_G)


def test_a_head_without_classes_and_a_wrong_key_are_refused():
    with pytest.raises(ValueError, match="0 classes"):
        make_head(0, 6)
    with pytest.raises(ValidationError, match="scal"):
        HeadConfig(scal=3)


def test_rows_at_the_start_depend_on_seed_and_class_alone():
    few, many = (make_head(classes, 16, torch.float32).weight_RD for classes in (1500, 5000))
    assert torch.equal(few, many[:1500])
    assert abs(float(many.std()) - 0.01) < 1e-4
    assert abs(float(many.mean())) < 1e-4
    assert len(many.unique(dim=0)) == 5000


def test_streaming_is_bitwise_repeatable():
    def train():
        head = make_head(700, 32, torch.float32, tile=96)
        seen = []
        for step in range(3):
            seen += head.forward_backward(*batch(16, 700, 32, step, torch.float32))
            head.step(0.1)
        return [*seen, *head.logical_state().values()]

    assert all(torch.equal(one, other) for one, other in zip(train(), train(), strict=True))


def test_training_reaches_a_small_loss_even_from_the_far_side():
    """Samples that begin opposite to their class, beyond theta + m = pi, are pulled over."""
    head = make_head(4, 8, margin=ARCFACE, scale=16.0, optimizer={"weight_decay": 0.0})
    emb_GD, label_G = -head.weight_RD.clone(), torch.arange(4)
    first = head.forward_backward(emb_GD, label_G)[0]
    head.step(1e-4)
    for _ in range(200):
        loss, _ = head.forward_backward(emb_GD, label_G)
        head.step(1e-4)
    assert first > 16
    assert loss < 0.1


def peak_bytes(work):
    """Return the peak of PyTorch's CPU allocations during `work`, above those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_streaming_allocates_neither_logits_nor_weight_gradient(accumulation, rate):
    rows, classes, width, tile = 64, 200_000, 16, 500
    emb_GD, label_G = batch(rows, classes, width, dtype=torch.float32)

    def step(backend):
        head = make_head(classes, width, torch.float32, backend=backend, tile=tile, sample_rate=rate)

        def work():
            head.begin_step(0, label_G)
            for _ in range(accumulation):
                head.forward_backward(emb_GD, label_G, share=1 / accumulation)
            head.step(0.1)

        return work

    drawn = rate * classes
    expected_bytes = 4 * (rows * tile + 4 * tile * width + (8 + accumulation) * rows * width)
    if rate < 1:
        # Copies of a tile's rows and moments; one byte for each class, and the numbers of those drawn, twice
        # over where they are made.
        expected_bytes += 4 * 2 * tile * width + classes + 2 * 8 * drawn
    assert peak_bytes(step("dense")) > 4 * drawn * (rows + width)
    assert peak_bytes(step("streaming")) < 1.1 * expected_bytes < 4 * drawn * (rows + width) / 10


def test_sampling_reads_and_moves_the_sampled_rows_alone():
    """A row that is not sampled may hold anything."""
    for optimizer in OPTIMIZERS:
        head = make_head(1000, 8, sample_rate=0.1, tile=16, optimizer=optimizer)
        emb_GD, label_G = batch(30, 1000, 8)
        head.begin_step(7, label_G)
        is_in_R = sampling.is_drawn(0.1, 5, 7, range(1000), label_G.device)
        is_in_R[label_G] = True
        assert 100 < is_in_R.sum() < 200
        head.weight_RD[~is_in_R] = torch.nan
        before = {name: rows.clone() for name, rows in head.logical_state().items()}
        loss, grad_GD = head.forward_backward(emb_GD, label_G)
        head.step(0.1)
        assert loss.isfinite()
        assert grad_GD.isfinite().all()
        for name, rows in head.logical_state().items():
            assert rows[~is_in_R].equal(before[name][~is_in_R]) or name == "weight"
            assert (rows[is_in_R] != before[name][is_in_R]).any(1).all()
        assert head.weight_RD[~is_in_R].isnan().all()


def test_a_class_outside_the_sample_is_no_negative():
    """The loss is that of a head that has only the sampled classes."""
    head = make_head(200, 6, sample_rate=0.2, margin=COSFACE, scale=10.0)
    emb_GD, label_G = batch(5, 200, 6)
    is_in_R = sampling.is_drawn(0.2, 5, 3, range(200), label_G.device)
    is_in_R[label_G] = True
    small = make_head(int(is_in_R.sum()), 6, margin=COSFACE, scale=10.0)
    small.weight_RD.copy_(head.weight_RD[is_in_R])
    head.begin_step(3, label_G)
    loss, grad_GD = head.forward_backward(emb_GD, label_G)
    expected, expected_grad_GD = small.forward_backward(emb_GD, is_in_R.cumsum(0)[label_G] - 1)
    assert_close(loss, expected, 1e-12)
    assert_close(grad_GD, expected_grad_GD, 1e-12)


def test_a_label_of_which_begin_step_was_not_told_is_an_error_that_names_the_row():
    emb_GD, label_G = batch(8, 20, 6)
    head = make_head(20, 6, sample_rate=0.5)
    head.begin_step(0, label_G.clamp(max=10))
    label_G[5] = 15
    with pytest.raises(ValueError, match=r"row \d of the gathered batch has label \d+: expected one of"):
        head.forward_backward(emb_GD, label_G)


def test_a_filtered_negative_adds_nothing():
    """A second class that is the sample's own person: with the filter it is as if it were not there."""
    emb_GD, label_G = batch(3, 10, 6)
    kept, filtered = (make_head(10, 6, interclass_filter=threshold) for threshold in (None, 0.9))
    for head in (kept, filtered):
        head.weight_RD[(label_G[0] + 1) % 10] = emb_GD[0]
    before_D = filtered.weight_RD[(label_G[0] + 1) % 10].clone()
    loss, grad_GD = filtered.forward_backward(emb_GD[:1], label_G[:1])
    kept_loss, _ = kept.forward_backward(emb_GD[:1], label_G[:1])
    assert loss < kept_loss - 10
    assert abs(grad_GD @ before_D) < 1e-9
    filtered.step(0.1)
    decayed_D = before_D * (1 - 0.1 * 5e-4)
    assert_close(filtered.weight_RD[(label_G[0] + 1) % 10], decayed_D, 1e-12)


@pytest.mark.parametrize("backend", ["streaming", "dense"])
def test_a_skipped_step_leaves_nothing_behind(backend):
    kind = {"kind": "curricularface"}
    skipping, straight = (make_head(20, 6, backend=backend, margin=kind, sample_rate=0.5) for _ in range(2))
    emb_GD, label_G = batch(8, 20, 6)
    skipping.begin_step(0, label_G)
    loss, grad_GD = skipping.forward_backward(emb_GD * torch.inf, label_G)
    assert not loss.isfinite()
    assert grad_GD.isnan().all()
    skipping.skip_step()
    for head in (skipping, straight):
        head.begin_step(1, label_G)
        head.forward_backward(emb_GD, label_G)
        head.step(0.1)
    for name, tensor in straight.logical_state().items():
        assert torch.equal(skipping.logical_state()[name], tensor)


def test_statistics_stay_the_same_within_a_step_and_then_move():
    head = make_head(20, 6, margin={"kind": "adaface", "m": 0.4, "momentum": 1.0})
    emb_GD, label_G = batch(8, 20, 6)
    losses = [head.forward_backward(emb_GD, label_G, share=0.5)[0] for _ in range(2)]
    assert losses[0] == losses[1]
    head.step(0.0)
    norm_G = emb_GD.norm(dim=1).repeat(2)
    assert_close(head.logical_state()["margin_norm_mean"], norm_G.mean(), 1e-12)
    assert_close(head.logical_state()["margin_norm_std"], norm_G.std(), 1e-12)
    assert head.forward_backward(emb_GD, label_G)[0] != losses[0]


def test_second_moments_that_bfloat16_would_freeze_are_refused():
    with pytest.raises(ValidationError, match=r"expected beta2 <= 0\.992"):
        HeadConfig(optimizer={"kind": "adamw", "moments": "bf16"})
