#!/usr/bin/env bash
# Train on a Slurm cluster, one rank per GPU. Submit from the root of the repository:
#
#   sbatch slurm/train_webface42m.sh                                   the full recipe, on 4 nodes of 8 GPUs
#   sbatch slurm/train_webface42m.sh configs/mine.toml --set seed=2    another configuration, one value changed
#   sbatch --nodes=2 --ntasks-per-node=1 --cpus-per-task=2 --gpus-per-node=0 \
#       slurm/train_webface42m.sh configs/demo.toml                    another number of ranks, without GPUs
#
# Options before the script's name are sbatch's and override the lines below. Arguments after it are those of
# `lgaf train`. The ranks find each other through srun's variables. Two minutes before the time limit they
# receive SIGUSR1, save and exit with code 75; the job is then requeued and resumes from that checkpoint.
# `scancel --signal=USR1 JOB` has the same effect; a plain `scancel JOB` saves and ends the job.
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

# Slurm runs a copy of this file, so the script's own path is not in the repository.
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

# By this secret, which srun passes on, the ranks recognise each other.
LGAF_JOB_SECRET=$(od -An -N16 -tx8 /dev/urandom | tr -d ' ')
export LGAF_JOB_SECRET

# srun does not inherit sbatch's --cpus-per-task. --wait: after one rank exits, the others have 30 s to report
# which rank it was, or to exit with the same code. srun exits with the highest code of all ranks. A signal
# kills a rank that has not installed its handlers yet or has removed them after its run. Nothing is lost then,
# and the job is requeued.
code=0
saved=75 died_of_usr1=$((128 + 10))
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=30 "$lgaf" train "$config" "$@" || code=$?
if [[ $code -eq $saved || $code -eq $died_of_usr1 ]]; then
  echo "train_webface42m.sh: stopped by a signal; the job is requeued"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
