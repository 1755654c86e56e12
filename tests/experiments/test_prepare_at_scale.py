"""A tree of 20,000 utterances as VoxCeleb's: prepared by Beam twice, read back, trained on, in flat memory."""

import hashlib
import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from qsv.data import read_audio
from qsv.data.layouts import audio_files
from qsv.data.prepared import open_prepared

pytestmark = pytest.mark.slow

RATE_HZ = 16000
SPEAKERS, UTTERANCES = 250, 80


@pytest.fixture(scope="module")
def tree(speech_dir, tmp_path_factory):
    """{number of speakers: folder} with `wav/idNNNNN/VIDEO/UTT.wav` of a second or two each, cut from real speech."""
    pytest.importorskip("apache_beam", reason="Apache Beam isn't installed: pip install 'qsv[prepare]'")
    root = tmp_path_factory.mktemp("voxceleb")
    rng = np.random.default_rng(0)
    sources = [read_audio(path) for path in audio_files(speech_dir / "librispeech251")[:SPEAKERS]]
    for number, speech in enumerate(sources):
        for utterance in range(UTTERANCES):
            length = int(rng.uniform(1.0, 1.5) * RATE_HZ)
            start = int(rng.integers(len(speech) - length))
            for name in ("large", *(["small"] if number < SPEAKERS // 10 else [])):
                path = root / name / f"wav/id{10000 + number}/video{utterance // 10}/{utterance:05d}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, speech[start : start + length], RATE_HZ, subtype="PCM_16")
    return root


def prepare(source, output):
    """Peak memory in bytes of a process that prepares."""
    program = (
        "import resource, sys; from experiments import prepare; "
        "prepare.run(prepare.PrepareConfig(corpus='voxceleb1', source=sys.argv[1], output=sys.argv[2], "
        "shard_mbytes=32.0)); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", program, str(source), str(output)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return 1024 * int(text.split()[-1])


def digest(folder):
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            whole.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def test_twenty_thousand_utterances(tree, tmp_path):
    small = prepare(tree / "small", tmp_path / "small")
    large = prepare(tree / "large", tmp_path / "once")
    assert large < small + 100e6
    prepare(tree / "large", tmp_path / "twice")
    assert digest(tmp_path / "once") == digest(tmp_path / "twice")

    prepared = open_prepared(tmp_path / "once")
    assert len(prepared) == SPEAKERS * UTTERANCES and len(prepared.speakers) == SPEAKERS
    report = json.loads(next((tmp_path / "once").rglob("report.json")).read_text())
    assert report["splits"]["train"]["bad"] == [] and report["splits"]["train"]["shards"] > 10
    records = list(prepared.records())
    for index in np.random.default_rng(1).integers(0, len(prepared), 200):
        np.testing.assert_array_equal(
            read_audio(records[index]), read_audio(tree / "large" / "wav" / prepared.names[index])
        )

    command = [sys.executable, "-m", "experiments.train", f"--workdir={tmp_path / 'run'}", "--model=resnet10"]
    command += ["--width=4", f"--data_dir={tmp_path / 'once'}", "--data_layout=prepared", "--crop_seconds=1"]
    command += ["--batch_size=32", "--epochs=0.05", "--loader_workers=2", "--cache_mbytes=0", "--margin=0"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]
    print(f"prepared with {small / 1e6:.0f} MB (2,000 utterances), {large / 1e6:.0f} MB (20,000)")
    print(f"children at most {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3:.0f} MB")
