"""Optional packages: imported where they are needed, and named with the command that installs them."""

from __future__ import annotations

import importlib
from typing import Any

from moeplace.errors import Location, MissingExtraError, TraceError
from moeplace.files import InputFile

_MAX_HEADER_BYTES = 100_000_000


def need(module: str, extra: str, what: str, otherwise: str = "") -> Any:
    """Import an optional module.

    Parameters
    ----------
    module
        Its full name.
    extra
        The extra of moeplace that installs it.
    what
        What needs it: a file's name and kind.
    otherwise
        What the user can do without it, put after the command.

    Raises
    ------
    MissingExtraError
        It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        package = module.split(".")[0]
        raise MissingExtraError(
            f"{what}: reading it needs {package}, which is not installed",
            hint=f"pip install 'moeplace[{extra}]'{otherwise}",
        ) from exc


def is_safetensors(head: bytes) -> bool:
    """True for the first bytes of a safetensors file: the length of a JSON header, then the header."""
    return len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _MAX_HEADER_BYTES


def load_safetensors(source: InputFile) -> dict[str, Any]:
    """Read all arrays of a safetensors file by name.

    Raises
    ------
    MissingExtraError
        The package safetensors is not installed.
    TraceError
        The file is damaged, or holds a type that NumPy lacks.
    """
    library = need("safetensors.numpy", "formats", f"{source.name} is a safetensors file")
    with source.stream() as stream:
        data = stream.read()
    try:
        return dict(library.load(data))
    except Exception as exc:  # the library has its own error type, and KeyError for types it does not know
        reason = str(exc).split("\n", 1)[0] or type(exc).__name__
        raise TraceError(
            f"is not a whole safetensors file of integers or floats: {reason}",
            rule="a safetensors file is a header and the arrays it describes",
            hint="the copy or the recording was cut off: copy or record it again",
            where=Location(file=source.name),
        ) from exc
