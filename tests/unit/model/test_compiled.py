"""When a function is compiled, and when it runs as it is."""

import shutil

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from celldetr.model.compiled import compiled, compiles, graph_use, no_more_compiling, uncompiled
from celldetr.model.device import ExactLinear
from celldetr.runtime.errors import ConfigError


def test_a_function_is_compiled_for_each_shape_until_no_more_compiling(monkeypatch):
    graphs, missed, real, run = [], [], torch.compile, lookup_backend("eager")

    def backend(graph, inputs):
        graphs.append(graph)
        return run(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda function, mode, **options: real(function, **options, backend=backend))
    double = compiled(lambda x: x * 2, "cpu", lambda: missed.append(1))

    def calls(*sizes):
        assert all(torch.equal(double(torch.ones(size)), torch.full((size,), 2.0)) for size in sizes)
        return len(graphs)

    with uncompiled():
        assert calls(3, 4) == 0
    missed.clear()
    assert calls(3, 4, 5, 3, 4) == 3
    assert not missed
    with no_more_compiling():
        assert calls(3, 6, 7, 5) == 3
        assert len(missed) == 2
    assert calls(*range(8, 40)) == 35  # beyond the compiler's own limit


def test_compiled_gradients_are_as_exact_as_others(monkeypatch):
    """In half precision, too: the compiler would trace the backward pass under autocast."""
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, mode, **options: real(function, **options, backend="aot_eager")
    )
    torch.manual_seed(0)
    layer, x = ExactLinear(64, 32), torch.randn(128, 64)
    functions = [lambda x: layer(x).square().sum()] * 2
    functions[1] = compiled(functions[1], "cpu")
    gradients = []
    for function in functions:
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(x)
        loss.backward()
        gradients.append(layer.weight.grad)
    assert torch.equal(*gradients)


def test_what_a_setting_means_depends_on_the_device_and_its_compilers(monkeypatch):
    assert not compiles(False, "cuda", "key")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert compiles("auto", "cuda", "key")
    assert not compiles("auto", "cuda", "key", pays=False)
    assert compiles(True, "cuda", "key", pays=False)
    assert not compiles("auto", "cpu", "key")
    with pytest.raises(ConfigError, match="^training.compile: got true, but there is no C"):
        compiles(True, "cpu", "training.compile")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++")
    assert compiles(True, "cpu", "key")


def test_the_log_tells_of_memory_and_of_graphs_that_were_not_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2.5e9)
    counters = torch._dynamo.utils.counters["inductor"]
    monkeypatch.setitem(counters, "cudagraph_skips", 0)
    assert graph_use("cpu") == ""
    assert graph_use("cuda:1") == "; 2.5 GB are in use on cuda:1"
    monkeypatch.setitem(counters, "cudagraph_skips", 3)
    assert "; 3 graphs are not captured" in graph_use("cuda:1")
