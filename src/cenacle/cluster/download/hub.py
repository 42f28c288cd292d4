"""A node's part of a checkpoint, from the hub or from another node: only the bytes that it reads.

Owns: which ranges are here, fetching those that are not, resuming, and noticing damage.
Does not know: plans (it is given ranges of bytes), how nodes talk.
How: files keep their names and sizes, but only what was asked for is written: the rest are holes
that take no disk. So the loader, which reads by byte range, needs to know nothing of it. Beside
them `ranges.jsonl` has a line for every range that is complete, with its hash.
Invariant: a range is noted after it is on the disk, so whatever ends the program, what is noted is
there; a source that changes its files, or gives other bytes than it says, is refused.
Next: `model/weights.py` (`wanted_of`) says what a rank needs; `parts.py`, where it is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch

from ...errors import CheckpointError
from ...model.byte_ranges import JOURNAL, ColumnRange
from .source import READ_BYTES, SourceFile, SourceInterrupted, first_line, retry

MAX_SMALL_FILE_BYTES = 64 << 20  # files that are no weights are fetched whole, up to this
HEADER_BYTES = 1 << 16  # first guess at the length of a safetensors header


class Hub:
    """A repository of the Hugging Face hub (or of what answers like it, by HF_ENDPOINT).

    Args:
        repo: "org/name".
        revision: branch, tag or commit; None: the main one.
        deadline_s: longest silence of the server.
    """

    def __init__(self, repo: str, revision: str | None = None, deadline_s: float = 30.0) -> None:
        import httpx

        self.name, self.revision, self._deadline_s = repo, revision, deadline_s
        self._client = httpx.Client(follow_redirects=True, timeout=deadline_s)
        self._commit = revision if revision and re.fullmatch("[0-9a-f]{40}", revision) else None

    def close(self) -> None:
        """End its connections."""
        self._client.close()

    def files(self) -> Mapping[str, SourceFile]:
        """See `Source`; those that mlx-lm would fetch."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = HfApi().model_info(
                self.name,
                revision=self.revision,
                files_metadata=True,
                timeout=self._deadline_s,
            )
        except RepositoryNotFoundError as error:
            raise CheckpointError(f"{self.name}: the hub has no such repository") from error
        except Exception as error:  # whichever library it speaks through has errors of its own
            raise SourceInterrupted(
                f"{self.name}: the hub does not answer: {first_line(error)}"
            ) from error
        self._commit = info.sha
        return {
            s.rfilename: SourceFile(s.size or 0, s.lfs.sha256 if s.lfs is not None else None)
            for s in info.siblings or ()
            if is_model_file(s.rfilename)
        }

    @property
    def commit(self) -> str:
        """What all is read of.

        Raises:
            CheckpointError: see `files`; or the hub does not answer for long.
        """
        if self._commit is None:
            retry(self.files)
        return str(self._commit)

    def read(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """See `Source`."""
        import httpx
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        if self._commit is None:
            self.files()  # all of a part is of one commit
        url = hf_hub_url(self.name, file, revision=self._commit)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
        try:
            with self._client.stream("GET", url, headers=headers) as answer:
                if answer.status_code in (408, 425, 429) or answer.status_code >= 500:
                    raise SourceInterrupted(f"{self.name}: the hub answers {answer.status_code}")
                whole = answer.status_code == 200 and start == 0
                if answer.status_code != 206 and not whole:
                    raise CheckpointError(
                        f"{self.name}: asked for a part of {file} the hub answers "
                        f"{answer.status_code}, expected 206"
                    )
                left = stop - start
                for piece in answer.iter_bytes(READ_BYTES):
                    yield piece[:left]
                    left -= len(piece)
                    if left <= 0 and whole:
                        return
        except httpx.HTTPError as error:
            raise SourceInterrupted(f"{self.name}: {first_line(error)}") from error

    def columns(self, file: str, strip: ColumnRange) -> bytes:
        """See `Source`; all of the rows are read."""
        return strip.take(b"".join(self.read(file, strip.start, strip.stop)))


def is_model_file(file: str) -> bool:
    """Whether mlx-lm would fetch it: nothing else of a folder is given away."""
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    return file != JOURNAL and any(fnmatch(file, pattern) for pattern in DEFAULT_ALLOW_PATTERNS)
