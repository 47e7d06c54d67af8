"""A batch ramp on eight devices, whose number is not in the config."""

import pytest

from dwt_jax.config_loader import load_config
from dwt_jax.errors import UserError
from dwt_jax.train.setup import setup_run
from helpers.runs import prepared_project


def test_devices_must_divide_every_stage(tmp_path):
    spec, ramp = prepared_project(tmp_path), {"train.batch_size": "16", "train.batch_ramp_fraction": "0.5"}
    for sizes in ("[4,8]", "[12]"):
        (tmp_path / "refused").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=r"train\.batch_ramp is .* x the mesh's data x fsdp \(1 x 8\)"):
            setup_run(load_config(spec, {**ramp, "train.batch_ramp": sizes}), tmp_path / "refused")
    (tmp_path / "run").mkdir()
    run = setup_run(load_config(spec, {**ramp, "train.batch_ramp": "[8]"}), tmp_path / "run")
    assert run.batch_sizes.tolist() == [8] * 6 + [16] * 6
