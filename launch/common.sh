# shellcheck shell=bash
# What the launch scripts share; sourced.

REPOSITORY=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"

# Signals that ask for a checkpoint and an end. torchrun passes them on to its ranks, starts none of them anew, and waits
# this long for them to finish their step and save. (Environment rather than options, because older versions of torch
# ignore what they do not know; they wait for 30 s.)
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${ORYX_STOP_SECONDS:-600}"

# Run a command to its end, passing on SIGUSR1 and SIGTERM that come meanwhile; returns its status. Sets `stopped` when
# one came.
run_with_signals() {
    "$@" &
    child=$!
    trap 'signalled=1; stopped=yes; kill -USR1 "$child" 2>/dev/null || true' USR1
    trap 'signalled=1; stopped=yes; kill -TERM "$child" 2>/dev/null || true' TERM
    local status=0 again signalled=1
    while ((signalled)); do # a signal ends `wait`, not the command
        signalled=0
        again=0
        wait "$child" || again=$?
        ((again == 127)) || status=$again # 127: it was waited for already
    done
    trap - USR1 TERM
    return "$status"
}
