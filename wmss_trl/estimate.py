"""
Memory, communication and time of a training step, estimated from a model's shape: WMSS against SFT on many GPUs.

Bytes of weights, gradients and optimizer states follow from what the engines allocate (checked with accelerate 1.15,
DeepSpeed 0.19.8 and PyTorch 2.13); activations and times are estimates.
"""

from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

ENGINES = ("ddp", "fsdp2", "zero2", "zero3", "zero3_offload")
WEAK_REFERENCES = ("none", "model", "adapter-off", "adapter", "cached", "joint")
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# What TRL 1.16's fused head holds of the logits in SFT: tokens, vocabulary
_TRL_TILE = (4096, 32_768)
# DeepSpeed's defaults, in numbers: `reduce_bucket_size`, `stage3_max_live_parameters` (of which it keeps what it needs
# again soon)
_ZERO_BUCKET, _ZERO_LIVE = 500_000_000, 1_000_000_000

_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Published shapes, in the order of _SHAPE, and whether the embeddings are tied; all have 8 key-value heads of size 128
PRESETS = {
    "qwen3-0.6b": (1024, 3072, 28, 16, 151_936, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 151_936, True),
    "qwen3-4b": (2560, 9728, 36, 32, 151_936, True),
    "qwen3-8b": (4096, 12_288, 36, 32, 151_936, False),
    "qwen3-32b": (5120, 25_600, 64, 64, 151_936, False),
    "llama-3-8b": (4096, 14_336, 32, 32, 128_256, False),
    "llama-3-70b": (8192, 28_672, 80, 64, 128_256, False),
}


