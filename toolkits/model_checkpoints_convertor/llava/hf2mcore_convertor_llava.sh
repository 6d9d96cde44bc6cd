#!/usr/bin/env bash
# Hugging Face language model + CLIP vision tower -> Megatron checkpoint, and back to Hugging Face. --help tells all.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # called with dash
# shellcheck source=examples/launcher.sh
. "$(dirname -- "$(readlink -f -- "$0")")/../../../examples/launcher.sh"

ARGUMENTS="MODEL_SIZE|one of $MODEL_SIZES|size of the language model; compared with its configuration
SOURCE_LLM_CKPT_PATH|a Hugging Face model folder or a converted checkpoint|mg2hf=false: the Hugging Face language model, or a whole LLaVA; mg2hf=true: the checkpoint to export
SOURCE_CLIP_CKPT_PATH|a Hugging Face model folder, a .pt file, or none|the vision tower: CLIP or SigLIP, or OpenAI's own ViT-*.pt; none when the first source holds it
TARGET_CKPT_PATH|a new or empty folder, not /|where the result goes
TP|$PARALLEL|tensor-parallel size the checkpoint is meant for; any size reads the format torch_dist
PP|$PARALLEL|pipeline-parallel size the checkpoint is meant for; any size reads the format torch_dist
mg2hf|one of true false|false: Hugging Face to Megatron; true: Megatron to Hugging Face
PR|one of fp16 bf16 fp32|precision of the written weights
HF_CKPT_PATH|a Hugging Face model folder|with mg2hf=true required: the model it came from, compared before the export"
OPTIONS="PROJECTOR|(mlp2x_gelu)|one of mlp2x_gelu linear|kind of the new projector; not with mg2hf=true
PROJECTOR_PATH|(a new one)|a file|mm_projector.bin to start from, such as stage 1 of LLaVA leaves; not with mg2hf=true
VISION_FEATURE_LAYER|(-2)|one of -2 -1|layer of the vision tower whose features the projector sees: the last but one or the last; not with mg2hf=true
ADD_TOKENS|(none)|text|special tokens for tokenizer, embedding and head, before the image token; x_0..x_7 is a range; not with mg2hf=true
EXPORT_LAYOUT|(hub)|one of hub original original_without_tower|with mg2hf=true: the layout of transformers, or that of the original LLaVA code
VISION_TOWER_NAME|(see meaning)|text|with an original layout: its mm_vision_tower; else the name of the source or of the known CLIP
CKPT_FORMAT|(torch_dist)|one of torch_dist torch|torch_dist: any TP and PP reads it; torch: one file per rank of this TP and PP; mg2hf=true reads both
$COMMON_OPTIONS"

show_help() {
    printf 'usage: bash %q %s\n\n' "$0" "$(cut -d'|' -f1 <<<"$ARGUMENTS" | xargs)"
    printf 'Converts Hugging Face models to a Megatron checkpoint, and back. The 9th argument is needed when mg2hf=true.\n'
    show_rows "Arguments" "$ARGUMENTS" numbered
    show_rows "Options, from the environment: name, default, value" "$OPTIONS" options
}

