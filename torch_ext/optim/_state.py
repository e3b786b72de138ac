"""``optimizer.state`` of an optimizer whose state is on a drive.

The offload is asked each time which parameter has a state, and for its numbers. Only two things
are held here: keys of others (a wrapper's ``slow_buffer``), and what was assigned and is not
written yet. A tensor is read from the drive when it is asked for by name. A loop over items
finds ``None`` in its place, since accelerate, Lightning and ``torch.distributed.checkpoint``
move the tensors that they find.

A tensor that was read or assigned is watched for as long as somebody else has it. What is
written to it before the next step counts, as with ``torch.optim``. What is written to it after
that step is an error. A checksum tells whether a tensor that was read has changed, since
``.data`` and numpy arrays leave its version alone. A tensor that was assigned may be part of a
whole checkpoint, so there the version tells.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import ItemsView, Iterable, Iterator, Mapping, MutableMapping, ValuesView
from typing import Any, Protocol

import torch
from torch import Tensor

from torch_ext._native import _C

#: How many references a thing has that only an entry holds: the entry's, and the call's.
_OWN_REFERENCES = 2
#: Dicts whose owner may put something into them after he has assigned them.
_FILLED = (dict, defaultdict, OrderedDict)


class Owner(Protocol):
    """The optimizer as its state sees it."""

    def _known(self) -> Iterable[Tensor]:
        """Returns the parameters that may have a state."""

    def _state_of(self, parameter: Tensor) -> dict[str, Any] | None:
        """Returns the numbers, and None for each tensor. None if there is no state."""

    def _own_names(self, parameter: Tensor) -> frozenset[str]:
        """Returns the names in a state that are the optimizer's own."""

    def _read_state(self, parameter: Tensor, name: str) -> Tensor:
        """Returns a tensor of the state, on the parameter's device, in memory of its own."""

    def _like(self, parameter: Tensor, local: Tensor) -> Tensor:
        """Returns a local tensor as a user shall see it: a DTensor for a DTensor."""

    def _change_states(self, changes: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """Checks and writes what was assigned, all or nothing."""

    def _forget_states(self, parameters: list[Tensor]) -> None: ...

    def _is_between_steps(self) -> bool:
        """Whether no step has begun. With "update", backward begins it."""

    def _check_between_steps(self, what: str) -> None:
        """Raises RuntimeError if a step has begun."""

    def _takes_part(self, parameter: Tensor) -> bool:
        """Whether the parameter is in a group, or was."""

    def _label_of(self, parameter: Tensor) -> str: ...


def _local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


class _Handle:
    """A tensor that somebody else may hold. It tells whether it has been written to."""

    def __init__(self, alias: Tensor, is_read: bool) -> None:
        self.alias = alias
        self._is_read = is_read
        self._mark = self._now()

    def _now(self) -> Any:
        local = _local(self.alias)
        if self._is_read:
            return _C.checksum_of(local.cpu())
        return None if local.is_inference() else local._version

    @property
    def changed(self) -> bool:
        return self._now() != self._mark

    @property
    def released(self) -> bool:
        is_held = self._is_read and sys.getrefcount(self.alias) > _OWN_REFERENCES
        return not is_held and _is_released(self.alias)


def _is_released(tensor: Tensor) -> bool:
    """Whether nobody else holds the tensor's memory: no view, no numpy array."""
    return _C.users_of(_local(tensor)) <= 1


def _same_number(value: Any, number: Any) -> bool:
    try:
        return float(value) == float(number)
    except (TypeError, ValueError, RuntimeError):
        return False


class _Plain:
    """What a dict can do beyond a MutableMapping. Copies are plain dicts, read in full."""

    def copy(self) -> dict[Any, Any]:
        return dict(self.items())  # type: ignore[attr-defined]

    def __copy__(self) -> dict[Any, Any]:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[Any, Any]:
        return copy.deepcopy(self.copy(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (self.copy(),)

    def __or__(self, other: Any) -> dict[Any, Any]:
        return self.copy() | other

    def __ror__(self, other: Any) -> dict[Any, Any]:
        return other | self.copy()

    def __ior__(self, other: Any) -> Any:
        self.update(other)  # type: ignore[attr-defined]
        return self

    def __reversed__(self) -> Iterator[Any]:
        return reversed(list(self))  # type: ignore[call-overload]

    def __repr__(self) -> str:
        return repr(dict(self.items()))  # type: ignore[attr-defined]

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:  # type: ignore[operator]
            self[key] = default  # type: ignore[index]
        return self[key]  # type: ignore[index]

    def get(self, key: Any, default: Any = None) -> Any:
        found = key in self  # type: ignore[operator]
        return self[key] if found else default  # type: ignore[index]


class _Assigned:
    """A mapping that follows the dict that was assigned to it, while somebody has that dict."""

    #: The dict, and what was in it when it was last looked at.
    _source: tuple[Mapping[Any, Any], dict[Any, Any]] | None

    def _assign(self, mapping: Mapping[Any, Any]) -> None:
        self._source = (mapping, dict(mapping)) if type(mapping) in _FILLED else None

    def _follow(self) -> None:
        """Takes what was put into the dict, or taken out, since then."""
        if self._source is None:
            return
        mapping, seen = self._source
        self._source = (mapping, dict(mapping))
        for key in (seen.keys() - mapping.keys()) & self.keys():  # type: ignore[attr-defined]
            del self[key]  # type: ignore[attr-defined]
        for key, value in mapping.items():
            if key not in seen or seen[key] is not value:
                self[key] = value  # type: ignore[index]

    def _let_source_go(self) -> None:
        """If nobody else has it: nothing can be put into it then."""
        if self._source is not None and sys.getrefcount(self._source[0]) <= _OWN_REFERENCES:
            self._source = None


class ParameterState(_Assigned, _Plain, MutableMapping, dict):  # type: ignore[misc]
    """``optimizer.state[p]``: see the module."""

    _home: weakref.ref[OptimizerState] | None
    _parameter: Tensor | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Programs that walk through collections make new ones of the same type.
        return dict(*args, **kwargs)

    @classmethod
    def _of(cls, home: OptimizerState, parameter: Tensor) -> ParameterState:
        entry = dict.__new__(cls)
        entry._values = {}
        entry._source = None
        entry._attach(home, parameter)
        return entry

    def _attach(self, home: OptimizerState, parameter: Tensor) -> None:
        self._home = weakref.ref(home)
        self._parameter = parameter
        self._gone: set[str] = set()
        self._handles: dict[str, _Handle] = {}
        owner = home._owner()
        if owner is not None and self._values:
            for name in self._pending(owner._own_names(parameter)):
                self._values[name] = home._given(self._values[name])
            home._active[id(self)] = self

    def _detach(self, values: dict[str, Any]) -> None:
        """Makes the entry a plain dict of its own, with these values."""
        self._home = self._parameter = self._source = None
        self._values, self._gone, self._handles = values, set(), {}

    @property
    def _is_attached(self) -> bool:
        return self._home is not None

    def _owner(self) -> Owner | None:
        home = None if self._home is None else self._home()
        return None if home is None else home._owner()

    def _touch(self) -> OptimizerState:
        home = self._home()
        home._active[id(self)] = self
        home._sweep(self)
        return home

    def _shown(self) -> dict[str, Any]:
        """Returns what the offload has: numbers, and None for tensors."""
        owner = self._owner()
        shown = owner._state_of(self._parameter) if owner is not None else None
        return {k: v for k, v in (shown or {}).items() if k not in self._gone}

    def _own(self) -> frozenset[str]:
        owner = self._owner()
        return frozenset() if owner is None else owner._own_names(self._parameter)

    def _glance(self, name: str, shown: dict[str, Any]) -> Any:
        """Returns a value as a loop over items finds it."""
        if name not in self._values:
            return shown[name]
        value = self._values[name]
        return None if isinstance(value, Tensor) and name in self._own() else value

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._shown() | self._values))

    def __len__(self) -> int:
        return len(self._shown() | self._values)

    def __contains__(self, name: Any) -> bool:
        return name in self._values or name in self._shown()

    def items(self) -> ItemsView[str, Any]:
        return _Items(self)

    def values(self) -> ValuesView[Any]:
        return _Values(self)

    def copy(self) -> dict[str, Any]:
        return {name: self[name] for name in self}

    def __getitem__(self, name: str) -> Any:
        if name in self._values:
            return self._values[name]
        owner, shown = self._owner(), self._shown()
        if owner is None or name not in shown:
            raise KeyError(name)
        if shown[name] is not None:
            return shown[name]
        if name not in self._handles:
            owner._check_between_steps(f"state[...][{name!r}]")
            self._touch()
            read = owner._read_state(self._parameter, name)
            self._handles[name] = _Handle(owner._like(self._parameter, read), True)
        return self._handles[name].alias

    def __setitem__(self, name: str, value: Any) -> None:
        owner = self._owner()
        if owner is not None and name in self._own():
            if self._is_as_it_is(name, value, self._shown()):
                return
            owner._check_between_steps(f"state[...][{name!r}] = ...")
            self._handles.pop(name, None)
            value = self._touch()._given(value)
        self._gone.discard(name)
        self._values[name] = value

    def _is_as_it_is(self, name: str, value: Any, shown: dict[str, Any]) -> bool:
        """Whether the value is what a loop over items has found.

        Raises:
            ValueError: The tensors of another step were looked for in such a loop.
        """
        if value is None:
            if shown.get(name, 0) is None and self._has_other_numbers(shown):
                raise self._no_tensor(name)
            return isinstance(self._values.get(name, shown.get(name, 0)), Tensor | None)
        if name in self._values:
            return value is self._values[name]
        return shown.get(name) is not None and _same_number(value, shown[name])

    def _has_other_numbers(self, shown: dict[str, Any]) -> bool:
        return any(
            not _same_number(self._values.get(name, number), number)
            for name, number in shown.items()
            if number is not None
        )

    def _no_tensor(self, name: str) -> ValueError:
        owner = self._owner()
        label = "a parameter" if owner is None else owner._label_of(self._parameter)
        return ValueError(
            f"the state of {label} is assigned other numbers, and None for {name!r}, as a "
            f"loop over items() shows each tensor: read it by its name, state[p][{name!r}]"
        )

    def __delitem__(self, name: str) -> None:
        owner, shown = self._owner(), self._shown()
        if owner is None or name not in shown:
            del self._values[name]
            return
        owner._check_between_steps(f"del state[...][{name!r}]")
        self._values.pop(name, None)
        self._handles.pop(name, None)
        self._gone.add(name)
        if len(shown) > 1:
            self._touch()
        else:
            owner._forget_states([self._parameter])
            self._gone.clear()

    def clear(self) -> None:
        self._replace({})

    def _replace(self, mapping: Mapping[str, Any]) -> None:
        """Takes a mapping that is assigned as a whole. Values that are as they are stay."""
        owner = self._owner()
        if owner is None:
            self._values = dict(mapping)
            return
        shown, own = owner._state_of(self._parameter) or {}, self._own()
        values = self._changed_by(mapping)
        if any(shown.get(name) is not None for name in values):
            for name in mapping.keys() & own:
                if mapping[name] is None and shown.get(name, 0) is None:
                    raise self._no_tensor(name)
        gone = shown.keys() - mapping.keys()
        if gone or values.keys() & own:
            owner._check_between_steps("changing state")
        if gone and gone == shown.keys():
            owner._forget_states([self._parameter])
            gone = set()
        home = self._touch()
        kept = {n: v for n, v in self._values.items() if n in own and n in mapping}
        given = {n: home._given(v) if n in own else v for n, v in values.items()}
        self._values = kept | given
        self._gone = set(gone)
        watched = mapping.keys() - values.keys() if shown else ()
        self._handles = {n: h for n, h in self._handles.items() if n in watched}
        self._assign(mapping)

    def _changed_by(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """What of it is not as it is."""
        owner = self._owner()
        shown, own = owner._state_of(self._parameter) or {}, self._own()
        return {
            name: value
            for name, value in mapping.items()
            if not (name in own and self._is_as_it_is(name, value, shown))
        }

    # What waits to be written --------------------------------------------------------

    def _pending(self, own: Iterable[str]) -> dict[str, Any]:
        return {name: self._values[name] for name in own if name in self._values}

    def _collect(self, owner: Owner) -> dict[str, Any]:
        """Returns all that must be written before the state is used.

        Raises:
            ValueError: A part of the state was deleted.
        """
        self._follow()
        self._let_source_go()
        for name, handle in list(self._handles.items()):
            if handle.changed:
                self._values[name] = self._handles.pop(name).alias.detach()
            elif handle.released:
                del self._handles[name]
        if lacks := self._gone - self._values.keys():
            raise ValueError(
                f"the state of {owner._label_of(self._parameter)} lacks {sorted(lacks)}, "
                f"which was deleted: assign it, or delete the whole entry"
            )
        return self._pending(owner._own_names(self._parameter))

    def _written(self, names: Iterable[str]) -> None:
        for name in names:
            value = self._values.pop(name)
            if isinstance(value, Tensor) and not _is_released(value):
                self._handles[name] = _Handle(value, False)
        self._gone.clear()

    def _settle(self, owner: Owner) -> None:
        """Writes what nobody else holds any more. It would take memory until the step."""
        self._follow()
        self._let_source_go()
        if self._source is not None:
            return
        for name, handle in list(self._handles.items()):
            if handle.released:
                if handle.changed:
                    self._values[name] = handle.alias.detach()
                del self._handles[name]
        pending = self._pending(owner._own_names(self._parameter))
        tensors = [value for value in pending.values() if isinstance(value, Tensor)]
        if tensors and not self._gone - self._values.keys() and all(map(_is_released, tensors)):
            try:
                owner._change_states([(self._parameter, pending)])
            except (ValueError, TypeError):
                return  # It may still be made to fit before it is used.
            self._written(pending)


class _Items(ItemsView):
    _mapping: ParameterState

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        shown = self._mapping._shown()
        for name in list(shown | self._mapping._values):
            yield name, self._mapping._glance(name, shown)


class _Values(ValuesView):
    _mapping: ParameterState

    def __iter__(self) -> Iterator[Any]:
        return (value for _, value in self._mapping.items())


class OptimizerState(_Assigned, _Plain, MutableMapping, defaultdict):  # type: ignore[misc]
    """``optimizer.state``: see the module."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return defaultdict(*args, **kwargs)

    @classmethod
    def _of(cls, owner: Any) -> OptimizerState:
        state = defaultdict.__new__(cls)
        state.default_factory = dict
        state._owner_ref = weakref.ref(owner)
        state._entries = {}  # By parameter.
        state._others = {}  # By other keys.
        state._active = {}  # Entries with something to write or to watch.
        state._stale = []  # Handles from before a step, with parameter and name.
        state._source = None
        state._writes = False
        return state

    def _owner(self) -> Owner | None:
        return self._owner_ref()

    def __iter__(self) -> Iterator[Any]:
        owner = self._owner()
        keys = (
            {}
            if owner is None
            else {
                p: None
                for p in owner._known()
                if p in self._entries or owner._state_of(p) is not None
            }
        )
        return iter([*(keys | dict.fromkeys(self._entries)), *self._others])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, key: Any) -> bool:
        if not isinstance(key, Tensor):
            return key in self._others
        owner = self._owner()
        return key in self._entries or (owner is not None and owner._state_of(key) is not None)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, Tensor):
            return self._others.setdefault(key, {})
        if key not in self._entries:
            self._entries[key] = ParameterState._of(self, key)
        entry = self._entries[key]
        entry._follow()
        return entry

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, Tensor):
            self._others[key] = value
            return
        if not isinstance(value, Mapping):
            raise TypeError(
                f"the state of a parameter must be a dict, not {type(value).__name__}"
            )
        if value is self._entries.get(key):
            return
        if isinstance(value, ParameterState):
            if not value._is_attached:
                if key in self:
                    self._drop([key])
                value._attach(self, key)
                self._entries[key] = value
                return
            value = value.copy()  # One parameter's state is assigned to another.
        entry = self[key]
        changed = entry._changed_by(value).keys() & entry._own()
        if changed or entry._shown().keys() - value.keys():
            del entry
            self._hand_over(key)
        self[key]._replace(value)

    def _hand_over(self, key: Tensor) -> None:
        """Who has an entry that is replaced goes on with what it is now."""
        old = self._entries[key]
        self._entries[key] = new = ParameterState._of(self, key)
        new._values, new._gone = dict(old._values), set(old._gone)
        new._handles, new._source = dict(old._handles), old._source
        if (active := self._active.pop(id(old), None)) is not None:
            self._active[id(new)] = new
        entry = weakref.ref(old)
        del old, active
        if (held := entry()) is not None:
            try:
                values = held.copy()
            except BaseException:
                self._active.pop(id(new), None)
                self._entries[key] = self._active[id(held)] = held
                raise
            self._active.pop(id(held), None)
            held._detach(values)

    def __delitem__(self, key: Any) -> None:
        if not isinstance(key, Tensor):
            del self._others[key]
        elif key in self:
            self._drop([key])
        else:
            raise KeyError(key)

    def pop(self, key: Any, *default: Any) -> Any:
        if key not in self and default:
            return default[0]
        if key not in self:
            raise KeyError(key)
        value = self[key]
        del self[key]
        return value

    def popitem(self) -> tuple[Any, Any]:
        if not len(self):
            raise KeyError("popitem(): the optimizer has no state")
        key = list(self)[-1]
        return key, self.pop(key)

    def clear(self) -> None:
        self._drop([key for key in self if isinstance(key, Tensor)])
        self._others.clear()
        self._stale.clear()
        self._source = None

    def _become(self, mapping: Mapping[Any, Any]) -> None:
        """Takes a mapping that is assigned to ``optimizer.state``."""
        self._source = None
        given = {key: mapping[key] for key in mapping}
        self._drop([key for key in self if isinstance(key, Tensor) and key not in given])
        self._others.clear()
        for key, value in given.items():
            self[key] = value
        self._assign(mapping)

    def follow(self) -> None:
        """Takes what was put into a dict, or taken out, after it was assigned."""
        self._follow()
        self._let_source_go()

    def _drop(self, parameters: list[Tensor]) -> None:
        owner = self._owner()
        if owner is None or not parameters:
            return
        owner._check_between_steps("deleting state")
        detached = []
        for parameter in parameters:
            if parameter not in self._entries:
                continue
            entry = weakref.ref(self._entries[parameter])
            active = id(self._entries[parameter])
            kept = self._active.pop(active, None), self._entries.pop(parameter)
            del kept
            held = entry()
            if held is None:
                continue
            # Somebody goes on with it. gsplat, for example, deletes first and reads then.
            try:
                detached.append((held, held.copy()))
            except BaseException:
                self._entries[parameter] = held
                raise
        owner._forget_states(parameters)
        for held, values in detached:
            held._detach(values)
            self._active.pop(id(held), None)

    # Called by the optimizer -----------------------------------------------------------

    def _sweep(self, current: ParameterState) -> None:
        owner = self._owner()
        if owner is None or self._writes or len(self._active) < 2:
            return
        if not owner._is_between_steps():
            return
        self._writes = True
        try:
            self._settle_all(owner, current)
        finally:
            self._writes = False

    def _settle_all(self, owner: Owner, current: ParameterState) -> None:
        for key, entry in list(self._active.items()):
            if entry is current or not owner._takes_part(entry._parameter):
                continue
            entry._settle(owner)
            if not entry._handles and entry._source is None and not self._waits(entry, owner):
                self._active.pop(key, None)

    @staticmethod
    def _waits(entry: ParameterState, owner: Owner) -> bool:
        return bool(entry._gone or entry._pending(owner._own_names(entry._parameter)))

    def flush(self) -> None:
        """Writes what was assigned, before the state is used.

        Raises:
            ValueError, TypeError: It cannot be a state. The text names the parameter.
            RuntimeError: A tensor of the state was written to after a step.
        """
        owner = self._owner()
        if owner is None:
            return
        self._check_stale()
        self.follow()
        self._writes = True
        try:
            self._write_all(owner)
        finally:
            self._writes = False

    def _write_all(self, owner: Owner) -> None:
        changes = []
        for key, entry in list(self._active.items()):
            if not owner._takes_part(entry._parameter):
                continue
            if pending := entry._collect(owner):
                changes.append((entry, pending))
            elif not entry._handles and entry._source is None:
                self._active.pop(key, None)
        if not changes:
            return
        owner._change_states([(entry._parameter, pending) for entry, pending in changes])
        for entry, pending in changes:
            entry._written(pending)

    def _check_stale(self) -> None:
        if not self._stale:
            return
        changed = [stale for stale in self._stale if stale[0].changed]
        self._stale = [s for s in self._stale if s not in changed and not s[0].released]
        if changed:
            _, parameter, name = changed[0]
            owner = self._owner()
            label = owner._label_of(parameter) if owner is not None else "a parameter"
            raise RuntimeError(
                f"{name!r} of the state of {label} was read or assigned before a step and "
                f"written to after it. The state has moved on, so what was written is not "
                f"used: read it again, write to that, and go on. This is said once"
            )

    def _given(self, value: Any) -> Any:
        """Returns what is kept of an assigned value until it is written."""
        if not isinstance(value, Tensor):
            return value
        # Whoever assigns what was the state before may well have written to it.
        self._stale = [s for s in self._stale if not _share_memory(s[0].alias, value)]
        return value.detach()

    def retire(self, parameters: Iterable[Tensor]) -> None:
        """Called after a step has changed these. What was read before is no state any more."""
        if not self._active:
            return
        for parameter in parameters:
            entry = self._entries.get(parameter)
            if entry is None or not entry._handles:
                continue
            self._stale += [
                (handle, parameter, name)
                for name, handle in entry._handles.items()
                if not handle.released
            ]
            entry._handles = {}

    def loaded(self, foreign: Mapping[Any, Any], others: Mapping[Any, Any]) -> None:
        """Called after a load. Keeps only the keys of others that were loaded."""
        for entry in list(self._entries.values()):
            entry._detach({})
        self._entries, self._active, self._stale, self._source = {}, {}, [], None
        self._others = dict(others)
        for parameter, values in foreign.items():
            self[parameter]._values.update(values)

    def foreign(self, parameter: Tensor) -> dict[str, Any]:
        """Returns what others keep with a parameter."""
        entry, owner = self._entries.get(parameter), self._owner()
        if entry is None or owner is None:
            return {}
        own = owner._own_names(parameter)
        return {name: value for name, value in entry._values.items() if name not in own}

    def others(self) -> dict[Any, Any]:
        """Returns what others keep under keys that are no parameters."""
        return dict(self._others)


def _share_memory(one: Tensor, other: Tensor) -> bool:
    one, other = _local(one), _local(other)
    if one.layout != torch.strided or other.layout != torch.strided:
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
