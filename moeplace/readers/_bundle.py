"""One JSON document, a folder of them, or a tar archive of them, as named documents."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, cast

from moeplace.errors import InputError, Location, TraceError
from moeplace.files import InputFile, InputFolder, open_input, zstd_module

_ENDINGS = (".json", ".json.gz", ".json.zst")
_TAR_MAGIC_AT = 257
_BEGINNING = 1 << 12


def printable(name: str) -> str:
    """Return a file's name as it can be written anywhere: bytes that are no text, and controls, as escapes."""
    return (
        name
        if name.isprintable()
        else "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name)
    )


def is_tar(head: bytes) -> bool:
    """True for the first bytes of a tar archive."""
    return head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar"


def first_document(head: bytes) -> bytes:
    """Return the beginning of the first JSON document in the first bytes of a tar archive; empty when none begins."""
    try:
        with tarfile.open(fileobj=io.BytesIO(head), mode="r:") as archive:
            for member in archive:
                if _is_document(member):
                    return _beginning(head[member.offset_data :][: member.size])
    except (tarfile.TarError, OSError):
        pass
    return b""


def first_of_archive(source: InputFile) -> bytes:
    """Return the beginning of the first JSON document of a tar archive that can be opened again; empty without one."""
    for document in Bundle(source).documents[:1]:
        if document.offset is not None and source.compression is None:
            data = read_document(source.name, document)
            return b"" if isinstance(data, InputError) else data[:_BEGINNING]
    return b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A document of a bundle, not read yet.

    Attributes
    ----------
    name
        Its relative path in the folder or archive.
    size_bytes
        Bytes as it is stored.
    changed_ns
        Times of the last change of its content and of its entry, 0 in an archive.
    offset
        Where it begins in an archive that is not compressed, else None.
    """

    name: str
    size_bytes: int
    changed_ns: tuple[int, int] = (0, 0)
    offset: int | None = None


class Bundle:
    """Named documents of an input, in the order in which they lie there.

    Attributes
    ----------
    documents
        What there is, in order. Empty for an archive out of a pipe, which cannot be looked through first.
    names
        The documents' names in sorted order.
    ignored
        Files that are not JSON by their ending.
    """

    def __init__(self, source: InputFile | InputFolder) -> None:
        self._source = source
        self._tar = isinstance(source, InputFile) and is_tar(source.head())
        self.documents, self.ignored = self._listed()
        self.names = tuple(sorted(document.name for document in self.documents))

    @property
    def has_random_access(self) -> bool:
        """Whether each document can be read by itself."""
        source = self._source
        return bool(self.documents) and (
            isinstance(source, InputFolder) or (self._tar and source.can_reopen and source.compression is None)
        )

    @property
    def is_archive(self) -> bool:
        """Whether it is a tar archive."""
        return self._tar

    @property
    def changed(self) -> tuple[int, int, int]:
        """Size and times of change of an archive; zeros for a folder, whose documents have theirs."""
        if isinstance(self._source, InputFolder) or not self._source.can_reopen:
            return (0, 0, 0)
        status = os.stat(self._source.name)
        return (status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def contents(self) -> Iterator[tuple[str, bytes | InputError]]:
        """Yield each document's name and decompressed content, or what kept it from being read.

        Raises
        ------
        TraceError
            The archive is damaged.
        """
        source = self._source
        if isinstance(source, InputFolder):
            for document in self.documents:
                yield document.name, read_document(source.name, document)
        elif self._tar:
            yield from self._members(source)
        else:
            with source.stream() as stream:
                yield PurePosixPath(source.name).name, stream.read()

    def file(self, name: str) -> str:
        """What errors call a document."""
        name = printable(name)
        if isinstance(self._source, InputFolder):
            return f"{self._source.name.rstrip('/')}/{name}"
        return f"{self._source.name}:{name}" if self._tar else self._source.name

    def folder(self, name: str) -> str:
        """Name of the folder that a document lies in; empty when it is not known."""
        inside = printable(PurePosixPath(name).parent.name)
        if inside:
            return inside
        whole = PurePosixPath(self._source.name)
        if isinstance(self._source, InputFolder):
            return os.path.basename(os.path.abspath(whole))
        return whole.name.split(".")[0] if self._tar else whole.parent.name

    def _listed(self) -> tuple[tuple[Document, ...], tuple[str, ...]]:
        source = self._source
        if isinstance(source, InputFolder):
            files = [_on_disk(source.name, name) for name in source.files]
        elif not self._tar:
            return (Document(name=PurePosixPath(source.name).name, size_bytes=0),), ()
        elif not source.can_reopen:
            return (), ()
        else:
            with self._opened(source, listing=True) as archive:
                files = [
                    Document(name=member.name, size_bytes=member.size, offset=member.offset_data)
                    for member in self._checked(archive)
                    if member.isfile()
                ]
        documents = tuple(file for file in files if is_document(file.name))
        return documents, tuple(file.name for file in files if not is_document(file.name))

    def _members(self, source: InputFile) -> Iterator[tuple[str, bytes | InputError]]:
        with self._opened(source, listing=False) as archive:
            for member in self._checked(archive):
                content = archive.extractfile(member) if _is_document(member) else None
                if content is None:
                    continue
                try:
                    data = content.read()
                except (tarfile.TarError, EOFError) as exc:
                    raise self._damaged(exc) from exc
                yield member.name, _decompressed(InputFile(self.file(member.name), io.BytesIO(data), None))

    @contextlib.contextmanager
    def _opened(self, source: InputFile, *, listing: bool) -> Iterator[tarfile.TarFile]:
        # a listing seeks from header to header where it can
        seeks = listing and source.compression is None
        with contextlib.ExitStack() as stack:
            handle = stack.enter_context(source.seekable() if seeks else source.stream())
            try:
                mode: Literal["r:", "r|"] = "r:" if seeks else "r|"
                archive = stack.enter_context(tarfile.open(fileobj=cast(io.BufferedReader, handle), mode=mode))
            except tarfile.TarError as exc:
                raise self._damaged(exc) from exc
            yield archive

    def _checked(self, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        while True:
            try:
                member = archive.next()
            except (tarfile.TarError, EOFError) as exc:
                raise self._damaged(exc) from exc
            if member is None:
                return
            yield member
            # the archive remembers every member it has met: that would grow with the corpus
            archive.members = []  # type: ignore[attr-defined]

    def _damaged(self, exc: Exception) -> TraceError:
        return TraceError(
            f"is not a whole tar archive: {exc}",
            hint="the copy was cut off or damaged: copy it again",
            where=Location(file=self._source.name),
        )


def read_document(source: str, document: Document) -> bytes | InputError:
    """Return the decompressed content of a document of a folder or uncompressed archive, or what keeps it from it."""
    try:
        if document.offset is None:
            return _decompressed(open_input(Path(source, document.name)))
        with open_input(source).seekable() as archive:
            archive.seek(document.offset)
            data = archive.read(document.size_bytes)
    except InputError as exc:
        return exc
    return _decompressed(InputFile(f"{source}:{document.name}", io.BytesIO(data), None))


def _on_disk(folder: str, name: str) -> Document:
    try:
        status = os.stat(os.path.join(folder, name))
    except OSError:  # reading it will say why
        return Document(name=name, size_bytes=0)
    return Document(name=name, size_bytes=status.st_size, changed_ns=(status.st_mtime_ns, status.st_ctime_ns))


def is_document(name: str) -> bool:
    """True for the name of a document."""
    return name.endswith(_ENDINGS)


def _is_document(member: tarfile.TarInfo) -> bool:
    return member.isfile() and is_document(member.name)


def _beginning(data: bytes) -> bytes:
    """Decompress what can be of a document that may be cut off."""
    packed = io.BytesIO(data)
    try:
        if data.startswith(b"\x1f\x8b"):
            return gzip.GzipFile(fileobj=packed).read1(_BEGINNING)
        if data.startswith(b"\x28\xb5\x2f\xfd"):
            return bytes(zstd_module().ZstdFile(packed).read1(_BEGINNING))
    except Exception:  # each decompressor has its own errors
        return b""
    return data


def _decompressed(file: InputFile) -> bytes | InputError:
    try:
        with file, file.stream() as stream:
            return stream.read()
    except InputError as exc:
        return exc
