"""Cell types of samples of growing size: cells per second, peak memory, and how both grow against the cells.

Usage: python tests/benchmarks/bench_celltypes.py [--cells 20000 100000 500000] [--genes 300]
Each size runs in a process of its own: draws a synthetic sample of ten types and annotates it by both annotators.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from celldetr.config.classes import ST_TYPES
from celldetr.config.xenium import CellTypeSettings
from celldetr.xenium.celltypes.annotate import annotate

BLOCK = 20_000


def draw(kinds: np.ndarray, profiles: np.ndarray, depth: float, generator: np.random.Generator) -> anndata.AnnData:
    parts = []
    for start in range(0, len(kinds), BLOCK):
        share = profiles[kinds[start : start + BLOCK]]
        counts = generator.poisson(share * generator.lognormal(np.log(depth), 0.6, (len(share), 1)))
        parts.append(sparse.csr_matrix(counts, dtype=np.float32))
    names = [f"G{i}" for i in range(profiles.shape[1])]
    return anndata.AnnData(
        sparse.vstack(parts, format="csr"),
        obs=pd.DataFrame(index=pd.RangeIndex(len(kinds)).astype(str)),
        var=pd.DataFrame({"gene_ids": ""}, index=names),
    )


def drawn(cells: int, genes: int) -> tuple[anndata.AnnData, anndata.AnnData, np.ndarray]:
    """Draw a sample, its reference, and the true types of its cells."""
    generator = np.random.default_rng(0)
    base = generator.dirichlet(np.full(genes, 0.5))
    profiles = np.stack([0.6 * base + 0.4 * generator.dirichlet(np.full(genes, 0.1)) for _ in ST_TYPES])
    known = np.repeat(np.arange(len(ST_TYPES)), 2000)
    reference = draw(known, profiles, 1500, generator)
    reference.obs["type"] = pd.Categorical(np.array(ST_TYPES)[known], categories=ST_TYPES)
    reference.obs["held_out"] = False
    reference.uns["composition"] = dict.fromkeys(ST_TYPES, 2000)
    kinds = generator.choice(len(ST_TYPES), cells, p=generator.dirichlet(np.full(len(ST_TYPES), 2.0)))
    return draw(kinds, profiles, 80, generator), reference, kinds


def measure(cells: int, genes: int) -> dict[str, float]:
    sample, reference, kinds = drawn(cells, genes)
    annotate(sample[:500].copy(), reference, CellTypeSettings(), 0)  # compiles
    start = time.perf_counter()
    table = annotate(sample, reference, CellTypeSettings(), 0).table
    seconds = time.perf_counter() - start
    labels = table["label"].to_numpy()
    return {
        "seconds": seconds,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "labelled": float((labels >= 0).mean()),
        "right": float((labels == kinds)[labels >= 0].mean()),
    }


def main() -> None:
    """Run all sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, nargs="+", default=[20_000, 100_000, 500_000])
    parser.add_argument("--genes", type=int, default=300)
    parser.add_argument("--one", action="store_true", help="measure the first size in this process, as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.cells[0], options.genes)))
        return
    found = []
    for cells in options.cells:
        command = [sys.executable, __file__, "--one", "--cells", str(cells), "--genes", str(options.genes)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        one = json.loads(output.splitlines()[-1])
        found.append(one)
        print(
            f"{cells:7d} cells x {options.genes} genes: {one['seconds']:6.1f} s, "
            f"{cells / one['seconds']:7.0f} cells/s, peak {one['memory']:.2f} GB, "
            f"{one['labelled']:.1%} labelled, {one['right']:.1%} of the labels right"
        )
    for smaller, larger, few, many in zip(found, found[1:], options.cells, options.cells[1:], strict=False):
        print(
            f"{many / few:.1f} times the cells: {larger['seconds'] / smaller['seconds']:.1f} times the time, "
            f"{larger['memory'] / smaller['memory']:.1f} times the memory"
        )


if __name__ == "__main__":
    main()
