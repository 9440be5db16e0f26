"""Per-request JSON: one file per request, a list of steps, the first the prompt and then one decode token each.

The layout of ``core12345/MoE_expert_selection_trace`` ("Patterns behind Chaos", arXiv 2510.05497). Requests come as
single files, as folders of them, and as tar archives of them.
"""

from __future__ import annotations

import re
from pathlib import Path

from moeplace.files import InputFile, InputFolder
from moeplace.readers._common import ReaderOptions
from moeplace.readers._request_stream import RequestStream, looks_in_folder, looks_in_head
from moeplace.readers._steps import parse_request

NAME = "steps-json"
DESCRIPTION = "Per-request JSON: a list of steps {layer: [[ids] per token] or null}; files, folders or tar archives"

_STEPS = re.compile(rb'\[\s*\{\s*"\d+"\s*:\s*(null\s*[,}]|\[\s*(\[|\]))')


def sniff(head: bytes, name: str) -> int:
    """Score how much ``head`` looks like a request's steps, or a tar archive of them."""
    return looks_in_head(head, _looks)


def sniff_folder(folder: Path) -> int:
    """Score how much one of a folder's first JSON files looks like a request's steps: a corpus may hold bad ones."""
    return looks_in_folder(folder, _looks)


def open(source: InputFile, options: ReaderOptions) -> RequestStream:
    """Open a request, or a tar archive of requests, as a stream.

    Raises
    ------
    TraceError
        The first request breaks the format, or the model disagrees with it.
    """
    return RequestStream(source, options, parse_request)


def open_folder(folder: Path, options: ReaderOptions) -> RequestStream:
    """Open a folder of requests; the errors are those of :func:`open`."""
    return RequestStream(InputFolder(folder), options, parse_request)


def _looks(head: bytes) -> bool:
    return _STEPS.match(head.removeprefix(b"\xef\xbb\xbf").lstrip()) is not None
