"""Accelerators: memory, arithmetic, links and prices; presets for common ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeplace import presets
from moeplace.errors import ProblemError

_FILE = "accelerators.toml"
_MAY_BE_ABSENT = "float | None"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One GPU, TPU or NPU with its links: nominal rates, the share of them that is reached, and start-up times.

    GB/s is 1e9 bytes per second in one direction; TFLOPS are dense.

    Parameters
    ----------
    name
        The accelerator's name.
    hbm_gb, hbm_tb_per_s
        Memory size [GB] and bandwidth [TB/s].
    bf16_tflops, fp8_tflops
        Peak arithmetic [TFLOPS]; None where fp8 is absent or no faster.
    scale_up_gb_per_s
        All scale-up links of one accelerator together (NVLink, Infinity Fabric, ICI, PCIe) [GB/s].
    scale_up_links
        Direct links that bandwidth is divided among (6 in a 3D torus); None if it ends in a switch.
    scale_up_domain
        Accelerators that scale-up links join.
    nic_gb_per_s
        The accelerator's share of the network between domains [GB/s].
    scale_up_efficiency, nic_efficiency, hbm_efficiency, gemm_efficiency
        Reached share of each nominal rate, in (0, 1]; of arithmetic by one family of kernels (fp8 DeepGEMM in presets).
    scale_up_latency_us, nic_latency_us
        Fixed time of one low-latency dispatch or combine, inside a domain and over the NIC [µs].
    hop_latency_us
        Time of each link of the way where GPUs are joined without switches [µs].
    normal_latency_us
        The same for normal (throughput) kernels, their notification included [µs].
    launch_us
        Fixed time of a layer's expert (or attention) kernels [µs].
    price_usd_per_hour, price_note
        Rent [USD/h], None if unknown; and what is known about it.

    Raises
    ------
    ProblemError
        If a number is out of range.
    """

    name: str
    hbm_gb: float
    hbm_tb_per_s: float
    bf16_tflops: float
    fp8_tflops: float | None = None
    scale_up_gb_per_s: float
    scale_up_links: int | None = None
    scale_up_domain: int = 8
    nic_gb_per_s: float
    scale_up_efficiency: float
    nic_efficiency: float
    hbm_efficiency: float = 0.81
    gemm_efficiency: float = 0.56
    scale_up_latency_us: float
    nic_latency_us: float
    normal_latency_us: float = 55.0
    hop_latency_us: float = 1.0
    launch_us: float = 20.0
    price_usd_per_hour: float | None = None
    price_note: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "float" or (field.type == _MAY_BE_ABSENT and value is not None):
                presets.check_positive(field.name, value, 1.0 if field.name.endswith("_efficiency") else float("inf"))
                object.__setattr__(self, field.name, float(value))
        for name in ("scale_up_domain", "scale_up_links"):
            count = getattr(self, name)
            if count is not None or name == "scale_up_domain":
                presets.check_whole(name, count, 1)
                object.__setattr__(self, name, operator.index(count))

    @property
    def scale_up_effective_gb_per_s(self) -> float:
        """Scale-up bandwidth that is reached [GB/s]."""
        return self.scale_up_gb_per_s * self.scale_up_efficiency

    @property
    def nic_effective_gb_per_s(self) -> float:
        """Network bandwidth that is reached [GB/s]."""
        return self.nic_gb_per_s * self.nic_efficiency

    @property
    def hbm_effective_tb_per_s(self) -> float:
        """Memory bandwidth that is reached [TB/s]."""
        return self.hbm_tb_per_s * self.hbm_efficiency

    def replace(self, **changes: Any) -> Accelerator:
        """Copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def digest(self) -> str:
        """Sha256 of the content, in hex."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def load_accelerator(name: str | Path) -> Accelerator:
    """Load an accelerator by name or alias, or from a TOML file with the fields of :class:`Accelerator`.

    Raises
    ------
    UnknownNameError
        If there is no such accelerator; near names are suggested.
    InputError
        If a file cannot be used; the message names the file and the key.

    Examples
    --------
    >>> load_accelerator("H100").hbm_gb
    80.0
    """
    entry = _resolve(name)
    fields = presets.read_fields(entry, Accelerator)
    try:
        return Accelerator(**fields)
    except ProblemError as error:
        raise ProblemError(error.what, rule=error.rule, hint=error.hint, where=entry.at()) from error


def list_accelerators() -> tuple[str, ...]:
    """List the names of the accelerators that are known."""
    return tuple(presets.packaged(_FILE))


def accelerator_provenance(name: str | Path) -> Mapping[str, str]:
    """Tell where each number of an accelerator comes from: field → source."""
    return _resolve(name).sources


def _resolve(name: str | Path) -> presets.Entry:
    if presets.is_path(name):
        return presets.user_file(Path(name))
    return presets.find("accelerator", str(name), presets.packaged(_FILE))
