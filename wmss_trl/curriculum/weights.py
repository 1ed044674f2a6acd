"""From the entropies of two models to sampling weights, and the weighted draw."""

import warnings

import numpy as np

# Of each variant, its published weights: difficulty, consolidation, repair
VARIANT_WEIGHTS = {"released": (0.1, 0.8, 0.1), "v1": (0.1, 0.8, 0.1), "v2": (0.8, 0.1, 0.1)}
CURRICULUM_VARIANTS = tuple(VARIANT_WEIGHTS)
# Rounding may take the entropy of a certain prediction below 0, by up to so many nats
_ENTROPY_ROUNDING = 1e-6


def sampling_weights(
    weak_entropy: np.ndarray,
    strong_entropy: np.ndarray,
    *,
    difficulty_weight: float = 0.1,
    consolidation_weight: float = 0.8,
    repair_weight: float = 0.1,
    variant: str = "released",
) -> np.ndarray:
    """
    Sampling weight of each example from its entropy under both models.

    | variant | formula, then normalised to sum 1 | source |
    |---|---|---|
    | `"released"` | `d Hw/Σ Hw + c [-ΔH]+/Σ [-ΔH]+ + r [ΔH]+/Σ [ΔH]+` | the paper's code |
    | `"v1"` | `d Hw + c [-ΔH]+ + r [ΔH]+` | paper v1 |
    | `"v2"` | `d Hs + c [-ΔH]+ + r [ΔH]+` | paper v2 |

    `Hw`, `Hs` are the weak and the strong entropy, `ΔH = Hs - Hw`, and `d`, `c`, `r` the three weights. In
    `"released"` a term whose sum is 0 contributes 0.

    Args:
        weak_entropy (`np.ndarray` of shape `(n,)`):
            Token-averaged entropy of each example under the weak model, nats.
        strong_entropy (`np.ndarray` of shape `(n,)`):
            The same under the strong model.
        difficulty_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the difficulty term (still uncertain). These defaults are the same for all variants; those of
            [`WMSSConfig`] are the variant's.
        consolidation_weight (`float`, *optional*, defaults to `0.8`):
            Weight of the consolidation term (entropy fell: learnt, keep it).
        repair_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the regression-repair term (entropy rose).
        variant (`str`, *optional*, defaults to `"released"`):
            One of `"released"`, `"v1"` and `"v2"`.

    Returns:
        `np.ndarray` of shape `(n,)`: float64 weights that sum to 1; uniform, with a warning, if all are 0.

    Raises:
        ValueError: If the entropies differ in shape, or are negative (beyond rounding: from -1e-6 up they count as 0),
            NaN or infinite (with the example indices), or the variant is unknown.
    """
    weights = sum(
        weight_terms(
            weak_entropy,
            strong_entropy,
            difficulty_weight=difficulty_weight,
            consolidation_weight=consolidation_weight,
            repair_weight=repair_weight,
            variant=variant,
        ).values()
    )
    total = weights.sum()
    if total == 0:
        warnings.warn("Every sampling weight is 0: drawing uniformly.", stacklevel=2)
        return np.full(len(weights), 1 / len(weights))
    return weights / total


def weight_terms(
    weak_entropy: np.ndarray,
    strong_entropy: np.ndarray,
    *,
    difficulty_weight: float = 0.1,
    consolidation_weight: float = 0.8,
    repair_weight: float = 0.1,
    variant: str = "released",
) -> dict[str, np.ndarray]:
    """
    The three terms of [`sampling_weights`] before their sum is normalised.

    Returns:
        `dict[str, np.ndarray]`: `"difficulty"`, `"consolidation"` and `"repair"`, float64 of shape `(n,)`.
    """
    weak, strong = np.asarray(weak_entropy, dtype=np.float64), np.asarray(strong_entropy, dtype=np.float64)
    if weak.ndim != 1 or weak.shape != strong.shape or not len(weak):
        raise ValueError(
            f"`weak_entropy` {weak.shape} and `strong_entropy` {strong.shape} must be vectors of the same length >= 1."
        )
    if variant not in CURRICULUM_VARIANTS:
        raise ValueError(f"`variant` must be one of {list(CURRICULUM_VARIANTS)}, got {variant!r}.")
    weak, strong = checked_entropy("weak_entropy", weak), checked_entropy("strong_entropy", strong)
    terms = {
        "difficulty": (difficulty_weight, strong if variant == "v2" else weak),
        "consolidation": (consolidation_weight, np.maximum(weak - strong, 0)),
        "repair": (repair_weight, np.maximum(strong - weak, 0)),
    }
    return {
        name: weight * term / ((term.sum() or 1) if variant == "released" else 1)
        for name, (weight, term) in terms.items()
    }


