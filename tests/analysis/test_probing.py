"""Probes of embeddings made up to hold an attribute, or none."""

import numpy as np
import pytest

from qsv.analysis import probe, probe_folds

pytest.importorskip("sklearn", reason="probes need scikit-learn (qsv[analysis])")

SPEAKERS, EACH = 60, 4


@pytest.fixture
def speakers():
    return np.repeat(np.arange(SPEAKERS), EACH)


@pytest.fixture
def voices(speakers):
    """Embeddings that say who speaks, by a direction for each speaker, and nothing else."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(SPEAKERS, 48))[speakers] + 0.3 * rng.normal(size=(speakers.size, 48))


@pytest.mark.parametrize("kind", ["logistic", "mlp"])
def test_an_attribute_of_the_embedding_is_read(voices, speakers, kind):
    gender = speakers % 2
    marked = voices.copy()
    marked[:, :12] += 2 * (2 * gender - 1)[:, None]
    result = probe(marked, gender, speakers, kind=kind)
    assert result.balanced_accuracy > 0.8 and result.majority == 0.5
    low, high = result.interval()
    assert low <= result.balanced_accuracy <= high


def test_what_only_the_voice_gives_away_is_not_read_from_unknown_speakers(voices, speakers):
    """A probe that met the speakers would know each one's value."""
    value = np.random.default_rng(1).permutation(np.arange(SPEAKERS) % 2)[speakers]
    known = probe(voices, value, np.arange(speakers.size), kind="mlp")
    unknown = probe(voices, value, speakers, kind="mlp")
    assert known.balanced_accuracy > 0.9 > 0.7 > unknown.balanced_accuracy


def test_gaps_between_networks_have_an_interval(voices, speakers):
    gender = speakers % 2
    marked = voices.copy()
    marked[:, :12] += 2 * (2 * gender - 1)[:, None]
    clear = probe(marked, gender, speakers)
    blurred = probe(marked + np.random.default_rng(2).normal(scale=6, size=marked.shape), gender, speakers)
    low, high = blurred.interval(clear)
    assert low <= blurred.balanced_accuracy - clear.balanced_accuracy <= high < 0
    assert clear.interval(clear) == (0, 0)


def test_balanced_accuracy_counts_rare_values_as_much(voices, speakers):
    rare = (speakers == 0).astype(int)
    result = probe(voices, rare, np.arange(speakers.size) % 5)
    shares = [result.correct[result.labels == value].mean() for value in (0, 1)]
    assert result.balanced_accuracy == pytest.approx(np.mean(shares))
    assert result.majority == pytest.approx(1 - 1 / SPEAKERS)


def test_scale_of_an_embedding_does_not_matter(voices, speakers):
    gender = speakers % 2
    scaled = voices * np.random.default_rng(3).uniform(0.1, 10, (speakers.size, 1))
    np.testing.assert_array_equal(probe(voices, gender, speakers).correct, probe(scaled, gender, speakers).correct)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros(SPEAKERS * EACH)}, "same value"),
        ({"labels": np.zeros(3)}, r"labels and groups \[utterances\]"),
        ({"groups": np.zeros(SPEAKERS * EACH)}, "there are 1 groups"),
        ({"kind": "forest"}, "kind must be"),
    ],
)
def test_what_cannot_be_probed_is_refused(voices, speakers, change, message):
    arguments = {"labels": speakers % 2, "groups": speakers} | change
    with pytest.raises(ValueError, match=message):
        probe(voices, **arguments)


def test_folds_that_cannot_be_trained_on_are_refused_before_there_are_embeddings():
    with pytest.raises(ValueError, match="of one value only to train on"):
        probe_folds(["a"] * 4 + ["b"] * 2, [0, 0, 1, 1, 2, 2], num_folds=3)
    with pytest.raises(ValueError, match="same value"):
        probe_folds(["a"] * 4, [0, 0, 1, 1], num_folds=2)


def test_results_of_other_utterances_are_not_compared(voices, speakers):
    result = probe(voices, speakers % 2, speakers)
    other = probe(voices[::2], (speakers % 2)[::2], speakers[::2])
    with pytest.raises(ValueError, match="same utterances"):
        result.interval(other)
