"""Preparations through their files: what is prepared, what is reported, and what is refused."""

import json

import pytest

from experiments import evaluate, prepare, testing
from experiments.speech import training_corpus
from qsv.data.prepared import open_prepared


def test_a_folder_is_prepared_with_a_report(tmp_path, speech, capsys):
    config = prepare.PrepareConfig(
        source=str(speech.train), output=str(tmp_path), runner="", validation_share=0.3, name="demo"
    )
    folder = prepare.run(config)
    train, validation = open_prepared(folder), open_prepared(folder, "validation")
    report = json.loads((folder / prepare.REPORT).read_text())
    for own in (train, validation):
        counts = report["splits"][own.split]
        assert counts["prepared"] == counts["found"] == len(own) > 0 and counts["bad"] == []
    assert folder.parts[-2:] == ("demo", "1.0.0")
    assert f"train: {len(train)} recordings of {len(train.speakers)} speakers" in capsys.readouterr().out
    assert prepare.run(config) == folder
    assert "is there already" in capsys.readouterr().out


def test_training_and_trials_take_a_prepared_corpus(tmp_path, speech, make_speech_config, quantized_run):
    prepare.run(prepare.PrepareConfig(source=str(speech.train), output=str(tmp_path / "train"), runner=""))
    corpus = training_corpus(make_speech_config(data_dir=(str(tmp_path / "train"),), data_layout="prepared"))
    assert corpus.speakers == training_corpus(make_speech_config()).speakers
    folder = prepare.run(prepare.PrepareConfig(source=str(speech.test), output=str(tmp_path / "test"), runner=""))
    found = []
    for test in ({"test_dir": str(speech.test)}, {"test_dir": str(folder), "test_layout": "prepared"}):
        config = evaluate.EvaluateConfig(str(quantized_run), test=testing.TestConfig(**test, resamples=20))
        found.append(evaluate.run(config))
    assert found[0]["eer_percent"] == pytest.approx(found[1]["eer_percent"])
    assert found[0]["trials"] == found[1]["trials"]


def test_a_report_that_a_kill_prevented_is_made_up_for(tmp_path, speech):
    config = prepare.PrepareConfig(source=str(speech.train), output=str(tmp_path), runner="")
    folder = prepare.run(config)
    report = (folder / prepare.REPORT).read_bytes()
    (folder / prepare.REPORT).unlink()
    shards = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare.run(config) == folder
    assert (folder / prepare.REPORT).read_bytes() == report
    assert all(path.stat().st_mtime_ns == time for path, time in shards.items())


def test_an_interrupted_preparation_is_no_corpus_and_removed(tmp_path, speech, capsys):
    config = prepare.PrepareConfig(source=str(speech.train), output=str(tmp_path), runner="")
    folder = prepare.run(config)
    begun = folder.parent / f"incomplete.ABC123_{folder.name}"
    folder.rename(begun)
    with pytest.raises(FileNotFoundError, match="no prepared corpus"):
        open_prepared(tmp_path)
    assert prepare.run(config) == folder and not begun.exists()
    assert f"removing {begun}, which was interrupted" in capsys.readouterr().out


def test_bad_recordings_are_reported(tmp_path, speech, capsys):
    source = tmp_path / "source"
    (source / "ann").mkdir(parents=True)
    (source / "ann" / "bad.wav").write_bytes(b"RIFF")
    good = next(path for path in speech.train.rglob("*") if path.is_file())
    (source / "ann" / f"good{good.suffix}").write_bytes(good.read_bytes())
    folder = prepare.run(prepare.PrepareConfig(source=str(source), output=str(tmp_path / "out"), runner=""))
    (bad,) = json.loads((folder / prepare.REPORT).read_text())["splits"]["train"]["bad"]
    assert bad[0] == "ann/bad.wav" and "cannot be decoded" in bad[1]
    assert "left out ann/bad.wav" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--source"),
        ({"source": "SOURCE"}, "--output"),
        ({"source": "SOURCE", "output": "OUT", "corpus": "voxceleb1"}, "no recordings were found"),
        ({"source": "SOURCE", "output": "OUT", "validation_share": 1.5}, "below 1, got 1.5"),
    ],
)
def test_wrong_settings(tmp_path, speech, settings, message):
    places = {"SOURCE": str(speech.train), "OUT": str(tmp_path)}
    with pytest.raises(ValueError, match=message):
        prepare.run(prepare.PrepareConfig(**{name: places.get(value, value) for name, value in settings.items()}))
