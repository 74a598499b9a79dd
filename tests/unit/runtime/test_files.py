"""Files of results: complete or not there."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic, link_or_copy, read_npz, write_npz


def test_output_appears_only_when_complete(tmp_path):
    target = tmp_path / "out.txt"
    target.write_text("old")

    def fail():
        with atomic(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_replaced(tmp_path):
    target = tmp_path / "folder"
    with atomic(target) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("1")
    with atomic(target) as temporary:
        assert not temporary.exists()
        temporary.mkdir()
    assert list(target.iterdir()) == []


def test_a_link_to_the_same_file_is_written_again(tmp_path):
    """A rename onto another link to the same file does nothing, and would leave the temporary name."""
    (tmp_path / "source").write_text("1")
    for _ in range(2):
        with atomic(tmp_path / "target") as temporary:
            link_or_copy(tmp_path / "source", temporary)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_the_error_of_a_full_disk_names_what_was_written(tmp_path):
    with (
        pytest.raises(OSError, match=re.escape(str(tmp_path / "a.pt"))),
        atomic(tmp_path / "a.pt"),
        open("/dev/full", "w") as file,
    ):
        file.write("x" * 100_000)
    assert list(tmp_path.iterdir()) == []


@dataclass
class Content:
    values: NDArray[np.int64]


def test_arrays_come_back_and_an_incomplete_file_is_refused(tmp_path):
    path = tmp_path / "points.npz"
    write_npz(path, Content(np.arange(1000)))
    np.testing.assert_array_equal(read_npz(path, Content, "attention")["values"], np.arange(1000))
    whole = path.read_bytes()
    for share in (0.0, 0.5, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match=r"points\.npz: .*file of the attention rule; run that rule again"):
            read_npz(path, Content, "attention")
