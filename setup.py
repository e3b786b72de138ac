"""Builds wheels and editable installs by driving CMake.

torch is never imported here and never downloaded: CMake looks for the torch of
the running Python. With `--no-build-isolation` it finds it and builds _C; in
pip's isolated environment there is none, and the package that results compiles
_C when it is first imported.

CMAKE_ARGS adds arguments for CMake; TORCH_EXT_BUILD_DIR names a build folder
to reuse.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find(program):
    """The program on PATH, or beside Python, which need not be on PATH."""
    beside = Path(sys.executable).parent / program
    return shutil.which(program) or (str(beside) if beside.exists() else None)


def generator(build, arguments):
    """Ninja where it is found, unless a generator has been chosen already."""
    chosen = (build / "CMakeCache.txt").exists() or "CMAKE_GENERATOR" in os.environ
    ninja = find("ninja")
    if chosen or not ninja or any(a.startswith("-G") for a in arguments):
        return []
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]


def check_headers(arguments):
    """Where torch is, its user wants _C, which CMake leaves out without headers."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    wanted = importlib.util.find_spec("torch") and "-DTORCH_EXT_PYTHON=OFF" not in arguments
    if wanted and not header.is_file():
        raise SystemExit(f"{header} is missing: type `apt-get install python3-dev`")


class CMakeBuild(build_ext):
    def run(self):
        in_place = self.inplace or self.editable_mode
        prefix = (ROOT if in_place else Path(self.build_lib).resolve()) / "torch_ext"
        build = Path(os.environ.get("TORCH_EXT_BUILD_DIR") or self.build_temp).resolve()
        cmake = find("cmake")
        if cmake is None:
            raise SystemExit("cmake is missing: type `pip install 'cmake>=3.25'`")
        arguments = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        check_headers(arguments)
        configure = [
            *[cmake, "-S", str(ROOT), "-B", str(build)],
            f"-DPython3_EXECUTABLE={sys.executable}",
            "-DCMAKE_INSTALL_LIBDIR=lib",
            "-DTORCH_EXT_INSTALL_CMAKEDIR=share/cmake/torch_ext",
            "-DTORCH_EXT_INSTALL_PYTHONDIR=.",
            f"-DTORCH_EXT_WHEEL={'OFF' if in_place else 'ON'}",
            *generator(build, arguments),
            *arguments,
        ]
        jobs = str(self.parallel or os.cpu_count() or 1)
        for built in ("lib", "include", "share", "csrc", "third_party"):
            shutil.rmtree(prefix / built, ignore_errors=True)
        for module in prefix.glob("_C.*.so"):
            module.unlink()
        for command in (
            configure,
            [cmake, "--build", str(build), "--parallel", jobs],
            [cmake, "--install", str(build), "--prefix", str(prefix)],
        ):
            if subprocess.run(command, check=False).returncode != 0:
                raise SystemExit(f"failed: {shlex.join(command)}")

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        python, abi, platform = super().get_tag()
        if not list(Path(self.bdist_dir, "torch_ext").glob("_C.*.so")):
            python, abi = "py3", "none"
        return python, abi, platform


setup(
    ext_modules=[Extension("torch_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
