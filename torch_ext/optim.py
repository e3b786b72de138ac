"""AdamW with its state on NVMe."""

from __future__ import annotations

import logging
import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from itertools import chain
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from torch_ext._native import _C
from torch_ext.config import AioConfig, parse_size, resolve_aio_config

_logger = logging.getLogger("torch_ext")


class OffloadedAdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW`` whose state lives in a file on an NVMe drive.

    For float32 parameters on the CPU the result equals that of
    ``torch.optim.AdamW(fused=True)`` bit for bit. bfloat16 and float16
    parameters get a float32 master copy in the file: each step updates the
    master and rounds it to the parameter. The parameter has the last word: what
    writes to it between steps (``model.load_state_dict``, ``clamp_``) counts.
    Parameters on another device are updated on the CPU.

    A step reads, updates and writes the state tile by tile, all three at once,
    in buffers that together take no more than ``host_memory``; the first tiles
    of the next step are read while the model computes. Parameters without a
    gradient cost nothing.

    ``state_dict()`` returns what ``torch.optim.AdamW`` would, and loads what it
    returned. Its tensors are memory over an unnamed file in ``nvme_path``, read
    when they are used, private to the process, and not changed by later steps.
    ``state`` itself holds no tensors: one dict with the number of steps for each
    parameter, which is for reading only. Nothing but ``state_dict()`` outlives
    the optimizer.

    After an I/O error the state may be half updated: each later step raises the
    error again until a state is loaded. A forked child may not use the
    optimizer (RuntimeError); pickling and copying raise TypeError.

    Args:
        params: As for ``torch.optim.AdamW``: parameters, named parameters or
            groups of them. Dense, float32, bfloat16 or float16.
        lr: Learning rate; a number or a tensor of one element.
        betas: Coefficients of the running averages.
        eps: Added to the denominator.
        weight_decay: Coefficient of decoupled weight decay.
        amsgrad: Must be False.
        maximize: Whether the objective is maximized.
        nvme_path: Directory on the drive to be used.
        host_memory: Most bytes of host memory for buffers, as 2**29 or
            "512MiB"; at least 240 KiB.
        aio: What ``get_aio_config`` takes or returns; None: the defaults.
        engine: "auto", or one that ``python -m torch_ext info`` lists.
        verify: Whether checksums are kept and compared on reading.

    Raises:
        OSError: The directory cannot be used.
        ValueError: A value is out of range, or a parameter is not dense.
        TypeError: A parameter cannot be optimized.

    Example:
        >>> optimizer = OffloadedAdamW(model.parameters(), lr=3e-4, nvme_path="/mnt/nvme")
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        nvme_path: str | os.PathLike[str],
        host_memory: int | str = "512MiB",
        aio: AioConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        engine: str = "auto",
        verify: bool = True,
    ) -> None:
        # The keys of torch.optim.AdamW, so that either loads the other's.
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": True,
            "decoupled_weight_decay": True,
        }
        _check_group(defaults)
        self._slots: dict[Tensor, int] = {}
        self._engine = _C.AdamWEngine(
            os.fspath(nvme_path),
            resolve_aio_config(aio, stacklevel=3),
            parse_size(host_memory),
            engine,
            bool(verify),
        )
        for note in self._engine.notes():
            _logger.warning("%s", note)
        # At exit the I/O must have ended before the interpreter is taken down.
        self._finalizer = weakref.finalize(self, _close_quietly, self._engine, os.getpid())
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, before or after the first step; see ``torch.optim``.

        Raises:
            ValueError, TypeError: As at construction; nothing is added then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            if len(set(group["params"])) < len(group["params"]):
                raise ValueError("a parameter group has the same parameter twice")
            slots = {p: self._engine.add(p) for p in group["params"]}
        except Exception:
            self.param_groups.pop()
            raise
        self._slots.update(slots)

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs a step and returns what ``closure``, if given, returned.

        When it returns, the parameters are updated; the last tiles of the state
        may still be on their way to the drive. A first step with a learning
        rate of 0 and gradients that are all 0 makes the state and does not
        count: so ``torch.distributed.checkpoint`` asks for it.

        Raises:
            OSError: Reading or writing failed, now or since the last call.
            RuntimeError: A gradient is sparse; the optimizer is closed or
                belongs to another process.
            ValueError, TypeError: A parameter or gradient cannot be used;
                nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = [(group, _with_gradient(group)) for group in self.param_groups]
        if not self.state and _asks_for_state_only(trained):
            parameters = [p for _, group in trained for p in group]
            self._engine.init([(self._slots[p], p) for p in parameters])
        else:
            self._engine.step(
                [
                    (*_hyper(group), [(self._slots[p], p, p.grad) for p in parameters])
                    for group, parameters in trained
                ]
            )
        for p in chain.from_iterable(parameters for _, parameters in trained):
            self.state[p] = self._shown_state(p)
        return loss

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Returns the state as ``torch.optim.AdamW`` does; see the class.

        ``exp_avg`` and ``exp_avg_sq`` are float32 whatever the parameter is;
        bfloat16 and float16 parameters have ``master_param`` besides.

        Raises:
            OSError: Reading failed, or ``nvme_path`` has no space for a copy.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        number_of = {p: i for i, p in enumerate(self._parameters())}
        groups = []
        for group in self.param_groups:
            packed = {key: value for key, value in group.items() if key != "params"}
            packed["params"] = [number_of[p] for p in group["params"]]
            groups.append(packed)
        by_slot = {self._slots[p]: number for p, number in number_of.items()}
        state = {}
        for slot, step, exp_avg, exp_avg_sq, master in self._engine.save(
            [(self._slots[p], p) for p in number_of]
        ):
            entry = {
                "step": torch.tensor(float(step), dtype=torch.float32),
                "exp_avg": exp_avg,
                "exp_avg_sq": exp_avg_sq,
            }
            if master is not None:
                entry["master_param"] = master
            state[by_slot[slot]] = entry
        state_dict = {"state": state, "param_groups": groups}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        return state_dict

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of this class or of ``torch.optim.AdamW``.

        Tensors may have any floating dtype and device and are read one part
        after the other; the dict is not copied. A bfloat16 or float16
        parameter whose ``master_param`` is missing, or does not round to it,
        is its own master.

        Raises:
            ValueError, TypeError: The state does not fit; nothing has changed.
            OSError: Writing failed; the old state is gone.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        groups = [
            _merged(group, saved, self.defaults)
            for group, saved in _paired(self.param_groups, state_dict["param_groups"])
        ]
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        entries = [
            (self._slots[p], p, *_read_entry(key, entry))
            for key, p in zip(ids, self._parameters(), strict=True)
            if (entry := state_dict["state"].get(key))
        ]
        self._engine.load(entries)
        self.param_groups = groups
        self.state = defaultdict(dict)
        for _, p, *_ in entries:
            self.state[p] = self._shown_state(p)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def stats(self) -> dict[str, int | float]:
        """Counters since the optimizer was made.

        ``steps``; ``bytes_read`` and ``bytes_written`` (of the drive, padded);
        ``read_seconds``, ``update_seconds``, ``write_seconds`` (while a lane was
        busy) and ``wait_seconds`` (that steps waited for I/O);
        ``host_memory``, ``host_bytes_peak`` (bytes in use at most); ``tiles``,
        ``tile_bytes`` (of a buffer) and ``buffers``.
        """
        return self._engine.stats()

    def timeline(self) -> list[tuple[str, int, float, float]]:
        """What the last step did: (lane, tile, start, end) in order of start.

        The lane is "read", "update" or "write"; times are seconds since the step
        began, negative for what was read ahead.
        """
        return self._engine.timeline()

    @property
    def engine(self) -> str:
        """The I/O engine in use."""
        return self._engine.engine

    def close(self) -> None:
        """Waits for writes in flight and frees memory and disk space.

        Idempotent. Later calls of anything but ``stats`` raise RuntimeError.

        Raises:
            OSError: An error that no call has raised; all is closed then.
        """
        self._engine.close()

    def __enter__(self) -> OffloadedAdamW:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception:
            # The body's own exception says more than what followed from it.
            if error is None:
                raise
            _logger.exception("closing an OffloadedAdamW after another error")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an OffloadedAdamW belongs to its process and cannot be copied or pickled: "
            "take its state_dict()"
        )

    def _parameters(self) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _shown_state(self, parameter: Tensor) -> dict[str, int | None]:
        """An entry of ``state``.

        Without tensors, since accelerate and Lightning move those to the GPU;
        with all keys, since torch.distributed.checkpoint looks for their names.
        """
        shown: dict[str, int | None] = {"step": self._engine.step_of(self._slots[parameter])}
        shown |= {"exp_avg": None, "exp_avg_sq": None}
        if parameter.dtype != torch.float32:
            shown["master_param"] = None
        return shown


