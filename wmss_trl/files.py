"""Files that are either whole or not there, even if several processes write them at the same time."""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

# After so many seconds nobody is still writing a file of a few megabytes
_ABANDONED = 3600


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    A name beside `path` to write to. If the context ends without an error, the file replaces `path`. Otherwise it is
    removed. Nobody else gets the same name.

    Args:
        path (`Path`):
            File to write. Its folder is made if necessary.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{escape(path.stem)}.*.partial{path.suffix}"):  # by a process that was killed
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()
    partial = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:12]}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
