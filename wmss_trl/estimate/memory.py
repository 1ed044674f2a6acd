"""
Memory of a process, part by part.

Bytes of weights, gradients and optimizer states follow from what the engines allocate (checked with accelerate 1.15,
DeepSpeed 0.19.8 and PyTorch 2.13). Activations are estimated.
"""

from dataclasses import asdict, dataclass

from ..losses.buffer import default_buffer_bytes
from .models import ModelSize

ENGINES = ("ddp", "fsdp2", "zero2", "zero3", "zero3_offload")
WEAK_REFERENCES = ("none", "model", "adapter-off", "adapter", "cached", "joint")
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# DeepSpeed's defaults: `reduce_bucket_size` and `stage3_max_live_parameters`, the most gathered weights that it keeps
_ZERO_BUCKET, _ZERO_LIVE = 500_000_000, 1_000_000_000
# What TRL 1.16's fused head holds of the logits in SFT: tokens, vocabulary
_TRL_TILE = (4096, 32_768)
_GPU_MEMORY = 80 * 2**30


@dataclass(frozen=True)
class Setup:
    """
    One way of training.

    Args:
        model ([`ModelSize`]):
            The strong model.
        gpus (`int`, *optional*, defaults to `1`):
            Number of GPUs. A sharded engine shards over all of them.
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
            Tokens per GPU in a forward pass of the scoring. It keeps no activations. Defaults to `tokens`.
        activation_checkpointing (`bool`, *optional*, defaults to `True`):
            TRL's default.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype in which models are loaded. TRL loads by name in float32; a model handed in keeps its own.
        bf16 (`bool`, *optional*, defaults to `True`):
            Mixed precision in bfloat16, TRL's default.
        logits_buffer_mb (`int`, *optional*):
            See [`WMSSConfig`]. Defaults to what a run takes on a GPU of 80 GiB.
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
    logits_buffer_mb: int | None = None

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
        """Bytes per trained weight. FSDP2 upcasts them to float32 (accelerate). DeepSpeed casts the model to bf16 and
        keeps a float32 copy with the optimizer. PEFT makes adapters float32."""
        if self.deepspeed:
            return self.compute_bytes
        return 4 if self.lora or (self.engine == "fsdp2" and self.bf16) else _DTYPE_BYTES[self.dtype]

    @property
    def frozen_bytes(self) -> int:
        """Bytes per frozen weight, as it was loaded. DeepSpeed casts it too."""
        return self.compute_bytes if self.deepspeed else _DTYPE_BYTES[self.dtype]

    @property
    def stream_bytes(self) -> int:
        """Bytes per number between layers. Under autocast alone they have the dtype of the weights."""
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
    else:  # a tile of either model's logits in the dtype of the products
        logits = min(logits_buffer_bytes(setup), 2 * c * setup.tokens * model.vocab)
    return Memory(
        **owned,
        lm_head_gather=gather,
        engine_buffers=buffers,
        logits_buffer=logits,
        activations=activation_bytes(setup),
        host=host,
    )


def logits_buffer_bytes(setup: Setup) -> int:
    """What the tiles of logits may take."""
    if setup.logits_buffer_mb is not None:
        return setup.logits_buffer_mb * 2**20
    return default_buffer_bytes(
        setup.tokens, setup.model.vocab, setup.compute_bytes, _GPU_MEMORY, trains_weak=setup.weak == "joint"
    )
