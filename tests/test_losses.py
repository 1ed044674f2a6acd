import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from wmss_trl import losses
from wmss_trl.losses import mixed_cross_entropy, mixed_loss, next_token_targets, token_entropy


def full_logit_loss(strong, weak, targets, mixing_lambda, anchor_weight=0.0):
    """The definition, on full float64 logits with autograd."""
    strong, weak = strong.double(), weak.double()
    mix = mixing_lambda * strong + (1 - mixing_lambda) * weak
    return anchor_weight * F.cross_entropy(strong, targets) + (1 - anchor_weight) * F.cross_entropy(mix, targets)


def random_case(num_tokens=13, vocab_size=37, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    strong, weak = (4 * torch.randn(num_tokens, vocab_size, generator=generator) for _ in range(2))
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    targets[::4] = -100
    return strong.to(dtype).requires_grad_(), weak.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("anchor_weight", [0.0, 0.3])
@pytest.mark.parametrize("mixing_lambda", [0.1, 0.5, 0.9, 1.0])
def test_loss_and_gradients_equal_the_definition_in_float64(mixing_lambda, anchor_weight):
    strong, weak, targets = random_case()
    loss = mixed_cross_entropy(strong, weak, targets, mixing_lambda, anchor_weight=anchor_weight)
    grads = torch.autograd.grad(loss, (strong, weak))
    expected = full_logit_loss(strong, weak, targets, mixing_lambda, anchor_weight)
    expected_grads = torch.autograd.grad(expected, (strong, weak))
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad.double(), rtol=1e-5, atol=1e-7)


def test_gradcheck():
    strong, weak, targets = random_case(num_tokens=5, vocab_size=7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s, w: mixed_cross_entropy(s, w, targets, 0.4, anchor_weight=0.3), (strong, weak)
    )


def test_half_precision_is_as_exact_as_full_logits_in_that_precision():
    strong, weak, targets = random_case(num_tokens=64, vocab_size=500, dtype=torch.bfloat16)
    loss = mixed_cross_entropy(strong, weak, targets, 0.5)
    (grad,) = torch.autograd.grad(loss, strong)
    exact = full_logit_loss(strong, weak, targets, 0.5)
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
        patch.setattr(losses, "_TILE_BYTES", 4 * vocab_size * tile_rows)
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


def test_allocates_one_logits_sized_tensor_and_no_float64(monkeypatch):
    strong, weak, targets = random_case(num_tokens=64, vocab_size=100)
    monkeypatch.setattr(losses, "_TILE_BYTES", 4 * 100 * 8)
    with LargeAllocations(strong.numel()) as forward:
        loss = mixed_cross_entropy(strong, weak.detach(), targets, 0.5, anchor_weight=0.2)
    with LargeAllocations(strong.numel()) as backward:
        torch.autograd.grad(loss, strong)
    assert len(forward.storages) == 0
    assert len(backward.storages) == 1
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
