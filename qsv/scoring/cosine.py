"""Cosine scores of trials, in bounded memory."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def cosine_scores(
    embeddings: ArrayLike,
    enrolment: ArrayLike,
    test: ArrayLike,
    *,
    mean: ArrayLike | None = None,
    chunk: int = 16384,
) -> NDArray[np.floating]:
    """Cosine similarity of pairs of embeddings, after subtracting a mean from each.

    Args:
        embeddings: `[utterances, dimensions]`, one of each utterance.
        enrolment: `[trials]` integers, the embedding on one side of each trial.
        test: `[trials]` integers, that on the other side.
        mean: `[dimensions]` subtracted from all, usually the mean of the training set's embeddings; None for
            none.
        chunk: trials scored at a time; the pairs of one chunk are all that is held besides the embeddings.

    Returns:
        `[trials]` scores in [-1, 1]; float64 if the embeddings are, else float32.

    Raises:
        ValueError: shapes do not fit, an index is out of range (the trial is named), or an embedding is not
            finite or of norm zero after subtracting the mean (its index is named).

    Source: WeSpeaker, `wespeaker/bin/score.py`.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be positive, got {chunk}")
    units = unit_embeddings(embeddings, mean=mean)
    enrolment, test = checked_pairs(enrolment, test, len(units))
    scores = np.empty(enrolment.size, units.dtype)
    for start in range(0, enrolment.size, chunk):
        trials = slice(start, start + chunk)
        scores[trials] = np.einsum("td,td->t", units[enrolment[trials]], units[test[trials]])
    # Rounding takes the score of an utterance with itself beyond 1.
    return np.clip(scores, -1.0, 1.0, out=scores)


def unit_embeddings(embeddings: ArrayLike, *, mean: ArrayLike | None = None) -> NDArray[np.floating]:
    """Embeddings less their mean, divided by their norms; arguments and errors as in `cosine_scores`."""
    embeddings = np.asarray(embeddings)
    embeddings = embeddings.astype(np.float64 if embeddings.dtype == np.float64 else np.float32)
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be [utterances, dimensions], got shape {embeddings.shape}")
    if mean is not None:
        mean = np.asarray(mean, embeddings.dtype)
        if mean.shape != embeddings.shape[1:]:
            raise ValueError(f"mean must be {embeddings.shape[1:]} like the embeddings, got shape {mean.shape}")
        embeddings -= mean
    norms = np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64))
    usable = np.isfinite(norms) & (norms > 0.0)
    if not usable.all():
        first = np.argmin(usable)
        fault = "has norm zero" if norms[first] == 0.0 else "is not finite"
        after = "" if mean is None else " after subtracting the mean"
        raise ValueError(f"embedding {first} {fault}{after} ({np.count_nonzero(~usable)} of {norms.size} unusable)")
    embeddings /= norms[:, None].astype(embeddings.dtype)
    return embeddings


def checked_pairs(
    enrolment: ArrayLike, test: ArrayLike, num_embeddings: int
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Both sides of the trials as integer arrays; raises what `cosine_scores` documents."""
    enrolment, test = np.asarray(enrolment), np.asarray(test)
    if enrolment.ndim != 1 or enrolment.shape != test.shape:
        raise ValueError(f"enrolment and test must be [trials] both, got {enrolment.shape} and {test.shape}")
    for name, indices in (("enrolment", enrolment), ("test", test)):
        if indices.size and not np.issubdtype(indices.dtype, np.integer):
            raise ValueError(f"{name} must hold integer indices of embeddings, got {indices.dtype}")
        outside = (indices < 0) | (indices >= num_embeddings)
        if outside.any():
            first = np.argmax(outside)
            raise ValueError(f"{name}[{first}] is {indices[first]}, but there are {num_embeddings} embeddings")
    return enrolment.astype(np.intp), test.astype(np.intp)
