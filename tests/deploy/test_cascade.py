"""The cascade's runtime: the simulator's decisions, stages loaded and utterances embedded only on demand."""

import json

import jax
import numpy as np
import pytest
import soundfile

import qsv
from qsv.data import Record
from qsv.deploy import CascadeVerifier, Embedder, load, load_cascade, load_packed, save, save_cascade
from qsv.models import Network
from qsv.precision import bit_operations, layer_multiplications
from qsv.scoring import AffineCalibration, Cascade, cosine_scores, run_cascade

BITS = (2, 4, 32)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Packed files of one random network at three precisions."""
    folder = tmp_path_factory.mktemp("stages")
    network = Network.of_size("resnet10", width=2, embedding_size=8)
    variables = network.init(jax.random.key(0))
    paths = []
    for bits in BITS:
        rules = [qsv.Rule(".*/kernel", qsv.Uniform(bits))] if bits < 32 else []
        plan = qsv.resolve([*rules, qsv.Rule(".*", None)], variables["params"])
        paths.append(folder / f"{bits}.safetensors")
        params = variables["params"]
        save(paths[-1], network, plan, params, qsv.init(plan, params), variables["batch_stats"])
    return paths


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    rng = np.random.default_rng(0)
    folder, paths = tmp_path_factory.mktemp("audio"), []
    for index in range(6):
        paths.append(folder / f"{index}.wav")
        filtered = np.convolve(rng.normal(size=8000 + 800 * index), rng.normal(size=20 + index), "same")
        soundfile.write(paths[-1], 0.1 * filtered / np.abs(filtered).max(), 16000)
    return paths


@pytest.fixture(scope="module")
def trials():
    return np.triu_indices(6, k=1)


@pytest.fixture(scope="module")
def scores(files, audio, trials):
    """[stages, trials], of every utterance at every precision."""
    return np.stack([cosine_scores(load(file).embed_files(audio, progress=False), *trials) for file in files])


@pytest.fixture(scope="module")
def cascade(scores):
    """Settles about half of the trials that reach a stage; no trial's ratio is at a bound or at the threshold."""
    calibrations = [AffineCalibration(10.0, -10 * _halfway(own)) for own in scores]
    bounds = [_halfway(np.abs(c(own))) for c, own in zip(calibrations, scores, strict=True)]
    return Cascade(tuple(calibrations), tuple(bounds[:-1]))


