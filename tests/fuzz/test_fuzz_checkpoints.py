"""Model files and checkpoints of runs: a damaged one is refused by name, or gives what the whole one gives."""

import copy
import hashlib
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import damages, refused, tries

from celldetr.config.experiment import Experiment
from celldetr.model.celldetr import CellDETR
from celldetr.model.weights import initial_weights, load_exactly, load_model, save_model
from celldetr.runtime.errors import InputError
from celldetr.training.checkpoint import FORMAT, load_optimizer, read_best, read_state, write_state

EXPERIMENT = Experiment.from_dict(
    {
        "name": "tiny",
        "model": {
            **{"mode": "sequential", "classes": ["round", "long"], "d_model": 8, "heads": 2, "points": 1, "ffn": 8},
            **{"encoder_layers": 1, "decoder_layers": 1, "queries": 3, "representation": {"layers": 1}},
            "backbone": {"block": "basic", "layers": [1, 1, 1, 1], "width": 8, "stages": [1, 2], "norm": "group"},
        },
    }
)
LINE = {
    **{"epoch": 1, "step": 4, "learning_rate": 1e-4, "train": {"loss": 2.0, "l1": 1.0}, "seconds": 1.5},
    "val": {"loss": 2.0, "detection": {"f1": None}, "f1": {"round": 0.5}, "class_f1": None, "score": 0.5},
    "images_per_second": 3.0,
}
BEST = {"epoch": 1, "score": 0.5}
NAN = float("nan")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Give a folder with whole files of each kind."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(3)
    model, optimizer = new()
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    optimizer.step()
    save_model(folder / "whole.pt", model, EXPERIMENT.model, BEST)
    write_state(
        folder / "whole.ckpt",
        **{"experiment": EXPERIMENT, "data": "d", "code": "c", "step": 5, "total_steps": 8},
        **{"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sums": {"loss": 1.5}},
        **{"history": [LINE], "best": BEST},
    )
    return folder


def new():
    model = CellDETR(EXPERIMENT.model)
    return model, torch.optim.AdamW([{"params": list(model.parameters()), "lr": 1e-3, "base_lr": 1e-3}], fused=True)


def digest(value):
    """Hash of everything in a nested value, for comparison."""
    return hashlib.sha256(flat(value).encode()).hexdigest()


def flat(value):
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {hash(value.numpy().tobytes())}"
    if isinstance(value, dict):
        return "".join(f"{key}: {flat(item)}\n" for key, item in value.items())
    return "".join(map(flat, value)) if isinstance(value, list | tuple) else repr(value)


def go_on(path):
    """Read the state of a run as training does."""
    state = read_state(path, EXPERIMENT, "d", "c")
    model, optimizer = new()
    load_exactly(model, state["model"], path)
    load_optimizer(optimizer, state["optimizer"], path)
    return digest([model.state_dict(), optimizer.state_dict(), state["sums"], state["history"], state["best"]])


def finish(path):
    """Read the weights of the best epoch as training does."""
    state, best = read_best(path)
    model, _ = new()
    load_exactly(model, state, path)
    return digest([model.state_dict(), best])


READERS = {
    "whole.pt": [
        lambda path: digest(load_model(path).state_dict()),
        finish,
        lambda path: initial_weights(new()[0], path),
    ],
    "whole.ckpt": [go_on],
}


def read_all(path, readers, wholes=None):
    """Read a file in each way; an error must name it, and a result be that of the whole file, where that is known."""
    results = []
    for number, read in enumerate(readers):
        error, found = refused(read, path)
        assert error is None or isinstance(error, InputError)
        assert error is None or str(path) in str(error)
        assert error is not None or wholes is None or found == wholes[number]
        results.append(found)
    return results


@pytest.fixture(scope="module")
def wholes(files):
    return {name: read_all(files / name, readers) for name, readers in READERS.items()}


@pytest.mark.parametrize("name", READERS)
@tries(150)
@given(damage=damages())
def test_damaged_bytes_are_refused_or_change_nothing(files, wholes, name, damage):
    assert None not in wholes[name]
    (files / "a.pt").write_bytes(damage((files / name).read_bytes()))
    read_all(files / "a.pt", READERS[name], wholes[name])


