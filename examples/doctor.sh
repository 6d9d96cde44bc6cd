#!/usr/bin/env bash
# What of this machine training will use, what is broken and why. --help tells all.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # called with dash
# shellcheck source=examples/launcher.sh
. "$(dirname -- "$(readlink -f -- "$0")")/launcher.sh"
launch doctor "$@"
