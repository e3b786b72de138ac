"""Figures, table and picture of the two runs of `train_gpt.py`."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median
from typing import Any

LAST_LOSSES = 10
STEPS_SHOWN = 3
LOSS_TOLERANCE = 0.05  # For where equality to the bit is not promised.
# These colours differ for the colour-blind too.
GREY, BLUE, ORANGE, GREEN = "#9a9a9a", "#0072b2", "#d55e00", "#009e73"
LANES = {"read": BLUE, "update": GREEN, "write": ORANGE}

Run = dict[str, Any]
Interval = tuple[float, float]


def union(intervals: list[Interval]) -> float:
    """Seconds that lie in at least one interval."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def hidden_share(transfers: list[Interval], steps: list[Interval]) -> float | None:
    """Returns the share of the I/O time that lies outside `optimizer.step()`, where forward
    and backward are.

    I/O time is time with at least one read or write of optimizer state in flight. Time with
    both counts once. None without I/O.
    """
    busy = union(transfers)
    if busy <= 0:
        return None
    inside = sum(
        union([(max(a, begin), min(b, end)) for a, b in transfers if a < end and b > begin])
        for begin, end in steps
    )
    return 1 - inside / busy


def summarize(job: dict[str, Any], runs: list[Run], place: Run, seconds: float) -> Run:
    """Returns all figures, as they are written to JSON. The table shows some."""
    memory, nvme = runs
    return {
        "job": job,
        "place": place,
        "text": memory["text"],
        "model_parameters": memory["parameters_count"],
        "state_bytes": 2 * 4 * memory["parameters_count"],
        "seconds": seconds,
        **compare(memory, nvme),
        "in_memory": summarize_run(job, memory),
        "offloaded": summarize_run(job, nvme),
        "io": summarize_io(nvme),
        "timeline": nvme["lanes"][-STEPS_SHOWN:],
        "sample": nvme["sample"],
    }


def compare(memory: Run, nvme: Run) -> Run:
    """Whether losses of all steps, validation loss and parameters are the same bits."""
    pairs = zip(memory["steps"], nvme["steps"], strict=True)
    differences = [abs(a["loss"] - b["loss"]) for a, b in pairs]
    differing = [i for i, d in enumerate(differences) if d != 0]  # A NaN differs too.
    names = [name for name, bits in memory["digests"].items() if nvme["digests"][name] != bits]
    return {
        "equal": not differing
        and not names
        and memory["validation_loss"] == nvme["validation_loss"],
        "first_differing_step": differing[0] + 1 if differing else None,
        "largest_loss_difference": max(differences),
        "differing_parameters": names,
    }


def summarize_killed(killed: Run, undisturbed: Run) -> Run:
    """Returns what the run that was killed and resumed has to do with the other one."""
    losses = [step["loss"] for step in undisturbed["steps"]]
    differences = [
        abs(loss - losses[step - 1])
        for step, found in killed["losses"].items()
        for loss in found
    ]
    commits = killed["commits"]
    return {
        "steps": killed["steps"],
        "killed_in": killed["killed_in"],
        "resumed_after": killed["resumed_after"],
        # A step that is missing is a difference too.
        "equal": len(killed["losses"]) == killed["steps"]
        and not any(d != 0 for d in differences),
        "largest_loss_difference": max(differences),
        "commits": len(commits),
        "commit_seconds": median(commit["seconds"] for commit in commits),
        "commit_bytes": median(commit["bytes"] for commit in commits),
    }


def summarize_run(job: dict[str, Any], run: Run) -> Run:
    steps = run["steps"]
    # The first step imports and allocates.
    timed = steps[1:] or steps
    losses = [step["loss"] for step in steps]
    step_seconds = median(step["end"] - step["start"] for step in timed)
    return {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "mean_last_losses": mean(losses[-LAST_LOSSES:]),
        "mean_loss": mean(losses),
        "validation_loss": run["validation_loss"],
        "step_seconds": step_seconds,
        "optimizer_seconds": median(step["end"] - step["optimizer_start"] for step in timed),
        "tokens_per_second": job["batch"] * job["context"] / step_seconds,
        "memory_before": run["memory_before"],
        "memory_peak": run["memory_peak"],
        "threads": run["threads"],
        "steps": steps,
    }


