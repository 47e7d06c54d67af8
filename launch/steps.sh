# Sourced from the project's root by tpu_vm.sh, gke.sh and slurm.sbatch: how they run a command or, where
# $dry is true, print it, and how they ask first whether a run fits.
# shellcheck shell=bash disable=SC2154

# The project's own Python where there is one.
python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then python=.venv/bin/python; fi

text_of() { # a command as it would be typed
  local text
  printf -v text ' %q' "$@"
  echo "${text# }"
}

do_it() { # a command, or its text
  if $dry; then text_of "$@"; else "$@"; fi
}

fits() { # TOPOLOGY train WORD…: asks `dwt compile` with the same config; 3: it does not fit
  local command=("$python" -m dwt_jax compile "--topology=$1")
  shift 2
  while (($#)); do
    case $1 in
      --workdir=*) ;;
      --workdir) shift $(($# > 1)) ;; # and its value
      *) command+=("$1") ;;
    esac
    shift
  done
  do_it "${command[@]}"
}
