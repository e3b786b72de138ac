"""A stand-in for the interpreter that has imported torch already.

``python()`` is the path of a program that takes the place of ``sys.executable`` where a test
wants a process of its own, and not the start of one:

    subprocess.run([forked_python.python(), "-c", code, *arguments], env=..., cwd=...)

The stand-in hands its arguments, environment, folder and standard files to a server, which
forks. The child goes on as the interpreter: it runs the program as ``__main__`` and ends as any
does. The stand-in ends with its status, or by the same signal. It takes half a second of
computing, most of it at the end, where a process that imports torch takes 3 and one that makes
an optimizer 5. What the program starts with ``sys.executable`` is forked too.

These need ``sys.executable``:

- a test of how an interpreter starts, or of what is imported when;
- what has to be known before libraries are loaded, such as ``LD_PRELOAD``. Only the number in
  ``OMP_NUM_THREADS`` still counts;
- what a process inherits besides: limits, descriptors other than 0 to 2, a control group.

The program's process id is not that of the stand-in. The program is killed when the stand-in
ends before it.
"""

from __future__ import annotations

import functools
import gc
import io
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path

# With other options than these it becomes the interpreter itself.
_STAND_IN = """import json, os, resource, signal, socket, sys
arguments = sys.argv[1:]
if not arguments or (arguments[0][:1] == "-" and arguments[0] not in ("-c", "-m", "-u")):
    os.execv({interpreter!r}, [{interpreter!r}, *arguments])
job = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [len(job).to_bytes(8, "little")], [0, 1, 2])
server.sendall(job)
# They are the program's now: who waits for their end waits for the program's.
os.closerange(0, 3)
answer = server.recv(8)
status = int.from_bytes(answer, "little") if answer else 125 << 8
if os.WIFSIGNALED(status):
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.WTERMSIG(status) != signal.SIGKILL:
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
    os.kill(os.getpid(), os.WTERMSIG(status))
os._exit(os.WEXITSTATUS(status))
"""


@functools.cache
def python() -> str:
    """The path of the stand-in. Its server is started, and ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="torch_ext_test."))
    stand_in, address = folder / "python", os.fspath(folder / "server")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        # Not in this session: an interrupt from the terminal is for the programs' parents.
        _servers.append(
            subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno()), stand_in],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        )
    program = folder / "stand_in.py"
    program.write_text(_STAND_IN.format(interpreter=sys.executable, address=address))
    command = shlex.join([sys.executable, "-IS", os.fspath(program)])
    stand_in.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    stand_in.chmod(0o755)
    return os.fspath(stand_in)


_servers: list[subprocess.Popen[bytes]] = []  # Each ends when its standard input does.

Job = tuple[list[str], dict[str, str], str]  # Arguments, environment, folder.


def _serve(listener: socket.socket, folder: Path) -> Job:
    """Returns in the children only, each with the job that it has to do."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody waits for keepers.
    while True:
        ready, _, _ = select.select([0, listener], [], [])
        if 0 in ready:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return _keep(connection)
        connection.close()


def _keep(connection: socket.socket) -> Job:
    """Forks the child and returns in it. Here, tells its stand-in how it ended."""
    head, files, *_ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as stream:
        job = json.loads(stream.read(int.from_bytes(head, "little")))
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        return job
    os.closerange(0, 3)
    for file in files:
        os.close(file)
    ready, _, _ = select.select([os.pidfd_open(pid), connection], [], [])
    if connection in ready:  # Its stand-in is gone.
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if connection not in ready:
        connection.send(status.to_bytes(8, "little"))
    os._exit(0)


def _become(job: Job, stand_in: str) -> None:
    """Runs the program as an interpreter that has just started does."""
    (first, *arguments), environment, folder = job
    unbuffered = first == "-u" or bool(environment.get("PYTHONUNBUFFERED"))
    if first == "-u":
        first, *arguments = arguments
    # One of its own, since what has been imported holds the other: at the end it would not be
    # dropped, and so not flushed.
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(
        open(1, "wb", 0 if unbuffered else -1, closefd=False),  # noqa: SIM115
        sys.stdout.encoding,
        sys.stdout.errors,
        line_buffering=os.isatty(1),
        write_through=unbuffered,
    )
    paths = _paths(os.environ)
    found_elsewhere = [p for p in sys.path[1:] if p not in paths]  # Not this file's folder.
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.executable = stand_in
    torch = sys.modules["torch"]
    torch.default_generator.seed()  # As random does by itself.
    sys.modules["numpy"].random.seed()
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    main = types.ModuleType("__main__")
    main.__builtins__ = __builtins__
    main.__annotations__ = {}
    sys.modules["__main__"] = main
    sys.path[:] = ["", *_paths(os.environ), *found_elsewhere]
    if first == "-m":
        import runpy

        sys.path[0] = folder
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return
    if first == "-c":
        text, name = arguments[0], "<string>"
        sys.argv = ["-c", *arguments[1:]]
    else:
        text, name = Path(first).read_text(), first
        sys.argv = [first, *arguments]
        sys.path[0] = os.fspath(Path(first).resolve().parent)
        main.__file__ = os.path.abspath(first)
    exec(compile(text, name, "exec"), main.__dict__)


def _paths(environment: os._Environ[str]) -> list[str]:
    return [os.path.abspath(p) for p in environment.get("PYTHONPATH", "").split(":") if p]


def _import_all() -> None:
    """What most programs need, and nothing that starts a thread: those would be missing."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Or NumPy starts some.
    import torch
    import torch._dynamo  # noqa: F401  The first optimizer imports it.

    import torch_ext
    from torch_ext import _native  # noqa: F401

    for name in torch_ext.__all__:
        getattr(torch_ext, name)
    assert len(os.listdir("/proc/self/task")) == 1
    gc.collect()
    gc.freeze()  # A child's collections would touch, and so copy, all that is here.


if __name__ == "__main__":
    _import_all()
    with socket.socket(fileno=int(sys.argv[1])) as _listener:
        _job = _serve(_listener, Path(sys.argv[2]).parent)
    _become(_job, sys.argv[2])
