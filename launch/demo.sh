#!/usr/bin/env bash
# From nothing to a trained model: synthetic scenes, tars, encoding, then stages 0, 1 and 2 on two processes through the
# deepspeed launcher (ZeRO-2, bf16). Interrupt it whenever you like: started again it goes on where it was.
#   bash launch/demo.sh [FOLDER]        (default outputs/demo)
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh

out=${1:-outputs/demo}
data=$out/data
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu TOKENIZERS_PARALLELISM=false

say() { printf '\n== %s\n' "$*"; }

fw() { .venv/bin/fw "$@"; }

make_data() { # NAME SCENES SEED
    [ -e "$data/$1/text/sidecar.jsonl" ] && return
    say "data: $2 scenes for $1"
    fw data synth "$data/raw_$1" --scenes "$2" --seed "$3" --both-orientations
    fw data pack "$data/raw_$1" "$data/$1"
    fw data encode "$data/$1" --codec dct --text hash:64
    fw data verify "$data/$1"
}

finished() { # RUN
    [ -e "$1/status.json" ] && grep -q '"state": "finished"' "$1/status.json"
}

train() { # STAGE STEPS OVERRIDES...
    local stage=$1 steps=$2 run=$out/$1
    shift 2
    if finished "$run"; then
        say "$stage: finished before"
        return
    fi
    say "$stage: $steps steps"
    .venv/bin/deepspeed --num_gpus 2 --no_local_rank --master_addr 127.0.0.1 --module fw_train.train configs/demo.yaml \
        "train.stage=$stage" "train.steps=$steps" "run.output=$run" \
        "data.sources=[{path: $data/train}]" "data.validation=$data/held_out" "$@" ||
        finished "$run" || { echo "launch/demo.sh: $stage ended early; run the same command again to go on" >&2; exit 1; }
    finished "$run" || { echo "launch/demo.sh: $stage was stopped; run the same command again to go on" >&2; exit 1; }
}

make_data train 900 0
make_data held_out 24 1

# The camera is hidden nearly always and noise levels are low in stage 1: it has minutes to learn what takes a day at full size.
base=$out/stage0/step-800.safetensors
train stage0 800 train.learning_rate=2e-3
train stage1 400 "weights.base=$base" train.learning_rate=2e-3 train.camera_drop=0.95 flow.shift=0.25 loss.camera_weight=100
train stage2 150 "weights.base=$base" "weights.init_from=$out/stage1/step-400.safetensors" train.learning_rate=1e-3

say "what was learnt (losses on $data/held_out, which no stage has seen)"
fw baseline configs/demo.yaml "data.sources=[{path: $data/train}]" "data.validation=$data/held_out" --run "$out/stage1"
