#!/usr/bin/env bash
# Several processes on this machine, over loopback, each with some simulated CPU devices:
#   bash launch/local.sh --processes=2 --devices=2 -- train --config=configs/modernbert.py:2x128 --workdir=demo
# Ends with 0 if all did, with 75 if they were stopped (run it again), else with the first failure's
# status, the others killed. --dry-run prints the commands. PYTHON=… overrides the interpreter.
set -euo pipefail

refuse() { echo "local.sh: $1; usage: local.sh [--processes=N] [--devices=M] [--dry-run] -- VERB …" >&2; exit 2; }

processes=2 devices=1 dry=false
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --devices=*) devices=${1#*=} ;;
    --dry-run) dry=true ;;
    *) refuse "no option $1" ;;
  esac
  shift
done
(($# > 1)) || refuse "no command, expected one after --"
shift
for number in "$processes" "$devices"; do
  [[ $number =~ ^[1-9][0-9]{0,3}$ ]] || refuse "$number, expected a number from 1 to 9999"
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
[[ -n ${PYTHON:-} || ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python
port=PORT
$dry || port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

pids=() running=() signalled=false failed=0 again=0 killed_at=0
trap 'signalled=true; kill -TERM "${pids[@]+"${pids[@]}"}" 2>/dev/null || true' TERM INT

for ((i = 0; i < processes; i++)); do
  ! $signalled || exit 75
  words=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices" PYTHONUNBUFFERED=1
    "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}")
  # Bound to loopback: whoever reaches the coordinator could take part.
  ((processes == 1)) || words+=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port"
    "JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$i")
  words+=("$python" -m dwt_jax "$@")
  if $dry; then
    printf '%q ' "${words[@]}" && echo
    continue
  fi
  prefix() { # its lines get the number of the process; Ctrl-C is for the processes, not for this
    trap '' INT TERM
    while IFS= read -r line || [[ -n $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
  }
  if ((processes == 1)); then
    "${words[@]}" &
  else
    "${words[@]}" > >(prefix "$i") 2> >(prefix "$i" >&2) &
  fi
  pids+=($!)
done
! $dry || exit 0

ended() { # one process, with status $1
  case $1 in
    0) ;;
    75) again=75 ;;
    130 | 143) if $signalled; then again=75; else failed=${failed/#0/$1}; fi ;; # before it could handle it
    *) failed=${failed/#0/$1} ;;
  esac
}

while ((${#pids[@]})); do
  running=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      running+=("$pid")
    else
      status=0
      wait "$pid" || status=$?
      ended "$status"
    fi
  done
  pids=("${running[@]+"${running[@]}"}")
  if ((failed && !killed_at)); then killed_at=$((SECONDS + 10)); fi # they notice by themselves, as a rule
  if ((killed_at && SECONDS > killed_at && ${#pids[@]})); then kill -KILL "${pids[@]}" 2>/dev/null || true; fi
  ((${#pids[@]} == 0)) || sleep 0.2
done
exit $((failed ? failed : again))
