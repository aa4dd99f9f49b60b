#!/usr/bin/env bash
# Pretrain, resume, tune or distil on the nodes of a PBS Pro allocation. From the root of the repository:
#   qsub -N argonne -j oe -l select=4:ncpus=64:ngpus=8:mpiprocs=1 -- \
#     "$PWD/examples/launch/pbs.sh" --preset argonne-2.0-2b --data-glob '/data/*.parquet' --output-dir runs/2b
# The first word after the script may be another driver: resume --checkpoint-path runs/2b, finetune --init-from runs/2b
# --data-glob '/chat/*.jsonl' --epochs 1, or distill --teacher-path runs/2b --data-glob '/data/*.parquet' ...
# qdel gives a job as long as the server's kill_delay to finish its step and save; --wall-time SECONDS needs no haste.
# --output-dir must be on a file system that all nodes share. The same command again continues the run.
set -euo pipefail
cd "${PBS_O_WORKDIR:-.}"

# The driver: that of the first word (resume, finetune, distill), or pretrain where the first word is a flag.
driver=pretrain
if (($#)) && [[ $1 != -* ]]; then
  driver=$1
  shift
fi
if [[ ! -f examples/$driver.py ]]; then
  echo "pbs.sh: there is no examples/$driver.py here; legal: pretrain, resume, finetune, distill" >&2
  exit 2
fi

# The node file may name a node several times, once for each of its MPI processes.
mapfile -t nodes < <(awk '!seen[$0]++' "$PBS_NODEFILE")
gpus=${GPUS_PER_NODE:-$(nvidia-smi --list-gpus | wc -l)}
# Job ids look like 1234.server or 1234[5].server; jobs of the same user may share a node.
number=${PBS_JOBID%%[!0-9]*}
port=${MASTER_PORT:-$((20000 + number % 10000))}
# --wall-time counts from here, whatever is restarted meanwhile.
ARGONNE_STARTED_AT=$(date +%s)
export ARGONNE_STARTED_AT

# Tensor parallelism within a node, data parallelism across nodes, unless your flags say otherwise.
[[ " ${*//_/-} " == *" --tensor-parallel"[\ =]* ]] || set -- --tensor-parallel "$gpus" "$@"
[[ " ${*//_/-} " == *" --data-parallel"[\ =]* ]] || set -- --data-parallel "${#nodes[@]}" "$@"

# One torchrun agent a node; the agents meet on the first.
# MPICH and PALS take --ppn; for Open MPI say MPIEXEC='mpiexec --npernode 1 -x PATH -x ARGONNE_STARTED_AT'.
read -ra launcher <<<"${MPIEXEC:-mpiexec --ppn 1}"
exec "${launcher[@]}" -n "${#nodes[@]}" \
  "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "${#nodes[@]}" --nproc-per-node "$gpus" --max-restarts "${MAX_RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-id "$PBS_JOBID" --rdzv-endpoint "${nodes[0]}:$port" \
  "examples/$driver.py" "$@"
