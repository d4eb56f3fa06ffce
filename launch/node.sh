#!/usr/bin/env bash
# What srun starts on every node of a job (and inside the container, where there is one): one torchrun agent for the
# node's ranks, or with --single one plain process per task.
#   node.sh [--single] PYTHON_OPTIONS...        e.g. node.sh -m oryx_megatron.train RUN.yaml
# Environment, set by the batch script: ORYX_PYTHON, ORYX_RANKS (per node), ORYX_RESTARTS, ORYX_NUMA, MASTER_ADDR and
# MASTER_PORT (rendezvous); ORYX_HEARTBEAT (seconds) where nvidia-resiliency-ext is to start the ranks.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

if [[ $1 == --single ]]; then
    shift
    exec "$ORYX_PYTHON" "$@"
fi

agent=(
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$ORYX_RANKS" --max-restarts="$ORYX_RESTARTS"
    --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"
)
# Said outright rather than guessed from host names, which differ between Slurm, DNS and the machine itself.
if [[ $SLURM_NODEID == 0 ]]; then
    agent+=(--rdzv-conf=is_host=true --local-addr="$MASTER_ADDR")
else
    # Our address on the way to the first node; a datagram socket sends nothing when it connects.
    address=$("$ORYX_PYTHON" -c 'import socket, sys
family, kind, _, _, place = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), type=socket.SOCK_DGRAM)[0]
with socket.socket(family, kind) as probe:
    probe.connect(place)
    print(probe.getsockname()[0])' "$MASTER_ADDR" "$MASTER_PORT")
    agent+=(--rdzv-conf=is_host=false --local-addr="$address")
fi
if [[ -n ${ORYX_HEARTBEAT:-} ]]; then
    program=nvidia_resiliency_ext.fault_tolerance.launcher
    agent+=(
        --rdzv-backend=c10d --ft-rank-heartbeat-timeout="$ORYX_HEARTBEAT"
        --ft-initial-rank-heartbeat-timeout="$((10 * ORYX_HEARTBEAT))"
    )
else
    program=oryx_megatron.agent
    agent+=(--rdzv-backend=oryx)
fi
if [[ $ORYX_NUMA != none && -z ${ORYX_HEARTBEAT:-} ]]; then # its launcher does not know how
    if command -v numactl >/dev/null; then
        agent+=(--numa-binding="$ORYX_NUMA")
    else
        echo "${SLURMD_NODENAME:-$(hostname)}: numactl is missing: ranks are not bound to the CPUs near their GPUs" >&2
    fi
fi
status=0
run_agent "$ORYX_PYTHON" -m "$program" "${agent[@]}" "$@" || status=$?
exit "$status"
