# SPDX-License-Identifier: LGPL-2.1-or-later
"""Plugins, found and isolated from each other.

pluggy finds and validates them; the calls are our own, for a plain pluggy call stops at the first implementation that
raises, does not await, and calls everybody where we mean one.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pluggy

from khod.core.blocking import uninterrupted
from khod.core.driver import Declaration, Driver, Instance, Probe, Request, check_declaration, check_settled
from khod.core.ports import Machine
from khod.errors import InvalidRequest, KhodError
from khod.plugin import hookspecs

logger = logging.getLogger(__name__)

GROUP = "khod"
"""The entry-point group that third parties register in."""


class PluginError(KhodError):
    """A plugin broke its contract: raised what it must not, returned what it must not, or cannot be loaded."""


class PluginDriver:
    """One plugin as a `khod.core.driver.Driver`."""

    def __init__(self, name: str, hooks: Mapping[str, pluggy.HookImpl]) -> None:
        self.name = name
        self._hooks = hooks
        for required in ("khod_compatible", "khod_declare"):
            if required not in hooks:
                raise PluginError(f"plugin {name!r} does not implement {required}", hint="see docs/plugins.md")
        try:
            said: Any = hooks["khod_compatible"].function()
        except Exception as error:
            raise PluginError(f"plugin {name!r}: khod_compatible raised {type(error).__name__}: {error}") from error
        compatible = (said,) if isinstance(said, str) else said
        if not (isinstance(compatible, Sequence) and compatible and all(isinstance(c, str) and c for c in compatible)):
            raise PluginError(f"plugin {name!r}: khod_compatible returned {said!r}, not strings")
        self.compatible: Sequence[str] = tuple(compatible)

    async def probe(self, machine: Machine) -> Probe:
        """See hookspecs.khod_probe."""
        return await self._call("khod_probe", Probe, machine=machine) or Probe(True)

    async def declare(self, machine: Machine, request: Request) -> Declaration:
        """See hookspecs.khod_declare."""
        declaration: Declaration | None = await self._call("khod_declare", Declaration, machine=machine, request=request)
        if declaration is None:
            raise PluginError(f"plugin {self.name!r}: khod_declare returned None for {request.name!r}")
        check_declaration(request, declaration)
        if declaration.compatible != self.compatible[0]:
            raise PluginError(f"plugin {self.name!r} declares {declaration.compatible!r} and writes {self.compatible[0]!r}")
        return declaration

    async def check(self, instance: Instance) -> Sequence[str]:
        """See hookspecs.khod_check."""
        return await self._call("khod_check", Sequence, instance=instance) or ()

    async def settle(self, instance: Instance, declared: Declaration) -> Declaration:
        """See hookspecs.khod_settle."""
        settled: Declaration | None = await self._call("khod_settle", Declaration, instance=instance, declared=declared)
        if settled is None:
            return declared
        check_settled(instance, declared, settled)
        return settled

    async def prepare(self, instance: Instance) -> Mapping[str, bytes]:
        """See hookspecs.khod_prepare."""
        return await self._call("khod_prepare", Mapping, instance=instance) or {}

    async def freeze(self, instance: Instance) -> Mapping[str, bytes]:
        """See hookspecs.khod_freeze."""
        changed = await self._call("khod_freeze", Mapping, instance=instance) or {}
        for key, value in changed.items():
            if len(value) > len(instance.properties.get(key, b"")):
                raise PluginError(
                    f"plugin {self.name!r}: freeze of {instance.name!r} returned {len(value)} bytes for property {key!r},"
                    f" declared with {len(instance.properties.get(key, b''))}",
                    hint="declare the largest value, or use a state",
                )
        return changed

    async def thaw(self, instance: Instance) -> None:
        """See hookspecs.khod_thaw."""
        await self._call("khod_thaw", None, instance=instance)

    async def describe(self, instance: Instance) -> Mapping[str, str]:
        """See hookspecs.khod_describe."""
        return await self._call("khod_describe", Mapping, instance=instance) or {}

    async def restore(self, instance: Instance) -> Mapping[str, int]:
        """See hookspecs.khod_restore."""

        def discard(made: Mapping[str, int] | None) -> None:
            for fd in (made or {}).values():
                instance.machine.files.close(fd)

        return await self._call("khod_restore", Mapping, discard, instance=instance) or {}

    async def finish(self, instance: Instance) -> None:
        """See hookspecs.khod_finish."""
        await self._call("khod_finish", None, instance=instance)

    async def _call(
        self, hook: str, returns: type | None, discard: Callable[[Any], None] = lambda _: None, /, **arguments: Any
    ) -> Any:
        """Run this plugin's implementation of `hook`; None when it has none. Only KhodErrors leave. `discard` takes what a
        thread gives when nobody waits for it any more."""
        implementation = self._hooks.get(hook)
        if implementation is None:
            return None
        chosen = {name: arguments[name] for name in implementation.argnames}
        try:
            result = await _run(implementation.function, chosen, discard)
        except KhodError:
            raise
        except Exception as error:
            logger.exception("plugin %s: %s", self.name, hook)
            raise PluginError(f"plugin {self.name!r}: {hook} raised {type(error).__name__}: {error}") from error
        if returns is not None and result is not None and not isinstance(result, returns):
            raise PluginError(f"plugin {self.name!r}: {hook} returned {type(result).__name__}, not {returns.__name__}")
        return result


async def _run(function: Callable[..., Any], arguments: dict[str, Any], discard: Callable[[Any], None]) -> Any:
    """Call it: a coroutine function here, any other in a thread, so that one that blocks blocks nobody else.

    A thread cannot be cancelled. Its end is awaited all the same: while it works, its descriptors must not be closed, and their
    numbers taken by other files, nor the instance be thawed.
    """
    if inspect.iscoroutinefunction(function):
        return await function(**arguments)
    return await uninterrupted(asyncio.ensure_future(asyncio.to_thread(function, **arguments)), discard)


class PluginManager:
    """The plugins of one khod: a `khod.core.driver.Drivers`."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("khod")
        self._manager.add_hookspecs(hookspecs)
        self._drivers: dict[str, PluginDriver] = {}

    def register(self, plugin: object, name: str) -> Driver:
        """Add one plugin. Raises PluginError when it breaks the contract; then it is as if it had never been named."""
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
            driver = PluginDriver(name, self._implementations(plugin))
            if clash := [c for c in driver.compatible if self.for_compatible(c)]:
                raise PluginError(f"plugin {name!r} reads {clash}, as another plugin does")
        except (pluggy.PluginValidationError, ValueError, KhodError) as error:
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            if isinstance(error, KhodError):
                raise
            raise PluginError(f"plugin {name!r}: {error}") from error
        self._drivers[name] = driver
        return driver

    def load(self) -> list[str]:
        """Register every plugin that is installed in the entry-point group. Returns what went wrong, a sentence a plugin.

        A plugin that cannot be loaded is left out and must not stop the others: its instances are quarantined.
        """
        from importlib.metadata import entry_points  # 20 ms that a khod without installed plugins need not spend

        problems = []
        for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
            if entry.name in self._drivers:
                continue
            try:
                self.register(entry.load(), entry.name)
            except Exception as error:
                logger.exception("plugin %s", entry.name)
                problems.append(f"plugin {entry.name!r} ({entry.value}) cannot be used: {error}")
        return problems

    def get(self, name: str) -> Driver:
        """By name. Raises InvalidRequest naming those that exist."""
        try:
            return self._drivers[name]
        except KeyError:
            known = ", ".join(self.names()) or "none"
            raise InvalidRequest(f"no driver {name!r}", hint=f"drivers here: {known}") from None

    def for_compatible(self, compatible: str) -> Driver | None:
        """The one that reads nodes of this compatible string."""
        return next((d for d in self._drivers.values() if compatible in d.compatible), None)

    def names(self) -> Sequence[str]:
        """Sorted."""
        return sorted(self._drivers)

    def _implementations(self, plugin: object) -> dict[str, pluggy.HookImpl]:
        callers: Iterable[pluggy.HookCaller] = self._manager.get_hookcallers(plugin) or ()
        return {c.name: impl for c in callers for impl in c.get_hookimpls() if impl.plugin is plugin}