def summarize_io(nvme: Run) -> Run:
    transfers = [
        (start, end)
        for step in nvme["lanes"]
        for lane, _, start, end in step
        if lane in ("read", "write")
    ]
    steps = [(step["optimizer_start"], step["end"]) for step in nvme["steps"]]
    return nvme["stats"] | {
        "busy_seconds": union(transfers),
        "hidden_share": hidden_share(transfers, steps),
    }


def table(figures: Run) -> str:
    """Returns the table, for a reader."""
    memory, nvme, io = figures["in_memory"], figures["offloaded"], figures["io"]
    state = size(figures["state_bytes"])
    device = figures["job"]["device"]
    on_cpu = device.startswith("cpu")
    rows = [
        ("", "AdamW in memory", "OffloadedAdamW"),
        *[
            (label, f"{memory[key]:.4f}", f"{nvme[key]:.4f}")
            for label, key in (
                ("loss, first step", "first_loss"),
                ("loss, last step", "last_loss"),
                (f"loss, mean of the last {LAST_LOSSES}", "mean_last_losses"),
                ("loss, mean of all steps", "mean_loss"),
                ("loss on text not trained on", "validation_loss"),
            )
        ],
        ("tokens/s", f"{memory['tokens_per_second']:.0f}", f"{nvme['tokens_per_second']:.0f}"),
        *[
            (label, f"{memory[key] * 1e3:.0f} ms", f"{nvme[key] * 1e3:.0f} ms")
            for label, key in (
                ("step (median)", "step_seconds"),
                ("  of it in the optimizer", "optimizer_seconds"),
            )
        ],
        ("optimizer state", f"{state} {'in memory' if on_cpu else device}", f"{state} on disk"),
        (
            "host memory for state",
            state if on_cpu else size(0),
            f"{size(io['host_bytes_peak'])} at most",
        ),
        ("peak memory of the process", size(memory["memory_peak"]), size(nvme["memory_peak"])),
        ("  growth while training", growth(memory), growth(nvme)),
        ("state read", size(0), transfer(io["bytes_read"], io["read_seconds"])),
        ("state written", size(0), transfer(io["bytes_written"], io["write_seconds"])),
        ("I/O behind forward and backward", "", percent(io["hidden_share"])),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
    lines.insert(1, "-" * len(lines[0]))
    title = (
        f"{figures['model_parameters'] / 1e6:.1f} M parameters, "
        f"{figures['text']['bytes'] / 1e6:.1f} MB of text in {figures['text']['files']} files, "
        f"{figures['job']['steps']} steps on {device}, "
        f"{figures['seconds']:.0f} s"
    )
    sample = "\n".join(f"  | {printable(line)}" for line in figures["sample"].split("\n"))
    story = [verdict(figures), *killed_story(figures["killed"]), "", "what it writes:", sample]
    return "\n".join([title, "", *lines, "", *story])


def killed_story(killed: Run) -> list[str]:
    """Says what the kill has changed."""
    equal = "equal to the bit" if killed["equal"] else "NOT equal to the bit"
    return [
        f"killed in step {killed['killed_in']}, resumed after step {killed['resumed_after']}: "
        f"the losses of all {killed['steps']} steps are {equal}",
        f"a commit: {killed['commit_seconds'] * 1e3:.0f} ms, {size(killed['commit_bytes'])} "
        f"written (median of {killed['commits']})",
    ]


def is_good(figures: Run) -> bool:
    """Whether the runs agree as far as OffloadedAdamW promises.

    It updates on the CPU, with torch's own kernel. Another device's kernel rounds differently.
    """
    both = (figures, figures["killed"])
    if figures["job"]["device"].startswith("cpu"):
        return all(found["equal"] for found in both)
    return all(found["largest_loss_difference"] <= LOSS_TOLERANCE for found in both)


def verdict(figures: Run) -> str:
    if figures["equal"]:
        return "equal to the bit: yes (the loss of every step, all parameters)"
    step, device = figures["first_differing_step"], figures["job"]["device"]
    names = figures["differing_parameters"]
    losses = (
        f"losses from step {step} on, by at most {figures['largest_loss_difference']:.2g}"
        if step
        else "no loss of a step"
    )
    promise = "" if device.startswith("cpu") else f"; only promised on cpu, not on {device}"
    return f"equal to the bit: NO ({losses}; {len(names)} parameters differ{promise})"


def printable(text: str) -> str:
    """Takes out a terminal's control codes, which a model's text may hold."""
    return "".join(c if c.isprintable() else "." for c in text)


def growth(run: Run) -> str:
    return size(run["memory_peak"] - run["memory_before"])


def size(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def transfer(count: int, seconds: float) -> str:
    rate = f", {count / seconds / 1e9:.2f} GB/s" if seconds > 0 else ""
    amount = size(count) if count < 1e9 else f"{count / 1e9:.2f} GB"
    return f"{amount}{rate}"


def percent(share: float | None) -> str:
    return "none was needed" if share is None else f"{share:.0%}"


def plot(figures: Run, path: Path) -> str:
    """Draws losses and timelines; returns the line that says where."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(10, 12), layout="constrained")
    draw_losses(axes[0], figures)
    draw_lanes(axes[1], figures)
    draw_tiles(axes[2], figures)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return f"picture: {path}"


def draw_losses(axes: Any, figures: Run) -> None:
    for key, label, style in (
        ("in_memory", "AdamW, state in memory", {"color": GREY, "linewidth": 5}),
        ("offloaded", "OffloadedAdamW, state on NVMe", {"color": BLUE, "linewidth": 1.5}),
    ):
        losses = [step["loss"] for step in figures[key]["steps"]]
        marker = "o" if len(losses) == 1 else None
        axes.plot(range(1, len(losses) + 1), losses, label=label, marker=marker, **style)
    answer = "equal to the bit" if figures["equal"] else "NOT equal"
    axes.set_title(
        f"GPT with {figures['model_parameters'] / 1e6:.1f} M parameters on Python source text: "
        f"both runs are {answer}"
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend()


def shade_optimizer(axes: Any, steps: list[Run], begin: float, scale: float) -> None:
    for step in steps:
        start, end = step["optimizer_start"] - begin, step["end"] - begin
        axes.axvspan(start * scale, end * scale, color="#ebebeb", linewidth=0, zorder=0)


def draw_lanes(axes: Any, figures: Run) -> None:
    """Draws the last steps: a row for the model, and one for each lane of the optimizer."""
    steps = figures["offloaded"]["steps"][-STEPS_SHOWN:]
    begin, end = steps[0]["start"], steps[-1]["end"]
    rows: dict[str, list[Interval]] = {
        "write": [],
        "read": [],
        "update": [],
        "forward,\nbackward": [(step["start"], step["optimizer_start"]) for step in steps],
    }
    for events in figures["timeline"]:
        for lane, _, start, stop in events:
            rows[lane].append((start, stop))
    colours = [*(LANES[lane] for lane in ("write", "read", "update")), GREY]
    for height, (colour, intervals) in enumerate(zip(colours, rows.values(), strict=True)):
        bars = [(start - begin, stop - start) for start, stop in intervals]
        axes.broken_barh(bars, (height - 0.35, 0.7), color=colour, linewidth=0, zorder=2)
    shade_optimizer(axes, steps, begin, 1)
    axes.set_yticks(range(len(rows)), labels=list(rows))
    axes.set_xlim(0, end - begin)
    axes.set_xlabel("time (s)")
    axes.set_title(
        f"The last {len(steps)} steps with the state on NVMe; shaded: inside optimizer.step()"
    )
    axes.grid(axis="x", alpha=0.3)


def draw_tiles(axes: Any, figures: Run) -> None:
    """Draws one step from close by: what each tile of the state went through."""
    steps = figures["offloaded"]["steps"][-STEPS_SHOWN:]
    # The last step but one, so that reads ahead for the next are there too.
    shown = max(len(steps) - 2, 0)
    begin, end = steps[shown]["lanes_start"], steps[shown]["end"]
    until = end + 0.7 * (end - begin)
    for lane, colour in LANES.items():
        bars = [
            (tile, start, stop)
            for events in figures["timeline"][shown : shown + 2]
            for kind, tile, start, stop in events
            if kind == lane and begin < stop and start < until
        ]
        axes.barh(
            [tile for tile, _, _ in bars],
            [(stop - start) * 1e3 for _, start, stop in bars],
            left=[(start - begin) * 1e3 for _, start, _ in bars],
            color=colour,
            label=lane,
            zorder=2,
        )
    shade_optimizer(axes, steps[shown : shown + 1], begin, 1e3)
    axes.set_xlim((begin - end) * 0.1e3, (until - begin) * 1e3)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.invert_yaxis()
    axes.set_xlabel("time (ms) since optimizer.step() was called")
    axes.set_ylabel("tile of the state")
    axes.set_title("One of these steps, tile by tile; top right: read ahead for the next step")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower left")