def _check_group(group: dict[str, Any]) -> None:
    """Raises ValueError, in torch.optim.AdamW's words where it has some."""
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not float(lr) >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not group["eps"] >= 0.0:
        raise ValueError(f"Invalid epsilon value: {group['eps']}")
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas}")
    for i, beta in enumerate(betas):
        if not 0.0 <= float(beta) < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    if group["amsgrad"]:
        raise ValueError("amsgrad=True is not supported by OffloadedAdamW")
    if not group["decoupled_weight_decay"]:
        raise ValueError(
            "OffloadedAdamW has decoupled weight decay only; this is the state of a "
            "torch.optim.Adam without it"
        )


def _hyper(group: dict[str, Any]) -> tuple[float, float, float, float, float, bool]:
    _check_group(group)
    beta1, beta2 = group["betas"]
    numbers = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
    return (*map(float, numbers), bool(group["maximize"]))


def _with_gradient(group: dict[str, Any]) -> list[Tensor]:
    return [p for p in group["params"] if p.grad is not None]


def _asks_for_state_only(trained: list[tuple[dict[str, Any], list[Tensor]]]) -> bool:
    """Whether this is the step by which DCP makes an optimizer have state."""
    gradients = [p.grad for _, parameters in trained for p in parameters]
    return (
        bool(gradients)
        and all(float(group["lr"]) == 0.0 for group, _ in trained)
        and not any(g.is_sparse or bool(g.any()) for g in gradients)
    )


