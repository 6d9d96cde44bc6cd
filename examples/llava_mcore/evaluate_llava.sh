#!/usr/bin/env bash
# A trained LLaVA is asked the questions of a published benchmark, and its answers are scored. --help tells all.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # called with dash
# shellcheck source=examples/launcher.sh
. "$(dirname -- "$(readlink -f -- "$0")")/../launcher.sh"

read_options "$COMMON_OPTIONS"
choose_python
stop_if_wrong
environment=("PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}")
command=("${arg[PYTHON]}" -u -m megatron_patch.evaluation "$@")
start
