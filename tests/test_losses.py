from math import ceil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import HEAD, check_confident_models, cross_entropy, random_heads
from torch.utils._python_dispatch import TorchDispatchMode

from wmss_trl.losses import (
    linear_entropy,
    linear_mixed_cross_entropy,
    mixed_cross_entropy,
    mixed_loss,
    next_token_targets,
    tiles,
    token_entropy,
)
from wmss_trl.losses.buffer import default_buffer_bytes


def full_logit_loss(strong, weak, targets, mixing_lambda, anchor_weight=0.0, loss_type="nll"):
    """The definition, on full float64 logits with autograd."""
    strong, weak = strong.double(), weak.double()
    mix = mixing_lambda * strong + (1 - mixing_lambda) * weak
    anchor, mixed = (cross_entropy(logits, targets, loss_type) for logits in (strong, mix))
    return anchor_weight * anchor + (1 - anchor_weight) * mixed


def random_case(num_tokens=13, vocab_size=37, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    strong, weak = (4 * torch.randn(num_tokens, vocab_size, generator=generator) for _ in range(2))
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    targets[::4] = -100
    return strong.to(dtype).requires_grad_(), weak.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("anchor_weight", [0.0, 0.3])
@pytest.mark.parametrize("mixing_lambda", [0.1, 0.5, 0.9, 1.0])
def test_loss_and_gradients_equal_the_definition_in_float64(mixing_lambda, anchor_weight, loss_type):
    strong, weak, targets = random_case()
    loss = mixed_cross_entropy(strong, weak, targets, mixing_lambda, anchor_weight=anchor_weight, loss_type=loss_type)
    grads = torch.autograd.grad(loss, (strong, weak))
    expected = full_logit_loss(strong, weak, targets, mixing_lambda, anchor_weight, loss_type)
    expected_grads = torch.autograd.grad(expected, (strong, weak))
    # The probability of an improbable target is only as exact as the log of it, which is large
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6 if loss_type == "nll" else 5e-6, atol=0)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad.double(), rtol=1e-5, atol=1e-7)


def test_gradcheck():
    strong, weak, targets = random_case(num_tokens=5, vocab_size=7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s, w: mixed_cross_entropy(s, w, targets, 0.4, anchor_weight=0.3), (strong, weak)
    )


def test_dft_weights_are_constants_of_the_gradient():
    """Finite differences of a loss whose weights are held at their values."""
    strong, weak, targets = random_case(num_tokens=5, vocab_size=7, dtype=torch.float64)
    loss = mixed_cross_entropy(strong, weak, targets, 0.4, anchor_weight=0.3, loss_type="dft")
    grads = torch.autograd.grad(loss, (strong, weak))

    def log_probs(strong, weak):
        rows = (targets != -100).nonzero().squeeze(-1)
        logits = torch.stack([strong, 0.4 * strong + 0.6 * weak])[:, rows]
        return logits.log_softmax(-1)[:, range(len(rows)), targets[rows]]

    with torch.no_grad():
        weights = torch.tensor([[0.3], [0.7]], dtype=torch.float64) * log_probs(strong, weak).exp()
        torch.testing.assert_close(loss, -(weights * log_probs(strong, weak)).sum() / (targets != -100).sum())
        for leaf, grad in zip((strong, weak), grads, strict=True):
            for i in range(leaf.numel()):
                values = []
                for step in (1e-5, -2e-5):
                    leaf.view(-1)[i] += step
                    values.append(-(weights * log_probs(strong, weak)).sum() / (targets != -100).sum())
                leaf.view(-1)[i] += 1e-5
                assert (values[0] - values[1]) / 2e-5 == pytest.approx(grad.view(-1)[i].item(), abs=1e-8)


