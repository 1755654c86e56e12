"""Evaluations through their files: figures, counts, comparisons, and the input they refuse."""

import json
import math

import numpy as np
import pytest
import soundfile

from experiments import evaluate, testing
from experiments.scoring import calibrated_threshold, measure, score
from qsv.data import MissingUtterancesError, load_corpus
from qsv.data.layouts import CorpusLayout
from qsv.deploy import load, load_packed
from qsv.deploy.onnx import export_onnx

PNG = b"\x89PNG"


@pytest.fixture
def make_config(speech, quantized_run):
    def make(*, model=quantized_run, test_dir=speech.test, reference="", output="", det_plot="", **test):
        return evaluate.EvaluateConfig(
            model=str(model),
            reference=str(reference),
            output=str(output),
            det_plot=str(det_plot),
            test=testing.TestConfig(**{"test_dir": str(test_dir), "resamples": 20} | test),
        )

    return make


@pytest.fixture
def write_trials(tmp_path):
    def write(*lines):
        path = tmp_path / "trials.txt"
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


@pytest.fixture
def no_embedding(monkeypatch):
    """Fails the test when a model is loaded."""

    def refuse(path, backend):
        raise AssertionError(f"{path} was loaded before the trials were checked")

    monkeypatch.setattr(evaluate, "load_file_embedder", refuse)


def test_figures_intervals_counts_and_plot_of_all_pairs(tmp_path, make_config, quantized_run, capsys):
    output, plot = tmp_path / "made" / "eval.json", tmp_path / "det.png"
    returned = evaluate.run(make_config(output=output, det_plot=plot))
    figures = json.loads(output.read_text())
    assert figures == json.loads(json.dumps(returned))
    assert (figures["utterances"], figures["speakers"], figures["trials"]) == (12, 4, 66)
    assert (figures["target_trials"], figures["non_target_trials"]) == (12, 54)
    assert figures["file_bytes"] == (quantized_run / "model.safetensors").stat().st_size
    for name in ("eer_percent", "min_dcf"):
        low, high = figures[f"{name}_interval"]
        assert low <= figures[name] <= high
    assert 0 <= figures["eer_percent"] < 50
    assert "12 target and 54 non-target trials" in capsys.readouterr().out
    assert plot.read_bytes().startswith(PNG)


def test_listed_trials_only_are_scored(make_config, write_trials):
    trials = write_trials("1 test0/0.wav test0/1.wav", "0 test0/0.wav test1/0.wav", "0 test2/2.wav test1/0.wav")
    figures = evaluate.run(make_config(trials=trials, resample="trials"))
    assert (figures["trials"], figures["target_trials"], figures["utterances"]) == (3, 1, 4)
    assert (figures["speakers"], figures["resampled"]) == (3, "trials")


def test_a_score_is_the_cosine_of_the_two_files(make_config, write_trials, speech, quantized_run):
    trials = write_trials("1 test0/0.wav test0/1.wav", "0 test0/0.wav test1/0.wav")
    config = make_config(trials=trials)
    test_set = testing.load_test_set(config.test)
    embedder = load(quantized_run / "model.safetensors")
    scores = score(embedder, test_set)
    first, second, third = (
        embedder.embed_file(speech.test / name) for name in ("test0/0.wav", "test0/1.wav", "test1/0.wav")
    )
    cosines = [np.dot(first, x) / np.linalg.norm(first) / np.linalg.norm(x) for x in (second, third)]
    np.testing.assert_allclose(scores, cosines, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"as_norm": True}, {"subtract_mean": True}, {"as_norm": True, "subtract_mean": True}]
)
def test_a_cohort_normalises_the_scores(make_config, speech, quantized_run, options):
    embedder = load(quantized_run / "model.safetensors")
    plain, config = make_config(), make_config(cohort_dir=str(speech.train), top_n=3, **options)
    before, after = (score(embedder, testing.load_test_set(c.test)) for c in (plain, config))
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() > 0.01
    labels = testing.load_test_set(config.test).trials.labels
    assert after[labels].mean() > after[~labels].mean()


