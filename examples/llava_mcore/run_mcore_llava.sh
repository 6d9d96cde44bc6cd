#!/usr/bin/env bash
# Stage 1 of LLaVA: trains the projector on captions; language model and vision tower are frozen. --help tells all.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # called with dash
# shellcheck source=examples/launcher.sh
. "$(dirname -- "$(readlink -f -- "$0")")/../launcher.sh"
launch stage1 "$@"
