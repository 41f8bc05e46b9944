#!/usr/bin/env bash
# The script for every machine of a slice. launch.pod copies it there, with the source and the command to run, and calls
#
#     bash worker.sh install SOURCE      makes a virtual environment with the source's packages, in the versions that
#                                        the source's launch/constraints.txt names
#     bash worker.sh start ATTEMPT LOGS  starts the command as a systemd unit that outlives ssh; copies its log to LOGS
#     bash worker.sh stop                asks it to save and end, and waits
#     bash worker.sh state               prints its state
#
# Each may be called again, and twice at once. The last line on stdout is the result, for launch.pod and for people:
#     tvq_pod@NODE/WORKER: installed SOURCE: VERSIONS | running ATTEMPT | exited ATTEMPT CODE | gone ATTEMPT | none | failed WHY
set -Eeuo pipefail

root=$HOME/tvq_pod
unit=tvq_pod.service
logs_unit=tvq_pod_logs.service
mkdir -p "$root"

# Asks the machine's metadata server; Google's own libraries use the same variable.
metadata() {
  curl -sf --max-time 20 --retry 3 -H 'Metadata-Flavor: Google' \
    "http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1"
}

# Prints NODE/WORKER, which is looked up once.
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

# Every failure is reported.
trap 'report "failed ${BASH_COMMAND%% *}, line $LINENO ($(room) free)"; exit 1' ERR
room() { df -h --output=avail "$root" | tail -n 1 | tr -d ' '; }

# step NAME COMMAND: writes the output to a file; if the command fails, its last line is the reason.
step() {
  local why name=$1
  shift
  if ! "$@" > "$root/step.log" 2>&1; then
    why=$(grep -v '^ *$' "$root/step.log" 2> /dev/null | tail -n 1 | cut -c 1-300) || why=
    report "failed $name: ${why:-no reason given} ($(room) of disk free)"
    exit 1
  fi
}

# Python 3.11 first: the versions in launch/constraints.txt are tested with it.
python_of_system() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3; do
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
  else # Ubuntu 22.04 has 3.10, and 24.04 may lack venv: uv installs its own
    # Ubuntu 24.04 lets pip install into a home only with this variable; older pips ignore it.
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv || return
    python3 -m uv venv --quiet --seed --python 3.11 "$1"
  fi
}

unpack() { mkdir -p "$2" && tar -xzf "$1" -C "$2" --strip-components=1; }

versions() { (cd "$root/source" && "$root/venv/bin/python" -m tvq_pod.run.packages > "$root/versions"); }

install() {
  local source=$1 versions
  if [[ $(cat "$root/installed" 2> /dev/null) != "$source" ]]; then
    case $(unit_state) in
      active | *ing)
        report "failed a training is running with $(cat "$root/installed"): stop it first"
        exit 1
        ;;
    esac
    rm -rf "$root/installed" "$root/versions" "$root/venv" "$root/source"
    # shellcheck disable=SC1091 # launch.pod writes it: a proxy or an index for pip
    [[ ! -s $root/install_env ]] || . "$root/install_env"
    step unpacking unpack "$root/$source.tar.gz" "$root/source"
    step "virtual environment" new_environment "$root/venv"
    step "pip install" "$root/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint "$root/source/launch/constraints.txt" "$root/source[tpu,gcs,data,wandb]"
    step "package versions" versions
    echo "$source" > "$root/installed.writing"
    mv "$root/installed.writing" "$root/installed"
  fi
  versions=$(cat "$root/versions" 2> /dev/null) || versions=
  report "installed $source${versions:+: $versions}"
}

# KillMode: only the training itself gets SIGTERM, and saves. It is not enabled: after a reboot, launch.pod decides.
write_units() {
  cat > "$root/$unit" << EOF
[Unit]
Description=tvq_pod training
# Units stop in reverse order when the machine shuts down, so the last lines are copied, too.
After=network-online.target $logs_unit

[Service]
User=$(id -un)
# jax recommends this: it makes starting and ending faster on v5e and newer.
ExecStartPre=-+/bin/sh -c "echo always > /sys/kernel/mm/transparent_hugepage/enabled"
ExecStart=/bin/bash $root/run.sh
ExecStopPost=/bin/bash $root/worker.sh ended $1
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
After=network-online.target

[Service]
User=$(id -un)
ExecStart=/bin/bash $root/worker.sh ship
Restart=no
EOF
}

unit_state() { systemctl show -p ActiveState $unit | cut -d = -f 2; }

start() {
  local attempt=$1 logs=$2
  if [[ ! -s $root/installed ]]; then
    report "failed nothing is installed"
    exit 1
  fi
  case $(unit_state)/$(cat "$root/attempt" 2> /dev/null || true) in
    active/"$attempt" | activating/"$attempt") ;; # another call was first
    active/* | *ing/*)
      report "failed an earlier attempt has not ended: $(cat "$root/attempt")"
      exit 1
      ;;
    *)
      if ! has_ended "$attempt"; then
        write_units "$attempt"
        step "systemctl link" sudo systemctl link "$root/$unit" "$root/$logs_unit"
        step "systemctl daemon-reload" sudo systemctl daemon-reload
        sudo systemctl reset-failed $unit 2> /dev/null || true
        sudo rm -f /tmp/libtpu_lockfile # left by a killed process: nothing is running here now
        date +%s > "$root/began"
        echo "$logs" > "$root/logs"
        echo "$attempt" > "$root/attempt.writing"
        mv "$root/attempt.writing" "$root/attempt"
        step "systemctl start" sudo systemctl start $unit
        sudo systemctl restart $logs_unit || true
      fi
      ;;
  esac
  state
}

has_ended() { [[ $(cat "$root/ended" 2> /dev/null) == "$1 "* ]]; }

# Called by systemd when the training has ended; EXIT_STATUS is its exit code, or the signal that ended it.
ended() {
  echo "$1 ${EXIT_STATUS:-unknown}" > "$root/ended.writing"
  mv "$root/ended.writing" "$root/ended"
}

state() {
  local attempt now
  attempt=$(cat "$root/attempt" 2> /dev/null) || attempt=
  now=$(unit_state) # first: a unit that is no longer active has recorded how it ended
  if [[ -z $attempt ]]; then
    report none
  elif has_ended "$attempt"; then
    report "exited $attempt $(cut -d ' ' -f 2 "$root/ended")"
  elif [[ $now == active || $now == *ing ]]; then
    report "running $attempt"
  else # the machine was restarted
    report "gone $attempt"
  fi
}

stop() {
  [[ ! -s $root/attempt ]] || step "systemctl stop" sudo systemctl stop $unit
  state
}

copy_log() {
  local to
  to=$(cat "$root/logs")/$(me | tr / -).attempt-$(cat "$root/attempt").log
  # shellcheck disable=SC2024 # the file is the user's own
  sudo journalctl --quiet --no-pager --output=cat --unit=$unit --since="@$(cat "$root/began")" > "$root/log"
  # Uses the training's own packages: gcloud as a snap does not start while the machine is shutting down.
  (cd "$root/source" && "$root/venv/bin/python" -m launch.upload "$root/log" "$to")
}

# Copies once a minute, and once more when the training has ended or the machine shuts down.
ship() {
  local began
  trap 'copy_log; exit 0' TERM
  while [[ $(state) == *": running "* ]]; do
    began=$SECONDS
    copy_log || echo "the log could not be copied" >&2
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
