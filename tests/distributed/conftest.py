"""The environment that process detection reads."""

import os

import pytest

PREFIXES = ("JAX_COORD", "JAX_NUM_PROC", "JAX_PROC", "SLURM", "OMPI", "PMI", "TPU_W", "KUBE")


@pytest.fixture
def set_env(monkeypatch):
    """set_env(NAME=value) sets variables; those of this machine's own cluster are removed."""
    for name in os.environ:
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)

    def set_variables(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables
