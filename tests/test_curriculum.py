import itertools

import numpy as np
import pytest
from torch.utils.data import Sampler
from transformers import TrainerCallback

from wmss_trl.curriculum import CurriculumSampler
from wmss_trl.curriculum.weights import draw_active_set, sampling_weights, weight_terms


def positive_part(x):
    return x if x > 0 else 0.0


def brute_force_weights(weak, strong, variant, d, c, r):
    terms = []
    for w, s in zip(weak, strong, strict=True):
        difficulty = s if variant == "v2" else w
        terms.append((difficulty, positive_part(w - s), positive_part(s - w)))
    scales = [1.0, 1.0, 1.0]
    if variant == "released":
        for j in range(3):
            total = sum(term[j] for term in terms)
            scales[j] = 1 / total if total else 0.0
    weights = [d * x * scales[0] + c * y * scales[1] + r * z * scales[2] for x, y, z in terms]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("variant", ["released", "v1", "v2"])
def test_weights_equal_the_published_formula(variant):
    rng = np.random.default_rng(0)
    weak, strong = rng.gamma(2, size=50), rng.gamma(2, size=50)
    weights = sampling_weights(
        weak, strong, difficulty_weight=0.2, consolidation_weight=0.7, repair_weight=0.1, variant=variant
    )
    assert weights.dtype == np.float64
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(weights, brute_force_weights(weak, strong, variant, 0.2, 0.7, 0.1), rtol=0, atol=1e-12)


def test_weights_by_hand():
    # Hw = (1, 3), dH = (+1, -2): difficulty (1/4, 3/4), consolidation (0, 1), repair (1, 0)
    weights = sampling_weights([1, 3], [2, 1])
    np.testing.assert_allclose(weights, [0.1 / 4 + 0.1, 0.1 * 3 / 4 + 0.8], atol=1e-12)


def test_a_term_that_is_zero_everywhere_contributes_nothing():
    # No example got less sure, so the repair term is 0 / 0 in the released formula
    np.testing.assert_allclose(sampling_weights([2, 2], [1, 1]), [0.5, 0.5], atol=1e-12)


def test_all_zero_weights_fall_back_to_uniform():
    with pytest.warns(UserWarning, match="uniformly"):
        assert sampling_weights(np.zeros(4), np.zeros(4)).tolist() == [0.25] * 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1])
def test_bad_entropies_are_named_by_index(bad):
    with pytest.raises(ValueError, match=r"strong_entropy.*examples 2 "):
        sampling_weights([1, 1, 1], [1, 1, bad])


@pytest.mark.parametrize("variant", ["released", "v1", "v2"])
def test_entropies_that_rounding_has_made_negative_count_as_zero(variant):
    weak, strong = np.array([1.0, -1e-8, 2.0, 0.0]), np.array([0.5, 1.0, -9e-7, 0.0])
    weights = sampling_weights(weak, strong, variant=variant)
    expected = brute_force_weights([1, 0, 2, 0], [0.5, 1, 0, 0], variant, 0.1, 0.8, 0.1)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-15)
    assert weights[3] == 0
    with pytest.raises(ValueError, match=r"weak_entropy.*examples 1 \(-2e-06\)"):
        sampling_weights([1.0, -2e-6], [1.0, 1.0])


def test_bad_arguments():
    with pytest.raises(ValueError, match="variant"):
        sampling_weights([1], [1], variant="v3")
    with pytest.raises(ValueError, match="same length"):
        sampling_weights([1, 2], [1])
    with pytest.raises(ValueError, match="num_draws=4"):
        draw_active_set([1, 1, 1], 4, seed=0)
    with pytest.raises(ValueError, match="examples 1 "):
        draw_active_set([1, np.nan, 1], 2, seed=0)
    with pytest.raises(ValueError, match="all 0"):
        draw_active_set([0, 0], 1, seed=0)


def inclusion_by_enumeration(weights, num_draws):
    """Exact inclusion probabilities of drawing with replacement and dropping repeats until `num_draws` are found."""
    inclusion = np.zeros(len(weights))
    for path in itertools.permutations(range(len(weights)), num_draws):
        probability, left = 1.0, sum(weights)
        for index in path:
            probability *= weights[index] / left
            left -= weights[index]
        inclusion[list(path)] += probability
    return inclusion


def test_draw_without_replacement_has_the_published_distribution():
    weights = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    counts = np.zeros(5)
    num_trials = 20_000
    for seed in range(num_trials):
        drawn = draw_active_set(weights, 3, seed=seed)
        assert len(set(drawn.tolist())) == 3
        counts[drawn] += 1
    expected = inclusion_by_enumeration(weights, 3)
    standard_error = np.sqrt(expected * (1 - expected) / num_trials)
    assert (np.abs(counts / num_trials - expected) < 4 * standard_error).all()


def test_draw_with_replacement_keeps_repeats_in_proportion():
    drawn = draw_active_set([3, 1], 10_000, replacement=True, seed=0)
    assert np.mean(drawn == 0) == pytest.approx(0.75, abs=0.02)
    assert np.mean(drawn[:1000] == 0) == pytest.approx(0.75, abs=0.05)  # in random order
    drawn = draw_active_set([0, 1e-300, 0, 1e-300, 0], 1000, replacement=True, seed=0)
    assert set(drawn) == {1, 3}


def test_draw_is_a_function_of_the_seed():
    weights = np.arange(1, 21)
    # A literal, so that another machine or library version must agree
    assert draw_active_set(weights, 5, seed=(42, 1)).tolist() == [13, 16, 10, 14, 18]
    assert draw_active_set(weights, 5, seed=(42, 2)).tolist() != [13, 16, 10, 14, 18]


