#!/usr/bin/env bash
# One run over several machines, by torchrun alone. Start it on each of them, from the folder of the project, with the
# same words; a file system that all share holds data and --out.
#
#   HEAD=host0 NODES=4 train/recipes/multinode.sh --config train/recipes/openflamingo_9b.yaml --out runs/9b
#   train/recipes/multinode.sh --save-and-stop          # on any of them: all save, and end
#
# HEAD      one of the machines, which the others reach by this name; there all meet (default: localhost)
# NODES     number of machines (default: 1)
# GPUS      processes a machine (default: one for each of its GPUs)
# PORT      on HEAD (default: 29500)
# RUN       name of the run among those of a machine (default: flamingo)
# RESTARTS  how often processes that failed are started again, from the last checkpoint (default: 3)
# MODULE    what runs: train.pretrain (default) or train.tune
# PYTHON    default: python
set -euo pipefail

RUN=${RUN:-flamingo}

if [[ ${1:-} == --save-and-stop ]]; then
  # torchrun would die of SIGUSR1: only the processes that it started get it. They tell those of other machines.
  if ! torchrun=$(pgrep --delimiter , --full -- "--rdzv-id=$RUN( |\$)"); then
    echo "no run named $RUN on this machine" >&2
    exit 1
  fi
  exec pkill -USR1 --parent "$torchrun"
fi

# A store that outlives restarts holds the addresses of the dead (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes="${NODES:-1}" \
  --nproc-per-node="${GPUS:-gpu}" \
  --rdzv-backend=c10d \
  --rdzv-endpoint="${HEAD:-localhost}:${PORT:-29500}" \
  --rdzv-id="$RUN" \
  --max-restarts="${RESTARTS:-3}" \
  -m "${MODULE:-train.pretrain}" "$@"
