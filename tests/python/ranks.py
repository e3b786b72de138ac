"""Processes of one gloo group, which run what a test hands to all of them."""

import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import forked_python
import torch
import torch.distributed as dist

# A generous deadline: the processes share a busy machine.
SECONDS = 240


def serve(rank, world, rendezvous):
    """Runs what comes through the standard input, a socket."""
    pipe = Connection(0)
    # The tensors of an answer are fetched from here, by whoever has this key.
    multiprocessing.current_process().authkey = pipe.recv_bytes()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world
    )
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            torch.manual_seed(0)
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
    dist.destroy_process_group()


class Ranks:
    """``world`` processes, started when first needed and again after a failure.

    A function that is run in them must be importable; what it returns is
    pickled, so no tensors of a process that may end.
    """

    def __init__(self, world):
        self.world = world
        self._processes, self._pipes = [], []

    def run(self, function, *arguments):
        """The function's results, by rank; an error if any rank had one."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes):
            # Those after a rank that failed may be waiting for it.
            if not pipe.poll(SECONDS if all(ok for ok, _ in results) else 5):
                results.append((False, f"rank {rank} did not answer"))
                continue
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append((False, f"rank {rank} died"))
        if errors := [text for ok, text in results if not ok]:
            self.close(failed=True)
            raise AssertionError("\n".join(errors))
        return [value for _, value in results]

    def close(self, failed=False):
        """Ends the processes; those of a group that failed may wait for ever."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            if failed:
                process.terminate()
            else:
                pipe.send(None)
        for process in self._processes:
            process.wait()
        if self._processes:
            self._folder.cleanup()
        self._processes, self._pipes = [], []

    def _start(self):
        self._folder = TemporaryDirectory(prefix="torch_ext_test.")
        rendezvous = Path(self._folder.name, "rendezvous")
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),  # Where the functions are found.
        }
        for rank in range(self.world):
            ours, theirs = socket.socketpair()
            code = f"import ranks; ranks.serve({rank}, {self.world}, {str(rendezvous)!r})"
            process = subprocess.Popen(
                [forked_python.python(), "-c", code], stdin=theirs, env=environment
            )
            theirs.close()
            self._processes.append(process)
            self._pipes.append(Connection(ours.detach()))
            self._pipes[-1].send_bytes(multiprocessing.current_process().authkey)
