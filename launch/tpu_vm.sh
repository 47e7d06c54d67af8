#!/usr/bin/env bash
# A Cloud TPU slice by queued resources, from nothing to a finished run:
#   bash launch/tpu_vm.sh VERB --name=N --zone=Z [--project=P] [--type=v5litepod-16] [--runtime=IMAGE]
#        [--spot] [--share=HOST:/runs] [--attempts=20] [--preflight=v5e:4x4] [--dry-run]
#        [-- train --config=… --workdir=/shared/…]
# VERB: project (its services, once), disk (a file system that all workers share, once; prints its address),
# create, wait, setup, run, logs, status, stop, delete; or until-done: create to delete in turn, made again after
# a pre-emption, until the run ends with 0. A user's mistake (status 2) is never tried again. --share is
# mounted as /shared: --workdir belongs there. Seconds, as variables: WAIT_LIMIT (in the queue), POLL,
# SETTLE (until a failure that was a pre-emption shows as one). See docs/launching.md.
set -euo pipefail

refuse() { echo "tpu_vm.sh: $1; bash launch/tpu_vm.sh --help says more" >&2; exit 2; }
say() { echo "tpu_vm.sh: $*" >&2; }

verb=${1:-} name='' zone='' project='' type=v5litepod-16 runtime=v2-alpha-tpuv5-lite spot=false
attempts=20 preflight='' share='' dry=false wait_limit=${WAIT_LIMIT:-86400} poll=${POLL:-30} misses_allowed=20
[[ $verb != --help && $verb != -h ]] || { sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0; }
case $verb in
  project | disk | create | wait | setup | run | logs | status | stop | delete | until-done) shift ;;
  *) refuse "no verb '$verb', expected project, disk, create, wait, setup, run, logs, status, stop, delete or until-done" ;;
esac
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --spot) spot=true ;;
    --attempts=*) attempts=${1#*=} ;;
    --share=*) share=${1#*=} ;;
    --preflight=*) preflight=${1#*=} ;;
    --dry-run) dry=true ;;
    *) refuse "no option $1" ;;
  esac
  shift