def test_unknown_loss_types_are_refused():
    strong, weak, targets = random_case()
    with pytest.raises(ValueError, match="`loss_type` must be 'nll' or 'dft', got 'focal'"):
        mixed_cross_entropy(strong, weak, targets, 0.5, loss_type="focal")


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_half_precision_is_as_exact_as_full_logits_in_that_precision(loss_type):
    strong, weak, targets = random_case(num_tokens=64, vocab_size=500, dtype=torch.bfloat16)
    loss = mixed_cross_entropy(strong, weak, targets, 0.5, loss_type=loss_type)
    (grad,) = torch.autograd.grad(loss, strong)
    exact = full_logit_loss(strong, weak, targets, 0.5, loss_type=loss_type)
    (exact_grad,) = torch.autograd.grad(exact, strong)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)  # accumulated in float32
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, exact_grad.bfloat16(), rtol=2**-7, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(1, 20),
    vocab_size=st.integers(2, 30),
    tile_rows=st.integers(1, 7),
    mixing_lambda=st.floats(0.05, 1),
    data=st.data(),
)
def test_any_shape_tile_and_label_pattern(num_tokens, vocab_size, tile_rows, mixing_lambda, data):
    strong, weak, _ = random_case(num_tokens, vocab_size, torch.float64)
    targets = torch.tensor(
        data.draw(
            st.lists(
                st.one_of(st.just(-100), st.integers(0, vocab_size - 1)), min_size=num_tokens, max_size=num_tokens
            )
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_BLOCK_ROWS", tile_rows)
        loss = mixed_cross_entropy(strong, weak, targets, mixing_lambda)
        (grad,) = torch.autograd.grad(loss, strong)
    if (targets == -100).all():
        assert loss == 0
        assert not grad.any()
    else:
        expected = full_logit_loss(strong, weak, targets, mixing_lambda)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, strong)[0], rtol=1e-9, atol=1e-12)


def test_statistics_equal_torch_distributions():
    strong, weak, targets = random_case()
    output = mixed_loss(strong, weak, targets, 0.3)
    valid = targets != -100
    mix = 0.3 * strong + 0.7 * weak
    for logits, entropy in (
        (strong, output.strong_entropy),
        (weak, output.weak_entropy),
        (mix, output.mixed_entropy),
    ):
        expected = torch.distributions.Categorical(logits=logits.double()).entropy()
        torch.testing.assert_close(entropy[valid].double(), expected[valid], rtol=1e-5, atol=1e-6)
        assert not entropy[~valid].any()
    for logits, log_probs in ((strong, output.strong_log_probs), (mix, output.mixed_log_probs)):
        expected = -F.cross_entropy(logits.double(), targets, reduction="none")
        torch.testing.assert_close(log_probs.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(output.is_top1, (strong.argmax(-1) == targets) & valid)
    assert not output.strong_log_probs.requires_grad


def test_num_items_replaces_the_count():
    strong, weak, targets = random_case()
    count = (targets != -100).sum()
    loss = mixed_cross_entropy(strong, weak, targets, 0.5)
    torch.testing.assert_close(mixed_cross_entropy(strong, weak, targets, 0.5, num_items=100), loss * count / 100)


def test_extreme_logits_stay_finite():
    strong, weak, targets = random_case()
    strong, weak = (2500 * strong).detach().requires_grad_(), 2500 * weak
    output = mixed_loss(strong, weak, targets, 0.5, anchor_weight=0.5)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert torch.isfinite(strong.grad).all()
    assert torch.isfinite(output.mixed_entropy).all()


class LargeAllocations(TorchDispatchMode):
    """Records the new tensors of at least `numel` elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.storages, self.dtypes = numel, set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.dtypes.add(tensor.dtype)
                new = tensor.untyped_storage().data_ptr() not in inputs
                if new and tensor.numel() >= self.numel:
                    self.storages.add(tensor.untyped_storage().data_ptr())
        return result


def test_allocates_one_logits_sized_tensor_and_no_float64():
    strong, weak, targets = random_case(num_tokens=64, vocab_size=100)
    with LargeAllocations(strong.numel()) as forward:
        loss = mixed_cross_entropy(strong, weak.detach(), targets, 0.5, anchor_weight=0.2)
    with LargeAllocations(strong.numel()) as backward:
        torch.autograd.grad(loss, strong)
    assert len(forward.storages) == 1
    assert len(backward.storages) == 0
    assert torch.float64 not in forward.dtypes | backward.dtypes


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_theorem_1_easier_weak_margins_lower_the_target_probability(seed, mixing_lambda):
    """If every margin of the weak model is at most the strong model's, P_mix(y) <= P_strong(y) (paper, Theorem 1)."""
    strong, _, targets = random_case(dtype=torch.float64, seed=seed)
    targets = targets.clamp(min=0)
    generator = torch.Generator().manual_seed(seed + 1)
    # Raising wrong tokens lowers the margins
    weak = strong + torch.rand(strong.shape, generator=generator, dtype=torch.float64)
    weak.scatter_(-1, targets[:, None], strong.gather(-1, targets[:, None]))
    output = mixed_loss(strong, weak, targets, mixing_lambda)
    assert (output.mixed_log_probs <= output.strong_log_probs + 1e-12).all()


# The fused form


def buffer_for(tile_rows, vocab_size=37, dtype=torch.float32):
    """Bytes that make tiles of `tile_rows` rows: two of them, and two blocks for scratch."""
    return 2 * (tile_rows + tiles._BLOCK_ROWS) * vocab_size * dtype.itemsize


def logits_of(tensors, name, scale=1.0, softcap=None, dtype=torch.float64):
    logits = tensors[f"{name}_hidden"].to(dtype) @ tensors[f"{name}_weight"].to(dtype).t()
    if f"{name}_bias" in tensors:
        logits = logits + tensors[f"{name}_bias"].to(dtype)
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def full_logit_head_loss(
    tensors, targets, mixing_lambda, anchor_weight=0.0, dtype=torch.float64, loss_type="nll", **head
):
    strong, weak = (
        logits_of(tensors, name, head.get(f"{name}_scale", 1.0), head.get(f"{name}_softcap"), dtype)
        for name in ("strong", "weak")
    )
    return full_logit_loss(strong, weak, targets, mixing_lambda, anchor_weight, loss_type)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("head", [{}, HEAD], ids=["plain", "scale and softcap"])
@pytest.mark.parametrize("anchor_weight", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "grad_tolerance"), [(torch.float64, 1e-10, 1e-9), (torch.float32, 2e-6, 1e-5)]
)
def test_fused_loss_equals_full_logits_in_float64(
    dtype, loss_tolerance, grad_tolerance, anchor_weight, head, loss_type
):
    tensors, targets = random_heads(dtype=dtype)
    output = linear_mixed_cross_entropy(
        **tensors,
        targets=targets,
        mixing_lambda=0.4,
        anchor_weight=anchor_weight,
        buffer_bytes=buffer_for(4, dtype=dtype),
        loss_type=loss_type,
        **head,
    )
    expected = full_logit_head_loss(tensors, targets, 0.4, anchor_weight, loss_type=loss_type, **head)
    torch.testing.assert_close(output.loss.double(), expected, rtol=loss_tolerance, atol=0)
    grads = torch.autograd.grad(output.loss, list(tensors.values()))
    expected_grads = torch.autograd.grad(expected, list(tensors.values()))
    for name, grad, expected_grad in zip(tensors, grads, expected_grads, strict=True):
        error = (grad - expected_grad).double().norm() / expected_grad.double().norm()
        assert error < grad_tolerance, name


