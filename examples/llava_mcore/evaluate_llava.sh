#!/usr/bin/env bash
# Asks a trained LLaVA the questions of a published benchmark and scores its answers. --help tells all.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # called with dash
# shellcheck source=examples/launcher.sh
. "$(dirname -- "$(readlink -f -- "$0")")/../launcher.sh"
launch evaluate "$@"
