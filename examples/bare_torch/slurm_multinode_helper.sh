#!/bin/bash
# What a script on bare torch.distributed needs and srun does not set. Each task runs its command through it:
#     srun slurm_multinode_helper.sh python helloworld.py
# idist finds all of this by itself, and does without what cannot be right here:
# - the port follows from the job id, so two jobs, or two steps of one job, may meet at one and never notice;
# - the first host of the list need not have rank 0 (srun --relative, --distribution=arbitrary);
# - scontrol may be missing on a compute node.
set -euo pipefail

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS
MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((15000 + SLURM_JOB_ID % 10000))

exec "$@"
