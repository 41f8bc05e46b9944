#!/usr/bin/env bash
# The same training where Slurm hands out the machines: one task a machine, which find each other by Slurm's variables.
#
#     sbatch --nodes=4 launch/slurm.sh --config=configs/enwik8.py --workdir=/shared/run
#
# Partition, account, time and accelerators (--gres=gpu:8, say) are flags of sbatch. The workdir must be a folder that
# all machines share, or gs://; python is the one that is on the PATH where sbatch is called.
#SBATCH --job-name=tvq_pod
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Two minutes before the time is up all tasks get SIGTERM; they save, and the job goes back into the queue.
#SBATCH --signal=TERM@120
set -euo pipefail

# Preempted, Slurm sends SIGTERM to this shell too: it must live to ask for another turn.
trap : TERM

srun --kill-on-bad-exit=0 python -m tvq_pod.main --multihost "$@" &
code=0
while kill -0 $! 2> /dev/null; do wait $! && code=0 || code=$?; done

# srun's exit code is the largest of its tasks'. 75: all saved, run me again.
if [[ $code == 75 ]]; then
  echo "preempted and saved: goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
