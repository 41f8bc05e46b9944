#!/usr/bin/env bash
# What runs on every machine of a slice. launch.pod copies it there, with the source and the command to run, and calls
#
#     bash worker.sh install SOURCE      a virtual environment with the source's packages
#     bash worker.sh start ATTEMPT LOGS  the command, as a systemd unit that outlives ssh; its log goes to LOGS too
#     bash worker.sh stop                asks it to save and end, and waits
#     bash worker.sh state               what became of it
#
# Each may be called again, and by two at once. The last line on stdout says how it went, for launch.pod and for people:
#     tvq_pod@NODE/WORKER: installed SOURCE | running ATTEMPT | exited ATTEMPT CODE | gone ATTEMPT | none | failed WHY
set -euo pipefail

root=$HOME/tvq_pod
unit=tvq_pod.service
logs_unit=tvq_pod_logs.service
mkdir -p "$root"

# The metadata server of the machine; the variable is that of Google's own libraries.
metadata() {
  curl -sf --max-time 20 --retry 3 -H 'Metadata-Flavor: Google' \
    "http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1"
}

# NODE/WORKER, asked once.
me() {
  local node worker
  if [[ -s $root/me ]]; then
    cat "$root/me"
    return
  fi
  node=$(metadata tpu-env | sed -n "s/^NODE_ID: *'\(.*\)' *$/\1/p") || node=
  worker=$(metadata agent-worker-number) || worker=
  echo "${node:-unknown}/${worker:-unknown}"
  if [[ -n $node && -n $worker ]]; then
    { echo "$node/$worker" > "$root/me.$$" && mv "$root/me.$$" "$root/me"; } 2> /dev/null || true
  fi
}

report() { echo "tvq_pod@$(me): $*"; }

# step NAME COMMAND: what it says goes to a file; if it fails, its last line is the reason.
step() {
  local why name=$1
  shift
  if ! "$@" > "$root/step.log" 2>&1; then
    why=$(grep -v '^ *$' "$root/step.log" 2> /dev/null | tail -n 1 | cut -c 1-300) || why=
    report "failed $name: ${why:-no reason given} ($(df -h --output=avail "$root" | tail -n 1 | tr -d ' ') of disk free)"
    exit 1
  fi
}

python_of_system() {
  local candidate
  for candidate in python3.13 python3.12 python3.11 python3; do
    if command -v "$candidate" > /dev/null && "$candidate" -c '
import sys, venv, ensurepip
sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      echo "$candidate"
      return
    fi
  done
}

new_environment() {
  local python
  python=$(python_of_system)
  if [[ -n $python ]]; then
    "$python" -m venv "$1"
  else # Ubuntu 22.04 has 3.10: uv brings a newer one
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python 3.12 "$1"
  fi
}

unpack() { mkdir -p "$2" && tar -xzf "$1" -C "$2" --strip-components=1; }

install() {
  local source=$1
  if [[ $(cat "$root/installed" 2> /dev/null) != "$source" ]]; then
    rm -rf "$root/installed" "$root/venv" "$root/source"
    step unpacking unpack "$root/$source.tar.gz" "$root/source"
    step "virtual environment" new_environment "$root/venv"
    step "pip install" "$root/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$root/source[tpu,gcs]"
    echo "$source" > "$root/installed.writing"
    mv "$root/installed.writing" "$root/installed"
  fi
  report "installed $source"
}

# KillMode: only the training itself gets SIGTERM, and saves. It is not enabled: after a reboot, launch.pod decides.
write_units() {
  cat > "$root/$unit" << EOF
[Unit]
Description=tvq_pod training
After=network-online.target

[Service]
User=$(id -un)
# jax asks for it: starting and ending is faster on v5e and newer.
ExecStartPre=-+/bin/sh -c "echo always > /sys/kernel/mm/transparent_hugepage/enabled"
ExecStart=/bin/bash $root/run.sh
ExecStopPost=/bin/bash $root/worker.sh ended
KillMode=mixed
TimeoutStopSec=180
Restart=no
LimitMEMLOCK=infinity
LimitNOFILE=1048576
TasksMax=infinity
EOF
  cat > "$root/$logs_unit" << EOF
[Unit]
Description=copies the log of tvq_pod

[Service]
User=$(id -un)
ExecStart=/bin/bash $root/worker.sh ship
Restart=no
EOF
}

start() {
  local attempt=$1 logs=$2
  if [[ $(cat "$root/attempt" 2> /dev/null) != "$attempt" ]]; then # else another call was first
    if systemctl is-active --quiet $unit; then
      report "failed an earlier attempt is running: $(cat "$root/attempt")"
      exit 1
    fi
    write_units
    step "systemctl link" sudo systemctl link "$root/$unit" "$root/$logs_unit"
    step "systemctl daemon-reload" sudo systemctl daemon-reload
    sudo systemctl reset-failed $unit 2> /dev/null || true
    date +%s > "$root/began"
    echo "$logs" > "$root/logs"
    echo "$attempt" > "$root/attempt.writing"
    mv "$root/attempt.writing" "$root/attempt"
    step "systemctl start" sudo systemctl start $unit
    sudo systemctl restart $logs_unit || true
  fi
  state
}

# Called by systemd when the training has ended; EXIT_STATUS is its exit code, or the signal that ended it.
ended() {
  echo "$(cat "$root/attempt") ${EXIT_STATUS:-unknown}" > "$root/ended.writing"
  mv "$root/ended.writing" "$root/ended"
}

state() {
  local attempt last
  attempt=$(cat "$root/attempt" 2> /dev/null) || attempt=
  last=$(cat "$root/ended" 2> /dev/null) || last=
  if [[ -z $attempt ]]; then
    report none
  elif [[ ${last% *} == "$attempt" ]]; then
    report "exited $attempt ${last##* }"
  elif systemctl is-active --quiet $unit || systemctl show -p ActiveState $unit | grep -q 'ing$'; then
    report "running $attempt"
  elif [[ $(cat "$root/ended" 2> /dev/null) == "$attempt "* ]]; then # it ended just now
    state
  else # the machine was started anew
    report "gone $attempt"
  fi
}

stop() {
  step "systemctl stop" sudo systemctl stop $unit
  state
}

copy_log() {
  local to
  to=$(cat "$root/logs")/$(me | tr / -).attempt-$(cat "$root/attempt").log
  # shellcheck disable=SC2024 # the file is the user's own
  sudo journalctl --quiet --no-pager --output=cat --unit=$unit --since="@$(cat "$root/began")" > "$root/log"
  case $to in
    gs://*) gcloud storage cp --quiet "$root/log" "$to" ;;
    *) mkdir -p "${to%/*}" && cp "$root/log" "$to" ;;
  esac
}

# Once a minute, and once more when the training has ended.
ship() {
  local began
  while [[ $(state) == *": running "* ]]; do
    began=$SECONDS
    copy_log || true
    while [[ $(state) == *": running "* ]] && ((SECONDS < began + 60)); do sleep 2; done
  done
  copy_log
}

command=$1
shift
case $command in
  install | start | stop)
    exec 9> "$root/lock"
    flock 9
    "$command" "$@"
    ;;
  *) "$command" "$@" ;;
esac
