"""The simulated device "sim" in Python: see sim_device.cpp.

``install()`` makes the device known to torch. It takes the library that the environment
variable ``TORCH_EXT_SIM_LIBRARY`` names, or else builds it, once, in torch's folder for
extensions. From then on ``torch.device("sim")`` works, and the functions below control the
machine. A process cannot have both it and a real accelerator.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import sys
import types
from pathlib import Path

import torch

_TESTS = Path(__file__).resolve().parents[1]
_COUNTS = [
    *["async_copies", "async_bytes", "sync_copies", "stale_copies"],
    *["live_bytes", "reused_blocks", "urgent_streams"],
]
_library: ctypes.CDLL | None = None


def install() -> None:
    """Makes the device known to torch. May be called again."""
    global _library
    if _library is not None:
        return
    path = os.environ.get("TORCH_EXT_SIM_LIBRARY") or _build()
    torch.ops.load_library(path)
    _library = ctypes.CDLL(path)
    _library.sim_count.restype = ctypes.c_int64
    _library.sim_count.argtypes = [ctypes.c_char_p]
    _library.sim_await_copies.restype = ctypes.c_bool
    _library.sim_await_copies.argtypes = [ctypes.c_int64, ctypes.c_double]
    _library.sim_sleep.argtypes = [ctypes.c_int, ctypes.c_double]
    _library.sim_fail_copy.argtypes = [ctypes.c_int64]
    _library.sim_hold_copies.argtypes = [ctypes.c_bool]
    _library.sim_hold_copies_after.argtypes = [ctypes.c_int64]
    for function in (_library.sim_hold, _library.sim_release):
        function.argtypes = [ctypes.c_int, ctypes.c_int64]
    torch.utils.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", _device_module())
    torch.utils.generate_methods_for_privateuse1_backend(unsupported_dtype=[])
    # Before the interpreter takes down what a late copy may point to.
    atexit.register(_library.sim_reset)


def library_path() -> str:
    """Returns the path of the library that install() has loaded."""
    return _library._name


def hold(stream: torch.Stream | None = None) -> None:
    """Nothing of the stream (the current one if None) runs until release()."""
    stream = stream or torch.accelerator.current_stream()
    _library.sim_hold(stream.device_index, stream.stream_id)


def release(stream: torch.Stream | None = None) -> None:
    stream = stream or torch.accelerator.current_stream()
    _library.sim_release(stream.device_index, stream.stream_id)


def hold_copies() -> None:
    """No asynchronous copy starts on any stream until release_copies()."""
    _library.sim_hold_copies(True)


def hold_copies_after(count: int) -> None:
    """Calls hold_copies() when ``count`` more have been queued and another one is."""
    _library.sim_hold_copies_after(count)


def release_copies() -> None:
    _library.sim_hold_copies(False)


def settle() -> None:
    """Returns when all streams have done all that they can."""
    _library.sim_settle()


def await_copies(count: int, timeout: float = 20.0) -> None:
    """Returns when ``count`` asynchronous copies have been queued since reset()."""
    if not _library.sim_await_copies(count, timeout):
        raise TimeoutError(f"{counts()['async_copies']} copies after {timeout} s, not {count}")


def sleep(seconds: float) -> None:
    """Queues a kernel that takes that long on the current stream."""
    _library.sim_sleep(torch.accelerator.current_device_index(), seconds)


def fail_copy(after: int = 0) -> None:
    """After ``after`` asynchronous copies one fails; its stream's next event raises."""
    _library.sim_fail_copy(after)


def counts() -> dict[str, int]:
    """Since reset(); ``live_bytes``: of the devices' memory, now."""
    return {name: _library.sim_count(name.encode()) for name in _COUNTS}


def reset() -> None:
    """Releases and finishes everything, drops errors and faults, zeroes the counts."""
    if _library is not None:
        _library.sim_reset()
        torch.accelerator.set_device_index(0)


def _build() -> str:
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    directory = Path(root) / f"torch_ext_sim-torch{torch.__version__}"
    directory.mkdir(parents=True, exist_ok=True)
    if shutil.which("ninja") is None:  # pip puts it beside Python.
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    cpp_extension.load(
        "torch_ext_sim",
        [str(_TESTS / "sim/sim_device.cpp")],
        extra_cflags=["-std=c++20", "-O1", "-g0"],
        extra_include_paths=[str(_TESTS)],
        build_directory=str(directory),
        is_python_module=False,
        with_cuda=False,
    )
    return str(directory / "torch_ext_sim.so")


def _device_module() -> types.ModuleType:
    """What torch expects of ``torch.sim``."""
    module = types.ModuleType("torch.sim")
    owner = os.getpid()
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module._lazy_init = lambda: None
    module._is_in_bad_fork = lambda: os.getpid() != owner
    module.manual_seed_all = lambda seed: None
    module.device_count = lambda: 2
    module.current_device = torch.accelerator.current_device_index
    module.set_device = torch.accelerator.set_device_index
    module.current_stream = torch.accelerator.current_stream
    module.synchronize = torch.accelerator.synchronize
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return module
