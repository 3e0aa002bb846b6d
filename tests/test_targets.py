"""S3FT targets for arrays and texts."""

import jax
import numpy as np
import pytest

from linfit import s3ft_targets
from linfit.targets import Source


def close(answers, gold):
    return abs(answers - gold) <= 0.5


def test_arrays_by_the_rule_written_out(generator):
    own, gold, reworded = (generator.standard_normal(200) for _ in range(3))
    targets = s3ft_targets(own, gold, close, reworded)
    for i in range(200):
        if abs(own[i] - gold[i]) <= 0.5:
            expected = own[i], Source.OWN
        elif abs(reworded[i] - gold[i]) <= 0.5:
            expected = reworded[i], Source.PARAPHRASE
        else:
            expected = gold[i], Source.GOLD
        assert (targets.values[i], targets.source[i]) == expected
    assert all(0 < share < 1 for share in targets.shares().values())
    assert abs(sum(targets.shares().values()) - 1) < 1e-12


def test_share_of_own_answers_is_the_gaussian_probability(seed):
    from scipy.stats import norm

    generator = np.random.default_rng(seed)
    gold = generator.standard_normal(100_000)
    own = gold + 0.8 * generator.standard_normal(100_000)
    share = s3ft_targets(own, gold, close).shares()["own"]
    expected = 2 * norm.cdf(0.5 / 0.8) - 1
    assert abs(share - expected) < 5 * (expected * (1 - expected) / 100_000) ** 0.5


def test_vector_answers_and_a_paraphrase_function_under_jit(generator):
    """Content in the first coordinate, style in the second: gold content in own style (docs, T2)."""
    own, gold = generator.standard_normal((2, 50, 2))

    def judge(answers, gold):
        return abs(answers[:, 0] - gold[:, 0]) <= 0.2

    def reword(own, gold):
        return gold.at[:, 1].set(own[:, 1])

    targets = jax.jit(lambda own, gold: s3ft_targets(own, gold, judge, reword))(own, gold)
    accepted = abs(own[:, 0] - gold[:, 0]) <= 0.2
    np.testing.assert_array_equal(targets.source, np.where(accepted, 0, 1))
    np.testing.assert_array_equal(targets.values[:, 1], own[:, 1])
    np.testing.assert_array_equal(targets.values[~accepted, 0], gold[~accepted, 0])


def test_texts_ask_for_a_paraphrase_only_where_needed():
    asked = []

    def reword(own, gold):
        asked.append(gold)
        return None if gold == "9" else f"It is {gold}."

    targets = s3ft_targets(["4!", "five", "x"], ["4", "6", "9"], lambda answer, gold: gold in answer, reword)
    assert targets.values == ["4!", "It is 6.", "9"]
    assert targets.source.tolist() == [Source.OWN, Source.PARAPHRASE, Source.GOLD]
    assert asked == ["6", "9"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], ["a", "b"], str.__eq__), "own must match gold"),
        (([], [], str.__eq__), "gold must not be empty"),
        ((["a"], ["a"], str.__eq__, ["b", "c"]), "paraphrase must match gold"),
        ((["a"], ["a"], lambda answer, gold: "yes"), "judge must return a bool"),
        ((np.ones(3), np.ones(2), close), "own must have the shape"),
        ((np.ones(2), np.ones(2), lambda answers, gold: True), r"booleans of shape \(2,\)"),
        ((np.ones(2), np.ones(2), lambda answers, gold: answers), "booleans of shape"),
        ((np.ones(2), np.ones(2), close, np.ones(3)), "paraphrase must have the shape"),
        ((np.ones(0), np.ones(0), close), "n ≥ 1"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        s3ft_targets(*arguments)
