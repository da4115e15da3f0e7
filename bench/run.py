# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m bench.run``: one table, the same as JSON in bench/out/, and a status that says whether every target is met."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from bench import folio, mappings, start
from bench.host import machine
from bench.rows import Result, Row

OUT = Path(__file__).parent / "out" / "bench.json"
ROWS: tuple[Row, ...] = (*folio.ROWS, *mappings.ROWS, *start.ROWS)


def line(result: Result) -> str:
    def figure(value: float) -> str:
        return f"{value:,.0f} {result.unit}" if result.exact else f"{value:.2f} {result.unit}"

    times = " / ".join(f"{value:.2f}" for value in (result.ours, result.theirs) if value)
    bound = "=" if result.exact else "≤"
    cells = (result.name, figure(result.value), f"{bound} {figure(result.target)}", times, "yes" if result.met else "NO")
    return "| " + " | ".join(cells) + " |" + (f" {result.note}" if result.note and not result.met else "")


def run(rows: Iterable[Row]) -> list[Result]:
    print("| what | measured | target | medians, ms: khod / the other | met |")
    print("| --- | --- | --- | --- | --- |")
    results = []
    for row in rows:
        for result in row():
            print(line(result), flush=True)
            results.append(result)
    return results


def main() -> int:
    results = run(ROWS)
    OUT.parent.mkdir(exist_ok=True)
    content = {"machine": machine(), "rows": [result.to_json() for result in results]}
    OUT.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    missed = [result.name for result in results if not result.met]
    print(f"\n{', '.join(machine().values())}\n{OUT}")
    for name in missed:
        print(f"target missed: {name}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
