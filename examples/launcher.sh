# shellcheck shell=bash
# The one library of the launchers; sourced under bash, never run.
#
# First half, for every launcher: rows `NAME|rule|meaning` give --help, the checks and the values in `arg`. The rule is
# English and is what --help and a refusal show; `fits` is its meaning. Second half: LLaVA training, shared by its two
# stages. Nothing is evaluated, and nothing is written before Python takes over.

if [[ -z ${BASH_VERSINFO:-} ]] || ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    printf 'error: bash %s is too old, 4.4 or newer is needed\n' "${BASH_VERSION:-}" >&2
    exit 2
fi
set +o posix # as `sh` bash would refuse some of what follows
set -euo pipefail
unset CDPATH

repository=$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")

declare -A arg=()         # value of every row by its name
declare -A wrong=()       # names whose value is missing or breaks its own rule
declare -A recipe=()      # values of a preset by name
declare -a names=()       # names of the positional rows, in order
declare -a complaints=()  # one line each
declare -a environment=() # NAME=VALUE for the started program
declare -a command=()     # the started program, one argument each
detail=                   # what `fits` found, when the rule alone does not tell

MODEL_SIZES="tiny 0.1B 0.5B 1B 1.5B 3B 7B 8B 13B 14B 32B 72B"
COUNT="a whole number from 1 to 999999999"
COUNT_OR_ZERO="a whole number from 0 to 999999999"
PARALLEL="a whole number from 1 to 99999"

# --- Rules -----------------------------------------------------------------------------------------------------------

# fits RULE VALUE: does VALUE obey RULE?
fits() {
    local rule=$1 value=$2
    detail=
    case $rule in
        "auto, a built-in template, or a .json or .yaml file")
            [[ $value == *.@(json|yaml|yml) && -f $value ]] ||
                is_listed "$value" auto "$repository"/megatron_patch/data/conversation_templates/*.yaml
            ;;
        "auto or an accelerator")
            is_listed "$value" auto "$repository"/megatron_patch/device/[!_]*.py
            ;;
        "one of "*)
            [[ -n $value && $value != *[[:space:]]* && " ${rule#one of } " == *" $value "* ]]
            ;;
        "a whole number from "*)
            local low high
            read -r low _ high <<<"${rule#a whole number from }"
            [[ $value =~ ^(0|[1-9][0-9]{0,8})$ ]] && ((value >= low && value <= high))
            ;;
        "a number above 0")
            is_number "$value" && [[ ${value%%[eE]*} == *[1-9]* ]]
            ;;
        "a number from 0")
            is_number "$value"
            ;;
        "a number from 0 to below 1")
            is_number "$value" && ! at_most 1 "$value"
            ;;
        "an energon dataset (folder with .nv-meta, or a .yaml that lists such folders)")
            [[ $value == *.y?(a)ml && -f $value || -d $value/.nv-meta ]] || explain_path "$value" .nv-meta
            ;;
        "COLUMNSxROWS, as 2x2, or auto")
            [[ $value == auto || $value =~ ^[1-9]x[1-9]$ ]]
            ;;
        "iterations, as 10-12")
            [[ $value =~ ^([1-9][0-9]{0,8})-([1-9][0-9]{0,8})$ ]] && ((BASH_REMATCH[1] <= BASH_REMATCH[2]))
            ;;
        "ranks, as 0,1")
            [[ $value =~ ^(0|[1-9][0-9]{0,4})(,(0|[1-9][0-9]{0,4}))*$ ]]
            ;;
        "a converted checkpoint, or none" | "a converted checkpoint")
            [[ $rule == *", or none" && $value == none ]] || is_checkpoint "$value"
            ;;
        "a Hugging Face model folder or a converted checkpoint")
            [[ -f $value/config.json ]] || is_checkpoint "$value"
            ;;
        "a Hugging Face model folder" | "a Hugging Face model folder, a .pt file, or none")
            [[ $rule == *", or none" && ($value == none || ($value == *.pt && -f $value)) || -f $value/config.json ]] ||
                explain_path "$value" config.json
            ;;
        "a folder with LLaVA configuration and tokenizer")
            local part
            for part in config.json preprocessor_config.json tokenizer_config.json; do
                [[ -f $value/$part ]] || { explain_path "$value" "$part" || return 1; }
            done
            ;;
        "a folder to write into, not /")
            is_writable_place "$value"
            ;;
        "a new or empty folder, not /")
            is_writable_place "$value" && is_empty "$value"
            ;;
        "a host name or address")
            [[ $value =~ ^[[:alnum:]:][[:alnum:]._:-]*$ ]]
            ;;
        "a folder of cache_tower_features.py")
            [[ -f $value/features.json ]] || explain_path "$value" features.json
            ;;
        "a benchmark of evaluate_llava.sh")
            is_listed "$value" "$repository"/megatron_patch/evaluation/benchmarks/[!_]*.py
            ;;
        "a folder")
            [[ -d $value ]] || detail="there is none"
            [[ -d $value ]]
            ;;
        "a file or folder")
            [[ -e $value ]] || detail="it does not exist"
            [[ -e $value ]]
            ;;
        "a file")
            [[ -f $value ]] || detail="it does not exist"
            [[ ! -d $value ]] || detail="it is a folder"
            [[ -f $value ]]
            ;;
        "text")
            [[ $value == *[![:space:]]* ]]
            ;;
        "a program")
            command -v -- "$value" >/dev/null
            ;;
        *)
            printf 'error: the launcher has a row with the unknown rule "%s"\n' "$rule" >&2
            exit 70
            ;;
    esac
}

# is_listed VALUE WORD...: is VALUE one of the words? A file stands for its name without folder and suffix.
is_listed() {
    local value=$1 known
    shift
    known=("${@##*/}")
    known=("${known[@]%.*}")
    detail="known: ${known[*]}"
    [[ $value != *[[:space:]]* && " ${known[*]} " == *" $value "* ]]
}

is_number() { [[ $1 =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,2})?$ ]]; }

# at_most A B: A <= B for two numbers, compared as text of equal width.
at_most() {
    local LC_ALL=C a b
    printf -v a '%0240.100f' "$1"
    printf -v b '%0240.100f' "$2"
    [[ $a < $b || $a == "$b" ]]
}

# explain_path PATH PART: says in `detail` whether PATH or the PART of it is missing; fails always.
explain_path() {
    detail="it has no $2"
    [[ -d $1 ]] || detail="it is not a folder"
    [[ -e $1 ]] || detail="it does not exist"
    return 1
}

# is_checkpoint FOLDER: weights of the newest iteration and the llava/ folder are there.
is_checkpoint() {
    local tracker=latest_checkpointed_iteration.txt newest=
    [[ -f $1/$tracker ]] || { explain_path "$1" "$tracker" || return 1; }
    read -r newest <"$1/$tracker" || true
    [[ $newest =~ ^[0-9]{1,9}$ ]] && printf -v newest 'iter_%07d' "$((10#$newest))"
    [[ $newest == release || $newest == iter_* ]] || { detail="its $tracker names no iteration" && return 1; }
    [[ -d $1/$newest ]] || { explain_path "$1" "$newest, which its $tracker names" || return 1; }
    [[ -f $1/llava/config.json ]] || explain_path "$1" llava/config.json
}

