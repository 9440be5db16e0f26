"""Files in and out: inputs decompressed by their magic bytes, outputs replaced atomically.

An :class:`InputFile` is a path, a pipe or standard input; what it holds, not its name, says how it is compressed.
An :class:`InputFolder` is the files below a folder, in sorted order.
:func:`atomic_output` never leaves a half-written file and never loses the one that was there.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import secrets
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

from moeplace.errors import InputError, Location, MissingExtraError, OutputError, UnreadableError

HEAD_BYTES = 1 << 16
STDIN_NAME = "<stdin>"
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_MAGIC_BYTES = 4


def zstd_module() -> Any:
    """Return the module with the standard ``ZstdFile`` API: the standard library's from Python 3.14.

    Raises
    ------
    MissingExtraError
        This Python has neither.
    """
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as exc:
        raise MissingExtraError(
            "this Python cannot read or write zstd", hint="pip install backports.zstd, or use gzip"
        ) from exc
    return zstd


class InputFile:
    """One input: its name, its first bytes, and as many fresh streams of its content as its kind allows.

    Attributes
    ----------
    name
        What errors call it: the path as given, or ``<stdin>``.
    compression
        ``"gzip"``, ``"zstd"`` or None, from the magic bytes.
    can_reopen
        True for a regular file; a pipe or standard input can be read once.
    """

    def __init__(self, name: str, raw: BinaryIO, path: Path | None) -> None:
        self.name, self.can_reopen = name, path is not None
        self._path, self._raw = path, raw
        magic = _read_fully(raw, _MAGIC_BYTES)
        self.compression = next((kind for mark, kind in _MAGIC.items() if magic.startswith(mark)), None)
        # a pipe cannot seek: what was read to recognise it is put back in front of the rest
        self._head: bytes | None = None
        self._data: bytes | None = None
        self._once: io.BufferedReader | None = None
        if path is not None:
            raw.close()
        else:
            self._once = self._decompressed(cast(BinaryIO, io.BufferedReader(_Prefixed(magic, raw))))

    def head(self) -> bytes:
        """Return up to 64 KiB of decompressed content without consuming it."""
        if self._head is None:
            if self.can_reopen:
                with self.stream() as stream:
                    self._head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
            else:
                self._head = self._once.peek(HEAD_BYTES)[:HEAD_BYTES] if self._once else b""
        return self._head

    def stream(self) -> io.BufferedReader:
        """Return a peekable stream of the decompressed content from its start; the caller closes it.

        Raises
        ------
        InputError
            The input cannot be opened, or is a pipe that was read before. Reading raises it for damaged data.
        """
        if self._path is not None:
            return self._decompressed(_open_path(self._path, self.name))
        if self._data is not None:
            return io.BufferedReader(cast(io.RawIOBase, io.BytesIO(self._data)))
        if self._once is None:
            raise InputError("is read a second time", rule="a pipe can be read once", where=Location(file=self.name))
        once, self._once = self._once, None
        return once

    def seekable(self) -> BinaryIO:
        """Return the decompressed content as a seekable handle: the file itself, otherwise a copy in memory."""
        if self._path is not None and self.compression is None:
            return _open_path(self._path, self.name)
        if self._data is None:
            self.head()
            with self.stream() as stream:
                self._data = stream.read()
        return io.BytesIO(self._data)

    def close(self) -> None:
        """Close a pipe that was not handed out; standard input stays open."""
        if not self.can_reopen and self.name != STDIN_NAME:
            self._raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decompressed(self, raw: BinaryIO) -> io.BufferedReader:
        inner: BinaryIO = raw
        if self.compression == "gzip":
            inner = cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
        elif self.compression == "zstd":
            inner = cast(BinaryIO, zstd_module().ZstdFile(raw, "rb"))
        return io.BufferedReader(_Checked(inner, raw, self.name, self.compression), HEAD_BYTES)


def open_input(path: str | os.PathLike[str]) -> InputFile:
    """Open a path, a pipe or ``-`` (standard input) for reading.

    Raises
    ------
    InputError
        The path is missing, a directory, or may not be read; the hint names files with a similar name.
    """
    name = os.fspath(path)
    if name == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed", where=Location(file=STDIN_NAME))
        return InputFile(STDIN_NAME, sys.stdin.buffer, None)
    raw = _open_path(Path(name), name)
    regular = stat.S_ISREG(os.fstat(raw.fileno()).st_mode)
    return InputFile(name, raw, Path(name) if regular else None)


class InputFolder:
    """A folder as one input: the files below it, hidden ones left out.

    Attributes
    ----------
    name
        What errors call it: the path as given.
    files
        Relative paths with ``/``, sorted; links to folders are followed, each folder once.
    can_reopen
        True: its files can be read as often as wanted.

    Raises
    ------
    InputError
        The folder, or one below it, cannot be listed.
    """

    can_reopen = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self._path = Path(self.name)
        found: list[str] = []
        seen: set[str] = set()
        links = [self.name]
        while links:  # what is no link first: a folder is called by its own name where it has one here
            folders = os.walk(links.pop(0), onerror=self._not_listed)
            for folder, below, names in folders:
                real = os.path.realpath(folder)
                below[:] = sorted(name for name in below if not name.startswith(".")) if real not in seen else []
                if real in seen:  # a link to a folder that was met
                    continue
                seen.add(real)
                links += [path for name in below if os.path.islink(path := os.path.join(folder, name))]
                place = Path(folder).relative_to(self._path)
                found += [(place / name).as_posix() for name in names if not name.startswith(".")]
        self.files = tuple(sorted(found))

    def open(self, file: str) -> InputFile:
        """Open one of :attr:`files`."""
        return open_input(self._path / file)

    def _not_listed(self, exc: OSError) -> None:
        raise InputError(f"cannot be listed: {exc.strerror or exc}", where=Location(file=self.name)) from exc


@contextlib.contextmanager
def atomic_output(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file that appears only when it is complete.

    A temporary file is opened beside the target before the body runs, so that an unwritable path fails before any
    work; it replaces the target when the body ends and is removed when the body raises. ``-`` is standard output, and
    a device or a pipe is written directly.

    Raises
    ------
    OutputError
        The target cannot be written, or a write fails (a full disk).
    """
    name = os.fspath(path)
    if name == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    # through links, so that the link stays and its file is replaced
    target = Path(os.path.realpath(name))
    mode = _target_mode(target, name)
    if mode is not None and not stat.S_ISREG(mode):
        # replacing /dev/null by a file would be worse than a half-written pipe
        with io.BufferedWriter(_Output(target, "wb", name)) as direct:
            yield cast(BinaryIO, direct)
        return
    raw = _temporary_beside(target, name)
    temporary = Path(os.fsdecode(raw.name))
    try:
        if mode is not None:
            os.fchmod(raw.fileno(), stat.S_IMODE(mode))
        stream = io.BufferedWriter(raw, HEAD_BYTES)
        yield cast(BinaryIO, stream)
        stream.flush()
        # without it a crash after the replacement could leave the new name with no content
        os.fsync(raw.fileno())
        raw.close()
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError, OutputError):
            raw.close()
        temporary.unlink(missing_ok=True)
        raise


