"""The study of speech quality on a tiny corpus: built, trained, quantized, measured, resumed."""

import csv
import json
import pathlib
import shutil

import numpy as np
import pytest
import soundfile

from experiments import quality_corpus, speech_quality
from experiments.models import load_embedder, load_float_model
from experiments.study_tables import quality_table
from qsv.deploy import load_packed
from qsv.quant import QTensor, leaf_paths

RATE = 16000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Clips whose label is their loudness, so that little training learns it."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows = []
    for split, count in (("train", 48), ("validation", 8), ("test", 12)):
        for number in range(count):
            level = rng.uniform(-4, 0)
            name = f"{split}_{number}.wav"
            soundfile.write(root / name, 10**level * 0.1 * rng.normal(size=RATE // 2), RATE, subtype="FLOAT")
            rows.append((name, split, f"{split}{number % 4}", 3 + level / 2))
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "split", "speaker", "pesq"), *rows])
    return root


def config(corpus, workdir, **changes):
    settings = {"bit_widths": ("8", "2"), "betas": ("1", "5"), "epochs": ("2", "30"), "finetune_epochs": 2.0}
    # Labels are of loudness, which decibels below the loudest don't tell.
    settings |= {"batch_size": 8, "clip_seconds": 0.5, "resamples": 20, "scale": "natural", "learning_rate": 1e-3}
    return speech_quality.SpeechQualityConfig(corpus=str(corpus), workdir=str(workdir), **settings | changes)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quality")
    return workdir, speech_quality.run(config(corpus, workdir))


def test_every_network_is_measured_on_the_test_clips(finished):
    workdir, results = finished
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["float", "binary maps", "binary maps, 8 bits", "binary maps, 2 bits"]
    assert results["clips"] == {"train": 48, "validation": 8, "test": 12} and results["test_speakers"] == 4
    assert rows["float"]["pcc"] > 0.8
    assert "pcc_difference" not in rows["float"] and "pcc_difference" in rows["binary maps"]
    assert json.loads((workdir / "results.json").read_text()) == results
    assert (workdir / "predictions.png").exists()
    # Maps of one bit in place of 32, and codes of 8 bits.
    assert rows["float"]["map_bytes"] == 32 * rows["binary maps"]["map_bytes"]
    assert rows["binary maps, 8 bits"]["weight_bytes"] < rows["binary maps"]["weight_bytes"] / 3.3
    assert quality_table(results).count("\n| ") == 4


def test_the_best_of_either_kind_on_validation_clips_goes_on(finished):
    workdir, results = finished
    kinds = ["float", "binary_maps_beta1", "binary_maps_beta5"]
    assert set(results["validation"]) == {f"{kind}_epochs{epochs}" for kind in kinds for epochs in (2, 30)}
    assert all(figures["mse"] > 0 and -1 <= figures["pcc"] <= 1 for figures in results["validation"].values())
    for kind in ("float", "binary_maps"):
        errors = {name: own["mse"] for name, own in results["validation"].items() if name.startswith(kind)}
        chosen = [name for name in errors if results["validation"][name]["chosen"]]
        assert chosen == [min(errors, key=errors.get)]
    assert [folder.name for folder in sorted(workdir.glob("*_uniform_8"))] == [f"{chosen[0]}_uniform_8"]
    model = load_packed(workdir / f"{chosen[0]}_uniform_8" / "model.safetensors")
    assert model.network.arguments["maps"] == "binary"
    quantized = {name for name, leaf in leaf_paths(model.packed_params) if isinstance(leaf, QTensor)}
    assert len(quantized) == 7 and all(name.endswith("kernel") for name in quantized)


def test_the_float_row_is_of_the_chosen_network(finished, corpus):
    workdir, results = finished
    chosen = next(name for name, own in results["validation"].items() if name.startswith("float") and own["chosen"])
    clips = speech_quality.Clips.read(config(corpus, workdir), "test")
    scores = load_embedder(str(workdir / chosen), use="quality")[0].embed_files(clips.corpus.utterances)[:, 0]
    assert results["rows"][0]["mse"] == pytest.approx(np.mean(np.square(scores - clips.targets)))


