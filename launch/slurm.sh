#!/usr/bin/env bash
# The same training where Slurm hands out the machines: tasks find each other by Slurm's variables, one a device.
#
#     sbatch --nodes=4 --ntasks-per-node=8 --gres=gpu:8 launch/slurm.sh --config=configs/enwik8.py --workdir=/shared/run
#
# Partition, account and time are flags of sbatch too. The workdir must be a folder that all machines share, or gs://;
# python is the one that is on the PATH where sbatch is called.
#SBATCH --job-name=tvq_pod
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Two minutes before the time is up all tasks get SIGTERM; they save, and the job goes back into the queue.
#SBATCH --signal=TERM@120
set -euo pipefail

# Preempted, Slurm sends SIGTERM to this shell too: it waits for its tasks all the same.
trap : TERM
code=0
srun --kill-on-bad-exit=0 python -m tvq_pod.main --multihost "$@" || code=$?

# srun's exit code is the largest of its tasks'. 75: all saved, run me again.
if [[ $code == 75 ]]; then
  echo "preempted and saved: goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
