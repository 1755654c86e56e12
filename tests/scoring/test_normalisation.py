import numpy as np
import pytest

from qsv.scoring import as_norm, cosine_scores, speaker_means


def degrees(*angles):
    return np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1)


def test_by_hand():
    """Of impostors at 0, 60 and 180 degrees, the best two cosines are 1, .5 and sqrt(3)/2, 0."""
    embeddings, cohort = degrees(0, 90), 5 * degrees(0, 60, 180)
    root = np.sqrt(3) / 2
    expected = ((0.1 - 0.75) / 0.25 + (0.1 - root / 2) / (root / 2)) / 2
    np.testing.assert_allclose(as_norm([0.1], embeddings, [0], [1], cohort, top_n=2), [expected])


def reference(scores, embeddings, enrolment, test, cohort, top_n):
    """The plainest form, one trial at a time."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    highest = np.sort(unit @ (cohort / np.linalg.norm(cohort, axis=1, keepdims=True)).T, axis=1)[:, -top_n:]
    means, deviations = highest.mean(axis=1), highest.std(axis=1)
    return [
        ((s - means[e]) / deviations[e] + (s - means[t]) / deviations[t]) / 2
        for s, e, t in zip(scores, enrolment, test, strict=True)
    ]


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_blocks_and_the_mean(block):
    rng = np.random.default_rng(0)
    embeddings, cohort, mean = rng.normal(size=(30, 16)), rng.normal(size=(100, 16)), rng.normal(size=16)
    enrolment, test = rng.integers(5, 30, (2, 200))  # The first five utterances are in no trial.
    scores = cosine_scores(embeddings, enrolment, test, mean=mean)
    normalised = as_norm(scores, embeddings, enrolment, test, cohort, top_n=20, mean=mean, block=block)
    expected = reference(scores, embeddings - mean, enrolment, test, cohort - mean, 20)
    np.testing.assert_allclose(normalised, expected, rtol=1e-9)


def test_both_sides_are_alike_and_the_scale_of_the_embeddings_is_no_matter():
    rng = np.random.default_rng(1)
    embeddings, cohort = rng.normal(size=(10, 16)), rng.normal(size=(50, 16))
    enrolment, test = rng.integers(0, 10, (2, 40))
    scores = cosine_scores(embeddings, enrolment, test)
    one = as_norm(scores, embeddings, enrolment, test, cohort, top_n=10)
    np.testing.assert_allclose(as_norm(scores, 3 * embeddings, test, enrolment, 7 * cohort, top_n=10), one)


def test_speaker_means_by_hand():
    embeddings = np.array([[1, 2], [3, 4], [5, 9], [0, 1]], np.float32)
    means = speaker_means(embeddings, ["b", "a", "b", "c"])
    assert means.dtype == np.float32
    np.testing.assert_array_equal(means, [[3, 4], [3, 5.5], [0, 1]])
    assert speaker_means(np.zeros((0, 3)), []).shape == (0, 3)


def test_wrong_arguments():
    embeddings, cohort = degrees(0, 90), degrees(0, 60, 180)

    def normalise(scores=(0.5,), enrolment=(0,), test=(1,), cohort=cohort, **options):
        return as_norm(scores, embeddings, enrolment, test, cohort, **{"top_n": 2, **options})

    for top_n in (1, 4):
        with pytest.raises(ValueError, match=f"from 2 to the size of the cohort, 3, got {top_n}"):
            normalise(top_n=top_n)
    with pytest.raises(ValueError, match="embedding 0 scores the same with all top 2 of the cohort"):
        normalise(cohort=degrees(30, 30, 30))
    with pytest.raises(ValueError, match="in the cohort: embedding 2 has norm zero"):
        normalise(cohort=np.array([[1.0, 0], [0, 1], [0, 0]]))
    with pytest.raises(ValueError, match="cohort has 3 dimensions, embeddings have 2"):
        normalise(cohort=np.eye(3))
    with pytest.raises(ValueError, match="scores must be"):
        normalise(scores=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"test\[0\] is 2"):
        normalise(test=(2,))
    with pytest.raises(ValueError, match="block"):
        normalise(block=0)
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(3,\)"):
        speaker_means(embeddings, [0, 1, 2])
