"""What is restored is what was saved, or the loss of it is told."""

import gc
import resource
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dwt_jax.errors import SaveFailed, UserError
from dwt_jax.runs.checkpoint import Checkpoints, checksum
from helpers.logged import logged

NEWEST = 20
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax


def state_of(step):
    """All kinds of leaves that a training state has, other ones at each step."""
    random = np.random.default_rng(step)
    return {
        "params": {
            "kernel": jnp.asarray(random.normal(size=(3, 40, 30)), jnp.float32),
            "bias": jnp.asarray(random.normal(size=7), jnp.float32),
        },
        "opt_state": (
            {"count": jnp.int32(step)},
            {"mu": jnp.asarray(random.normal(size=(5, 6)), jnp.float32)},
        ),
        "step": jnp.int32(step),
        "matched_step": jnp.full((), -1, jnp.int32),
        "odd": jnp.array([np.nan, -0.0, np.inf, 1e-45], jnp.float32),
    }


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(0))


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def write(directory, steps, keep=10):
    checkpoints = Checkpoints(directory, keep)
    for step in steps:
        checkpoints.save(step, state_of(step))
    checkpoints.wait()
    checkpoints.close()


def restore(directory):
    """(result, what was logged) of a fresh process's restore."""
    checkpoints = Checkpoints(directory, 10)
    try:
        with logged() as log:
            return checkpoints.restore(abstract()), log
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    write(directory, [10, NEWEST])
    return directory


@pytest.fixture
def copy(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restore(tmp_path / "checkpoints") == (None, [])


def test_what_was_saved_bit_for_bit(sound):
    (state, step), log = restore(sound)
    assert step == NEWEST
    assert same(state, state_of(NEWEST))
    assert not same(state, state_of(10))
    assert log == []


def test_only_the_newest_are_kept(tmp_path):
    write(tmp_path / "checkpoints", [1, 2, 3, 4], keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]
    (state, step), _ = restore(tmp_path / "checkpoints")
    assert step == 4
    assert same(state, state_of(4))


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)
    checkpoints.save(5, state_of(5))
    checkpoints.wait()
    checkpoints.save(5, state_of(6))
    checkpoints.wait()
    assert checkpoints.steps() == [5]
    checkpoints.close()
    assert same(restore(tmp_path / "checkpoints")[0][0], state_of(5))


