"""Files that are there whole or not at all."""

from pathlib import Path

import pytest

from rlvr.files import write_whole


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_whole(path, "ö\n")
    write_whole(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for before in ([], [path]):
        with pytest.raises(UnicodeEncodeError):
            write_whole(path, "whole \ud800")
        assert list(tmp_path.iterdir()) == before
        write_whole(path, "old")
    assert path.read_text() == "old"
