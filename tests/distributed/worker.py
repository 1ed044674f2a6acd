"""One process of a launched run: `worker.py OPTIONS_JSON RESULT_FILE`. Writes a result per rank and leaves."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import sums

from wmss_trl import WMSSConfig, WMSSTrainer
from wmss_trl.data.tiny import build_model, build_tokenizer


def main() -> None:
    options = json.loads(sys.argv[1])
    expected_processes, resume = options.pop("expected_processes"), options.pop("resume", None)
    torch.set_num_threads(1)
    examples = sums(37)
    tokenizer = build_tokenizer([example["prompt"] + example["completion"] for example in examples], vocab_size=300)
    trainer = WMSSTrainer(
        build_model(tokenizer, hidden_size=32, intermediate_size=64, num_layers=2),
        WMSSConfig(
            bf16=False,
            activation_checkpointing=False,
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
    )
    assert trainer.accelerator.num_processes == expected_processes
    trainer.train(resume_from_checkpoint=resume)
    assert (type(trainer.model_wrapped).__name__ == "DistributedDataParallel") == (expected_processes > 1)
    sampler = trainer.curriculum_sampler
    np.savez(
        f"{sys.argv[2]}.{trainer.accelerator.process_index}.npz",
        weights=torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]).numpy(),
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        mixed_nll=[entry["mixed_nll"] for entry in trainer.state.log_history if "mixed_nll" in entry],
        num_tokens=[entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry],
        weak_entropy=sampler.weak_entropy,
        strong_entropy=sampler.strong_entropy,
        indices=sampler.indices,
    )
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # gloo sometimes aborts while the interpreter shuts down, after all work is done


if __name__ == "__main__":
    main()
