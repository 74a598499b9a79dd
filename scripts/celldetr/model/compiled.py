"""Compiling functions of tensors of fixed shapes: each becomes one graph, and on a GPU one captured CUDA graph.

A function is compiled when it is first called with shapes; then it serves all calls with these. In a block of
`no_more_compiling` other shapes run uncompiled. A compiled graph takes constant tables as inputs
(`celldetr.model.device.constant_table`): call the functions once uncompiled before.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import _dynamo as dynamo
from torch import _functorch as functorch

from celldetr.runtime.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., Any])
Compile = Literal["auto"] | bool

RUNS_TO_CAPTURE = 3
"""Calls with the same shapes until a CUDA graph is captured and has run."""

_COMPILERS = {"cpu": ("c++", "g++", "clang++"), "cuda": ("cc", "gcc", "clang")}
_MOST_SHAPES = 256
"""Shapes and modes that one function is compiled for at most."""


def compiles(setting: Compile, device: torch.device | str, key: str, *, pays: bool = True) -> bool:
    """Whether functions are to be compiled on a device. ``auto``: on GPUs, if there is a C compiler and it `pays`.

    Raises
    ------
    ConfigError
        The setting, named `key`, is true and there is no compiler.
    """
    kind = "cuda" if torch.device(device).type == "cuda" else "cpu"
    found = any(map(shutil.which, _COMPILERS[kind]))
    if setting is True and not found:
        raise ConfigError(f"{key}: got true, but there is no C++ compiler here; install one or set it false")
    return found and (setting is True or (setting == "auto" and kind == "cuda" and pays))


def compiled(function: Function, device: torch.device | str, missed: Callable[[], None] | None = None) -> Function:
    """Compile a function as one graph; see the top of this module. `missed` is called whenever it runs uncompiled."""
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _MOST_SHAPES)
    functorch.config.backward_pass_autocast = "off"  # else layers that are exact under autocast get coarse gradients
    mode = "reduce-overhead" if torch.device(device).type == "cuda" else "default"

    def noticed(*args: Any) -> Any:
        if missed is not None and not torch.compiler.is_compiling():  # compiled code does not contain this
            missed()
        return function(*args)

    # a copy of the code: the compiler looks up its results by that object
    noticed.__code__ = noticed.__code__.replace(co_name=getattr(function, "__name__", "compiled"))
    return torch.compile(noticed, fullgraph=True, dynamic=False, mode=mode)  # type: ignore[return-value]


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run everything in the block as it is."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def no_more_compiling() -> Iterator[None]:
    """Run shapes that were not seen before as they are, instead of compiling for them."""
    with torch.compiler.set_stance("eager_on_recompile"):
        yield


def forget_compiled() -> None:
    """Drop all that was compiled, and the memory of captured graphs."""
    dynamo.reset()


def captures() -> int:
    """Return a number that grows when a CUDA graph is captured, unless it reads only what other graphs left."""
    return int(dynamo.utils.counters["inductor"]["cudagraph_recorded_non_static_inputs"])


def graph_use(device: torch.device | str) -> str:
    """Say for the log how much memory PyTorch holds on a GPU, captured graphs included; empty on a CPU.

    Also how many graphs were not captured: the host launches each of their kernels.
    """
    if torch.device(device).type != "cuda":
        return ""
    used = f"; {torch.cuda.memory_reserved(device) / 1e9:.1f} GB are in use on {device}"
    skipped = dynamo.utils.counters["inductor"]["cudagraph_skips"]
    why = f"; {skipped} graphs are not captured (TORCH_LOGS=cudagraphs in the environment tells why)"
    return used + why if skipped else used