def load_config(model: str) -> PreTrainedConfig:
    """Configuration of a preset (built here, nothing is downloaded), of a folder or of a model on the Hub."""
    if model in PRESETS:
        *shape, tied = PRESETS[model]
        cls = Qwen3Config if model.startswith("qwen3") else LlamaConfig
        shape = dict(zip(_SHAPE, shape, strict=True))
        return cls(**shape, num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model={model!r}` is neither a preset ({', '.join(PRESETS)}) nor the folder or hub id of a model. Use "
            "one of these."
        ) from error


@dataclass(frozen=True)
class ModelSize:
    """
    What the estimates need to know of a model. Parameters are counted, each once.

    Args:
        total, layers, head (`int`):
            Parameters of the whole model, of all decoder layers, and of the LM head. A tied head is the embedding.
        num_layers, hidden, intermediate, query, key_value, vocab (`int`):
            Number of layers, and widths of hidden states, MLP, queries (all heads), keys (all heads) and logits.
        qk_norm (`bool`):
            Whether queries and keys are normalised, as in Qwen3.
        linear_features (`int`):
            Inputs plus outputs of the linear layers, summed over those of the decoder layers.
    """

    total: int
    layers: int
    head: int
    num_layers: int
    hidden: int
    intermediate: int
    query: int
    key_value: int
    vocab: int
    qk_norm: bool
    linear_features: int

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> "ModelSize":
        """Count the parameters of a dense decoder by building it on the meta device."""
        if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            raise ValueError(
                f"`model` is a mixture of experts ({config.model_type}), which activates only some of its parameters. "
                "The estimates are for dense decoders: use one of these."
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers = next(module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return cls(
            total=sum(parameter.numel() for parameter in model.parameters()),
            layers=sum(parameter.numel() for parameter in layers.parameters()),
            head=model.get_output_embeddings().weight.numel(),
            num_layers=len(layers),
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            query=config.num_attention_heads * head_dim,
            key_value=key_value_heads * head_dim,
            vocab=config.vocab_size,
            qk_norm=any(name.endswith("q_norm") for name, _ in layers.named_modules()),
            linear_features=sum(sum(m.weight.shape) for m in layers.modules() if isinstance(m, nn.Linear)),
        )

    def forward_flops(self, tokens: int, length: int) -> int:
        """FLOPs of a forward over `tokens` tokens in examples of `length`: 2 per parameter of the matrix products
        (Kaplan et al., arXiv 2001.08361), and causal attention, which sees half of the example on average."""
        return 2 * tokens * (self.layers + self.head + length * self.query * self.num_layers)


@dataclass(frozen=True)
class Setup:
    """
    One way of training.

    Args:
        model ([`ModelSize`]):
            The strong model.
        gpus (`int`, *optional*, defaults to `1`):
            Number of GPUs, over all of which a sharded engine shards.
        engine (`str`, *optional*, defaults to `"ddp"`):
            `"ddp"`, `"fsdp2"`, `"zero2"`, `"zero3"`, or `"zero3_offload"` with parameters and optimizer in CPU memory.
        weak (`str`, *optional*, defaults to `"none"`):
            Where weak logits come from: `"none"` is SFT, `"model"` a frozen model of its own, `"adapter-off"` the base
            of a LoRA adapter, `"adapter"` a second, frozen adapter, `"cached"` hidden states on disk, and `"joint"` a
            weak model (with LoRA an adapter) that is trained too.
        weak_model ([`ModelSize`], *optional*):
            A weak model of its own. Defaults to the size of `model`.
        lora (`int`, *optional*):
            Rank of a LoRA adapter on all linear layers; `None` trains all parameters.
        tokens (`int`, *optional*, defaults to `4096`):
            Tokens per GPU and step: micro-batch size times length.
        length (`int`, *optional*):
            Tokens per example. Defaults to `tokens`.
        scoring_tokens (`int`, *optional*):
            Tokens per GPU in a forward pass of the scoring, which keeps no activations. Defaults to `tokens`.
        activation_checkpointing (`bool`, *optional*, defaults to `True`):
            TRL's default.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype in which models are loaded. TRL loads by name in float32; a model handed in keeps its own.
        bf16 (`bool`, *optional*, defaults to `True`):
            Mixed precision in bfloat16, TRL's default.
        logits_buffer_mb (`int`, *optional*, defaults to `256`):
            See [`WMSSConfig`].
    """

    model: ModelSize
    gpus: int = 1
    engine: str = "ddp"
    weak: str = "none"
    weak_model: ModelSize | None = None
    lora: int | None = None
    tokens: int = 4096
    length: int | None = None
    scoring_tokens: int | None = None
    activation_checkpointing: bool = True
    dtype: str = "float32"
    bf16: bool = True
    logits_buffer_mb: int = 256

    def __post_init__(self):
        choices = {"engine": ENGINES, "weak": WEAK_REFERENCES, "dtype": tuple(_DTYPE_BYTES)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is unknown. Use one of {', '.join(allowed)}.")
        for name in ("gpus", "lora", "tokens", "length", "scoring_tokens", "logits_buffer_mb"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}={value}` must be at least 1. Raise it.")
        if (self.length or 0) > self.tokens:
            raise ValueError(f"`length={self.length}` is more than `tokens={self.tokens}`. Raise `tokens` to it.")
        if self.lora is None and self.weak in ("adapter-off", "adapter"):
            raise ValueError(f"`weak={self.weak!r}` needs an adapter. Set `lora` to its rank, or use `weak='model'`.")
        if self.weak_model is not None and (self.weak not in ("model", "cached", "joint") or self.shares_base):
            raise ValueError(
                f"`weak_model` is not used with `weak={self.weak!r}` and `lora={self.lora}`. Remove it, or use "
                "`weak='model'`."
            )
        if self.weak_model is not None and self.weak_model.vocab != self.model.vocab:
            raise ValueError(
                f"`weak_model` has a vocabulary of {self.weak_model.vocab} tokens and `model` one of "
                f"{self.model.vocab}: their logits cannot be mixed. Use a model with the same tokenizer."
            )

    @property
    def shares_base(self) -> bool:
        """Whether the weak logits come from the strong model's own base."""
        return self.lora is not None and self.weak != "model"

    @property
    def sharded(self) -> bool:
        """Whether the weights are split over the GPUs."""
        return self.engine in ("fsdp2", "zero3", "zero3_offload")

    @property
    def deepspeed(self) -> bool:
        return self.engine.startswith("zero")

    @property
    def weak_size(self) -> ModelSize:
        return self.weak_model or self.model

    @property
    def compute_bytes(self) -> int:
        """Bytes per number in matrix products and in gathered weights; DeepSpeed without bf16 trains in float32."""
        if self.bf16:
            return 2
        return 4 if self.deepspeed else _DTYPE_BYTES[self.dtype]

    @property
    def trained_bytes(self) -> int:
        """Bytes per trained weight: FSDP2 upcasts them to float32 (accelerate), DeepSpeed casts the model to bf16 and
        keeps its float32 copy with the optimizer, PEFT makes adapters float32."""
        if self.deepspeed:
            return self.compute_bytes
        return 4 if self.lora or (self.engine == "fsdp2" and self.bf16) else _DTYPE_BYTES[self.dtype]

    @property
    def frozen_bytes(self) -> int:
        """Bytes per frozen weight: as it was loaded, but DeepSpeed casts it too."""
        return self.compute_bytes if self.deepspeed else _DTYPE_BYTES[self.dtype]

    @property
    def stream_bytes(self) -> int:
        """Bytes per number between layers: under autocast alone, that of the weights."""
        return _DTYPE_BYTES[self.dtype] if self.engine == "ddp" else self.compute_bytes

    @property
    def trained(self) -> int:
        """Trained parameters of the strong model."""
        return self.model.total if self.lora is None else self.lora * self.model.linear_features

    @property
    def weak_trained(self) -> int:
        """Trained parameters of the weak model."""
        if self.weak != "joint":
            return 0
        return self.trained if self.lora else self.weak_size.total


@dataclass(frozen=True)
class Memory:
    """
    Bytes per GPU that can be there at once, as at the end of a forward pass with accumulated gradients.

    Args:
        weights, gradients, optimizer (`int`):
            Of what is trained, and of the frozen base of an adapter; `weights` without the weak model's. `optimizer`
            holds the two moments of AdamW and, with DeepSpeed, its float32 copy of the weights.
        weak_model (`int`):
            Weights of the weak model.
        lm_head_gather (`int`):
            The whole LM heads that a sharded engine gathers for the loss, and their whole float32 gradients.
        engine_buffers (`int`):
            DDP's or DeepSpeed's buckets; gathered weights of two layers (ZeRO-3: up to 1e9) and whole gradients of
            one; bf16 copies of float32 weights that autocast keeps.
        logits_buffer (`int`):
            Tiles of logits.
        activations (`int`):
            See [`activation_bytes`].
        host (`int`):
            Bytes of CPU memory per GPU.
    """

    weights: int
    gradients: int
    optimizer: int
    weak_model: int
    lm_head_gather: int
    engine_buffers: int
    logits_buffer: int
    activations: int
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(value for name, value in asdict(self).items() if name != "host")


def activation_bytes(setup: Setup) -> int:
    """
    Bytes of activations per GPU that the backward pass needs.

    The count of Korthikanti et al. (arXiv 2205.05198) for decoders as transformers 5.23 writes them: no stored
    attention matrix (SDPA or Flash attention), grouped queries, a gated MLP, RMSNorm in float32. Per token and layer,
    with c bytes in matrix products and s between layers: `c (2 query + 2 key_value + 4 intermediate)`, for each of the
    two norms `(4 + s + c) hidden`, and for norms of queries and keys `(4 + c) (query + key_value)`. If s and c differ,
    each linear layer keeps its own cast input. With checkpointing each layer keeps its input, and one layer is
    recomputed at a time. Adapters' own activations are not counted.
    """

    def layer(size: ModelSize) -> int:
        inputs = 2 * c if c == s else 5 * c
        norms = (2 * (4 + s) + inputs) * size.hidden
        if size.qk_norm:
            norms += (4 + c) * (size.query + size.key_value)
        return norms + c * (2 * size.query + 2 * size.key_value + 4 * size.intermediate)

    c, s = setup.compute_bytes, setup.stream_bytes
    # Final norm; the hidden states of the loss, with their gradients; those of a weak model
    per_token = (4 + 3 * s) * setup.model.hidden + (c * setup.weak_size.hidden if setup.weak != "none" else 0)
    branches = [setup.model] + [setup.weak_size] * (setup.weak == "joint")
    if setup.activation_checkpointing:
        per_token += sum(s * size.hidden * size.num_layers for size in branches) + max(map(layer, branches))
    else:
        per_token += sum(size.num_layers * layer(size) for size in branches)
    return setup.tokens * per_token


def memory(setup: Setup) -> Memory:
    """Account of the memory of one GPU. Parts of a sharded tensor are rounded up."""
    model, weak = setup.model, setup.weak_size
    c, trained_bytes, frozen_bytes = setup.compute_bytes, setup.trained_bytes, setup.frozen_bytes
    trained = setup.trained + setup.weak_trained
    full = setup.lora is None

    def part(size: int, split: bool) -> int:
        return -(-size // setup.gpus) if split else size

    optimizer_bytes = 2 * trained_bytes
    if setup.deepspeed:  # a float32 copy of the weights too, even of float32 ones
        optimizer_bytes = 12
    weights = setup.trained * trained_bytes + (0 if full else model.total * frozen_bytes)
    weak_weights = {
        "model": weak.total * frozen_bytes,
        "adapter": setup.trained * trained_bytes,
        # The trainer releases the other layers only where they are whole
        "cached": 0 if setup.shares_base else (weak.total if setup.sharded else weak.head) * frozen_bytes,
        "joint": setup.weak_trained * trained_bytes,
    }.get(setup.weak, 0)
    owned = {
        "weights": part(weights, setup.sharded),
        "gradients": part(trained * trained_bytes, setup.engine != "ddp"),
        "optimizer": part(trained * optimizer_bytes, setup.engine != "ddp"),
        "weak_model": part(weak_weights, setup.sharded),
    }
    host = 0
    if setup.engine == "zero3_offload":  # with the optimizer on the CPU, the float32 gradients stay allocated
        host = sum(owned.values()) + part(4 * trained, True) * setup.bf16
        owned = dict.fromkeys(owned, 0)

    own_head = setup.weak in ("model", "cached", "joint") and not setup.shares_base
    heads = model.head + weak.head * own_head
    trained_heads = full * (model.head + weak.head * (setup.weak == "joint"))
    sizes = [model] + [weak] * own_head
    largest_layer = max(-(-size.layers // size.num_layers) for size in sizes)
    trained_layer = largest_layer if full else -(-trained // model.num_layers)
    gather = buffers = 0
    if setup.sharded:
        gather = heads * c + trained_heads * 4
        live = 2 * largest_layer
        if setup.deepspeed:
            live = max(live, min(model.layers, _ZERO_LIVE))
        buffers = (live + trained_layer) * c
    elif setup.engine == "zero2":
        buffers = trained_layer * c
    elif setup.gpus > 1:
        buffers = trained * trained_bytes
    if setup.deepspeed:
        buffers += _ZERO_BUCKET * c
    if setup.engine == "ddp" and c < _DTYPE_BYTES[setup.dtype]:
        if full:
            cast = model.layers + (weak.layers if setup.weak == "joint" else 0)
        else:  # the cache of autocast is for trained weights, but each linear layer keeps what it has multiplied with
            cast = largest_layer if setup.activation_checkpointing else model.layers
        buffers += (cast + heads) * c

    if setup.weak == "none":
        logits = 4 * min(setup.tokens, _TRL_TILE[0]) * min(model.vocab, _TRL_TILE[1])
    else:  # a tile of either model's logits in float32
        logits = min(setup.logits_buffer_mb * 2**20, 8 * setup.tokens * model.vocab)
    return Memory(
        **owned,
        lm_head_gather=gather,
        engine_buffers=buffers,
        logits_buffer=logits,
        activations=activation_bytes(setup),
        host=host,
    )


def communication(setup: Setup) -> dict[str, int]:
    """
    Bytes that a GPU sends (and receives) in an optimizer step of one micro-batch, by ring collectives over n GPUs:
    `(n - 1) / n` of the tensor for an all-gather or a reduce-scatter, twice that for an all-reduce.

    Returns:
        `dict[str, int]`: `gather_forward` and `gather_backward` of the strong model's weights (the LM head is gathered
        once), `reduce` of its gradients (a reduce-scatter, or an all-reduce with DDP and, by its default in DeepSpeed
        0.19, ZeRO-2), `gather_updated` of ZeRO-2's new weights, and `weak_model`, what the weak model adds.
    """

    def strategy(weights: int, head: int, trained: int) -> tuple[int, int, int, int]:
        if setup.sharded:
            return weights * c, (weights - head) * c, trained * c, 0
        if setup.engine == "zero2":
            return 0, 0, 2 * trained * c, trained * c
        return 0, 0, 2 * trained * setup.trained_bytes, 0

    c, model, weak = setup.compute_bytes, setup.model, setup.weak_size
    adapter = 0 if setup.lora is None else setup.trained
    added = 0
    if setup.weak == "joint":
        added = sum(strategy(weak.total + adapter, weak.head, setup.weak_trained))
    elif setup.sharded:
        cached = 0 if setup.shares_base else weak.head
        forward = {"none": 0, "cached": cached, "adapter": weak.total + adapter}
        added = c * forward.get(setup.weak, weak.total)
    values = (*strategy(model.total + adapter, model.head, setup.trained), added)
    names = ("gather_forward", "gather_backward", "reduce", "gather_updated", "weak_model")
    return {name: value * (setup.gpus - 1) // setup.gpus for name, value in zip(names, values, strict=True)}


def compute(setup: Setup) -> dict[str, int]:
    """
    FLOPs per GPU. A backward pass costs two forwards (one if the weights are frozen), checkpointing one of the layers.

    Returns:
        `dict[str, int]`: `strong` and `weak`, of a training step; `scoring_first` and `scoring_later`, of scoring as
        many tokens as a step has in the first weak-driven epoch and in later ones, which know a frozen weak model's
        scores.
    """

    def training(size: ModelSize, forward: int) -> int:
        recomputed = forward - 2 * setup.tokens * size.head if setup.activation_checkpointing else 0
        if setup.lora is None:
            return 3 * forward + recomputed
        return 2 * forward + recomputed + 6 * setup.tokens * setup.trained

    weak = setup.weak_size
    length = setup.length or setup.tokens
    strong_forward, weak_forward = (size.forward_flops(setup.tokens, length) for size in (setup.model, weak))
    special = {"none": 0, "cached": 2 * setup.tokens * weak.head, "joint": training(weak, weak_forward)}
    both = strong_forward + weak_forward
    scoring = {"none": (0, 0), "joint": (both, both)}.get(setup.weak, (both, strong_forward))
    return {
        "strong": training(setup.model, strong_forward),
        "weak": special.get(setup.weak, weak_forward),
        "scoring_first": scoring[0],
        "scoring_later": scoring[1],
    }


@dataclass(frozen=True)
class Hardware:
    """
    Args:
        peak_flops (`float`, *optional*, defaults to 989e12):
            FLOP/s of a GPU (NVIDIA's data sheet of the H100 SXM, dense bf16).
        mfu (`float`, *optional*, defaults to 0.4):
            Share of it that training and scoring reach, an assumption.
        node_bandwidth, network_bandwidth (`float`, *optional*, default to 450e9 and 50e9):
            Bytes/s per GPU and direction within a node (NVLink of the H100) and between nodes (400 Gbit/s per GPU).
        gpus_per_node (`int`, *optional*, defaults to 8):
            GPUs that the node's bandwidth connects.
    """

    peak_flops: float = 989e12
    mfu: float = 0.4
    node_bandwidth: float = 450e9
    network_bandwidth: float = 50e9
    gpus_per_node: int = 8

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value <= 0 or (name == "mfu" and value > 1):
                raise ValueError(f"`{name}={value}` must be positive, and `mfu` at most 1. Change it.")


def times(setup: Setup, hardware: Hardware | None = None, active_fraction: float = 0.63) -> dict[str, float]:
    """
    Estimated seconds of a step and of an epoch. Data loading, the optimizer's own time and the traffic between CPU and
    GPU memory (`zero3_offload`) are left out.

    Returns:
        `dict[str, float]`: `compute` and `communication` of a step, each alone; `serial` and `overlapped`, the step
        without any overlap of the two and with a perfect one. For the first weak-driven epoch and for later ones, with
        perfect overlap: `scoring_share_...` of the epoch's time, and `epoch_ratio_...`, the time of scoring a data set
        and training on `active_fraction` of it over that of an epoch of SFT on all of it.
    """
    hardware = hardware or Hardware()
    speed = hardware.peak_flops * hardware.mfu
    bandwidth = hardware.node_bandwidth if setup.gpus <= hardware.gpus_per_node else hardware.network_bandwidth
    flops, sent = compute(setup), communication(setup)

    def overlapped(operations: float, size: float) -> float:
        return max(operations / speed, size / bandwidth)

    computation, transfer = (flops["strong"] + flops["weak"]) / speed, sum(sent.values()) / bandwidth
    estimate = {
        "compute": computation,
        "communication": transfer,
        "serial": computation + transfer,
        "overlapped": max(computation, transfer),
    }
    sft = overlapped(flops["strong"], sum(sent.values()) - sent["weak_model"])
    # A forward of the whole weak model, which cached and joint do not have as such
    forward = sent["weak_model"]
    if setup.weak in ("cached", "joint"):
        forward = communication(replace(setup, weak="model"))["weak_model"]
    for epoch, with_weak in (("first", setup.weak != "none"), ("later", setup.weak == "joint")):
        scoring = 0.0
        if setup.weak != "none":
            gather = (sent["gather_forward"] + with_weak * forward) * setup.tokens
            scoring = overlapped(flops[f"scoring_{epoch}"], gather / (setup.scoring_tokens or setup.tokens))
        total = scoring + estimate["overlapped"] * (1 if setup.weak == "none" else active_fraction)
        estimate |= {f"scoring_share_{epoch}": scoring / total, f"epoch_ratio_{epoch}": total / sft}
    return estimate


def communication_bound_from(setup: Setup, hardware: Hardware | None = None, most: int = 1024) -> int | None:
    """The least power of two of GPUs, up to `most`, from which on a step communicates longer than it computes."""
    for gpus in (2**power for power in range(1, most.bit_length())):
        estimate = times(replace(setup, gpus=gpus), hardware)
        if estimate["communication"] > estimate["compute"]:
            return gpus
    return None