def scored(test_set, noise, seed):
    rng = np.random.default_rng(seed)
    return test_set.trials.labels + noise * rng.normal(size=len(test_set.trials))


def test_a_reference_gets_a_difference_and_a_ratio(make_config):
    config = make_config()
    test_set = testing.load_test_set(config.test)
    reference, scores = scored(test_set, 4.0, 0), scored(test_set, 4.0, 1)
    alone, figures = measure(reference, test_set), measure(scores, test_set, reference)
    difference = figures["eer_percent"] - alone["eer_percent"]
    assert figures["eer_percent_difference"] == pytest.approx(difference)
    assert figures["eer_ratio"] == pytest.approx(figures["eer_percent"] / alone["eer_percent"])
    for name in ("eer_percent_difference", "eer_ratio"):
        low, high = figures[f"{name}_interval"]
        assert low < high


def test_a_reference_without_an_error_has_no_ratio(make_config):
    config = make_config()
    test_set = testing.load_test_set(config.test)
    figures = measure(scored(test_set, 4.0, 0), test_set, scored(test_set, 0.0, 0))
    assert figures["eer_percent_difference"] == figures["eer_percent"] > 0
    assert "eer_ratio" not in figures


def test_a_model_differs_from_itself_by_nothing(make_config, float_run, tmp_path):
    figures = evaluate.run(make_config(model=float_run, reference=float_run, det_plot=tmp_path / "det.svg"))
    assert figures["eer_percent_difference"] == 0
    assert figures["eer_percent_difference_interval"] == [0, 0]


def test_both_curves_are_drawn_whatever_the_files_are_called(tmp_path, make_config, float_run, quantized_run):
    models = tmp_path / "float.safetensors", tmp_path / "small.safetensors"
    for model, run in zip(models, (float_run, quantized_run), strict=True):
        model.write_bytes((run / "model.safetensors").read_bytes())
    plot = tmp_path / "det.svg"
    evaluate.run(make_config(model=models[1], reference=models[0], det_plot=plot))
    drawn = plot.read_text()
    assert "float.safetensors" in drawn
    assert "small.safetensors" in drawn


def test_an_exported_file_scores_as_the_packed_one(tmp_path, make_config, quantized_run):
    exported = tmp_path / "model.onnx"
    export_onnx(exported, load_packed(quantized_run / "model.safetensors"))
    test_set = testing.load_test_set(make_config().test)
    embedders = [evaluate.load_file_embedder(str(path), "onnxruntime")[0] for path in (exported, quantized_run)]
    scores = [score(embedder, test_set) for embedder in embedders]
    np.testing.assert_allclose(*scores, atol=1e-4)
    assert evaluate.run(make_config(model=exported))["file_bytes"] == exported.stat().st_size


def test_every_missing_utterance_is_listed_before_anything_is_embedded(make_config, write_trials, no_embedding):
    trials = write_trials("1 test0/0.wav test0/9.wav", "0 nobody/0.wav test1/0.wav")
    with pytest.raises(MissingUtterancesError, match="2 of 4 utterances") as caught:
        evaluate.run(make_config(trials=trials))
    assert caught.value.names == ("nobody/0.wav", "test0/9.wav")
    assert "nobody/0.wav" in str(caught.value)
    assert "test0/9.wav" in str(caught.value)


def test_trials_of_one_class_are_refused(make_config, write_trials, no_embedding):
    trials = write_trials("0 test0/0.wav test1/0.wav", "0 test0/0.wav test2/0.wav")
    with pytest.raises(ValueError, match="trials.txt: expected trials of both classes, got 0 target and 2"):
        evaluate.run(make_config(trials=trials))


