"""Compiled kernels on disk, one folder each; see `entry` for what is in it.

The cache belongs to one user: what another could have written is never read, as a GPU would run
it. Every file is opened from its folder, and checked, by descriptor, so that nothing can be
exchanged between the check and the reading.

An entry appears whole or not at all: it is written beside and renamed. One process compiles it, the
others wait for a lock and find it; where a file system has no locks, the last to be renamed is
dropped. What is wrong with an entry is printed, and it is made anew.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from cumla.jit.entry import FILES, Artefact, BadEntry, from_files, to_files
from cumla.jit.recipe import Recipe

ENVIRONMENT_VARIABLE = "CUMLA_CACHE_DIR"

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_STALE_SECONDS = 3600
"""Age at which a folder that is being written counts as left behind."""
_OCCUPIED = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
"""What a folder's rename fails with where a folder with files, a file or a link is."""
_TRIES = 8
"""To put an entry in place while other processes do so, too."""


class CacheUnusable(Exception):
    """The cache cannot be read or written; the text says why."""


def location() -> Path:
    """Where the cache is: $CUMLA_CACHE_DIR, else cumla in $XDG_CACHE_HOME or in ~/.cache.

    Raises:
        CacheUnusable: no variable says where, and the user has no home.
    """
    try:
        if given := os.environ.get(ENVIRONMENT_VARIABLE):
            return Path(given).expanduser().absolute()
        # XDG Base Directory Specification: a relative path is invalid and ignored.
        shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (shared if shared.is_absolute() else Path.home() / ".cache") / "cumla"
    except RuntimeError as error:
        raise CacheUnusable(f"no home folder is known ({error})") from error


