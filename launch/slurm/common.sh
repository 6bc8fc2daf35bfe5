# shellcheck shell=bash
# What the batch scripts share; they source it from the top of the checkout, where they were submitted.
#
#   FW_CONFIG      the YAML file, instead of the script's own
#   FW_CONTAINER   an image for Pyxis/Enroot (registry#name:tag, or a .sqsh file that all nodes see); empty: the plain venv
#   FW_MOUNTS      what the container sees beside the checkout, as /data,/models:/models
#   FW_VENV        without a container: the venv that all nodes see (default .venv)
#
# Why a job ends is read from the run's status.json, never from an exit code alone: a run that was told to stop ends with 0.

. launch/env.sh

container=()
python=${FW_VENV:-.venv}/bin/python
if [ -n "${FW_CONTAINER:-}" ]; then
    container=("--container-image=$FW_CONTAINER" "--container-mounts=$PWD:$PWD${FW_MOUNTS:+,$FW_MOUNTS}"
        "--container-workdir=$PWD" --no-container-mount-home --no-container-entrypoint)
    python=python3
fi

say() { printf '== %s, job %s, start %d: %s\n' "$(date '+%F %T')" "$SLURM_JOB_ID" "$((${SLURM_RESTART_COUNT:-0} + 1))" "$*"; }

run_folder() { # DEFAULT OVERRIDES...: where the run lives; of several run.output= the last counts, as for the trainer
    local folder=$1 word
    shift
    for word; do
        if [[ $word == run.output=* ]]; then folder=${word#run.output=}; fi
    done
    printf '%s\n' "$folder"
}

on_all_tasks() { # COMMAND...: takes the place of the shell it is called in, so that signals reach srun itself
    # srun does not take over the job's --cpus-per-task by itself.
    exec srun --kill-on-bad-exit=1 --label --input=none ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
        ${container[@]+"${container[@]}"} "$@"
}

fw() { # ARGUMENTS...: a command of fw in one task, on the first node
    srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --input=none --nodelist="$SLURMD_NODENAME" \
        ${container[@]+"${container[@]}"} "$python" -m fw_train.cli "$@"
}

told= # by SLURM: USR1 some minutes before the time limit, TERM where it ends or requeues the job itself

until_done() { # COMMAND...: runs it in the background, passes USR1 on, and returns its exit code once it is really over
    local code
    "$@" &
    child=$!
    trap 'told=USR1; kill -USR1 "$child" 2>/dev/null || true' USR1
    trap 'told=TERM' TERM # the tasks have it from SLURM
    while :; do
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || return "$code" # else a signal has only interrupted the waiting
    done
}

requeue() { # WHY
    local job=$SLURM_JOB_ID
    # One job of an array bears the number of the whole array, which must not begin again.
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    say "$1; requeued, to go on from there"
    trap - USR1 TERM
    scontrol requeue "$job" && exit 0
    say "it cannot be requeued; submit it again to go on" >&2
    exit 1
}

lost_nodes() { # those of the job's nodes that do not answer, while this one does
    local node lost=()
    answers "$SLURMD_NODENAME" || return 0 # then it is srun that has a problem
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        answers "$node" || lost+=("$node")
    done
    printf '%s\n' "${lost[*]}"
}

answers() { # NODE
    timeout 20 srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --input=none --nodelist="$1" true >/dev/null 2>&1
}

value() { # FILE KEY: of a status.json
    sed -n "s/^ *\"$2\": \"\{0,1\}\(.*[^\",]\)\"\{0,1\},\{0,1\}\$/\1/p" "$1"
}

# train CONFIG FOLDER OVERRIDES...
# All tasks of the job train. Returns when the run has finished; otherwise requeues the job or ends it with an error.
train() {
    local config=$1 folder=$2 status=$2/status.json code=0 before state=none reason="" lost
    shift 2
    before=$(stat -c '%i %z' "$status" 2>/dev/null) || true
    say "$folder on $SLURM_NTASKS tasks of $SLURM_JOB_NODELIST"
    until_done on_all_tasks "$python" -m fw_train.train "$config" run.resume=auto "run.output=$folder" "$@" || code=$?
    # What an earlier start has said does not count.
    if [ -e "$status" ] && [ "$(stat -c '%i %z' "$status")" != "$before" ]; then
        state=$(value "$status" state) reason=$(value "$status" reason)
        say "$folder is $state at step $(value "$status" step)${reason:+: $reason}"
    fi
    case $state,$told in
    finished,*) return 0 ;;
    *,TERM)
        say "SLURM ends the job; if it requeues it, it goes on from the last checkpoint"
        exit 1
        ;;
    stopped,*)
        if [[ $reason == "the file "* ]]; then # somebody wants it to end
            say "submit it again to go on"
            exit 1
        fi
        requeue stopped
        ;;
    *,USR1) requeue "told to stop before it had begun" ;;
    esac
    lost=$(lost_nodes)
    if [ -n "$lost" ]; then requeue "no answer from $lost"; fi
    if [ "$state" = failed ]; then
        say "failed; see above, and submit it again to go on from the last checkpoint" >&2
    else
        say "the trainer ended with code $code and has not said why: it did not start, or was killed (out of memory?); see above" >&2
    fi
    exit 1
}

# promote FOLDER
# Prints the path of the stage-1 weights in FOLDER that are ready for stage 2; an error, and the reasons, where none are.
promote() {
    # shellcheck disable=SC2086 # several words are meant
    fw promote "$1" ${FW_MARKS:-}
}
