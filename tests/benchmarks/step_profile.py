"""Where a training step of the fastest form goes on a GPU: its rate and memory, kernels, launches.

Usage: python tests/benchmarks/step_profile.py [--mode MODE] [--compile graphs|combined|yes|no] [--device D]
[--size PX] [--batch N] [--tiny]. Steps of the training loop in bf16, compiled into captured graphs by default;
combined: with small kernels in one. On a CPU, operators take the place of kernels.
"""

import tempfile
from pathlib import Path

import torch
from ladder import draw_store, experiment_of, options, prepare, seconds_of
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from training_throughput import BATCHES, Steps

STEPS = 3
"""Steps that are profiled."""
SHOWN = 30


def main() -> None:
    """Profile."""
    parser = options(__doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--compile", choices=["graphs", "combined", "yes", "no"], default="graphs" if on_gpu else "no")
    args = parser.parse_args()
    prepare(args)
    with tempfile.TemporaryDirectory() as name:
        folder, classes = Path(name), experiment_of(args).model.classes
        store = draw_store(folder / "drawn.zarr", BATCHES * args.batch, args.size, args.nuclei, classes)
        steps = Steps(args, store, folder, bf16=True, compiling=args.compile)

        def some(number: int) -> None:
            for _ in range(number):
                steps.step()

        some(2)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(lambda: some(args.rounds), args.device) / args.rounds
        print(
            f"{args.mode}, compile {args.compile}: {seconds * 1e3:.1f} ms a step, {args.batch / seconds:.1f} images/s"
        )
        if on_gpu:
            allocated, reserved = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.memory_reserved() / 1e9
            print(f"peak memory {allocated:.2f} GB allocated, {reserved:.2f} GB reserved, graphs included")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as profiled:
            seconds_of(lambda: some(STEPS), args.device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found = [
        (
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / STEPS,
            event.count / STEPS,
            event,
        )
        for event in profiled.key_averages()
        if event.device_type == kind
    ]
    total, count = sum(ms for ms, _, _ in found), sum(times for _, times, _ in found)
    print(f"{total:.1f} ms a step in {count:.0f} {'kernels and copies' if on_gpu else 'operators'}")
    for ms, times, event in sorted(found, key=lambda row: -row[0])[:SHOWN]:
        print(f"{ms:9.3f} ms {times:7.0f}x  {event.key[:90]}")


if __name__ == "__main__":
    main()
