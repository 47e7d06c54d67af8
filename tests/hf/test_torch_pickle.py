"""pytorch_model.bin: read as by torch, without torch, and without running its pickle."""

import builtins
import collections
import functools
import os
import pickle
import subprocess
import tempfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dwt_jax.hf.tensor_files import open_weights
from helpers.foreign import FLOATS, INTEGERS, NEW, assert_same, random_tensor, refused, zoo

torch = pytest.importorskip("torch")

BOTH = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])


def save(directory, state, zipped=True, protocol=2):
    path = directory / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


# Files that torch writes.


@BOTH
def test_every_dtype_and_shape(tmp_path, zipped):
    save(tmp_path, zoo(), zipped)
    assert_same(open_weights(tmp_path), zoo())


VIEWS = {
    "itself": lambda x: x,
    "transposed": lambda x: x.T if x.ndim == 2 else x.movedim(0, -1) if x.ndim else x,
    "part": lambda x: x[1:] if x.ndim else x,
    "every other": lambda x: x[..., ::2] if x.ndim else x,
    "one row": lambda x: x[-1] if x.ndim and len(x) else x,
    "diagonal": lambda x: x.diagonal(dim1=0, dim2=-1) if x.ndim > 1 else x,
    "repeated": lambda x: x.expand(3, *x.shape),
    "more axes": lambda x: x[None, ..., None],
    "own copy": lambda x: x.clone(),
}


@st.composite
def states(draw):
    """State dicts of tensors that are different views of shared storages."""
    state = collections.OrderedDict() if draw(st.booleans()) else {}
    for number in range(draw(st.integers(0, 3))):
        dtype = draw(st.sampled_from([*FLOATS, *INTEGERS, *NEW]))
        base = random_tensor(dtype, draw(st.lists(st.integers(0, 4), max_size=3)), draw(st.integers(0, 99)))
        for view in draw(st.lists(st.sampled_from(sorted(VIEWS)), min_size=1, max_size=3)):
            tensor = VIEWS[view](base)
            if dtype in FLOATS and draw(st.booleans()):
                tensor = torch.nn.Parameter(tensor)
            state[draw(st.text(max_size=5)) + f".{number}.{view}"] = tensor
    return state


@hypothesis.settings(max_examples=300)
@hypothesis.given(state=states(), zipped=st.booleans(), protocol=st.sampled_from([2, 3, 4, 5]))
def test_random_state_dict(state, zipped, protocol):
    with tempfile.TemporaryDirectory() as directory:
        path = save(Path(directory), state, zipped, protocol)
        assert_same(open_weights(Path(directory)), state)
        if zipped or not any(x.dtype in NEW for x in state.values()):  # torch cannot read these
            assert_same(open_weights(Path(directory)), torch.load(path, weights_only=False))


@BOTH
def test_module_with_metadata(tmp_path, zipped):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Embedding(5, 6))
    module.half()
    state = module.state_dict()
    assert state._metadata
    assert state["1.num_batches_tracked"].ndim == 0
    save(tmp_path, state, zipped)
    assert_same(open_weights(tmp_path), state)


class Rebuilt:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@BOTH
def test_tensor_of_torch_0_3(tmp_path, zipped):
    x = torch.arange(12.0)
    rebuilt = Rebuilt(torch._utils._rebuild_tensor, x._typed_storage(), 2, (2, 3), (4, 1))
    path = save(tmp_path, {"x": rebuilt}, zipped)
    assert_same(open_weights(tmp_path), torch.load(path, weights_only=False))
    assert open_weights(tmp_path)["x"].tolist() == [[2, 3, 4], [6, 7, 8]]


@BOTH
def test_ordered_dict_of_python_2(tmp_path, zipped):
    pairs = [["x", torch.ones(2)], ["y", torch.zeros(3)]]
    path = save(tmp_path, Rebuilt(collections.OrderedDict, pairs), zipped)
    torch_tensors = torch.load(path, weights_only=False)
    assert list(torch_tensors) == ["x", "y"]
    assert_same(open_weights(tmp_path), torch_tensors)


def test_zip_without_checksums_and_other_alignment(tmp_path):
    from torch.utils.serialization import config

    torch.serialization.set_crc32_options(False)
    try:
        with config.patch("save.storage_alignment", 4096):
            assert save(tmp_path, zoo()).stat().st_size > 4096 * len(zoo())
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(open_weights(tmp_path), zoo())


