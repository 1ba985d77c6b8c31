"""Files that appear whole or not at all, whatever interrupts their writer. Standard library only.

One file is written beside its name and renamed. A set of files is written into a hidden folder of their directory; the
folder's renaming is the moment the set counts, and its files are then moved to their places. A kill in between leaves
that folder, and whoever opens the directory next moves the rest. Other files in the directory are left alone. One
process may save to a directory at a time; any number may read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITING = ".qft-writing"  # being written: worthless until renamed
WRITTEN = ".qft-written"  # whole, and newer than what lies beside it
STREAMING = ".qft-streaming"  # of a model that is being quantized file by file; goes on where it was interrupted


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a name to write to; at the end of the block that file, on the disk, takes the place of `path`."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def replace_files(directory: Path) -> Iterator[Path]:
    """Yield a folder to write files to; at the end of the block all of them, on the disk, appear in `directory` as one.

    An error in the block, or a full disk, leaves `directory` as it was.
    """
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    settle(directory)
    folder = directory / WRITING
    shutil.rmtree(folder, ignore_errors=True)  # of a writer that was killed
    try:
        folder.mkdir()
        yield folder
        commit(folder, directory)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):  # someone else has put something there
                directory.rmdir()
        raise


def commit(folder: Path, directory: Path) -> None:
    """Make the files of `folder`, somewhere in `directory`, appear in `directory` as one; the folder goes."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
    os.rename(folder, directory / WRITTEN)
    sync(directory)
    settle(directory)


def settle(directory: Path) -> None:
    """Move the files of a set that was written, and maybe moved in part, to their places in `directory`."""
    written = directory / WRITTEN
    if not written.is_dir():
        return
    try:
        entries = sorted(written.rglob("*"))
    except FileNotFoundError:  # another reader has moved all of it
        return
    folders = [written, *(path for path in entries if path.is_dir())]
    for folder in folders:
        (directory / folder.relative_to(written)).mkdir(exist_ok=True)
    for path in entries:
        if path not in folders:
            with contextlib.suppress(FileNotFoundError):  # another reader has just moved it
                os.replace(path, directory / path.relative_to(written))
    for folder in folders:
        sync(directory / folder.relative_to(written))
    for folder in reversed(folders):
        with contextlib.suppress(OSError):  # gone already, or filled again by the next save
            folder.rmdir()


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
