#!/bin/bash
# One training run on several machines without a scheduler. Start the same command on every machine:
#
#   bash examples/multi_node.sh HEAD N_NODES RUN.yaml|RECIPE [key=value ...]
#   bash examples/multi_node.sh 10.0.0.1 2 mta-300m data.tokenizer=tokenizers/llama-3.1
#
# HEAD is the name or address of one of them, as the others reach it. Which machine is which is settled when they meet. `out` must
# be on a disk that all share. Started again after a failure, the run continues from its last checkpoint.
#
# PROCESSES: processes per machine; default: one per GPU, or one where there is none.
# PORT: of the meeting point on HEAD; default 29500.

set -eu

if [ $# -lt 3 ]; then
    echo "usage: multi_node.sh HEAD N_NODES RUN.yaml|RECIPE [key=value ...]" >&2
    exit 2
fi
head=$1 nodes=$2
shift 2

if [ -z "${PROCESSES:-}" ]; then
    if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then PROCESSES=gpu; else PROCESSES=1; fi
fi

exec torchrun \
    --nnodes "$nodes" \
    --nproc-per-node "$PROCESSES" \
    --rdzv-id recollect \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head:${PORT:-29500}" \
    -m recollect.cli train "$@"
