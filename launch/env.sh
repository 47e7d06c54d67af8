# Sourced by the other scripts on the machine that trains. Python sets what holds everywhere by itself
# (dwt_jax/runtime_env.py); here is what depends on where it runs. What is set already wins.
# shellcheck shell=bash

# Logs in the order in which things happened, also when they end in a file.
export PYTHONUNBUFFERED=1
# Prepared data and compiled programs, once for all processes and for the run after a pre-emption: shared.
if [[ -z ${DWT_CACHE:-} && -d /shared ]]; then DWT_CACHE=/shared/cache; fi
export DWT_CACHE=${DWT_CACHE:-$HOME/.cache/dwt-jax}
# jax takes 75 % of a GPU at once; nothing else runs here, and the rest is needed by NCCL and CUDA.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}
# Seconds for all processes to find each other: nodes of a queue start unevenly.
export DWT_START_TIMEOUT=${DWT_START_TIMEOUT:-900}
# No flags for XLA, libtpu or NCCL: none was measured here.
