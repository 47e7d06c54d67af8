#!/usr/bin/env bash
# A JobSet on GKE: gke_jobset.yaml (TPU) or gke_jobset_gpu.yaml (--gpu), filled in and applied.
#   bash launch/gke.sh VERB --name=N --image=I --claim=C [--gpu] [--accelerator=tpu-v5-lite-podslice]
#        [--topology=4x4] [--hosts=4] [--chips=4] [--max-restarts=100] [--preflight=v5e:4x4] [--dry-run]
#        [-- train --config=… --workdir=/shared/runs/…]
# VERB: cluster (with a pool of nodes, JobSet and the claim; wants --zone=Z, --machine=ct5lp-hightpu-4t, takes --spot),
# image (built from Dockerfile and pushed), apply, status, logs, delete. claim: a ReadWriteMany volume claim,
# seen as /shared by every pod. hosts x chips is the number of chips (of the TPU topology). --dry-run of apply
# prints the YAML.
# shellcheck disable=SC2034 # some are read by their names, in filled
set -euo pipefail

refuse() { echo "gke.sh: $1; bash launch/gke.sh --help says more" >&2; exit 2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
verb=${1:-} gpu=false dry=false preflight='' zone='' machine='' spot=false
NAME='' IMAGE='' CLAIM='' ACCELERATOR='' TOPOLOGY=4x4 HOSTS=4 CHIPS='' MAX_RESTARTS=100 ARGUMENTS='[]'
[[ $verb != --help && $verb != -h ]] || { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0; }
case $verb in
  cluster | image | apply | status | logs | delete) shift ;;
  *) refuse "no verb '$verb', expected cluster, image, apply, status, logs or delete" ;;
esac
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --name=*) NAME=${1#*=} ;;
    --image=*) IMAGE=${1#*=} ;;
    --claim=*) CLAIM=${1#*=} ;;
    --gpu) gpu=true ;;
    --zone=*) zone=${1#*=} ;;
    --machine=*) machine=${1#*=} ;;
    --spot) spot=true ;;
    --accelerator=*) ACCELERATOR=${1#*=} ;;
    --topology=*) TOPOLOGY=${1#*=} ;;
    --hosts=*) HOSTS=${1#*=} ;;
    --chips=*) CHIPS=${1#*=} ;;
    --max-restarts=*) MAX_RESTARTS=${1#*=} ;;
    --preflight=*) preflight=${1#*=} ;;
    --dry-run) dry=true ;;
    *) refuse "no option $1" ;;
  esac
  shift
done
(($# == 0)) || shift
[[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || refuse "--name is '$NAME', expected small letters, digits and -"
template=$root/launch/gke_jobset.yaml
if $gpu; then template=$root/launch/gke_jobset_gpu.yaml; fi
if [[ -z $ACCELERATOR ]]; then if $gpu; then ACCELERATOR=nvidia-h100-80gb; else ACCELERATOR=tpu-v5-lite-podslice; fi; fi
if [[ -z $CHIPS ]]; then if $gpu; then CHIPS=8; else CHIPS=4; fi; fi

do_it() { # a command, or its text
  if $dry; then printf '%q ' "$@" && echo; else "$@"; fi
}

kube() { do_it kubectl "$@"; }

JOBSET=https://github.com/kubernetes-sigs/jobset/releases/download/v0.8.0/manifests.yaml

cluster() { # 'pool' has the accelerators; the small nodes that a cluster begins with run its own things
  [[ $zone && $machine && $CLAIM ]] || refuse "--zone, --machine and --claim are needed"
  local pool=(--cluster="$NAME" --zone="$zone" --machine-type="$machine" --num-nodes="$HOSTS")
  if $gpu; then pool+=(--accelerator="type=$ACCELERATOR,count=$CHIPS"); else pool+=(--tpu-topology="$TOPOLOGY"); fi
  ! $spot || pool+=(--spot)
  do_it gcloud container clusters create "$NAME" --zone="$zone" --addons=GcpFilestoreCsiDriver --num-nodes=2
  do_it gcloud container node-pools create pool "${pool[@]}"
  do_it gcloud container clusters get-credentials "$NAME" --zone="$zone"
  kube apply --server-side -f "$JOBSET"
  template=$root/launch/gke_claim.yaml
  if $dry; then filled; else filled | kubectl apply -f -; fi
}

image() {
  [[ $IMAGE ]] || refuse "--image is needed"
  local extra=tpu
  ! $gpu || extra=cuda12
  do_it docker build --file "$root/launch/Dockerfile" --build-arg ACCELERATOR=$extra --tag "$IMAGE" "$root"
  do_it docker push "$IMAGE"
}

quoted() { # words as a list of YAML (and JSON) strings
  local text='' word
  for word in "$@"; do
    [[ $word != *$'\n'* ]] || refuse "an argument holds a line break, expected none"
    word=${word//\\/\\\\}
    text+=", \"${word//\"/\\\"}\""
  done
  echo "[${text#, }]"
}

filled() { # the template with its ${NAME}s; nothing else in it is touched
  local text name
  text=$(<"$template")
  for name in NAME IMAGE CLAIM ACCELERATOR TOPOLOGY HOSTS CHIPS MAX_RESTARTS ARGUMENTS; do
    text=${text//"\${$name}"/"${!name}"}
  done
  echo "$text"
}

apply() {
  [[ $IMAGE && $CLAIM ]] || refuse "--image and --claim are needed"
  (($#)) || refuse "no command, expected: -- train --config=…"
  local number
  for number in "$HOSTS" "$CHIPS" "$MAX_RESTARTS"; do
    [[ $number =~ ^[1-9][0-9]{0,4}$ ]] || refuse "$number, expected a number of at least 1"
  done
  ARGUMENTS=$(quoted "$@")
  if [[ $preflight ]]; then
    local config=() word python=${PYTHON:-python3}
    [[ -n ${PYTHON:-} || ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python
    for word in "$@"; do [[ $word != --config* ]] || config+=("$word"); done
    local check=("$python" -m dwt_jax compile "${config[@]}" --topology="$preflight")
    if $dry; then printf '# %q' "${check[0]}" && printf ' %q' "${check[@]:1}" && echo; else (cd "$root" && "${check[@]}"); fi
  fi
  if $dry; then filled; else filled | kubectl apply -f -; fi
}

case $verb in
  cluster) cluster ;;
  image) image ;;
  apply) apply "$@" ;;
  status) kube get jobset "$NAME" && kube get pods --selector=jobset.sigs.k8s.io/jobset-name="$NAME" --output=wide ;;
  logs) kube logs --follow --tail=100 "job/$NAME-train-0" ;;
  delete) kube delete jobset "$NAME" ;;
esac
