"""The board: what plugins publish for one another."""

import pytest

from inlay import PluginError
from inlay.board import Board


def test_a_declared_key_is_written_and_read():
    board = Board({"mask:subject": "subject_mask"})
    board["mask:subject"] = 1
    assert board["mask:subject"] == 1
    board["mask:subject"] = 2
    assert dict(board) == {"mask:subject": 2}


def test_writing_what_was_not_declared_is_refused():
    with pytest.raises(PluginError, match=r"board: 'mask:x' was never declared"):
        Board({})["mask:x"] = 1


def test_reading_too_early_names_who_owes_it():
    board = Board({"mask:subject": "subject_mask", "map:a": "b"})
    board["map:a"] = 0
    with pytest.raises(PluginError, match="'mask:subject' of subject_mask is not there yet"):
        board["mask:subject"]
    with pytest.raises(PluginError, match=r"of nobody is not there yet\. Published: \['map:a'\]"):
        board["latent:x"]


def test_a_kind_lists_its_names():
    board = Board({"mask:a": "p", "mask:b": "p", "map:a": "p"})
    board["mask:a"], board["map:a"] = 1, 2
    assert list(board.of("mask")) == [("a", 1)]
