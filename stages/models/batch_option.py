"""The option that says when samples are computed in batches; apart from the check, which loads the runtime."""

from __future__ import annotations

from typing import Literal, TypeAlias

BatchMode: TypeAlias = Literal["exact", "any", "off"]
"""exact: batches where their results are those of single samples to the bit; any: where they are nearly so; off: none."""