def test_a_trial_line_of_another_form_is_named(make_config, write_trials, no_embedding):
    trials = write_trials("1 test0/0.wav test0/1.wav", "test0/0.wav test2/0.wav")
    with pytest.raises(ValueError, match="trials.txt:2: expected '0|1 ENROLMENT TEST'"):
        evaluate.run(make_config(trials=trials))


def test_a_test_file_that_cannot_be_read_stops_the_evaluation(tmp_path, make_config):
    for speaker in ("a", "b"):
        for number in range(2):
            path = tmp_path / "speech" / speaker / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.full(14000, math.nan if speaker == "b" else 0.1), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"b/[01].wav: sample 0 is nan"):
        evaluate.run(make_config(test_dir=tmp_path / "speech"))


def test_missing_settings_and_folders_are_named(tmp_path, make_config, no_embedding):
    with pytest.raises(ValueError, match="--model, --test_dir must be given"):
        evaluate.run(evaluate.EvaluateConfig())
    with pytest.raises(FileNotFoundError, match="no corpus folder .*nowhere"):
        evaluate.run(make_config(test_dir=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="--cohort_dir must be given"):
        evaluate.run(make_config(as_norm=True))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate.run(make_config(trials=str(tmp_path / "nowhere.txt")))


def test_the_calibrated_threshold_separates_the_training_speakers(speech, float_run):
    embedder = load(float_run / "model.safetensors")
    corpus = load_corpus(speech.train, CorpusLayout.FOLDER)
    assert calibrated_threshold(embedder, corpus) == pytest.approx(embedder.threshold, abs=1e-5)


def test_pairs_of_one_class_calibrate_nothing(speech, float_run):
    embedder = load(float_run / "model.safetensors")
    one_speaker = load_corpus(speech.train, CorpusLayout.FOLDER)
    one_speaker = type(one_speaker).of(u for u in one_speaker.utterances if u.speaker == "train0")
    assert calibrated_threshold(embedder, one_speaker) is None


def test_enrolments_of_several_utterances(make_config, write_trials, speech, quantized_run, tmp_path):
    trials = write_trials("ann test0/0.wav 1", "ann test1/0.wav 0", "bob test1/2.wav 1")
    enrolments = tmp_path / "enroll.map"
    enrolments.write_text("ann test0/1.wav test0/2.wav\nbob test1/1.wav\nnobody nowhere.wav\n")
    config = make_config(trials=trials, enrolments=enrolments)
    test_set = testing.load_test_set(config.test)
    embedder = load(quantized_run / "model.safetensors")
    scores = score(embedder, test_set)
    ann = np.mean([embedder.embed_file(speech.test / f"test0/{number}.wav") for number in (1, 2)], axis=0)
    other = embedder.embed_file(speech.test / "test1/0.wav")
    assert scores[1] == pytest.approx(ann @ other / np.linalg.norm(ann) / np.linalg.norm(other), abs=1e-5)
    figures = evaluate.run(config)
    assert (figures["trials"], figures["speakers"]) == (3, 2)
    with pytest.raises(ValueError, match="single utterances; --enrolments has several for ann"):
        _ = test_set.utterances


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ann test0/1.wav test1/1.wav", "enrolment ann is of several speakers, test0, test1"),
        ("ann test0/1.wav test0/7.wav", "1 of 2 utterances of the trials are missing:\n  test0/7.wav"),
        ("bob test0/1.wav", "1 of 3 utterances of the trials are missing:\n  ann"),
    ],
)
def test_enrolments_that_fit_neither_trials_nor_speech(
    make_config, write_trials, no_embedding, tmp_path, line, message
):
    trials = write_trials("ann test0/0.wav 1", "ann test1/0.wav 0")
    enrolments = tmp_path / "enroll.map"
    enrolments.write_text(line)
    with pytest.raises(ValueError, match=message):
        evaluate.run(make_config(trials=trials, enrolments=enrolments))
    with pytest.raises(ValueError, match="--enrolments needs --trials"):
        evaluate.run(make_config(enrolments=enrolments))
