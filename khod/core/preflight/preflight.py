# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looking and judging, for the host. What reads kernels is imported when somebody asks: it is not on the way to restored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from khod.core.blocking import blocking
from khod.core.broker import Broker
from khod.core.need import Need
from khod.core.ports import Image, Machine
from khod.core.preflight.verdict import Check, standing, used
from khod.core.registry import Entry
from khod.core.settings import Settings
from khod.core.views import PreflightView
from khod.errors import Refused

if TYPE_CHECKING:
    from khod.core.preflight.situation import Situation, Surveyor


class Preflight:
    """The checks of one host."""

    def __init__(self, machine: Machine, settings: Settings, broker: Broker) -> None:
        self._machine, self._settings, self._broker = machine, settings, broker
        self._surveyor: Surveyor | None = None

    async def blockers(self, entries: Iterable[Entry], image: Image | None) -> tuple[list[str], Need]:
        """Why an update would be refused, in sentences, and decision 8's sum."""
        seen, checks = await self._look(entries, image)
        return [check.sentence for check in standing(checks, ())], seen.need

    async def pass_over(self, entries: Iterable[Entry], image: Image | None, overrides: Sequence[str]) -> list[str]:
        """What of `overrides` is made use of, to be recorded. Raises Refused for what blocks all the same; InvalidRequest."""
        _, checks = await self._look(entries, image)
        if found := standing(checks, overrides):
            raise Refused(
                f"the update is refused: {'; '.join(f'{check.name}: {check.sentence}' for check in found)}",
                hint="see `khoctl preflight`",
            )
        return [f"{check.name}: {check.evidence}" for check in used(checks, overrides)]

    async def view(self, entries: Iterable[Entry], image: Image | None, overrides: Sequence[str]) -> PreflightView:
        """The table. Raises InvalidRequest, and Refused for what cannot be overridden."""
        from khod.core.preflight import table

        seen, checks = await self._look(entries, image)
        standing(checks, overrides)
        return table.view(seen, checks, overrides)

    async def view_of(
        self, entries: Iterable[Entry], kernel: str, initrd: str, cmdline: str | None, overrides: Sequence[str]
    ) -> PreflightView:
        """The table with another image than the one that was loaded, opened for as long as it takes."""
        image = await blocking(self._machine.kexec.open, kernel, initrd, cmdline)
        try:
            return await self.view(entries, image, overrides)
        finally:
            await blocking(self._machine.kexec.release, image)

    async def _look(self, entries: Iterable[Entry], image: Image | None) -> tuple[Situation, list[Check]]:
        from khod.core.preflight.situation import Surveyor
        from khod.core.preflight.table import judge

        if self._surveyor is None:
            self._surveyor = Surveyor(self._machine, self._settings)
        found = list(entries)
        seen = await self._surveyor.look(found, image, self._broker.without_client(found))
        return seen, await blocking(judge, seen)
