"""The examples of README.md and of the guide run as they stand."""

import re
import subprocess
import tempfile
from pathlib import Path

import forked_python
import pytest
import tree

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    text = (tree.ROOT / page).read_text()
    return [code for name, code in BLOCK.findall(text) if name == language]


PYTHON = blocks("README.md", "python")
CASES = [
    (page, number)
    for page in ("README.md", "docs/guide.md")
    for number in range(len(blocks(page, "python")))
]


@pytest.mark.parametrize(("page", "number"), CASES)
def test_python_example_runs_in_an_empty_directory_and_leaves_nothing_there(page, number):
    code = blocks(page, "python")[number]
    with tempfile.TemporaryDirectory(prefix="torch_ext_test.", dir="/var/tmp") as directory:
        done = subprocess.run(
            [forked_python.python(), "-c", code],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, code + done.stdout + done.stderr
        assert list(Path(directory).iterdir()) == []


def test_there_is_an_example_of_the_optimizer_and_of_the_swapper():
    assert any("OffloadedAdamW(" in code for code in PYTHON)
    assert any("TensorSwapper(" in code for code in PYTHON)


def test_the_first_example_is_short():
    assert len(PYTHON[0].splitlines()) <= 15


def test_the_readme_fits_a_few_screens():
    assert len((tree.ROOT / "README.md").read_text().splitlines()) <= 180


def test_the_cpp_example_is_taken_from_the_one_that_the_tests_build():
    app = tree.ROOT / "examples/libtorch_app"
    sources = "".join(file.read_text() for file in sorted(app.iterdir()) if file.is_file())
    built = {line.strip() for line in sources.splitlines()}
    lines = [
        line.strip()
        for code in blocks("README.md", "cpp") + blocks("docs/guide.md", "cmake")
        for line in code.splitlines()
    ]
    assert lines
    assert [line for line in lines if line and line not in built] == []
