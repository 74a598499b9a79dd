"""References and counts in HDF5: damage is refused by name, or changes values that nothing can check; none hangs.

HDF5 has no checksums of its own. On some changes of single bits it crashes (the process ends, nothing is written).
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from hdf5_tries import HEAP, READERS
from scipy import sparse
from strategies import FACTOR

from celldetr.example.xenium import write_xenium
from celldetr.runtime.errors import InputError
from celldetr.xenium.celltypes.reference import write_reference
from celldetr.xenium.hdf5 import check_heaps

PROGRAM = Path(__file__).parents[1] / "helpers" / "hdf5_tries.py"
SECONDS = 20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Give a whole file for each reader."""
    folder = tmp_path_factory.mktemp("hdf5")
    rng = np.random.default_rng(6)
    counts = rng.poisson(rng.lognormal(0, 0.5, (60, 1)) * rng.uniform(0, 1, 30)).astype(np.float32)
    obs = pd.DataFrame({"kind": pd.Categorical(["CD4", "tumour", "CD8"] * 20)}, index=[f"c{i}" for i in range(60)])
    table = anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(30)]))
    table.write_h5ad(folder / "raw.h5ad")
    write_reference(folder / "prepared.h5ad", READERS["raw"](folder / "raw.h5ad"))
    outs = write_xenium(folder / "x", seed=5, size_um=(60, 60), rim_um=0, he_mpp=0.5, alignment=None).outs
    copied = folder / "copied"
    copied.mkdir()
    for name in ("experiment.xenium", "cells.parquet", "cells.zarr.zip"):
        shutil.copy(outs / name, copied / name)
    return {
        "raw": (folder / "raw.h5ad", folder / "a.h5ad"),
        "prepared": (folder / "prepared.h5ad", folder / "b.h5ad"),
        "counts": (outs / "cell_feature_matrix.h5", copied / "cell_feature_matrix.h5"),
    }


@pytest.mark.parametrize(("reader", "count"), [("raw", 120), ("prepared", 120), ("counts", 40)])
def test_no_damage_hangs_or_escapes_our_errors(files, reader, count):
    first = int.from_bytes(os.urandom(4)) if FACTOR else 0
    told = [reader, *map(str, files[reader]), str(SECONDS), str(first), str(count * max(1, FACTOR))]
    done = subprocess.run([sys.executable, str(PROGRAM), *told], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    assert {outcome for _, outcome in found} <= {"same", "different", "refused", "crash"}, first
    numbers = Counter(map(tuple, found))
    assert {outcome for kind, outcome in numbers if kind == "cut"} == {"refused"}
    assert sum(outcome == "crash" for _, outcome in found) <= 0.05 * len(found)
    assert numbers["zeros", "refused"] > 0


def test_a_heap_of_texts_that_ends_in_zeros_is_refused(files, tmp_path):
    for path in (files[reader][0] for reader in READERS):
        check_heaps(path)
    whole = files["raw"][0].read_bytes()
    heap = whole.index(HEAP)
    path = tmp_path / "a.h5ad"
    for place in (heap + 16, heap + 16 + 24):
        path.write_bytes(whole[:place] + bytes(64) + whole[place + 64 :])
        with pytest.raises(InputError, match=rf"{path}: is damaged: a heap of texts ends in zeros at byte {place}"):
            check_heaps(path)
    for other in (b"", b"x", HEAP, HEAP + b"\x01" + bytes(60), whole[: heap + 20]):
        path.write_bytes(other)
        check_heaps(path)