class Cache:
    """The entries below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def load(self, recipe: Recipe) -> Artefact | None:
        """The compiled kernel, None if it is not there.

        Raises:
            BadEntry: it is there and cannot be trusted.
            CacheUnusable: the cache itself cannot be.
        """
        with self._open(create=False) as root:
            return None if root is None else _load(root, recipe)

    def publish(self, recipe: Recipe, made: Artefact) -> None:
        """Put an entry in place. A good one that is there already stays, unless this one has more.

        Raises:
            CacheUnusable: the disk is full or read-only, or others can write to the cache.
        """
        with self._open(create=True) as root:
            assert root is not None
            new = f".new-{uuid4().hex}"
            try:
                _write(root, new, to_files(recipe, made))
                if not any(_put(root, new, recipe, made) for _ in range(_TRIES)):
                    raise CacheUnusable(f"{recipe.folder} cannot be replaced")
                _tidy(root)
            except OSError as error:
                raise CacheUnusable(_reason(error)) from error
            finally:
                _remove(root, new)

    @contextmanager
    def lock(self, recipe: Recipe) -> Iterator[None]:
        """Keep other threads and processes from making the same entry."""
        descriptor = self._locked(f".{recipe.folder}.lock")
        try:
            yield
        finally:
            if descriptor is not None:
                # Removed while it is held: whoever waits for this file sees that it is gone.
                with suppress(OSError):
                    os.unlink(self.root / f".{recipe.folder}.lock")
                # A child of a fork has the descriptor, too: closing it would not be enough.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                os.close(descriptor)

    def problem(self) -> str | None:
        """Why the cache is not used, None if it is or if nothing is there yet."""
        try:
            with self._open(create=False):
                return None
        except CacheUnusable as error:
            return str(error)

    def size(self) -> tuple[int, int]:
        """How many entries there are, good or bad, and the bytes of their files."""
        entries = size = 0
        for folder in self.root.glob("[!.]*"):
            with suppress(OSError):
                size += sum(one.lstat().st_size for one in folder.iterdir())
                entries += 1
        return entries, size

    def _locked(self, name: str) -> int | None:
        """A descriptor of the lock file `name`, locked; None where there can be no lock."""
        while True:
            try:
                with self._open(create=True) as root:
                    descriptor = os.open(
                        name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=root
                    )
            except (OSError, CacheUnusable):
                return None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(descriptor), os.lstat(self.root / name)):
                    return descriptor
            except FileNotFoundError:
                pass
            except OSError:
                os.close(descriptor)
                return None
            os.close(descriptor)

    @contextmanager
    def _open(self, *, create: bool) -> Iterator[int | None]:
        """The root as a descriptor, after a check of whose it is; None if it is not there."""
        descriptor = self._descriptor(create)
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _descriptor(self, create: bool) -> int | None:
        try:
            if create:
                _make_folders(self.root)
            descriptor = os.open(self.root, _FOLDER)
        except FileNotFoundError as error:
            if not create:
                return None
            raise CacheUnusable(_reason(error)) from error
        except OSError as error:
            why = "it is a symbolic link" if self.root.is_symlink() else _reason(error)
            raise CacheUnusable(why) from error
        if problem := _problem(os.fstat(descriptor)):
            os.close(descriptor)
            raise CacheUnusable(problem)
        return descriptor


def _load(root: int, recipe: Recipe) -> Artefact | None:
    try:
        folder = os.open(recipe.folder, _FOLDER, dir_fd=root)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadEntry(f"it is a link or no folder ({_reason(error)})") from error
    try:
        if problem := _problem(os.fstat(folder)):
            raise BadEntry(problem)
        files = {name: data for name in FILES if (data := _read(folder, name)) is not None}
    finally:
        os.close(folder)
    return from_files(recipe, files)


def _read(folder: int, name: str) -> bytes | None:
    try:
        descriptor = os.open(name, _FILE, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadEntry(f"{name} is a link or cannot be opened ({_reason(error)})") from error
    try:
        status = os.fstat(descriptor)
        if problem := _problem(status):
            raise BadEntry(f"{name}: {problem}")
        if not stat.S_ISREG(status.st_mode):
            raise BadEntry(f"{name} is not a file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise BadEntry(f"{name} cannot be read ({_reason(error)})") from error
    finally:
        os.close(descriptor)


def _problem(status: os.stat_result) -> str | None:
    """Why something could have been written by somebody else, None if it could not."""
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}, and this process runs as {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write to it (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def _make_folders(path: Path) -> None:
    """As `mkdir -p`, with what is new for this user alone."""
    if not path.exists():
        _make_folders(path.parent)
        with suppress(FileExistsError):
            path.mkdir(0o700)


def _write(root: int, folder: str, files: Mapping[str, bytes]) -> None:
    os.mkdir(folder, 0o700, dir_fd=root)
    inside = os.open(folder, _FOLDER, dir_fd=root)
    try:
        for name, data in files.items():
            with open(os.open(name, _NEW, 0o600, dir_fd=inside), "wb") as file:
                file.write(data)
    finally:
        os.close(inside)


def _put(root: int, new: str, recipe: Recipe, made: Artefact) -> bool:
    """Try to rename `new` to its place; True if a good entry is there in the end."""
    try:
        os.rename(new, recipe.folder, src_dir_fd=root, dst_dir_fd=root)
        return True
    except OSError as error:
        if error.errno not in _OCCUPIED:
            raise
    try:
        there = _load(root, recipe)
    except BadEntry:
        pass
    else:
        if there is not None and (there.cubin is not None or made.cubin is None):
            return True
    old = f".old-{uuid4().hex}"
    with suppress(FileNotFoundError):
        os.rename(recipe.folder, old, src_dir_fd=root, dst_dir_fd=root)
        _remove(root, old)
    return False


def _remove(root: int, name: str) -> None:
    """Remove a file, a link or a folder with all it holds, as far as that can be done."""
    with suppress(OSError):
        os.unlink(name, dir_fd=root)
    with suppress(OSError):
        for _, folders, files, inside in os.fwalk(name, topdown=False, dir_fd=root):
            for one in [*files, *folders]:
                with suppress(OSError):
                    os.unlink(one, dir_fd=inside)
            for one in folders:
                with suppress(OSError):
                    os.rmdir(one, dir_fd=inside)
        os.rmdir(name, dir_fd=root)


def _tidy(root: int) -> None:
    """Remove what processes that were killed have left behind."""
    for name in os.listdir(root):
        if name.startswith((".new-", ".old-")):
            with suppress(OSError):
                age = time.time() - os.stat(name, dir_fd=root, follow_symlinks=False).st_mtime
                if age > _STALE_SECONDS:
                    _remove(root, name)


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
