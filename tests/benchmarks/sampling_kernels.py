"""Time of the forms of deformable sampling, with points spread over the map and gathered on few places.

Usage: python tests/benchmarks/sampling_kernels.py [--device D] [--size PX] [--batch N] [--rounds N].
The attentions of the encoder (each token samples around itself) and of a decoder (900 queries) at the paper's width, in
fp32 and bf16. Gathered: the points of all queries lie on a few nuclei, as in a trained model; gradients of the values
then add up in few pixels. Prints milliseconds of the forward pass, of both passes with spread and with gathered points,
their ratio (above 1.3 a form depends too much on where points are), and the peak memory (CUDA). Forms that are not
installed here are left out; `largest_difference` from the portable form is printed for each.
"""

import functools
import importlib.util
import statistics
from collections.abc import Callable

import torch
from ladder import options, prepare, seconds_of

from celldetr.model import sampling
from celldetr.model.sampling import Sampler, largest_difference

NUCLEI = 24
OURS = {
    "ours": {},
    "ours, all levels scattered": {"DENSE_PIXELS": 0},
    "ours, levels up to 1,024 pixels gathered": {"DENSE_PIXELS": 1024},
    "ours, tiles half as large": {"_TILE": 512},
    "ours, tiles twice as large": {"_TILE": 2048},
}


def forms(device: str) -> dict[str, Sampler]:
    """Give the forms that are here, the plain one first."""
    found = {"grid_sample": sampling.sample_reference}
    core = torch.compile(sampling._sample_rows_again, dynamic=False)
    found["portable, compiled"] = functools.partial(sampling.sample_portable, core=core)
    if device.startswith("cuda") and importlib.util.find_spec("deformops"):
        found["deformops"] = sampling.sample_kernels
    if device.startswith("cuda") and importlib.util.find_spec("triton"):
        from celldetr.model import sampling_triton

        usual = {name: getattr(sampling_triton, name) for settings in OURS.values() for name in settings}

        def with_settings(settings: dict[str, int], *args) -> torch.Tensor:
            for name, value in (usual | settings).items():  # the backward pass reads them too, before the next form
                setattr(sampling_triton, name, value)
            return sampling_triton.sample_triton(*args)

        found |= {name: functools.partial(with_settings, settings) for name, settings in OURS.items()}
    return found


def points(kind: str, shapes, batch: int, queries: int, device: str) -> torch.Tensor:
    """Locations (B, Q, 8, L, 4, 2): some pixels around each query's own place, or around a nucleus."""
    generator = torch.Generator().manual_seed(0)
    if queries == sum(height * width for height, width in shapes):  # the encoder: its tokens in their order
        grids = [torch.meshgrid(torch.arange(h) / h, torch.arange(w) / w, indexing="ij") for h, w in shapes]
        places = torch.cat([torch.stack((x, y), dim=-1).flatten(0, 1) for y, x in grids]).expand(batch, -1, 2)
    else:
        places = torch.rand(batch, queries, 2, generator=generator)
    spread = torch.tensor([3.0 / height for height, _ in shapes])[:, None, None]
    if kind == "gathered":
        nuclei = torch.rand(batch, NUCLEI, 2, generator=generator)
        nearest = torch.cdist(places.contiguous(), nuclei).argmin(dim=-1, keepdim=True).expand(-1, -1, 2)
        places, spread = nuclei.gather(1, nearest), torch.tensor(0.01)
    offsets = torch.randn(batch, queries, 8, len(shapes), 4, 2, generator=generator) * spread
    return (places[:, :, None, None, None] + offsets).to(device)


def passes(sample: Sampler, value, shapes, locations, weights) -> tuple[Callable[[], object], Callable[[], object]]:
    """Work of the forward pass alone, and of both."""
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    slope = torch.randn(value.shape[0], locations.shape[1], 256, device=value.device).to(value.dtype)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return sample(value, shapes, locations, weights)

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(sample(leaves[0], shapes, *leaves[1:]), leaves, slope)

    return forward, both


def measure(name: str, sample: Sampler, shapes, args, queries: int, dtype: torch.dtype) -> None:
    """Time one form and print a line."""
    torch.compiler.reset()  # few graphs are kept; after these a function runs uncompiled
    on_gpu, tokens = args.device.startswith("cuda"), sum(height * width for height, width in shapes)
    repeats, times, peak = (10 if on_gpu else 1), {}, ""
    value = torch.randn(args.batch, tokens, 8, 32, device=args.device).to(dtype)
    weights = torch.rand(args.batch, queries, 8, len(shapes), 4, device=args.device) / (4 * len(shapes))
    for kind in ("spread", "gathered"):
        work = passes(sample, value, shapes, points(kind, shapes, args.batch, queries, args.device), weights)
        for what, one in zip(("forward", "both"), work, strict=True):
            one()  # compiles
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            rounds = [
                seconds_of(lambda one=one: [one() for _ in range(repeats)] and None, args.device)
                for _ in range(args.rounds)
            ]
            times[kind, what] = statistics.median(rounds) / repeats * 1e3
            peak = f"   peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB" if on_gpu else ""
    spread, gathered = times["spread", "both"], times["gathered", "both"]
    print(
        f"  {name:42}{times['spread', 'forward']:9.3f}{spread:9.3f}{gathered:9.3f}{gathered / spread:7.2f}x{peak}",
        flush=True,
    )


def main() -> None:
    args = options("Forms of deformable sampling").parse_args()
    prepare(args)
    shapes = tuple((args.size // stride,) * 2 for stride in (4, 8, 16, 32))
    tokens = sum(height * width for height, width in shapes)
    print(f"{torch.cuda.get_device_name() if args.device.startswith('cuda') else 'CPU'}, batch {args.batch}, {shapes}")
    found = forms(args.device)
    for name, sample in found.items():
        differences = [largest_difference(sample, torch.device(args.device), dtype) for dtype in sampling._TOLERANCE]
        print(f"  {name:42} differs by {differences[0]:.1e} in fp32, {differences[1]:.1e} in bf16")
    for part, queries in (("encoder", tokens), ("decoder", 900)):
        for dtype in (torch.float32, torch.bfloat16):
            print(f"{part}, {dtype}: ms of the forward pass; both, spread; both, gathered; ratio of the last two")
            for name, sample in found.items():
                try:
                    measure(name, sample, shapes, args, queries, dtype)
                except torch.OutOfMemoryError:
                    print(f"  {name:42} out of memory")


if __name__ == "__main__":
    main()
