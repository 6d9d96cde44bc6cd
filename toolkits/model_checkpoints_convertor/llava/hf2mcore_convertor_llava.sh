#!/usr/bin/env bash
# Hugging Face language model + CLIP vision tower -> Megatron checkpoint, and back to Hugging Face. --help tells all.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # called with dash
# shellcheck source=examples/launcher.sh
. "$(dirname -- "$(readlink -f -- "$0")")/../../../examples/launcher.sh"
launch convert "$@"
