"""What every benchmark says of a case: how long we and a peer took for the same work."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def row(
    name: str, ours: Sequence[float], peer: str, theirs: Sequence[float], same: bool, **more: Any
) -> dict[str, Any]:
    """Medians of the rounds' seconds; ratio: how many times less ours take. `more` stands before same_verdicts."""
    mine, other = statistics.median(ours), statistics.median(theirs)
    times = {"name": name, "ours_s": round(mine, 4), "peer": peer, "peer_s": round(other, 4)}
    return {**times, "ratio": round(other / mine, 3), **more, "same_verdicts": same}


def table(rows: Sequence[dict[str, Any]], facts: str) -> str:
    """The rows below a line that says on what."""
    width = max(28, *(len(r["name"]) + 1 for r in rows))
    lines = [facts, f"{'case':<{width}}{'ours':>10}  {'peer':>12}  {'ratio':>8}  same  peer"]
    for r in rows:
        lines.append(
            f"{r['name']:<{width}}{r['ours_s']:>8.3f} s  {r['peer_s']:>10.3f} s  {r['ratio']:>7.2f}x  "
            f"{'yes' if r['same_verdicts'] else 'NO':<4}  {r['peer']}"
        )
    return "\n".join(lines)
