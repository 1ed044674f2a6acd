"""
Throughput of scoring a data set, and time and memory of a draw from millions of examples.

    python benchmarks/scoring.py                     # CPU: a Qwen3 of 8 layers, hidden 512, vocabulary 32k, float32
    python benchmarks/scoring.py --preset qwen3-4b --examples 2000 --max_length 4096 --device cuda --bf16
    python benchmarks/scoring.py --draw 10000000     # the draw alone

The examples have log-normal lengths. Passes over all of them run interleaved; ratios are medians of the ratios within
a round, with quartiles. The bare forward passes get the same batches of similar length, collated beforehand, at the
best of several sizes; scoring takes the size that is best for the model.
"""

import argparse
import contextlib
import resource
import time
from collections.abc import Callable

import datasets
import numpy as np
import torch
from datasets import Dataset
from measure import finish, save, synchronize
from results import Measurement
from step import PRESETS, build_qwen3
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from wmss_trl import draw_active_set, sampling_weights, score_entropy
from wmss_trl.modeling.lm_head import add_head_access
from wmss_trl.scoring.dataset import length_batches


def measure_draw(num_examples: int) -> None:
    """Print time and peak memory of weights and draw, beyond the entropies that go in."""
    generator = np.random.default_rng(0)
    weak, strong = (generator.random(num_examples, dtype=np.float32) for _ in range(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    weights = sampling_weights(weak, strong)
    weighed = time.perf_counter()
    draw_active_set(weights, round(0.63 * num_examples), seed=0)
    end = time.perf_counter()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{num_examples:,} examples: weights {weighed - start:.2f} s, draw {end - weighed:.2f} s, "
        f"peak memory {peak:.0f} MB beyond the entropies"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--supervised", type=float, default=1.0, help="Share of each example that carries loss.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draw", type=int, default=None, help="Measure only a draw from so many examples.")
    parser.add_argument("--json", default=None, help="File for the raw figures.")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    if args.draw is not None:
        measure_draw(args.draw)
        return

    vocab_size = PRESETS[args.preset][-2]
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(args.max_length / 4), 0.8, args.examples), 8, args.max_length)
    rows = []
    for length in lengths.astype(int):
        ids = generator.integers(3, vocab_size, size=length).tolist()
        prompt = round((1 - args.supervised) * length)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    dataset = Dataset.from_list(rows)
    lengths = np.array([len(row["input_ids"]) for row in rows])
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = build_qwen3(args.preset, 0, args.max_length, args.device).to(dtype).eval()
    collator = DataCollatorForLanguageModeling(pad_token_id=0)

    def collate(tokens_per_batch: int) -> list[dict[str, torch.Tensor]]:
        batches = length_batches(lengths, tokens_per_batch=tokens_per_batch)
        collated = (collator([rows[i] for i in batch]) for batch in batches)
        return [{k: v.to(args.device) for k, v in batch.items() if k != "labels"} for batch in collated]

    def forward(module: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                for batch in batches:
                    module(**batch, use_cache=False)

        return run

    def seconds(run: Callable[[], object]) -> float:
        synchronize(args.device)
        start = time.perf_counter()
        run()
        synchronize(args.device)
        return time.perf_counter() - start

    def best(module: torch.nn.Module) -> tuple[int, Callable[[], None]]:
        counts = (4, 8, 16, 32) if args.device.startswith("cuda") else (2, 4, 8)
        budgets = [args.max_length * count for count in counts]
        forward(module, collate(budgets[0])[:1])()  # for warming up
        runs = {}
        for budget in budgets:
            with contextlib.suppress(torch.OutOfMemoryError):
                run = forward(module, collate(budget))
                runs[budget] = (seconds(run), run)
        budget = min(runs, key=lambda budget: runs[budget][0])
        return budget, runs[budget][1]

    backbone_budget, backbone = best(model.base_model)
    budget, logits = best(model)
    add_head_access(model)
    candidates = {
        f"backbone, {backbone_budget} tokens per batch": backbone,
        f"model with logits, {budget} tokens per batch": logits,
        f"score_entropy, {budget} tokens per batch": lambda: score_entropy(
            model, dataset, collator, tokens_per_batch=budget, disable_tqdm=True
        ),
    }
    batches = length_batches(lengths, tokens_per_batch=budget)
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    sizes = {"tokens": int(lengths.sum()), "padding": float(padded / lengths.sum() - 1)}
    results = {name: Measurement([]) for name in candidates}
    for round_number in range(args.rounds + 1):
        for name, run in candidates.items():
            duration = seconds(run)
            if round_number:  # the first is for warming up
                results[name].seconds.append(duration)
        save(args, results, **sizes)
    finish(save(args, results, **sizes))


if __name__ == "__main__":
    main()