# is_llava FOLDER: is it a whole LLaVA, in the layout of transformers or of the original code?
is_llava() {
    [[ -f $1/config.json && $(<"$1/config.json") =~ \"model_type\"[[:space:]]*:[[:space:]]*\"llava(_llama|_mistral|_qwen)?\" ]]
}

# check_conversion: the rules that hold between rows.
check_conversion() {
    right mg2hf || return 0
    local source=${arg[SOURCE_LLM_CKPT_PATH]}
    if [[ ${arg[mg2hf]} == true ]]; then
        if right SOURCE_LLM_CKPT_PATH && ! is_checkpoint "$source"; then
            refuse SOURCE_LLM_CKPT_PATH "must be a converted checkpoint with mg2hf=true ($detail)"
        fi
        local name
        for name in PROJECTOR PROJECTOR_PATH; do
            [[ -z ${arg[$name]} ]] || refuse "$name" "is for mg2hf=false: an export keeps the projector of the checkpoint"
        done
        [[ -z ${arg[VISION_FEATURE_LAYER]} ]] || refuse VISION_FEATURE_LAYER "is for mg2hf=false: an export keeps the checkpoint's"
        [[ -z ${arg[ADD_TOKENS]} ]] || refuse ADD_TOKENS "is for mg2hf=false: an export keeps the tokenizer of the checkpoint"
        [[ -z ${arg[CKPT_FORMAT]} ]] || refuse CKPT_FORMAT "is for mg2hf=false: an export sees the checkpoint's format itself"
        [[ -z ${arg[VISION_TOWER_NAME]} || ${arg[EXPORT_LAYOUT]} == original* ]] ||
            refuse VISION_TOWER_NAME "is for EXPORT_LAYOUT=original or original_without_tower"
        return
    fi
    local name
    for name in EXPORT_LAYOUT VISION_TOWER_NAME; do
        [[ -z ${arg[$name]} ]] || refuse "$name" "is for mg2hf=true: a checkpoint has one layout only"
    done
    if right SOURCE_LLM_CKPT_PATH && [[ ! -f $source/config.json ]]; then
        refuse SOURCE_LLM_CKPT_PATH "must be a Hugging Face model folder with mg2hf=false (it has no config.json)"
    elif right SOURCE_LLM_CKPT_PATH SOURCE_CLIP_CKPT_PATH && [[ ${arg[SOURCE_CLIP_CKPT_PATH]} == none ]]; then
        is_llava "$source" || refuse SOURCE_CLIP_CKPT_PATH \
            "must be a Hugging Face CLIP or SigLIP folder: SOURCE_LLM_CKPT_PATH holds no vision tower (its model_type is not llava)"
    fi
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    show_help
    exit 0
fi
read_arguments "$ARGUMENTS" 9 "${@:1:9}"
(($# < 10)) || complain "argument 10 ${10@Q}" "is one too many: there are 9 arguments; quote values that hold spaces"
read_options "$OPTIONS"
choose_python
check_conversion
(($# >= 9)) || [[ ${arg[mg2hf]} != true ]] ||
    complain "argument 9 HF_CKPT_PATH" "is missing: with mg2hf=true it must be a Hugging Face model folder"
stop_if_wrong
absolute SOURCE_LLM_CKPT_PATH SOURCE_CLIP_CKPT_PATH TARGET_CKPT_PATH HF_CKPT_PATH PROJECTOR_PATH
environment=("PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}")
command=(
    "${arg[PYTHON]}" -u "$repository/toolkits/model_checkpoints_convertor/llava/hf2mcore_convertor_llava.py"
    --model-size "${arg[MODEL_SIZE]}"
    --source-llm "${arg[SOURCE_LLM_CKPT_PATH]}" --source-clip "${arg[SOURCE_CLIP_CKPT_PATH]}"
    --target "${arg[TARGET_CKPT_PATH]}"
    --tensor-model-parallel-size "${arg[TP]}" --pipeline-model-parallel-size "${arg[PP]}"
    --precision "${arg[PR]}"
)
[[ -z ${arg[PROJECTOR]} ]] || command+=(--projector "${arg[PROJECTOR]}")
[[ -z ${arg[PROJECTOR_PATH]} ]] || command+=(--mm-projector "${arg[PROJECTOR_PATH]}")
[[ -z ${arg[VISION_FEATURE_LAYER]} ]] || command+=(--vision-feature-layer "${arg[VISION_FEATURE_LAYER]}")
if [[ -n ${arg[ADD_TOKENS]} ]]; then
    read -ra tokens <<<"${arg[ADD_TOKENS]//$'\n'/ }"
    command+=(--add-tokens "${tokens[@]}")
fi
[[ -z ${arg[EXPORT_LAYOUT]} ]] || command+=(--layout "${arg[EXPORT_LAYOUT]}")
[[ -z ${arg[VISION_TOWER_NAME]} ]] || command+=(--vision-tower-name "${arg[VISION_TOWER_NAME]}")
[[ -z ${arg[CKPT_FORMAT]} ]] || command+=(--format "${arg[CKPT_FORMAT]}")
if [[ ${arg[mg2hf]} == true ]]; then
    command+=(--mg2hf --hf-checkpoint "${arg[HF_CKPT_PATH]}")
elif (($# >= 9)); then
    printf 'HF_CKPT_PATH is not used with mg2hf=false\n' >&2
fi
start