def draw_active_set(
    weights: np.ndarray, num_draws: int, *, replacement: bool = False, seed: int | tuple[int, ...]
) -> np.ndarray:
    """
    Draw the active set with probability proportional to the weights.

    Without replacement this is the published "draw with replacement, drop repeats" continued until `num_draws`
    distinct examples are found, computed in one pass: the `num_draws` smallest of `Exp(1) / weight`
    (Efraimidis & Spirakis, 2006). Examples of weight 0 are drawn, uniformly and with a warning, only when all the
    others already are.

    Args:
        weights (`np.ndarray` of shape `(n,)`):
            Sampling weights; any positive scale.
        num_draws (`int`):
            Number of indices to return.
        replacement (`bool`, *optional*, defaults to `False`):
            Whether an example can be drawn more than once.
        seed (`int` or `tuple[int, ...]`):
            Seed of the draw. The same seed gives the same indices on every rank and machine.

    Returns:
        `np.ndarray` of shape `(num_draws,)`: int64 indices in the order of the draw.

    Raises:
        ValueError: If a weight is negative, NaN or infinite, all are 0, or more distinct examples are asked for than
            there are.
    """
    weights = np.asarray(weights, dtype=np.float64)
    check_finite("weights", weights)
    if not weights.any():
        raise ValueError("`weights` are all 0: nothing can be drawn.")
    if num_draws < 1 or (num_draws > len(weights) and not replacement):
        raise ValueError(
            f"`num_draws={num_draws}` must be between 1 and the number of examples ({len(weights)}) when drawing "
            "without replacement."
        )
    generator = np.random.Generator(np.random.PCG64(seed))
    candidates = np.flatnonzero(weights)
    if replacement:
        # Sorted: to look up millions of random values in a long array misses the cache each time
        cumulative = weights.cumsum()
        values = np.sort(generator.random(num_draws)) * cumulative[-1]
        drawn = np.minimum(cumulative.searchsorted(values, side="right"), candidates[-1])
        return generator.permutation(drawn)

    arrival = generator.standard_exponential(len(candidates)) / (weights[candidates] / weights.max())
    if num_draws <= len(candidates):
        first = np.argpartition(arrival, num_draws - 1)[:num_draws]
        return candidates[first[np.argsort(arrival[first], kind="stable")]]
    warnings.warn(
        f"Only {len(candidates)} of {len(weights)} examples have a positive sampling weight, fewer than the "
        f"{num_draws} to draw: the rest is drawn uniformly among the others.",
        stacklevel=2,
    )
    others = generator.permutation(np.flatnonzero(weights == 0))
    return np.concatenate([candidates[np.argsort(arrival, kind="stable")], others])[:num_draws]


def checked_entropy(name: str, entropy: np.ndarray, indices: np.ndarray | None = None) -> np.ndarray:
    """Entropies with 0 for what rounding has made negative, see [`check_finite`]."""
    entropy = np.where((entropy < 0) & (entropy > -_ENTROPY_ROUNDING), 0, entropy)
    check_finite(name, entropy, indices)
    return entropy


def check_finite(name: str, values: np.ndarray, indices: np.ndarray | None = None) -> None:
    """Raise a `ValueError` with the indices (positions unless given) of values that are NaN, infinite or negative."""
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(bad):
        indices = np.arange(len(values)) if indices is None else indices
        bad = bad[np.argsort(indices[bad])]
        shown = ", ".join(f"{indices[i]} ({values[i]})" for i in bad[:10])
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ValueError(f"`{name}` must be finite and >= 0, but examples {shown}{more} are not.")
