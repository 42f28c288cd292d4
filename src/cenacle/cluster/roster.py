"""The head's record of its nodes on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import paths
from ..errors import InputError
from ..message import Count, Message, MessageError


@dataclass(frozen=True)
class Roster(Message):
    """What survives a restart of the head.

    Args:
        group_id: of the last group that was started.
        nodes: names by id, without the head's own node.
    """

    group_id: Count
    nodes: Mapping[str, str]

    @classmethod
    def load(cls, path: Path) -> Roster:
        """The roster of a file; an empty one if there is no file.

        Raises:
            InputError: the file is damaged.
        """
        if not path.exists():
            return cls(0, {})
        try:
            return cls.from_json(json.loads(paths.read_private(path)))
        except (ValueError, MessageError) as error:
            raise InputError(
                f"{path} is damaged ({error}): remove it; every node then has to join again"
            ) from error

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        paths.write_private(path, json.dumps(self.to_json(), indent=1).encode())
