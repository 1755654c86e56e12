"""Published corpora as they are found: names, speakers, splits, and what is refused."""

import zipfile

import pytest

from qsv.data import CorpusLayout
from qsv.data.recordings import (
    TEST,
    TRAIN,
    VALIDATION,
    Recording,
    cn_celeb,
    shuffled,
    speaker_folders,
    voxceleb1,
    voxceleb2,
    with_validation,
)


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def names(recordings):
    return sorted(own.name for own in recordings)


def test_voxceleb1_in_folders(tmp_path):
    touch(
        tmp_path,
        "dev/wav/id10001/video/00001.wav",
        "dev/wav/id10269/video/00001.wav",
        "test/wav/id10270/video/00002.wav",
        "test/wav/id10309/other/00001.flac",
        "notes.wav",
    )
    splits = voxceleb1(tmp_path)
    assert names(splits[TRAIN]) == ["id10001/video/00001.wav", "id10269/video/00001.wav"]
    assert names(splits[TEST]) == ["id10270/video/00002.wav", "id10309/other/00001.wav"]
    own = splits[TRAIN][0]
    assert own.speaker == "id10001" and own.read() == b"dev/wav/id10001/video/00001.wav"
    assert own.num_bytes == len(own.read())


def test_voxceleb1_in_parts_of_a_zip_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("wav/id10001/video/00001.wav", "one")
        archive.writestr("wav/id10001/video/readme.txt", "no audio")
        archive.writestr("wav/id10270/video/00001.wav", "two" * 100)
    data = (tmp_path / "all.zip").read_bytes()
    (tmp_path / "all.zip").unlink()
    (tmp_path / "vox1_dev_wav_partaa").write_bytes(data[:100])
    (tmp_path / "vox1_dev_wav_partab").write_bytes(data[100:])
    splits = voxceleb1(tmp_path)
    assert names(splits[TRAIN]) == ["id10001/video/00001.wav"]
    (own,) = splits[TEST]
    assert own.read() == b"two" * 100 and own.num_bytes == 300 and len(own.archive) == 2


def test_voxceleb2_is_split_by_folder_or_archive(tmp_path):
    touch(tmp_path, "dev/aac/id00012/video/00001.m4a")
    with zipfile.ZipFile(tmp_path / "vox2_test_aac.zip", "w") as archive:
        archive.writestr("aac/id00017/video/00001.m4a", "speech")
    splits = voxceleb2(tmp_path)
    assert names(splits[TRAIN]) == ["id00012/video/00001.wav"]
    assert names(splits[TEST]) == ["id00017/video/00001.wav"]


def test_cn_celeb(tmp_path):
    touch(
        tmp_path,
        "data/id00000/singing-01-001.flac",
        "data/id00800/speech-01-001.flac",
        "eval/enroll/id00800-enroll.flac",
        "eval/test/id00800-speech-01-002.flac",
    )
    with pytest.raises(ValueError, match=r"dev\.lst is missing"):
        cn_celeb(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "dev.lst").write_text("id00000\n")
    splits = cn_celeb(tmp_path)
    assert names(splits[TRAIN]) == ["id00000/singing-01-001.wav"]
    assert names(splits[TEST]) == [
        "enroll/id00800-enroll.wav",
        "id00800/speech-01-001.wav",
        "test/id00800-speech-01-002.wav",
    ]
    assert {own.speaker for own in splits[TEST]} == {"id00800"}


def test_any_folders_and_lists(tmp_path):
    touch(tmp_path, "ann/1.wav", "bob/2.flac")
    (tmp_path / "list.txt").write_text("ann ann/1.wav\n")
    assert names(speaker_folders(tmp_path)[TRAIN]) == ["ann/1.wav", "bob/2.flac"]
    assert names(speaker_folders(tmp_path / "list.txt", CorpusLayout.LIST)[TRAIN]) == ["ann/1.wav"]


def test_what_is_there_twice_or_nowhere_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no corpus folder"):
        voxceleb1(tmp_path / "absent")
    with pytest.raises(ValueError, match="no recordings were found"):
        voxceleb1(tmp_path)
    touch(tmp_path, "dev/wav/id10001/video/00001.wav", "wav/id10001/video/00001.flac")
    with pytest.raises(ValueError, match=r"id10001/video/00001\.wav is there twice: .*dev/wav.* and .*flac"):
        voxceleb1(tmp_path)


def test_one_speaker_in_train_and_test_is_refused(tmp_path):
    touch(tmp_path, "dev/aac/id00012/video/00001.wav", "test/aac/id00012/video/00002.wav")
    with pytest.raises(ValueError, match=r"1 speakers are in train and in test, such as \['id00012'\]"):
        voxceleb2(tmp_path)


def of_speakers(count):
    return {TRAIN: [Recording(f"{i}/{k}.wav", f"s{i}", "", (), 1) for i in range(count) for k in range(3)]}


def test_validation_speakers_are_a_share_and_disjoint():
    splits = with_validation(of_speakers(20), 0.2)
    held = {own.speaker for own in splits[VALIDATION]}
    assert len(held) == 4 and not held & {own.speaker for own in splits[TRAIN]}
    assert len(splits[TRAIN]) + len(splits[VALIDATION]) == 60
    assert with_validation(of_speakers(20), 0.2) == splits
    assert with_validation(of_speakers(3), 0) == of_speakers(3)
    assert len(with_validation(of_speakers(3), 0.01)[VALIDATION]) == 3
    with pytest.raises(ValueError, match="leaves none for training"):
        with_validation(of_speakers(2), 0.9)
    with pytest.raises(ValueError, match="below 1, got 1"):
        with_validation(of_speakers(2), 1)


def test_the_order_depends_on_names_alone():
    recordings = of_speakers(20)[TRAIN]
    order = shuffled(recordings)
    assert shuffled(recordings[::-1]) == order != recordings
    assert sorted(order, key=lambda own: own.name) == sorted(recordings, key=lambda own: own.name)
