#!/bin/bash
# One clip on 4 nodes of 8 GPUs: sbatch experiments/slurm.sh --model wan --checkpoint /data/Wan2.1-T2V-14B-Diffusers
#SBATCH --job-name=meshdiff
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=01:00:00
set -euo pipefail

# The first node is where the ranks meet. One torchrun a node starts that node's 8 ranks.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Neighbouring ranks share a sequence, so 8 of them stay inside a node; guidance, and the requests of a list, cross nodes.
srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    experiments/run.py --cp 8 "$@"
