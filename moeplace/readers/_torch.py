"""PyTorch files: loaded with ``weights_only=True`` alone, so that no code in them can run."""

from __future__ import annotations

import re
from typing import Any

from moeplace.errors import Location, TraceError
from moeplace.files import InputFile
from moeplace.readers._extras import need

_LEGACY_PICKLE = re.compile(rb"\x80[\x02-\x05]")


def is_pt(head: bytes) -> bool:
    """True for the first bytes (with an archive's member names) of what ``torch.save`` writes."""
    return b"data.pkl" in head if head.startswith(b"PK") else _LEGACY_PICKLE.match(head) is not None


def load_pt(source: InputFile) -> Any:
    """Load what ``torch.save`` wrote, on the CPU.

    Raises
    ------
    MissingExtraError
        PyTorch is not installed.
    TraceError
        The file is damaged, or holds objects that only running its code would restore.
    """
    otherwise = ", or convert the file where PyTorch is:\n" + _conversion(source.name)
    torch = need("torch", "torch", f"{source.name} is a PyTorch file", otherwise)
    with source.seekable() as handle:
        try:
            return torch.load(handle, map_location="cpu", weights_only=True)
        except Exception as exc:  # damaged files raise almost anything
            raise _not_loaded(source.name, exc) from exc


def to_numpy(value: Any) -> Any:
    """Turn a tensor into an array (bfloat16, which NumPy lacks, into float32); anything else stays as it is."""
    if type(value).__module__.split(".")[0] != "torch" or not hasattr(value, "numpy"):
        return value
    tensor = value.detach().cpu()
    return tensor.float().numpy() if str(tensor.dtype) == "torch.bfloat16" else tensor.numpy()


def _conversion(name: str) -> str:
    """Three lines that turn the file into JSON where PyTorch is installed."""
    return (
        "  import json, torch\n"
        f"  value = torch.load({name!r}, map_location='cpu', weights_only=True)\n"
        "  json.dump(value, open('converted.json', 'w'), default=lambda tensor: tensor.tolist())"
    )


def _not_loaded(file: str, exc: Exception) -> TraceError:
    if "weights_only" in str(exc) or "Unsupported" in str(exc):
        return TraceError(
            "holds Python objects beyond tensors, numbers, strings, lists and dicts",
            rule="PyTorch files are loaded with weights_only=True: others can run code",
            hint="save plain tensors, for example torch.save({'logical_count': counts}, path)",
            where=Location(file=file),
        )
    reason = str(exc).strip().split("\n", 1)[0][:200] or type(exc).__name__
    hint = "the copy or the recording was cut off: copy or record it again"
    return TraceError(f"is not a whole PyTorch file: {reason}", hint=hint, where=Location(file=file))
