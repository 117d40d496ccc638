#!/bin/bash
# Trains on the GPUs of one or more SLURM nodes, one process a GPU. Arguments are those of train.py:
#
#     sbatch launch/slurm.sh --config CONFIG --workdir DIR
#     sbatch --nodes=2 launch/slurm.sh --config CONFIG --workdir DIR
#
# To be submitted from the root of the repository; DIR is on a file system that all nodes share. Two
# minutes before its time is up the job saves and asks to be queued again. See docs/gpu.md.
#SBATCH --job-name=adacm2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=adacm2-%j.log
set -euo pipefail

# XLA takes this share of a GPU's memory; it is what the planner compares with.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.95}
# Compiled programs are kept for the next start.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}

# JAX gives task i of a node its GPU i, so every task must see all of them.
status=0
# srun does not take the job's --cpus-per-task by itself (Slurm 22.05 and later).
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-12}" --kill-on-bad-exit=0 --gpu-bind=none --label \
  "${PYTHON:-.venv/bin/python}" train.py --distributed "$@" || status=$?

if [ "$status" = 143 ]; then # stopped by SIGTERM, and saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
