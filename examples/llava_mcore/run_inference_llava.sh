#!/usr/bin/env bash
# Answers questions about images with a trained LLaVA, one prompt or a file of them. --help tells all.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # called with dash
# shellcheck source=examples/launcher.sh
. "$(dirname -- "$(readlink -f -- "$0")")/../launcher.sh"
launch inference "$@"
