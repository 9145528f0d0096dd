"""Random streams are derived from names, never from global state or from the order of work."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2**63) that depends on every part and on nothing else.

    Streams for attack, defence and judge differ by a name in `parts`, so that no one of them can see another's draws.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
