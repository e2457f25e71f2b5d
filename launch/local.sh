#!/usr/bin/env bash
# Trains with several processes on this machine, which act as one.
#
#   launch/local.sh --config=configs/digits.py --workdir=runs/digits
#   PROCESSES=8 launch/local.sh --config=configs/resnet50.py --workdir=runs/r50
#
# The flags are those of python -m dr_jax.main. GPUs (those in
# CUDA_VISIBLE_DEVICES, if it is set) are divided evenly; where there are none,
# the processes share the CPU. The first one prints here, the others to
# WORKDIR.logs/, since the run's own directory must be empty at the start.
# Ctrl-C and SIGTERM reach all. If one fails, the others are ended. The exit
# code is that of the first to fail, 0 if none does. Needs bash 4.
set -euo pipefail

PROCESSES=${PROCESSES:-2}
PATIENCE=${PATIENCE:-60} # Seconds that the others have to end by themselves.

fail() {
  echo "error: $1" >&2
  exit 2
}

[[ $PROCESSES =~ ^[1-9][0-9]*$ ]] ||
  fail "PROCESSES must be a whole number >= 1, got $PROCESSES"

workdir=
for flag; do
  [[ $flag != --workdir=* ]] || workdir=${flag#*=}
done
[[ $workdir ]] || fail "--workdir must be a directory, got none"

gpus=()
if [[ ${JAX_PLATFORMS-} == cpu || ${CUDA_VISIBLE_DEVICES-} == -1 ]]; then
  :
elif [[ ${CUDA_VISIBLE_DEVICES+set} ]]; then
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
elif command -v nvidia-smi >/dev/null; then
  # Without a driver it prints an error, and there is no GPU to divide.
  listed=$(nvidia-smi --query-gpu=index --format=csv,noheader) || listed=
  read -ra gpus <<<"${listed//$'\n'/ }"
fi
gpus_per_process=$((${#gpus[@]} / PROCESSES))
((gpus_per_process * PROCESSES == ${#gpus[@]})) ||
  fail "PROCESSES must divide the number of GPUs, ${#gpus[@]}, got $PROCESSES"

logs=${workdir%/}.logs
mkdir -p "$logs" 2>/dev/null ||
  fail "--workdir=$workdir: $logs cannot be written"
port=$(python -c 'import socket
s = socket.socket()
s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$PROCESSES

running=()
signaled=
forward() {
  signaled=$1
  ((${#running[@]} == 0)) || kill -s "$1" "${running[@]}" 2>/dev/null || true
}
trap 'forward INT' INT
trap 'forward TERM' TERM

# Every process has its own group: the signal that the terminal sends with Ctrl-C
# would otherwise come twice, and the second one stops without saving.
set -m
for ((i = 0; i < PROCESSES; i++)); do
  (
    trap - INT TERM
    export JAX_PROCESS_ID=$i
    if ((gpus_per_process)); then
      mine=("${gpus[@]:i*gpus_per_process:gpus_per_process}")
      CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${mine[*]}")
      # All that are visible: inside a Slurm job, JAX would take one of them.
      JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus_per_process - 1)))
      export CUDA_VISIBLE_DEVICES JAX_LOCAL_DEVICE_IDS
    fi
    ((i == 0)) || exec >>"$logs/$i.txt" 2>&1
    exec python -m dr_jax.main "$@"
  ) &
  running[i]=$!
done
set +m
[[ ! $signaled ]] || forward "$signaled" # It came while they were started.

first=0
deadline=
while ((${#running[@]})); do
  # Ctrl-C ends it, too, and bash would report a killed process in its own way.
  { sleep 0.2 || true; } 2>/dev/null
  for i in "${!running[@]}"; do
    kill -0 "${running[i]}" 2>/dev/null && continue
    code=0
    { wait "${running[i]}"; } 2>/dev/null || code=$?
    unset "running[i]"
    ((code && !first)) || continue
    first=$code
    [[ ! $signaled ]] || continue
    echo "process $i failed with exit code $code; see $logs" >&2
    forward TERM
    deadline=$((SECONDS + PATIENCE))
  done
  if [[ $deadline ]] && ((SECONDS > deadline && ${#running[@]})); then
    # With their decoding processes.
    kill -s KILL -- "${running[@]/#/-}" 2>/dev/null || true
  fi
done
exit "$first"