def test_what_is_there_is_not_trained_again(finished, corpus, monkeypatch):
    workdir, results = finished
    monkeypatch.setattr(speech_quality, "_train", lambda *args, **kwargs: pytest.fail("trained again"))
    again = speech_quality.run(config(corpus, workdir))
    assert again["rows"] == results["rows"]
    fewer = speech_quality.run(config(corpus, workdir, bit_widths=("2",), resamples=30))
    assert [row["name"] for row in fewer["rows"]] == ["float", "binary maps", "binary maps, 2 bits"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"learning_rate": 1e-2},
            "float_epochs2 was made with learning_rate=0.001, not 0.01; choose another --workdir",
        ),
        ({"dropout": 0.3}, "float_epochs2 was made with dropout=0.0, not 0.3"),
        ({"finetune_epochs": 3.0}, "uniform_8 was made with finetune_epochs=2.0, not 3.0"),
    ],
)
def test_networks_of_other_settings_are_refused(finished, corpus, changes, message):
    workdir, _ = finished
    before = (workdir / "run.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        speech_quality.run(config(corpus, workdir, **changes))
    assert (workdir / "run.json").read_bytes() == before


def test_networks_of_other_clips_are_refused(finished, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "corpus")
    lines = (corpus / "labels.csv").read_text().splitlines()
    (tmp_path / "corpus" / "labels.csv").write_text("\n".join([lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match="float_epochs2 was made with corpus='48 names .*', not '47 names"):
        speech_quality.run(config(tmp_path / "corpus", finished[0]))


def test_speaker_experiments_refuse_a_network_of_quality(finished):
    path = str(finished[0] / "float_epochs30")
    with pytest.raises(ValueError, match="is a dnsmos, which doesn't make speaker embeddings"):
        load_float_model(path)
    with pytest.raises(ValueError, match="speaker embeddings"):
        load_embedder(path)
    assert load_embedder(path, use="quality")[0].network.name == "dnsmos"


@pytest.mark.parametrize(
    "changes",
    [{"betas": ()}, {"betas": ("-1",)}, {"bit_widths": ("eight",)}, {"bit_widths": ("0",)}, {"epochs": ("inf",)}],
)
def test_bad_settings_are_refused(corpus, tmp_path, changes):
    with pytest.raises(ValueError, match="must be positive numbers"):
        config(corpus, tmp_path, **changes)


def test_dropping_all_channels_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="--dropout must be less than 1, got 1"):
        config(corpus, tmp_path, dropout=1.0)


def test_impossible_bits_are_refused_before_anything_is_trained(corpus, tmp_path):
    with pytest.raises(ValueError, match="bits"):
        speech_quality.run(config(corpus, tmp_path / "run", bit_widths=("17",)))
    assert not (tmp_path / "run").exists()


def test_a_corpus_is_built_from_folders(tmp_path, speech_dir):
    pytest.importorskip("pesq")
    settings = quality_corpus.QualityCorpusConfig(
        data_dir=(str(speech_dir / "librispeech251"),),
        noise_dir=(str(speech_dir / "noise"),),
        output=str(tmp_path),
        hours=10 / 1800,
        clip_seconds=2.0,
        validation_share=0.2,
        test_share=0.2,
        workers=0,
    )
    table = quality_corpus.run(settings)
    rows = list(csv.DictReader(table.open()))
    assert [row["split"] for row in rows] == ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    assert all((tmp_path / row["path"]).exists() for row in rows)
    assert quality_corpus.run(settings) == table


def test_scores_of_a_network_become_a_column(tmp_path, finished, corpus):
    pytest.importorskip("pesq")
    noise = pathlib.Path(corpus)
    for speaker in range(3):
        (tmp_path / "speech" / str(speaker)).mkdir(parents=True)
        source = noise / f"train_{speaker}.wav"
        (tmp_path / "speech" / str(speaker) / "a.wav").write_bytes(source.read_bytes())
    settings = quality_corpus.QualityCorpusConfig(
        data_dir=(str(tmp_path / "speech"),),
        noise_dir=(str(noise),),
        output=str(tmp_path / "out"),
        hours=3 / 3600,
        clip_seconds=1.0,
        validation_share=0.3,
        test_share=0.3,
        workers=0,
        dnsmos=str(finished[0] / "float_epochs30"),
    )
    table = quality_corpus.run(settings)
    rows = list(csv.DictReader(table.open()))
    assert all(np.isfinite(float(row["dnsmos_p808"])) for row in rows)
    before = table.read_bytes()
    quality_corpus.run(settings)
    assert table.read_bytes() == before
