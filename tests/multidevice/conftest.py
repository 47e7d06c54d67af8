"""Eight CPU devices for the tests of this folder, which need a pytest process of their own.

JAX fixes the number of devices when its backend starts, and the other tests expect one device. Hence
`pytest tests/multidevice` makes eight devices, and `pytest tests` skips these tests.
"""

from pathlib import Path

import jax
import pytest

FOLDER = Path(__file__).parent
NUM_DEVICES = 8


def runs_only_this_folder(config: pytest.Config) -> bool:
    paths = [Path(config.invocation_params.dir, arg.partition("::")[0]).resolve() for arg in config.args]
    return all(path.is_relative_to(FOLDER) for path in paths)


def pytest_configure(config: pytest.Config) -> None:
    if runs_only_this_folder(config):
        jax.config.update("jax_num_cpu_devices", NUM_DEVICES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not runs_only_this_folder(config):
        skip = pytest.mark.skip(reason=f"needs {NUM_DEVICES} devices: run `pytest tests/multidevice` alone")
        for item in items:
            if item.path.is_relative_to(FOLDER):
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    assert jax.device_count() == NUM_DEVICES
