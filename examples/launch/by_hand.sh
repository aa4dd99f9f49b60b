#!/usr/bin/env bash
# Start this machine's ranks of a job without torchrun or a scheduler. On each machine, from the repository's root:
#   MASTER_PORT=29500 examples/launch/by_hand.sh FIRST_RANK LOCAL_PROCESSES WORLD_SIZE MASTER_ADDR -- [driver] flags...
# Two machines of 8 GPUs: `by_hand.sh 0 8 16 node1 -- ...` on node1, `by_hand.sh 8 8 16 node1 -- ...` on the other.
# Nothing is started again by itself: the same commands again continue the run.
set -euo pipefail

if (($# < 5)) || [[ $5 != -- ]]; then
  echo "usage: by_hand.sh FIRST_RANK LOCAL_PROCESSES WORLD_SIZE MASTER_ADDR -- [driver] flags..." >&2
  exit 2
fi
first=$1 processes=$2 world=$3
export WORLD_SIZE=$world MASTER_ADDR=$4 MASTER_PORT=${MASTER_PORT:-29500}
shift 5
if ((processes < 1 || first < 0 || first + processes > world || world % processes)); then
  echo "by_hand.sh: ranks $first to $((first + processes - 1)) are no equal share of $world" >&2
  exit 2
fi
# The driver: that of the first word (resume, finetune, distill), or pretrain where the first word is a flag.
driver=pretrain
if (($#)) && [[ $1 != -* ]]; then
  driver=$1
  shift
fi
if [[ ! -f examples/$driver.py ]]; then
  echo "by_hand.sh: there is no examples/$driver.py here; legal: pretrain, resume, finetune, distill" >&2
  exit 2
fi

# Ranks that share a CPU must not each start a thread for every core.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Tensor parallelism within a machine, data parallelism across machines, unless your flags say otherwise.
[[ " ${*//_/-} " == *" --tensor-parallel"[\ =]* ]] || set -- --tensor-parallel "$processes" "$@"
[[ " ${*//_/-} " == *" --data-parallel"[\ =]* ]] || set -- --data-parallel "$((world / processes))" "$@"

ranks=()
finish() { # whatever ends this script ends its ranks, which save first; one that takes half a minute hangs
  kill "${ranks[@]}" 2>/dev/null || true
  for ((tenths = 0; tenths < 300; tenths++)); do
    kill -0 "${ranks[@]}" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL "${ranks[@]}" 2>/dev/null || true
}
export ARGONNE_PARENT=$$ # a rank ends with this script even where that cannot say so
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
for ((local_rank = 0; local_rank < processes; local_rank++)); do
  RANK=$((first + local_rank)) LOCAL_RANK=$local_rank "${PYTHON:-python}" "examples/$driver.py" "$@" &
  ranks+=($!)
done
for _ in "${ranks[@]}"; do
  wait -n # the first rank that fails ends the script, with its status
done
