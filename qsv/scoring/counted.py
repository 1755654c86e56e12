"""Error rates of more trials than fit in memory: scores come in blocks, and are counted."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qsv.scoring.cosine import unit_embeddings
from qsv.scoring.metrics import Floats, detection_cost, eer_and_threshold, min_dcf_of_rates

ScoreBlocks = Callable[[], Iterable[tuple[NDArray[np.floating], NDArray[np.bool_]]]]

# A float32 as an unsigned number of the same order: the upper half says which bin, the lower which score in it.
_HALF_BITS = 16
_HALF = 1 << _HALF_BITS
_SIGN = np.uint32(1 << 31)
# Bins whose scores are told apart in one more pass; 2 classes * 2**16 scores * 8 bytes each.
_BINS_A_PASS = 64


@dataclasses.dataclass(frozen=True, eq=False)
class CountedMetrics:
    """Error rates of trials that were counted.

    Attributes:
        eer: equal error rate, a fraction.
        eer_threshold: the score there.
        min_dcf: minimum detection cost, normalised.
        targets: target trials.
        non_targets: non-target trials.
        thresholds: `[points]` float64, ascending, the last infinite: operating points for a DET curve, all of them near
            the equal error rate and the minimum cost, elsewhere one for each bin of scores.
        p_miss: `[points]` miss rates.
        p_fa: `[points]` false-alarm rates.
    """

    eer: float
    eer_threshold: float
    min_dcf: float
    targets: int
    non_targets: int
    thresholds: Floats
    p_miss: Floats
    p_fa: Floats


def count_metrics(
    blocks: ScoreBlocks, *, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0
) -> CountedMetrics:
    """EER and minDCF in bounded memory, whatever the number of trials; exact for scores in float32.

    A first pass counts the trials of each class in 65,536 bins of scores. The rates at the edges of bins say in which
    of them the equal error rate is, and which can hold the minimum cost; further passes count every distinct score of
    these. Some 70 MB are held besides a block.

    Args:
        blocks: gives, each time it is called, the same blocks `(scores [n], labels [n])`, as in `eer`. Scores are
            rounded to float32: those that become equal are ties.
        p_target: as in `min_dcf`.
        c_miss: as in `min_dcf`.
        c_fa: as in `min_dcf`.

    Raises:
        ValueError: a score isn't finite, one class is missing, shapes differ, or the second call gave other scores;
            a prior or cost out of range.
    """
    costs = {"p_target": p_target, "c_miss": c_miss, "c_fa": c_fa}
    bins = np.zeros((2, _HALF), np.int64)
    for keys, labels in _keyed(blocks):
        for kind in (0, 1):
            bins[kind] += np.bincount(keys[labels == kind] >> _HALF_BITS, minlength=_HALF)
    non_targets, targets = bins.sum(axis=1).tolist()
    if not targets or not non_targets:
        raise ValueError(f"need both classes, got {targets} targets and {non_targets} non-targets")
    wanted = _wanted_bins(bins, costs)
    passes = [wanted[start : start + _BINS_A_PASS] for start in range(0, len(wanted), _BINS_A_PASS)]
    found = [_scores_of(blocks, own, bins[:, own]) for own in passes]
    keys, counts = (np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True))
    rest = np.setdiff1d(np.flatnonzero(bins.sum(axis=0)), wanted)
    keys = np.concatenate([keys, rest.astype(np.uint32) << _HALF_BITS])
    counts = np.concatenate([counts, bins[:, rest]], axis=1)[:, np.argsort(keys)]
    thresholds, (p_miss, p_fa) = np.append(_scores(np.sort(keys)), np.inf), _rates(counts)
    error, threshold = eer_and_threshold(thresholds, p_miss, p_fa)
    cost = min_dcf_of_rates(p_miss, p_fa, **costs)
    return CountedMetrics(error, threshold, cost, targets, non_targets, thresholds, p_miss, p_fa)


def pair_blocks(
    embeddings: ArrayLike,
    speakers: ArrayLike,
    *,
    mean: ArrayLike | None = None,
    cohort: tuple[ArrayLike, ArrayLike] | None = None,
    block: int = 2048,
) -> ScoreBlocks:
    """Every unordered pair of different utterances as trials, for `count_metrics`.

    Args:
        embeddings: `[utterances, dimensions]`.
        speakers: `[utterances]` names or numbers.
        mean: `[dimensions]` subtracted from the embeddings.
        cohort: `(mu, sigma)` of `cohort_statistics` with the same mean, for AS-norm; None for cosines.
        block: utterances on either side of a block, which has up to `block**2` trials.

    Raises:
        ValueError: as `unit_embeddings`; shapes don't fit.
    """
    units = unit_embeddings(embeddings, mean=mean)
    names, numbers = np.unique(np.asarray(speakers), return_inverse=True)
    if numbers.shape != (len(units),) or block < 1:
        raise ValueError(f"expected {len(units)} speakers and a positive block, got {numbers.shape} and {block}")
    centres, widths = (None, None) if cohort is None else (np.asarray(side, np.float32) for side in cohort)

    def blocks() -> Iterator[tuple[NDArray[np.floating], NDArray[np.bool_]]]:
        for top in range(0, len(units), block):
            rows = slice(top, top + block)
            for left in range(top, len(units), block):
                columns = slice(left, left + block)
                scores = units[rows] @ units[columns].T
                if centres is not None and widths is not None:
                    one = (scores - centres[rows, None]) / widths[rows, None]
                    scores = (one + (scores - centres[columns]) / widths[columns]) / 2
                labels = numbers[rows, None] == numbers[columns]
                if left == top:
                    upper = np.triu_indices(len(scores), k=1)
                    scores, labels = scores[upper], labels[upper]
                yield scores.ravel(), labels.ravel()

    return blocks


def listed_blocks(scores: NDArray[np.floating], labels: NDArray[np.bool_], *, block: int = 2**22) -> ScoreBlocks:
    """Scores and labels `[trials]`, such as memory-mapped ones, for `count_metrics`."""

    def blocks() -> Iterator[tuple[NDArray[np.floating], NDArray[np.bool_]]]:
        for start in range(0, len(scores), block):
            yield scores[start : start + block], labels[start : start + block]

    return blocks


def _keyed(blocks: ScoreBlocks) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.bool_]]]:
    """Unsigned numbers in the order of the scores, and labels."""
    before = 0
    for scores, labels in blocks():
        if scores.ndim != 1 or scores.shape != labels.shape or labels.dtype != np.bool_:
            raise ValueError(
                f"a block must be scores [n] and bool labels [n], got {scores.shape} and {labels.shape} {labels.dtype}"
            )
        # Adding 0 makes 0 of -0, which is equal to it.
        single = np.asarray(scores, np.float32) + np.float32(0)
        finite = np.isfinite(single)
        if not finite.all():
            first = int(np.argmin(finite))
            raise ValueError(f"the score of trial {before + first} is not finite: {scores[first]}")
        bits = single.view(np.uint32)
        yield np.where(bits & _SIGN, ~bits, bits | _SIGN), labels
        before += len(scores)


def _scores(keys: NDArray[np.uint32]) -> Floats:
    """The scores of such numbers."""
    bits = np.where(keys & _SIGN, keys ^ _SIGN, ~keys)
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def _rates(counts: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Miss and false-alarm rates `[groups + 1]` from counts `[2, groups]` of non-targets and targets, ascending."""
    below = np.concatenate([np.zeros((2, 1), np.int64), np.cumsum(counts, axis=1)], axis=1)
    rejected, missed = below
    return missed / missed[-1], (rejected[-1] - rejected) / rejected[-1]


