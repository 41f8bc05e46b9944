#!/usr/bin/env bash
# The same training on a Slurm cluster: tasks, one per device, find each other by Slurm's variables.
#
#     sbatch --nodes=4 --ntasks-per-node=8 --gres=gpu:8 launch/slurm.sh --config=configs/enwik8.py --workdir=/shared/run
#
# Partition, account and time are flags of sbatch, too. The workdir must be a folder that all machines share, or gs://;
# python is the one on the PATH where sbatch is called. `scancel --signal=USR1 JOB` saves a checkpoint immediately.
#SBATCH --job-name=tvq_pod
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Ten minutes before the time limit, this shell (B:) gets SIGUSR1.
#SBATCH --signal=B:USR1@600
set -euo pipefail

# Seconds before the time limit: at `early`, as above, the training saves and continues, so that a checkpoint exists
# even if the last save takes too long; at `late`, it saves and ends.
early=600 late=120
srun='' timer=''

# srun passes SIGUSR1 on to its tasks, but kills them if it gets SIGTERM itself. scancel sends SIGTERM to tasks only.
# shellcheck disable=SC2329 # the trap calls it
near_the_limit() {
  local started=${srun:-${!:-}}
  [[ -z $started ]] || kill -USR1 "$started" || true
  if [[ -z $timer ]]; then
    {
      trap 'kill $!' TERM # ends the sleep if it is no longer needed
      sleep $((early - late)) &
      wait $! && scancel --signal=TERM "$SLURM_JOB_ID"
    } &
    timer=$!
  fi
}
trap near_the_limit USR1
# When Slurm preempts the job, its tasks get SIGTERM, and this shell may get it, too: it waits for them anyway.
trap : TERM

srun --kill-on-bad-exit=0 python -m tvq_pod.main --multihost "$@" &
srun=$!
while :; do
  code=0
  wait "$srun" || code=$?
  kill -0 "$srun" 2> /dev/null || break # if srun is still running, a signal ended `wait`
done
if ((code > 128)); then # perhaps from a signal that came as srun ended
  code=0
  wait "$srun" || code=$?
fi
[[ -z $timer ]] || kill "$timer" 2> /dev/null || true

# srun's exit code is the largest one of its tasks. 75: all saved, run me again.
if [[ $code == 75 ]]; then
  echo "preempted and saved: the job is requeued"
  scontrol requeue "$SLURM_JOB_ID" || echo "error: SLURM_JOB_ID=$SLURM_JOB_ID: scontrol could not requeue it; submit it again" >&2
fi
exit "$code"
