"""Wheel and source distribution, installed where no source tree is at hand."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import forked_python
import pytest
from compiler_cache import compiler_cache

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/repo"))
import tree  # noqa: E402

# A wheel is built beside other tests; less than pytest's limit for what no signal ends.
pytestmark = pytest.mark.timeout(580)

# Trains with the state on disk and compares with torch, bit by bit.
TRAIN = """
import sys, torch, torch_ext
from torch_ext._native import _C
assert {root!r} not in torch_ext.__file__, torch_ext.__file__
def train(make):
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 7)
    optimizer = make(model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 300)).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])
ours = train(lambda p: torch_ext.OffloadedAdamW(p, lr=1e-2, nvme_path={nvme!r}))
assert torch.equal(ours, train(lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True)))
print(_C.__file__)
"""


def run(*command, cwd, **env):
    """Runs a command as somebody outside the source tree would."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TORCH_EXT", "PYTHON"))}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=clean | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.strip()


def build_wheel(source, folder, cmake_args=""):
    """In a build folder that lies as the checkout's does: the compiler says the same."""
    run(
        *[sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation"],
        *["--no-deps", "--wheel-dir", folder, source],
        cwd=folder.parent,
        TORCH_EXT_BUILD_DIR=str(source / "build/wheel"),
        CMAKE_ARGS=cmake_args,
        **compiler_cache(source),
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel, folder):
    """A fresh virtual environment with the wheel, and with this one's torch."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin/python"
    run(
        *[sys.executable, "-m", "pip", "--python", python, "install", "--quiet"],
        *["--no-deps", wheel],
        cwd=folder.parent,
    )
    site = run(
        *[python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=folder
    )
    # Only the folders: editable installs in them do not count.
    folders = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    Path(site, "torch_of_tests.pth").write_text("\n".join(folders))
    return SimpleNamespace(python=python, package=Path(site, "torch_ext"))


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def cache(room):
    """For what is compiled with an installed wheel."""
    return compiler_cache(room)


@pytest.fixture(scope="module")
def sdist(room):
    # Packs a copy: setuptools lays the files out again in the tree that it packs, and
    # tests beside this one read the tree.
    copy = room / "checkout"
    for name in tree.files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    make = f"from setuptools import build_meta; build_meta.build_sdist({str(room)!r})"
    run(sys.executable, "-c", make, cwd=copy)
    (archive,) = room.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def source(sdist, room):
    with tarfile.open(sdist) as archive:
        archive.extractall(room / "sdist")
    (folder,) = (room / "sdist").iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(source, room):
    return build_wheel(source, room / "wheel")


@pytest.fixture(scope="module")
def torchless_wheel(wheel, source, room):
    """What is built where there is no torch; shares the core of the other."""
    return build_wheel(source, room / "torchless", "-DTORCH_EXT_PYTHON=OFF")


@pytest.fixture(scope="module")
def installed(wheel, room):
    return install(wheel, room / "venv")


@pytest.fixture(scope="module")
def installed_torchless(torchless_wheel, room):
    return install(torchless_wheel, room / "torchless_venv")


@pytest.mark.slow
def test_wheel_has_all_that_the_readme_promises(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-linux_" in wheel.name
    for name in (
        "torch_ext/_C" + sysconfig.get_config_var("EXT_SUFFIX"),
        "torch_ext/_C.pyi",
        "torch_ext/py.typed",
        "torch_ext/lib/libtorch_ext_core.so",
        "torch_ext/include/torch_ext/io/io_engine.h",
        "torch_ext/include/torch_ext/tensor/tensor_swapper.h",
        "torch_ext/share/cmake/torch_ext/torch_extConfig.cmake",
        "torch_ext/csrc/sources.json",
        "torch_ext/csrc/tensor/tensor_swapper.cpp",
        "torch_ext/third_party/include/xxhash.h",
        "torch_ext/third_party/include/nlohmann/json.hpp",
    ):
        assert name in names
    assert [n for n in names if n.endswith("licenses/THIRD_PARTY.md")]
    top = {name.split("/")[0] for name in names}
    assert {t.split("-")[0] for t in top} == {"torch_ext"}


@pytest.mark.slow
def test_wheel_depends_on_nothing_of_the_machine_that_built_it(installed, room):
    libraries = [*installed.package.glob("_C.*.so"), *installed.package.glob("lib/*.so*")]
    assert len(libraries) == 2
    for library in libraries:
        header = run("readelf", "-d", library, cwd=room)
        assert "libaio" not in header
        assert "liburing" not in header
        assert all(p.startswith("$ORIGIN") for p in re.findall(r"R\w*PATH.*\[(.*)\]", header))
    for file in installed.package.glob("share/**/*.cmake"):
        assert str(room) not in file.read_text()


@pytest.mark.slow
def test_wheel_trains_outside_the_source_tree(installed, room):
    code = TRAIN.format(root=str(ROOT), nvme=str(room))
    module = run(installed.python, "-c", code, cwd=room)
    assert Path(module).parent == installed.package


@pytest.mark.slow
def test_wheel_serves_the_example_of_a_libtorch_program(installed, source, room, cache):
    """From the sources of the sdist, with nothing of the checkout."""
    app = shutil.copytree(source / "examples/libtorch_app", room / "app")
    prefix = run(
        *[installed.python, "-c", "import torch_ext; print(torch_ext.cmake_prefix_path)"],
        cwd=room,
    )
    assert Path(prefix) == installed.package / "share/cmake"
    torch_root = run(
        *[installed.python, "-c", "import torch; print(torch.__path__[0])"], cwd=room
    )
    build = room / "app_build"
    run(
        *["cmake", "-S", app, "-B", build, "-DCMAKE_BUILD_TYPE=Debug"],
        *[f"-DCMAKE_PREFIX_PATH={prefix}", f"-DTORCH_ROOT={torch_root}"],
        cwd=room,
        **cache,
    )
    known = (build / "CMakeCache.txt").read_text()
    assert f"torch_ext_DIR:PATH={prefix}/torch_ext" in known
    run("cmake", "--build", build, cwd=room, **cache)
    nvme = room / "app_nvme"
    nvme.mkdir()
    shown = run(build / "libtorch_app", nvme, cwd=room)
    assert "equal to the bit" in shown
    libraries = run("ldd", build / "libtorch_app", cwd=room)
    assert str(installed.package / "lib/libtorch_ext_core.so") in libraries


@pytest.mark.slow
def test_wheel_made_without_torch_builds_the_module_on_first_import(
    installed_torchless, room, cache
):
    assert not list(installed_torchless.package.glob("_C.*.so"))
    code = TRAIN.format(root=str(ROOT), nvme=str(room))
    module = run(
        *[installed_torchless.python, "-c", code],
        cwd=room,
        TORCH_EXTENSIONS_DIR=str(room / "jit"),
        **cache,
    )
    assert (room / "jit") in Path(module).parents


@pytest.mark.slow
def test_wheel_made_without_torch_has_every_public_name(installed_torchless, room):
    # Each name is used in a process of its own, where it is the first.
    code = """
import os, sys, torch_ext
for name in torch_ext.__all__:
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 0, name
    else:
        getattr(torch_ext, name)
        os._exit(0)
"""
    run(
        *[installed_torchless.python, "-c", code],
        cwd=room,
        TORCH_EXTENSIONS_DIR=str(room / "jit"),
    )


@pytest.mark.slow
def test_loaded_and_built_modules_live_in_one_process(installed, installed_torchless, room):
    (built,) = installed.package.glob("_C.*.so")
    code = f"""
import importlib.util, sys, torch, torch_ext
spec = importlib.util.spec_from_file_location("torch_ext._C", {str(built)!r})
sys.modules["torch_ext._C"] = built = importlib.util.module_from_spec(spec)
spec.loader.exec_module(built)
loaded = torch_ext.build()
assert loaded.__file__ != built.__file__
print(loaded.AioConfig() is not None and built.AioConfig() is not None)
"""
    shown = run(
        *[installed_torchless.python, "-c", code],
        cwd=room,
        TORCH_EXTENSIONS_DIR=str(room / "jit"),
    )
    assert shown.splitlines()[-1] == "True"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_sdist_has_what_git_has(sdist):
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "csrc", "include", "tests", "cmake"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {f for f in listing if (ROOT / f).is_file()} <= packed
    assert {"setup.py", "LICENSE", "THIRD_PARTY.md", "torch_ext/_C.pyi"} <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


# Loads in a process of its own, where ``body`` stands for torch's compilation.
LOAD = """
import os, signal, sys, time
from pathlib import Path
from torch.utils import cpp_extension
import torch_ext
folder = Path(sys.argv[1])
def compile(*arguments, **options):
    {body}
cpp_extension.load = compile
torch_ext.build("some", build_directory=folder)
"""


def test_load_gives_up_on_a_build_that_goes_on_and_names_its_process(tmp_path):
    import torch_ext

    code = LOAD.format(body="print('compiles', flush=True); time.sleep(600)")
    builder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert builder.stdout.readline() == "compiles\n"
        told = f"process {builder.pid} has been.*{re.escape(str(tmp_path / 'torch_ext.lock'))}"
        with pytest.raises(TimeoutError, match=told):
            torch_ext.build("some", build_directory=tmp_path, lock_timeout=0.2)
    finally:
        builder.kill()
        builder.communicate()


def test_load_goes_on_where_a_killed_build_left_its_locks(tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    import torch_ext

    # The file by which torch up to 2.14 keeps others out.
    body = "(folder / 'lock').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run(
        [forked_python.python(), "-c", LOAD.format(body=body), tmp_path],
        cwd=ROOT,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "lock").exists()
    found = []
    monkeypatch.setattr(
        cpp_extension, "load", lambda *a, **k: found.append((tmp_path / "lock").exists())
    )
    with pytest.warns(UserWarning, match="compiling"):
        torch_ext.build("some", build_directory=tmp_path, lock_timeout=0.2)
    assert found == [False]


def test_load_says_that_it_compiles_before_it_does(tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    import torch_ext

    calls = []
    monkeypatch.setattr(cpp_extension, "load", lambda *a, **k: calls.append(a))
    with pytest.warns(UserWarning, match="compiling.*about a minute") as caught:
        torch_ext.build("some", build_directory=tmp_path)
    assert str(tmp_path) in str(caught[0].message)
    assert caught[0].filename == __file__
    (tmp_path / "some.so").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_ext.build("some", build_directory=tmp_path)  # Built before: quick.
    assert len(calls) == 2


def setup_names():
    """What setup.py defines."""
    source = (ROOT / "setup.py").read_text().partition("\nsetup(")[0]
    names = {"__file__": str(ROOT / "setup.py")}
    exec(compile(source, "setup.py", "exec"), names)
    return names


def test_setup_chooses_ninja_unless_something_else_is_chosen(tmp_path, monkeypatch):
    names = setup_names()
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CMAKE_GENERATOR", raising=False)
    assert names["generator"](tmp_path, []) == []
    ninja = tmp_path / "bin/ninja"
    ninja.touch(mode=0o755)
    assert names["generator"](tmp_path, []) == ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    assert names["generator"](tmp_path, ["-GUnix Makefiles"]) == []
    (tmp_path / "CMakeCache.txt").touch()
    assert names["generator"](tmp_path, []) == []


def test_load_without_a_compiler_says_what_to_install(tmp_path, monkeypatch):
    import torch_ext

    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"no-such-compiler.*apt-get install g\+\+"):
        torch_ext.build(build_directory=tmp_path)


def test_nothing_is_built_without_the_headers_of_python(tmp_path, monkeypatch):
    import torch_ext

    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    remedy = r"Python\.h.*apt-get install python3-dev"
    with pytest.raises(RuntimeError, match=remedy):
        torch_ext.build(build_directory=tmp_path)
    check = setup_names()["check_headers"]
    with pytest.raises(SystemExit, match=remedy):
        check([])
    check(["-DTORCH_EXT_PYTHON=OFF"])


def test_load_finds_ninja_beside_python_and_leaves_path_alone(monkeypatch, tmp_path):
    from torch_ext import jit

    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(RuntimeError, match="pip install ninja"), jit._ninja_on_path():
        pass
    (tmp_path / "ninja").touch(mode=0o755)
    with jit._ninja_on_path():
        assert shutil.which("ninja") == str(tmp_path / "ninja")
    assert os.environ["PATH"] == str(tmp_path / "empty")


def test_source_list_is_valid_json_with_all_lists():
    sources = json.loads((ROOT / "csrc/sources.json").read_text())
    assert set(sources) == {"core", "tensor", "bindings"}
