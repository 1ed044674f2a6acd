import json
import math
import re
import weakref
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config

from wmss_trl.cli.main import main
from wmss_trl.estimate import (
    ENGINES,
    WEAK_REFERENCES,
    Hardware,
    ModelSize,
    Setup,
    activation_bytes,
    communication,
    communication_bound_from,
    compute,
    load_config,
    memory,
    times,
)
from wmss_trl.losses import linear_mixed_cross_entropy

# Two layers of 400 parameters, an untied embedding and LM head of 100 each (vocabulary 10, hidden 10)
SIZE = ModelSize(
    total=1000,
    layers=800,
    head=100,
    num_layers=2,
    hidden=10,
    intermediate=20,
    query=10,
    key_value=5,
    vocab=10,
    qk_norm=False,
    linear_features=50,
)
SMALL = replace(SIZE, total=500, layers=300, num_layers=1)


def tiny_config(cls=Qwen3Config, layers=2, tied=False):
    return cls(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=tied,
        use_cache=False,
    )


def num_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# Parameters with and without embeddings in billions, as the model cards (Qwen) and the checkpoints (Llama) state them
@pytest.mark.parametrize(
    ("preset", "total", "without_embeddings"),
    [
        ("qwen3-0.6b", 0.596, 0.44),
        ("qwen3-1.7b", 1.72, 1.4),
        ("qwen3-4b", 4.02, 3.6),
        ("qwen3-8b", 8.19, 6.95),
        ("qwen3-32b", 32.76, 31.2),
        ("llama-3-8b", 8.03, 6.98),
        ("llama-3-70b", 70.55, 68.45),
    ],
)
def test_parameters_are_the_published_ones(preset, total, without_embeddings):
    config = load_config(preset)
    size = ModelSize.from_config(config)
    assert size.total / 1e9 == pytest.approx(total, abs=0.006)
    embeddings = size.head * (1 if config.tie_word_embeddings else 2)
    assert (size.total - embeddings) / 1e9 == pytest.approx(without_embeddings, rel=0.01)
    assert size.total - embeddings - size.layers == config.hidden_size  # the final norm


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_account_of_a_tiny_model_is_that_of_its_tensors(tied, dtype):
    config = tiny_config(tied=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(16).view(1, -1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    account = memory(Setup(ModelSize.from_config(config), dtype=dtype, bf16=False, tokens=16))
    assert account.weights == num_bytes(model.parameters())
    assert account.gradients == num_bytes(parameter.grad for parameter in model.parameters())
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert account.optimizer == num_bytes(tensor for tensor in states if tensor.ndim)
    assert account.weak_model == account.lm_head_gather == account.engine_buffers == account.host == 0


def test_account_of_an_adapter_is_that_of_its_tensors():
    peft = pytest.importorskip("peft")
    config = tiny_config()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules="all-linear"))
    model.add_adapter("weak", peft.LoraConfig(r=3, target_modules="all-linear"))
    adapters = [[p for name, p in model.named_parameters() if f".{a}." in name] for a in ("default", "weak")]
    setup = Setup(ModelSize.from_config(config), weak="adapter", lora=3, dtype="bfloat16")
    account = memory(setup)
    assert setup.trained == sum(parameter.numel() for parameter in adapters[0])
    assert account.gradients == num_bytes(adapters[0])
    assert account.weak_model == num_bytes(adapters[1])
    assert account.weights + account.weak_model == num_bytes(model.parameters())


