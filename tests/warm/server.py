"""Fork server of the tests: imports what takes long once, then forks a process for every command line that it is sent.

    python -u server.py DESCRIPTOR LOG ROOM

Listens on the socket DESCRIPTOR until its standard input ends; every line of LOG is an answer.  ROOM is a long argument
without meaning: the space in which a forked process writes its own command line, so that ps and pkill see it there.

Imported are the packages of others only, and of those not megatron.core: a process that is forked here meets
megatron_patch.device.install(), Megatron and its patches in the order of a fresh start.
"""

import atexit
import builtins
import contextlib
import ctypes
import gc
import importlib
import importlib.machinery
import marshal
import multiprocessing.process
import multiprocessing.spawn
import os
import runpy
import select
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import shim  # beside this file

HEAVY = (
    *("torch", "torch._dynamo", "torch._inductor.utils", "torch.utils.tensorboard", "torch.utils.cpp_extension"),
    *("torch.distributed.run", "torch.distributed.elastic.multiprocessing.errors", "torch.distributed.fsdp"),
    *("torch.distributed.checkpoint", "torch.distributed.tensor", "torch.distributed._tensor", "torch.profiler"),
    *("transformers.models.auto", "transformers.models.auto.tokenization_auto", "transformers.models.llava"),
    *("transformers.modeling_utils", "transformers.generation", "transformers.processing_utils"),
    *("transformers.tokenization_utils_tokenizers", "transformers.tokenization_utils_sentencepiece"),
    *("transformers.convert_slow_tokenizer", "transformers.models.llama.modeling_llama"),
    *("transformers.models.mistral.modeling_mistral", "transformers.models.clip.modeling_clip"),
    *("transformers.models.llava.modeling_llava", "megatron.energon", "PIL.Image", "safetensors.torch", "yaml"),
    *("tensorboard", "triton", "setuptools", "distutils.core", "pickle", "logging.handlers", "numpy.random"),
)
# Asked for at import, and again when they are used; TORCHDYNAMO_DISABLE=1 is set by device.install() at the latest.
MAY_DIFFER = frozenset(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PYTHONPATH", "TORCHDYNAMO_DISABLE"))
# How the launchers have glibc keep memory: no result depends on it.
MAY_DIFFER |= {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"}
# Read by libraries behind Python's back, which no list of questions tells.
READ_BY_LIBRARIES = ("OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "MALLOC_", "GLIBC_", "LD_", "PYTHONHASH")
if not Path("/dev/nvidiactl").exists():
    MAY_DIFFER |= {"CUDA_VISIBLE_DEVICES"}  # there is none to be seen

_asked: set[str] = set()


class _Environment(os._Environ):
    """Remembers which variables were asked for by name; a copy of the whole, a list and then each value, is none."""

    listed: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        for name in super().__iter__():
            self.listed.add(name)
            yield name

    def __getitem__(self, name: str) -> str:
        if name in self.listed:
            self.listed.remove(name)
        else:
            _asked.add(name)
        return super().__getitem__(name)


@dataclass
class Request:
    """What a shim hands over."""

    python: str  # the shim's own path, for those who start another Python
    words: list[str]
    folder: str
    environment: dict[bytes, bytes]
    umask: int
    surroundings: list
    numbers: list[int]  # of its open descriptors
    received: list[int]  # the same descriptors here


@dataclass
class Child:
    """A process under way, and whom to tell how it ended."""

    pid: int
    handle: int
    connection: socket.socket


@dataclass
class Imported:
    """The environment around the imports."""

    before: dict[str, str]
    asked: set[str]  # variables whose values the imports looked at
    changed: dict[str, str]  # that the imports have set


def import_all() -> Imported:
    """Import HEAVY."""
    before = dict(os.environ)
    os.environ.__class__ = _Environment
    for name in HEAVY:
        importlib.import_module(name)
    os.environ.__class__ = os._Environ
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        sys.exit(f"an import has started {len(threads) - 1} threads, which no fork would have")
    changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
    return Imported(before, set(_asked), changed)


def read(connection: socket.socket) -> Request:
    """The request of a shim that has just connected."""
    connection.settimeout(30)
    length, descriptors, _, _ = socket.recv_fds(connection, 8, 253)
    wanted, data = int.from_bytes(length, "little"), bytearray()
    while len(data) < wanted:
        data += connection.recv(wanted - len(data)) or b"\0" * wanted
    connection.settimeout(None)
    return Request(*marshal.loads(data), descriptors)


def why_not(request: Request, imported: Imported, own_surroundings: list) -> str:
    """Why a process forked here would not be what a fresh start is; empty if it would be."""
    if request.surroundings != own_surroundings:
        return "its namespaces, limits, user or cores are others"
    theirs = {os.fsdecode(name): os.fsdecode(value) for name, value in request.environment.items()}
    ours = imported.before
    names = imported.asked | {name for name in ours.keys() | theirs.keys() if name.startswith(READ_BY_LIBRARIES)}
    for name in sorted(names - MAY_DIFFER):
        if theirs.get(name) not in (ours.get(name), imported.changed.get(name)):  # of a child of a warm process
            return f"{name} is {theirs.get(name)!r}, and imports saw {ours.get(name)!r}"
    return ""


def serve(listener: socket.socket, log: Path, imported: Imported, own_surroundings: list) -> Request:
    """Answer shims; returns in the forked process, with its request, and ends with standard input."""
    children: list[Child] = []
    while True:
        poll = select.poll()
        for descriptor in (0, listener.fileno()):
            poll.register(descriptor, select.POLLIN)
        for child in children:
            poll.register(child.handle, select.POLLIN)
            poll.register(child.connection.fileno(), select.POLLIN)
        descriptor = poll.poll()[0][0]
        if descriptor == 0:
            for child in children:
                end(child)
            sys.exit()
        if descriptor != listener.fileno():
            child = next(child for child in children if descriptor in (child.handle, child.connection.fileno()))
            if descriptor == child.handle:
                status = os.waitpid(child.pid, 0)[1]
                with contextlib.suppress(OSError):
                    child.connection.sendall(status.to_bytes(4, "little"))
            else:  # its shim was killed
                end(child)
            child.connection.close()
            os.close(child.handle)
            children.remove(child)
            continue
        connection = listener.accept()[0]
        request = None
        try:
            request = read(connection)
            reason = why_not(request, imported, own_surroundings)
        except (OSError, ValueError, EOFError, TypeError) as error:
            reason = f"its request cannot be read: {error!r}"
        what = " ".join(request.words[:3]).partition("\n")[0] if request else "?"
        with log.open("a") as stream:
            stream.write(f"{'cold' if reason else 'warm'}|{reason}|{what}\n")
        pid = 0 if reason else os.fork()
        if not reason and pid == 0:
            listener.close()
            connection.close()
            for child in children:
                child.connection.close()
                os.close(child.handle)
            return request
        with contextlib.suppress(OSError):
            if reason:
                connection.sendall(b"c")
                connection.close()
            else:
                child = Child(pid, os.pidfd_open(pid), connection)
                children.append(child)
                socket.send_fds(connection, [b"w"], [child.handle])
        for received in request.received if request else ():
            os.close(received)


def end(child: Child) -> None:
    """Kill a process and its group, at once, and reap it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    os.waitpid(child.pid, 0)


def write_command_line(words: list[str]) -> None:
    """Overwrite this process's arguments in memory, which are what /proc/PID/cmdline shows."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, stop = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5), counted behind the name
    text = b"".join(os.fsencode(word) + b"\0" for word in words)[: stop - start - 1]
    ctypes.memmove(start, text.ljust(stop - start, b"\0"), stop - start)


def become(request: Request, imported: Imported, own_path: list[str]) -> None:
    """Make this process what the shim's caller has asked for, up to the first line of its program."""
    os.setsid()
    os.chdir(request.folder)
    os.umask(request.umask)
    # Out of the way of the numbers that they shall get.
    above = max(request.numbers, default=2) + 1
    high = []
    for descriptor in request.received:
        while descriptor < above:
            descriptor = os.dup(descriptor)
        high.append(descriptor)
    for descriptor, number in zip(high, request.numbers, strict=True):
        os.dup2(descriptor, number)
    os.closerange(above, max([*high, above]) + 1)
    for number in set(range(above)) - set(request.numbers):
        with contextlib.suppress(OSError):
            os.close(number)
    os.environ.clear()
    os.environ.update(imported.changed)
    os.environb.update(request.environment)
    write_command_line([request.python, *request.words])
    sys.executable = request.python
    multiprocessing.spawn.set_executable(request.python)
    multiprocessing.process.ORIGINAL_DIR = request.folder
    added = os.environ.get("PYTHONPATH", "")
    sys.path[:] = [*(os.path.abspath(path) for path in added.split(os.pathsep) if path), *own_path]
    importlib.invalidate_caches()
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        numpy.seed()  # `random` and torch see to theirs: the one is seeded at every fork, the other begins alike always


def run(words: list[str]) -> None:
    """Run a command line without the name of the interpreter, as that would."""
    while words[0] in ("-u", "-B"):
        words = words[1:]
    main = types.ModuleType("__main__")
    main.__builtins__ = builtins
    sys.modules["__main__"] = main
    if words[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv[:] = ["-m", *words[2:]]
        runpy._run_module_as_main(words[1])
        return
    if words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv[:] = ["-c", *words[2:]]
        exec(words[1], main.__dict__)
        return
    sys.path.insert(0, os.path.dirname(os.path.realpath(words[0])))
    sys.argv[:] = words
    main.__file__ = words[0]
    main.__cached__ = None
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", words[0])
    exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), main.__dict__)


def main(descriptor: str, log: str) -> Request:
    """Import, listen, serve; returns in a forked process."""
    own_path = sys.path[1:]  # [0] is this file's folder
    listener = socket.socket(fileno=int(descriptor))
    imported = import_all()
    gc.collect()
    gc.freeze()
    request = serve(listener, Path(log), imported, shim.surroundings())
    become(request, imported, own_path)
    return request


def status_of(program: Callable[[], None]) -> int:
    """Run a program to the end of its Python code; returns the exit code that the interpreter would end with."""
    try:
        program()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        own = 3  # frames of this file: here, the lambda below, run()
        trace = error.__traceback__
        while trace and own:
            trace, own = trace.tb_next, own - 1
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def end_as(status: int) -> NoReturn:
    """End as the interpreter does, up to the last Python code; taking 3,600 modules apart would cost a second more."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    own_module = sys.modules["__main__"]  # whose names are still needed when another takes its place
    requested = main(*sys.argv[1:3])
    end_as(status_of(lambda: run(requested.words)))
