#!/usr/bin/env bash
# Trains on Google Kubernetes Engine by way of xpk, on TPUs or on GPUs.
#
#   launch/xpk.sh tpu --config=configs/resnet50.py \
#       --workdir=/shared/runs/resnet50 --config.data.path=/shared/tfds
#   launch/xpk.sh gpu --config=configs/resnet50.py \
#       --workdir=/shared/runs/resnet50 --config.data.path=/shared/tfds
#
# The flags are those of python -m dr_jax.main. DRY_RUN=yes shows what xpk would
# do. Written for xpk 1.16.
set -euo pipefail

# To edit, here or in the environment. An image with JAX for the device, this
# repository as its working directory and installed.
IMAGE=${IMAGE:-dr-jax:latest}
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-east5-a}
CLUSTER=${CLUSTER:-my-cluster}
WORKLOAD=${WORKLOAD:-dr-jax}
# A storage that `xpk storage create` or `attach` (Filestore, Lustre, gcsfuse)
# mounts at /shared in every pod: for the run, the data and compiled programs.
STORAGE=${STORAGE:-shared}
TPU_TYPE=${TPU_TYPE:-v5litepod-16}
SLICES=${SLICES:-1}
GPU_TYPE=${GPU_TYPE:-h100-80gb-8}
NODES=${NODES:-2}

fail() {
  echo "error: $1" >&2
  exit 2
}

device=${1-}
shift || true
case $device in
  tpu)
    where=(--tpu-type="$TPU_TYPE" --num-slices="$SLICES")
    # JAX finds the other processes through GKE.
    command="exec python -m dr_jax.main --distributed"
    ;;
  gpu)
    where=(--device-type="$GPU_TYPE" --num-nodes="$NODES")
    # xpk sets what is on the right, in the pod, which is where it is expanded.
    address="\$JAX_COORDINATOR_ADDRESS:\$JAX_COORDINATOR_PORT"
    command="exec env JAX_COORDINATOR_ADDRESS=$address"
    command+=" JAX_NUM_PROCESSES=\$NNODES JAX_PROCESS_ID=\$NODE_RANK"
    command+=" python -m dr_jax.main"
    ;;
  *) fail "device must be tpu or gpu, got '$device'" ;;
esac

# `exec`, so that SIGTERM reaches python. xpk pastes the command into YAML and
# into a shell: on one line, with single quotes only.
command+=" --preempted_exit_code=143"
for flag; do
  [[ $flag != *[\"\'\\]* ]] ||
    fail "flags must have no quote and no backslash, as xpk cannot pass them \
on, got $flag"
  command+=" '$flag'"
done

# xpk restarts what ended with 127 to 255, so also a preempted process (143).
# Exit code 3 is that of processes that lost another one.
xpk workload create \
  --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" \
  --workload="$WORKLOAD" --docker-image="$IMAGE" --storage="$STORAGE" \
  "${where[@]}" --env=XDG_CACHE_HOME=/shared/cache \
  --max-restarts=10 --restart-on-exit-codes=3 \
  --termination-grace-period-seconds=300 \
  ${DRY_RUN:+--dry-run --skip-validation} \
  --command="$command"