ODD = st.sampled_from(
    [
        *(None, True, -1, 0, 3.5, NAN, float("inf"), "", "x", b"x", [], {}, [None], {"a": 1}, {1: 2}, (1,), 10**30),
        *(torch.zeros(()), torch.zeros(3), torch.ones(2, 2, dtype=torch.int64), torch.tensor(NAN), torch.tensor(True)),
        *(torch.zeros(3, dtype=torch.complex64), torch.zeros(3).to_sparse(), torch.zeros(3, device="meta")),
    ]
)
CHANGES = {
    "shape": lambda tensor: tensor.unsqueeze(0),
    "transposed": lambda tensor: tensor.T.contiguous() if tensor.dim() == 2 else tensor.reshape(-1)[1:],
    "integer": lambda tensor: tensor.to(torch.int64),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "not finite": lambda tensor: tensor * NAN,
    "infinite": lambda tensor: tensor / 0,
    "sparse": lambda tensor: tensor.to_sparse(),
    "meta": lambda tensor: tensor.to("meta"),
    "list": lambda tensor: tensor.tolist(),
}


def places(value, at=()):
    """All places in nested dictionaries and lists, the top not included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*at, key)
        yield from places(item, (*at, key))


@st.composite
def changed(draw, content):
    """Return the content of a file with one value removed, replaced, renamed, added, or of another kind."""
    content = copy.deepcopy(content)
    depth = draw(st.integers(1, 5))
    some = [place for place in places(content) if len(place) == depth] or [
        ("state",) if "state" in content else ("model",)
    ]
    *way, key = draw(st.sampled_from(some))
    holder = content
    for step in way:
        holder = holder[step]
    kind = draw(st.sampled_from(["replace", "replace", "remove", "rename", "add", "tensor", "tensor"]))
    if kind == "tensor" and isinstance(holder[key], torch.Tensor):
        holder[key] = CHANGES[draw(st.sampled_from(list(CHANGES)))](holder[key])
    elif kind == "remove":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from(["zzz", 7, ""]))] = holder.pop(key)
    elif kind == "add" and isinstance(holder, dict):
        holder["zzz"] = draw(ODD)
    else:
        holder[key] = draw(ODD)
    return content


@pytest.mark.parametrize("name", READERS)
@tries(120)
@given(data=st.data())
def test_changed_content_is_refused_or_fits(files, name, data):
    content = data.draw(changed(torch.load(files / name, weights_only=True)))
    torch.save(content, files / "a.pt")
    read_all(files / "a.pt", READERS[name])


@pytest.mark.parametrize("size", [0, 1, 10**5, 10**30])
def test_sizes_that_the_weights_do_not_have_are_refused_before_memory_is_asked_for(files, size):
    whole = torch.load(files / "whole.pt", weights_only=True)
    for place in places(whole["settings"]):
        content = copy.deepcopy(whole)
        holder = content["settings"]
        for key in place[:-1]:
            holder = holder[key]
        if type(holder[place[-1]]) is int:
            holder[place[-1]] = size
            torch.save(content, files / "a.pt")
            read_all(files / "a.pt", READERS["whole.pt"][:1])


@tries(40)
@given(value=ODD)
def test_what_is_no_mapping_is_refused(files, value):
    torch.save(value, files / "a.pt")
    for readers in READERS.values():
        assert set(read_all(files / "a.pt", readers)) <= {None}


class Runs:
    """Would make a folder when it is unpickled."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


def in_zip(path, value):
    """Put a pickle into the container of a whole model file."""
    with zipfile.ZipFile(path.with_name("whole.pt")) as whole, zipfile.ZipFile(path, "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, pickle.dumps(value, 2) if name.endswith("data.pkl") else whole.read(name))


WRITERS = {
    "container": lambda path, value: torch.save(value, path),
    "old container": lambda path, value: torch.save(value, path, _use_new_zipfile_serialization=False),
    "pickle 2": lambda path, value: path.write_bytes(pickle.dumps(value, 2)),
    "pickle 5": lambda path, value: path.write_bytes(pickle.dumps(value, 5)),
    "forged container": in_zip,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_no_file_runs_code(files, monkeypatch, write):
    monkeypatch.chdir(files)
    source = "__import__('os').mkdir('it-ran')"
    hostile = [Runs(os.mkdir, "it-ran"), Runs(eval, source), Runs(exec, source), Runs(os.system, "mkdir it-ran")]
    for value in hostile:
        keys = {
            "format": 1,
            "training_format": FORMAT,
            "settings": EXPERIMENT.model.to_dict(),
            "state": {},
            "extra": BEST,
        }
        for content in (value, {**keys, "state": value}, {**keys, "extra": [value]}, {value: 1}):
            write(files / "a.pt", content)
            for readers in READERS.values():
                assert set(read_all(files / "a.pt", readers)) == {None}
            assert not (files / "it-ran").exists()
