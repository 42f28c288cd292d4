"""The Hugging Face Hub as a source.

Owns: listing a repository's files and reading byte ranges of them over HTTP, all of one commit.
Does not know: plans, where bytes go.
Next: `download.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ...errors import CheckpointError
from ...model.byte_ranges import ColumnRange
from ...model.weight_files import INDEX_FILES, MAX_INDEX_BYTES, parse_index, select_files
from .source import READ_BYTES, SourceFile, SourceInterrupted, first_line, retry


class Hub:
    """A repository of the Hugging Face Hub (or of what HF_ENDPOINT names).

    Args:
        repo: "org/name".
        revision: branch, tag or commit; None: the main branch.
        deadline_s: longest silence of the server.
    """

    def __init__(self, repo: str, revision: str | None = None, deadline_s: float = 30.0) -> None:
        import httpx

        self.name, self.revision, self._deadline_s = repo, revision, deadline_s
        self._client = httpx.Client(follow_redirects=True, timeout=deadline_s)
        self._commit = revision if revision and re.fullmatch("[0-9a-f]{40}", revision) else None

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def files(self) -> Mapping[str, SourceFile]:
        """See `Source`."""
        files = self.list_repository()
        index = next((name for name in INDEX_FILES if name in files), None)
        listed = self._read_index(index, files[index].size) if index is not None else None
        return {name: files[name] for name in select_files(self.name, files, listed)}

    def list_repository(self) -> dict[str, SourceFile]:
        """All files, also those that do not belong to the checkpoint; raises as `files`."""
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
            raise CheckpointError(f"{self.name}: the Hub has no such repository") from error
        except Exception as error:  # huggingface_hub lets its transport's own errors through
            raise SourceInterrupted(
                f"{self.name}: the Hub does not respond: {first_line(error)}"
            ) from error
        self._commit = info.sha
        return {
            s.rfilename: SourceFile(s.size or 0, s.lfs.sha256 if s.lfs is not None else None)
            for s in info.siblings or ()
        }

    def _read_index(self, name: str, size: int) -> dict[str, str]:
        data = b"".join(self.read(name, 0, min(size, MAX_INDEX_BYTES + 1)))
        return parse_index(data, f"{self.name}: {name}")

    @property
    def commit(self) -> str:
        """The commit of which everything is read.

        Raises:
            CheckpointError: see `files`; or the Hub does not respond for long.
        """
        if self._commit is None:
            retry(self.list_repository)
        return str(self._commit)

    def read(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """See `Source`."""
        import httpx
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        if self._commit is None:
            self.list_repository()
        url = hf_hub_url(self.name, file, revision=self._commit)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
        try:
            with self._client.stream("GET", url, headers=headers) as response:
                status = response.status_code
                if status in (408, 425, 429) or status >= 500:
                    raise SourceInterrupted(f"{self.name}: the Hub responds {status}")
                ignores_range = status == 200 and start == 0
                if status != 206 and not ignores_range:
                    raise CheckpointError(
                        f"{self.name}: expected status 206 for a byte range of {file}, "
                        f"got {status} from the Hub"
                    )
                left = stop - start
                for piece in response.iter_bytes(READ_BYTES):
                    yield piece[:left]
                    left -= len(piece)
                    if left <= 0 and ignores_range:
                        return
        except httpx.HTTPError as error:
            raise SourceInterrupted(f"{self.name}: {first_line(error)}") from error

    def read_columns(self, file: str, columns: ColumnRange) -> bytes:
        """See `Source`; reads the whole rows."""
        return columns.extract(b"".join(self.read(file, columns.start, columns.stop)))
