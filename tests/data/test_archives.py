"""Zip archives in parts: reading across their borders, and what is missing."""

import io
import zipfile

import numpy as np
import pytest

from qsv.data.archives import JoinedFile, archives_in, open_archive


@pytest.fixture
def content():
    return np.random.default_rng(0).integers(0, 256, 10_000, np.uint8).tobytes()


@pytest.fixture
def parts(tmp_path, content):
    """Of 1, 4000, 0 and 5999 bytes."""
    bounds = (0, 1, 4001, 4001, 10_000)
    paths = [tmp_path / f"speech_part{letters}" for letters in ("aa", "ab", "ac", "ad")]
    for path, start, end in zip(paths, bounds, bounds[1:], strict=False):
        path.write_bytes(content[start:end])
    return paths


def test_parts_read_as_one_file(parts, content):
    with io.BufferedReader(JoinedFile(parts)) as file:
        assert file.read() == content
        for start, count in ((0, 3), (3999, 10), (4000, 1), (9_990, 100), (10_000, 1), (20_000, 5)):
            file.seek(start)
            assert file.read(count) == content[start : start + count]
        file.seek(-5, io.SEEK_END)
        assert file.read() == content[-5:] and file.tell() == 10_000
        file.seek(100)
        file.seek(-50, io.SEEK_CUR)
        assert file.read(4) == content[50:54]


def zipped(folder, name, members, parts):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for member, text in members.items():
            archive.writestr(member, text)
    size = -(-len(data.getvalue()) // parts)
    for i in range(parts):
        suffix = f"_parta{'abcdef'[i]}" if parts > 1 else ".zip"
        (folder / f"{name}{suffix}").write_bytes(data.getvalue()[i * size : (i + 1) * size])


def test_archives_are_found_and_opened_once(tmp_path):
    zipped(tmp_path, "dev", {"a.txt": "x" * 500, "b.txt": "y"}, 3)
    zipped(tmp_path, "test", {"c.txt": "z"}, 1)
    (tmp_path / "readme.txt").write_text("no archive")
    found = archives_in(tmp_path.iterdir())
    assert [[path.rsplit("/", 1)[1] for path in own] for own in found] == [
        ["dev_partaa", "dev_partab", "dev_partac"],
        ["test.zip"],
    ]
    assert open_archive(found[0]).read("a.txt") == b"x" * 500
    assert open_archive(found[0]) is open_archive(found[0])


def test_a_missing_part_is_named(tmp_path):
    zipped(tmp_path, "dev", {"a.txt": "x" * 5000}, 3)
    (tmp_path / "dev_partac").unlink()
    (found,) = archives_in(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"dev_partaa.*dev_partab.*is a part missing\?"):
        open_archive(found)
