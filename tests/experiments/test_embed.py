"""Embeddings of a corpus in shards: by several processes, after a kill, and evaluated from there."""

import shutil
import time

import numpy as np
import pytest

from experiments import embed, evaluate, scoring
from experiments.testing import TestConfig
from qsv.data import BadFilesError, CorpusLayout, load_corpus
from qsv.deploy import EmbeddingStore, load


@pytest.fixture
def make_config(tmp_path, speech, quantized_run):
    def make(**changes):
        settings = {"model": str(quantized_run), "data_dir": str(speech.test), "output": str(tmp_path / "store")}
        return embed.EmbedConfig(**settings | {"shard_size": 5, "batch_size": 4} | changes)

    return make


def test_shares_make_the_embeddings_of_all_files(make_config, speech, quantized_run, capsys):
    """Rows are split over the four devices here, and the last batch of a shard isn't full."""
    embed.run(make_config(share="1/2"))
    assert "12 utterances in 3 shards, 1 of them to be made here" in capsys.readouterr().out
    folder = embed.run(make_config(share="0/2"))
    store = EmbeddingStore.open(folder)
    assert "0 shards are missing" in capsys.readouterr().out
    corpus = load_corpus(speech.test, CorpusLayout.FOLDER)
    assert store.names == tuple(utterance.name for utterance in corpus.utterances)
    expected = load(quantized_run / "model.safetensors").embed_files(corpus.utterances)
    np.testing.assert_allclose(store.read(), expected, rtol=1e-4, atol=1e-5)


def test_what_is_there_is_not_made_again(make_config, monkeypatch):
    folder = embed.run(make_config())
    (folder / "00001-of-00003.safetensors").unlink()
    made = []
    monkeypatch.setattr(embed, "_embed_shard", lambda *arguments: made.append(arguments[4]))
    embed.run(make_config())
    assert made == [1]


def test_unreadable_files_are_listed_however_often_it_is_started(make_config, tmp_path, speech, capsys):
    folder = tmp_path / "speech"
    shutil.copytree(speech.test, folder)
    (folder / "test1" / "empty.wav").touch()
    (folder / "test3" / "text.flac").write_text("no sound")
    store = EmbeddingStore.open(embed.run(make_config(data_dir=str(folder))))
    bad = {"test1/empty.wav": "is empty (0 bytes)"}
    assert store.unreadable().items() >= bad.items() and len(store.unreadable()) == 2
    assert np.isnan(store.read()).any(axis=1).sum() == 2
    capsys.readouterr()
    embed.run(make_config(data_dir=str(folder)))
    output = capsys.readouterr().out
    assert "skipped 2 unreadable files" in output and "test3/text.flac: cannot be decoded" in output
    (tmp_path / "store" / "00002-of-00003.safetensors").unlink()
    with pytest.raises(BadFilesError, match="2 of 14 files"):
        embed.run(make_config(data_dir=str(folder), max_bad_files=1))


def test_a_share_must_be_one():
    for share in ("2/2", "1", "a/b", "-1/2", "1/0"):
        with pytest.raises(ValueError, match="--share must be K/N"):
            embed.EmbedConfig(share=share)


def evaluation(speech, run, **changes):
    test = {"test_dir": str(speech.test), "resamples": 20}
    test |= {name: changes.pop(name) for name in list(changes) if name in TestConfig.__dataclass_fields__}
    return evaluate.EvaluateConfig(model=str(run), test=TestConfig(**test), **changes)


def test_evaluation_reads_what_was_embedded(make_config, speech, quantized_run, float_run, tmp_path, monkeypatch):
    stores = {"embeddings": str(embed.run(make_config()))}
    cohort = {"data_dir": str(speech.train), "output": str(tmp_path / "cohort")}
    stores["cohort_embeddings"] = str(embed.run(make_config(**cohort)))
    options = {"cohort_dir": str(speech.train), "as_norm": True, "subtract_mean": True, "top_n": 3}
    expected = evaluate.run(evaluation(speech, quantized_run, **options))
    with pytest.raises(ValueError, match="embeddings of another model"):
        evaluate.run(evaluation(speech, float_run, **options, **stores))
    monkeypatch.setattr(evaluate, "load_embedder", None)
    found = evaluate.run(evaluation(speech, quantized_run, **options, **stores))
    assert found["eer_percent"] == pytest.approx(expected["eer_percent"])
    assert found["min_dcf"] == pytest.approx(expected["min_dcf"])
    assert found["file_bytes"] == expected["file_bytes"]


@pytest.mark.parametrize("options", [{}, {"as_norm": True, "top_n": 3}])
def test_many_pairs_are_counted_as_few_are_sorted(speech, quantized_run, monkeypatch, capsys, options):
    options = options | ({"cohort_dir": str(speech.train)} if options else {})
    few = evaluate.run(evaluation(speech, quantized_run, **options))
    for module in (evaluate, scoring):
        monkeypatch.setattr(module, "MANY_TRIALS", 65)
    capsys.readouterr()
    many = evaluate.run(evaluation(speech, quantized_run, **options))
    assert "EER" in capsys.readouterr().out
    for name in ("eer_percent", "min_dcf", "trials", "target_trials", "speakers", "utterances"):
        assert many[name] == pytest.approx(few[name])
    assert "eer_percent_interval" in few and "eer_percent_interval" not in many
    with pytest.raises(ValueError, match="pairs of 12 utterances are only counted; give --trials"):
        evaluate.run(evaluation(speech, quantized_run, reference=str(quantized_run)))


def test_many_listed_trials_get_no_intervals(speech, quantized_run, float_run, tmp_path, monkeypatch):
    trials = tmp_path / "trials.txt"
    trials.write_text("1 test0/0.wav test0/1.wav\n0 test0/0.wav test1/0.wav\n0 test2/2.wav test1/0.wav\n")
    config = evaluation(speech, quantized_run, trials=str(trials), reference=str(float_run), resample="trials")
    few = evaluate.run(config)
    monkeypatch.setattr(scoring, "MANY_TRIALS", 2)
    many = evaluate.run(config)
    for name in ("eer_percent", "eer_percent_difference", "min_dcf", "eer_threshold"):
        assert many[name] == pytest.approx(few[name])
    assert "eer_percent_interval" not in many


@pytest.mark.slow
def test_kills_lose_one_shard_at_most(make_config, start_experiment, as_flags, tmp_path):
    expected = EmbeddingStore.open(embed.run(make_config(output=str(tmp_path / "whole"), shard_size=1))).read()
    config = make_config(shard_size=1)
    done, kills = 0, 0
    while True:
        process = start_experiment("embed", *as_flags(config), "--cpu_devices=4")
        while process.poll() is None and len(list((tmp_path / "store").glob("0*"))) < done + 2:
            time.sleep(0.002)
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        done, kills = len(list((tmp_path / "store").glob("0*"))), kills + 1
    assert process.returncode == 0 and kills >= 3
    np.testing.assert_array_equal(EmbeddingStore.open(tmp_path / "store").read(), expected)