def test_what_is_saved_does_not_change_with_the_state(tmp_path):
    """The next step donates the buffers while the writing goes on."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)
    state = state_of(5)
    checkpoints.save(5, state)
    jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)(state)
    checkpoints.wait()
    checkpoints.close()
    assert same(restore(tmp_path / "checkpoints")[0][0], state_of(5))


def test_an_unfinished_one_is_not_there(copy):
    """What a killed process leaves: Orbax writes under another name and renames at the end."""
    shutil.copytree(copy / "20", copy / "30.orbax-checkpoint-tmp-123")
    (state, step), _ = restore(copy)
    assert step == NEWEST
    assert same(state, state_of(NEWEST))


def empty(data):
    return b""


def half(data):
    return data[: len(data) // 2]


def all_but_one(data):
    return data[:-1]


def flip(share):
    def damage(data):
        i = min(int(share * len(data)), len(data) - 1)
        return data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :]

    damage.__name__ = f"flip_{share}"
    return damage


def gone(data):
    return None


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [gone, empty, half, all_but_one, flip(0), flip(0.3), flip(0.5), flip(0.8), flip(1)],
    ids=lambda d: d.__name__,
)
def test_damage_is_never_silent(sound, tmp_path, damage):
    """To every file of the newest checkpoint in turn."""
    files = sorted(path.relative_to(sound) for path in (sound / str(NEWEST)).rglob("*") if path.is_file())
    assert len(files) >= 4
    told = 0
    for i, file in enumerate(files):
        directory = tmp_path / str(i) / "checkpoints"
        shutil.copytree(sound, directory)
        data = damage((directory / file).read_bytes())
        if data is None:
            (directory / file).unlink()
        else:
            (directory / file).write_bytes(data)
        (state, step), log = restore(directory)
        assert same(state, state_of(step)), file
        if step == NEWEST:
            assert log == [], file
        else:
            told += 1
            assert step == 10, file
            assert len(log) == 1, file
            assert "checkpoint 20 is damaged" in log[0], file
            assert "\n" not in log[0]
            assert not (directory / "20").exists()
            assert (directory.parent / "checkpoints-damaged" / "20").is_dir()
        shutil.rmtree(directory.parent)
    assert told


def data_files(directory):
    return [path for path in directory.rglob("*") if path.is_file() and path.stat().st_size > 5000]


def test_every_bit_of_the_arrays_counts():
    """Restored arrays that differ in one bit, in any leaf, have another checksum."""
    base = np.asarray(checksum(state_of(3)))
    leaves, tree = jax.tree.flatten(state_of(3))
    for i, leaf in enumerate(leaves):
        words = np.asarray(leaf).reshape(-1).view(np.uint32).copy()
        for at in {0, len(words) // 2, len(words) - 1}:
            for bit in (0, 31):
                changed = words.copy()
                changed[at] ^= np.uint32(1) << np.uint32(bit)
                other = [*leaves]
                other[i] = jnp.asarray(changed.view(np.asarray(leaf).dtype).reshape(leaf.shape))
                found = np.asarray(checksum(tree.unflatten(other)))
                assert (found != base).tolist() == [j == i for j in range(len(leaves))]
    swapped = dict(state_of(3))
    swapped["odd"] = swapped["odd"][::-1]
    assert (np.asarray(checksum(swapped)) != base).any()


def test_all_damaged_is_the_users_to_know(copy, log_lines):
    for path in data_files(copy):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    checkpoints = Checkpoints(copy, 10)
    with pytest.raises(UserError) as caught:
        checkpoints.restore(abstract())
    checkpoints.close()
    assert "\n" not in str(caught.value)
    assert "[10, 20]" in str(caught.value)
    assert str(copy) in str(caught.value)
    assert len(log_lines) == 2
    assert {"10", "20"} <= {
        path.name for path in copy.iterdir()
    }  # nothing was moved: the next try says the same


def test_a_reader_moves_nothing(copy):
    for path in data_files(copy):
        if "/20/" in str(path):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    checkpoints = Checkpoints(copy, 10, read_only=True)
    found = checkpoints.restore(abstract())
    checkpoints.close()
    assert found is not None
    assert found[1] == 10
    assert (copy / "20").is_dir()


def test_saving_goes_on_after_damage(copy):
    for path in data_files(copy / str(NEWEST)):
        path.unlink()
    checkpoints = Checkpoints(copy, 10)
    _, step = checkpoints.restore(abstract())
    assert step == 10
    checkpoints.save(NEWEST, state_of(99))
    checkpoints.wait()
    checkpoints.close()
    (state, step), log = restore(copy)
    assert step == NEWEST
    assert same(state, state_of(99))
    assert log == []


def test_a_signal_while_reading_is_not_damage(copy, monkeypatch):
    from dwt_jax.distributed.shutdown import Preempted, ShutdownFlag

    checkpoints = Checkpoints(copy, 10)
    monkeypatch.setattr(checkpoints, "_read", lambda *_: ShutdownFlag().handle(15, None))
    with pytest.raises(Preempted):
        checkpoints.restore(abstract())
    checkpoints.close()
    assert {"10", "20"} <= {path.name for path in copy.iterdir()}
    assert not (copy.parent / "checkpoints-damaged").exists()


def check_for(seconds, checkpoints):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        checkpoints.check()


def test_a_save_without_room_is_one_error_and_those_before_stay(copy, capfd):
    """It is raised by the next check after it failed, with no other call of Orbax."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(copy, 10)
    checkpoints.check()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes
    try:
        checkpoints.save(30, state_of(30))
        with pytest.raises(SaveFailed, match="checkpoints: a checkpoint cannot be written: File too large; "):
            check_for(30, checkpoints)
        checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err
    (state, step), _ = restore(copy)
    assert step == NEWEST
    assert same(state, state_of(NEWEST))


def test_an_error_of_writing_below_a_long_path_is_one_error(copy):
    """TensorStore names the path first and the reason last."""
    checkpoints = Checkpoints(copy, 10)
    path = "x" * 300
    checkpoints._failure = ValueError(
        f'Error writing local file "{path}": Failed to fsync file: Invalid argument'
    )
    with pytest.raises(SaveFailed, match=r'cannot be written: x*": Failed to fsync file: Invalid argument; '):
        checkpoints.check()


def test_a_write_dropped_by_a_failed_save_prints_nothing(tmp_path):
    """Orbax starts the writes of a checkpoint one by one; those after the one that fails are collected."""
    program = f"""
from dwt_jax.runs.checkpoint import Checkpoints
async def write_fragment(): ...
Checkpoints({str(tmp_path / "checkpoints")!r}, 1)
write_fragment()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "write_fragment" not in done.stderr
