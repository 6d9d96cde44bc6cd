"""doctor.sh: what of this machine training will use, what is broken and why, and what would give more.

What has to be imported to be known is imported by a Python of its own each, whose real error is shown.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_patch import device
from megatron_patch.cpp_compiler import cpp_compiler, why_none
from megatron_patch.launch.machine import INTERFACES, cores
from megatron_patch.launch.rows import default_python
from megatron_patch.launch.rules import REPOSITORY

ABOUT = """Looks at this machine: versions, devices, packages with their real import errors, network, memory and disk;
says what training will use here, and what to install for more. Exit code 1 when training cannot work.

    bash examples/doctor.sh [--json]
"""
SET_UP = "bash examples/setup_environment.sh"
OK, NOTE, BROKEN = "ok", "note", "broken"
NEEDED = ("torch", "megatron.core", "megatron.energon", "transformers", "safetensors", "webdataset", "tensorboard")
IMPORT_SECONDS = 120
LEAST_FILES, LEAST_SHARED_GB, LEAST_DISK_GB = 1024, 1.0, 10.0

# What is asked of the environment's Python; one line of JSON is the answer.
VERSIONS = """
import importlib, json, sys
sys.modules.update(dict.fromkeys(sys.argv[2:]))
module = importlib.import_module(sys.argv[1])
found = {"version": str(getattr(module, "__version__", ""))}
if sys.argv[1] == "torch":
    found |= {"cuda": module.version.cuda, "available": module.cuda.is_available(), "gloo": False, "nccl": False}
    found |= {"gloo": module.distributed.is_gloo_available(), "nccl": module.distributed.is_nccl_available()}
    count = module.cuda.device_count() if found["available"] else 0
    found["gpus"] = [module.cuda.get_device_name(number) for number in range(count)]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Finding:
    """One line.  state: ok, note (works, but) or broken (training cannot work)."""

    what: str
    state: str
    found: str
    remedy: str = ""


def _import(python: str, module: str, hidden: Sequence[str] = ()) -> tuple[dict, str]:
    """What the module says of itself, or its real error in one line.  hidden: packages that count as absent."""
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [python, "-c", VERSIONS, module, *hidden],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {}, f"{type(error).__name__}: {error}"
    if done.returncode == 0 and done.stdout.strip():
        return json.loads(done.stdout.splitlines()[-1]), ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return {}, lines[-1] if lines else f"ended with exit code {done.returncode}"


def _python(python: str) -> Iterator[Finding]:
    code = "import json, sys; print(json.dumps([sys.version.split()[0], sys.executable, list(sys.version_info[:2])]))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=IMPORT_SECONDS)
        version, where, numbers = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        yield Finding("Python", BROKEN, f"{python}: {error}", SET_UP)
        return
    state = OK if tuple(numbers) >= (3, 12) else BROKEN
    yield Finding("Python", state, f"{version}, {where}", "" if state == OK else f"3.12 or newer is needed: {SET_UP}")


def _packages(python: str) -> Iterator[Finding]:
    hidden: Sequence[str] = ()
    for module in NEEDED:
        found, error = _import(python, module, hidden)
        if error:
            yield Finding(module, BROKEN, error, SET_UP)
        else:
            yield Finding(module, OK, found["version"])
        if module == "torch" and found:
            yield from _torch(found)
            if not found["available"]:  # a run on the CPU does not look at these, whether they work or not
                hidden = device.kind("cpu").CUDA_PACKAGES


def _torch(found: Mapping) -> Iterator[Finding]:
    listed = device.kind("cuda").count()
    if found["available"]:
        yield Finding("GPUs", OK, f"{len(found['gpus'])}: {', '.join(sorted(set(found['gpus'])))}")
    elif listed:
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
        yield Finding(
            "GPUs",
            BROKEN,
            f"nvidia-smi lists {listed} (driver {driver or 'unknown'}), torch for CUDA {found['cuda']} sees none",
            "install the torch that fits the driver, or a newer driver; ACCELERATOR=cpu trains on the CPU meanwhile",
        )
    else:
        yield Finding("GPUs", NOTE, "none: runs here are on the CPU, over gloo", "")
    backends = [name for name in ("nccl", "gloo") if found[name]]
    needed = "nccl" if found["available"] else "gloo"
    state = OK if needed in backends else BROKEN
    yield Finding("torch.distributed", state, ", ".join(backends) or "no backend", "" if state == OK else SET_UP)


