"""Training corpora and augmentation as configs describe them."""

import pytest

from experiments.speech import make_augmenter, report_bad_files, training_corpus


def test_excluded_speakers_are_left_out(tmp_path, make_speech_config):
    excluded = tmp_path / "excluded.txt"
    excluded.write_text("train1\ntrain3\n")
    corpus = training_corpus(make_speech_config(exclude_speakers=str(excluded)))
    assert corpus.speakers == ("train0", "train2")
    assert len(corpus) == 8


def test_several_folders_are_one_corpus(make_speech_config, speech):
    corpus = training_corpus(make_speech_config(data_dir=(str(speech.train), str(speech.test))))
    assert len(corpus.speakers) == 8
    assert len(corpus) == 4 * 4 + 4 * 3


def test_one_speaker_in_two_folders_is_refused(make_speech_config, speech):
    with pytest.raises(ValueError, match="4 speakers are in more than one corpus, such as .'train0'"):
        training_corpus(make_speech_config(data_dir=(str(speech.train), str(speech.train))))


def test_without_labels_a_folder_of_audio_is_enough(make_speech_config, speech):
    config = make_speech_config(data_dir=(str(speech.train / "train0"), str(speech.test)))
    with pytest.raises(ValueError, match="no audio in .*train0: looked for SPEAKER"):
        training_corpus(config)
    corpus = training_corpus(config, labelled=False)
    assert len(corpus) == 4 + 4 * 3
    # Files of the flat folder count as speakers of their own, the others keep their speakers.
    assert len(corpus.speakers) == 4 + 4


def test_perturbed_speeds_are_new_speakers(make_speech_config):
    assert len(training_corpus(make_speech_config(speed_perturbation=True)).speakers) == 12


def test_no_noise_and_no_rooms_is_no_augmentation(make_speech_config):
    assert make_augmenter(make_speech_config(noise_dir=()), seed=0, sample_rate_hz=16000) is None
    assert make_augmenter(make_speech_config(), seed=0, sample_rate_hz=16000) is not None


def test_two_kinds_of_rooms_are_refused(make_speech_config):
    config = make_speech_config(reverberation_dir="rooms", simulated_rooms=3)
    with pytest.raises(ValueError, match="--reverberation_dir or --simulated_rooms, not both"):
        make_augmenter(config, seed=0, sample_rate_hz=16000)


def test_ten_of_many_bad_files_are_shown(capsys):
    report_bad_files(())
    assert capsys.readouterr().out == ""
    report_bad_files(tuple((f"{number}.wav", "is empty") for number in range(12)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "skipped 12 unreadable files:"
    assert lines[1:] == [f"  {number}.wav: is empty" for number in range(10)]
