"""The families that `cenacle families` lists.

Owns: joining three facts: which small configs there are, what mlx-lm calls what, and the table in
`architecture.py`.
Does not know: how any family works.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_lm.utils import MODEL_REMAPPING

from .architecture import FAMILIES, GENERIC

TINY_CONFIGS = Path(__file__).parent / "configs" / "tiny"


@dataclass(frozen=True)
class FamilyInfo:
    """One family: mlx-lm's module, other model_types that it runs, why it is refused or None."""

    name: str
    aliases: tuple[str, ...]
    note: str
    refused: str | None

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the fields above."""
        return asdict(self)


def list_families() -> list[FamilyInfo]:
    """Every family with experts, by name."""
    names = {p.stem for p in TINY_CONFIGS.glob("*.json")} | set(FAMILIES) - set(MODEL_REMAPPING)
    rows = []
    for name in sorted(names, key=str.lower):
        aliases = tuple(sorted(a for a, module in MODEL_REMAPPING.items() if module == name))
        family = FAMILIES.get(name, GENERIC)
        rows.append(FamilyInfo(name, aliases, family.note, family.refused))
    return rows
