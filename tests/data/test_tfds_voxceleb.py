"""Prepared corpora: what was there is written, twice in the same bytes; bad files named; read without TensorFlow."""

import hashlib
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from qsv.data import (
    CorpusLayout,
    audio_duration_seconds,
    load_corpus,
    read_audio,
    training_loader,
    with_speed_perturbation,
)
from qsv.data.prepared import open_prepared
from qsv.data.recordings import speaker_folders, with_validation
from qsv.data.tfds_voxceleb import SpeakerRecordings, beam_config, encoded

RATE_HZ = 16000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Six speakers of four recordings, one at 8 kHz in stereo, and two files that can't be read."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for speaker in range(6):
        folder = root / f"s{speaker}"
        folder.mkdir()
        for number in range(4):
            rate, shape = (8000, (4000, 2)) if (speaker, number) == (0, 0) else (RATE_HZ, (6000 + 100 * number,))
            soundfile.write(folder / f"{number}.wav", 0.1 * rng.normal(size=shape), rate)
    (root / "s1" / "empty.wav").write_bytes(b"")
    (root / "s2" / "noise.flac").write_bytes(rng.bytes(500))
    return root


def prepare(corpus, folder, *, share=0.0, beam=False, **options):
    splits = with_validation(speaker_folders(corpus), share)
    settings = {"config": "test", "data_dir": str(folder), "file_format": "array_record", "shard_bytes": 60_000}
    builder = SpeakerRecordings(splits, **settings | options)
    builder.download_and_prepare(download_config=beam_config("DirectRunner") if beam else None)
    return folder


def read(prepared, index):
    return list(prepared.records())[index].read_bytes()


def digests(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_all_that_can_be_read_is_there(corpus, tmp_path):
    prepared = open_prepared(prepare(corpus, tmp_path))
    assert len(prepared) == 24 and prepared.speakers == tuple(f"s{i}" for i in range(6))
    assert prepared.sample_rate_hz == RATE_HZ
    assert len(list(tmp_path.rglob("*array_record-?????-of-00006"))) == 6
    for index in (0, 7, 23):
        name = prepared.names[index]
        expected = read_audio(corpus / name)
        found, rate = soundfile.read(io.BytesIO(read(prepared, index)), dtype="float32")
        np.testing.assert_allclose(found, expected, atol=1 / 32768)
        assert rate == RATE_HZ and prepared.num_samples[index] == len(found)
        assert prepared.speakers[prepared.labels[index]] == name.split("/")[0]
    bad = [line for path in tmp_path.rglob("*.bad.tsv") for line in path.read_text().splitlines()]
    assert sorted(line.split("\t")[0] for line in bad) == ["s1/empty.wav", "s2/noise.flac"]
    assert any("is empty" in line for line in bad)


@pytest.mark.parametrize("encoding", ["flac", "pcm16", "original"])
def test_encodings(corpus, tmp_path, encoding):
    prepared = open_prepared(prepare(corpus, tmp_path, encoding=encoding))
    index = list(prepared.names).index("s3/2.wav")
    data = read(prepared, index)
    assert soundfile.info(io.BytesIO(data)).format == {"flac": "FLAC"}.get(encoding, "WAV")
    if encoding == "original":
        assert data == (corpus / "s3/2.wav").read_bytes()
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(data))[0], soundfile.read(corpus / "s3/2.wav")[0])


