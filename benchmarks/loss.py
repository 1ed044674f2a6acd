"""
Time and memory of the loss alone, from hidden states to the gradients of hidden states and LM head.

    python benchmarks/loss.py                       # CPU: hidden 512, vocabulary 32k, 1,024 tokens, float32
    python benchmarks/loss.py --preset qwen3-4b --tokens 4096 --dtype bfloat16 --device cuda

All candidates run in one process, interleaved; times are medians over the rounds with the interquartile range, ratios
are medians of the ratios within a round. Memory is the peak beyond inputs, weights and their gradients.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from measure import finish, interleaved, save
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from wmss_trl.losses import linear_mixed_cross_entropy, mixed_cross_entropy

# hidden size, vocabulary
PRESETS = {
    "cpu": (512, 32_768),
    "qwen3-0.6b": (1024, 151_936),
    "qwen3-1.7b": (2048, 151_936),
    "qwen3-4b": (2560, 151_936),
}


def trl_fused_sft(strong_hidden, strong_weight, weak_hidden, weak_weight, targets):
    """What SFTTrainer runs: log-probabilities, entropy and top-1 from TRL's tiled head."""
    log_probs, *_ = ChunkedLogProbFunction.apply(
        strong_hidden,
        strong_weight,
        None,
        targets,
        1.0,
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        ("log_probs", "entropy", "is_top1"),
    )
    return -log_probs.mean()


def full_logit_sft(strong_hidden, strong_weight, weak_hidden, weak_weight, targets):
    return F.cross_entropy((strong_hidden @ strong_weight.t()).float(), targets)


def fused_wmss(strong_hidden, strong_weight, weak_hidden, weak_weight, targets, **options):
    return linear_mixed_cross_entropy(
        strong_hidden, strong_weight, weak_hidden, weak_weight, targets, 0.5, **options
    ).loss


def full_logit_wmss(strong_hidden, strong_weight, weak_hidden, weak_weight, targets):
    weak_logits = weak_hidden @ weak_weight.t()
    return mixed_cross_entropy(strong_hidden @ strong_weight.t(), weak_logits, targets, 0.5)


def plain_full_logit_wmss(strong_hidden, strong_weight, weak_hidden, weak_weight, targets):
    """The formula as one would write it down."""
    mix = 0.5 * (strong_hidden @ strong_weight.t()) + 0.5 * (weak_hidden @ weak_weight.t())
    return F.cross_entropy(mix.float(), targets)


def trl_divergence(strong_hidden, strong_weight, weak_hidden, weak_weight, targets):
    """TRL's distillation loss (forward KL): two models, gradients for one, like the frozen mixture."""
    divergence, _ = ChunkedDivergenceFunction.apply(
        strong_hidden, strong_weight, None, weak_hidden, weak_weight, None, 0.0
    )
    return divergence.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--buffer_mb", type=int, default=None, help="Default: as in a run on this device.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", default=None, help="File for the raw figures.")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    hidden_size, vocab_size = PRESETS[args.preset]
    torch.manual_seed(0)
    place = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    strong_hidden, weak_hidden = (torch.randn(args.tokens, hidden_size, **place) for _ in range(2))
    strong_weight, weak_weight = (torch.randn(vocab_size, hidden_size, **place) / hidden_size**0.5 for _ in range(2))
    targets = torch.randint(vocab_size, (args.tokens,), device=args.device)
    trained = strong_hidden.requires_grad_(), strong_weight.requires_grad_()

    def step(loss: Callable[..., torch.Tensor]) -> None:
        value = loss(strong_hidden, strong_weight, weak_hidden, weak_weight, targets)
        torch.autograd.grad(value, trained)

    fused = partial(fused_wmss, buffer_bytes=args.buffer_mb and args.buffer_mb * 2**20)
    candidates = {
        "(a) TRL's fused SFT head": trl_fused_sft,
        "(a2) SFT, full logits": full_logit_sft,
        "(c) WMSS, frozen weak": fused,
        "(c) anchored": partial(fused, anchor_weight=0.3),
        "(d) WMSS, full logits": full_logit_wmss,
        "(d) WMSS, full logits, plain autograd": plain_full_logit_wmss,
        "(e) TRL's distillation head": trl_divergence,
    }
    gradients = sum(x.numel() * x.element_size() for x in trained)
    steps = {name: partial(step, loss) for name, loss in candidates.items()}
    results = interleaved(steps, args.rounds, args.device, gradients, report=partial(save, args))
    finish(save(args, results))


if __name__ == "__main__":
    main()
