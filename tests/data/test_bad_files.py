"""Unreadable files: counted once, and an error when there are too many."""

import pytest

from qsv.data.bad_files import BadFiles, BadFilesError


def test_each_file_counts_once_and_the_first_reason_stays():
    bad = BadFiles(limit=1, num_files=5)
    bad.add("b", "is empty")
    bad.add("b", "is gone")
    assert bad.sorted() == (("b", "is empty"),)


def test_too_many_lists_the_first():
    bad = BadFiles(limit=7, num_files=20)
    for index in range(7):
        bad.add(f"file{index}", "is empty")
    with pytest.raises(BadFilesError, match="8 of 20 files are unreadable, max_bad_files=7") as raised:
        bad.add("file7", "is empty")
    assert "file4: is empty" in str(raised.value)
    assert "file5" not in str(raised.value)


def test_no_file_left_raises_whatever_the_limit():
    bad = BadFiles(limit=100, num_files=2)
    bad.add("a", "is empty")
    with pytest.raises(BadFilesError, match="2 of 2"):
        bad.add("b", "is empty")


def test_negative_limit():
    with pytest.raises(ValueError, match="max_bad_files >= 0"):
        BadFiles(limit=-1, num_files=2)