def test_fused_gradcheck():
    tensors, targets = random_heads(num_tokens=5, vocab_size=7, dtype=torch.float64)

    def loss(*values):
        return linear_mixed_cross_entropy(
            **dict(zip(tensors, values, strict=True)),
            targets=targets,
            mixing_lambda=0.4,
            anchor_weight=0.3,
            buffer_bytes=buffer_for(2, 7, torch.float64),
            **HEAD,
        ).loss

    assert torch.autograd.gradcheck(loss, tuple(tensors.values()))


@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(1, 20),
    vocab_size=st.integers(2, 30),
    tile_rows=st.integers(1, 12),
    block_rows=st.integers(1, 5),
    mixing_lambda=st.floats(0.05, 1),
    data=st.data(),
)
def test_fused_loss_for_any_shape_tile_and_label_pattern(
    num_tokens, vocab_size, tile_rows, block_rows, mixing_lambda, data
):
    tensors, _ = random_heads(num_tokens, vocab_size, torch.float64, bias=False)
    label = st.one_of(st.just(-100), st.integers(0, vocab_size - 1))
    targets = torch.tensor(data.draw(st.lists(label, min_size=num_tokens, max_size=num_tokens)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_BLOCK_ROWS", block_rows)
        output = linear_mixed_cross_entropy(
            **tensors,
            targets=targets,
            mixing_lambda=mixing_lambda,
            buffer_bytes=buffer_for(tile_rows, vocab_size, torch.float64),
        )
    grads = torch.autograd.grad(output.loss, list(tensors.values()))
    if (targets == -100).all():
        assert output.loss == 0
        assert not any(grad.any() for grad in grads)
    else:
        expected = full_logit_head_loss(tensors, targets, mixing_lambda)
        torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=1e-12)
        for grad, other in zip(grads, torch.autograd.grad(expected, list(tensors.values())), strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_fused_statistics_equal_those_of_the_full_logits(loss_type):
    tensors, targets = random_heads()
    fused = linear_mixed_cross_entropy(
        **tensors, targets=targets, mixing_lambda=0.3, buffer_bytes=buffer_for(4), loss_type=loss_type
    )
    full = mixed_loss(*(logits_of(tensors, name, dtype=torch.float32) for name in ("strong", "weak")), targets, 0.3)
    for name in ("strong_log_probs", "mixed_log_probs", "strong_entropy", "weak_entropy", "mixed_entropy"):
        torch.testing.assert_close(getattr(fused, name), getattr(full, name), rtol=1e-5, atol=1e-5, msg=name)
    assert torch.equal(fused.is_top1, full.is_top1)
    assert torch.equal(fused.mask, full.mask)


def test_logit_statistics_are_the_mean_and_the_centered_norm():
    tensors, targets = random_heads()
    with torch.no_grad():
        tensors["strong_bias"] += 100  # a drift of the mean changes nothing else
    output = linear_mixed_cross_entropy(**tensors, targets=targets, mixing_lambda=0.3, logit_statistics=True)
    valid = targets != -100
    for name in ("strong", "weak"):
        logits = logits_of(tensors, name)[valid]
        mean, norm = getattr(output, f"{name}_logit_mean"), getattr(output, f"{name}_logit_norm")
        torch.testing.assert_close(mean[valid].double(), logits.mean(-1), rtol=1e-5, atol=1e-5)
        expected = torch.linalg.norm(logits - logits.mean(-1, keepdim=True), dim=-1)
        torch.testing.assert_close(norm[valid].double(), expected, rtol=1e-4, atol=0)
        assert not mean[~valid].any()
    assert linear_mixed_cross_entropy(**tensors, targets=targets, mixing_lambda=0.3).strong_logit_mean is None


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_half_precision_is_as_exact_as_full_logits_in_that_precision(dtype, loss_type):
    tensors, targets = random_heads(num_tokens=64, vocab_size=200, dtype=dtype, bias=False)
    exact = full_logit_head_loss(tensors, targets, 0.5, loss_type=loss_type)
    exact_grads = torch.autograd.grad(exact, list(tensors.values()))
    halves = full_logit_head_loss(tensors, targets, 0.5, dtype=dtype, loss_type=loss_type)
    half_grads = torch.autograd.grad(halves, list(tensors.values()))
    output = linear_mixed_cross_entropy(
        **tensors, targets=targets, mixing_lambda=0.5, buffer_bytes=buffer_for(9, 200), loss_type=loss_type
    )
    grads = torch.autograd.grad(output.loss, list(tensors.values()))
    assert output.loss.dtype == torch.float32
    assert abs(output.loss - exact) <= 2 * abs(halves - exact) + 1e-4
    for name, grad, half, exact_grad in zip(tensors, grads, half_grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        ours, theirs = ((g.double() - exact_grad.double()).norm() for g in (grad, half))
        assert ours <= 1.5 * theirs + 1e-3 * exact_grad.double().norm(), name


def test_fused_loss_multiplies_in_the_autocast_dtype():
    tensors, targets = random_heads(num_tokens=64, vocab_size=200, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = linear_mixed_cross_entropy(**tensors, targets=targets, mixing_lambda=0.5)
    halves = {name: value.detach().bfloat16() for name, value in tensors.items()}
    expected = linear_mixed_cross_entropy(**halves, targets=targets, mixing_lambda=0.5)
    assert torch.equal(output.loss, expected.loss)
    assert output.loss != linear_mixed_cross_entropy(**tensors, targets=targets, mixing_lambda=0.5).loss
    grads = torch.autograd.grad(output.loss, list(tensors.values()))
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_fused_float16_gradients_do_not_underflow_in_a_large_batch():
    """The mean over many items is taken in the backward, after a loss scaler has had its say."""
    tensors, targets = random_heads(num_tokens=64, vocab_size=200, bias=False)
    scale, num_items = 2.0**16, 2**20
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_mixed_cross_entropy(**tensors, targets=targets, mixing_lambda=0.5, num_items=num_items).loss
    grads = torch.autograd.grad(scale * loss, list(tensors.values()))
    exact = full_logit_head_loss(tensors, targets, 0.5) * (targets != -100).sum() / num_items
    for name, grad, other in zip(
        tensors, grads, torch.autograd.grad(scale * exact, list(tensors.values())), strict=True
    ):
        assert (grad - other).norm() <= 5e-3 * other.norm(), name


def test_fused_extreme_logits_stay_finite():
    tensors, targets = random_heads(scale=50.0)
    output = linear_mixed_cross_entropy(**tensors, targets=targets, mixing_lambda=0.5, anchor_weight=0.5)
    assert logits_of(tensors, "strong").abs().max() > 1e4
    values = [output.loss, output.strong_entropy, output.weak_entropy, output.mixed_entropy, output.strong_log_probs]
    grads = torch.autograd.grad(output.loss, list(tensors.values()))
    assert all(torch.isfinite(value).all() for value in (*values, *grads))


def test_fused_backward_can_run_again_on_a_retained_graph():
    tensors, targets = random_heads()
    loss = linear_mixed_cross_entropy(**tensors, targets=targets, mixing_lambda=0.5).loss
    first = [g.clone() for g in torch.autograd.grad(3 * loss, list(tensors.values()), retain_graph=True)]
    second = torch.autograd.grad(loss, list(tensors.values()))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 3 * b)


@pytest.mark.parametrize("wanted", [(), ("strong_hidden",), ("strong_hidden", "strong_weight"), ("weak_weight",)])
def test_fused_loss_multiplies_with_the_vocabulary_no_more_than_needed(wanted):
    """Two products for the logits, and one for each hidden state or weight that needs a gradient."""
    tensors, targets = random_heads(bias=False)
    for name, value in tensors.items():
        value.requires_grad_(name in wanted)

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "matmul")
            return func(*args, **(kwargs or {}))

    with Products() as products:
        output = linear_mixed_cross_entropy(**tensors, targets=targets, mixing_lambda=0.5, anchor_weight=0.5)
        if wanted:
            torch.autograd.grad(output.loss, [tensors[name] for name in wanted])
    assert products.count == 2 + len(wanted)
    assert output.loss.requires_grad == bool(wanted)


@pytest.mark.parametrize("anchor_weight", [0.0, 0.3])
@pytest.mark.parametrize("num_tokens", [500, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_loss_needs_no_more_memory_than_its_buffer(dtype, num_tokens, anchor_weight):
    """Peak beyond inputs and gradients: the buffer and 10 %, however many tokens there are."""
    vocab_size = 4000
    tensors, targets = random_heads(num_tokens, vocab_size, dtype, bias=False)
    buffer_bytes = 200 * vocab_size * 4

    def run():
        output = linear_mixed_cross_entropy(
            **tensors, targets=targets, mixing_lambda=0.5, anchor_weight=anchor_weight, buffer_bytes=buffer_bytes
        )
        torch.autograd.grad(output.loss, list(tensors.values()))

    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    current = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    # A weight's gradient is accumulated in float32
    gradients = sum((4 if "weight" in name else x.itemsize) * x.numel() for name, x in tensors.items())
    assert gradients + 0.5 * buffer_bytes < peak <= gradients + 1.1 * buffer_bytes


@pytest.mark.parametrize("trains_weak", [False, True])
@pytest.mark.parametrize("vocab_size", [32_000, 151_936, 262_144])
@pytest.mark.parametrize("num_tokens", [1, 300, 1000, 4096, 8192, 16_384])
def test_a_gpu_takes_a_few_tiles(num_tokens, vocab_size, trains_weak):
    """By the rows that a buffer holds, counted as the loss does it."""
    buffer_bytes = default_buffer_bytes(num_tokens, vocab_size, 2, device_memory=80 * 2**30, trains_weak=trains_weak)
    strong_rows, weak_rows = tiles._tile_rows(
        num_tokens, buffer_bytes // (vocab_size * 2), trains_weak, use_triton=True
    )
    bounded = buffer_bytes == 5 * 2**30
    assert ceil(num_tokens / strong_rows) <= (5 if bounded else 3)
    assert (strong_rows + weak_rows) * vocab_size * 2 <= buffer_bytes
    assert 2**28 <= buffer_bytes <= 5 * 2**30
    # No more than a tile too many
    assert buffer_bytes == 2**28 or strong_rows <= num_tokens / 3 + 128


def test_a_cpu_and_a_small_gpu_take_256_mib():
    assert default_buffer_bytes(8192, 151_936, 4) == 2**28
    assert default_buffer_bytes(8192, 151_936, 4, device_memory=2**31) == 2**28


def test_without_a_buffer_the_loss_takes_that_of_the_device(monkeypatch):
    tensors, targets = random_heads(9, 50, torch.float32, bias=False)
    wanted, buffer_bytes = [], buffer_for(4, 50)

    def small(*args, **kwargs):
        wanted.append((args, kwargs))
        return buffer_bytes

    monkeypatch.setattr(tiles, "default_buffer_bytes", small)
    output = linear_mixed_cross_entropy(**tensors, targets=targets, mixing_lambda=0.5)
    expected = linear_mixed_cross_entropy(
        **tensors, targets=targets, mixing_lambda=0.5, buffer_bytes=buffer_for(4, 50)
    )
    assert wanted == [((int((targets != -100).sum()), 50, 4, None), {"trains_weak": True})]
    assert torch.equal(output.loss, expected.loss)


def test_fused_loss_is_exact_for_confident_models():
    check_confident_models("cpu")


def test_fused_loss_computes_nothing_in_float64():
    tensors, targets = random_heads()
    with LargeAllocations(1) as allocations:
        output = linear_mixed_cross_entropy(**tensors, targets=targets, mixing_lambda=0.5, anchor_weight=0.3)
        torch.autograd.grad(output.loss, list(tensors.values()))
    assert torch.float64 not in allocations.dtypes


def test_fused_loss_needs_not_look_for_targets_that_are_all_valid():
    tensors, targets = random_heads(num_tokens=21)
    valid = targets != -100
    expected = linear_mixed_cross_entropy(**tensors, targets=targets, mixing_lambda=0.4, anchor_weight=0.2)
    expected_grads = torch.autograd.grad(expected.loss, list(tensors.values()))
    rows = {key: value[valid] if "hidden" in key else value for key, value in tensors.items()}
    output = linear_mixed_cross_entropy(
        **rows,
        targets=targets[valid],
        mixing_lambda=0.4,
        anchor_weight=0.2,
        ignore_index=None,
        buffer_bytes=buffer_for(4),
    )
    torch.testing.assert_close(output.loss, expected.loss)
    for grad, expected_grad in zip(
        torch.autograd.grad(output.loss, list(tensors.values())), expected_grads, strict=True
    ):
        torch.testing.assert_close(grad, expected_grad)
    torch.testing.assert_close(output.weak_entropy, expected.weak_entropy[valid])
    assert output.mask.all()


@pytest.mark.parametrize("tile_rows", [1, 4, 100])
def test_linear_entropy_equals_that_of_the_full_logits(tile_rows):
    tensors, _ = random_heads()
    entropy = linear_entropy(
        tensors["strong_hidden"],
        tensors["strong_weight"],
        tensors["strong_bias"],
        scale=0.7,
        softcap=5.0,
        buffer_bytes=2 * 37 * 4 * tile_rows,
    )
    expected = torch.distributions.Categorical(logits=logits_of(tensors, "strong", 0.7, 5.0)).entropy()
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-6)
    assert not entropy.requires_grad


def test_next_token_targets_align_logits_with_the_following_label():
    labels = torch.tensor([[5, 6, 7], [8, -100, 9]])
    assert next_token_targets(labels).tolist() == [6, 7, -100, -100, 9, -100]


def test_token_entropy_handles_forbidden_tokens_and_the_mask():
    logits = torch.tensor([[0.0, 0.0, float("-inf")], [1.0, 2.0, 3.0]])
    entropy = token_entropy(logits, torch.tensor([True, False]))
    torch.testing.assert_close(entropy, torch.tensor([2.0, 1.0]).log())  # ln 2, and 0 where masked out


def test_different_vocabularies_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        mixed_cross_entropy(torch.zeros(2, 5), torch.zeros(2, 6), torch.zeros(2, dtype=torch.long), 0.5)