def _wanted_bins(bins: NDArray[np.int64], costs: dict[str, float]) -> NDArray[np.intp]:
    """Bins in which the equal error rate or the minimum cost may be, and the one after, where thresholds end."""
    p_miss, p_fa = _rates(bins)
    crossing = int(np.argmax(p_miss >= p_fa)) - 1
    # Within a bin misses are no fewer than at its start, and false alarms no fewer than at its end.
    least = detection_cost(p_miss[:-1], p_fa[1:], **costs)
    wanted = least < detection_cost(p_miss, p_fa, **costs).min()
    wanted[crossing] = True
    held = bins.sum(axis=0) > 0
    following = crossing + 1 + np.flatnonzero(held[crossing + 1 :])
    wanted[following[:1]] = True
    return np.flatnonzero(wanted & held)


def _scores_of(
    blocks: ScoreBlocks, bins: NDArray[np.intp], expected: NDArray[np.int64]
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """(keys, counts [2, keys]) of all distinct scores in some bins, of which as many are expected, [2, bins]."""
    places = np.full(_HALF, -1, np.int32)
    places[bins] = np.arange(len(bins))
    counts = np.zeros((2, len(bins) * _HALF), np.int64)
    for keys, labels in _keyed(blocks):
        place = places[keys >> _HALF_BITS]
        chosen = place >= 0
        cells = place[chosen].astype(np.int64) * _HALF + (keys[chosen] & np.uint32(_HALF - 1))
        np.add.at(counts, (labels[chosen].astype(np.intp), cells), 1)
    if not np.array_equal(counts.reshape(2, len(bins), _HALF).sum(axis=2), expected):
        raise ValueError("the blocks have other scores when they are asked for again")
    held = np.flatnonzero(counts.any(axis=0))
    keys = (bins[held >> _HALF_BITS].astype(np.uint32) << _HALF_BITS) | (held & (_HALF - 1)).astype(np.uint32)
    return keys, counts[:, held]
