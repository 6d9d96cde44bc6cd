#!/usr/bin/env bash
# Stage 2 of LLaVA: trains language model and projector on conversations; the vision tower is frozen. --help tells all.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # called with dash
# shellcheck source=examples/launcher.sh
. "$(dirname -- "$(readlink -f -- "$0")")/../launcher.sh"
launch stage2 "$@"