def test_another_process_gives_the_same_bytes(corpus, tmp_path):
    here = digests(prepare(corpus, tmp_path / "here"))
    program = (
        "from qsv.data.recordings import speaker_folders; from qsv.data.tfds_voxceleb import SpeakerRecordings; "
        f"SpeakerRecordings(speaker_folders({str(corpus)!r}), config='test', data_dir={str(tmp_path / 'there')!r}, "
        "file_format='array_record', shard_bytes=60_000).download_and_prepare()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert digests(tmp_path / "there") == here


def test_splits_share_no_speaker_and_training_classes_come_first(corpus, tmp_path):
    prepare(corpus, tmp_path, share=0.3)
    train, validation = open_prepared(tmp_path), open_prepared(tmp_path, "validation")
    assert len(train.speakers) == 4 and len(validation.speakers) == 2
    assert not set(train.speakers) & set(validation.speakers)
    # The classes that TFDS itself gives.
    assert sorted({int(example["speaker"]) for example in train.source}) == [0, 1, 2, 3]
    assert [int(example["speaker"]) for example in train.source] == list(train.labels)
    with pytest.raises(ValueError, match="no split 'test', only train, validation"):
        open_prepared(tmp_path, "test")


def test_a_prepared_corpus_stands_where_folders_do(corpus, tmp_path):
    prepare(corpus, tmp_path, share=0.3)
    train, validation = (load_corpus(root, CorpusLayout.PREPARED) for root in (tmp_path, f"{tmp_path}:validation"))
    assert len(train) == 16 and len(validation) == 8 and not set(train.speakers) & set(validation.speakers)
    both = load_corpus(f"{tmp_path}:train+validation", CorpusLayout.PREPARED)
    assert len(both) == 24 and set(both.speakers) == {*train.speakers, *validation.speakers}
    utterance = train.utterance("s3/2.wav") if "s3" in train.speakers else validation.utterance("s3/2.wav")
    assert utterance.speaker == "s3"
    np.testing.assert_array_equal(read_audio(utterance.path), read_audio(corpus / "s3/2.wav"))
    assert audio_duration_seconds(utterance.path) == audio_duration_seconds(corpus / "s3/2.wav")
    perturbed = with_speed_perturbation(train)
    options = {"batch_size": 4, "crop_seconds": 0.2, "seed": 0, "sample_rate_hz": RATE_HZ}
    batches = []
    for num_workers, cache_bytes in ((0, 2**30), (2, 0)):
        loader = training_loader(perturbed, num_workers=num_workers, cache_bytes=cache_bytes, **options)
        batches.append([next(loader) for _ in range(6)])
        loader.close()
    for one, other in zip(*batches, strict=True):
        np.testing.assert_array_equal(one["waveform"], other["waveform"])
        np.testing.assert_array_equal(one["label"], other["label"])


def test_a_split_survives_pickling(corpus, tmp_path):
    prepared = open_prepared(prepare(corpus, tmp_path))
    copy = pickle.loads(pickle.dumps(prepared))
    assert read(copy, 5) == read(prepared, 5)


def test_beam_writes_the_same_bytes(corpus, tmp_path):
    pytest.importorskip("apache_beam", reason="Apache Beam isn't installed: pip install 'qsv[prepare]'")
    options = {"shard_bytes": 25_000}
    plain, beam = prepare(corpus, tmp_path / "a", **options), prepare(corpus, tmp_path / "b", beam=True, **options)
    # With more than ten, the order of their numbers isn't that of their texts.
    assert len(list(beam.rglob("*.index.tsv"))) > 10 and len(open_prepared(beam)) == 24
    found = {path: digest for path, digest in digests(beam).items() if "shard_infos" not in path.name}
    assert found == digests(plain)


def test_aac(tmp_path):
    av = pytest.importorskip("av", reason="PyAV isn't installed: pip install 'qsv[prepare]'")
    (tmp_path / "ann").mkdir()
    path = tmp_path / "ann" / "1.m4a"
    tone = (0.3 * np.sin(0.2 * np.arange(32_000))).astype(np.float32)
    with av.open(str(path), "w", format="ipod") as container:
        stream = container.add_stream("aac", rate=RATE_HZ, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        frame.sample_rate = RATE_HZ
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    from qsv.data.recordings import Recording

    recording = Recording("ann/1.wav", "ann", str(path), (), path.stat().st_size)
    data, num_samples = encoded(recording, "flac", RATE_HZ)
    found, _ = soundfile.read(io.BytesIO(data))
    assert num_samples == len(found) and abs(len(found) - len(tone)) < 2048
    middle = found[8000:24_000]
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.05)
    with pytest.raises(ValueError, match="1 recordings are AAC"):
        SpeakerRecordings({"train": [recording]}, config="test", encoding="original", data_dir=str(tmp_path))


def test_wrong_options(corpus, tmp_path):
    with pytest.raises(ValueError, match="encoding must be one of flac, pcm16, original, got 'mp3'"):
        prepare(corpus, tmp_path, encoding="mp3")
    with pytest.raises(ValueError, match="shard_bytes must be positive"):
        prepare(corpus, tmp_path, shard_bytes=0)
    with pytest.raises(FileNotFoundError, match="holds no prepared corpus"):
        open_prepared(tmp_path)
    prepare(corpus, tmp_path)
    prepare(corpus, tmp_path, config="other")
    with pytest.raises(ValueError, match="holds 2 prepared corpora"):
        open_prepared(tmp_path)


def test_a_corpus_without_a_readable_file_is_refused(tmp_path):
    (tmp_path / "source" / "ann").mkdir(parents=True)
    (tmp_path / "source" / "ann" / "bad.wav").write_bytes(b"RIFF")
    prepare(tmp_path / "source", tmp_path / "prepared")
    with pytest.raises(ValueError, match=r"no recording of the split 'train' could be read"):
        open_prepared(tmp_path / "prepared")


def test_nothing_needs_tensorflow(corpus, tmp_path):
    prepare(corpus, tmp_path)
    program = (
        "import sys; from qsv.data.prepared import open_prepared; "
        f"print(len(next(open_prepared({str(tmp_path)!r}).records()).read_bytes()), 'tensorflow' in sys.modules)"
    )
    text = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert int(text.split()[0]) > 1000 and text.split()[1] == "False"
