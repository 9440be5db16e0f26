"""A shell for tests of the command line: in this process, as a process of its own, or on a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moeplace.cli import run

SHAPE = {"tokens": 400, "layers": 3, "experts": 32, "top_k": 4, "requests": 20}


@dataclass
class Done:
    """A finished command: exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as JSON, which must have sorted keys."""
        document: dict[str, Any] = json.loads(self.out)
        assert list(document) == sorted(document)
        return document


class Shell:
    """Runs commands in this process, in a folder of its own that holds ``t.npz`` and ``t.jsonl``."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys

    def __call__(self, line: str, code: int = 0) -> Done:
        """Run one line and expect an exit code."""
        self._capsys.readouterr()
        got = run(line.split())
        out, err = self._capsys.readouterr()
        assert got == code, f"{line}: exit code {got}\n{out}{err}"
        return Done(got, out, err)

    def fails(self, line: str, *words: str, code: int = 1) -> str:
        """Run a line that must fail with one message, without a traceback, that holds the words."""
        done = self(line, code)
        assert done.out == "", done.out
        assert "Traceback" not in done.err
        assert "(unexpected; --debug" not in done.err
        message = done.err[done.err.index("error: ") :]
        for word in words:
            assert word in message, f"{word!r} is not in {message!r}"
        return message

    def files(self) -> list[str]:
        """Everything in the folder, hidden files too."""
        return sorted(os.listdir(self.folder))


def started(folder: Path, line: str, **settings: Any) -> subprocess.Popen[str]:
    """Start a command as a process of its own."""
    words = [sys.executable, "-m", "moeplace", *line.split()]
    streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(words, cwd=folder, text=True, **(streams | settings))


def on_terminal(folder: Path, line: str, width: int = 80, **variables: str) -> str:
    """What a command shows on a terminal of some width, standard output and error together."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color"} | variables
    words = [sys.executable, "-m", "moeplace", *line.split()]
    process = subprocess.Popen(words, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 65536):
            shown += block
    except OSError:  # Linux reports the end of a terminal as an error
        pass
    process.wait()
    os.close(ours)
    return shown.decode().replace("\r\n", "\n")