# note FILE KEY: the number or word that a JSON file holds for KEY; nothing without the file or the key.
note() {
    [[ ! -f $1 || ! $(<"$1") =~ \"$2\"[[:space:]]*:[[:space:]]*\"?([[:alnum:].]+) ]] || printf '%s' "${BASH_REMATCH[1]}"
}

# is_writable_place FOLDER: exists and is writable, or can be made.
is_writable_place() {
    local place
    [[ -n $1 ]] || { detail="it is empty" && return 1; }
    place=$(readlink -m -- "$1")
    [[ $place != / ]] || { detail="it is the root of the file system" && return 1; }
    while [[ ! -e $place ]]; do place=$(dirname -- "$place"); done
    [[ -d $place ]] || { detail="$place is a file" && return 1; }
    [[ -w $place ]] || { detail="$place is not writable" && return 1; }
}

# is_empty FOLDER: nothing is in it, or it is not there.
is_empty() {
    local entry
    for entry in "$1"/* "$1"/.[!.]* "$1"/..?*; do
        [[ ! -e $entry && ! -L $entry ]] || { detail="it is not empty" && return 1; }
    done
}

# --- Rows ------------------------------------------------------------------------------------------------------------

# complain LABEL TEXT: one more thing wrong, said once.
complain() {
    local line known
    line="  $1 $2"
    for known in "${complaints[@]}"; do [[ $known != "$line" ]] || return 0; done
    complaints+=("$line")
}

# refuse NAME TEXT: like complain, for a row by its name: position, name and value go in front.
refuse() {
    wrong[$1]=1
    complain "$(label "$1")" "$2"
}

label() {
    local index
    for index in "${!names[@]}"; do
        if [[ ${names[index]} == "$1" ]]; then
            printf "argument %d %s=%s" "$((index + 1))" "$1" "${arg[$1]@Q}"
            return
        fi
    done
    printf "environment %s=%s" "$1" "${arg[$1]@Q}"
}

# right NAME...: were all of these given and right so far?
right() {
    local name
    for name; do [[ ! -v wrong[$name] ]] || return 1; done
}

# check_row NAME RULE: complains when arg[NAME] breaks RULE.
check_row() {
    fits "$2" "${arg[$1]}" || refuse "$1" "must be $2${detail:+ ($detail)}"
}

# read_arguments ROWS FIRST_OPTIONAL [VALUE...]: positional rows; from FIRST_OPTIONAL on they may be absent.
read_arguments() {
    local rows=$1 first_optional=$2 name rule
    shift 2
    while IFS='|' read -r name rule _; do
        names+=("$name")
        if (($# > 0)); then
            arg[$name]=$1
            shift
            check_row "$name" "$rule"
        else
            arg[$name]=
            wrong[$name]=1
            ((${#names[@]} >= first_optional)) ||
                complain "argument ${#names[@]} $name" "is missing: must be $rule"
        fi
    done <<<"$rows"
}

# read_options ROWS: rows NAME|default|rule|meaning from the environment; a default in (brackets) is worked out later.
read_options() {
    local name default rule
    while IFS='|' read -r name default rule _; do
        [[ $default != "("* ]] || default=
        arg[$name]=${!name:-${recipe[$name]:-$default}}
        [[ -z ${arg[$name]} ]] || check_row "$name" "$rule"
    done <<<"$1"
}

# read_cluster ROWS: rows NAME|rule|meaning from the environment, all required.
read_cluster() {
    local name rule
    while IFS='|' read -r name rule _; do
        arg[$name]=${!name:-}
        if [[ -z ${arg[$name]} ]]; then
            wrong[$name]=1
            complain "environment $name" "is missing: must be $rule"
        else
            check_row "$name" "$rule"
        fi
    done <<<"$1"
}

# stop_if_wrong: says all that is wrong at once and ends.
stop_if_wrong() {
    ((${#complaints[@]})) || return 0
    printf 'error: %d wrong or missing; nothing was started or written\n' "${#complaints[@]}" >&2
    printf '%s\n' "${complaints[@]}" >&2
    printf '  all rules: bash %q --help\n' "$0" >&2
    exit 2
}

# tell_notes: what is worth knowing of arguments that are right.
tell_notes() {
    local row
    for row in "${notes[@]}"; do
        [[ ${row%% *} != "${row%%=*}=${arg[${row%%=*}]}" ]] || printf 'note: %s: %s\n' "${row%% *}" "${row#* }" >&2
    done
}

# absolute NAME...: a path that begins with a dash must not look like an option later.
absolute() {
    local name
    for name; do
        [[ ${arg[$name]} == /* || ${arg[$name]} == none || -z ${arg[$name]} ]] || arg[$name]=$PWD/${arg[$name]}
    done
}

# show_rows TITLE ROWS [numbered|options]: a table of --help.
show_rows() {
    local first second third fourth number=0
    printf '\n%s\n' "$1"
    while IFS='|' read -r first second third fourth; do
        case ${3:-} in
            numbered) printf '  %2d  %-24s  %s\n      %s\n' "$((++number))" "$first" "$second" "$third" ;;
            options) printf '  %-30s  %-16s  %s\n      %s\n' "$first" "$second" "$third" "$fourth" ;;
            *) printf '  %-30s  %s\n      %s\n' "$first" "$second" "$third" ;;
        esac
    done <<<"$2"
}

# choose_python: sets arg[PYTHON] to the interpreter that runs everything.
choose_python() {
    [[ -z ${arg[PYTHON]} ]] || return 0
    arg[PYTHON]=python3
    [[ ! -x $repository/.venv/bin/python ]] || arg[PYTHON]=$repository/.venv/bin/python
    check_row PYTHON "a program"
}

# start: becomes `command` in `environment`, or prints both, one argument per line.
start() {
    if [[ ${arg[DRY_RUN]} == 1 ]]; then
        printf '%s\n' env "${environment[@]}" "${command[@]}"
        exit 0
    fi
    export "${environment[@]}"
    exec "${command[@]}"
}

# hand_over SCRIPT WORD...: becomes a program of llava_mcore/ that checks its words itself.
hand_over() {
    read_options "$COMMON_OPTIONS"
    choose_python
    stop_if_wrong
    environment=("PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}")
    command=("${arg[PYTHON]}" -u "$repository/examples/llava_mcore/$1" "${@:2}")
    start
}

COMMON_OPTIONS="PYTHON|(.venv or python3)|a program|the Python interpreter that runs everything
DRY_RUN|0|one of 0 1|1: print the command, one argument per line, and write nothing"

# --- The machine -----------------------------------------------------------------------------------------------------

# ask_accelerator NODES: sets what megatron_patch/device/__main__.py says of ACCELERATOR.
declare devices="" counted_by="" # what messages call the devices, and where their number comes from
declare count=""                 # devices that a process started here would see; empty: as many as a model needs
declare -a attention_backends=() # for FL=true and FL=false; empty: there is no choice
declare -a device_environment=() # NAME=VALUE for the processes
declare -a refused=()            # NAME=VALUE WHY: values that arguments cannot have with it
declare -a notes=()              # NAME=VALUE WHAT: what to know of values that they can have
ask_accelerator() {
    local answer name value
    right PYTHON || return 1
    if ! answer=$("${arg[PYTHON]}" -SB "$repository/megatron_patch/device/__main__.py" "${arg[ACCELERATOR]}" "$1" </dev/null) ||
        [[ -z $answer ]]; then
        refuse PYTHON "must be a Python interpreter: it cannot run $repository/megatron_patch/device/__main__.py"
        return 1
    fi
    while read -r name value; do
        case $name in
            count) count=$value ;;
            devices) devices=$value ;;
            counted_by) counted_by=$value ;;
            attention_backends) read -ra attention_backends <<<"$value" ;;
            environment) device_environment+=("$value") ;;
            refused) refused+=("$value") ;;
            note) notes+=("$value") ;;
        esac
    done <<<"$answer"
}

# choose_machine MODEL_PARALLEL: sets processes (on this node), nodes, node_rank, master_addr, master_port, and what
# ask_accelerator sets. MODEL_PARALLEL processes hold one model; it is the number started where devices do not count,
# unless NPROC_PER_NODE says otherwise.
choose_machine() {
    processes=${arg[NPROC_PER_NODE]}
    nodes=1 node_rank=0 master_addr=127.0.0.1 master_port=${arg[MASTER_PORT]}
    if [[ ${arg[ENV]} == dlc ]]; then
        nodes=${arg[WORLD_SIZE]} node_rank=${arg[RANK]} master_addr=${arg[MASTER_ADDR]}
        processes=${processes:-${arg[KUBERNETES_CONTAINER_RESOURCE_GPU]}}
        ask_accelerator "$nodes"
        return
    fi
    ask_accelerator "$nodes" || return
    [[ -n $master_port ]] || master_port=$(free_port)
    if [[ -z $count ]]; then
        processes=${processes:-$1}
    elif ((count == 0)) && [[ -z $processes ]]; then
        refuse ACCELERATOR "found no $devices on this machine; set NPROC_PER_NODE to the number of $devices, or use ACCELERATOR=cpu"
    elif ((count > 0 && ${processes:-0} > count)); then
        refuse NPROC_PER_NODE "is more than the $count $devices seen here ($counted_by)"
    fi
    processes=${processes:-$count}
}

# free_port: a port nobody listens on, below the range from which the system lends its own.
free_port() {
    local port
    while port=$((10000 + RANDOM % 20000)); do
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    printf '%d' "$port"
}

# start_arguments OUTPUT: environment and command up to the script that launch.py starts.
start_arguments() {
    local cores threads
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    threads=$((cores / processes))
    environment+=(
        "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
        "PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}"
    )
    environment+=("${device_environment[@]}")
    local -a check=()
    # What needs Python to be seen: tokenizer, template and data fit, labels are learnt, the run to resume had this data.
    [[ ${arg[CHECK]} != true ]] || check=(--check)
    command=(
        # as torchrun, which would import torch first
        "${arg[PYTHON]}" -u -m megatron_patch.launch "${check[@]}" --max-rollbacks "${arg[MAX_ROLLBACKS]}"
        --nproc_per_node "$processes" --nnodes "$nodes" --node_rank "$node_rank"
        --master_addr "$master_addr" --master_port "$master_port"
        --log-dir "$1/log/$(date +%Y%m%d-%H%M%S)-node$node_rank" # nodes may share the disk
    )
}

# --- LLaVA training --------------------------------------------------------------------------------------------------

TRAINING_ARGUMENTS="ENV|one of dsw dlc|dsw: all processes on this machine; dlc: one node of a cluster job (variables below)
MODEL_SIZE|one of $MODEL_SIZES|size of the language model; must be the one the checkpoint was converted with
BATCH_SIZE|$COUNT|samples per data-parallel rank and forward pass (micro-batch)
GLOBAL_BATCH_SIZE|$COUNT|samples per optimizer step; a multiple of BATCH_SIZE x data-parallel size
LR|a number above 0|highest learning rate
MIN_LR|a number from 0|learning rate at the end of the cosine; at most LR
SEQ_LEN|$COUNT|image tokens of one image (576 for CLIP-L/14 at 336 pixels)
DECODER_SEQ_LEN|$COUNT|image and text tokens of one sample; more than SEQ_LEN
PR|one of fp16 bf16 fp8 fp32|precision; bf16 on a CPU wants one with bf16 instructions; fp8 (the decoder's layers, bf16 around them) needs a GPU and Transformer Engine
TP|$PARALLEL|tensor-parallel size; above 1 with sequence parallelism
PP|$PARALLEL|pipeline-parallel size
CP|$PARALLEL|context-parallel size
DO|one of true false|distributed optimizer: its state is shared out over the data-parallel ranks
FL|one of true false|true: the fastest attention there is (flash-attn or cuDNN); false: on a GPU cuDNN only
AC|one of sel full offload false true|activations: recompute attention (sel; true means sel) or whole layers, move them to the host, keep them
OPTIMIZER_OFFLOAD|one of false static auto|optimizer state in host memory; needs DO=true and a GPU
SAVE_INTERVAL|$COUNT|iterations from one checkpoint to the next
DATASET_PATH|an energon dataset (folder with .nv-meta, or a .yaml that lists such folders)|training data
VALID_DATASET_PATH|an energon dataset (folder with .nv-meta, or a .yaml that lists such folders)|validation data; may be the training data's
PRETRAIN_CHECKPOINT_PATH|a converted checkpoint, or none|weights to start from, configuration and tokenizer; none: start from nothing
TRAIN_ITERS|$COUNT|iterations, warm-up included
LR_WARMUP_ITERS|$COUNT_OR_ZERO|iterations of linear warm-up; fewer than TRAIN_ITERS
OUTPUT_BASEPATH|a folder to write into, not /|checkpoint/, tensorboard/ and log/ below it; the same folder again resumes"

CLUSTER_VARIABLES="WORLD_SIZE|a whole number from 1 to 99999|nodes of the job
RANK|a whole number from 0 to 99998|number of this node, from 0
MASTER_ADDR|a host name or address|node 0
MASTER_PORT|a whole number from 1 to 65535|port on node 0
KUBERNETES_CONTAINER_RESOURCE_GPU|a whole number from 1 to 4096|GPUs of this node"

# Published recipes: name and stage, source, values of arguments given as `-` and defaults of options, which a variable
# in the environment overrides. Adam's second beta of Hugging Face's trainer, which LLaVA used, is 0.999.
PRESETS="llava-1.5, stage 1|LLaVA-1.5, LLaVA-Pretrain 558k|GLOBAL_BATCH_SIZE=256 LR=1e-3 MIN_LR=0 TRAIN_ITERS=2180 LR_WARMUP_ITERS=65 ADAM_BETA2=0.999
llava-1.5, stage 2|LLaVA-1.5, mix665k|GLOBAL_BATCH_SIZE=128 LR=2e-5 MIN_LR=0 TRAIN_ITERS=5200 LR_WARMUP_ITERS=156 ADAM_BETA2=0.999 IMAGE_ASPECT_RATIO=pad DATA_ORDER=modality
pai, stage 1|Pai-Megatron-Patch's guide|GLOBAL_BATCH_SIZE=256 LR=0.00015 MIN_LR=1e-5 TRAIN_ITERS=20000 LR_WARMUP_ITERS=200
neva, stage 1|NeMo's guide of NeVA|BATCH_SIZE=32 GLOBAL_BATCH_SIZE=256 LR=2e-3 MIN_LR=2e-5 TRAIN_ITERS=2176 LR_WARMUP_ITERS=65 ADAM_BETA2=0.95
neva, stage 2|NeMo's guide of NeVA|BATCH_SIZE=8 GLOBAL_BATCH_SIZE=128 LR=2e-5 MIN_LR=2e-7 TRAIN_ITERS=5197 LR_WARMUP_ITERS=155 ADAM_BETA2=0.95 AC=full CONVERSATION_TEMPLATE=v1"

# apply_preset STAGE NAME: the recipe's values into the associative array `recipe`.
apply_preset() {
    local row values value known=
    while IFS='|' read -r row _ values; do
        [[ $row == *", stage $1" ]] || continue
        known+=" ${row%, stage *}"
        [[ $row == "$2, stage $1" ]] || continue
        for value in $values; do recipe[${value%%=*}]=${value#*=}; done
    done <<<"$PRESETS"
    ((${#recipe[@]})) || complain "environment PRESET=${2@Q}" "must be one of$known for this stage"
}

# training_options FREEZE_LANGUAGE_MODEL CONVERSATION_TEMPLATE: rows, with the defaults in which the stages differ.
training_options() {
    cat <<OPTIONS
PRESET|(none)|text|a published recipe; it fills in arguments given as - and defaults of options (table below)
FREEZE_LANGUAGE_MODEL|$1|one of true false|keep the language model as it is
FREEZE_VISION_TOWER|true|one of true false|keep the vision tower as it is
FREEZE_PROJECTOR|false|one of true false|keep the projector as it is
FEATURE_CACHE|(none)|a folder of cache_tower_features.py|features of the training images, read in place of decoding them and running the frozen vision tower
CONVERSATION_TEMPLATE|$2|auto, a built-in template, or a .json or .yaml file|how turns become text; auto: the one the checkpoint was trained with in stage 2, else the one that fits the language model; built in: megatron_patch/data/conversation_templates
IMAGE_CONV_FRONT|auto|one of auto true false|images stand before the conversation; auto: as the checkpoint was trained, else false
IMAGE_START_END|auto|one of auto true false|each image stands between <im_start> and <im_end>, which the tokenizer must know; auto: as the checkpoint was trained, else false
IMAGE_ASPECT_RATIO|auto|one of auto crop pad stretch|how an image becomes square; auto: as the checkpoint was trained, else crop
IMAGE_TILES|auto|COLUMNSxROWS, as 2x2, or auto|each image becomes that many tiles and a thumbnail, of SEQ_LEN tokens each; 1x1: only the image; auto: as the checkpoint was trained, else 1x1
EXIF_ORIENTATION|auto|one of auto true false|turn images as their EXIF tag says; false: as LLaVA's original code; auto: as the checkpoint was trained, else true
DATA_ORDER|cyclic|one of cyclic single modality|cyclic: shuffled each epoch; single: as stored; modality: text and images in steps of their own, of like length
MEGA_BATCH_MULT|50|$COUNT|with DATA_ORDER=modality: steps that are sorted by length together
PADDING_FREE|auto|one of auto true false|records of a micro-batch stand in one row where they would be padded to the longest; same result, less work; auto: without Transformer Engine
BALANCE_COST|false|one of true false|the records of a step are dealt to ranks and micro-batches so that all ranks have as much to do, by tokens, pairs of tokens and images
PACKING|false|one of true false|several records fill a row of DECODER_SEQ_LEN tokens and do not see each other; BATCH_SIZE then counts rows
MAX_SKIPPED|0.01|a number from 0|share of the records that may be unusable before the run stops
TOKENIZER_PATH|(the checkpoint's)|a folder with LLaVA configuration and tokenizer|only with PRETRAIN_CHECKPOINT_PATH=none, and then required (llava/ of a checkpoint is one)
FSDP|false|one of false full hybrid grad|sharded weights or gradients: refused, with the reason; DO=true shares out the optimizer state
FIRST_STAGE_LAYERS|(layers / PP)|$COUNT|decoder layers of the first pipeline stage, which holds the vision tower too; the others share the rest
VIRTUAL_STAGES|1|a whole number from 1 to 999|virtual pipeline stages on each pipeline rank (interleaved schedule); above 1 needs PP above 1
RECOMPUTE_METHOD|uniform|one of uniform block|with AC=full: every RECOMPUTE_LAYERS layers as one piece, or only the first RECOMPUTE_LAYERS of a stage
RECOMPUTE_LAYERS|1|$COUNT|with AC=full: see RECOMPUTE_METHOD
TOWER_AC|(AC)|one of sel full false|what of the vision tower is recomputed, where it is trained
FP8_FORMAT|hybrid|one of hybrid e4m3|with PR=fp8: e5m2 for gradients, or e4m3 for all
FP8_RECIPE|tensorwise|one of tensorwise delayed|with PR=fp8: scales of the present tensor (current scaling), or from the amax history
FP8_MARGIN|0|a whole number from 0 to 99|with FP8_RECIPE=delayed: powers of two that scales stay below the largest
FP8_AMAX_HISTORY|1024|$COUNT|with FP8_RECIPE=delayed: length of the amax history
FP8_AMAX_ALGORITHM|max|one of max most_recent|with FP8_RECIPE=delayed: which of the history counts
ON_BAD_LOSS|stop|one of stop skip rollback|a loss or gradient that is not finite, or a loss spike: end; drop this step; start again from the last checkpoint and leave it out
SPIKE_FACTOR|0|a number from 0|a loss above so many times the median of the last 50 is bad too; 0: none is
MAX_ROLLBACKS|3|a whole number from 0 to 99|with ON_BAD_LOSS=rollback: after so many the run ends
TIME_LIMIT|(none)|$COUNT|minutes from the start, before whose end the run saves and ends with exit code 0
KEEP_LAST|0|$COUNT_OR_ZERO|checkpoints that are retained, older ones are deleted; 0: all
KEEP_BEST|false|one of true false|retain the best validation as checkpoint/best, saving it where none was due
BEST_BY|loss|one of loss score|what KEEP_BEST goes by: the lowest validation loss, or the highest score of EVAL_BENCHMARK
DETERMINISTIC|false|one of true false|only operations that give the same bits again; slower
ASYNC_SAVE|false|one of true false|checkpoints are written by a process of their own while training goes on
ACCELERATOR|auto|auto or an accelerator|auto: GPUs where there are any, else cpu; accelerators: megatron_patch/device
NPROC_PER_NODE|(see meaning)|a whole number from 1 to 4096|processes on this node: all visible GPUs, on CPU TP x PP x CP, with ENV=dlc what the job says
MASTER_PORT|(a free one)|a whole number from 1 to 65535|port where the processes meet
NUM_WORKERS|2|a whole number from 0 to 999|loader processes per rank; may change on resuming
SEED|1234|$COUNT|seed of weights, order of the data and dropout
LOG_INTERVAL|1|$COUNT|iterations from one line of the log to the next
EVAL_INTERVAL|1000|$COUNT|iterations from one validation to the next
EVAL_ITERS|10|$COUNT_OR_ZERO|batches per validation; 0: none
SAMPLE_ANSWERS|0|a whole number from 0 to 99|questions of the validation data that the model answers at each validation, for TensorBoard and answers/ (4 is a good number)
EVAL_BENCHMARK|(none)|a benchmark of evaluate_llava.sh|benchmark that the model answers at each validation: its score as a curve, benchmark/ with answers and a sheet of them over time
EVAL_BENCHMARK_DATA|(none)|a file or folder|the files of EVAL_BENCHMARK, as evaluate_llava.sh --data
EVAL_BENCHMARK_IMAGES|(none)|a folder|its images, where they do not lie beside its files
EVAL_BENCHMARK_QUESTIONS|64|$COUNT|so many of its questions, evenly chosen
PROFILE|(none)|iterations, as 10-12|iterations to trace
PROFILER|torch|one of torch nsys|torch: traces below profile/; nsys: start the launcher under nsys profile -c cudaProfilerApi, on GPUs
PROFILE_RANKS|0|ranks, as 0,1|processes to trace
WANDB_PROJECT|(see meaning)|text|llava; W&B is told all that TensorBoard is when WANDB_API_KEY is in the environment, or WANDB_MODE=offline
WANDB_NAME|(last folder of OUTPUT_BASEPATH)|text|name of the run at W&B
CHECK|true|one of true false|look at tokenizer, template, data and the run to resume before anything is created
WEIGHT_DECAY|0|a number from 0|weight decay of AdamW
VISION_TOWER_LR|(LR)|a number above 0|highest learning rate of the vision tower; its lowest keeps the ratio of MIN_LR to LR
PROJECTOR_LR|(LR)|a number above 0|the same of the projector
VISION_TOWER_WEIGHT_DECAY|(WEIGHT_DECAY)|a number from 0|weight decay of the vision tower
PROJECTOR_WEIGHT_DECAY|(WEIGHT_DECAY)|a number from 0|weight decay of the projector
EMA_DECAY|0|a number from 0 to below 1|decay of a moving average of the trained weights, saved in checkpoint/average beside each checkpoint; 0: none
ADAM_BETA2|0.95|a number from 0 to below 1|second beta of AdamW; the first is 0.9
CLIP_GRAD|1.0|a number from 0|largest gradient norm; 0: not limited
$COMMON_OPTIONS
OPTIONS
}

# launch_llava STAGE TITLE FREEZE_LANGUAGE_MODEL CONVERSATION_TEMPLATE [ARGUMENT...]: one stage of LLaVA training.
launch_llava() {
    local stage=$1 title=$2 options
    options=$(training_options "$3" "$4")
    shift 4
    if [[ ${1:-} == --help || ${1:-} == -h ]]; then
        show_training_help "$title" "$options"
        exit 0
    fi
    [[ -z ${PRESET:-} ]] || apply_preset "$stage" "$PRESET"
    local -a given=()
    local name value
    while IFS='|' read -r name _; do
        ((${#given[@]} < $#)) || break
        value=${*:${#given[@]} + 1:1}
        [[ $value != - ]] || value=${recipe[$name]:--}
        given+=("$value")
    done <<<"$TRAINING_ARGUMENTS"
    read_arguments "$TRAINING_ARGUMENTS" 24 "${given[@]}"
    read_options "$options"
    [[ ${arg[ENV]} != dlc ]] || read_cluster "$CLUSTER_VARIABLES"
    choose_python
    check_extra_arguments "${@:24}"
    check_training
    stop_if_wrong
    tell_notes
    absolute DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH OUTPUT_BASEPATH TOKENIZER_PATH FEATURE_CACHE \
        EVAL_BENCHMARK_DATA EVAL_BENCHMARK_IMAGES
    [[ ! -f ${arg[CONVERSATION_TEMPLATE]} ]] || absolute CONVERSATION_TEMPLATE
    start_arguments "${arg[OUTPUT_BASEPATH]}"
    command+=("$repository/examples/llava_mcore/pretrain_llava.py")
    training_arguments
    # Stage 1 is where a new projector is trained; in stage 2 it is an error.
    [[ $stage != 1 ]] || command+=(--allow-fresh-projector)
    command+=("${@:24}")
    start
}

show_training_help() {
    printf 'usage: bash %q %s [MEGATRON ARGUMENTS]\n\n%s\n' "$0" "$(cut -d'|' -f1 <<<"$TRAINING_ARGUMENTS" | xargs)" "$1"
    printf 'Arguments after the 23rd go to Megatron as they are; the first of them begins with --.\n'
    show_rows "Arguments" "$TRAINING_ARGUMENTS" numbered
    show_rows "Options, from the environment: name, default, value" "$2" options
    show_rows "Presets: name and stage, source, values" "$PRESETS"
    show_rows "Required in the environment when ENV=dlc" "$CLUSTER_VARIABLES"
}

check_extra_arguments() {
    [[ -z ${1+set} || $1 == --?* ]] ||
        complain "argument 24 ${1@Q}" "must begin with -- (after the 23 come Megatron's own); quote values that hold spaces"
}

# check_training: the rules that hold between rows; each looks only at rows that are right by themselves.
check_training() {
    local world model_parallel data_parallel batch
    if right LR MIN_LR && ! at_most "${arg[MIN_LR]}" "${arg[LR]}"; then
        refuse MIN_LR "must be at most LR=${arg[LR]}"
    fi
    if right SEQ_LEN DECODER_SEQ_LEN IMAGE_TILES; then
        local tiles=${arg[IMAGE_TILES]} image=${arg[SEQ_LEN]} what="SEQ_LEN=${arg[SEQ_LEN]}"
        if [[ $tiles == auto ]]; then
            tiles=$(note "${arg[PRETRAIN_CHECKPOINT_PATH]}/llava/llava_training.json" image_tiles)
            tiles=${tiles:-1x1}
        fi
        tiles=$((${tiles/x/*}))
        if ((tiles > 1)); then
            image=$((arg[SEQ_LEN] * (tiles + 1)))
            what="$image, SEQ_LEN=${arg[SEQ_LEN]} for each of $tiles tiles and the thumbnail"
        fi
        ((arg[DECODER_SEQ_LEN] > image)) ||
            refuse DECODER_SEQ_LEN "must be more than $what: it counts the image tokens and the text"
    fi
    if right FSDP && [[ ${arg[FSDP]} != false ]]; then
        refuse FSDP "is not offered: with megatron-core 0.19.2 torch FSDP2 scales the gradients of a per-token loss wrongly and cannot resume, Megatron-FSDP cannot save a LLaVA; use DO=true, TP or PP"
    fi
    if right PACKING DATA_ORDER && [[ ${arg[PACKING]} == true && ${arg[DATA_ORDER]} == modality ]]; then
        refuse DATA_ORDER "is not for PACKING=true: packed rows are all of one length"
    fi
    if right PACKING BALANCE_COST && [[ ${arg[PACKING]} == true && ${arg[BALANCE_COST]} == true ]]; then
        refuse BALANCE_COST "is not for PACKING=true: packed rows are all of one length"
    fi
    if right TRAIN_ITERS LR_WARMUP_ITERS && ((arg[LR_WARMUP_ITERS] >= arg[TRAIN_ITERS])); then
        refuse LR_WARMUP_ITERS "must be less than TRAIN_ITERS=${arg[TRAIN_ITERS]}"
    fi
    if right PRETRAIN_CHECKPOINT_PATH TOKENIZER_PATH; then
        if [[ ${arg[PRETRAIN_CHECKPOINT_PATH]} == none && -z ${arg[TOKENIZER_PATH]} ]]; then
            refuse PRETRAIN_CHECKPOINT_PATH "needs TOKENIZER_PATH in the environment: a folder with LLaVA configuration and tokenizer"
        elif [[ ${arg[PRETRAIN_CHECKPOINT_PATH]} != none && -n ${arg[TOKENIZER_PATH]} ]]; then
            refuse TOKENIZER_PATH "is only for PRETRAIN_CHECKPOINT_PATH=none: a checkpoint brings its own tokenizer"
        fi
    fi
    if right PRETRAIN_CHECKPOINT_PATH TOKENIZER_PATH; then
        check_against "${arg[TOKENIZER_PATH]:-${arg[PRETRAIN_CHECKPOINT_PATH]}/llava}"
    fi
    if right DO OPTIMIZER_OFFLOAD && [[ ${arg[OPTIMIZER_OFFLOAD]} != false && ${arg[DO]} != true ]]; then
        refuse OPTIMIZER_OFFLOAD "needs DO=true: only the distributed optimizer can keep its state in host memory"
    fi
    if right WORLD_SIZE RANK && [[ ${arg[ENV]} == dlc ]] && ((arg[RANK] >= arg[WORLD_SIZE])); then
        refuse RANK "must be less than WORLD_SIZE=${arg[WORLD_SIZE]} (nodes, counted from 0)"
    fi
    if right PP FIRST_STAGE_LAYERS VIRTUAL_STAGES && ((arg[PP] == 1)); then
        [[ -z ${arg[FIRST_STAGE_LAYERS]} ]] || refuse FIRST_STAGE_LAYERS "needs PP above 1"
        ((arg[VIRTUAL_STAGES] == 1)) || refuse VIRTUAL_STAGES "needs PP above 1"
    fi
    if right KEEP_BEST EVAL_ITERS && [[ ${arg[KEEP_BEST]} == true && ${arg[EVAL_ITERS]} == 0 ]]; then
        refuse KEEP_BEST "needs EVAL_ITERS above 0: without validation none is the best"
    fi
    if right SPIKE_FACTOR && at_most "${arg[SPIKE_FACTOR]}" 1 && ! at_most "${arg[SPIKE_FACTOR]}" 0; then
        refuse SPIKE_FACTOR "must be 0 or above 1: at 1 half of all losses would be bad"
    fi
    check_reports
    right TP PP CP || return 0
    model_parallel=$((arg[TP] * arg[PP] * arg[CP]))
    if right DECODER_SEQ_LEN; then
        local slice=$((arg[TP] * arg[CP])) # context parallelism gives every rank two slices, sequence parallelism cuts them
        ((arg[CP] == 1 || arg[TP] % 2 == 0)) || slice=$((2 * slice))
        ((arg[DECODER_SEQ_LEN] % slice == 0)) ||
            refuse DECODER_SEQ_LEN "must be divisible by $slice: TP=${arg[TP]} and CP=${arg[CP]} cut the sequence"
    fi
    right ENV ACCELERATOR NPROC_PER_NODE MASTER_PORT || return 0
    [[ ${arg[ENV]} != dlc ]] || right WORLD_SIZE RANK MASTER_ADDR KUBERNETES_CONTAINER_RESOURCE_GPU || return 0
    choose_machine "$model_parallel" || return 0
    local row
    for row in "${refused[@]}"; do
        [[ $row != "PROFILER="* || -n ${arg[PROFILE]} ]] || continue
        [[ ${row%% *} != "${row%%=*}=${arg[${row%%=*}]}" ]] || refuse "${row%%=*}" "${row#* }"
    done
    right ACCELERATOR NPROC_PER_NODE || return 0
    world=$((processes * nodes))
    if ((world % model_parallel)); then
        refuse TP "x PP=${arg[PP]} x CP=${arg[CP]} = $model_parallel must divide the $world processes ($nodes nodes x $processes)"
        return
    fi
    if right PROFILE_RANKS; then
        local rank
        for rank in ${arg[PROFILE_RANKS]//,/ }; do
            ((rank < world)) || refuse PROFILE_RANKS "must be less than $world, the number of processes"
        done
    fi
    data_parallel=$((world / model_parallel))
    if right BATCH_SIZE GLOBAL_BATCH_SIZE VIRTUAL_STAGES; then
        batch=$((arg[BATCH_SIZE] * data_parallel))
        ((arg[GLOBAL_BATCH_SIZE] % batch == 0)) ||
            refuse GLOBAL_BATCH_SIZE "must be divisible by $batch: BATCH_SIZE=${arg[BATCH_SIZE]} x data-parallel size $data_parallel"
        ((arg[VIRTUAL_STAGES] == 1 || arg[GLOBAL_BATCH_SIZE] % (batch * arg[PP]) == 0)) ||
            refuse GLOBAL_BATCH_SIZE "must be divisible by $((batch * arg[PP])): with VIRTUAL_STAGES the micro-batches of a step come in groups of PP=${arg[PP]}"
    fi
}

# check_reports: the rules about what a run reports.
check_reports() {
    if right SAMPLE_ANSWERS EVAL_ITERS && ((arg[SAMPLE_ANSWERS] > 0 && arg[EVAL_ITERS] == 0)); then
        refuse SAMPLE_ANSWERS "needs EVAL_ITERS above 0: the model answers at validations"
    fi
    if right EVAL_BENCHMARK EVAL_BENCHMARK_DATA EVAL_ITERS BEST_BY; then
        if [[ -n ${arg[EVAL_BENCHMARK]} ]]; then
            [[ -n ${arg[EVAL_BENCHMARK_DATA]} ]] || refuse EVAL_BENCHMARK "needs EVAL_BENCHMARK_DATA, its files"
            ((arg[EVAL_ITERS] > 0)) || refuse EVAL_BENCHMARK "needs EVAL_ITERS above 0: it is asked at validations"
        else
            [[ -z ${arg[EVAL_BENCHMARK_DATA]} ]] || refuse EVAL_BENCHMARK_DATA "needs EVAL_BENCHMARK, its name"
            [[ ${arg[BEST_BY]} != score ]] || refuse BEST_BY "needs EVAL_BENCHMARK, which gives the score"
        fi
    fi
    if right PROFILE TRAIN_ITERS && [[ -n ${arg[PROFILE]} ]] && ((${arg[PROFILE]#*-} > arg[TRAIN_ITERS])); then
        refuse PROFILE "must end by TRAIN_ITERS=${arg[TRAIN_ITERS]}"
    fi
    if [[ -n ${arg[WANDB_PROJECT]}${arg[WANDB_NAME]} && ${WANDB_MODE:-} != disabled ]] && ! wandb_wanted; then
        complain "environment WANDB_PROJECT or WANDB_NAME" "needs WANDB_API_KEY in the environment, or WANDB_MODE=offline"
    fi
}

# wandb_wanted: is there a key for W&B, which is never passed on as an argument, or is it to write files only?
wandb_wanted() {
    [[ ${WANDB_MODE:-} != disabled && (-n ${WANDB_API_KEY:-} || ${WANDB_MODE:-} == offline) ]]
}

# check_against FOLDER: the arguments that repeat what the llava/ folder of the checkpoint knows.
check_against() {
    local size tokens
    size=$(note "$1/provenance.json" model_size)
    if right MODEL_SIZE && [[ -n $size && $size != "${arg[MODEL_SIZE]}" ]]; then
        refuse MODEL_SIZE "must be $size: with that PRETRAIN_CHECKPOINT_PATH was converted"
    fi
    tokens=$(note "$1/config.json" image_seq_length)
    if right SEQ_LEN && [[ -n $tokens && $tokens != "${arg[SEQ_LEN]}" ]]; then
        refuse SEQ_LEN "must be $tokens: so many tokens the checkpoint's vision tower makes of an image"
    fi
}

# training_arguments: the arguments for Megatron's parser and our own. Those of geometry, tokenizer and device are not among
# them: pretrain_llava.py takes those from the checkpoint and the machine.
training_arguments() {
    local output=${arg[OUTPUT_BASEPATH]}
    command+=(
        --micro-batch-size "${arg[BATCH_SIZE]}" --global-batch-size "${arg[GLOBAL_BATCH_SIZE]}"
        --lr "${arg[LR]}" --min-lr "${arg[MIN_LR]}" --lr-decay-style cosine
        --lr-warmup-iters "${arg[LR_WARMUP_ITERS]}"
        --train-iters "${arg[TRAIN_ITERS]}" --lr-decay-iters "${arg[TRAIN_ITERS]}" # the warm-up is inside
        --weight-decay "${arg[WEIGHT_DECAY]}" --adam-beta1 0.9 --adam-beta2 "${arg[ADAM_BETA2]}"
        --clip-grad "${arg[CLIP_GRAD]}"
        --attention-dropout 0 --hidden-dropout 0
        --seq-length "${arg[DECODER_SEQ_LEN]}"
        --tensor-model-parallel-size "${arg[TP]}" --pipeline-model-parallel-size "${arg[PP]}"
        --context-parallel-size "${arg[CP]}"
        # Ranks see different numbers of labels: without it their mean is of means, 5.6e-2 off under CP.
        --calculate-per-token-loss
        --save "$output/checkpoint" --load "$output/checkpoint" --save-interval "${arg[SAVE_INTERVAL]}"
        --ckpt-format torch_dist
        --override-opt-param-scheduler # resumed with another LR or TRAIN_ITERS: what is typed now holds
        --tensorboard-dir "$output/tensorboard" --log-interval "${arg[LOG_INTERVAL]}"
        --log-timers-to-tensorboard --log-validation-ppl-to-tensorboard
        --eval-interval "${arg[EVAL_INTERVAL]}" --eval-iters "${arg[EVAL_ITERS]}"
        --num-workers "${arg[NUM_WORKERS]}" --seed "${arg[SEED]}" --distributed-timeout-minutes 60
    )
    ((arg[TP] == 1)) || command+=(--sequence-parallel)
    ((arg[VIRTUAL_STAGES] == 1)) || command+=(--num-virtual-stages-per-pipeline-rank "${arg[VIRTUAL_STAGES]}")
    [[ -z ${arg[FIRST_STAGE_LAYERS]} ]] || command+=(--decoder-first-pipeline-num-layers "${arg[FIRST_STAGE_LAYERS]}")
    precision_arguments
    memory_arguments
    report_arguments
    # Ours.
    command+=(
        --train-dataset-path "${arg[DATASET_PATH]}" --valid-dataset-path "${arg[VALID_DATASET_PATH]}"
        --init-from "${arg[PRETRAIN_CHECKPOINT_PATH]}" --model-size "${arg[MODEL_SIZE]}"
        --image-tokens "${arg[SEQ_LEN]}" --image-aspect-ratio "${arg[IMAGE_ASPECT_RATIO]}"
        --image-tiles "${arg[IMAGE_TILES]}" --data-order "${arg[DATA_ORDER]}" --mega-batch-mult "${arg[MEGA_BATCH_MULT]}"
        --max-skipped-share "${arg[MAX_SKIPPED]}"
        --conversation-template "${arg[CONVERSATION_TEMPLATE]}"
        --optimizer-offload-policy "${arg[OPTIMIZER_OFFLOAD]}"
    )
    local name option
    for name in VISION_TOWER_LR PROJECTOR_LR VISION_TOWER_WEIGHT_DECAY PROJECTOR_WEIGHT_DECAY; do
        [[ -z ${arg[$name]} ]] || { option=${name,,} && command+=("--${option//_/-}" "${arg[$name]}"); }
    done
    safeguard_arguments
    [[ ${arg[EMA_DECAY]} =~ ^[0.]+$ ]] || command+=(--ema-decay "${arg[EMA_DECAY]}")
    [[ -z ${arg[TOKENIZER_PATH]} ]] || command+=(--tokenizer-path "${arg[TOKENIZER_PATH]}")
    [[ -z ${arg[FEATURE_CACHE]} ]] || command+=(--feature-cache "${arg[FEATURE_CACHE]}")
    for name in IMAGE_CONV_FRONT IMAGE_START_END PADDING_FREE; do
        option=${name,,} && option=${option//_/-}
        case ${arg[$name]} in
            true) command+=("--$option") ;;
            false) command+=("--no-$option") ;;
        esac
    done
    case ${arg[EXIF_ORIENTATION]} in
        true) command+=(--no-ignore-exif-orientation) ;;
        false) command+=(--ignore-exif-orientation) ;;
    esac
    [[ ${arg[PACKING]} != true ]] || command+=(--packing)
    [[ ${arg[BALANCE_COST]} != true ]] || command+=(--balance-cost)
    [[ ${arg[FREEZE_LANGUAGE_MODEL]} != true ]] || command+=(--freeze-language-model)
    [[ ${arg[FREEZE_VISION_TOWER]} != true ]] || command+=(--freeze-vision-tower)
    [[ ${arg[FREEZE_PROJECTOR]} != true ]] || command+=(--freeze-projector)
}

# safeguard_arguments: what ends a run early, and which checkpoints are retained.
safeguard_arguments() {
    command+=(
        --on-bad-loss "${arg[ON_BAD_LOSS]}" --spike-factor "${arg[SPIKE_FACTOR]}"
        --bad-batches-file "${arg[OUTPUT_BASEPATH]}/bad_batches.jsonl" --keep-last "${arg[KEEP_LAST]}"
    )
    [[ ${arg[KEEP_BEST]} != true ]] || command+=(--keep-best --best-by "${arg[BEST_BY]}")
    if [[ -n ${arg[TIME_LIMIT]} ]]; then
        local now
        printf -v now '%(%s)T' -1
        command+=(--stop-at "$((now + 60 * arg[TIME_LIMIT]))")
    fi
    if [[ ${arg[DETERMINISTIC]} == true ]]; then
        # Libraries read these at first use, which may be before Megatron's parser would set them.
        environment+=(
            "NCCL_ALGO=${NCCL_ALGO:-Ring}" "CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}"
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO=${NVTE_ALLOW_NONDETERMINISTIC_ALGO:-0}"
        )
        command+=(--deterministic-mode)
    fi
}

# report_arguments: what the run reports beside checkpoints.
report_arguments() {
    local output=${arg[OUTPUT_BASEPATH]} first=${arg[PROFILE]%-*} last=${arg[PROFILE]#*-}
    local -a ranks=()
    command+=(--output-path "$output" --sample-answers "${arg[SAMPLE_ANSWERS]}")
    if [[ -n ${arg[EVAL_BENCHMARK]} ]]; then
        command+=(
            --eval-benchmark "${arg[EVAL_BENCHMARK]}" --eval-benchmark-data "${arg[EVAL_BENCHMARK_DATA]}"
            --eval-benchmark-questions "${arg[EVAL_BENCHMARK_QUESTIONS]}"
        )
        [[ -z ${arg[EVAL_BENCHMARK_IMAGES]} ]] || command+=(--eval-benchmark-images "${arg[EVAL_BENCHMARK_IMAGES]}")
    fi
    if [[ -n ${arg[PROFILE]} ]]; then
        IFS=, read -ra ranks <<<"${arg[PROFILE_RANKS]}"
        if [[ ${arg[PROFILER]} == torch ]]; then
            command+=(--trace-iterations "$first" "$last" --trace-ranks "${ranks[@]}")
        else # Megatron begins before the iteration that follows the first number
            command+=(
                --profile --profile-step-start "$((first - 1))" --profile-step-end "$last"
                --profile-ranks "${ranks[@]}" --nvtx-ranges
            )
        fi
    fi
    if wandb_wanted; then
        command+=(
            --wandb-project "${arg[WANDB_PROJECT]:-llava}"
            --wandb-exp-name "${arg[WANDB_NAME]:-$(basename -- "$output")}" --wandb-save-dir "$output"
        )
    fi
    # launch.py passes lines on, so no process sees the terminal: progress.py opens it by its name.
    [[ ! -t 2 ]] || environment+=("LLAVA_TERMINAL=$(tty <&2)")
}

precision_arguments() {
    case ${arg[PR]} in
        fp16) # the gradient of a loss summed over all labels overflows 16 bits, and a first scale of 2^32 too: steps are skipped
            command+=(--fp16 --initial-loss-scale 65536 --accumulate-allreduce-grads-in-fp32)
            ;;
        bf16) command+=(--bf16) ;;
        fp8)
            command+=(--bf16 --fp8-format "${arg[FP8_FORMAT]}" --fp8-recipe "${arg[FP8_RECIPE]}")
            if [[ ${arg[FP8_RECIPE]} == delayed ]]; then
                printf 'FP8_RECIPE=delayed: Transformer Engine from 2.17.1 on refuses the amax history of a checkpoint, so no run can resume or start from those of this one\n' >&2
                command+=(
                    --fp8-margin "${arg[FP8_MARGIN]}" --fp8-amax-history-len "${arg[FP8_AMAX_HISTORY]}"
                    --fp8-amax-compute-algo "${arg[FP8_AMAX_ALGORITHM]}"
                )
            fi
            ;;
    esac
    # Transformer Engine's flash-attn and cuDNN attention are for 16 bits; the choice of FL=true falls back for fp32.
    if ((${#attention_backends[@]})); then
        local attention=${attention_backends[0]}
        [[ ${arg[FL]} == true || ${arg[PR]} == fp32 ]] || attention=${attention_backends[1]}
        command+=(--attention-backend "$attention")
    fi
}

memory_arguments() {
    case ${arg[AC]} in
        true)
            printf 'AC=true means AC=sel: attention is recomputed in the backward pass\n' >&2
            command+=(--recompute-granularity selective)
            ;;
        sel) command+=(--recompute-granularity selective) ;;
        full)
            command+=(
                --recompute-granularity full --recompute-method "${arg[RECOMPUTE_METHOD]}"
                --recompute-num-layers "${arg[RECOMPUTE_LAYERS]}"
            )
            ;;
        offload)
            environment+=(NVTE_CPU_OFFLOAD_V1=1) # Transformer Engine 2.10 and newer would move the weights too
            command+=(--fine-grained-activation-offloading --offload-modules qkv_linear core_attn attn_proj)
            ;;
    esac
    [[ -z ${arg[TOWER_AC]} ]] || command+=(--vision-tower-recompute "${arg[TOWER_AC]}")
    # Megatron's own writer; without the persistent worker it would quietly save as before.
    [[ ${arg[ASYNC_SAVE]} != true ]] || command+=(--async-save --async-strategy mcore --use-persistent-ckpt-worker)
    # Without the last two every data-parallel rank builds the whole optimizer state to save it, on GPU and host.
    [[ ${arg[DO]} != true ]] || command+=(
        --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable
        --distrib-optim-fully-reshardable-mem-efficient --ckpt-fully-parallel-load
    )
}