def _paired(
    groups: list[dict[str, Any]], saved: list[dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    if len(groups) != len(saved):
        raise ValueError("loaded state dict has a different number of parameter groups")
    for group, other in zip(groups, saved, strict=True):
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group "
                "that doesn't match the size of optimizer's group"
            )
    return list(zip(groups, saved, strict=True))


def _merged(
    group: dict[str, Any], saved: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, Any]:
    """The saved group with this optimizer's parameters and way of computing."""
    merged = defaults | {
        key: deepcopy(value) for key, value in saved.items() if key != "params"
    }
    for key in ("foreach", "capturable", "differentiable", "fused"):
        merged[key] = defaults[key]
    _check_group(merged)
    if "param_names" in group:
        merged.setdefault("param_names", group["param_names"])
    merged["params"] = group["params"]
    return merged


def _read_entry(
    key: Any, entry: Mapping[str, Any]
) -> tuple[int, Tensor, Tensor, Tensor | None]:
    for name in ("exp_avg", "exp_avg_sq"):
        if not isinstance(entry.get(name), Tensor):
            raise ValueError(f"the loaded state of parameter {key!r} has no tensor {name!r}")
    step = float(entry.get("step", -1))
    if not (step >= 0 and step.is_integer()):
        raise ValueError(f"the loaded state of parameter {key!r} has the step {step}")
    return int(step), entry["exp_avg"], entry["exp_avg_sq"], entry.get("master_param")


def _close_quietly(engine: Any, pid: int) -> None:
    if pid != os.getpid():
        return
    try:
        engine.close()
    except Exception:
        _logger.exception("an error found when an OffloadedAdamW was dropped")
