"""A batch ramp on eight devices, whose number is not in the config."""

import numpy as np
import pytest

from dwt_jax.config_loader import load_config
from dwt_jax.errors import UserError
from dwt_jax.train.loop import train
from dwt_jax.train.setup import setup_run
from helpers.run_records import records
from helpers.runs import dwt, prepared_project


def test_devices_must_divide_every_stage(tmp_path):
    spec, ramp = prepared_project(tmp_path), {"train.batch_size": "16", "train.batch_ramp_fraction": "0.5"}
    for sizes in ("[4,8]", "[12]"):
        (tmp_path / "refused").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=r"train\.batch_ramp is .* x the mesh's data x fsdp \(1 x 8\)"):
            setup_run(load_config(spec, {**ramp, "train.batch_ramp": sizes}), tmp_path / "refused")
    (tmp_path / "run").mkdir()
    run = setup_run(load_config(spec, {**ramp, "train.batch_ramp": "[8]"}), tmp_path / "run")
    assert run.batch_sizes.tolist() == [8] * 6 + [16] * 6


def test_eight_devices_give_the_losses_of_one(tmp_path):
    spec = prepared_project(tmp_path)
    overrides = {
        "train.batch_size": "16",
        "train.batch_ramp": "[8]",
        "train.batch_ramp_fraction": "0.5",
        "train.log_every": "1",
    }
    train(load_config(spec, overrides), tmp_path / "eight")
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    dwt("train", f"--config={spec}", f"--workdir={tmp_path / 'one'}", *flags)  # its process has one device
    losses = [[record["loss"] for record in records(tmp_path / name)] for name in ("eight", "one")]
    assert len(losses[0]) == 12
    np.testing.assert_allclose(*losses, rtol=1e-4)
