#!/usr/bin/env bash
# Talk with a trained LLaVA in the terminal. --help tells all.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # called with dash
# shellcheck source=examples/launcher.sh
. "$(dirname -- "$(readlink -f -- "$0")")/../launcher.sh"
launch chat "$@"
