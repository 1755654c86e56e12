"""Probes: what a simple classifier can read from frozen embeddings."""

import dataclasses
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Probe = Literal["logistic", "mlp"]

_HIDDEN_UNITS = 128
_MAX_ITERATIONS = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class ProbeResult:
    """How well a probe tells an attribute's values apart, on utterances that it was not fitted to.

    Attributes:
        correct: `[utterances]` bool.
        labels: `[utterances]` the true values.
        groups: `[utterances]` what the folds keep together, and the intervals draw.
    """

    correct: NDArray[np.bool_]
    labels: NDArray[Any]
    groups: NDArray[Any]

    @property
    def balanced_accuracy(self) -> float:
        """Mean over the attribute's values of the share of their utterances."""
        return _balanced_accuracy(self.correct, self.labels)

    @property
    def majority(self) -> float:
        """Share of the most frequent value: the accuracy of guessing it always."""
        return float(np.unique(self.labels, return_counts=True)[1].max() / self.labels.size)

    def interval(
        self, other: "ProbeResult | None" = None, *, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
    ) -> tuple[float, float]:
        """Percentile interval of the balanced accuracy, or of its gap to another network's on the same utterances.

        Args:
            other: what is subtracted, such as the float network's.
            confidence: of the interval, from groups drawn with replacement.
            num_resamples: how many times.
            seed: of the draws.

        Raises:
            ValueError: the other result is of other utterances.
        """
        if other is not None and not (
            np.array_equal(self.labels, other.labels) and len(self.groups) == len(other.groups)
        ):
            raise ValueError("results must be of the same utterances")
        rng = np.random.default_rng(seed)
        names, index = np.unique(self.groups, return_inverse=True)
        members = [np.flatnonzero(index == group) for group in range(names.size)]
        values = []
        for _ in range(num_resamples):
            drawn = np.concatenate([members[group] for group in rng.integers(names.size, size=names.size)])
            value = _balanced_accuracy(self.correct[drawn], self.labels[drawn])
            if other is not None:
                value -= _balanced_accuracy(other.correct[drawn], other.labels[drawn])
            values.append(value)
        low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)


def _balanced_accuracy(correct: NDArray[np.bool_], labels: NDArray[Any]) -> float:
    return float(np.mean([correct[labels == value].mean() for value in np.unique(labels)]))


def probe(
    embeddings: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    *,
    kind: Probe = "logistic",
    num_folds: int = 5,
    seed: int = 0,
) -> ProbeResult:
    """Cross-validated probe of an attribute.

    Embeddings are scaled to unit length, then standardized by the fold's training utterances. No group is in a fold's
    training and test part at once: an attribute of the speaker (gender) needs speakers as groups, that of an utterance
    (emotion) speakers as well, or the probe would know the voices; the speaker itself, and what is one speaker's alone
    such as a session, needs recordings as groups.

    Args:
        embeddings: [utterances, dimensions] float.
        labels: [utterances] the attribute's values.
        groups: [utterances] what must stay together.
        kind: "logistic" regression (linear), or an "mlp" with one hidden layer of 128 units and ReLU.
        num_folds: folds of the cross-validation, of stratified groups.
        seed: of the folds and of the MLP.

    Returns:
        Which utterances the probe got right when they were held out.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: as `probe_folds`; lengths differ.

    Source: probing as in Li et al. 2022 (arXiv 2210.17326).
    """
    folds = probe_folds(labels, groups, num_folds=num_folds, seed=seed)
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    vectors, values = np.asarray(embeddings, np.float64), np.asarray(labels)
    if vectors.ndim != 2 or values.shape != vectors.shape[:1]:
        raise ValueError(
            "embeddings must be [utterances, dimensions], labels and groups [utterances], "
            f"got {vectors.shape} and {values.shape}"
        )
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    if kind == "mlp":
        # Stopping early would hold out utterances of the training part's own groups.
        classifier: Any = MLPClassifier((_HIDDEN_UNITS,), alpha=1e-2, max_iter=_MAX_ITERATIONS, random_state=seed)
    elif kind == "logistic":
        classifier = LogisticRegression(C=0.1, max_iter=_MAX_ITERATIONS)
    else:
        raise ValueError(f"kind must be 'logistic' or 'mlp', got {kind!r}")
    model = make_pipeline(StandardScaler(), classifier)
    correct = np.zeros(values.size, bool)
    for training, held_out in folds:
        model.fit(vectors[training], values[training])
        correct[held_out] = model.predict(vectors[held_out]) == values[held_out]
    return ProbeResult(correct, values, np.asarray(groups))


def probe_folds(
    labels: ArrayLike, groups: ArrayLike, *, num_folds: int = 5, seed: int = 0
) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """The folds of a probe, to see before anything is embedded whether there can be one.

    Args:
        labels: as for `probe`, and so are all others.
        groups: as there.
        num_folds: as there.
        seed: as there.

    Returns:
        (training, held out) places of the utterances, for each fold.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: there is one value only, also in the training part of a fold; fewer groups than folds; no value has
            as many utterances as there are folds; or labels and groups are not of the same utterances.
    """
    try:
        from sklearn.model_selection import StratifiedGroupKFold
    except ImportError as error:
        raise ImportError("probes need scikit-learn: pip install 'qsv[analysis]'") from error
    values, kept = np.asarray(labels), np.asarray(groups)
    if values.ndim != 1 or kept.shape != values.shape:
        raise ValueError(f"labels and groups [utterances] must be of the same, got {values.shape} and {kept.shape}")
    if np.unique(values).size < 2:
        raise ValueError("all utterances have the same value; a probe needs two or more")
    count = np.unique(kept).size
    if not 2 <= num_folds <= count:
        raise ValueError(f"{num_folds} folds need as many groups, and two or more of them; there are {count} groups")
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    folds = list(splitter.split(values, values, kept))
    if any(np.unique(values[training]).size < 2 for training, _ in folds):
        raise ValueError(f"of {num_folds} folds one leaves utterances of one value only to train on")
    return folds
