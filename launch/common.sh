# shellcheck shell=bash
# What the launch scripts share; sourced.

REPOSITORY=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -d $REPOSITORY/oryx_megatron ]]; then # else the package that holds this folder is installed
    export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
fi

# wait_for PID: wait to its end, through signals that are trapped; returns its status.
wait_for() {
    local status=0 again
    while kill -0 "$1" 2>/dev/null; do
        wait "$1" && status=0 || status=$?
    done
    wait "$1" 2>/dev/null && again=0 || again=$?
    ((again == 127)) || status=$again # 127: it was waited for already
    return "$status"
}

# run_with_signals COMMAND...: run it to its end, passing on SIGUSR1, SIGTERM and SIGHUP as SIGUSR1; returns its
# status. Sets `stopped` when one came.
run_with_signals() {
    local status=0
    "$@" &
    child=$!
    trap 'stopped=yes; kill -USR1 "$child" 2>/dev/null || true' USR1 TERM HUP
    wait_for "$child" || status=$?
    trap - USR1 TERM HUP
    return "$status"
}

# run_agent COMMAND...: run torchrun to its end. SIGUSR1, SIGTERM, SIGINT and SIGHUP (a closed terminal; not under nohup)
# ask its ranks for a checkpoint and an end, and leave the agent alone: of these signals it would give the ranks 30 s and
# kill them. A second SIGINT ends all.
run_agent() {
    local status=0
    export PET_SIGNALS_TO_HANDLE=SIGQUIT
    stopped=
    (
        trap '' USR1 TERM INT HUP # what starts ignoring a signal keeps ignoring it, unless it asks for it as ranks do
        exec "$@"
    ) &
    child=$!
    trap 'stopped=yes; stop_ranks "$child"' USR1 TERM HUP
    trap '[[ -z $stopped ]] || abandon "$child"; stopped=yes; stop_ranks "$child"' INT
    while kill -0 "$child" 2>/dev/null && [[ -z $stopped ]]; do
        wait "$child" || true
    done
    while kill -0 "$child" 2>/dev/null; do # again and again, for ranks that had not started far enough to listen
        stop_ranks "$child"
        sleep 1 || true
    done
    wait_for "$child" || status=$?
    trap - USR1 TERM INT HUP
    return "$status"
}

# ranks_of AGENT: its child processes.
ranks_of() {
    cat "/proc/$1/task"/*/children 2>/dev/null || true
}

# stop_ranks AGENT: ask for a checkpoint and an end.
stop_ranks() {
    local rank
    for rank in $(ranks_of "$1"); do kill -USR1 "$rank" 2>/dev/null || true; done
}

# abandon AGENT: end it and its ranks at once; it first, so that it restarts none.
abandon() {
    local process
    for process in "$1" $(ranks_of "$1"); do kill -KILL "$process" 2>/dev/null || true; done
}
