#!/usr/bin/env bash
# Trains on a Slurm cluster, one rank per GPU. From the root of the repository:
#
#   sbatch slurm/train_webface42m.sh                                   the whole recipe, on 4 nodes of 8 GPUs
#   sbatch slurm/train_webface42m.sh configs/mine.toml --set seed=2    another configuration, single values changed
#   sbatch --nodes=2 --ntasks-per-node=1 --cpus-per-task=2 --gpus-per-node=0 \
#       slurm/train_webface42m.sh configs/demo.toml                    another shape, without GPUs
#
# Options before the script's name are sbatch's and win over the lines below; words after it go to `lgaf train`.
# The ranks find each other by themselves from what srun tells them. Two minutes before the time limit they get
# SIGUSR1, save and leave with exit code 75, upon which the job queues again and goes on from there; so does
# `scancel --signal=USR1 JOB` (whereas a plain `scancel JOB` saves and ends it).
#SBATCH --job-name=lgaf
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --output=logs/%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail

fail() {
  echo "train_webface42m.sh: $*" >&2
  exit 2
}

# Slurm runs a copy of this file, so its own path does not lead to the repository.
root=${SLURM_SUBMIT_DIR:?submit this script with sbatch}
cd "$root"
[[ -f slurm/train_webface42m.sh ]] || fail "expected to be submitted from the repository's root, found $root"

config=configs/lgaf_r100_webface42m.toml
if [[ $# -gt 0 && $1 != -* ]]; then
  config=$1
  shift
fi
[[ -f $config ]] || fail "expected a configuration file, found no $config in $root"

lgaf=$root/.venv/bin/lgaf
[[ -x $lgaf ]] || lgaf=$(command -v lgaf) || fail "expected $root/.venv (make install) or lgaf on the PATH, found neither"

# srun does not take over sbatch's --cpus-per-task. A rank that ends leaves the others half a minute to say which
# one it was, or to leave with the same code: the highest is srun's. A rank dies of a signal that comes before it
# can take it, in its first moments, or after its run, in its last; nothing is lost, and the job queues again.
code=0
saved=75 died_of_usr1=$((128 + 10))
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=30 "$lgaf" train "$config" "$@" || code=$?
if [[ $code -eq $saved || $code -eq $died_of_usr1 ]]; then
  echo "train_webface42m.sh: told to stop; the job queues again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
