"""What a training step keeps for its backward pass, per patch, and what a batch of 16 needs.

Usage: python tests/benchmarks/bench_memory.py [--mode MODE] [--size PX]. Counts, on a CPU, the tensors that autograd
saves in the forward pass of the paper's model, each storage once, for one patch and for two: their difference is what a
patch takes. A GPU needs its workspaces and the largest intermediate beside it; masks of dropout are smaller there.
Attention among queries keeps no matrix here, as on GPUs.
"""

import argparse
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from celldetr.model.recompute import use_recompute
from ladder import draw_store
from training_throughput import BATCHES, Run

from celldetr.config.classes import PANNUKE_CLASSES, ST_TYPES
from celldetr.model.transformer import SelfAttention

VARIANTS = {
    "as the published code is built": {"sampling": "plain", "bf16": False},
    "portable sampling": {"sampling": "portable", "bf16": False},
    "compiled sampling": {"sampling": "compiled", "bf16": False},
    "compiled sampling, bf16": {"sampling": "compiled", "bf16": True},
    "compiled sampling, bf16, recompute": {"sampling": "compiled", "bf16": True, "recompute": True},
}


def kept(told: SimpleNamespace, classes: tuple[str, ...], *, recompute=False, **variant) -> tuple[int, int]:
    """Bytes that are kept for the backward pass of one batch, and those of weights, gradients and AdamW."""
    with tempfile.TemporaryDirectory() as folder:
        store = draw_store(Path(folder) / "drawn.zarr", BATCHES * told.batch, told.size, told.nuclei, classes)
        run = Run(told, store, matcher="own", loader=False, fused=True, **variant)
        use_recompute(run.stage.model, recompute)
        for module in run.stage.model.modules():
            if isinstance(module, SelfAttention):
                module.dropout = 0.0  # with it, the CPU keeps the matrix
        weights = {weight.untyped_storage().data_ptr() for weight in run.stage.model.parameters()}
        storages = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage  # held: its address is not used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run.forward(run.next_batch())
        trained = sum(weight.numel() for weight in run.stage.model.parameters() if weight.requires_grad)
        return sum(storage.nbytes() for storage in storages.values()), 16 * trained


def main() -> None:
    """Count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", default="sequential", choices=["baseline", "sequential", "parallel", "ssl", "st"])
    parser.add_argument("--size", type=int, default=256)
    told = parser.parse_args()
    classes = {"ssl": (), "st": ST_TYPES}.get(told.mode, PANNUKE_CLASSES)
    print(f"torch {torch.__version__}, {told.mode}, patches of {told.size} px")
    for name, variant in VARIANTS.items():
        told.device, told.nuclei = "cpu", 24
        one, two = (kept(SimpleNamespace(**vars(told), batch=batch), classes, **variant) for batch in (1, 2))
        each = two[0] - one[0]
        batch = (16 * each + (one[0] - each) + one[1]) / 1e9
        print(f"{name:40}{each / 1e9:6.2f} GB a patch; 16 of them, weights and AdamW: {batch:5.1f} GB", flush=True)


if __name__ == "__main__":
    main()
