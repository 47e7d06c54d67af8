import subprocess
import sys

from helpers.paths import ROOT


def test_worker_process_imports_neither_jax_nor_tokenizers():
    program = "import sys, dwt_jax.data.encode; print({'jax', 'flax', 'tokenizers'} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.strip() == "set()"
