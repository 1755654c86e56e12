"""The layouts of corpora on disk, and errors that say what was looked for."""

import pathlib

import pytest

from qsv.data import (
    CorpusLayout,
    cn_celeb_corpus,
    flat_corpus,
    folder_corpus,
    list_corpus,
    load_corpus,
    voxceleb_corpus,
)


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(corpus):
    return [utterance.name for utterance in corpus.utterances]


def test_folder_layout(tmp_path):
    touch(tmp_path, "b/2.wav", "b/1.FLAC", "a/x/y/3.ogg", "a/4.mp3", "a/notes.txt", "top.wav")
    (tmp_path / "nobody").mkdir()
    corpus = folder_corpus(tmp_path)
    assert names(corpus) == ["a/4.mp3", "a/x/y/3.ogg", "b/1.FLAC", "b/2.wav"]
    assert corpus.speakers == ("a", "b")
    assert [corpus.label(utterance) for utterance in corpus.utterances] == [0, 0, 1, 1]
    assert len(corpus) == 4
    assert corpus.utterance("b/2.wav").path == tmp_path / "b/2.wav"
    assert "b/2.wav" in corpus and "b/3.wav" not in corpus
    assert load_corpus(tmp_path, CorpusLayout.FOLDER) == corpus


def test_flat_layout_knows_no_speakers(tmp_path):
    touch(tmp_path, "b/2.wav", "top.ogg", "b/1.FLAC", "notes.txt")
    corpus = flat_corpus(tmp_path)
    assert names(corpus) == ["b/1.FLAC", "b/2.wav", "top.ogg"]
    assert corpus.speakers == ("b/1.FLAC", "b/2.wav", "top.ogg")
    assert load_corpus(tmp_path, CorpusLayout.FLAT) == corpus


def test_folder_subset_of_speakers(tmp_path):
    touch(tmp_path, "a/1.wav", "b/1.wav", "c/1.wav")
    assert folder_corpus(tmp_path, speakers=["c", "a"]).speakers == ("a", "c")
    with pytest.raises(ValueError, match=r"2 of 3 speakers have no folder .*\['x', 'y'\]"):
        folder_corpus(tmp_path, speakers=["a", "y", "x"])


@pytest.mark.parametrize("load", [flat_corpus, folder_corpus, voxceleb_corpus])
def test_empty_and_missing_folders(tmp_path, load):
    with pytest.raises(ValueError, match="no audio in .* looked for"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("base", ["", "wav/", "dev/wav/", "test/aac/"])
def test_voxceleb_layouts(tmp_path, base):
    touch(
        tmp_path,
        f"{base}id10270/5r0dWxy17C8/00001.wav",
        f"{base}id10271/abc/00002.flac",
        f"{base}other/a/1.wav",
    )
    corpus = load_corpus(tmp_path, CorpusLayout.VOXCELEB)
    assert names(corpus) == ["id10270/5r0dWxy17C8/00001.wav", "id10271/abc/00002.wav"]
    assert corpus.utterances[1].path.suffix == ".flac"
    assert corpus.speakers == ("id10270", "id10271")


def test_voxceleb_parts_are_joined(tmp_path):
    touch(tmp_path, "dev/wav/id1/v/1.wav", "test/wav/id2/v/1.wav")
    assert voxceleb_corpus(tmp_path).speakers == ("id1", "id2")


def test_voxceleb_of_m4a_files_says_to_convert(tmp_path):
    touch(tmp_path, "dev/aac/id1/v/1.m4a")
    with pytest.raises(ValueError, match="ffmpeg"):
        voxceleb_corpus(tmp_path)


def test_list_layout(tmp_path):
    (tmp_path / "list.txt").write_text("ann a/1.wav\n\nbob some folder/2.wav\n", encoding="utf-8")
    corpus = load_corpus(tmp_path / "list.txt", CorpusLayout.LIST)
    assert names(corpus) == ["a/1.wav", "some folder/2.wav"]
    assert corpus.utterances[1].path == tmp_path / "some folder/2.wav"
    elsewhere = list_corpus(tmp_path / "list.txt", root="/elsewhere")
    assert elsewhere.utterances[0].path == pathlib.Path("/elsewhere/a/1.wav")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ann a.wav\nbob\n", r"list\.txt:2: expected 'SPEAKER PATH', got 'bob'"),
        ("ann a.wav\nbob a.wav\n", r"list\.txt:2: a\.wav was listed before, in line 1"),
        ("\n", r"list\.txt: no utterances"),
    ],
)
def test_list_errors_name_file_and_line(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        list_corpus(tmp_path / "list.txt")


def test_cn_celeb_is_named_as_its_lists_name_it(tmp_path):
    files = ("data/id00800/singing-01-001.flac", "eval/enroll/id00800-enroll.flac", "eval/test/id00801-talk-01-002.wav")
    touch(tmp_path, *files)
    corpus = load_corpus(tmp_path, CorpusLayout.CN_CELEB)
    expected = ["id00800/singing-01-001.wav", "enroll/id00800-enroll.wav", "test/id00801-talk-01-002.wav"]
    assert names(corpus) == expected
    assert corpus.speakers == ("id00800", "id00801")
    assert [utterance.path for utterance in corpus.utterances] == [tmp_path / file for file in files]
    with pytest.raises(ValueError, match="no audio in"):
        cn_celeb_corpus(tmp_path / "eval")
