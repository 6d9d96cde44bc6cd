#!/usr/bin/env bash
# The whole job on this machine, on real handwritten digits, through the commands that a cluster user types:
# a tower that has seen digits, data -> shards, Hugging Face -> Megatron, stage 1, stage 2 at another tensor-parallel
# size, export, questions.
#   bash examples/llava_mcore/quickstart.sh [--fresh] [FOLDER]
# FOLDER (default: quickstart/ in the repository) gets everything. Run again, it goes on where it stopped;
# with --fresh it starts over. It runs on the CPU; ACCELERATOR=cuda takes two GPUs instead. PRECISION=bf16 (default: fp32)
# is faster on a CPU with bf16 instructions; then use a FOLDER of its own.
#   bash examples/llava_mcore/quickstart.sh --any-resolution [--fresh] [FOLDER]
# Wide and tall pictures of two or three digits; a LLaVA-NeXT trained twice on them, at any resolution and on one square
# tile of each; both scores. One stage, one process. FOLDER: quickstart-any-resolution/ unless it is named.
set -euo pipefail
unset CDPATH

usage() {
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
    exit "$1"
}

fresh=false
kind=quickstart
folder=
for argument; do
    case $argument in
        --help | -h) usage 0 ;;
        --fresh) fresh=true ;;
        --any-resolution) kind=quickstart-any-resolution ;;
        -*) usage 2 >&2 ;;
        *)
            [[ -z $folder ]] || usage 2 >&2
            folder=$argument
            ;;
    esac
