import numpy as np
import pytest

from qsv.scoring import cosine_scores

EMBEDDINGS = np.array([[3.0, 4.0], [4.0, 3.0], [-6.0, -8.0], [0.0, 5.0]])


def test_by_hand():
    scores = cosine_scores(EMBEDDINGS, [0, 0, 0, 3], [0, 1, 2, 1])
    np.testing.assert_allclose(scores, [1.0, 24 / 25, -1.0, 3 / 5])


def test_the_mean_is_subtracted_first():
    scores = cosine_scores(EMBEDDINGS, [0, 0], [1, 3], mean=[3.0, 3.0])
    np.testing.assert_allclose(scores, [0.0, 2 / np.sqrt(13)])
    assert EMBEDDINGS[0, 0] == 3.0  # The caller's array stays as it was.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_chunks_change_nothing(dtype):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(50, 192)).astype(dtype)
    enrolment, test = rng.integers(0, 50, (2, 1000))
    scores = cosine_scores(embeddings, enrolment, test)
    assert scores.dtype == dtype and np.all(np.abs(scores) <= 1.0)
    np.testing.assert_allclose(cosine_scores(embeddings, enrolment, test, chunk=7), scores, rtol=0, atol=1e-6)


def test_scale_does_not_matter_and_no_trials_are_fine():
    np.testing.assert_allclose(cosine_scores(1e15 * EMBEDDINGS, [0], [1]), cosine_scores(EMBEDDINGS, [0], [1]))
    assert cosine_scores(EMBEDDINGS, [], []).shape == (0,)


@pytest.mark.parametrize(
    ("embeddings", "enrolment", "test", "options", "message"),
    [
        ([[1.0, 0.0], [0.0, 0.0]], [0], [1], {}, "embedding 1 has norm zero"),
        (
            [[1.0, 0.0], [1.0, 2.0]],
            [0],
            [1],
            {"mean": [1.0, 2.0]},
            "embedding 1 has norm zero after subtracting",
        ),
        ([[1.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]], [0], [0], {}, r"embedding 1 is not finite \(2 of 3"),
        (EMBEDDINGS, [0, 1], [1, 4], {}, r"test\[1\] is 4, but there are 4 embeddings"),
        (EMBEDDINGS, [0, -1], [1, 1], {}, r"enrolment\[1\] is -1"),
        (EMBEDDINGS, [0.0], [1.0], {}, "integer indices"),
        (EMBEDDINGS, [0, 1], [1], {}, r"\(2,\) and \(1,\)"),
        (EMBEDDINGS, [0], [1], {"mean": [1.0]}, "mean must be"),
        (EMBEDDINGS, [0], [1], {"chunk": 0}, "chunk"),
        (EMBEDDINGS[0], [0], [1], {}, r"\[utterances, dimensions\]"),
    ],
)
def test_wrong_arguments(embeddings, enrolment, test, options, message):
    with pytest.raises(ValueError, match=message):
        cosine_scores(embeddings, enrolment, test, **options)
