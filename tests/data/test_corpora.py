"""Corpora: labels, joining, new voices by speed."""

import pathlib

import pytest

from qsv.data import Corpus, Utterance, concatenate, with_speed_perturbation


def names(corpus):
    return [utterance.name for utterance in corpus.utterances]


def corpus_of(*pairs):
    return Corpus.of(Utterance(name, pathlib.Path(name), speaker) for speaker, name in pairs)


def test_corpus_invariants():
    with pytest.raises(ValueError, match="at least one"):
        Corpus((), ())
    with pytest.raises(ValueError, match="sorted distinct speakers"):
        Corpus((Utterance("1", pathlib.Path("1"), "b"), Utterance("2", pathlib.Path("2"), "a")), ("b", "a"))
    with pytest.raises(ValueError, match=r"1 utterance names are not unique.*'x'"):
        corpus_of(("a", "x"), ("b", "x"))


def test_concatenate():
    first, second = corpus_of(("a", "1")), corpus_of(("b", "2"))
    assert concatenate([first, second]).speakers == ("a", "b")
    with pytest.raises(ValueError, match=r"1 speakers are in more than one corpus, such as \['a'\]"):
        concatenate([first, first])
    joined = concatenate([first, first], prefixes=("x", "y"))
    assert joined.speakers == ("x/a", "y/a")
    assert names(joined) == ["x/1", "y/1"]
    for prefixes in (("x",), ("x", "x")):
        with pytest.raises(ValueError, match="expected 2 distinct prefixes"):
            concatenate([first, second], prefixes=prefixes)


def test_speed_perturbation_makes_new_speakers():
    corpus = with_speed_perturbation(corpus_of(("a", "1"), ("b", "2")))
    assert corpus.speakers == ("a", "a|sp0.9", "a|sp1.1", "b", "b|sp0.9", "b|sp1.1")
    assert [utterance.speed for utterance in corpus.utterances] == [1, 1, 0.9, 0.9, 1.1, 1.1]
    assert names(corpus)[2:4] == ["1|sp0.9", "2|sp0.9"]
    with pytest.raises(ValueError, match="already"):
        with_speed_perturbation(corpus)
    for factors in ((1.0,), (0.9, 0.9), (-1.0,)):
        with pytest.raises(ValueError, match="distinct positive speed factors"):
            with_speed_perturbation(corpus_of(("a", "1")), factors)