def test_examples_of_weight_zero_come_last():
    weights = [1, 0, 1, 0]
    assert sorted(draw_active_set(weights, 2, seed=0).tolist()) == [0, 2]
    with pytest.warns(UserWarning, match="Only 2 of 4"):
        drawn = draw_active_set(weights, 3, seed=0)
    assert {0, 2} < set(drawn.tolist())
    assert len(set(drawn.tolist())) == 3


def test_a_million_draws_are_distinct():
    drawn = draw_active_set(np.random.default_rng(0).random(1_000_000), 630_000, seed=0)
    assert len(np.unique(drawn)) == 630_000


class State:
    def __init__(self, epoch):
        self.epoch = epoch


def make_sampler(**kwargs):
    rng = np.random.default_rng(0)
    rounds = []

    def score():
        rounds.append(len(rounds))
        return rng.random(10), rng.random(10)

    sampler = CurriculumSampler(10, score, **{"active_fraction": 0.5, "first_epoch": 1, "seed": 3, **kwargs})
    return sampler, rounds


def test_sampler_is_both_a_sampler_and_a_callback():
    sampler, _ = make_sampler()
    assert isinstance(sampler, Sampler)
    assert isinstance(sampler, TrainerCallback)


def run_epochs(sampler, count, first=0):
    sampler.on_train_begin(None, State(first), None)
    epochs = []
    for _ in range(count):
        sampler.on_epoch_begin(None, None, None)
        epochs.append(None if sampler.indices is None else list(sampler))
    return epochs


def test_sampler_leaves_phase_1_alone_and_redraws_each_later_epoch():
    sampler, rounds = make_sampler()
    phase_1, second, third = run_epochs(sampler, 3)
    assert phase_1 is None
    for epoch in (second, third):
        assert len(sampler) == len(epoch) == len(set(epoch)) == 5
    assert second != third
    assert rounds == [0, 1]


def test_epochs_without_rescoring_draw_anew_from_the_last_scores():
    sampler, rounds = make_sampler(rescore_epochs=2)
    _, second, third, fourth = run_epochs(sampler, 4)
    assert rounds == [0, 1]  # in the first and the third weak-driven epoch
    assert len({tuple(epoch) for epoch in (second, third, fourth)}) == 3
    once, _ = make_sampler()
    once.redraw(1)
    assert list(once) == second
    expected = draw_active_set(once.weights, 5, seed=(3, 1))
    assert sorted(third) == sorted(expected)


def test_length_groups_hold_examples_of_similar_length():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1000, size=400)
    options = {"active_fraction": 0.5, "lengths": lengths, "group_size": 8}
    sampler = CurriculumSampler(400, lambda: (rng.random(400), rng.random(400)), **options)
    sampler.redraw(0)
    order = list(sampler)
    assert len(set(order)) == 200

    def mean_spread(order):
        return np.mean([np.ptp(lengths[order[start : start + 8]]) for start in range(0, 200, 8)])

    assert mean_spread(order) < 0.3 * mean_spread(rng.permutation(order))
    assert order != sorted(order)


def test_terms_add_up_to_the_weights_and_shares_to_one():
    sampler, _ = make_sampler()
    sampler.redraw(1)
    weak, strong = sampler.weak_entropy, sampler.strong_entropy
    terms = weight_terms(weak, strong)
    np.testing.assert_allclose(sum(terms.values()) / sum(terms.values()).sum(), sampler.weights, rtol=1e-12)
    metrics = sampler.metrics()
    fall = 0.8 * np.maximum(weak - strong, 0) / np.maximum(weak - strong, 0).sum()
    assert metrics["curriculum/consolidation_share"] == pytest.approx(0.8)
    active = sorted(sampler)
    total = sum(term[active].sum() for term in terms.values())
    assert metrics["curriculum/active_consolidation_share"] == pytest.approx(fall[active].sum() / total)
    for prefix in ("", "active_"):
        shares = [metrics[f"curriculum/{prefix}{term}_share"] for term in ("difficulty", "consolidation", "repair")]
        assert sum(shares) == pytest.approx(1)


def test_sequential_order_is_data_set_order():
    sampler, _ = make_sampler(shuffle=False)
    sampler.redraw(1)
    assert list(sampler) == sorted(sampler)


def test_saved_draw_is_taken_up_without_scoring(tmp_path):
    sampler, _ = make_sampler()
    sampler.redraw(1)
    sampler.save(tmp_path)
    resumed, rounds = make_sampler()
    resumed.load(tmp_path)
    resumed.on_train_begin(None, State(1.4), None)
    resumed.on_epoch_begin(None, None, None)
    assert rounds == []
    assert list(resumed) == list(sampler)
    np.testing.assert_array_equal(resumed.weak_entropy, sampler.weak_entropy)
    assert [path.name for path in tmp_path.iterdir()] == ["curriculum.npz"]


def test_scores_before_the_first_draw_are_saved(tmp_path):
    sampler, _ = make_sampler()
    sampler.save(tmp_path)
    assert not list(tmp_path.iterdir())
    sampler.weak_entropy = np.arange(10.0)
    sampler.save(tmp_path)
    resumed, _ = make_sampler()
    resumed.load(tmp_path)
    np.testing.assert_array_equal(resumed.weak_entropy, sampler.weak_entropy)
    assert resumed.drawn_epoch is resumed.indices is None