class _Prefixed(io.RawIOBase):
    """A raw stream with bytes that were read from it put back in front."""

    def __init__(self, prefix: bytes, raw: BinaryIO) -> None:
        self._prefix, self._raw = prefix, raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self._prefix[: len(buffer)] or self._raw.read(len(buffer))
        self._prefix = self._prefix[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


class _Checked(io.RawIOBase):
    """Fills every buffer it is given, and turns what decompressors raise into errors that name the file."""

    def __init__(self, inner: BinaryIO, raw: BinaryIO, name: str, compression: str | None) -> None:
        self._inner, self._raw, self._name, self._compression = inner, raw, name, compression
        self._bytes_read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        filled = 0
        while filled < len(view):
            try:
                data = self._inner.read(len(view) - filled)
            except Exception as exc:
                raise self._translated(exc) from exc
            if not data:
                break
            view[filled : filled + len(data)] = data
            filled += len(data)
            self._bytes_read += len(data)
        return filled

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
            self._raw.close()
        super().close()

    def _translated(self, exc: Exception) -> Exception:
        where = Location(file=self._name, element=f"after {self._bytes_read} bytes of content")
        if isinstance(exc, EOFError):
            return InputError(
                f"{self._compression} data ends early",
                rule="a compressed file ends with its end mark",
                hint="the copy or the recording was cut off: copy or record it again",
                where=where,
            )
        damaged: tuple[type[Exception], ...] = (zlib.error, gzip.BadGzipFile)
        if self._compression == "zstd":
            damaged = (zstd_module().ZstdError,)
        if self._compression and isinstance(exc, damaged):
            what = f"{self._compression} data is damaged: {exc}"
            return InputError(what, hint="copy or record it again", where=where)
        if isinstance(exc, OSError):
            return UnreadableError(f"cannot be read: {exc.strerror or exc}", where=Location(file=self._name))
        return exc


class _Output(io.FileIO):
    """A file whose failing writes are :class:`OutputError`."""

    def __init__(self, path: Path, mode: str, shown: str) -> None:
        self._shown = shown
        try:
            super().__init__(path, mode)
        except FileExistsError:
            raise
        except OSError as exc:
            raise _cannot_write(shown, exc) from exc

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as exc:
            raise _cannot_write(self._shown, exc) from exc


def _temporary_beside(target: Path, shown: str) -> _Output:
    # created with the process's usual permissions, which mkstemp's private 0600 would not give
    while True:
        with contextlib.suppress(FileExistsError):
            return _Output(target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp"), "xb", shown)


def _target_mode(target: Path, shown: str) -> int | None:
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise _cannot_write(shown, exc) from exc
    if stat.S_ISDIR(mode):
        raise OutputError("is a directory", rule="the output is a file", where=Location(file=shown))
    if not os.access(target, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise OutputError("is write-protected", hint="choose another path or change its mode", where=shown)
    return mode


def _cannot_write(shown: str, exc: OSError) -> OutputError:
    hint = "create the folder first" if isinstance(exc, FileNotFoundError) else "choose a path that can be written"
    return OutputError(f"cannot be written: {exc.strerror or exc}", hint=hint, where=Location(file=shown))


def _open_path(path: Path, shown: str) -> BinaryIO:
    where = Location(file=shown)
    try:
        return path.open("rb")
    except FileNotFoundError as exc:
        raise UnreadableError("no such file", hint=_similar_names(path), where=where) from exc
    except IsADirectoryError as exc:
        raise InputError("is a directory", rule="the input is a file or -", where=where) from exc
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise UnreadableError(f"cannot be opened: {reason}", where=where) from exc


def _similar_names(path: Path) -> str | None:
    import difflib

    try:
        near = difflib.get_close_matches(path.name, sorted(os.listdir(path.parent)), n=3)
    except OSError:
        return f"the folder {path.parent} does not exist"
    return f"did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else None


def _read_fully(raw: BinaryIO, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := raw.read(size - len(data))):
        data += more
    return data
