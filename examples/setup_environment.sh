#!/usr/bin/env bash
# Prepares the Python environment and prints the path of its interpreter, alone, on standard output:
#   python=$(bash examples/setup_environment.sh)
# Everything else goes to standard error. When all is there it takes well under three seconds.
#
# In this order it uses $PYTHON (refused if it does not satisfy requirements.txt), the active $VIRTUAL_ENV or the
# python3 of a container if they satisfy requirements.txt, else <repository>/.venv, which it makes or finishes.
# It writes nowhere outside the repository.
set -euo pipefail

# Builtins only up to the search for an interpreter: PATH may be empty.
[[ $0 != */* ]] || cd "${0%/*}"
cd ..
repository=$PWD
requirements=$repository/requirements.txt
environment=$repository/.venv
stamp=$environment/requirements.sha256 # written last; absent means interrupted
log=$environment/install.log
# Measured with torch's CUDA build: 5.9 GB installed, and 2.7 GB of downloads lie beside it until all are unpacked.
NEEDED_MB=9000

say() { printf '[%4d s] %s\n' "$SECONDS" "$*" >&2; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# check PYTHON: what of requirements.txt this interpreter lacks, on one line; nothing when it satisfies all.
# With a second argument the stamp file must hold the hash of requirements.txt as well.
check() {
    "$1" - "$requirements" "${2:-}" 2>/dev/null <<'PYTHON' || printf 'it cannot be started\n'
import sys
from hashlib import sha256
from importlib import metadata
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:
    print("it lacks packaging, torch or more")
    sys.exit()
text = Path(sys.argv[1]).read_text()
wrong = []
if sys.version_info < (3, 12):
    wrong.append(f"Python {sys.version_info[0]}.{sys.version_info[1]}, wanted 3.12 or newer")
for line in text.splitlines():
    line = line.partition("#")[0].strip()
    if not line:
        continue
    wanted = Requirement(line)
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        wrong.append(f"{wanted.name} is missing")
        continue
    # prereleases: the torch of a container calls itself 2.10.0a0+...
    if not wanted.specifier.contains(found, prereleases=True):
        wrong.append(f"{wanted.name} {found}, wanted {wanted.specifier}")
if not wrong and sys.argv[2]:
    stamp = Path(sys.argv[2])
    if not stamp.is_file() or stamp.read_text() != sha256(text.encode()).hexdigest():
        wrong.append("its installation was not finished")
print("; ".join(wrong))
PYTHON
}

# The first interpreter of 3.12 or newer that can make environments. PATH names are tried out, not trusted:
# pyenv's shims exist for versions that are not selected and then only print an error.
find_interpreter() {
    local candidate
    local -a candidates=(python3.12 python3.13 python3 python)
    candidates+=("${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}"/versions/3.1[2-9]*/bin/python3)
    candidates+=("${HOME:-/nonexistent}"/.pyenv/versions/3.1[2-9]*/bin/python3)
    if command -v uv >/dev/null; then
        candidates+=("$(uv python find '>=3.12' 2>/dev/null || true)")
    fi
    without_venv=
    for candidate in "${candidates[@]}"; do
        candidate=$(command -v "$candidate") || continue
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            interpreter=$candidate
            return
        fi
        without_venv=$candidate
    done
    if [[ -n $without_venv ]]; then
        fail "$without_venv is new enough but cannot make environments; install its venv package" \
            "(Debian and Ubuntu: apt install python3.12-venv), then run the same command again"
    fi
    fail "no Python 3.12 or newer found (looked for python3.12, python3.13 and python3 on PATH, in pyenv's versions" \
        "folder and with uv); install one, for example with 'uv python install 3.12', 'pyenv install 3.12' or" \
        "'apt install python3.12 python3.12-venv', then run the same command again"
}

