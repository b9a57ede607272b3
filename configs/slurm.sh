#!/usr/bin/env bash
# Train on a SLURM cluster; a run may take several jobs:
#
#     sbatch configs/slurm.sh --recipe imagenet-resnet50 --data_dir DATA --num_nodes 2 --results_path runs/imagenet
#
# Two minutes before the time limit SLURM sends SIGUSR1 to the processes. They finish the step, save and exit with
# $STOPPED; the script then queues the job again, which resumes from the checkpoint.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

STOPPED=85
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500

# srun starts the processes without Accelerate's launcher, which would neither forward the signal nor return their exit
# code. exec makes Python the process that gets the signal.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec python launch.py "$@"
' process "$@" --resume auto --stop_exit_code "$STOPPED"
code=$?

if [ "$code" -eq "$STOPPED" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
