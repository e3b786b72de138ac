"""What takes the interpreter's place in other tests is as the interpreter is."""

import os
import select
import signal
import subprocess
import sys

import forked_python
import pytest

PROGRAMS = {
    "argument and folder": "import os, sys; print(sys.argv, sys.path[0], os.getcwd())",
    "environment": "import os; print(ascii(os.environ['A']), os.environ['PYTHONPATH'])",
    "path": "import sys; print('/a' in sys.path, '/b' in sys.path)",
    "input": "print(input(), __name__, sorted(globals()))",
    "status": "import sys; sys.exit(3)",
    "words": "import sys; sys.exit('words')",
    "exception": "raise KeyError('k')",
    "without an end": "import os; print('lost', end=''); os._exit(4)",
    "abort": "import os; os.abort()",
    "interrupt": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "kill": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "threads": "import torch; print(torch.get_num_threads())",
    "autograd": "import torch; x = torch.ones(2).requires_grad_(); x.sum().backward();"
    "print(x.grad)",
    "end": """
import atexit, threading, time
class Last:
    def __del__(self):
        print("dropped")
last = Last()
atexit.register(print, "exits")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
print("end")
""",
}


def run(python, *command, **more):
    return subprocess.run(
        [python, *command], capture_output=True, text=True, timeout=120, check=False, **more
    )


# Buffered: what is in a buffer at the end must be seen then.
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_does_as_with_the_interpreter(name, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    environment = {"A": "\udcff ö", "OMP_NUM_THREADS": "1", "PYTHONPATH": "/a:/b"}
    real, forked = (
        run(
            *[python, "-c", PROGRAMS[name], "x", "-y"],
            env=os.environ | environment,
            cwd=tmp_path,
            input="line\n",
        )
        for python in (sys.executable, forked_python.python())
    )
    assert (forked.returncode, forked.stdout) == (real.returncode, real.stdout)
    assert forked.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("how", [["script.py"], ["-m", "script"], ["-u", "script.py"]])
def test_a_script_and_a_module_do_as_with_the_interpreter(how, unbuffered, tmp_path):
    (tmp_path / "beside.py").write_text("x = 5")
    (tmp_path / "script.py").write_text(
        "import os, sys, beside, __main__\n"
        "print(beside.x, __name__, __file__, __main__.beside, sys.argv, sys.path[0])\n"
        "os._exit(0)"
    )
    real, forked = (
        run(
            *[python, *how, "x"],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            cwd=tmp_path,
        )
        for python in (sys.executable, forked_python.python())
    )
    assert (forked.returncode, forked.stdout) == (real.returncode, real.stdout), forked.stderr
    assert bool(real.stdout) == (how[0] == "-u" or unbuffered == "1")


def test_torch_is_there_before_the_program_and_so_in_what_it_starts():
    code = "import sys; print(*('torch' in sys.modules for _ in range(2)))"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    assert run(forked_python.python(), "-c", code).stdout == "True True\n"


def test_programs_have_random_numbers_of_their_own():
    code = "import numpy, random, torch;"
    code += "print(torch.rand(1), numpy.random.rand(), random.random(), sep='|', end='')"
    first, second = (
        run(forked_python.python(), "-c", code).stdout.split("|") for _ in range(2)
    )
    assert len(first) == 3
    assert not {*first} & {*second}


def test_programs_run_beside_each_other():
    first, second = (
        subprocess.Popen(
            [forked_python.python(), "-c", "print(input(), flush=True)"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    )
    for process, line in ((second, "second"), (first, "first")):
        assert process.communicate(line, timeout=120)[0] == f"{line}\n"


def test_a_program_ends_with_its_stand_in():
    read, write = os.pipe()
    process = subprocess.Popen(
        [forked_python.python(), "-c", "import time; print(flush=True); time.sleep(600)"],
        stdout=write,
    )
    os.close(write)
    assert os.read(read, 1) == b"\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == -signal.SIGTERM
    assert select.select([read], [], [], 120)[0]
    assert os.read(read, 1) == b""
    os.close(read)


def test_what_the_stand_in_does_not_know_starts_the_interpreter():
    code = "import sys; print(sys.flags.isolated, 'torch' in sys.modules)"
    assert run(forked_python.python(), "-I", "-c", code).stdout == "1 False\n"
