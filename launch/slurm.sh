# shellcheck shell=bash
# What the batch scripts of submit.py do; sourced by them after they set RUN_FOLDER, SRUN and INSIDE.
# shellcheck disable=SC2154
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

prepare() {
    local first end
    ORYX_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
    first=${ORYX_NODES%% *}
    # The address by which Slurm itself reaches the node: names need not resolve.
    MASTER_ADDR=$(scontrol show node "$first" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # below the ports that systems hand out
    cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus / ORYX_RANKS))}
    export ORYX_NODES MASTER_ADDR MASTER_PORT OMP_NUM_THREADS
    end=${SLURM_JOB_END_TIME:-}
    if [[ -z $end ]]; then # before Slurm 22.05
        end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e | sed -n 1p) # one line for each task of an array
        end=$(date --date="$end" +%s) || end=
    fi
    if [[ -n $end ]]; then export ORYX_TIME_LIMIT_AT=$end; fi
    export ORYX_REQUEUE_MARKER=$RUN_FOLDER/requeue
}

# set_step TASKS_PER_NODE ARGUMENTS...: sets `step` to the srun that runs node.sh with these arguments on all nodes.
set_step() {
    local tasks=$1
    shift
    step=(
        srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * tasks))" --ntasks-per-node="$tasks"
        --cpus-per-task="$((cpus / tasks))" # srun does not take it over from sbatch
        --export=ALL
        --kill-on-bad-exit=0 --wait="$ORYX_END_WAIT" # agents do not end at the very same time
        "${SRUN[@]}" "${INSIDE[@]}" bash "$REPOSITORY/launch/node.sh" "$@"
    )
}

# Back into the queue, unless someone cancelled the job: Slurm then no longer calls it running. Of an array, this task.
requeue() {
    local state job=$SLURM_JOB_ID
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    state=$(squeue --noheader --jobs="$job" --format=%T) || state=unknown
    if [[ $state != RUNNING ]]; then
        echo "job $job is $state: not requeued" >&2
        return 1
    fi
    if ((${SLURM_RESTART_COUNT:-0} >= ORYX_REQUEUES)); then
        echo "job $job was requeued $ORYX_REQUEUES times (max_requeues): submit it again to resume" >&2
        return 1
    fi
    echo "requeue job $job" >&2
    scontrol requeue "$job" # ends this script, now or soon
}

# pretrain RUN.yaml [key=value...]: check the nodes, train, go back into the queue when stopped with steps left.
pretrain() {
    local status=0 again=
    stopped=
    prepare
    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_JOB_NODELIST," \
        "$ORYX_RANKS ranks per node, rendezvous $MASTER_ADDR:$MASTER_PORT" >&2
    if ((${#HEALTH[@]})); then
        set_step "$ORYX_RANKS" --single -m oryx_megatron.health "${HEALTH[@]}" "$@"
        run_with_signals "${step[@]}" || status=$?
    fi
    if [[ -n $stopped ]]; then
        again=yes
    elif ((status == 0)); then
        rm -f -- "$RUN_FOLDER/requeue"
        set_step 1 -m oryx_megatron.train "$@"
        run_with_signals "${step[@]}" || status=$?
        # The file is left by a run that stopped with all saved and steps to go (oryx_megatron/train/signals.py). One
        # that was told to stop before it could do so has not failed either: the next start begins where this one did.
        if [[ -e $RUN_FOLDER/requeue ]] || [[ -n $stopped && $status != 0 ]]; then again=yes; fi
    fi
    if [[ -n $again ]]; then
        requeue || true
        exit 75
    fi
    exit "$status"
}

# evaluate ARGUMENTS...: of oryx_megatron.eval
evaluate() {
    prepare
    set_step 1 -m oryx_megatron.eval "$@"
    exec "${step[@]}"
}

# tool NAME ARGUMENTS...: one process of tools/NAME.py
tool() {
    prepare
    set_step 1 --single "$REPOSITORY/tools/$1.py" "${@:2}"
    exec "${step[@]}"
}

# shard N ARGUMENTS...: the task's part of N of preprocess_data. One that fails, but not by an error of the user's, which
# it would make again, goes back into the queue; the others go their way.
shard() {
    local status=0
    prepare
    set_step 1 --single "$REPOSITORY/tools/preprocess_data.py" "${@:2}" --shard "$SLURM_ARRAY_TASK_ID/$1"
    "${step[@]}" || status=$?
    if ((status != 0 && status != 2)); then requeue || true; fi
    exit "$status"
}
