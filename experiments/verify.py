"""Do two recordings have the same speaker?

    python -m experiments.verify --model=runs/an4e_kmeans4 A.wav B.wav

Prints the score and the decision at the model's calibrated threshold (`--threshold` replaces it). The exit status is 0
for the same speaker, 3 for different ones, 1 for an error.
"""

import dataclasses
import sys

from experiments.configuration import launch, require, setting
from experiments.models import load_embedder
from qsv.scoring import cosine_scores

DIFFERENT_SPEAKERS = 3


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """Flags of a verification; the arguments are the two recordings."""

    model: str = setting("", "Model: a run's folder or a model file, float or packed.")
    threshold: float = setting(
        float("nan"), "Score from which on two recordings are of one speaker; NaN takes the model's own."
    )
    arguments: tuple[str, ...] = ()


def run(config: VerifyConfig) -> float:
    """Score two recordings and print the decision; returns the score."""
    require(model=config.model)
    if len(config.arguments) != 2:
        raise ValueError(f"give two recordings to compare, got {len(config.arguments)}: {list(config.arguments)}")
    embedder, _ = load_embedder(config.model)
    embeddings = [embedder.embed_file(path) for path in config.arguments]
    score = float(cosine_scores(embeddings, [0], [1])[0])
    given = config.threshold == config.threshold
    threshold = config.threshold if given else embedder.threshold
    if threshold is None:
        raise ValueError(
            f"score {score:.4f}, but {config.model} has no calibrated threshold to decide by; give --threshold"
        )
    same = score >= threshold
    print(f"score {score:.4f}, threshold {threshold:.4f}: {'same speaker' if same else 'different speakers'}")
    if not same:
        sys.exit(DIFFERENT_SPEAKERS)
    return score


if __name__ == "__main__":
    launch(VerifyConfig, run)
