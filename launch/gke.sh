#!/usr/bin/env bash
# A JobSet on GKE: gke_jobset.yaml (TPU) or gke_jobset_gpu.yaml (--gpu), filled in and applied.
#   bash launch/gke.sh VERB --name=N --image=I --claim=C [--gpu] [--accelerator=tpu-v5-lite-podslice]
#        [--topology=4x4] [--hosts=4] [--chips=4] [--max-restarts=100] [--preflight=v5e:4x4] [--dry-run]
#        [-- train --config=… --workdir=/shared/runs/…]
# VERB: cluster (with a pool of nodes, JobSet and the claim; wants --zone=Z, --machine=ct5lp-hightpu-4t, takes --spot),
# image (this commit, built by Dockerfile and pushed), apply, status, logs, delete, or delete-cluster (asks first).
# claim: a ReadWriteMany volume claim, seen as /shared by every pod. hosts x chips is the number of chips (of the TPU
# topology). --dry-run of apply prints the YAML.
# shellcheck disable=SC2034 # some are read by their names, in filled
set -euo pipefail

refuse() { echo "gke.sh: $1; bash launch/gke.sh --help says more" >&2; exit 2; }

verb=${1:-} gpu=false dry=false preflight='' zone='' machine='' spot=false
NAME='' IMAGE='' CLAIM='' ACCELERATOR='' TOPOLOGY=4x4 HOSTS=4 CHIPS='' MAX_RESTARTS=100 ARGUMENTS='[]'
[[ $verb != --help && $verb != -h ]] || { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0; }
case $verb in
  cluster | image | apply | status | logs | delete | delete-cluster) shift ;;
  *) refuse "no verb '$verb', expected cluster, image, apply, status, logs, delete or delete-cluster" ;;
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
template=launch/gke_jobset.yaml
if $gpu; then template=launch/gke_jobset_gpu.yaml; fi
if [[ -z $ACCELERATOR ]]; then if $gpu; then ACCELERATOR=nvidia-h100-80gb; else ACCELERATOR=tpu-v5-lite-podslice; fi; fi
if [[ -z $CHIPS ]]; then if $gpu; then CHIPS=8; else CHIPS=4; fi; fi
# All of them end up between quotes in the YAML.
[[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || refuse "--name is '$NAME', expected small letters, digits and -"
for given in "$CLAIM" "$IMAGE" "$ACCELERATOR" "$TOPOLOGY"; do
  [[ $given =~ ^[A-Za-z0-9./:@_-]*$ ]] || refuse "$given, expected letters, digits and . / : @ _ -"
done
for given in "$HOSTS" "$CHIPS" "$MAX_RESTARTS"; do
  [[ $given =~ ^[1-9][0-9]{0,4}$ ]] || refuse "$given, expected a number of at least 1"
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/steps.sh
. launch/steps.sh

JOBSET=https://github.com/kubernetes-sigs/jobset/releases/download/v0.8.0/manifests.yaml

quoted() { # words as a list of YAML (and JSON) strings
  local text='' word
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || refuse "an argument holds a line break or the like, expected none"
    word=${word//\\/\\\\}
    text+=", \"${word//\"/\\\"}\""
  done
  echo "[${text#, }]"
}

filled() { # a template with its ${NAME}s; nothing else in it is touched
  local text name
  text=$(<"$1")
  for name in NAME IMAGE CLAIM ACCELERATOR TOPOLOGY HOSTS CHIPS MAX_RESTARTS ARGUMENTS; do
    text=${text//"\${$name}"/"${!name}"}
  done
  if $dry; then echo "$text"; else kubectl apply -f - <<< "$text"; fi
}

cluster() { # 'pool' has the accelerators; the small nodes that a cluster begins with run its own things
  [[ $zone && $machine && $CLAIM ]] || refuse "--zone, --machine and --claim are needed"
  local pool=(--cluster="$NAME" --zone="$zone" --machine-type="$machine" --num-nodes="$HOSTS")
  if $gpu; then pool+=(--accelerator="type=$ACCELERATOR,count=$CHIPS"); else pool+=(--tpu-topology="$TOPOLOGY"); fi
  ! $spot || pool+=(--spot)
  do_it gcloud services enable container.googleapis.com file.googleapis.com
  do_it gcloud container clusters create "$NAME" --zone="$zone" --addons=GcpFilestoreCsiDriver --num-nodes=2
  do_it gcloud container node-pools create pool "${pool[@]}"
  do_it gcloud container clusters get-credentials "$NAME" --zone="$zone"
  do_it kubectl apply --server-side -f "$JOBSET"
  filled launch/gke_claim.yaml
}

image() { # from the commit, not from the folder: that holds runs and .venv
  [[ $IMAGE ]] || refuse "--image is needed"
  local extra=tpu
  ! $gpu || extra=cuda12
  local build=(docker build --file launch/Dockerfile --build-arg "ACCELERATOR=$extra" --tag "$IMAGE" -)
  if $dry; then
    echo "git archive HEAD | $(text_of "${build[@]}")"
  else
    git diff --quiet HEAD || echo "gke.sh: what is not committed stays here" >&2
    git archive HEAD | "${build[@]}"
  fi
  do_it docker push "$IMAGE"
}

apply() {
  [[ $IMAGE && $CLAIM ]] || refuse "--image and --claim are needed"
  (($#)) || refuse "no command, expected: -- train --config=…"
  ARGUMENTS=$(quoted "$@")
  if [[ $preflight ]]; then
    if $dry; then fits "$preflight" "$@" | sed 's/^/# /'; else fits "$preflight" "$@"; fi
  fi
  filled "$template"
}

delete_cluster() {
  [[ $zone ]] || refuse "--zone is needed"
  do_it gcloud container clusters delete "$NAME" --zone="$zone"
}

pods=--selector=jobset.sigs.k8s.io/jobset-name=$NAME
case $verb in
  cluster) cluster ;;
  image) image ;;
  apply) apply "$@" ;;
  status) do_it kubectl get jobset "$NAME" && do_it kubectl get pods "$pods" --output=wide ;;
  logs) do_it kubectl logs "$pods,batch.kubernetes.io/job-completion-index=0" --follow --tail=100 ;; # process 0 alone writes
  delete) do_it kubectl delete jobset "$NAME" ;;
  delete-cluster) delete_cluster ;;
esac
