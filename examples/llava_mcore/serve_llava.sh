#!/usr/bin/env bash
# Serves a trained LLaVA: an endpoint like that of OpenAI and a web page. --help tells all.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # called with dash
# shellcheck source=examples/launcher.sh
. "$(dirname -- "$(readlink -f -- "$0")")/../launcher.sh"
launch serve "$@"
