# shellcheck shell=bash
# The one library of the launchers; sourced under bash, never run. It finds Python and becomes megatron_patch/launch,
# which knows all arguments, rules and words.

set +o posix # as `sh` bash would refuse some of what follows
set -euo pipefail
unset CDPATH

repository=$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")

# launch COMMAND [WORD...]: becomes a command of megatron_patch/launch/commands.py.
launch() {
    local python=${PYTHON:-}
    if [[ -z $python ]]; then
        python=python3
        [[ ! -x $repository/.venv/bin/python ]] || python=$repository/.venv/bin/python
    fi
    if ! command -v -- "$python" >/dev/null; then
        printf 'error: 1 wrong or missing; nothing was started or written\n' >&2
        printf "  environment PYTHON='%s' must be a program: the Python interpreter that runs everything\n" "$python" >&2
        printf '  to set one up: bash %q\n' "$repository/examples/setup_environment.sh" >&2
        exit 2
    fi
    exec -- "$python" -ISB "$repository/megatron_patch/launch/__main__.py" "$1" "$0" "${@:2}"
}
