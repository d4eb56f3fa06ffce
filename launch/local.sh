#!/usr/bin/env bash
# Pretrain on this machine; the same command resumes.
#   oryx launch [--ranks N] [--restarts N] RUN.yaml [key=value ...]
# --ranks     processes (default: one per GPU; without GPUs one)
# --restarts  how often torchrun starts all ranks anew after one died (default: 3)
# PYTHON      interpreter (environment; default: .venv/bin/python here, else
#             python3)
# Ends with 75 when it was stopped by Ctrl-C, SIGTERM, SIGUSR1 or a closed
# terminal with a checkpoint: start it again to resume.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=$REPOSITORY/.venv/bin/python
    [[ -x $PYTHON ]] || PYTHON=python3
fi
ranks=
restarts=3
while (($#)); do
    case $1 in
    -h | --help) usage && exit 0 ;;
    --ranks | --restarts)
        [[ ${2:-} =~ ^[0-9]+$ ]] || { echo "error: $1: expected a number, got \`${2:-}\`" >&2 && exit 2; }
        if [[ $1 == --ranks ]]; then ranks=$2; else restarts=$2; fi
        shift 2
        ;;
    *) break ;;
    esac
done
(($#)) || { usage >&2 && exit 2; }
if [[ -z $ranks ]]; then
    ranks=0
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
        ranks=${#devices[@]}
    elif command -v nvidia-smi >/dev/null; then
        ranks=$(nvidia-smi --list-gpus | grep -c '^GPU') || ranks=0
    fi
    ((ranks)) || ranks=1
fi
# A wrong config or layout costs seconds and one line here.
"$PYTHON" -m oryx_megatron.train "$@" --dry-run --config-only --world-size "$ranks"
run_folder=$("$PYTHON" -c 'import sys
from oryx_megatron.config import load_run
sys.stdout.write(load_run(sys.argv[1], sys.argv[2:]).output_dir)' "$@")
rm -f -- "$run_folder/requeue"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
status=0
run_agent "$PYTHON" -m oryx_megatron.agent --nproc-per-node "$ranks" --local-addr 127.0.0.1 \
    --rdzv-backend oryx --rdzv-endpoint 127.0.0.1:0 --rdzv-conf is_host=true --rdzv-id "local-$$" \
    --max-restarts "$restarts" -m oryx_megatron.train "$@" || status=$?
# Left by a run that stopped with all saved and steps to go (oryx_megatron/train/signals.py).
if [[ -e $run_folder/requeue ]]; then
    echo "stopped with a checkpoint: run the same command again to resume" >&2 || true # there may be no terminal any more
    exit 75
fi
exit "$status"
