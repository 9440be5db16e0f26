"""Inputs are recognised by content, outputs appear whole or not at all."""

from __future__ import annotations

import gzip
import io
import os
import stat
import threading
from pathlib import Path

import pytest

from moeplace.errors import InputError, OutputError
from moeplace.files import HEAD_BYTES, InputFolder, atomic_output, open_input, zstd_module

CONTENT = b"line of content\n" * 20_000


def compressed(content: bytes, kind: str) -> bytes:
    """Compress ``content``."""
    if kind == "gzip":
        return gzip.compress(content)
    return bytes(zstd_module().compress(content)) if kind == "zstd" else content


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch):
    """Make standard input a stream that gives a few bytes at a time, as a pipe may."""

    def give(content: bytes) -> None:
        class Slow(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                return super().read(min(size, 3000) if size is not None and size > 0 else size)

        class Stdin:
            buffer = Slow(content)

        monkeypatch.setattr("sys.stdin", Stdin())

    return give


@pytest.mark.parametrize("kind", ["plain", "gzip", "zstd"])
def test_compression_is_found_by_magic_bytes(tmp_path: Path, kind: str) -> None:
    """A file reads as its content whatever its name, as often as wanted, and its head is not consumed."""
    path = tmp_path / "misnamed.txt"
    path.write_bytes(compressed(CONTENT, kind))
    source = open_input(path)
    assert source.compression == (None if kind == "plain" else kind)
    assert source.can_reopen
    assert source.head() == CONTENT[:HEAD_BYTES]
    for _ in range(2):
        with source.stream() as stream:
            assert stream.peek(4)[:4] == b"line"
            assert stream.read() == CONTENT
    with source.seekable() as handle:
        handle.seek(16)
        assert handle.read(4) == b"line"


@pytest.mark.parametrize("kind", ["plain", "gzip", "zstd"])
def test_stdin_is_read_once(stdin, kind: str) -> None:
    """Standard input is peeked at and read once; a second stream is an error, not silence."""
    stdin(compressed(CONTENT, kind))
    source = open_input("-")
    assert not source.can_reopen
    assert source.head() == CONTENT[:HEAD_BYTES]
    assert source.stream().read() == CONTENT
    with pytest.raises(InputError, match="second time"):
        source.stream()


def test_stdin_as_a_seekable_copy(stdin) -> None:
    """Formats that seek get standard input as a copy in memory, as often as wanted."""
    stdin(CONTENT)
    source = open_input("-")
    assert source.seekable().read() == CONTENT
    assert source.seekable().read() == CONTENT
    assert source.stream().read() == CONTENT


def test_a_named_pipe_is_read_like_stdin(tmp_path: Path) -> None:
    """A pipe given as a path (``<(zcat …)``) is not opened twice."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(CONTENT))
    writer.start()
    with open_input(path) as source:
        assert not source.can_reopen
        assert source.stream().read() == CONTENT
    writer.join()


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_truncated_input_names_the_file(tmp_path: Path, kind: str) -> None:
    """Compressed data that ends early is an error with the file and how far it got, never a short read."""
    path = tmp_path / "cut.bin"
    whole = compressed(os.urandom(200_000), kind)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=rf"cut\.bin: after \d+ bytes of content: {kind} data ends early"):
        open_input(path).stream().read()


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_damaged_input_names_the_file(tmp_path: Path, kind: str) -> None:
    """Compressed data with a flipped byte is an error that says so."""
    path = tmp_path / "bad.bin"
    data = bytearray(compressed(CONTENT, kind))
    if kind == "gzip":
        data[-6] ^= 0xFF
    else:
        data[6:12] = b"\xff" * 6
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"bad\.bin.*{kind} data is damaged"):
        open_input(path).stream().read()


def test_missing_input_suggests_neighbours(tmp_path: Path) -> None:
    """A misspelt path is answered with the file that was meant; a directory and a NUL are refused by name."""
    (tmp_path / "trace.jsonl").write_text("x")
    with pytest.raises(InputError, match=r"trase.jsonl: no such file\nhint: did you mean .*trace.jsonl"):
        open_input(tmp_path / "trase.jsonl")
    with pytest.raises(InputError, match=r"the folder .* does not exist"):
        open_input(tmp_path / "nowhere" / "trace.jsonl")
    with pytest.raises(InputError, match="is a directory"):
        open_input(tmp_path)
    with pytest.raises(InputError, match="cannot be opened"):
        open_input("a\0b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_permissions_are_reported(tmp_path: Path) -> None:
    """Unreadable inputs, write-protected outputs and unwritable folders are clear errors."""
    path = tmp_path / "secret"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        open_input(path)
    with pytest.raises(OutputError, match="write-protected"), atomic_output(path):
        pass
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"), atomic_output(tmp_path / "new"):
        pass
    tmp_path.chmod(0o700)


def test_output_replaces_at_the_end(tmp_path: Path) -> None:
    """The old content stays readable until the new one is complete; the mode is kept, no temporary file remains."""
    path = tmp_path / "out.json"
    path.write_bytes(b"old")
    path.chmod(0o640)
    with atomic_output(path) as stream:
        stream.write(b"new")
        assert path.read_bytes() == b"old"
        assert len(list(tmp_path.iterdir())) == 2
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_output_has_the_usual_mode(tmp_path: Path) -> None:
    """A new file gets the permissions that any new file of the process gets."""
    (tmp_path / "plain").write_bytes(b"")
    with atomic_output(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_failure_keeps_the_old_output(tmp_path: Path, failure: type[BaseException]) -> None:
    """When the body fails or is interrupted, the old file is untouched and the temporary one is gone."""
    path = tmp_path / "out.json"
    path.write_bytes(b"old")

    def work() -> None:
        with atomic_output(path) as stream:
            stream.write(b"half of the new")
            raise failure

    with pytest.raises(failure):
        work()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_output_fails_before_the_work(tmp_path: Path) -> None:
    """A target that cannot be written is refused before the body runs."""
    worked = False
    with pytest.raises(OutputError, match="create the folder first"), atomic_output(tmp_path / "no" / "out"):
        worked = True
    with pytest.raises(OutputError, match="is a directory"), atomic_output(tmp_path):
        worked = True
    assert not worked


def test_a_full_disk_is_an_output_error() -> None:
    """A failing write is an :class:`OutputError` that names the target; devices are written, not replaced."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(OutputError, match=r"/dev/full: cannot be written: No space"), atomic_output("/dev/full") as out:
        out.write(b"x")
    with atomic_output("/dev/null") as out:
        out.write(b"x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_links_are_followed(tmp_path: Path) -> None:
    """Writing through a symbolic link replaces the file it points to, not the link."""
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with atomic_output(tmp_path / "link") as stream:
        stream.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_dash_is_stdout(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """``-`` writes to standard output."""
    with atomic_output("-") as stream:
        stream.write(b"data")
    assert capfdbinary.readouterr().out == b"data"


def test_a_folder_is_called_by_its_own_name(tmp_path: Path) -> None:
    """A link to a folder beside it, whatever its name, changes nothing; one to elsewhere is followed."""
    for place in ("c/run7/x", "elsewhere/deep/y"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text("")
    (tmp_path / "c" / "a_latest").symlink_to("run7")
    (tmp_path / "c" / "up").symlink_to("..")
    assert InputFolder(tmp_path / "c").files == ("run7/x", "up/elsewhere/deep/y")
