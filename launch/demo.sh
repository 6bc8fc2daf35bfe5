#!/usr/bin/env bash
# From nothing to a trained model and a report: synthetic scenes, tars, encoding, stages 0, 1 and 2 on two processes through the
# deepspeed launcher (ZeRO-2, bf16), evaluation, a generated clip, a page that shows it all. About a quarter of an hour on two
# cores. Interrupt it whenever you like: started again it goes on where it was.
#   bash launch/demo.sh [FOLDER]        (default outputs/demo)
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh

out=${1:-outputs/demo}
data=$out/data
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu TOKENIZERS_PARALLELISM=false

trap 'printf "\nlaunch/demo.sh: interrupted; run the same command again to go on\n" >&2; exit 130' INT

say() { printf '\n== %s\n' "$*"; }

fw() { .venv/bin/fw "$@"; }

make_data() { # NAME SCENES SEED
    [ -e "$data/$1/text/sidecar.jsonl" ] && return
    say "data: $2 scenes for $1"
    fw data synth "$data/raw_$1" --scenes "$2" --seed "$3" --both-orientations --path pan --path orbit --path dolly --no-camera-words
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

make_data train 700 0
make_data held_out 24 1

# Minutes for what takes days at full size. Stage 1 hides the camera nearly always and trains at low noise, so that the branch
# learns to find it. Captions do not say where the camera goes: that is for stage 2 to learn, from the paths.
base=$out/stage0/step-1200.safetensors
one=$out/stage1/step-350.safetensors
two=$out/stage2/step-200.safetensors
train stage0 1200 train.learning_rate=5e-3 run.validate_every_steps=500
train stage1 350 "weights.base=$base" train.learning_rate=2e-3 train.camera_drop=0.95 flow.shift=0.25 loss.camera_weight=100
train stage2 200 "weights.base=$base" "weights.init_from=$one" train.learning_rate=2e-3 flow.shift=1.5

if [ ! -e "$out/eval/eval.json" ]; then
    say "evaluation on $data/held_out, which no stage has seen"
    OMP_NUM_THREADS=$(nproc) fw eval "$one" "$two" "$data/held_out" --output "$out/eval"
fi
if [ ! -e "$out/clip/sample.json" ]; then
    say "a clip from stage 2"
    fw sample "$two" --output "$out/clip" --pan 40 --guidance 1 --camera-guidance 4 \
        --prompt "A large red sphere and a tall blue box on a tiled floor under an open sky."
fi
if [ ! -e "$out/summary.txt" ]; then
    say "report"
    fw report "$out/stage0" "$out/stage1" "$out/stage2" --eval "$out/eval/eval.json" --sample "$out/clip" \
        --title "What the demo has learnt" --output "$out/report.html" > "$out/summary.partial"
    mv "$out/summary.partial" "$out/summary.txt"
fi

say "done"
cat "$out/summary.txt"
cat <<END

report       $out/report.html  (opens in any browser, offline)
TensorBoard  .venv/bin/tensorboard --logdir $out
weights      $two
END
