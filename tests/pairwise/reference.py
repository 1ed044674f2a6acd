"""
Weak-Driven Learning as a plain loop: full logits, one example at a time, no padding. It judges the trainer and shares
no code with the package.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import get_length_grouped_indices

Ids = list[int]


@dataclass
class Settings:
    """What a run is asked for."""

    sft_epochs: int
    total_steps: int
    learning_rate: float
    adam_epsilon: float = 1e-3
    max_grad_norm: float = 1.0
    mixing_lambda: float = 0.4
    final_lambda: float = 0.4
    schedule: str = "constant"
    anchor: float = 0.0
    dft: bool = False
    train_weak: bool = False
    refresh: bool = False
    curriculum: bool = True
    variant: str = "released"
    term_weights: tuple[float, float, float] = (0.1, 0.8, 0.1)  # difficulty, consolidation, repair
    active_fraction: float = 0.63
    replacement: bool = False
    sampling: str = "random"
    group_size: int = 4
    seed: int = 42
    score_file: tuple[np.ndarray, np.ndarray] | None = None
    bf16: bool = False


@dataclass
class Step:
    """An optimizer step: its epoch, and the examples of each micro-batch of each process."""

    epoch: int
    micro_batches: list[list[int]]


@dataclass
class Result:
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    lambdas: list[float | None] = field(default_factory=list)
    entropies: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    eval_losses: dict[int, float] = field(default_factory=dict)
    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)


class ReferenceRun:
    """Trains both models as they are handed in; examples are pairs of token ids and labels."""

    def __init__(
        self,
        settings: Settings,
        strong: nn.Module,
        weak: nn.Module,
        examples: list[tuple[Ids, Ids]],
        eval_examples: list[tuple[Ids, Ids]],
    ):
        self.settings, self.strong, self.weak = settings, strong.train(), weak.eval()
        self.examples, self.eval_examples = examples, eval_examples
        parameters = [p for p in strong.parameters() if p.requires_grad]
        if settings.train_weak:
            parameters += [p for p in weak.parameters() if p.requires_grad]
        self.parameters = parameters
        s = settings
        self.optimizer = torch.optim.AdamW(parameters, lr=s.learning_rate, eps=s.adam_epsilon, weight_decay=0.0)
        self.next_weak: nn.Module | None = None
        self.crossover = 0.0

    def run(self, steps: list[Step], save_every: int) -> Result:
        result, epoch, settings = Result(), -1, self.settings
        first = next((i for i, step in enumerate(steps) if step.epoch >= settings.sft_epochs), len(steps))
        for number, step in enumerate(steps):
            weak_driven = step.epoch >= settings.sft_epochs
            if step.epoch != epoch and weak_driven:
                self._begin_round(step.epoch, result)
            epoch = step.epoch
            lam = self._lambda(number, first) if weak_driven else None
            for group in self.optimizer.param_groups:
                group["lr"] = settings.learning_rate * (settings.total_steps - number) / settings.total_steps
            result.losses.append(self._step(step, lam))
            result.grad_norms.append(nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm).item())
            result.lambdas.append(lam)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if (number + 1) % save_every == 0 or number + 1 == len(steps):
                result.eval_losses[number + 1] = self._evaluate()
                result.states[number + 1] = copy.deepcopy(self.strong.state_dict())
        return result

    def _lambda(self, step: int, first: int) -> float:
        settings = self.settings
        if settings.schedule == "crossover":
            return self.crossover
        progress = (step - first) / max(1, settings.total_steps - 1 - first)
        return settings.mixing_lambda + (settings.final_lambda - settings.mixing_lambda) * progress

    def _begin_round(self, epoch: int, result: Result) -> None:
        settings = self.settings
        if settings.refresh:
            self.weak = self.weak if self.next_weak is None else self.next_weak
            self.next_weak = copy.deepcopy(self.strong).eval()
        if settings.curriculum:
            number, before = epoch - settings.sft_epochs, result.entropies.get(epoch - 1)
            weak, strong = self.entropies(self.weak), self.entropies(self.strong)
            if settings.score_file is not None and not settings.train_weak:
                weak = settings.score_file[0]
            if settings.refresh and before is not None:
                weak = before[1]
            result.entropies[epoch] = (weak, strong) if number or settings.score_file is None else settings.score_file
        if settings.schedule == "crossover":
            self.crossover = self._crossover()

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.settings.bf16 else nullcontext()

    def _logits(self, model: nn.Module, ids: Ids) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        with self._precision():
            outputs = model(input_ids=torch.tensor([ids]), use_cache=False)
        return outputs.logits[0, :-1].float(), getattr(outputs, "router_logits", None)

    @staticmethod
    def _targets(labels: Ids) -> tuple[Tensor, Tensor]:
        targets = torch.tensor(labels[1:])
        return targets, targets != -100

    def _term(self, logits: Tensor, targets: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        weights = log_probs.detach().exp() if self.settings.dft else 1.0
        return -(weights * log_probs).sum()

    def _step(self, step: Step, lam: float | None) -> float:
        settings, total = self.settings, 0.0
        num_items = sum(self._targets(self.examples[i][1])[1].sum() for batch in step.micro_batches for i in batch)
        for batch in step.micro_batches:
            loss, router_logits = torch.zeros(()), []
            for i in batch:
                ids, labels = self.examples[i]
                targets, mask = self._targets(labels)
                strong, routers = self._logits(self.strong, ids)
                router_logits.append(routers)
                if lam is None or lam == 1:
                    loss = loss + self._term(strong[mask], targets[mask]) / num_items
                    continue
                with torch.set_grad_enabled(settings.train_weak):
                    weak, _ = self._logits(self.weak, ids)
                mixed = lam * strong + (1 - lam) * weak
                anchored = settings.anchor * self._term(strong[mask], targets[mask])
                loss = loss + (anchored + (1 - settings.anchor) * self._term(mixed[mask], targets[mask])) / num_items
            loss = loss + self._router_loss(router_logits) / len(step.micro_batches)
            loss.backward()
            total += loss.item()
        return total

    def _router_loss(self, router_logits: list[tuple[Tensor, ...] | None]) -> Tensor:
        """Switch Transformer, equations 4-6, over the tokens of a batch and all layers together."""
        if not router_logits[0]:
            return torch.zeros(())
        logits = torch.cat([torch.cat(routers).float() for routers in router_logits])
        probabilities = logits.softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(2).indices, 1.0)
        return (
            self.strong.config.router_aux_loss_coef * logits.size(-1) * (chosen.mean(0) * probabilities.mean(0)).sum()
        )

    @torch.no_grad()
    def entropies(self, model: nn.Module) -> np.ndarray:
        """Mean entropy over the supervised tokens of each example, nats."""
        training = model.training
        model.eval()
        values = []
        for ids, labels in self.examples:
            log_probs = self._logits(model, ids)[0][self._targets(labels)[1]].double().log_softmax(-1)
            values.append(-(log_probs.exp() * log_probs).sum(-1).mean().item())
        model.train(training)
        return np.array(values)

    @torch.no_grad()
    def _crossover(self) -> float:
        norms = [0.0, 0.0]
        for ids, labels in self.examples:
            mask = self._targets(labels)[1]
            for i, model in enumerate((self.strong.eval(), self.weak)):
                logits = self._logits(model, ids)[0][mask].double()
                norms[i] += (logits - logits.mean(-1, keepdim=True)).norm(dim=-1).sum().item()
        self.strong.train()
        return norms[1] / (norms[0] + norms[1])

    @torch.no_grad()
    def _evaluate(self) -> float:
        self.strong.eval()
        loss, num_items, router_logits = 0.0, 0, []
        for ids, labels in self.eval_examples:
            targets, mask = self._targets(labels)
            logits, routers = self._logits(self.strong, ids)
            router_logits.append(routers)
            loss += self._term(logits[mask], targets[mask]).item()
            num_items += int(mask.sum())
        self.strong.train()
        return loss / num_items + self._router_loss(router_logits).item()


def sampling_weights(weak: np.ndarray, strong: np.ndarray, settings: Settings) -> np.ndarray:
    weak, strong = weak.astype(np.float64), strong.astype(np.float64)
    terms = [strong if settings.variant == "v2" else weak, (weak - strong).clip(0), (strong - weak).clip(0)]
    if settings.variant == "released":
        terms = [term / (term.sum() or 1) for term in terms]
    weights = sum(factor * term for factor, term in zip(settings.term_weights, terms, strict=True))
    return weights / weights.sum()


def draw(weights: np.ndarray, number: int, settings: Settings) -> np.ndarray:
    """The examples in the order of the draw; all of positive weight, of which a run takes the first."""
    generator = np.random.Generator(np.random.PCG64((settings.seed, number)))
    if settings.replacement:
        values = np.sort(generator.random(round(settings.active_fraction * len(weights))))
        return generator.permutation(np.searchsorted(weights.cumsum() / weights.sum(), values, side="right"))
    candidates = np.flatnonzero(weights)
    return candidates[np.argsort(generator.standard_exponential(len(candidates)) / weights[candidates])]


def order_of_epoch(drawn: np.ndarray, number: int, lengths: list[int], settings: Settings) -> list[int]:
    generator = np.random.Generator(np.random.PCG64((settings.seed, number, 1)))
    if settings.sampling == "sequential":
        return sorted(drawn.tolist())
    if settings.sampling == "random":
        return generator.permutation(drawn).tolist()
    torch_generator = torch.Generator().manual_seed(int(generator.integers(2**63)))
    lengths = [lengths[i] for i in drawn]
    return drawn[get_length_grouped_indices(lengths, settings.group_size, generator=torch_generator)].tolist()
