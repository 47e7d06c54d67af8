#!/usr/bin/env bash
# A Cloud TPU slice by queued resources, from nothing to a finished run:
#   bash launch/tpu_vm.sh VERB --name=N --zone=Z [--project=P] [--type=v5litepod-16] [--runtime=IMAGE]
#        [--spot] [--share=HOST:/runs] [--attempts=20] [--preflight=v5e:4x4] [--dry-run]
#        [-- train --config=… --workdir=/shared/…]
# VERB: project (its services, once), disk (a file system that all workers share, once; status says its address),
# create, wait, setup, run, logs, status, delete; or until-done: create to delete in turn, made again after a
# pre-emption, until the run ends with 0. A user's mistake (status 2) is never tried again. --share is
# mounted as /shared: --workdir and DWT_CACHE belong there. See docs/launching.md.
set -euo pipefail

refuse() { echo "tpu_vm.sh: $1; bash launch/tpu_vm.sh --help says more" >&2; exit 2; }
say() { echo "tpu_vm.sh: $*" >&2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
verb=${1:-} name='' zone='' project='' type=v5litepod-16 runtime=v2-alpha-tpuv5-lite spot=false
attempts=20 preflight='' share='' dry=false wait_limit=${WAIT_LIMIT:-86400} poll=${POLL:-30}
[[ $verb != --help && $verb != -h ]] || { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0; }
case $verb in
  project | disk | create | wait | setup | run | logs | status | delete | until-done) shift ;;
  *) refuse "no verb '$verb', expected project, disk, create, wait, setup, run, logs, status, delete or until-done" ;;
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
[[ $verb != run && $verb != until-done ]] || ((${#words[@]})) || refuse "no command, expected: -- train --config=…"
where=(--zone="$zone" --quiet)
[[ -z $project ]] || where+=(--project="$project")

do_it() { # a command, or its text
  if $dry; then printf '%q ' "$@" && echo; else "$@"; fi
}

cloud() { do_it gcloud compute tpus "$@"; }

state() { # of the queued resource; NONE if there is none
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || echo NONE
}

on() { # WORKER COMMAND
  cloud tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

check() { # does it fit? 3: no
  [[ $preflight ]] || return 0
  local config=() word
  for word in "${words[@]}"; do [[ $word != --config* ]] || config+=("$word"); done
  local python=${PYTHON:-python3}
  [[ -n ${PYTHON:-} || ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python
  (cd "$root" && do_it "$python" -m dwt_jax compile "${config[@]}" --topology="$preflight")
}

create() {
  local more=()
  ! $spot || more+=(--spot)
  cloud queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$runtime" "${where[@]}" "${more[@]+"${more[@]}"}"
}

wait_until_active() { # 0: active, 4: it will not be, 1: not in time
  if $dry; then
    cloud queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
    return 0
  fi
  local began=$SECONDS before='' now
  while ((SECONDS - began <= wait_limit)); do
    now=$(state)
    [[ $now == "$before" ]] || say "$name is $now"
    before=$now
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | NONE) return 4 ;;
    esac
    sleep "$poll"
  done
  say "$name: still $before after $wait_limit s (WAIT_LIMIT), expected ACTIVE; it stays in the queue"
  return 1
}

# On every worker, whose own Python may be older than 3.11.
# shellcheck disable=SC2016
MOUNT='set -e; sudo apt-get install -y -qq nfs-common; sudo mkdir -p /shared; mountpoint -q /shared || sudo mount -t nfs SHARE /shared; sudo chmod 1777 /shared'
# shellcheck disable=SC2016
INSTALL='set -e; mkdir -p dwt-jax; tar -xzf dwt-jax.tar.gz -C dwt-jax; cd dwt-jax; python3 -m pip install --user --quiet uv; export PATH=$HOME/.local/bin:$PATH; [ -d .venv ] || uv venv --quiet --python 3.12 .venv; uv pip install --quiet --python .venv -r requirements.txt "jax[tpu]"'

setup() { # this commit. Called in conditions, where bash goes on after errors: hence the &&
  local folder=. archived=true
  $dry || folder=$(mktemp -d)
  do_it git -C "$root" archive --format=tar.gz --output="$folder/dwt-jax.tar.gz" HEAD || archived=false
  $archived && cloud tpu-vm scp "$folder/dwt-jax.tar.gz" "$name": "${where[@]}" --worker=all \
    && on all "${share:+${MOUNT/SHARE/"$share"}; }$INSTALL"
  local status=$?
  $dry || rm -rf "$folder"
  return "$status"
}

run() { # detached: it outlives this connection. A run that is there already is left alone.
  local command
  printf -v command '%q ' "${words[@]}"
  on all "cd dwt-jax; if [ -e run.pid ] && kill -0 \$(cat run.pid) 2>/dev/null; then echo runs already; else rm -f run.status; DWT_CACHE=${DWT_CACHE:-} setsid nohup bash -c '. launch/env.sh; .venv/bin/python -m dwt_jax \"\$@\"; echo \$? > run.status' run $command >> run.log 2>&1 < /dev/null & echo \$! > run.pid; fi"
}

finished() { # the status of the run on worker 0; empty while it runs
  on 0 'cat dwt-jax/run.status 2>/dev/null || true'
}

watch() { # until it ends: its status, or 'lost'
  local found='' misses=0
  while :; do
    [[ $(state) == ACTIVE ]] || { echo lost; return; }
    if found=$(finished 2>/dev/null); then misses=0; else misses=$((misses + 1)); fi
    if [[ $found =~ ^[0-9]+$ ]]; then echo "$found" && return; fi
    ((misses < 20)) || { echo lost; return; }
    sleep "$poll"
  done
}

remove() { cloud queued-resources delete "$name" "${where[@]}" --force; }

until_done() {
  local attempt ended
  if $dry; then create && wait_until_active && setup && run && finished && remove && return; fi
  for ((attempt = 1; attempt <= attempts; attempt++)); do
    say "attempt $attempt of $attempts"
    case $(state) in
      NONE) create ;;
      FAILED | SUSPENDING | SUSPENDED) remove && create ;;
    esac
    ended=0
    wait_until_active || ended=$?
    ((ended != 1)) || exit 1
    ((ended == 0)) || continue
    { setup && run; } || { say "no worker could be reached; again" && sleep "$poll" && continue; }
    ended=$(watch)
    say "the run ended: $ended"
    case $ended in
      0) remove && return ;;
      75 | lost) ;; # stopped with everything saved, or pre-empted: the same command goes on
      *) say "logs: bash launch/tpu_vm.sh logs --name=$name --zone=$zone" && exit "$ended" ;;
    esac
  done
  say "not done after $attempts attempts (--attempts)"
  exit 1
}

case $verb in
  project) do_it gcloud services enable tpu.googleapis.com compute.googleapis.com file.googleapis.com ${project:+--project="$project"} ;;
  disk) do_it gcloud filestore instances create "$name" "${where[@]}" --tier=BASIC_HDD --file-share=name=runs,capacity=1TB --network=name=default ;;
  create) check && create ;;
  wait) wait_until_active ;;
  setup) setup ;;
  run) run ;;
  logs) on 0 'tail -n 100 -F dwt-jax/run.log' ;;
  status) if $dry; then wait_until_active; else state; fi && finished ;;
  delete) remove ;;
  until-done) check && until_done ;;
esac
