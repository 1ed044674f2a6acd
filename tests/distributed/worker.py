"""One process of launched runs: `worker.py RUNS_JSON RESULT_FILE`. Writes a result per run and rank and leaves."""

import json
import os
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import sums

import wmss_trl.modeling.lm_head
from wmss_trl import WMSSConfig, WMSSTrainer
from wmss_trl.data.tiny import build_model, build_tokenizer
from wmss_trl.distributed.engines import engine_name
from wmss_trl.distributed.sharding import full_tensor, gathered, in_zero3, is_sharded, parameters_at_rest

# Under DDP on a CPU, transformers before 5.18 restores the optimizer to "cpu:0", which PyTorch does not know
torch.serialization.register_package(
    0, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)

head_problem = wmss_trl.modeling.lm_head._head_problem

# What the model is wrapped in: FSDP on a CPU is silently plain DDP, and DDP no wrapper at all, where something is off
WRAPPERS = {
    "one": "Qwen3ForCausalLM",
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPQwen3ForCausalLM",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}


def make_trainer(
    engine: str,
    lora: bool = False,
    own_weak_model: bool = False,
    model: str | None = None,
    weak_model: str | None = None,
    sparing_load: bool = False,
    state_dict_type: str = "FULL_STATE_DICT",
    evaluate: bool = False,
    full_logits: bool = False,
    **options,
) -> WMSSTrainer:
    os.environ["FSDP_STATE_DICT_TYPE"] = state_dict_type
    wmss_trl.modeling.lm_head._head_problem = (lambda model: "of the test") if full_logits else head_problem
    torch.manual_seed(0)
    examples = sums(options.pop("num_examples", 37))
    tokenizer = build_tokenizer([example["prompt"] + example["completion"] for example in sums(37)], vocab_size=300)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2}
    model = model or build_model(tokenizer, **sizes)
    if own_weak_model:  # with layers of another class
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        weak_model = LlamaForCausalLM(config)
    args = WMSSConfig(
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **{
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "num_train_epochs": 2,
            "learning_rate": 0.001,
            "lr_scheduler_type": "constant",
        }
        | options,
    )
    if sparing_load and not PartialState().is_main_process:  # as `cpu_ram_efficient_loading` does on GPUs
        for parameter in [p for loaded in filter(None, (model, weak_model)) for p in loaded.parameters()]:
            parameter.data.fill_(float("nan"))
    if engine.startswith("zero3"):  # which keeps a model as small as this whole otherwise
        args.deepspeed_plugin.deepspeed_config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 1,
            "stage3_max_reuse_distance": 1,
            "stage3_prefetch_bucket_size": 0,
        }
    if engine == "fsdp2" and args.use_cpu:  # which Accelerate does not start on a CPU
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return WMSSTrainer(
        model,
        args,
        train_dataset=Dataset.from_list(examples),
        eval_dataset=Dataset.from_list(sums(8, seed=1)) if evaluate else None,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if lora else None,
        weak_model=weak_model,
    )


def check_engine_is_on(trainer: WMSSTrainer, engine: str, lora: bool) -> None:
    accelerator, model = trainer.accelerator, trainer.model
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", 1))
    name = engine.removesuffix("_offload")
    assert engine_name(accelerator) == ("replicated" if engine in ("one", "ddp") else name)
    wrapper = WRAPPERS[name].replace("Qwen3ForCausalLM", "PeftModel") if lora else WRAPPERS[name]
    wrapped = trainer.model_wrapped
    if trainer.args.torch_compile and name == "fsdp2":
        assert type(wrapped).__name__ == "FSDPOptimizedModule"
    else:
        assert type(getattr(wrapped, "_orig_mod", wrapped)).__name__ == wrapper
    assert is_sharded(model) == (name in ("fsdp2", "zero3"))
    weak = getattr(trainer.weak_reference, "model", model)  # there is none where only M0's entropies are needed
    assert is_sharded(weak) == is_sharded(model)
    if name == "zero3":
        assert all(in_zero3(parameter) for parameter in [*model.parameters(), *weak.parameters()])
    if name.startswith("zero"):
        assert trainer.deepspeed.zero_optimization_stage() == int(name[-1])
        assert (trainer.deepspeed.zero_cpu_offload()) == (name != engine)


def run(
    result: str, engine: str, resume: str | None = None, unsynchronised: bool = False, save: bool = False, **options
) -> None:
    trainer = make_trainer(engine, **options)
    if unsynchronised:  # the negative control: a weak branch that the engine does not know
        branch = trainer.model._modules.pop("weak_branch")
        optimizer = torch.optim.SGD(branch.parameters(), lr=0.5)
        step = trainer.training_step

        def training_step(*args, **kwargs):
            loss = step(*args, **kwargs)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        trainer.training_step = training_step
    visited, collate = [], trainer.data_collator
    if not options.get("packing"):
        trainer.data_collator = lambda rows: visited.append([row["input_ids"] for row in rows]) or collate(rows)
    trainer.train(resume_from_checkpoint=resume)
    check_engine_is_on(trainer, engine, options.get("lora", False))
    if save:
        trainer.save_model(trainer.args.output_dir)
    sampler, logs = trainer.curriculum_sampler, trainer.state.log_history
    last_epoch = visited[-len(trainer._active_dataloader) :]
    parameters = parameters_at_rest(trainer.model) | (
        {f"weak_branch.{name}": value for name, value in branch.named_parameters()} if unsynchronised else {}
    )
    weights = {}
    for name, parameter in sorted(parameters.items()):
        with gathered([parameter]):
            weights[name] = full_tensor(parameter.detach()).to("cpu", copy=True)
    np.savez(
        f"{result}.{trainer.accelerator.process_index}.npz",
        weights=torch.cat([value.float().flatten() for value in weights.values()]).numpy(),
        names=list(weights),
        sizes=[value.numel() for value in weights.values()],
        **{
            key: [entry[key] for entry in logs if key in entry]
            for key in ("loss", "mixed_nll", "num_tokens", "grad_norm", "eval_loss")
        },
        weak_entropy=sampler.weak_entropy,
        strong_entropy=sampler.strong_entropy,
        indices=sampler.indices,
        last_epoch=json.dumps([row for batch in last_epoch for row in batch]),
        active_set=json.dumps([trainer.train_dataset[int(i)]["input_ids"] for i in sampler.indices])
        if visited
        else "[]",
    )
    trainer.accelerator.wait_for_everyone()
    if trainer.is_deepspeed_enabled:
        trainer.deepspeed.destroy()


def main() -> None:
    torch.set_num_threads(1)
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled now
    try:
        for number, options in enumerate(json.loads(sys.argv[1])):
            run(f"{sys.argv[2]}.{number}", **options)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # gloo sometimes aborts while the interpreter shuts down, after all work is done


if __name__ == "__main__":
    main()
