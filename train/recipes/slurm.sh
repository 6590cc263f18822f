#!/usr/bin/env bash
# One run as a Slurm job, which saves two minutes before its time is up and goes on in the next one. From the folder of
# the project, with its environment active:
#
#   sbatch --nodes 8 train/recipes/slurm.sh train/recipes/openflamingo_9b.yaml runs/9b [--steps 1000 …]
#
# Options of sbatch before the script override those below; GPUS, RESTARTS, MODULE and PYTHON are multinode.sh's.
#SBATCH --job-name=flamingo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

if (($# < 2)); then
  echo "usage: sbatch [options of sbatch] train/recipes/slurm.sh RECIPE OUT [--field VALUE …]" >&2
  exit 2
fi
recipe=$1 out=$2
shift 2
cd "$SLURM_SUBMIT_DIR" # Slurm runs a copy of this file from elsewhere
node=train/recipes/multinode.sh

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export HEAD=${hosts[0]} NODES=${#hosts[@]} RUN=flamingo-$SLURM_JOB_ID PORT=$((20000 + SLURM_JOB_ID % 10000))
export GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-gpu}}

# `B:` above: only this shell gets the signal, since srun would hand it to torchrun too, which dies of it.
signalled=0
trap 'signalled=1; bash "$node" --save-and-stop || true' USR1

preempted=$out/checkpoints/PREEMPTED
rm -f "$preempted"
srun --kill-on-bad-exit=1 bash "$node" --config "$recipe" --out "$out" "$@" &
run=$!
while :; do
  signalled=0 code=0
  wait "$run" || code=$?
  ((signalled)) || break # a signal ends `wait` before the run
done

if [[ -e $preempted ]]; then # torchrun's exit code does not tell
  echo "saved at step $(<"$preempted"); job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
