"""Triton against PyTorch: on a GPU where there is one, otherwise under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_cases import HEAD, check_confident_models, random_heads

from wmss_trl.losses import linear_mixed_cross_entropy, tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.gpu if DEVICE == "cuda" else lambda test: test  # without one the interpreter runs them
NAMES = ("loss", "strong_log_probs", "mixed_log_probs", "strong_entropy", "weak_entropy", "mixed_entropy")
MOMENTS = ("strong_logit_mean", "weak_logit_mean", "strong_logit_norm", "weak_logit_norm")


def run(tensors, targets, wanted, **options):
    leaves = {n: t.detach().to(DEVICE).requires_grad_(n in wanted) for n, t in tensors.items()}
    output = linear_mixed_cross_entropy(**leaves, targets=targets.to(DEVICE), mixing_lambda=0.4, **options)
    grads = torch.autograd.grad(output.loss, [leaves[name] for name in wanted]) if wanted else ()
    return output, grads


@on_gpu
@pytest.mark.parametrize("wanted", [(), ("strong_hidden", "strong_weight", "strong_bias"), "all"])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("anchor_weight", [0.0, 0.3])
@pytest.mark.parametrize("head", [{}, HEAD], ids=["plain", "scale and softcap"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_triton_equals_pytorch(monkeypatch, dtype, tolerance, head, anchor_weight, loss_type, wanted):
    # More columns than a block of the kernels, several tiles of rows
    tensors, targets = random_heads(num_tokens=11, vocab_size=1500, dtype=dtype)
    wanted = tuple(tensors) if wanted == "all" else wanted
    options = {
        "anchor_weight": anchor_weight,
        "logit_statistics": bool(anchor_weight),
        "loss_type": loss_type,
        "buffer_bytes": 4 * 2 * 1500 * dtype.itemsize,
        **head,
    }
    monkeypatch.setattr(tiles, "_use_triton", lambda device, dtype: False)
    expected, expected_grads = run(tensors, targets, wanted, **options)
    monkeypatch.setattr(tiles, "_use_triton", lambda device, dtype: True)
    ours, grads = run(tensors, targets, wanted, **options)
    for name in NAMES + MOMENTS if anchor_weight else NAMES:
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:
        assert torch.equal(ours.is_top1, expected.is_top1)
    for name, grad, other in zip(wanted, grads, expected_grads, strict=True):
        assert (grad - other).float().norm() <= tolerance * other.float().norm() + 1e-6, name


@on_gpu
def test_of_equal_logits_the_first_is_on_top(monkeypatch):
    monkeypatch.setattr(tiles, "_use_triton", lambda device, dtype: True)
    ones = torch.ones(2, 1, device=DEVICE)
    weight = torch.tensor([[1.0], [2.0], [2.0]], device=DEVICE)
    targets = torch.tensor([1, 2], device=DEVICE)
    output = linear_mixed_cross_entropy(ones, weight, ones, weight, targets, 0.5)
    assert output.is_top1.tolist() == [True, False]


@on_gpu
def test_of_equal_logits_in_different_blocks_the_first_is_on_top(monkeypatch):
    monkeypatch.setattr(tiles, "_use_triton", lambda device, dtype: True)
    weight = torch.ones(2500, 1, device=DEVICE)
    weight[[700, 1500]] = 2
    ones, targets = torch.ones(3, 1, device=DEVICE), torch.tensor([700, 1500, 2400], device=DEVICE)
    output = linear_mixed_cross_entropy(ones, weight, ones, weight, targets, 0.5)
    assert output.is_top1.tolist() == [True, False, False]


@on_gpu
def test_triton_is_exact_for_confident_models(monkeypatch):
    monkeypatch.setattr(tiles, "_use_triton", lambda device, dtype: True)
    check_confident_models(DEVICE)


@pytest.mark.ci
@pytest.mark.parametrize("floats", ["fp32", "fp64"])  # the latter in a compiled model, before PyTorch 2.15
@pytest.mark.parametrize(("capability", "dtype"), [("80", "fp32"), ("90", "bf16")])
def test_kernels_compile_for_gpus_that_need_not_be_there(capability, dtype, floats):
    """To machine code that keeps everything in registers, never calculates in fp64, and reads all logits in about as
    many steps as TRL's does."""
    command = [sys.executable, "benchmarks/compiled_kernels.py", "--capability", capability, "--dtype", dtype]
    command += ["--floats", floats]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    output = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True).stdout
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if "|" in line][2:]
    instructions = {name: int(count) for name, _, _, count, _ in rows}
    assert len(rows) == 2 + 4 + 16
    assert {(spilled, in_fp64) for _, _, spilled, _, in_fp64 in rows} == {("0", "0")}
    assert instructions["statistics"] < 1.3 * instructions["TRL's forward"]
    assert instructions["gradient"] < 1.3 * instructions["TRL's backward"]
