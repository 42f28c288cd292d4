"""The head's record of its nodes on disk."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .. import paths
from ..errors import InputError
from ..message import Label, Message, MessageError, Range, decode_json

log = logging.getLogger(__name__)

MAX_GROUP_ID = 2**48


@dataclass(frozen=True)
class Roster(Message):
    """What survives a restart of the head.

    Args:
        group_id: of the last group that was started.
        nodes: names by id, without the head's own node.
    """

    group_id: Annotated[int, Range(0, MAX_GROUP_ID)]
    nodes: Mapping[Label, Label]

    @classmethod
    def load(cls, path: Path) -> Roster:
        """The roster of a file; an empty one if there is no file.

        A damaged file is set aside, and what can be read of it is kept.

        Raises:
            InputError: the file cannot be read or set aside.
        """
        if not path.exists():
            return cls(0, {})
        try:
            data = paths.read_private(path)
            try:
                return cls.from_json(decode_json(data))
            except MessageError as error:
                reason = str(error)
                aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
                path.replace(aside)
                roster = cls._read_remains(data)
                roster.save(path)
        except OSError as error:
            raise InputError(f"{path} cannot be used ({error})") from error
        log.warning(
            "%s was damaged (%s) and was moved to %s; %d nodes were recovered, any others have to "
            "join again",
            *(path, reason, aside.name, len(roster.nodes)),
        )
        return roster

    @classmethod
    def _read_remains(cls, data: bytes) -> Roster:
        # Higher than any id that counting has led to, if that one is lost.
        group_id = int(time.time())
        nodes: dict[str, str] = {}
        with suppress(MessageError):
            fields = decode_json(data)
            with suppress(MessageError):
                group_id = cls.from_json({"group_id": fields.get("group_id"), "nodes": {}}).group_id
            entries = fields.get("nodes")
            for entry in entries.items() if isinstance(entries, dict) else ():
                with suppress(MessageError):
                    nodes |= cls.from_json({"group_id": 0, "nodes": dict([entry])}).nodes
        return cls(group_id, nodes)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        paths.write_private(path, json.dumps(self.to_json(), indent=1).encode())