done
(($# == 0)) || shift
words=("$@")
[[ $name && $zone ]] || refuse "--name and --zone are needed"
[[ $attempts =~ ^[1-9][0-9]{0,3}$ ]] || refuse "--attempts is $attempts, expected a number from 1 to 9999"
[[ ! $share || $share =~ ^[A-Za-z0-9._-]+:/[A-Za-z0-9._/-]+$ ]] || refuse "--share is $share, expected HOST:/PATH"
if ((${#words[@]} == 0)) && { [[ $verb == run || $verb == until-done || $preflight ]]; }; then
  refuse "no command, expected: -- train --config=…"
fi
where=(--zone="$zone" --quiet)
[[ -z $project ]] || where+=(--project="$project")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/steps.sh
. launch/steps.sh
scratch=.
if ! $dry; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
fi

cloud() { do_it gcloud compute tpus "$@"; }

on() { # WORKER COMMAND
  cloud tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

check() { if [[ $preflight ]]; then fits "$preflight" "${words[@]}"; fi; }

create() {
  local more=()
  ! $spot || more+=(--spot)
  cloud queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$runtime" "${where[@]}" "${more[@]+"${more[@]}"}"
}

remove() { cloud queued-resources delete "$name" "${where[@]}" --force; }

describe() { cloud queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'; }

look() { # now=the state of the queued resource, NONE where there is none
  local misses
  for ((misses = 1; ; misses++)); do
    if now=$(describe 2> "$scratch/error"); then return; fi
    if grep -qE 'NOT_FOUND|was not found' "$scratch/error"; then now=NONE && return; fi
    if ((misses == misses_allowed)); then
      say "the state of $name cannot be read: $(tail -n 1 "$scratch/error")"
      exit 1
    fi
    sleep "$poll"
  done
}

wait_until_active() { # 0: active, 4: it will not be, 1: not in time
  if $dry; then describe && return; fi
  local began=$SECONDS before=''
  while look; do
    [[ $now == "$before" ]] || say "$name is $now"
    before=$now
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | NONE) return 4 ;;
    esac
    ((SECONDS - began < wait_limit)) || break
    sleep "$poll"
  done
  say "$name: still $now after $wait_limit s (WAIT_LIMIT), expected ACTIVE; it stays in the queue"
  return 1
}

# What runs on the workers. Their own Python may be older than 3.11; a new machine may still be updating itself.
# A process number may be another's after a restart: hence the name besides.
# shellcheck disable=SC2016
MOUNT='sudo apt-get update -qq; sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq nfs-common && sudo mkdir -p /shared && { mountpoint -q /shared || sudo mount -t nfs SHARE /shared; } && sudo chmod 1777 /shared && '
# shellcheck disable=SC2016
INSTALL='mkdir -p dwt-jax && tar -xzf dwt-jax.tar.gz -C dwt-jax && cd dwt-jax && python3 -m pip install --user --quiet uv && export PATH=$HOME/.local/bin:$PATH && { [ -d .venv ] || uv venv --quiet --python 3.12 .venv; } && uv pip install --quiet --python .venv -c constraints.txt -r requirements.txt "jax[tpu]"'
# shellcheck disable=SC2016
RUNS='pgrep -g "$(cat dwt-jax/run.pid 2>/dev/null)" -f dwt_jax >/dev/null 2>&1'
STATUS="cat dwt-jax/run.status 2>/dev/null || { $RUNS && echo runs || echo gone; }"
# shellcheck disable=SC2016
STOP="$RUNS || exit 0; kill -TERM -- -\$(cat dwt-jax/run.pid); for i in \$(seq 180); do $RUNS || exit 0; sleep 1; done; kill -KILL -- -\$(cat dwt-jax/run.pid)"

setup() { # this commit. Called in conditions, where bash goes on after errors: hence the &&
  $dry || git diff --quiet HEAD || say "what is not committed stays here"
  do_it git archive --format=tar.gz --output="$scratch/dwt-jax.tar.gz" HEAD \
    && cloud tpu-vm scp "$scratch/dwt-jax.tar.gz" "$name": "${where[@]}" --worker=all \
    && on all "${share:+${MOUNT/SHARE/"$share"}}$INSTALL"
}

run() { # detached: it outlives this connection. A run that is there already is left alone.
  local command
  command=$(text_of "${words[@]}")
  on all "if $RUNS; then echo runs already; else cd dwt-jax && rm -f run.status && { setsid nohup bash -c 'trap : TERM; . launch/env.sh; .venv/bin/python -m dwt_jax \"\$@\"; echo \$? > run.status' run $command >> run.log 2>&1 < /dev/null & echo \$! > run.pid; }; fi"
}

watch() { # ended=how the run ended on worker 0: its status, or lost
  local misses=0
  while look && [[ $now == ACTIVE ]]; do
    if ended=$(on 0 "$STATUS" 2>/dev/null); then misses=0; else misses=$((misses + 1)) ended=''; fi
    case $ended in [0-9]*) return ;; gone) break ;; esac
    ((misses < misses_allowed)) || break
    sleep "$poll"
  done
  ended=lost
}

prepare() { # a slice with nothing on it that still runs, or the one on which the run already does
  local began=$SECONDS
  while look && [[ $now == SUSPENDING || $now == DELETING ]]; do
    ((SECONDS - began < wait_limit)) || { say "$name: still $now after $wait_limit s (WAIT_LIMIT)" && exit 1; }
    sleep "$poll"
  done
  case $now in
    NONE) create || exit 1 ;;
    FAILED | SUSPENDED) { remove && create; } || exit 1 ;;
  esac
}

until_done() {
  local attempt ended found
  if $dry; then create && wait_until_active && setup && run && on 0 "$STATUS" && remove && return; fi
  for ((attempt = 1; attempt <= attempts; attempt++)); do
    ((attempt == 1)) || sleep "$poll"
    say "attempt $attempt of $attempts"
    prepare
    found=0
    wait_until_active || found=$?
    ((found != 1)) || exit 1
    ((found == 0)) || continue
    if ((attempt == 1)) && [[ $(on 0 "$STATUS" 2>/dev/null || true) == runs ]]; then
      say "the run is there already"
    elif ! { { ((attempt == 1)) || on all "$STOP"; } && setup && run; }; then # what others still run ends first
      say "not all workers could be reached"
      continue
    fi
    watch
    say "the run ended: $ended"
    case $ended in
      0) remove && return ;;
      75 | lost) continue ;; # stopped with everything saved, or pre-empted: the same command goes on
      2 | 3) ;;
      *) # where one host is taken, the others fail first
        sleep "${SETTLE:-120}"
        look
        [[ $now == ACTIVE ]] || continue
        ;;
    esac
    say "the slice stays, for its logs: bash launch/tpu_vm.sh logs --name=$name --zone=$zone; then delete it"
    exit "$ended"
  done
  say "not done after $attempts attempts (--attempts); the slice may still be there: bash launch/tpu_vm.sh status --name=$name --zone=$zone"
  exit 1
}

disk() {
  do_it gcloud filestore instances create "$name" "${where[@]}" --tier=BASIC_HDD --file-share=name=runs,capacity=1TB --network=name=default
  do_it gcloud filestore instances describe "$name" "${where[@]}" '--format=value[separator=":/"](networks[0].ipAddresses[0],fileShares[0].name)'
}

case $verb in
  project) do_it gcloud services enable tpu.googleapis.com compute.googleapis.com file.googleapis.com ${project:+--project="$project"} ;;
  disk) disk ;;
  create) check && create ;;
  wait) wait_until_active ;;
  setup) setup ;;
  run) run ;;
  logs) on 0 'tail -n 100 -F dwt-jax/run.log' ;;
  status) describe && on 0 "$STATUS" ;;
  stop) on all "$STOP" ;;
  delete) remove ;;
  until-done) check && until_done ;;
esac
