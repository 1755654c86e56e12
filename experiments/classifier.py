"""Class directions to go on from where speakers are classified while a network is fine-tuned."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models import FloatModel
from experiments.speech import is_readable
from qsv.data import Corpus, Utterance
from qsv.deploy import Embedder

_UTTERANCES_PER_SPEAKER_MEAN = 8


def class_directions(model: FloatModel, corpus: Corpus, *, sub_centers: int) -> jax.Array:
    """The classifier that the float network was trained with, or else the mean embeddings of the speakers.

    A speaker's sub-centers then start side by side.

    Returns:
        [embedding_size, speakers * sub_centers] float32.
    """
    head = model.head(corpus.speakers, sub_centers=sub_centers)
    if head is None:
        embedder = Embedder(model.network, model.variables)
        head = _side_by_side(_speaker_means(embedder, corpus), sub_centers)
    return jnp.asarray(head)


def _side_by_side(directions: np.ndarray, sub_centers: int) -> np.ndarray:
    """[embedding_size, speakers * sub_centers] directions of which a speaker's first is the given one.

    The others differ from it by about 1 %: equal ones would get equal gradients and stay equal.
    """
    noise = np.random.default_rng(0).normal(0, 0.01 / np.sqrt(len(directions)), (*directions.shape, sub_centers))
    noise[..., 0] = 0
    lengths = np.linalg.norm(directions, axis=0)[:, None]
    return (directions[..., None] + lengths * noise).reshape(len(directions), -1).astype(np.float32)


def _speaker_means(embedder: Embedder, corpus: Corpus) -> np.ndarray:
    """Class directions for speakers that the float network was not trained on: [embedding_size, speakers]."""
    by_speaker: dict[str, list[Utterance]] = {speaker: [] for speaker in corpus.speakers}
    for utterance in corpus.utterances:
        by_speaker[utterance.speaker].append(utterance)
    chosen = [
        utterance
        for own in by_speaker.values()
        for utterance in itertools.islice(
            (utterance for utterance in own if is_readable(utterance, embedder.network.frontend)),
            _UTTERANCES_PER_SPEAKER_MEAN,
        )
    ]
    embeddings = embedder.embed_files(chosen)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    sums = np.zeros((len(corpus.speakers), embeddings.shape[1]), np.float32)
    np.add.at(sums, [corpus.label(utterance) for utterance in chosen], embeddings)
    lengths = np.linalg.norm(sums, axis=1)
    # A speaker without a readable file has no direction, but no crops either.
    return sums.T / np.where(lengths > 0, lengths, 1)