def _output(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


# package -> what it gives on a GPU, and how to install it
EXTENSIONS = {
    "transformer_engine.pytorch": ("fused layers, fp8, AC=offload", "pip install transformer-engine[pytorch]"),
    "flash_attn": ("a faster attention than cuDNN's on some cards", "pip install flash-attn --no-build-isolation"),
    "apex": ("fused norms and Adam where Transformer Engine is absent", "see its README"),
    "fused_weight_gradient_mlp_cuda": ("weight gradients without a temporary", "is part of apex (--cuda_ext)"),
    "wandb": ("W&B beside TensorBoard", "pip install wandb"),
}


def _extensions(python: str, has_gpu: bool) -> Iterator[Finding]:
    for module, (gives, remedy) in EXTENSIONS.items():
        found, error = _import(python, module)
        if not error:
            yield Finding(module, OK, found["version"] or "imports")
        elif "No module named" in error and module.partition(".")[0] in error:
            where = "" if has_gpu or module == "wandb" else " on a GPU"
            yield Finding(module, NOTE, f"not installed; it gives{where}: {gives}", remedy)
        else:  # it is there and does not work: what the run would take for absent
            yield Finding(module, BROKEN if has_gpu else NOTE, f"is installed and does not import: {error}", remedy)


def _machine() -> Iterator[Finding]:
    kind = device.kind("cpu")
    memory = kind.memory() / 1e9
    yield Finding("CPU", OK, f"{cores()} cores, {memory:.0f} GB of memory, {platform.machine()}, {platform.system()}")
    instructions = kind.bf16_instructions()
    told = ", ".join(instructions) if instructions else "none: PR=bf16 is slower than fp32 on this CPU"
    yield Finding("bf16 instructions", OK if instructions else NOTE, told)
    yield _compiler()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    enough = files == resource.RLIM_INFINITY or files >= LEAST_FILES
    yield Finding("open files", OK if enough else NOTE, str(files), "" if enough else f"ulimit -n {LEAST_FILES * 64}")
    if os.path.isdir("/dev/shm"):
        shared = shutil.disk_usage("/dev/shm").total / 1e9
        wide = shared >= LEAST_SHARED_GB
        remedy = "" if wide else "loader processes hand batches over in it: docker run --ipc=host, or --shm-size"
        yield Finding("shared memory", OK if wide else BROKEN, f"{shared:.1f} GB", remedy)
    free = shutil.disk_usage(os.getcwd()).free / 1e9
    yield Finding("disk here", OK if free >= LEAST_DISK_GB else NOTE, f"{free:.0f} GB free")


def _compiler() -> Finding:
    if command := cpp_compiler():
        return Finding("compiler", OK, " ".join(command))
    if reason := why_none():
        return Finding("compiler", NOTE, f"{reason}: steps on a CPU are slower", "apt install g++, or name one by CXX")
    return Finding("compiler", NOTE, "left out by CXX=none: steps on a CPU are slower", "unset CXX")


def _network() -> Iterator[Finding]:
    names = sorted(os.listdir(INTERFACES)) if os.path.isdir(INTERFACES) else []
    yield Finding("network interfaces", OK, ", ".join(names) or "unknown")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = os.environ.get(name)
        if wanted and names and wanted[0] not in "^=" and not any(wanted.startswith(known) for known in names):
            yield Finding(name, BROKEN, f"{wanted} is no interface", f"unset {name}, or name one of {', '.join(names)}")
    try:
        own = socket.gethostbyname(socket.gethostname())
        yield Finding("host name", OK, f"{socket.gethostname()} is {own}")
    except OSError as error:
        yield Finding(
            "host name", NOTE, f"{socket.gethostname()}: {error}", "for several nodes: an entry in /etc/hosts"
        )


def _headers(python: str) -> Iterator[Finding]:
    where = _output(python, "-c", "import sysconfig; print(sysconfig.get_path('include'))")
    has = bool(where) and Path(where, "Python.h").is_file()
    yield Finding("Python headers", OK if has else NOTE, where or "unknown", "" if has else "apt install python3-dev")


def examine(python: str) -> list[Finding]:
    """All findings."""
    found = [*_python(python), *_packages(python)]
    has_gpu = any(one.what == "GPUs" and one.state == OK for one in found)
    return [*found, *_extensions(python, has_gpu), *_machine(), *_headers(python), *_network()]


def _used(found: Sequence[Finding]) -> str:
    """What a run will use."""
    states = {one.what: one for one in found}
    broken = [one.what for one in found if one.state == BROKEN]
    if broken:
        return f"training cannot work here: {', '.join(broken)}"
    if states["GPUs"].state != OK:
        return f"training works here, on the CPU: gloo, Megatron's local layers, {cores()} cores"
    engine = states["transformer_engine.pytorch"].state == OK
    return f"training works here: {states['GPUs'].found}; {'Transformer Engine' if engine else 'local'} layers, NCCL"


@dataclass(frozen=True)
class Doctor:
    """The command."""

    def run(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """Print what was found, and end."""
        parser = argparse.ArgumentParser(
            prog="doctor.sh", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--json", action="store_true", help="one object: ok, used, findings")
        arguments = parser.parse_args(words)
        python = environment.get("PYTHON") or default_python()
        found = examine(python)
        works = all(one.state != BROKEN for one in found)
        if arguments.json:
            print(json.dumps({"ok": works, "used": _used(found), "findings": [asdict(one) for one in found]}, indent=2))
        else:
            width = max(len(one.what) for one in found)
            for one in found:
                print(f"{one.state:<7} {one.what:<{width}}  {one.found}")
                if one.remedy and one.state != OK:
                    print(f"{'':<7} {'':<{width}}  -> {one.remedy}")
            print(f"\n{_used(found)}", f"repository: {REPOSITORY}", sep="\n")
        sys.exit(0 if works else 1)


COMMAND = Doctor()
