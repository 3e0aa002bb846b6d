"""S3FT targets for arrays and texts."""

import jax
import numpy as np
import pytest

from linfit import s3ft_targets
from linfit.internal.checks import as_projector
from linfit.targets import Source, content_within, noisy, within


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


def test_judges_by_the_norm_written_out(generator):
    """A tilted content plane, one tolerance per sample."""
    answers, gold = generator.standard_normal((2, 60, 3))
    basis = np.linalg.qr(generator.standard_normal((3, 2)))[0]
    tolerance = generator.uniform(0.2, 3, 60)
    content = within(tolerance)(answers @ basis, gold @ basis)
    np.testing.assert_array_equal(content_within(basis @ basis.T, tolerance)(answers, gold), content)
    np.testing.assert_array_equal(content, [np.hypot(*row) <= t for row, t in zip((answers - gold) @ basis, tolerance)])
    first = content_within([True, False, False], 0.5)(answers, gold)
    np.testing.assert_array_equal(first, abs(answers - gold)[:, 0] <= 0.5)
    assert 0 < np.mean(content) < 1
    assert 0 < np.mean(first) < 1
    assert within(np.inf)(answers, gold).all()
    assert not within(0.0)(answers, gold).any()


def test_a_noisy_judge_errs_at_its_rates(seed):
    """In standard errors; with the same key, the same mistakes; rates of 0 are the judge itself."""
    generator = np.random.default_rng(seed)
    gold, count = np.zeros(40_000), 40_000
    answers = generator.standard_normal(count)
    right = abs(answers) <= 0.5
    judge = noisy(jax.random.key(seed), close, false_accept=0.1, false_reject=0.3)
    verdict = np.asarray(judge(answers, gold))
    for chosen, rate in ((verdict[~right], 0.1), (~verdict[right], 0.3)):
        assert abs(chosen.mean() - rate) < 4.5 * (rate * (1 - rate) / len(chosen)) ** 0.5
    np.testing.assert_array_equal(judge(answers, gold), verdict)
    np.testing.assert_array_equal(jax.jit(judge)(answers, gold), verdict)
    other = noisy(jax.random.key(seed + 1), close, false_accept=0.1, false_reject=0.3)(answers, gold)
    assert (np.asarray(other) != verdict).mean() > 0.1
    np.testing.assert_array_equal(noisy(jax.random.key(seed), close)(answers, gold), right)
    assert np.asarray(noisy(jax.random.key(seed), close, 1.0, 1.0)(answers, gold) == ~right).all()


def test_the_noisy_judge_misses_the_same_sample_again():
    """A right paraphrase of a right answer that was rejected is rejected too: the source is gold."""
    own, gold = np.zeros((500, 2)), np.zeros((500, 2))
    judge = noisy(jax.random.key(0), within(0.1), false_reject=0.4)
    sources = np.asarray(s3ft_targets(own, gold, judge, gold).source)
    assert set(sources) == {Source.OWN, Source.GOLD}


def test_a_mask_is_a_verdict(generator):
    own, gold, reworded = generator.standard_normal((3, 6, 2))
    accepted = np.array([True, False, True, False, False, False])
    reworded[4] = np.nan
    reworded[5, 1] = np.nan
    targets = jax.jit(s3ft_targets)(own, gold, accepted, reworded)
    np.testing.assert_array_equal(targets.source, [0, 1, 0, 1, 2, 2])
    np.testing.assert_array_equal(targets.values, [own[0], reworded[1], own[2], reworded[3], gold[4], gold[5]])
    texts = s3ft_targets(["a", "b", "c"], ["x", "y", "z"], [False, True, False], [None, "q", "r"])
    assert texts.values == ["x", "b", "r"]
    assert texts.source.tolist() == [Source.GOLD, Source.OWN, Source.PARAPHRASE]


def test_paraphrases_that_do_not_exist_are_never_used():
    """Not even by a judge that accepts everything wrong."""
    own, gold = np.full(50, 9.0), np.zeros(50)
    judge = noisy(jax.random.key(1), within(0.1), false_accept=0.5)
    targets = s3ft_targets(own, gold, judge, np.full(50, np.nan))
    assert set(np.asarray(targets.source)) == {Source.OWN, Source.GOLD}
    assert np.isfinite(np.asarray(targets.values)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: within(-1.0), "tolerance must be non-negative"),
        (lambda: within(np.nan), "tolerance must be non-negative"),
        (lambda: content_within([1.0, 0.5], 1.0), "content must be an orthogonal projector"),
        (lambda: content_within(np.ones((2, 3)), 1.0), r"content must be a mask \(m,\) or a projector"),
        (lambda: content_within([[1.0, 1.0], [0.0, 0.0]], 1.0), "content must be an orthogonal projector"),
        (lambda: content_within([1, 0], 1.0)(np.ones((4, 3)), np.ones((4, 3))), "must match content"),
        (lambda: noisy(jax.random.key(0), close, 1.5), "false_accept must be at most 1"),
        (lambda: noisy(jax.random.key(0), close, 0.5, -0.1), "false_reject must be non-negative"),
        (lambda: as_projector("P", [1.0, np.nan]), "P must be finite"),
        (lambda: s3ft_targets(np.ones(2), np.ones(2), np.ones(3, bool)), r"judge must be booleans of shape \(2,\)"),
        (lambda: s3ft_targets(["a"], ["b"], [1]), "judge must be a function or 1 booleans"),
        (lambda: s3ft_targets(["a"], ["a", "b"], str.__eq__), "own must match gold"),
        (lambda: s3ft_targets([], [], str.__eq__), "gold must not be empty"),
        (lambda: s3ft_targets(["a"], ["a"], str.__eq__, ["b", "c"]), "paraphrase must match gold"),
        (lambda: s3ft_targets(["a"], ["a"], lambda answer, gold: "yes"), "judge must return a bool"),
        (lambda: s3ft_targets(np.ones(3), np.ones(2), close), "own must have the shape"),
        (lambda: s3ft_targets(np.ones(2), np.ones(2), lambda answers, gold: True), r"booleans of shape \(2,\)"),
        (lambda: s3ft_targets(np.ones(2), np.ones(2), lambda answers, gold: answers), "booleans of shape"),
        (lambda: s3ft_targets(np.ones(2), np.ones(2), close, np.ones(3)), "paraphrase must have the shape"),
        (lambda: s3ft_targets(np.ones(0), np.ones(0), close), "n ≥ 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
