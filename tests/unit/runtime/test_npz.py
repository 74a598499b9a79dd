"""Files of arrays that are damaged are named with the rule that writes them."""

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError
from celldetr.runtime.npz import read_npz, write_npz


@dataclass
class Content:
    values: NDArray[np.int64]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_ends_early_is_refused(tmp_path, share):
    path = tmp_path / "points.npz"
    write_npz(path, Content(np.arange(1000)))
    np.testing.assert_array_equal(read_npz(path, Content, "attention")["values"], np.arange(1000))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=r"points\.npz: .*file of the attention rule; run that rule again"):
        read_npz(path, Content, "attention")


def test_a_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "points.npz"
    write_npz(path, Content(np.random.default_rng(0).integers(0, 99, 1000)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"points\.npz"):
        read_npz(path, Content, "attention")
