"""Tensors as others write them, and files that are damaged: for the tests that read weights."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import strategies as st

from dwt_jax.errors import UserError
from dwt_jax.hf.tensor_files import open_weights

torch = pytest.importorskip("torch")

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
NEW = [torch.uint16, torch.uint32, torch.uint64]


def bits(tensor):
    """The elements of a torch tensor in order, as bytes."""
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(weights, tensors):
    """Names, shapes, types and bits; told without reading, and the same once read."""
    assert sorted(weights) == sorted(tensors)
    assert len(weights) == len(tensors)
    for name, tensor in tensors.items():
        assert name in weights
        array = weights[name]
        assert array.shape == weights.shape(name) == tuple(tensor.shape), name
        assert f"torch.{array.dtype.name}" == str(tensor.dtype), name
        assert weights.dtype(name) == array.dtype
        assert array.tobytes() == bits(tensor), name
        assert array.flags.aligned


def random_tensor(dtype, shape, seed=0):
    """Any bits, NaNs with their payload among them."""
    size = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
    data = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, size, np.uint8)
    return torch.from_numpy(data).view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def zoo():
    shapes = [(), (0,), (3, 0, 2), (1,), (5,), (2, 3), (4, 1, 3)]
    kinds = [*FLOATS, *INTEGERS, *NEW]
    return {
        f"{str(dtype).removeprefix('torch.')}.{i}": random_tensor(dtype, shape, i)
        for dtype in kinds
        for i, shape in enumerate(shapes)
    }


def refused(directory, *parts):
    """The one line that says what is wrong with a directory."""
    with pytest.raises(UserError) as caught:
        open_weights(directory)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(str(directory))
    assert ", expected " in message
    for part in parts:
        assert part in message
    return message


@st.composite
def damage(draw, data):
    """`data` with a few bytes changed, put in, taken out or cut off, most of them near the start."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.one_of(st.integers(0, 40), st.integers(0, len(data)))) % max(1, len(data))
        how = draw(st.sampled_from(["flip", "byte", "insert", "delete", "cut"]))
        if how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "byte" and data:
            data[at] = draw(st.sampled_from([0, 1, 0x2E, 0x7F, 0x80, 0xFF, *b'0129-]}"[{,']))
        elif how == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif how == "delete":
            del data[at : at + draw(st.integers(1, 9))]
        elif how == "cut":
            del data[at:]
    return bytes(data)


def survives(directory):
    """A damaged directory is refused in one line or read; never anything else, and in little memory."""
    said = ""
    tracemalloc.start()
    try:
        weights = open_weights(directory)
        read = [len(weights[name].tobytes()) for name in weights]
        assert len(read) == len(weights)
    except UserError as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(said.splitlines()) <= 1
    assert peak < 2**26
