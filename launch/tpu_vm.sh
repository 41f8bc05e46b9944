#!/usr/bin/env bash
# The steps of launch.pod as plain gcloud commands, if you want to see each of them, or to change one.
#
#     NAME=run ZONE=us-west4-a ACCELERATOR=v5litepod-16 bash launch/tpu_vm.sh up
#     NAME=run ZONE=us-west4-a bash launch/tpu_vm.sh run --config=configs/enwik8.py --workdir=gs://BUCKET/run
#     NAME=run ZONE=us-west4-a bash launch/tpu_vm.sh state | logs | stop | down
#
# Each may be repeated. This script restarts nothing by itself, as launch.pod watch does: after a preemption, call down,
# up and run. More variables: RUNTIME_VERSION (default: by the chip's generation), CREATE_FLAGS (like --spot), PROJECT.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! [[ ${NAME:-} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]]; then
  echo "error: NAME=${NAME:-}: is not a valid name; give 1 to 40 of a-z, 0-9 and -" >&2
  exit 1
fi
: "${NAME:?is missing; give a name for the slice and the run}" "${ZONE:?is missing; give a zone, such as us-west4-a}"
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
tpus=(gcloud compute tpus)
all=(--node=all --worker=all "${where[@]}" --quiet)

runtime_version() {
  case $ACCELERATOR in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    tpu7x-*) echo v2-alpha-tpu7-ubuntu2404 ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

queue_state() {
  local said
  if ! said=$("${tpus[@]}" queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' 2>&1); then
    [[ $said == *NOT_FOUND* ]] || { echo "$said" >&2 && return 1; }
    said=MISSING
  fi
  echo "$said"
}

on_all() { "${tpus[@]}" queued-resources ssh "$NAME" "${all[@]}" --command="$1"; }

upload() {
  local stage
  stage=$(mktemp -d)
  mkdir "$stage/tvq_pod"
  cp launch/worker.sh "$stage/tvq_pod"
  git archive --format=tar.gz --prefix=source/ --output="$stage/tvq_pod/$source.tar.gz" HEAD
  [[ $# == 0 ]] || cp "$1" "$stage/tvq_pod/run.sh"
  "${tpus[@]}" queued-resources scp --recurse "$stage/tvq_pod" "$NAME:" "${all[@]}"
  rm -r "$stage"
}

up() {
  local flags state
  if [[ -z ${ALLOW_DIRTY:-} && -n $(git status --porcelain --untracked-files=no) ]]; then
    echo "error: ALLOW_DIRTY=: files differ from the commit that would be installed; commit them, or set ALLOW_DIRTY=1" >&2
    exit 1
  fi
  : "${ACCELERATOR:?is missing; give a type of slice, such as v5litepod-16}"
  read -r -a flags <<< "${CREATE_FLAGS:-}"
  state=$(queue_state)
  case $state in
    SUSPENDED | FAILED)
      "${tpus[@]}" queued-resources delete "$NAME" "${where[@]}" --quiet
      state=MISSING
      ;;
  esac
  if [[ $state == MISSING ]]; then
    "${tpus[@]}" queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
      --runtime-version="${RUNTIME_VERSION:-$(runtime_version)}" "${where[@]}" --quiet "${flags[@]}"
  fi
  until state=$(queue_state) && [[ $state == ACTIVE ]]; do
    echo "$(date +%H:%M:%S) $NAME: $state"
    case $state in SUSPENDED | FAILED | MISSING) exit 1 ;; esac
    sleep "${POLL_SECONDS:-30}"
  done
  upload
  on_all "bash tvq_pod/worker.sh install $source"
}

run() {
  local script workdir=
  for argument in "$@"; do
    [[ $argument != --workdir=* ]] || workdir=${argument#--workdir=}
  done
  [[ $workdir == gs://* ]] || { echo "error: --workdir=$workdir: is not in a bucket; give gs://BUCKET/RUN" >&2 && exit 1; }
  script=$(mktemp)
  {
    echo '#!/bin/bash'
    # shellcheck disable=SC2016 # the machine's home
    echo 'cd "$HOME/tvq_pod/source" || exit 1'
    # shellcheck disable=SC2016
    printf 'exec "$HOME/tvq_pod/venv/bin/python" -m tvq_pod.main --multihost'
    printf ' %q' "$@"
    echo
  } > "$script"
  upload "$script"
  rm "$script"
  on_all "bash tvq_pod/worker.sh start $(date +%s)-1 $(printf %q "$workdir/logs")"
}

state() {
  echo "slice: $(queue_state)"
  on_all 'bash tvq_pod/worker.sh state'
}

logs() {
  "${tpus[@]}" queued-resources ssh "$NAME" --node="${NODE:-0}" --worker="${WORKER:-0}" "${where[@]}" --quiet \
    --command='sudo journalctl --unit=tvq_pod.service --output=cat --lines=50'
}

stop() { on_all 'bash tvq_pod/worker.sh stop'; }

down() { "${tpus[@]}" queued-resources delete "$NAME" "${where[@]}" --quiet --force; }

source=tvq_pod-$(git rev-parse --short=12 HEAD)
command=${1:-}
case $command in
  up | run | state | logs | stop | down) shift && "$command" "$@" ;;
  *) echo "error: ${command:-no command}: is not a command; give one of up, run, state, logs, stop, down" >&2 && exit 1 ;;
esac
