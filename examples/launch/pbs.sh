#!/usr/bin/env bash
# Pretrain on the nodes of a PBS Pro allocation. From the root of the repository:
#   qsub -N argonne -j oe -l select=4:ncpus=64:ngpus=8:mpiprocs=1 -- \
#     "$PWD/examples/launch/pbs.sh" --preset argonne-2.0-2b --data-glob '/data/*.parquet' --output-dir runs/2b
# qdel gives a job as long as the server's kill_delay to finish its step and save; --wall-time SECONDS needs no haste.
# --output-dir must be on a file system that all nodes share. The same command again continues the run.
set -euo pipefail
cd "${PBS_O_WORKDIR:-.}"

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
  examples/pretrain.py "$@"