def _halfway(values):
    """Between the two values in the middle, where rounding moves none to the other side."""
    ordered = np.sort(values)
    below, above = ordered[len(ordered) // 2 - 1 :][:2]
    assert above - below > 1e-4, "two values in the middle are too near to each other"
    return float(below + above) / 2


def test_decisions_are_the_simulators_on_every_trial(files, audio, trials, scores, cascade):
    simulated = run_cascade(cascade, scores)
    assert set(simulated.stages) == {0, 1, 2}
    outcome = CascadeVerifier(files, cascade).verify_trials(audio, *trials, progress=False)
    np.testing.assert_array_equal(outcome.stages, simulated.stages)
    np.testing.assert_array_equal(outcome.accepted, simulated.accepted)
    np.testing.assert_allclose(outcome.llrs, simulated.llrs, atol=1e-3)


def test_one_trial_at_a_time_decides_the_same_and_embeds_no_more(files, audio, trials, scores, cascade):
    simulated = run_cascade(cascade, scores)
    verifier = CascadeVerifier(files, cascade)
    for index, (first, second) in enumerate(zip(*trials, strict=True)):
        decision = verifier.verify(audio[first], audio[second])
        assert (decision.accepted, decision.stage) == (simulated.accepted[index], simulated.stages[index])
        assert decision.llr == pytest.approx(simulated.llrs[index], abs=1e-3)
    assert [use.utterances for use in verifier.use] == simulated.embedded(*trials).tolist()


def test_a_trial_alone_computes_no_rows_but_its_own(monkeypatch, files, audio, cascade):
    rows, embed_batch = [], Embedder.embed_batch

    def noted(self, waveform, lengths=None):
        rows.append(len(waveform))
        return embed_batch(self, waveform, lengths)

    monkeypatch.setattr(Embedder, "embed_batch", noted)
    verifier = CascadeVerifier(files, Cascade(cascade.calibrations, (0.0, 0.0)))
    verifier.verify(audio[0], audio[1])
    verifier.verify(audio[0], audio[2])
    assert rows == [2, 1]


def test_recordings_of_a_prepared_corpus_are_decided_as_their_files_are(files, audio, trials, cascade):
    source = [{"audio": path.read_bytes()} for path in audio]
    samples = [soundfile.info(path).frames for path in audio]
    records = [Record(source, index, f"corpus:{index}", samples[index], 16000) for index in range(len(audio))]
    expected = CascadeVerifier(files, cascade).verify_trials(audio, *trials, progress=False)
    verifier = CascadeVerifier(files, cascade)
    outcome = verifier.verify_trials(records, *trials, progress=False)
    np.testing.assert_array_equal(outcome.llrs, expected.llrs)
    assert verifier.use[0].seconds == pytest.approx(sum(samples) / 16000)


def test_stages_are_read_when_a_trial_reaches_them(files, audio, cascade):
    sure = Cascade(cascade.calibrations, (0.0, 0.0))
    verifier = CascadeVerifier(files, sure)
    assert not any(use.loaded for use in verifier.use)
    assert verifier.verify(audio[0], audio[1]).stage == 0
    assert [use.loaded for use in verifier.use] == [True, False, False]
    assert [use.bytes_read for use in verifier.use] == [files[0].stat().st_size, 0, 0]
    unsure = CascadeVerifier(files, Cascade(cascade.calibrations, (np.inf, np.inf)))
    assert unsure.verify(audio[0], audio[1]).stage == 2
    assert all(use.loaded for use in unsure.use)


def test_operations_and_memory_are_accounted_for(files, audio, cascade):
    verifier = CascadeVerifier(files, Cascade(cascade.calibrations, (np.inf, np.inf)))
    verifier.verify(audio[0], audio[1])
    seconds = sum(soundfile.info(path).duration for path in audio[:2])
    for use, file, bits in zip(verifier.use, files, BITS, strict=True):
        model = load_packed(file)
        multiplications = sum(layer_multiplications(model.network, model.variables(), seconds=10).values())
        assert (use.utterances, use.seconds) == (2, pytest.approx(seconds))
        assert use.bit_operations == pytest.approx(multiplications / 10 * seconds * bits * 32)
        leaves = jax.tree.leaves(model.variables())
        assert use.resident_bytes == 4 * sum(leaf.size for leaf in leaves)


def test_bit_operations_count_each_layers_bits(files):
    model = load_packed(files[0])
    shapes = jax.eval_shape(model.variables)
    counts = layer_multiplications(model.network, shapes, seconds=1)
    found = bit_operations(model.network, shapes, model.packed_params, seconds=1, activation_bits=8)
    assert found == 2 * 8 * sum(counts.values())


def test_a_cascade_is_read_as_it_was_written(tmp_path, files, audio, cascade):
    for bounds in (cascade.bounds, (1.5, np.inf)):
        own = Cascade(cascade.calibrations, bounds, threshold=0.25)
        save_cascade(tmp_path / "cascade.json", files, own)
        verifier = load_cascade(tmp_path / "cascade.json")
        assert verifier.cascade == own
        assert [file.resolve() for file in verifier.files] == [file.resolve() for file in files]


def test_a_folder_with_its_stages_can_be_moved(tmp_path, files, cascade):
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    own = [before / file.name for file in files]
    for source, target in zip(files, own, strict=True):
        target.write_bytes(source.read_bytes())
    save_cascade(before / "cascade.json", own, cascade)
    before.rename(after)
    assert load_cascade(after / "cascade.json").files[0].parent.resolve() == after.resolve()


def test_bad_input_is_refused(tmp_path, files, audio, cascade):
    with pytest.raises(ValueError, match="has 3 stages, got 2 files"):
        CascadeVerifier(files[:2], cascade)
    with pytest.raises(ValueError, match="has 3 stages, got 2 files"):
        save_cascade(tmp_path / "cascade.json", files[:2], cascade)
    with pytest.raises(FileNotFoundError, match="no model file"):
        CascadeVerifier([*files[:2], tmp_path / "nothing"], cascade)
    verifier = CascadeVerifier(files, cascade)
    with pytest.raises(ValueError, match="trials name files 0 to 6, there are 6"):
        verifier.verify_trials(audio, [0], [6])
    with pytest.raises(ValueError, match="integers"):
        verifier.verify_trials(audio, [0.5], [1.0])


@pytest.mark.parametrize("content", ["", "{}", '{"format_version": 1, "threshold": 0, "stages": 3}', "\xff"])
def test_files_that_describe_no_cascade_are_refused(tmp_path, content):
    (tmp_path / "cascade.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="is not a cascade's description"):
        load_cascade(tmp_path / "cascade.json")


def test_descriptions_of_a_newer_version_are_refused(tmp_path, files, cascade):
    path = tmp_path / "cascade.json"
    save_cascade(path, files, cascade)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(ValueError, match="format version 2, this qsv reads 1"):
        load_cascade(path)
