"""Files that are either whole or not there."""

import os
import pathlib
import secrets


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a crash or a full disk leaves what was there before.

    The bytes go to a temporary file in the same folder (made where it is missing), reach the disk, and take
    the name in one step.

    Args:
        path: the file to make or replace.
        data: all of its content.

    Raises:
        OSError: nothing was written; it names the file and the bytes it needs, and keeps the cause's errno.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        needs = f"{path} needs {len(data):,} bytes and wasn't written; a file that was there is untouched"
        raise OSError(error.errno, f"{error.strerror}: {needs}") from error
