"""The benchmarks run, check bytes, and say what they measured."""

import argparse
import importlib
import json
import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import forked_python
import pytest
import tree

FOLDER = tree.ROOT / "benchmarks"


@pytest.fixture
def disk():
    directory = tempfile.mkdtemp(
        prefix="torch_ext_test.", dir=os.environ.get("TORCH_EXT_TEST_DIR") or "/var/tmp"
    )
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def bench(monkeypatch, disk, tmp_path):
    """Runs a benchmark in this process, which has imported torch already.

    So have those that it starts.
    """
    monkeypatch.setattr(sys, "executable", forked_python.python())

    def run(name, *arguments):
        command = [f"{name}.py", "--quick", "--directory", disk, "--output", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        result = tmp_path / f"{name}.json"
        return json.loads(result.read_text()) if result.exists() else None

    with tree.imports_from("benchmarks"):
        yield run


@pytest.fixture
def module():
    with tree.imports_from("benchmarks"):
        yield importlib.import_module


@pytest.fixture
def fake_fio(monkeypatch, tmp_path):
    """Installs a program fio of one line; the real one takes half a second."""

    def install(line):
        program = tmp_path / "bin/fio"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return install


# 1 GiB each way in half a second.
FIO_JOB = {
    "read": {"io_bytes": 1 << 30, "runtime": 500},
    "write": {"io_bytes": 1 << 30, "runtime": 400},
    "usr_cpu": 10.0,
    "sys_cpu": 30.0,
    "job_runtime": 500,
}
FIO = f"echo 'note: something'; echo '{json.dumps({'jobs': [FIO_JOB]})}'"


def cells(result, table=0):
    return {row[0]: row[1:] for row in result["tables"][table]["rows"]}


def test_io_sets_every_transfer_beside_fio(bench, disk, fake_fio):
    fake_fio(FIO)
    result = bench("io")
    rows = cells(result)
    for case in ("4 MiB tensor", "16 x 64 KiB"):
        for kind in ("", ", verify=False", ", unaligned"):
            for operation in ("write", "read"):
                assert "-" not in rows[f"{case}{kind}, {operation}"]
        assert "-" not in rows[f"{case}, new space, write"]
    (sample,) = result["measurements"]["4 MiB tensor"]["write"]
    ours, fio, ratio, *_ = rows["4 MiB tensor, write"]
    assert fio == "4.00"
    assert float(ratio) == pytest.approx(sample["ours"]["gib_per_second"] / 4, abs=0.01)
    assert os.listdir(disk) == []


def test_io_stands_beside_the_better_of_fios_engines(bench, fake_fio, capsys):
    twice = json.dumps({"jobs": [FIO_JOB | {"read": {"io_bytes": 3 << 30, "runtime": 500}}]})
    fake_fio(f"case \"$*\" in *io_uring*) echo '{twice}';; *) {FIO};; esac")
    result = bench("io")
    (sample,) = result["measurements"]["4 MiB tensor"]["read"]
    assert sample["fio, libaio"]["gib_per_second"] == pytest.approx(4.0)
    assert sample["fio, io_uring"]["gib_per_second"] == pytest.approx(8.0)
    ours, fio, ratio, *_ = cells(result)["4 MiB tensor, read"]
    assert fio == "8.00"
    assert float(ratio) == pytest.approx(sample["ours"]["gib_per_second"] / 8, abs=0.01)


def test_io_goes_on_where_fio_has_no_io_uring(bench, fake_fio, capsys):
    fake_fio(f'case "$*" in *io_uring*) exit 1;; *) {FIO};; esac')
    result = bench("io")
    assert result["fio_engines"] == ["libaio"]
    assert "io_uring does not work here" in capsys.readouterr().err
    assert cells(result)["4 MiB tensor, read"][1] == "4.00"


def test_io_without_fio_says_so_and_has_our_figures(bench, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    rows = cells(bench("io", "--engine", "threads"))
    assert "fio is not installed" in capsys.readouterr().err
    assert {fio for _, fio, *_ in rows.values()} == {"-"}
    assert "-" not in {ours for ours, *_ in rows.values()}


def test_files_sets_the_handle_beside_others_on_the_same_files(
    bench, disk, fake_fio, monkeypatch, capsys
):
    fake_fio(FIO)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    result = bench("files")
    assert "DeepSpeed is not installed" in capsys.readouterr().err
    rows = cells(result)
    (sample,) = result["measurements"]["16 x 64 KiB"]["read"]
    ours, to_fio, to_deepspeed, to_save, *_ = rows["16 x 64 KiB, read"]
    assert float(to_fio) == pytest.approx(sample["ours"]["gib_per_second"] / 4, abs=0.01)
    assert to_deepspeed == to_save == "-"
    assert "-" not in rows["1 x 4 MiB, write"][:2] + rows["1 x 4 MiB, write"][3:4]
    assert os.listdir(disk) == []


def test_small_sets_the_cpp_api_beside_fio(bench, disk, fake_fio):
    fake_fio(FIO)
    result = bench("small")
    rows = cells(result)
    (sample,) = result["measurements"]["read"]
    ours, fio, ratio, *_ = rows["keys of a Swapper, read"]
    assert fio == "4.00"
    expected = sample["checked-keys"]["gib_per_second"] / 4
    assert float(ratio) == pytest.approx(expected, abs=0.01)
    assert {"ranges of one file, write", "keys, verify=False, read"} < set(rows)
    assert os.listdir(disk) == []


def test_small_operations_that_cannot_be_made_are_an_error(module, disk):
    small = module("small")
    options = argparse.Namespace(count=10, engine="none such")
    ended = pytest.raises(RuntimeError, match="small_operations ended")
    with ended, small.program("keys", options, disk):
        pass


def test_latency_sets_the_wait_beside_a_bound_of_the_same_round(bench, disk, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    result = bench("latency")
    rows = cells(result)
    assert set(rows) == {"alone", "behind a prefetch", "behind a plain swap_in"}
    (sample,) = result["measurements"]
    # 1 MiB needed, 8 MiB read; 32 requests of 1 MiB may be ahead.
    bound = sample["alone"] + 2 * 32 / 8 * sample["the other tensor alone"]
    milliseconds, ratio = map(float, rows["behind a prefetch"])
    assert milliseconds == pytest.approx(1e3 * sample["behind a prefetch"], abs=0.1)
    assert ratio == pytest.approx(sample["behind a prefetch"] / bound, abs=0.01)
    assert os.listdir(disk) == []


def test_model_sets_its_time_beside_memory_and_the_drive(bench, disk, fake_fio):
    fake_fio(FIO)
    result = bench("model")
    rows = cells(result)
    files = {"aligned file", "other file"}
    assert set(rows) == {"forward 1", "forward 64", "forward 256", "step"} | files
    assert all(float(rows[name][5]) == 0 < float(rows[name][4]) for name in files)
    for name, (rate, handle, ratio) in cells(result, table=1).items():
        found = result["measurements"][0][name]
        seconds = found["read"] / 2**30 / found["offloaded"]
        assert float(rate) == pytest.approx(seconds, abs=0.01)
        assert float(handle) == pytest.approx(found["handle"], abs=0.01)
        assert float(ratio) == pytest.approx(seconds / found["handle"], abs=0.01)
    (sample,) = result["measurements"]
    assert "the same bits" in result["tables"][0]["title"]
    assert sample["host bytes peak"] <= sample["bytes"] / 5
    step = sample["step"]
    memory, offloaded, ratio, of_limit, read, written, _ = map(float, rows["step"])
    assert ratio == pytest.approx(step["offloaded"] / step["memory"], abs=0.01)
    seconds = (step["read"] + step["written"]) / 2**30 / sample["fio rw"]
    assert of_limit == pytest.approx(step["offloaded"] / max(seconds, step["memory"]), abs=0.01)
    assert read == pytest.approx(step["read"] / sample["bytes"], abs=0.01)
    assert float(rows["forward 1"][5]) == 0
    assert os.listdir(disk) == []


def test_commit_sets_its_time_beside_that_of_its_bytes(bench, disk, fake_fio):
    fake_fio(FIO)
    result = bench("commit")
    rows = cells(result)
    assert set(rows) == {"fp32, exact", "bf16, int8"}
    (sample,) = result["measurements"]["fp32, exact"]
    assert sample["bytes"] > sample["parameters"]  # And tables.
    commit, ratio, _, to_save, *_ = map(float, rows["fp32, exact"])
    assert commit == pytest.approx(1e3 * sample["commit"], abs=1)
    expected = (sample["commit"] - 0.03) / sample["fio write"]
    assert ratio == pytest.approx(expected, abs=0.01)
    assert to_save == pytest.approx(sample["torch.save"] / sample["commit"], abs=0.1)
    beside, without = sample["beside"], sample["without"]
    *_, share, ratio = map(float, cells(result, table=1)["fp32, exact"])
    waits = (beside["step"] - without["step"]) / beside["commit"]
    assert share == pytest.approx(waits, abs=0.01)
    seconds = beside["call"] + beside["compute"] + beside["step"]
    assert ratio == pytest.approx(seconds / (without["compute"] + without["step"]), abs=0.01)
    assert beside["compute"] >= sample["commit"]
    assert os.listdir(disk) == []


def test_save_sets_durable_saves_and_cold_loads_beside_others(
    bench, disk, fake_fio, monkeypatch, capsys
):
    pytest.importorskip("safetensors")
    fake_fio(FIO)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    result = bench("save")
    assert "DeepSpeed is not installed" in capsys.readouterr().err
    rows = cells(result)
    for operation, row in (("save", "save, durable"), ("load", "load, cold")):
        (sample,) = result["measurements"][operation]
        rate = sample["ours"]["gib_per_second"]
        ours, *ratios, fast, _ = rows[row]
        assert float(ours) == pytest.approx(rate, abs=0.01)
        theirs = [
            4,
            *(sample[who]["gib_per_second"] for who in ("safetensors", "torch.save", "DCP")),
        ]
        assert [float(r) for r in ratios] == pytest.approx([rate / t for t in theirs], abs=0.01)
        assert fast == "-"
    assert os.listdir(disk) == []


def test_power_cuts_say_what_they_leave(bench, disk):
    result = bench("power_cuts", "--contenders", "ours", "torch.save")
    if result is None or not result["tables"]:
        pytest.skip("no file system can be shut down here")
    ours, theirs = (cells(result)[name] for name in ("torch_ext.save", "torch.save"))
    assert ours[:3] == ["new 1"] * 3
    assert ours[3] in ("new 1", "old 1")
    assert theirs[0] == "new 1", "without a cut"
    assert theirs[1] in ("lost 1", "damaged 1")
    assert {m["outcome"] for m in result["measurements"]} >= {"new", "lost"}
    assert os.listdir(disk) == []


@pytest.mark.parametrize(
    ("found", "outcome"),
    [(1, "old"), (2, "new"), (3, "damaged"), (FileNotFoundError, "lost"), (OSError, "damaged")],
)
def test_what_is_left_is_compared_with_both_saves(module, found, outcome):
    worker = module("power_cuts_worker")
    contender = worker.Contender(64)

    def load(place):
        if isinstance(found, int):
            return contender.expected(found)
        raise found("no")

    contender.load = load
    assert worker.look(contender, Path("x"), 2)[0] == outcome
    contender.load = lambda place: (
        contender.expected(1) | {"layers.0": contender.expected(2)["layers.0"]}
    )
    assert worker.look(contender, Path("x"), 2)[0] == "damaged", "of both"


def test_a_loaded_file_with_other_bytes_is_an_error(module, tmp_path):
    import torch

    (tmp_path / "x").touch()
    contender = module("save").Contender("wrong", None, lambda path: {"a": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="wrong: other bytes came back"):
        contender.load_cold({"a": torch.ones(3)}, tmp_path / "x")


def test_zero_step_sets_the_two_ops_side_by_side(module, disk, tmp_path, monkeypatch, capsys):
    (tmp_path / "deepspeed.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    zero_step = module("zero_step")
    # A first step that nobody counts, then steps of 2 or 1 s.
    train = tmp_path / "train.py"
    train.write_text(
        "import json, sys\n"
        "seconds = [9, 2, 2] if sys.argv[2] == 'own' else [9, 1, 1]\n"
        "print('a note')\n"
        "print(json.dumps({'losses': [1.0], 'step_seconds': seconds}))\n"
    )
    monkeypatch.setattr(zero_step, "TRAIN", train)
    monkeypatch.setattr(
        sys, "argv", ["zero_step.py", "--quick", "--directory", disk, "--output", str(tmp_path)]
    )
    zero_step.main()
    rows = cells(json.loads((tmp_path / "zero_step.json").read_text()))
    assert rows == dict.fromkeys(("pipelined", "not pipelined"), ["2.00", "1.00", "0.50"])
    train.write_text(
        "import json, sys\n"
        "print(json.dumps({'losses': [sys.argv[2]], 'step_seconds': [1, 1]}))\n"
    )
    with pytest.raises(RuntimeError, match="the losses differ"):
        zero_step.main()
    train.write_text("raise SystemExit('no such op')")
    with pytest.raises(RuntimeError, match="no such op"):
        zero_step.main()
    assert os.listdir(disk) == []


def test_picture_shows_each_ratio_once(module, tmp_path, monkeypatch):
    picture = module("picture")
    table = {
        "title": "Disks",
        "header": ["", "GiB/s ours", "ours / fio", "ours / DeepSpeed"],
        "rows": [
            ["a, write", "3", "1.50 (0.75 to 2.00)", "-"],
            ["b, read", "2", "0.5", "4.00"],
        ],
    }
    found = [
        (r.name, r.other, r.median, r.least, r.most)
        for r in picture.ratios_of({"tables": [table]})
    ]
    assert found == [
        ("Disks: a, write", "fio", 1.5, 0.75, 2.0),
        ("Disks: b, read", "fio", 0.5, 0.5, 0.5),
        ("Disks: b, read", "DeepSpeed", 4.0, 4.0, 4.0),
    ]
    times = {
        "title": "A step; of 10 parameters",
        "header": ["", "step, s", "step / DeepSpeed's"],
        "rows": [["in memory", "1", "0.1"], ["exact", "4", "0.50 (0.25 to 0.80)"]],
    }
    (of_time,) = picture.ratios_of({"tables": [times]})
    assert (of_time.name, of_time.other) == ("A step: exact", "DeepSpeed")
    assert (of_time.median, of_time.least, of_time.most) == (2.0, 1.25, 4.0)
    png = tmp_path / "ratios.png"
    monkeypatch.setattr(sys, "argv", ["picture.py", str(tmp_path), str(png)])
    with pytest.raises(SystemExit, match="no table"):
        picture.main()
    (tmp_path / "io.json").write_text(json.dumps({"tables": [table]}))
    picture.main()
    assert png.read_bytes().startswith(b"\x89PNG")


def test_transfer_that_brings_back_other_bytes_is_an_error(module, disk):
    transfers = module("transfers")
    transfer = transfers.Transfer(
        disk, transfers.Buffers(2, 1 << 16), verify=False, engine="null"
    )
    transfer.fill()
    with pytest.raises(RuntimeError, match="not what was written"):
        transfer.check()
    transfer.close()


def test_transfer_fills_all_the_space_that_rewriting_takes(module, disk):
    transfers = module("transfers")
    transfer = transfers.Transfer(disk, transfers.Buffers(8, 1 << 16), shift=64)
    transfer.fill()
    stats = transfer._swapper.stats()
    assert stats["disk_bytes_written"] == 2 * transfer.nbytes
    assert stats["disk_bytes_allocated"] == transfer.nbytes
    transfer.write()
    assert not transfer.grew()
    transfer.check()
    transfer.close()


def test_result_names_machine_and_settings(bench):
    result = bench("cuda", "--device", "cpu")
    machine = result["machine"]
    for key in ("cpu", "cores", "kernel", "file_system", "disk", "torch", "date", "commit"):
        assert machine[key], key
    assert machine["aio"] == {"block_size": 1 << 20, "queue_depth": 32, "thread_count": 1}
    assert result["command"].startswith("benchmarks/cuda.py --quick")
    assert "--output" not in result["command"]


def test_cuda_without_a_gpu_says_so_and_ends_well(bench, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench("cuda") is None
    assert "no GPU" in capsys.readouterr().err


def test_optimizer_moves_the_bytes_of_its_state_within_its_memory(
    bench, disk, fake_fio, monkeypatch, capsys
):
    fake_fio(FIO)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    result = bench("optimizer")
    assert "without DeepSpeed" in capsys.readouterr().err
    rows = cells(result)
    # Two moments in a byte and half a master, each read and written; scales, padding.
    _, _, nothing, _, ratio, _ = rows["bfloat16, int8, nothing resident"]
    assert 8 <= float(nothing) < 8.2
    assert float(rows["bfloat16, int8, half resident"][2]) == pytest.approx(4, rel=0.05)
    assert rows["bfloat16, int8, all resident"][0] == "100.0%"
    assert float(rows["bfloat16, int8, all resident"][2]) == 0
    burst, alone = (
        next(c for c in result["measurements"][0]["contenders"] if c["name"] == name)["bursts"][
            0
        ]
        for name in ("int8, nothing resident", "int8, all resident")
    )
    moved = burst["moved"]["bytes_read"] + burst["moved"]["bytes_written"]
    limit = max(moved / (4 << 30), alone["seconds"])
    assert float(ratio) == pytest.approx(burst["seconds"] / limit, abs=0.01)
    budget, peak, *_ = cells(result, 2)["bfloat16, int8, nothing resident"]
    assert 0 < int(peak) <= int(budget)
    assert os.listdir(disk) == []


def test_optimizer_is_set_beside_deepspeed_per_parameter(module):
    def contender(name, seconds, **start):
        bursts = [
            {"seconds": s, "bytes_per_step": 8e9, "cpu_seconds": 0.5, "peak": 2 << 30}
            for s in seconds
        ]
        worker = SimpleNamespace(start={"peak": 1 << 30} | start, bursts=bursts)
        return module("contenders").Contender(name, worker)

    optimizer = module("optimizer")
    group = optimizer.Group(
        "bfloat16",
        contender("in memory", [1.0, 1.0]),
        contender("DeepSpeed", [10.0, 8.0], parameters=500_000_000),
        {("exact", "nothing resident"): contender("exact", [5.0, 5.0])},
    )
    rows = cells({"tables": [optimizer.speed_table([group], 10**9)]})
    assert rows["bfloat16, DeepSpeed"][1:3] == ["18.00 (16.00 to 20.00)", "16.00"]
    # 5 s for twice the parameters, beside 10 and 8.
    assert rows["bfloat16, exact"][-1] == "0.28 (0.25 to 0.31)"


def test_iteration_is_set_beside_its_parts(bench, disk, fake_fio, monkeypatch):
    fake_fio(FIO)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    result = bench("iteration")
    compute, alone, whole, *_ = (c["bursts"][0] for c in result["measurements"])
    row = cells(result)["exact, overlap off"]
    assert 20 <= float(row[1]) < 21
    moved = whole["moved"]["bytes_read"] + whole["moved"]["bytes_written"]
    limit = max(compute["seconds"] + alone["seconds"], moved / (4 << 30))
    assert float(row[3]) == pytest.approx(whole["seconds"] / limit, abs=0.01)
    assert os.listdir(disk) == []


def test_ranks_are_set_beside_their_mean(bench, disk):
    result = bench("ranks")
    rows = cells(result)
    seconds = [own for (own,) in result["measurements"]["2"]]
    mean = sum(seconds) / 2
    for rank, own in enumerate(seconds):
        step, ratio = map(float, rows[f"2 ranks, rank {rank}"])
        assert step == pytest.approx(own, abs=1e-3)
        assert ratio == pytest.approx(own / mean, abs=0.01)
    slowest = max(seconds) / mean
    assert float(rows["2 ranks, the slowest"][1]) == pytest.approx(slowest, abs=0.01)
    assert result["slowest_over_mean"]["2"] == pytest.approx(slowest)
    assert os.listdir(disk) == []


def test_ranks_that_fail_are_an_error_with_their_words(module, disk):
    ranks = module("ranks")
    job = {"directory": disk, "rounds": 1, "burst": 1, "engine": "none such"}
    options = argparse.Namespace(**job, parameters=10, host_memory=1 << 20)
    with pytest.raises(RuntimeError, match="none such"):
        ranks.run(options, 1)


def test_spread_is_median_and_extremes_of_the_rounds(module):
    common = module("common")
    assert common.spread([3.0, 1.0, 2.0, 9.0]) == {"median": 2.5, "min": 1.0, "max": 9.0}
    assert common.cell([3.0, 1.0, 2.0]) == "2.00 (1.00 to 3.00)"
    assert common.cell([1.5]) == "1.50"
    assert common.cell([]) == "-"


def test_fio_is_taken_at_its_own_clock(module, fake_fio):
    fake_fio(FIO)
    rate = module("common").fio("rw", Path("file"), 2 << 30, 1 << 20)
    assert rate.gib_per_second == pytest.approx(4.0)
    assert rate.cpu_seconds_per_gib == pytest.approx(0.1)


def test_fio_that_fails_is_an_error_with_its_words(module, fake_fio):
    fake_fio("echo 'engine libaio not loadable' >&2; exit 1")
    with pytest.raises(RuntimeError, match="not loadable"):
        module("common").fio("read", Path("file"), 1 << 20, 1 << 20)


@pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")
@pytest.mark.parametrize("rw", ["write", "randread", "rw"])
def test_fio_takes_the_options(module, disk, rw):
    rate = module("common").fio(rw, Path(disk, "file"), 4 << 20, 1 << 16)
    assert rate.gib_per_second > 0
    assert Path(disk, "file").stat().st_size == 4 << 20


NULL_ENGINE = {
    "context": {
        "date": "2026-01-01T00:00:00+00:00",
        "executable": "build/null_engine_bench",
        "num_cpus": 2,
        "mhz_per_cpu": 2000,
        "load_avg": [0.5],
    },
    "benchmarks": [
        {
            "run_name": "BM_QueuePieceOf1MiB/process_time/real_time",
            "run_type": kind,
            "cpu_time": cpu,
            "real_time": 2 * cpu,
            "time_unit": "ns",
            "operations": 256,
        }
        for kind, cpu in (
            *[("iteration", 256e3), ("iteration", 512e3), ("iteration", 768e3)],
            ("aggregate", 9e9),
        )
    ],
}


def test_report_puts_micro_benchmarks_and_others_on_one_page(
    module, monkeypatch, tmp_path, bench
):
    bench("cuda", "--device", "cpu")
    (tmp_path / "null_engine.json").write_text(json.dumps(NULL_ENGINE))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures -->\nold\n<!-- /figures -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), "--into", str(page)])
    module("report").main()
    text = page.read_text()
    assert text.startswith("before\n<!-- figures -->\n")
    assert text.endswith("\n<!-- /figures -->\nafter\n")
    assert "old" not in text
    assert "1 x 4 MiB, write" in text
    assert "2.00 (1.00 to 3.00)    | 4.00 (2.00 to 6.00)" in text