@pytest.mark.parametrize("cls", [Qwen3Config, LlamaConfig])
@pytest.mark.parametrize(("dtype", "autocast"), [("bfloat16", False), ("float32", False), ("float32", True)])
def test_activations_of_a_layer_are_those_that_autograd_keeps(cls, dtype, autocast):
    tokens = 256

    def kept(layers):
        model = AutoModelForCausalLM.from_config(tiny_config(cls, layers), dtype=getattr(torch, dtype)).train()
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage
            return tensor

        ids = torch.arange(tokens).view(1, -1) % 96
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            _hidden = model.base_model(input_ids=ids).last_hidden_state
            return sum(storage.nbytes() for storage in storages.values())

    def estimated(layers):
        account = memory(
            Setup(
                ModelSize.from_config(tiny_config(cls, layers)),
                dtype=dtype,
                bf16=autocast,
                tokens=tokens,
                activation_checkpointing=False,
            )
        )
        return account.activations + account.engine_buffers  # the latter: weights that autocast has cast

    assert kept(3) - kept(2) == pytest.approx(estimated(3) - estimated(2), rel=0.03)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that are there at once."""

    def __init__(self, tensors):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0
        for tensor in tensors:
            self.count(tensor)

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("dtype", "bf16"), [("float32", True), ("float32", False), ("bfloat16", False)])
def test_total_is_the_peak_of_a_step_with_accumulation(dtype, bf16, checkpointing):
    config, tokens = tiny_config(layers=4), 512
    strong, weak = (AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)) for _ in range(2))
    weak.requires_grad_(False).eval()
    if checkpointing:
        strong.train().gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(strong.parameters(), fused=True)
    ids = torch.arange(tokens).view(1, -1) % 96

    def step():
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                with torch.no_grad():
                    weak_hidden = weak.base_model(input_ids=ids).last_hidden_state[0].clone()
                hidden = strong.base_model(input_ids=ids).last_hidden_state[0].clone()
                heads = strong.lm_head.weight, weak.lm_head.weight
                loss = linear_mixed_cross_entropy(hidden, heads[0], weak_hidden, heads[1], ids[0], 0.5).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # after which the optimizer has its states
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    with LiveBytes([*strong.parameters(), *weak.parameters(), *states]) as live:
        step()
    setup = Setup(
        ModelSize.from_config(config),
        weak="model",
        tokens=tokens,
        activation_checkpointing=checkpointing,
        dtype=dtype,
        bf16=bf16,
    )
    assert memory(setup).total == pytest.approx(live.peak, rel=0.1)


class SentBytes(TorchDispatchMode):
    """Bytes of the whole tensors of collectives, by the name of the collective."""

    def __init__(self):
        super().__init__()
        self.sizes = {"allgather": 0, "reduce_scatter": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for name in self.sizes:
            if name in str(function):
                self.sizes[name] += max(num_bytes([x]) for x in tree_leaves(args) if isinstance(x, torch.Tensor))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tied", [False, True])
def test_fsdp2_shards_and_sends_what_is_estimated(tied):
    config, gpus = tiny_config(tied=tied), 4
    strong = AutoModelForCausalLM.from_config(config).train()
    weak = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    ids = torch.arange(16).view(1, -1)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        options = {
            "mesh": torch.distributed.init_device_mesh("cpu", (gpus,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
        }
        for model in (strong, weak):  # in the units of accelerate's `fsdp2_prepare_model`
            for layer in model.model.layers:
                fully_shard(layer, **options)
            if not tied:
                fully_shard(model.model.embed_tokens, **options)
            tail = [model.model.norm, *[model.model.embed_tokens] * tied, model.lm_head]
            fully_shard(tail, reshard_after_forward=False, **options)
            fully_shard(model, **options)
        optimizer = torch.optim.AdamW(strong.parameters(), foreach=False)
        # Before its forward, after which the LM head stays whole
        weak_bytes = num_bytes(parameter.to_local() for parameter in weak.parameters())
        with SentBytes() as weak_sent, torch.no_grad():
            weak(input_ids=ids)
        with SentBytes() as forward_sent:
            loss = strong(input_ids=ids).logits.sum()
        with SentBytes() as backward_sent:
            loss.backward()
        optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    setup = Setup(ModelSize.from_config(config), gpus, "fsdp2", "model")
    whole = {name: size * gpus // (gpus - 1) for name, size in communication(setup).items()}
    norm = 2 * config.hidden_size  # the final norm is gathered with the LM head, once
    assert forward_sent.sizes == {"allgather": whole["gather_forward"], "reduce_scatter": 0}
    assert backward_sent.sizes == {"allgather": whole["gather_backward"] - norm, "reduce_scatter": whole["reduce"]}
    assert weak_sent.sizes == {"allgather": whole["weak_model"], "reduce_scatter": 0}
    account = memory(setup)
    assert account.weights == num_bytes(parameter.to_local() for parameter in strong.parameters())
    assert account.weak_model == weak_bytes
    assert account.gradients == num_bytes(parameter.grad.to_local() for parameter in strong.parameters())
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert account.optimizer == num_bytes(tensor.to_local() for tensor in states if tensor.ndim)


def test_activations_by_hand():
    # One layer of a token: 2 x (10 + 10 + 5 + 5 + 80) in the products, 2 x (4 + 2 + 2) x 10 in the norms
    layer, edges = 380, (4 + 3 * 2) * 10
    setup = Setup(SIZE, engine="zero2", tokens=7, activation_checkpointing=False)
    assert activation_bytes(setup) == 7 * (2 * layer + edges)
    setup = replace(setup, activation_checkpointing=True)
    assert activation_bytes(setup) == 7 * (2 * 2 * 10 + layer + edges)
    assert activation_bytes(replace(setup, weak="model")) == 7 * (2 * 2 * 10 + layer + edges + 2 * 10)
    joint = replace(setup, weak="joint", weak_model=SMALL)
    assert activation_bytes(joint) == 7 * (2 * 2 * 10 + 2 * 10 + layer + edges + 2 * 10)


FULL = {"gpus": 4, "dtype": "bfloat16"}
LORA = FULL | {"lora": 2}  # 2 x 50 = 100 trained parameters
GATHER = {"lm_head_gather": 100 * 2 + 100 * 4, "engine_buffers": 2 * 400 * 2 + 400 * 2}
# All layers are fewer than the weights that ZeRO-3 may keep; the bucket of gradients has 500 million numbers
ZERO3 = GATHER | {"engine_buffers": 800 * 2 + 400 * 2 + 1_000_000_000}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # weights, gradients, optimizer, weak model
        ({"engine": "ddp"}, ((2000, 2000, 4000, 0), {"lm_head_gather": 0, "engine_buffers": 2000})),
        ({"engine": "fsdp2"}, ((1000, 1000, 2000, 0), GATHER)),
        ({"engine": "fsdp2", "bf16": False}, ((500, 500, 1000, 0), GATHER)),
        ({"engine": "zero2"}, ((2000, 500, 3000, 0), {"lm_head_gather": 0, "engine_buffers": 1_000_000_800})),
        ({"engine": "zero2", "bf16": False}, ((4000, 1000, 3000, 0), {})),
        ({"engine": "zero3"}, ((500, 500, 3000, 0), ZERO3)),
        ({"engine": "zero3", "bf16": False}, ((1000, 1000, 3000, 0), {})),
        ({"engine": "zero3_offload"}, ((0, 0, 0, 0), ZERO3 | {"host": 500 + 500 + 3000 + 1000})),
        ({"engine": "ddp", "weak": "model"}, ((2000, 2000, 4000, 2000), {})),
        ({"engine": "fsdp2", "weak": "model"}, ((1000, 1000, 2000, 500), {"lm_head_gather": 800})),
        ({"engine": "fsdp2", "weak": "model", "dtype": "float32"}, ((1000, 1000, 2000, 1000), {})),
        ({"engine": "fsdp2", "weak": "model", "weak_model": SMALL}, ((1000, 1000, 2000, 250), {})),
        ({"engine": "zero3", "weak": "model"}, ((500, 500, 3000, 500), {"lm_head_gather": 800})),
        ({"engine": "zero2", "weak": "model"}, ((2000, 500, 3000, 2000), {})),
        ({"engine": "zero3_offload", "weak": "model"}, ((0, 0, 0, 0), {"host": 5500})),
        ({"engine": "ddp", "weak": "cached"}, ((2000, 2000, 4000, 200), {})),
        ({"engine": "fsdp2", "weak": "cached"}, ((1000, 1000, 2000, 500), {"lm_head_gather": 800})),
        ({"engine": "fsdp2", "weak": "joint"}, ((1000, 2000, 4000, 1000), {"lm_head_gather": 1200})),
        ({"engine": "zero3", "weak": "joint"}, ((500, 1000, 6000, 500), {})),
        ({"engine": "ddp", "lora": 2}, ((2000 + 400, 400, 800, 0), {"engine_buffers": 400})),
        ({"engine": "fsdp2", "lora": 2}, ((600, 100, 200, 0), {"lm_head_gather": 200, "engine_buffers": 1700})),
        ({"engine": "zero3", "lora": 2}, ((550, 50, 300, 0), {"lm_head_gather": 200})),
        ({"engine": "fsdp2", "lora": 2, "weak": "adapter-off"}, ((600, 100, 200, 0), {"lm_head_gather": 200})),
        ({"engine": "fsdp2", "lora": 2, "weak": "adapter"}, ((600, 100, 200, 100), {"lm_head_gather": 200})),
        ({"engine": "fsdp2", "lora": 2, "weak": "cached"}, ((600, 100, 200, 0), {"lm_head_gather": 200})),
        ({"engine": "fsdp2", "lora": 2, "weak": "joint"}, ((600, 200, 400, 100), {"lm_head_gather": 200})),
        ({"engine": "fsdp2", "lora": 2, "weak": "model"}, ((600, 100, 200, 500), {"lm_head_gather": 400})),
        # 1,000 parameters over 7 GPUs: 142.9 each
        ({"engine": "zero3", "gpus": 7}, ((286, 286, 1715, 0), {})),
        # bf16 copies under autocast: of all layers and the head, of two heads, of one layer and the head
        ({"engine": "ddp", "dtype": "float32"}, ((4000, 4000, 8000, 0), {"engine_buffers": 4000 + 1800})),
        ({"engine": "ddp", "dtype": "float32", "weak": "model"}, ((4000, 4000, 8000, 4000), {"engine_buffers": 6000})),
        ({"engine": "ddp", "dtype": "float32", "lora": 2}, ((4400, 400, 800, 0), {"engine_buffers": 400 + 1000})),
    ],
    ids=str,
)
def test_accounts_by_hand(options, expected):
    (weights, gradients, optimizer, weak_model), others = expected
    account = asdict(memory(Setup(SIZE, **FULL | options)))
    expected = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "weak_model": weak_model} | others
    assert {name: account[name] for name in expected} == expected


def test_logits_buffer_and_total():
    account = memory(Setup(SIZE, weak="model", tokens=3))
    assert account.logits_buffer == 2 * 3 * 10 * 2  # two bfloat16 tiles of all logits
    assert account.total == sum(asdict(account).values()) - account.host
    large = replace(SIZE, vocab=200_000)
    assert memory(Setup(large, weak="model", logits_buffer_mb=100)).logits_buffer == 100 * 2**20
    assert memory(Setup(large, weak="none")).logits_buffer == 4096 * 32_768 * 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1878 * 200_000 * 2),  # a third of 4096 rows in blocks of 128, and a third of that for the weak logits
        ({"bf16": False}, 1878 * 200_000 * 4),
        ({"weak": "joint"}, 2 * 1408 * 200_000 * 2),
        ({"tokens": 100_000}, 5 * 2**30),  # a sixteenth of 80 GiB
        ({"tokens": 900}, 2**28),
    ],
)
def test_logits_buffer_is_that_of_a_run_on_a_gpu(options, expected):
    setup = Setup(replace(SIZE, vocab=200_000), **{"weak": "model"} | options)
    assert memory(setup).logits_buffer == expected


@pytest.mark.parametrize(
    ("weak", "lora"),
    [(weak, lora) for weak in WEAK_REFERENCES for lora in (None, 2) if lora or not weak.startswith("adapter")],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_more_gpus_never_need_more_memory(engine, weak, lora):
    first = 1 if engine == "ddp" else 0  # DDP has buckets only from two on
    accounts = [asdict(memory(Setup(SIZE, 2**power, engine, weak, lora=lora))) for power in range(first, 10)]
    for fewer, more in pairwise(accounts):
        assert all(more[name] <= fewer[name] for name in fewer)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Times 3/4: gather forward, gather backward, reduce, gather updated, weak
        ({"engine": "ddp"}, (0, 0, 2 * 2000, 0, 0)),
        ({"engine": "ddp", "dtype": "float32"}, (0, 0, 2 * 4000, 0, 0)),
        ({"engine": "ddp", "weak": "model"}, (0, 0, 2 * 2000, 0, 0)),
        ({"engine": "ddp", "weak": "joint"}, (0, 0, 2 * 2000, 0, 2 * 2000)),
        ({"engine": "zero2"}, (0, 0, 2 * 2000, 2000, 0)),
        ({"engine": "zero2", "weak": "model"}, (0, 0, 2 * 2000, 2000, 0)),
        ({"engine": "fsdp2"}, (2000, 1800, 2000, 0, 0)),
        ({"engine": "zero3"}, (2000, 1800, 2000, 0, 0)),
        ({"engine": "fsdp2", "weak": "model"}, (2000, 1800, 2000, 0, 2000)),
        ({"engine": "fsdp2", "weak": "model", "weak_model": SMALL}, (2000, 1800, 2000, 0, 1000)),
        ({"engine": "fsdp2", "weak": "cached"}, (2000, 1800, 2000, 0, 200)),
        ({"engine": "zero3", "weak": "joint"}, (2000, 1800, 2000, 0, 5800)),
        ({"engine": "ddp", "lora": 2, "weak": "adapter-off"}, (0, 0, 2 * 400, 0, 0)),
        ({"engine": "fsdp2", "lora": 2}, (2200, 2000, 200, 0, 0)),
        ({"engine": "fsdp2", "lora": 2, "weak": "adapter-off"}, (2200, 2000, 200, 0, 2000)),
        ({"engine": "fsdp2", "lora": 2, "weak": "adapter"}, (2200, 2000, 200, 0, 2200)),
        ({"engine": "fsdp2", "lora": 2, "weak": "cached"}, (2200, 2000, 200, 0, 0)),
        ({"engine": "fsdp2", "lora": 2, "weak": "joint"}, (2200, 2000, 200, 0, 4400)),
    ],
    ids=str,
)
def test_communication_by_hand(options, expected):
    setup = Setup(SIZE, **FULL | options)
    assert [*communication(setup).values()] == [size * 3 // 4 for size in expected]
    assert not any(communication(replace(setup, gpus=1)).values())


def test_compute_by_hand():
    # A forward of 10 tokens in examples of 5: 2 FLOPs per token and parameter, and 2 x 5 x 10 per layer for attention
    layers = 10 * (2 * 800 + 2 * 2 * 5 * 10)
    forward = layers + 10 * 2 * 100
    options = {"tokens": 10, "length": 5}
    setup = Setup(SIZE, **options)
    assert compute(setup) == {
        "strong": 3 * forward + layers,
        "weak": 0,
        "scoring_first": 0,
        "scoring_later": 0,
    }
    setup = replace(setup, activation_checkpointing=False)
    assert compute(setup)["strong"] == 3 * forward
    expected = {"strong": 3 * forward, "weak": forward, "scoring_first": 2 * forward, "scoring_later": forward}
    assert compute(replace(setup, weak="model")) == expected
    assert compute(replace(setup, weak="cached")) == expected | {"weak": 2 * 10 * 100}
    assert compute(replace(setup, weak="joint")) == expected | {"weak": 3 * forward, "scoring_later": 2 * forward}
    adapter = 6 * 10 * 100
    expected["strong"] = 2 * forward + adapter
    assert compute(replace(setup, lora=2, weak="adapter-off")) == expected


def test_times_by_hand():
    setup = Setup(SIZE, gpus=4, engine="fsdp2", weak="model", activation_checkpointing=False)
    forward = compute(setup)["weak"]
    # 1 s per forward; a step sends 3/4 of 7800 bytes, SFT 3/4 of 5800, and scoring 3/4 of 2000 per model
    hardware = Hardware(peak_flops=2 * forward, mfu=0.5, node_bandwidth=7800 * 0.75, network_bandwidth=7800 * 0.75 / 8)
    estimate = times(setup, hardware, active_fraction=0.5)
    assert estimate["compute"] == pytest.approx(4)
    assert estimate["communication"] == pytest.approx(1)
    assert estimate["serial"] == pytest.approx(5)
    assert estimate["overlapped"] == pytest.approx(4)
    assert estimate["scoring_share_first"] == pytest.approx(2 / (2 + 0.5 * 4))
    assert estimate["scoring_share_later"] == pytest.approx(1 / (1 + 0.5 * 4))
    assert estimate["epoch_ratio_first"] == pytest.approx((2 + 0.5 * 4) / 3)
    assert estimate["epoch_ratio_later"] == pytest.approx((1 + 0.5 * 4) / 3)
    # More than a node: 8 times slower, and 15/16 instead of 3/4 of the bytes
    slow = times(replace(setup, gpus=16), hardware, active_fraction=0.5)
    step, sft, gather = (10 * size / 7800 for size in (7800, 5800, 2000))
    assert slow["communication"] == slow["overlapped"] == pytest.approx(step, rel=1e-3)  # whole bytes
    assert slow["epoch_ratio_first"] == pytest.approx((2 * gather + 0.5 * step) / sft, rel=1e-3)
    assert slow["epoch_ratio_later"] == pytest.approx((gather + 0.5 * step) / sft, rel=1e-3)
    assert communication_bound_from(setup, hardware) == 16
    assert communication_bound_from(setup, replace(hardware, network_bandwidth=1e9)) is None
    sft = times(replace(setup, weak="none"), hardware)
    assert sft["scoring_share_first"] == 0
    assert sft["epoch_ratio_first"] == sft["epoch_ratio_later"] == 1


def test_scoring_of_a_cached_weak_model_gathers_all_of_it_once():
    setup = Setup(SIZE, gpus=4, engine="fsdp2", weak="cached")
    hardware = Hardware(peak_flops=1e30, node_bandwidth=0.75)  # seconds are bytes before the factor 3/4
    estimate = times(setup, hardware, active_fraction=1.0)
    assert estimate["overlapped"] == pytest.approx(6000)
    assert estimate["epoch_ratio_first"] == pytest.approx((4000 + 6000) / 5800)
    assert estimate["epoch_ratio_later"] == pytest.approx((2000 + 6000) / 5800)
    # Forwards of twice the tokens need half of the gathers
    estimate = times(replace(setup, tokens=10, scoring_tokens=20), hardware, active_fraction=1.0)
    assert estimate["epoch_ratio_first"] == pytest.approx((4000 / 2 + 6000) / 5800)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "fsdp"}, "`engine='fsdp'` is unknown. Use one of ddp, fsdp2"),
        ({"weak": "own"}, "`weak='own'` is unknown. Use one of none, model"),
        ({"dtype": "float16"}, "`dtype='float16'` is unknown"),
        ({"gpus": 0}, "`gpus=0` must be at least 1"),
        ({"lora": 0}, "`lora=0` must be at least 1"),
        ({"tokens": 5, "length": 6}, "`length=6` is more than `tokens=5`. Raise `tokens`"),
        ({"weak": "adapter-off"}, "`weak='adapter-off'` needs an adapter. Set `lora`"),
        ({"weak": "none", "weak_model": SMALL}, "`weak_model` is not used with `weak='none'`"),
        ({"weak": "cached", "lora": 1, "weak_model": SMALL}, "`weak_model` is not used with `weak='cached'`"),
        ({"weak": "model", "weak_model": replace(SMALL, vocab=11)}, "vocabulary of 11 tokens and `model` one of 10"),
    ],
)
def test_bad_setups(options, message):
    with pytest.raises(ValueError, match=message):
        Setup(SIZE, **options)


def test_bad_models_and_hardware(tmp_path):
    with pytest.raises(ValueError, match=r"is neither a preset \(qwen3-0.6b, .*\) nor the folder or hub id"):
        load_config(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="mixture of experts"):
        ModelSize.from_config(MixtralConfig())
    with pytest.raises(ValueError, match=r"`mfu=1\.5` must be positive"):
        Hardware(mfu=1.5)


def run(capsys, *arguments):
    main(["estimate", *map(str, arguments)])
    tables = capsys.readouterr().out.strip().split("\n\n")
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()] for table in tables]


def test_command(capsys, tmp_path):
    file = tmp_path / "estimate.json"
    options = ["--gpus", 8, 64, "--engine", "ddp", "fsdp2", "--weak", "none", "model", "--json", file]
    tables = run(capsys, "--model", "llama-3-8b", *options)
    assert len(tables) == 3
    rows = [line[:3] for line in tables[0][2:]]
    combinations = [(engine, weak, gpus) for engine in ("ddp", "fsdp2") for weak in ("none", "model") for gpus in "86"]
    assert [(engine, weak, gpus[0]) for engine, weak, gpus in rows] == combinations
    memory_row = dict(zip(tables[0][0], tables[0][-2], strict=True))  # fsdp2, model, 8 GPUs
    parameters = 8_030_261_248
    assert memory_row["optimizer"] == f"{parameters * 8 / 8 / 2**30:.2f}"
    communication_row = dict(zip(tables[1][0], tables[1][-2], strict=True))
    assert communication_row["weak model"] == f"{parameters * 2 * 7 / 8 / 2**30:.2f}"
    assert communication_row["weak"] == "model"
    saved = json.loads(file.read_text())["rows"]
    assert len(saved) == 8
    assert saved[-2]["memory"]["optimizer"] == math.ceil(parameters * 8 / 8)


def test_command_with_a_folder_an_adapter_and_one_table(capsys, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    options = ["--gpus", 1, "--engine", "ddp", "--weak", "adapter-off", "--lora", 4, "--tables", "memory"]
    (short,) = run(capsys, "--model", tmp_path, *options)
    (long,) = run(capsys, "--model", tmp_path, *options, "--tokens", 1_000_000)
    (kept,) = run(capsys, "--model", tmp_path, *options, "--tokens", 1_000_000, "--no-activation-checkpointing")
    activations = [float(dict(zip(table[0], table[2], strict=True))["activations"]) for table in (short, long, kept)]
    assert activations[0] < activations[1] < activations[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weak", "adapter"], "`weak='adapter'` needs an adapter"),
        (["--tables", "speed"], "`tables` has 'speed', which is unknown. Use any of memory"),
        (["--active_fraction", "0"], "`active_fraction=0.0` must be in"),
    ],
)
def test_bad_commands(options, message):
    with pytest.raises(ValueError, match=message):
        main(["estimate", "--model", "qwen3-0.6b", *options])


@pytest.mark.parametrize(("page", "num_tables"), [("README.md", 0), ("docs/multi_gpu.md", 1), ("docs/scaling.md", 3)])
def test_commands_and_tables_of_the_documentation(capsys, page, num_tables):
    text = (Path(__file__).parents[1] / page).read_text()
    examples = re.findall(r"^wmss-trl (estimate .*)\n(?:```\n\n((?:\|.*\n)+))?", text, re.MULTILINE)
    for command, table in examples:
        main(command.split())
        output = capsys.readouterr().out
        assert output.startswith("| engine | weak | GPUs |"), command
        assert table in ("", output), command
    # No table of estimates stands there without its command, or without these words
    assert sum(table != "" for _, table in examples) == text.count("| engine | weak | GPUs |") == num_tables
    assert num_tables == 0 or "estimated, not measured" in text
