# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make one function of the guest's kernel fail once, from outside, by QEMU's GDB stub: the kernel itself is unmodified.

Of the GDB remote protocol only what that takes: a hardware breakpoint on the function, and at its nth hit a return to
the caller with ``-errno`` in rax. Addresses come from System.map: the lab's kernel has no KASLR.
"""

from __future__ import annotations

import re
import shutil
import socket
import struct
import tempfile
import threading
from pathlib import Path
from types import TracebackType

from tests.vm import kernel as lab_kernel

_RAX, _RSP, _RIP = 0, 7, 16
_REGISTERS = 17
"""rax to r15 and rip, in GDB's order for x86-64: the first in an answer to ``g``."""


class Remote:
    """A connection to a GDB stub."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(120)
        self._socket.connect(str(path))
        self._pending = b""

    def close(self) -> None:
        self._socket.close()

    def send(self, packet: str) -> None:
        data = packet.encode()
        self._socket.sendall(b"$%s#%02x" % (data, sum(data) & 0xFF))

    def receive(self) -> str:
        """The next packet, acknowledged. Raises EOFError when QEMU is gone."""
        while not (found := re.search(rb"\$([^#]*)#..", self._pending, re.DOTALL)):
            part = self._socket.recv(65536)
            if not part:
                raise EOFError("the stub closed the connection")
            self._pending += part
        self._pending = self._pending[found.end() :]
        self._socket.sendall(b"+")
        return found[1].decode()

    def command(self, packet: str) -> str:
        """A packet's answer. Connecting has stopped the machine, which the stub says (T02) before or after other answers."""
        self.send(packet)
        while (answer := self.receive()).startswith("T02"):
            pass
        return answer

    def checked(self, packet: str) -> None:
        """A packet that must be answered with OK."""
        if (answer := self.command(packet)) != "OK":
            raise RuntimeError(f"the stub answered {answer!r} to {packet!r}")


class FailCall:
    """A context manager: `qemu` are the arguments to start QEMU with, and from `arm` on the nth call of `symbol` returns
    ``-errno`` without having run. Calls before and after that one run as ever."""

    def __init__(self, symbol: str, nth: int = 1, errno: int = 5) -> None:
        self._address = address_of(symbol)
        self._nth = nth
        self._errno = errno
        self._directory = Path(tempfile.mkdtemp(prefix="khod-gdb-"))
        self._thread: threading.Thread | None = None
        self.hits = 0
        path = self._directory / "s"
        self.qemu = ("-chardev", f"socket,path={path},server=on,wait=off,id=gdb", "-gdb", "chardev:gdb")

    def __enter__(self) -> FailCall:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # The machine is off by now, and with it the connection that the thread may still wait on.
        if self._thread:
            self._thread.join(10)
        shutil.rmtree(self._directory)

    def arm(self) -> str:
        """Set the breakpoint and let the machine go on; the rest happens in a thread."""
        remote = Remote(self._directory / "s")
        remote.command("?")
        remote.checked(f"Z1,{self._address:x},1")
        remote.send("c")
        self._thread = threading.Thread(target=self._serve, args=(remote,), daemon=True)
        self._thread.start()
        return "armed"

    def _serve(self, remote: Remote) -> None:
        try:
            while self.hits < self._nth:
                self._hit(remote)
        except EOFError:
            pass  # the machine ended before the nth call: the test sees that in `hits`
        finally:
            remote.close()

    def _hit(self, remote: Remote) -> None:
        while not (stop := remote.receive()).startswith("T05"):
            pass
        self.hits += 1
        thread = re.search(r"thread:([0-9a-fp.-]+)", stop)
        if thread:
            remote.checked(f"Hg{thread[1]}")
        remote.checked(f"z1,{self._address:x},1")
        if self.hits == self._nth:
            self._return(remote)
            remote.checked("D")
        else:
            remote.command("s")  # over the function's first instruction, or it would be hit at once again
            remote.checked(f"Z1,{self._address:x},1")
            remote.send("c")

    def _return(self, remote: Remote) -> None:
        raw = bytes.fromhex(remote.command("g"))
        registers = list(struct.unpack_from(f"<{_REGISTERS}Q", raw))
        caller = bytes.fromhex(remote.command(f"m{registers[_RSP]:x},8"))
        registers[_RAX] = -self._errno & (1 << 64) - 1
        registers[_RIP] = int.from_bytes(caller, "little")
        registers[_RSP] += 8
        remote.checked("G" + (struct.pack(f"<{_REGISTERS}Q", *registers) + raw[8 * _REGISTERS :]).hex())


def address_of(symbol: str) -> int:
    """Of a function in the lab kernel. Raises LookupError when there is none of that name."""
    text = (lab_kernel.kernel_directory() / "System.map").read_text()
    found = re.search(rf"^([0-9a-f]+) [tT] {re.escape(symbol)}$", text, re.M)
    if not found:
        raise LookupError(f"no function {symbol} in the lab kernel")
    return int(found[1], 16)