done
started_in=$PWD
cd "$(dirname "$0")/../.."
repository=$PWD
folder=${folder:-$repository/$kind}
[[ $folder == /* ]] || folder=$started_in/$folder

PYTHON=$("$BASH" examples/setup_environment.sh)
export PYTHON ACCELERATOR=${ACCELERATOR:-cpu}
precision=${PRECISION:-fp32}
if [[ $precision != @(fp32|bf16) ]]; then
    echo "error: PRECISION='$precision' must be fp32 or bf16" >&2
    exit 2
fi

if [[ -e $folder && ! -d $folder/.steps && -n $(ls -A "$folder" 2>/dev/null || echo file) ]]; then
    echo "error: $folder exists and is not a quickstart's folder; name a new one" >&2
    exit 2
fi
other=make_digit_rows
[[ $kind == quickstart ]] || other=make_digits
if [[ -e $folder/.steps/$other ]]; then
    echo "error: $folder holds the other quickstart ($other); name a new one" >&2
    exit 2
fi
[[ $fresh == false ]] || rm -rf "$folder"
mkdir -p "$folder/.steps" "$folder/log"

# --- Steps -----------------------------------------------------------------------------------------------------------

number=0
redo=false # once a step has run, all later ones have to
report=()

# step TITLE RESULT FUNCTION: runs FUNCTION, whose work lies in the folder or file RESULT, unless it has finished before.
# Its state file holds the step's definition too, so that a changed step is run again.
step() {
    local title=$1 result=$folder/$2 function=$3 began=$SECONDS state_file log definition state
    number=$((number + 1))
    state_file=$folder/.steps/$function
    log=$folder/log/$function.log
    definition="$(declare -f "$function") in $precision"
    state=$(cat "$state_file" 2>/dev/null || true)
    report+=("$(printf '%-44s %s' "$title" "$result")")
    if [[ $redo == false && -e $result && $state == "finished $definition" ]]; then
        printf '%2d. %s: done before\n' "$number" "$title"
        return
    fi
    printf '%2d. %s\n' "$number" "$title"
    # An interrupted training goes on from its newest checkpoint; every other step starts anew.
    [[ $function == train_* && $redo == false && $state == "unfinished $definition" ]] || rm -rf "$result"
    redo=true
    printf 'unfinished %s' "$definition" >"$state_file"
    # A function called in a condition would run without `set -e`: the subshell is a command of its own instead.
    set +e
    (
        set -e
        "$function" "$result"
    ) 2>&1 | tee "$log" | show
    local -a status=("${PIPESTATUS[@]}")
    set -e
    if ((status[0] != 0)); then
        printf '    failed after %d s; the end of its log:\n' "$((SECONDS - began))" >&2
        tail -n 20 "$log" | cut -c 1-300 >&2
        printf 'error: step %d (%s) failed; whole log: %s\n' "$number" "$title" "$log" >&2
        printf '       run the same command again to go on from here\n' >&2
        exit 1
    fi
    printf 'finished %s' "$definition" >"$state_file"
    printf '    %d s (%d s so far)\n' "$((SECONDS - began))" "$SECONDS"
}

# show: of a step's log, what a reader wants to see while it runs; of the training, the loss at every 50th iteration.
show() {
    local line # not awk: some of them read a pipe in large pieces, and nothing would be seen for minutes
    while IFS= read -r line; do
        if [[ $line =~ iteration\ +[0-9]+/\ +[0-9]+ ]]; then
            local iteration=${BASH_REMATCH[0]}
            if [[ $iteration =~ [05]0/ && $line =~ lm\ loss:\ [^\ ]+ ]]; then
                printf '    %s  %s\n' "$iteration" "${BASH_REMATCH[0]}"
            fi
        elif [[ $line =~ ^(question|all |Wh|Is )|records\ in\ = ]]; then
            printf '    %s\n' "$line"
        fi
    done
}

make_digits() { "$PYTHON" -m examples.llava_mcore.quickstart.make_digits "$1" --copies 8; }

make_models() {
    "$PYTHON" -m examples.llava_mcore.quickstart.make_models "$1" \
        --texts "$folder"/data/stage1/digits.json "$folder"/data/stage2/digits.json
}

convert_stage1_data() {
    "$PYTHON" toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py \
        "$folder/data/stage1" --output "$1" --overwrite
}

convert_stage2_data() {
    "$PYTHON" toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py \
        "$folder/data/stage2" --output "$1" --overwrite
}

# What CLIP had learnt of its pictures before LLaVA took it.
teach_tower() {
    "$PYTHON" -m examples.llava_mcore.quickstart.train_tower "$folder/models/clip" "$folder/data/stage1" "$1"
}

convert_models() {
    bash toolkits/model_checkpoints_convertor/llava/hf2mcore_convertor_llava.sh \
        tiny "$folder/models/llm" "$folder/tower" "$1" 1 1 false "$precision"
}

# The language model was not pretrained, so stage 1 trains it too; with a real one leave the FREEZE variable away.
# Arguments: ENV MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN DECODER_SEQ_LEN PR TP PP CP DO FL AC
# OPTIMIZER_OFFLOAD SAVE_INTERVAL DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_ITERS LR_WARMUP_ITERS
# OUTPUT_BASEPATH
train_stage1() {
    FREEZE_LANGUAGE_MODEL=false NPROC_PER_NODE=1 LOG_INTERVAL=10 \
        bash examples/llava_mcore/run_mcore_llava.sh \
        dsw tiny 64 64 2e-3 1e-5 16 32 "$precision" 1 1 1 false true false false 100 \
        "$folder/data/stage1/wds" "$folder/data/stage1/wds" "$folder/checkpoint" 80 20 "$1"
}

train_stage2() {
    CONVERSATION_TEMPLATE=v1 NPROC_PER_NODE=2 NUM_WORKERS=0 LOG_INTERVAL=10 \
        bash examples/llava_mcore/run_sft_mcore_llava.sh \
        dsw tiny 64 64 1e-3 1e-5 16 128 "$precision" 2 1 1 false true false false 100 \
        "$folder/data/stage2/wds" "$folder/data/stage2/wds" "$folder/stage1/checkpoint" 110 20 "$1"
}

export_model() {
    bash toolkits/model_checkpoints_convertor/llava/hf2mcore_convertor_llava.sh \
        tiny "$folder/stage2/checkpoint" none "$1" 1 1 true "$precision" "$folder/models/llm"
}

answer_questions() {
    # One thread: the steps of so small a model are too short to share.
    OMP_NUM_THREADS=1 "$PYTHON" -m examples.llava_mcore.quickstart.answer "$folder/exported" "$folder/data/heldout" \
        --out "$1" --at-least 0.9
}

# Of --any-resolution. Nothing here was pretrained: one stage trains everything, twice.
make_digit_rows() { "$PYTHON" -m examples.llava_mcore.quickstart.make_digit_rows "$1"; }

make_models_of_rows() {
    "$PYTHON" -m examples.llava_mcore.quickstart.make_models "$1" --texts "$folder/data/train/digits.json"
}

convert_rows() {
    "$PYTHON" toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py \
        "$folder/data/train" --output "$1" --overwrite
}

convert_llava_next() {
    MODEL_KIND=llava_next bash toolkits/model_checkpoints_convertor/llava/hf2mcore_convertor_llava.sh \
        tiny "$folder/models/llm" "$folder/models/clip" "$1" 1 1 false "$precision"
}

train_any_resolution() {
    IMAGE_ASPECT_RATIO=anyres CONVERSATION_TEMPLATE=mistral FREEZE_LANGUAGE_MODEL=false FREEZE_VISION_TOWER=false \
        NPROC_PER_NODE=1 NUM_WORKERS=0 LOG_INTERVAL=10 EVAL_ITERS=0 bash examples/llava_mcore/run_mcore_llava.sh \
        dsw tiny 16 16 2e-3 1e-5 16 128 "$precision" 1 1 1 false true false false 100 \
        "$folder/data/wds" "$folder/data/wds" "$folder/checkpoint" 200 20 "$1"
}

train_one_tile() {
    IMAGE_ASPECT_RATIO=crop CONVERSATION_TEMPLATE=mistral FREEZE_LANGUAGE_MODEL=false FREEZE_VISION_TOWER=false \
        NPROC_PER_NODE=1 NUM_WORKERS=0 LOG_INTERVAL=10 EVAL_ITERS=0 bash examples/llava_mcore/run_mcore_llava.sh \
        dsw tiny 16 16 2e-3 1e-5 16 128 "$precision" 1 1 1 false true false false 100 \
        "$folder/data/wds" "$folder/data/wds" "$folder/checkpoint" 200 20 "$1"
}

answer_at_any_resolution() {
    OMP_NUM_THREADS=1 "$PYTHON" -m examples.llava_mcore.quickstart.answer \
        "$folder/any_resolution/checkpoint" "$folder/data/heldout" --out "$1"
}

answer_of_one_tile() {
    OMP_NUM_THREADS=1 "$PYTHON" -m examples.llava_mcore.quickstart.answer \
        "$folder/one_tile/checkpoint" "$folder/data/heldout" --out "$1"
}

compare_scores() {
    "$PYTHON" -m examples.llava_mcore.quickstart.compare_scores "$1" --better-by 0.1 \
        "any resolution=$folder/answers_any_resolution" "one tile=$folder/answers_one_tile"
}

plot_losses() {
    "$PYTHON" -m examples.llava_mcore.quickstart.plot_loss "$1" \
        "stage 1=$folder/stage1/tensorboard" "stage 2=$folder/stage2/tensorboard"
}

printf 'Quickstart in %s, with %s\n' "$folder" "$PYTHON"
if [[ $precision == fp32 && $ACCELERATOR == cpu ]] &&
    "$PYTHON" -SBc 'from megatron_patch.device import cpu; raise SystemExit(not cpu.bf16_instructions())'; then
    printf 'This CPU computes in bf16 too: PRECISION=bf16 bash %q FOLDER trains in less time\n' "$0"
fi
if [[ $kind == quickstart-any-resolution ]]; then
    step "rows of digits, wide and tall" data make_digit_rows
    step "untrained language model and vision tower" models make_models_of_rows
    step "data as shards" data/wds convert_rows
    step "Hugging Face -> Megatron LLaVA-NeXT" checkpoint convert_llava_next
    step "training at any resolution" any_resolution train_any_resolution
    step "training on one tile of each picture" one_tile train_one_tile
    step "questions, at any resolution" answers_any_resolution answer_at_any_resolution
    step "questions, one tile of each picture" answers_one_tile answer_of_one_tile
    step "both scores" scores.json compare_scores
    printf '\nFinished after %d s. Where everything lies:\n' "$SECONDS"
    printf '  %s\n' "${report[@]}"
    exit 0
fi
step "digits as images and conversations" data make_digits
step "untrained language model and vision tower" models make_models
step "the tower learns to see digits" tower teach_tower
step "stage 1 data as shards" data/stage1/wds convert_stage1_data
step "stage 2 data as shards" data/stage2/wds convert_stage2_data
step "Hugging Face -> Megatron checkpoint" checkpoint convert_models
step "stage 1: captions, one process" stage1 train_stage1
step "stage 2: conversations, tensor-parallel 2" stage2 train_stage2
step "Megatron -> Hugging Face" exported export_model
step "questions about held-out images" answers answer_questions
step "loss curves" loss.png plot_losses

printf '\nFinished after %d s. Where everything lies:\n' "$SECONDS"
printf '  %s\n' "${report[@]}" "contact sheet                                $folder/answers/answers.png"
cat <<NEXT
Next:
  bash examples/llava_mcore/serve_llava.sh $folder/exported
      opens a page: drop an image in, ask, and watch the answer come
  $PYTHON -m tensorboard.main --logdir $folder
      learning rate, gradient norm, samples per second
  bash examples/llava_mcore/run_mcore_llava.sh --help
      the same commands take your own data and models; examples/llava_mcore/README.md has the recipe
NEXT
