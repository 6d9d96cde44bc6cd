# shellcheck shell=bash
# source examples/completion.bash: TAB behind `bash .../run_mcore_llava.sh` and the other launchers shows what may stand
# there; file names where a path is wanted. The words are those of the launchers' own rows.

_llava_repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

_llava_complete() {
    local script=${COMP_WORDS[1]:-} name python=${PYTHON:-python3}
    COMPREPLY=()
    [[ $COMP_CWORD -ge 2 && $script == *.sh && -r $script ]] || return 0
    name=$(sed -n 's/^launch \([a-z0-9]*\).*/\1/p' -- "$script")
    [[ -n $name ]] || return 0
    mapfile -t COMPREPLY < <("$python" -ISB "$_llava_repository/megatron_patch/launch/__main__.py" complete "$script" \
        "$name" "${COMP_WORDS[@]:2:COMP_CWORD-1}" 2>/dev/null)
    # a name that wants its value
    [[ ${#COMPREPLY[@]} != 1 || ${COMPREPLY[0]} != *= ]] || compopt -o nospace 2>/dev/null || true
}

complete -o default -F _llava_complete bash sh