require_disk() {
    local free_mb held_mb=0
    free_mb=$(df -Pm "$repository" | awk 'NR == 2 {print $4}')
    if [[ -d $environment ]]; then
        held_mb=$(du -sm "$environment" | awk '{print $1}')
    fi
    if ((free_mb + held_mb < NEEDED_MB)); then
        fail "the installation needs $((NEEDED_MB - held_mb)) MB of disk below $repository, but only $free_mb MB are" \
            "free; free some space there, then run the same command again"
    fi
}

# One tiny download tells a missing package index within seconds instead of minutes of retries.
require_index() {
    local probe=$environment/probe answer reason
    if ! answer=$("$python" -m pip download --quiet --no-cache-dir --retries 1 --timeout 20 --no-deps --dest "$probe" \
        "$(grep -m 1 '^packaging==' "$requirements")" 2>&1); then
        reason=$(grep -oE "(Failed to establish|Temporary failure|timed out|SSLError|ProxyError|No space)[^'\"(]*" \
            <<<"$answer" | head -n 1 || true)
        fail "pip cannot fetch packages from its index: ${reason:-${answer##*$'\n'}}. Check the network, or name an" \
            "index that this machine can reach, for example PIP_INDEX_URL=<your mirror>/simple (and PIP_CERT or" \
            "HTTPS_PROXY if it needs them), then run the same command again"
    fi
    rm -rf "$probe"
}

make_environment() {
    local -a options=()
    find_interpreter
    mkdir -p "$environment"
    # A container's torch and Transformer Engine were built for each other and for its GPU: build on them.
    if "$interpreter" -c 'from importlib import metadata as m; m.version("torch"); m.version("transformer-engine")' \
        2>/dev/null; then
        options+=(--system-site-packages)
        say "$interpreter brings torch and Transformer Engine: .venv adds to them"
    fi
    say "making .venv with $interpreter"
    "$interpreter" -m venv --clear "${options[@]}" "$environment" >&2
}

