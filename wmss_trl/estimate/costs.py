"""Communication, FLOPs and time of a training step: WMSS against SFT on many GPUs."""

from dataclasses import asdict, dataclass, replace

from .memory import Setup
from .models import ModelSize


def communication(setup: Setup) -> dict[str, int]:
    """
    Bytes that a GPU sends (and receives) in an optimizer step of one micro-batch, by ring collectives over n GPUs. An
    all-gather or a reduce-scatter sends `(n - 1) / n` of the tensor, and an all-reduce twice that.

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
        `dict[str, int]`: `strong` and `weak` of a training step. `scoring_first` and `scoring_later` of scoring as
        many tokens as a step has, in the first weak-driven epoch and in later ones. Later epochs know the scores of a
        frozen weak model.
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
            Share of it that training and scoring reach. An assumption.
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
    # A forward of the whole weak model. `weak` is less with a cache and more with joint training
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
