#!/usr/bin/env bash
# Pretrain, resume, tune or distil on the nodes of a Slurm allocation. From the root of the repository:
#   sbatch --nodes 4 examples/launch/slurm.sh --preset argonne-2.0-2b --data-glob '/data/*.parquet' --output-dir runs/2b
#   sbatch --nodes 4 examples/launch/slurm.sh resume --checkpoint-path runs/2b --total-steps 200000
#   sbatch --nodes 1 examples/launch/slurm.sh finetune --init-from runs/2b --data-glob '/chat/*.jsonl' --epochs 1
#   sbatch --nodes 4 examples/launch/slurm.sh distill --teacher-path runs/2b --data-glob '/data/*.parquet' ...
# --output-dir must be on a file system that all nodes share. The same command again continues the run.
#SBATCH --job-name=argonne
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=TERM@120
# Two minutes before its time is over (the line above), and when it is cancelled, the job finishes its step and saves.
set -euo pipefail

# The driver: that of the first word (resume, finetune, distill), or pretrain where the first word is a flag.
driver=pretrain
if (($#)) && [[ $1 != -* ]]; then
  driver=$1
  shift
fi
if [[ ! -f examples/$driver.py ]]; then
  echo "slurm.sh: there is no examples/$driver.py here; legal: pretrain, resume, finetune, distill" >&2
  exit 2
fi

gpus=${SLURM_GPUS_ON_NODE:-1}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Jobs of the same user may share a node: each has a port of its own.
port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
# --wall-time counts from here, whatever is restarted meanwhile.
ARGONNE_STARTED_AT=$(date +%s)
export ARGONNE_STARTED_AT
# srun does not hand on the cores of the allocation by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}

# Tensor parallelism within a node, data parallelism across nodes, unless your flags say otherwise.
[[ " ${*//_/-} " == *" --tensor-parallel"[\ =]* ]] || set -- --tensor-parallel "$gpus" "$@"
[[ " ${*//_/-} " == *" --data-parallel"[\ =]* ]] || set -- --data-parallel "${#nodes[@]}" "$@"

# One torchrun agent a node; the agents meet on the first.
exec srun --nodes "${#nodes[@]}" --ntasks "${#nodes[@]}" --ntasks-per-node 1 --kill-on-bad-exit=1 \
  "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "${#nodes[@]}" --nproc-per-node "$gpus" --max-restarts "${MAX_RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "${nodes[0]}:$port" \
  "examples/$driver.py" "$@"