install_requirements() {
    local pip_pid shown=0 unfinished
    local -a arguments=(-m pip install --no-cache-dir --disable-pip-version-check --log "$log" -r "$requirements")
    # pip writes INSTALLER after a package's files: without it the package is half unpacked and must not count.
    for unfinished in "$environment"/lib/python3*/site-packages/*.dist-info; do
        [[ -e $unfinished/INSTALLER || ! -d $unfinished ]] || rm -rf "$unfinished"
    done
    # pip unpacks its downloads in TMPDIR: keep them on the disk whose space was looked at, and inside the repository.
    rm -rf "$environment/tmp"
    mkdir "$environment/tmp"
    export TMPDIR=$environment/tmp
    if "$python" -c 'from importlib import metadata as m; m.version("transformer-engine")' 2>/dev/null; then
        "$python" -c 'from importlib import metadata as m; print("torch==" + m.version("torch"))' \
            >"$environment/constraints.txt"
        export PIP_CONSTRAINT=$environment/constraints.txt # instead of the container's own, which pins other things
    fi
    rm -f "$log"
    say "installing requirements.txt into .venv (2.7 GB to fetch on a fresh machine; log: $log)"
    if [[ -t 2 ]]; then
        "$python" "${arguments[@]}" >&2 || install_failed
    else
        "$python" "${arguments[@]}" >/dev/null 2>&1 &
        pip_pid=$!
        trap 'kill "$pip_pid" 2>/dev/null; exit 130' INT TERM
        while kill -0 "$pip_pid" 2>/dev/null; do
            sleep 1
            if ((SECONDS - shown >= 20)); then
                shown=$SECONDS
                say "$(grep -oE '(Downloading|Installing collected packages:|Using cached|Collecting) [^ ]*' "$log" |
                    tail -n 1)"
            fi
        done
        wait "$pip_pid" || install_failed
        trap - INT TERM
    fi
    rm -rf "$environment/tmp"
}

install_failed() {
    tail -n 15 "$log" | cut -c 1-300 >&2 || true
    fail "pip could not install requirements.txt (see above; whole log: $log)." \
        "Run the same command again: what is already installed is kept"
}

has_gpu() { [[ -e /proc/driver/nvidia/version ]] || nvidia-smi -L >/dev/null 2>&1; }

# Says what of a compiler is missing: on a GPU torch.compile builds its kernels with it when training starts.
say_compiler() {
    local header
    if [[ -z ${CC:-} ]] && ! command -v gcc clang >/dev/null; then
        say "warning: no C compiler found (looked for \$CC, gcc, clang), and training on a GPU needs one when it starts;" \
            "install one, for example with: apt install gcc"
    fi
    header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
    if [[ ! -f $header ]]; then
        say "warning: $header is missing, and training on a GPU needs it when it starts; install Python's headers, for" \
            "example with: apt install python3-dev"
    fi
}

# Says which accelerator the environment is for. Transformer Engine never belongs on a machine without CUDA.
say_device() {
    local engine
    engine=$("$python" -c 'from importlib import metadata as m; print(m.version("transformer-engine"))' 2>/dev/null || true)
    if has_gpu; then
        say_compiler
        if [[ -n $engine ]]; then
            say "NVIDIA driver found, Transformer Engine $engine is installed"
        else
            say "NVIDIA driver found, but no Transformer Engine: training uses Megatron's local layers. To add it:" \
                "$python -m pip install --no-build-isolation 'transformer-engine[pytorch,core_cu13]'"
        fi
        say "AC=offload needs two packages more: $python -m pip install nvidia-ml-py cuda-python"
    elif [[ -n $engine ]]; then
        say "warning: no NVIDIA driver, but Transformer Engine $engine is installed: if importing megatron fails," \
            "remove it with: $python -m pip uninstall transformer-engine"
    else
        say "no NVIDIA driver: training runs on the CPU, without Transformer Engine (do not install it here)"
    fi
}

use() {
    printf '%s\n' "$1"
    exit 0
}

if [[ -n ${PYTHON:-} ]]; then
    lacking=$(check "$PYTHON")
    [[ -z $lacking ]] && use "$PYTHON"
    fail "PYTHON=$PYTHON does not satisfy requirements.txt: $lacking. Install what is wanted there, or unset PYTHON to" \
        "let this script make .venv"
fi
if [[ -n ${VIRTUAL_ENV:-} && ! $VIRTUAL_ENV -ef $environment ]]; then
    lacking=$(check "$VIRTUAL_ENV/bin/python")
    [[ -z $lacking ]] && use "$VIRTUAL_ENV/bin/python"
    say "not using the active environment $VIRTUAL_ENV: $lacking"
fi
python=$environment/bin/python
if [[ -e $python ]]; then
    [[ -z $(check "$python" "$stamp") ]] && use "$python"
elif command -v python3 >/dev/null && [[ -z $(check python3) ]]; then
    use "$(command -v python3)"
fi

# From here on something has to be made.
if [[ -e $python ]] && ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
    say ".venv has no working Python 3.12 or newer and is made anew"
    rm -rf "$environment"
fi
[[ -e $python ]] || find_interpreter # before anything is created
require_disk
mkdir -p "$environment"
if command -v flock >/dev/null; then
    exec 9<"$environment" # the other README command may be installing at this moment
    flock 9
fi
"$python" -m pip --version >/dev/null 2>&1 || make_environment
if [[ -n $(check "$python" "$stamp") ]]; then
    [[ -z $(check "$python") ]] || require_index
    install_requirements
    lacking=$(check "$python")
    [[ -z $lacking ]] || fail "after the installation .venv still does not satisfy requirements.txt: $lacking"
    "$python" -c 'import sys, hashlib; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), end="")' \
        "$requirements" >"$stamp.tmp"
    mv "$stamp.tmp" "$stamp"
    say "environment ready: $python"
    say_device
fi
use "$python"
