#!/usr/bin/env bash
# Trains on a Slurm cluster, one process per GPU.
#
#   sbatch launch/slurm.sh --config=configs/resnet50.py --workdir=runs/resnet50
#
# The flags are those of python -m dr_jax.main. Submit it where the command
# works, in this directory and with the environment activated: Slurm hands both
# on. All nodes must see the same --workdir and data.
#
# To edit, here or as options of sbatch: nodes, GPUs per node (twice: a process
# each, which is what JAX expects of Slurm), cores for each, time.
#
#SBATCH --job-name=dr_jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#
# Five minutes before the time is up the processes are asked to save and stop.
# Without "B:" the signal goes to them and not to this script.
#SBATCH --signal=TERM@300
# The job starts again after preemption or the loss of a node, and resumes from
# the last checkpoint; its log grows.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.txt
set -uo pipefail

# srun does not take --cpus-per-task over from sbatch. Every process sees all
# GPUs of its node and takes the one with its number.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --gpu-bind=none \
  python -m dr_jax.main --distributed --preempted_exit_code=143 "$@"
code=$?

# --requeue does not cover the time limit: then exit code 143 asks for a restart.
# A cancelled job is no longer RUNNING, and stays cancelled.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [[ $code == 143 && $state == RUNNING ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
