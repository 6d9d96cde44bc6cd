"""Stands in for `python` in the tests: has the fork server run the same command line in a process that is warm.

interpreter.py writes an executable of this file and a call of main().  It hands over arguments, environment, folder and
every open descriptor, forwards signals, and ends as that process ended.  What the server cannot do faithfully is run by
the real interpreter instead: other options, short programs, another namespace, other limits, another value of a
variable that an import has read.
"""

import contextlib
import marshal
import os
import signal
import socket
import sys
from pathlib import Path

FORWARDED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
HARMLESS = ("-u", "-B")  # the server writes unbuffered; whether bytecode is kept changes no result
SPAWN = "from multiprocessing.spawn import spawn_main"
# Whatever runs in these is to die with its parent, which is this process's parent and not the server.
ENDS_WITH_PARENT = ("pretrain_llava.py",)


def surroundings() -> list:
    """What a process of the server has of its own, and must have alike."""
    spaces = [os.stat(f"/proc/self/ns/{name}").st_ino for name in ("mnt", "user", "pid", "net", "ipc", "uts", "cgroup")]
    limits, group = (Path(f"/proc/self/{name}").read_text() for name in ("limits", "cgroup"))
    return [spaces, limits, group, os.getresuid(), os.getresgid(), sorted(os.sched_getaffinity(0)), os.nice(0)]


def is_worth_it(words: list[str]) -> bool:
    """Is it a module, a script, a program of several lines or a process of multiprocessing?"""
    while words and words[0] in HARMLESS:
        words = words[1:]
    if len(words) > 1 and words[0] == "-c":
        return words[1].startswith(SPAWN) or "\n" in words[1]
    return bool(words) and (words[0] == "-m" or not words[0].startswith("-"))


def end_with_parent() -> None:
    """As parent_process.end_with_parent, which the warm process calls in vain: its parent is the server."""
    import ctypes

    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of linux/prctl.h
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def inherited() -> list[int]:
    """Numbers of all descriptors that were open when this process began."""
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            if os.get_inheritable(number):
                found.append(number)
        except OSError:  # that of the listing itself
            continue
    return sorted(found)


def ask(server_socket: str) -> tuple[socket.socket, int] | None:
    """The connection and a descriptor of the process that the server has started, None if it has not."""
    numbers = inherited()
    umask = os.umask(0o077)
    os.umask(umask)
    environment = dict(os.environb)
    request = marshal.dumps((sys.argv[0], sys.argv[1:], os.getcwd(), environment, umask, surroundings(), numbers))
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(server_socket)
        socket.send_fds(connection, [len(request).to_bytes(8, "little")], numbers)
        connection.sendall(request)
        answer, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    except OSError:  # the server is gone
        return None
    return (connection, descriptors[0]) if answer == b"w" else None


def main(real_python: str, server_socket: str) -> None:
    """Run the command line of this process, by the server or by the real interpreter; ends the process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    words = sys.argv[1:]
    started = ask(server_socket) if is_worth_it(words) else None
    if started is None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        os.execv(real_python, [real_python, *words])
    connection, process = started
    if any(SPAWN in word or word.endswith(ENDS_WITH_PARENT) for word in words[:3]):
        end_with_parent()

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and its status is under way
            signal.pidfd_send_signal(process, number)

    for number in FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    answer = connection.recv(4)
    if len(answer) < 4:
        sys.stderr.write("the fork server of the tests ended\n")
        os._exit(70)
    status = int.from_bytes(answer, "little")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))
