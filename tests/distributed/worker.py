"""One process of launched runs: `worker.py OPTIONS_JSON RESULT_FILE`. Writes a result per run and rank and leaves."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import sums

from wmss_trl import WMSSConfig, WMSSTrainer
from wmss_trl.data.tiny import build_model, build_tokenizer


def run(result: str, expected_processes: int, resume: str | None = None, lora: bool = False, **options) -> None:
    torch.manual_seed(0)
    examples = sums(37)
    tokenizer = build_tokenizer([example["prompt"] + example["completion"] for example in examples], vocab_size=300)
    trainer = WMSSTrainer(
        build_model(tokenizer, hidden_size=32, intermediate_size=64, num_layers=2),
        WMSSConfig(
            bf16=False,
            activation_checkpointing=options.pop("activation_checkpointing", False),
            use_cpu=True,
            num_train_epochs=3,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            optim="sgd",
            learning_rate=0.5,
            **options,
        ),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if lora else None,
    )
    assert trainer.accelerator.num_processes == expected_processes
    visited, collate = [], trainer.data_collator
    if not options.get("packing"):
        trainer.data_collator = lambda rows: visited.append([row["input_ids"] for row in rows]) or collate(rows)
    trainer.train(resume_from_checkpoint=resume)
    assert (type(trainer.model_wrapped).__name__ == "DistributedDataParallel") == (expected_processes > 1)
    sampler = trainer.curriculum_sampler
    last_epoch = visited[-len(trainer._active_dataloader) :]
    np.savez(
        f"{result}.{trainer.accelerator.process_index}.npz",
        weights=torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]).numpy(),
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        mixed_nll=[entry["mixed_nll"] for entry in trainer.state.log_history if "mixed_nll" in entry],
        num_tokens=[entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry],
        weak_entropy=sampler.weak_entropy,
        strong_entropy=sampler.strong_entropy,
        indices=sampler.indices,
        last_epoch=json.dumps([row for batch in last_epoch for row in batch]),
        active_set=json.dumps([trainer.train_dataset[int(i)]["input_ids"] for i in sampler.indices])
        if visited
        else "[]",
    )
    trainer.accelerator.wait_for_everyone()


def main() -> None:
    torch.set_num_threads(1)
    for number, options in enumerate(json.loads(sys.argv[1])):
        run(f"{sys.argv[2]}.{number}", **options)
    sys.stdout.flush()
    os._exit(0)  # gloo sometimes aborts while the interpreter shuts down, after all work is done


if __name__ == "__main__":
    main()
