"""Cases of the mixed loss that several files test, those for GPUs among them: it must not need Hypothesis."""

import torch
import torch.nn.functional as F

from wmss_trl.losses import linear_mixed_cross_entropy

HEAD = {"strong_scale": 0.7, "weak_scale": 1.3, "strong_softcap": 5.0, "weak_softcap": 8.0}


def cross_entropy(logits, targets, loss_type="nll"):
    """The mean over valid targets, in DFT (arXiv 2508.05629) weighted by the detached probabilities of these."""
    if loss_type == "nll":
        return F.cross_entropy(logits, targets)
    valid = targets != -100
    log_probs = torch.distributions.Categorical(logits=logits[valid]).log_prob(targets[valid])
    return -(log_probs.detach().exp() * log_probs).mean()


def random_heads(num_tokens=13, vocab_size=37, dtype=torch.float32, bias=True, seed=0, scale=1.0):
    """Hidden states and heads of a strong model of width 8 and a weak one of width 5."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()

    tensors = {}
    for name, width in (("strong", 8), ("weak", 5)):
        tensors[f"{name}_hidden"] = draw(num_tokens, width)
        tensors[f"{name}_weight"] = draw(vocab_size, width)
        if bias:
            tensors[f"{name}_bias"] = draw(vocab_size)
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    targets[::4] = -100
    return tensors, targets


def check_confident_models(device):
    """Entropies and log-probabilities below the rounding of the logits are right, to the rounding of a probability."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 64, 300, generator=generator)
    logits[:, :, 0] += torch.linspace(5, 30, 64) + 100  # with an offset, which changes nothing
    identity = torch.eye(300, device=device)  # makes the products exact
    targets = torch.zeros(64, dtype=torch.long)
    strong, weak = logits.to(device)
    output = linear_mixed_cross_entropy(strong, identity, weak, identity, targets.to(device), 0.25)
    exact = {"strong": logits[0].double(), "weak": logits[1].double()}
    exact["mixed"] = 0.25 * exact["strong"] + 0.75 * exact["weak"]
    for name, z in exact.items():
        entropy = torch.distributions.Categorical(logits=z).entropy()
        torch.testing.assert_close(getattr(output, f"{name}_entropy").double().cpu(), entropy, rtol=1e-4, atol=2e-7)
    for name in ("strong", "mixed"):
        log_probs = exact[name].log_softmax(-1)[:, 0]
        ours = getattr(output, f"{name}_log_probs").double().cpu()
        torch.testing.assert_close(ours, log_probs, rtol=1e-4, atol=2e-7)
