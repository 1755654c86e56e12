"""Trial lists: both formats, errors that name the line, pairs, and missing utterances."""

import pathlib

import numpy as np
import pytest

from qsv.data import (
    MalformedLinesError,
    MissingUtterancesError,
    Trials,
    Utterance,
    all_pairs,
    check_trials,
    folder_corpus,
    missing_names,
    read_enrolments,
    read_trials,
    write_trials,
)


def as_lines(trials):
    return [
        (bool(label), trials.names[first], trials.names[second])
        for label, first, second in zip(trials.labels, trials.enrolment, trials.test, strict=True)
    ]


def test_voxceleb_kaldi_and_cn_celeb_formats(tmp_path):
    (tmp_path / "vox.txt").write_text("1 a/1.wav a/2.wav\n\n0 a/1.wav b/1.wav\n")
    (tmp_path / "kaldi.txt").write_text("a/1.wav a/2.wav target\na/1.wav\tb/1.wav nontarget\n")
    (tmp_path / "trials.lst").write_text("a/1.wav a/2.wav 1\na/1.wav b/1.wav 0\n")
    for name in ("vox.txt", "kaldi.txt", "trials.lst"):
        trials = read_trials(tmp_path / name)
        assert as_lines(trials) == [(True, "a/1.wav", "a/2.wav"), (False, "a/1.wav", "b/1.wav")]
        assert trials.names == ("a/1.wav", "a/2.wav", "b/1.wav")
        assert trials.enrolment.dtype == trials.test.dtype == np.int32 and trials.labels.dtype == np.bool_
        assert len(trials) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 a b\n0 a\n", r"trials\.txt:2: expected '0\|1 ENROLMENT TEST'.*got '0 a'"),
        ("1 a b\n0 a c d\n", r"trials\.txt:2: "),
        ("1 a b\n\n2 a c\n", r"trials\.txt:3: .*got '2 a c'"),
        ("1 a b\n1 a c\n", r"trials\.txt: expected trials of both classes, got 2 target and 0 non-target"),
        ("", r"trials\.txt: expected trials of both classes, got 0 target"),
    ],
)
def test_errors_name_file_and_line(tmp_path, text, message):
    (tmp_path / "trials.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trials(tmp_path / "trials.txt")


def test_every_malformed_line_is_named(tmp_path):
    (tmp_path / "trials.txt").write_bytes(b"1 a b\nx\n0 a \xff\n3 a c\n0 a\0 b\n")
    with pytest.raises(MalformedLinesError) as raised:
        read_trials(tmp_path / "trials.txt")
    assert [number for number, _ in raised.value.lines] == [2, 4, 5]
    text = str(raised.value)
    assert text.startswith("3 lines of ") and text.isprintable() == ("\n" not in text)
    assert "trials.txt:4: expected '0|1 ENROLMENT TEST'" in text and "trials.txt:5: holds a null character" in text


def test_a_published_list_must_be_whole(tmp_path):
    (tmp_path / "veri_test2.txt").write_text("1 a b\n0 a c\n")
    with pytest.raises(ValueError, match=r"veri_test2\.txt should have 37,611 trials, it has 2"):
        read_trials(tmp_path / "veri_test2.txt")


def test_enrolments(tmp_path):
    path = tmp_path / "enroll.map"
    path.write_text("ann ann/1.wav ann/2.wav\n\nbob bob/1.wav\n")
    assert read_enrolments(path) == {"ann": ("ann/1.wav", "ann/2.wav"), "bob": ("bob/1.wav",)}
    path.write_text("ann\nbob 1 2\nbob 3\ncem 1 1\n")
    with pytest.raises(MalformedLinesError) as raised:
        read_enrolments(path)
    assert [number for number, _ in raised.value.lines] == [1, 3, 4]
    assert "enroll.map:3: bob was enrolled before, in line 2" in str(raised.value)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no enrolments"):
        read_enrolments(path)


def test_constructor_checks():
    indices = np.array([0, 1], np.int32)
    labels = np.array([True, False])
    with pytest.raises(ValueError, match=r"expected test of shape \(2,\) and type int32, got \(2,\) int64"):
        Trials(("a", "b"), indices, indices.astype(np.int64), labels)
    with pytest.raises(ValueError, match=r"expected enrolment of shape \(2,\)"):
        Trials(("a", "b"), indices[:1], indices, labels)
    with pytest.raises(ValueError, match=r"utterances 0\.\.1, there are 1 names"):
        Trials(("a",), indices, indices, labels)
    with pytest.raises(ValueError, match=r"utterances -1\.\.0"):
        Trials(("a",), -indices, np.zeros(2, np.int32), labels)


def utterances_of(*speakers):
    return [Utterance(f"{s}/{n}", pathlib.Path(f"{s}/{n}"), s) for n, s in enumerate(speakers)]


def test_all_pairs():
    trials = all_pairs(utterances_of("a", "b", "a"))
    assert as_lines(trials) == [(False, "a/0", "b/1"), (True, "a/0", "a/2"), (False, "b/1", "a/2")]
    assert len(all_pairs(utterances_of(*"aabbccddee"))) == 45
    with pytest.raises(ValueError, match="both classes"):
        all_pairs(utterances_of("a", "b"))
    with pytest.raises(ValueError, match="1 of 2 utterance names are repeated"):
        all_pairs(utterances_of("a")[:1] * 2)


def test_writing_and_reading_back(tmp_path):
    trials = all_pairs(utterances_of("a", "b", "a", "c"))
    write_trials(tmp_path / "trials.txt", trials)
    assert as_lines(read_trials(tmp_path / "trials.txt")) == as_lines(trials)


def test_missing_names_are_all_reported():
    trials = all_pairs(utterances_of(*["a"] * 20, *["b"] * 20))
    available = {f"a/{n}" for n in range(5)}
    missing = missing_names(trials, available)
    assert len(missing) == 35 and list(missing) == sorted(missing)
    with pytest.raises(MissingUtterancesError, match="35 of 40 utterances of the trials are missing") as raised:
        check_trials(trials, available)
    assert raised.value.names == missing
    assert all(f"\n  {name}" in str(raised.value) for name in missing)
    check_trials(trials, set(trials.names))


def test_real_trials(speech_dir):
    trials = read_trials(speech_dir / "an4_eval_trials.txt")
    check_trials(trials, folder_corpus(speech_dir / "an4"))
    assert len(trials) == len(set(zip(trials.enrolment.tolist(), trials.test.tolist(), strict=True)))
    speakers = np.array([name.split("/")[0] for name in trials.names])
    np.testing.assert_array_equal(speakers[trials.enrolment] == speakers[trials.test], trials.labels)
