# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod, the daemon: the one place that joins core, a machine, the plugins and the API.

What it does first is what a guest waits for: it imports what restoring needs, restores, and only then brings up the API.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from khod import __version__, config
from khod.api.listening import inherited, listen
from khod.api.peers import Processes
from khod.core.alerts import Alert, alert
from khod.core.host import Host
from khod.core.ports import Machine
from khod.core.settings import Settings
from khod.core.state import State
from khod.errors import CustodianGone, KhodError, Refused
from khod.kernel.occupation import occupy, trouble
from khod.kernel.systemd import Systemd
from khod.plugin.manager import PluginManager
from khod.supervision import Answerable, Notifier, beside, show, undo_at_shutdown, until_it_may_end

logger = logging.getLogger(__name__)

MARGIN = 30.0
"""Seconds that systemd waits beyond the deadline of an instance that is being restored."""
FAREWELL = 1.0
"""Seconds that systemd has to hear the last of it."""


def main(argv: list[str] | None = None) -> int:
    """The console script."""
    parser = argparse.ArgumentParser(prog="khod", description="Moves this host onto a new kernel; khoctl talks to it.")
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"instead of {config.DEFAULT_PATH}")
    parser.add_argument("--version", action="version", version=f"khod {__version__}")
    arguments = parser.parse_args(argv)
    raise_descriptor_limit()
    try:
        settings = config.load(arguments.config)
        set_up_logging(settings.log_level)
        return asyncio.run(serve(settings, Notifier()))
    except KhodError as error:
        if set_up_logging("info"):
            another, custody = isinstance(error, Refused), isinstance(error, CustodianGone)
            kind = Alert.ANOTHER_KHOD if another else Alert.NO_CUSTODY if custody else Alert.NOT_STARTED
            alert(logger, kind, "%s", error)
        else:
            print(f"khod: {error.message}", file=sys.stderr)  # noqa: T201
            if error.hint:
                print(f"khod: {error.hint}", file=sys.stderr)  # noqa: T201
        return error.exit_status


def raise_descriptor_limit() -> None:
    """As many open descriptors as may be: the customary 1024 are for programs that use select(2); guests have more."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def serve(configuration: config.Config, notifier: Notifier) -> int:
    """Start, serve until told to stop, and stop when that loses nothing.

    What can fail for reasons of its own comes before the first retrieve: from there on the end of this process may be the end
    of everybody's memory.
    """
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    place = state_of(configuration)
    occupied = occupy(place)
    passed = inherited(configuration.socket)
    listener = passed or listen(configuration.socket, everybody=bool(configuration.policy))
    extra = configuration.luo_agent
    luod = listen(extra.socket, everybody=bool(configuration.policy), rival="luod") if extra.enabled else None
    if reason := trouble(place):
        alert(logger, Alert.NO_JOURNAL, "%s", reason)
    answerable = Answerable()
    answerable.say(State.RESTORING)
    machine = with_initrd(open_machine(configuration), configuration)
    processes = Processes(asyncio.get_running_loop())
    host = Host(machine, core_settings(configuration), PluginManager(), processes.watch)
    notifier.status("Looking for what the previous kernel left")
    state = await host.start(lambda text, seconds: notifier.progress(text, seconds + MARGIN))
    if reason:
        host.problems.append(reason)

    async with served(configuration, host, listener, passed is not None, luod, processes):
        answerable.say(state)
        notifier.tell("READY=1")
        host.verify()
        manager = Systemd()
        waiting = until_it_may_end(told, host, manager, notifier.status)
        at_once = await beside(
            waiting, notifier.keep_alive(), show(host, notifier, answerable, told), undo_at_shutdown(host, manager)
        )
        if at_once:
            # No clean end: an event loop that ends cancels the update, and every descriptor is PID 1's as well.
            logger.info("going, for systemd to jump")
            logging.shutdown()
            os._exit(0)
    notifier.tell("STOPPING=1")
    await beside(host.close(), notifier.keep_alive())
    notifier.flush(FAREWELL)
    os.close(occupied)
    return 0


@contextlib.asynccontextmanager
async def served(
    configuration: config.Config,
    host: Host,
    listener: socket.socket,
    stays: bool,
    luod: socket.socket | None,
    processes: Processes,
) -> AsyncIterator[None]:
    """Serve `host` on these sockets, which are consumed, for the length of the context."""
    from khod.api.luod import serve as serve_luod  # not on the way to restored
    from khod.api.server import serve as serve_api

    files, rules, limits = host.machine.files, configuration.policy, configuration.limits
    async with contextlib.AsyncExitStack() as serving:
        await serving.enter_async_context(
            serve_api(host, files, configuration.socket, listener, rules=rules, limits=limits, stays=stays, processes=processes)
        )
        if luod is not None:
            path = configuration.luo_agent.socket
            await serving.enter_async_context(
                serve_luod(host, files, path, luod, rules=rules, limits=limits, processes=processes)
            )
        yield


def state_of(configuration: config.Config) -> Path:
    """The directory that one khod alone may use: where the machine's state lies."""
    kind, _, directory = configuration.machine.partition(":")
    return Path(directory) if kind == "simulated" else configuration.state_directory


def open_machine(configuration: config.Config) -> Machine:
    """The machine that the configuration names. Raises InvalidRequest or MachineError when it cannot be used."""
    kind, _, directory = configuration.machine.partition(":")
    if kind == "simulated":
        from khod import simulated

        return simulated.machine(simulated.connect(directory, "khod"))
    from khod.kernel.machine import machine

    return machine(configuration.state_directory, device_timeout=configuration.device_timeout, begin=True)


def with_initrd(machine: Machine, configuration: config.Config) -> Machine:
    """The machine, with the restore stage in the initrd of each image where that is configured."""
    from khod.initrd.image import JumpImages

    return replace(machine, kexec=JumpImages(machine.kexec, configuration, state_of(configuration)))


def core_settings(configuration: config.Config) -> Settings:
    """The part of the configuration that is the core's."""
    return Settings(
        preparing=configuration.deadlines.preparing,
        freezing=configuration.deadlines.freezing,
        sync=configuration.deadlines.sync,
        restoring=configuration.deadlines.restoring,
        carry_rate=configuration.deadlines.carry_rate,
        jump=configuration.jump,
        require=configuration.require,
        early=configuration.initrd.started,
        orphans_after=configuration.orphans_after,
        reconnect=configuration.reconnect,
        reserve=configuration.reserve,
        fleet=configuration.fleet,
        max_order=configuration.max_order,
        sample_pages=configuration.verification.pages,
        sample_budget=configuration.verification.budget_ms / 1000,
        full=configuration.verification.full,
        quota_instances=configuration.quotas.instances,
        quota_descriptors=configuration.quotas.descriptors,
        quota_bytes=configuration.quotas.bytes,
    )


def set_up_logging(level: str) -> bool:
    """To the journal, with priorities and fields, where systemd reads our standard error and its bindings are there; else as
    text. Returns whether it is the journal. Again: no effect but on the answer."""
    journal = False
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    if os.environ.get("JOURNAL_STREAM"):
        try:
            from systemd.journal import JournalHandler
        except ImportError:
            pass
        else:
            handler, journal = JournalHandler(SYSLOG_IDENTIFIER="khod"), True
            handler.setFormatter(logging.Formatter())  # level and logger are fields of the entry
    logging.basicConfig(level=level.upper(), handlers=[handler])
    return journal


if __name__ == "__main__":
    raise SystemExit(main())
