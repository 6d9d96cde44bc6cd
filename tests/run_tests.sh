#!/usr/bin/env bash
# Sets up the environment if needed, then runs the tests.
#   bash tests/run_tests.sh                 all that are not marked slow
#   bash tests/run_tests.sh --all           the slow proofs too; names at its end what it left out, and why
#   bash tests/run_tests.sh [--all] ARGUMENTS   the arguments go to pytest (files, -k NAME, -x, ...)
#   bash tests/run_tests.sh --mutants       breaks one line at a time and looks whether the tests notice (over an hour)
#   bash tests/run_tests.sh --mutants TEXT  only those whose name, file or tests hold the text
# Without ARGUMENTS they run in one process per core; TEST_PROCESSES in the environment says how many.
# COLD_START=1 in the environment starts every run as a user's; else most start from tests/warm/server.py.
set -euo pipefail
cd "$(dirname "$0")/.."
selection=(-m "not slow")
if [[ ${1:-} == --all ]]; then
    selection=(-rs)
    shift
fi
PYTHON=$("$BASH" examples/setup_environment.sh)
export PYTHON
# A thousand starts of our own code, which Python would compile in each where it keeps no bytecode.
"$PYTHON" -m compileall -q megatron_patch examples toolkits tests || true # a folder that cannot be written to
# Many tests start two processes: one thread each, or they fight over the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ ${1:-} == --mutants ]]; then
    exec "$PYTHON" tests/run_mutants.py "${@:2}"
fi
# All of them: in as many processes as there are cores, each with whole files, whose tests share what is costly to make.
# nproc would count the threads of OMP_NUM_THREADS.
(($# > 0)) || selection+=(-n "${TEST_PROCESSES:-$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)}" --dist loadfile --no-loadscope-reorder)
exec "$PYTHON" -m pytest "${selection[@]}" "$@"