def test_10000_tensors_are_within_limits(tmp_path):
    """BERT-large has 400 tensors, with shorter names."""
    name = "bert.encoder.layer.{}.attention.output.LayerNorm.some_more_of_a_name.weight"
    state = {name.format(i): torch.nn.Parameter(torch.zeros(1)) for i in range(10_000)}
    save(tmp_path, state)
    assert len(open_weights(tmp_path)) == 10_000


# Programs in pickles.

PROGRAMS = {
    "posix.system": lambda trace: Rebuilt(os.system, f"touch {trace}"),
    "eval": lambda trace: Rebuilt(builtins.eval, f"open({str(trace)!r}, 'w').close()"),
    "exec": lambda trace: Rebuilt(builtins.exec, f"open({str(trace)!r}, 'w').close()"),
    "open": lambda trace: Rebuilt(open, str(trace), "w"),
    "Path.touch|getattr": lambda trace: Rebuilt(Path.touch, trace),
    "functools.partial": lambda trace: Rebuilt(functools.partial(os.system, f"touch {trace}")),
    "subprocess.call|commands.call": lambda trace: Rebuilt(subprocess.call, ["touch", str(trace)]),
}


class InState(collections.OrderedDict):
    """An OrderedDict with the program among its attributes."""

    def __init__(self, program):
        super().__init__()
        self._metadata = program

    def __reduce__(self):
        return collections.OrderedDict, (), {"_metadata": self._metadata}


def in_arguments(program):
    return Rebuilt(
        torch._utils._rebuild_tensor_v2, torch.ones(1)._typed_storage(), 0, (1,), (1,), False, program
    )


POSITIONS = {
    "alone": lambda program: program,
    "a value": lambda program: {"x": torch.ones(1), "y": program},
    "an attribute": InState,
    "an argument": lambda program: {"x": in_arguments(program)},
    "in a parameter": lambda program: {"x": Rebuilt(torch._utils._rebuild_parameter, program, True, None)},
    "in a list": lambda program: {"x": [[program]]},
}


@BOTH
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("function", PROGRAMS)
def test_programs_are_not_run(tmp_path, zipped, protocol, position, function):
    trace = tmp_path / "trace"
    directory = tmp_path / "model"
    directory.mkdir()
    path = save(directory, POSITIONS[position](PROGRAMS[function](trace)), zipped, protocol)
    message = refused(directory, "expected tensors only")
    assert any(name in message for name in function.split("|"))
    assert not trace.exists()
    if position in ("alone", "a value"):  # check that it is a program: torch runs it with weights_only=False
        torch.load(path, weights_only=False)
        assert trace.exists()


def test_program_instead_of_magic_number(tmp_path):
    trace = tmp_path / "trace"
    for protocol in range(6):
        program = pickle.dumps(PROGRAMS["posix.system"](trace), protocol)
        (tmp_path / "pytorch_model.bin").write_bytes(program)
        refused(tmp_path, "pytorch_model.bin", *(["posix.system"] if protocol != 1 else []))
        assert not trace.exists()


@BOTH
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"state_dict": {"x": torch.ones(1)}, "epoch": 3}, "dict named 'state_dict'"),
        ({"x": torch.ones(1), "epoch": 3}, "int named 'epoch'"),
        ({"x": None}, "NoneType named 'x'"),
        ({"x": [torch.ones(1)]}, "list named 'x'"),
        ({3: torch.ones(1)}, "int as a key"),
        ({("x",): torch.ones(1)}, "tuple as a key"),
        ([torch.ones(1)], "list"),
        (torch.ones(1), "a tensor"),
        ({"x": torch.ones(1, dtype=torch.complex64)}, "torch.ComplexFloatStorage"),
        ({"x": torch.ones(1).to(torch.float8_e4m3fn)}, "torch.float8_e4m3fn"),
        ({"x": torch.ones(1).to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
        ({"x": torch.ones(1, dtype=torch.complex64).conj().imag}, "torch._utils|unknown way"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        ({"x": np.ones(1)}, "numpy"),
        ({"x": torch.ones(1).untyped_storage()}, "Storage named 'x'"),
        ({"x": torch.float32}, "torch.float32"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_other_than_state_dict_raises(tmp_path, zipped, state, expected):
    if zipped is False and expected.startswith("torch.nn.modules"):
        expected = "no storage|torch.nn.modules"
    save(tmp_path, state, zipped)
    message = refused(tmp_path)
    assert any(part in message for part in expected.split("|"))


def test_torchscript_zip_raises(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "pytorch_model.bin")
    refused(tmp_path, "__torch__")
