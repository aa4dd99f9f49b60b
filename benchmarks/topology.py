"""The peak of a GPU's NVLinks, from NVML: what a bus bandwidth is compared with.

peak = sum of the rates of the GPU's active NVLinks that lead to a switch or to another GPU of the job, one way,
in GB/s of 10^9 bytes; fraction = bus bandwidth / peak of the rank that has least.

Sources: NVML's field values NVML_FI_DEV_NVLINK_GET_SPEED (per link) and NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON, both
"NVLink Speed in MBps" in ``nvml.h``, read through nvidia-ml-py (module ``pynvml``). It is the rate of the wire, as
``nvidia-smi nvlink --status`` shows it: 26.562 GB/s on an H100, whose data sheet counts 25 for each of 18 links.
Where the switches do the sums (NVLink SHARP), each byte crosses a link less often than the 2 (n - 1) / n of the
definition, and an all-reduce can exceed a fraction of 1.
"""

from __future__ import annotations

import importlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from argonne.parallel import ProcessGroups
from argonne.parallel.communication.collectives import gather_objects

SWITCH = "switch"
"""The far end of a link that leads to an NVSwitch."""

# The members of NVML's value union, in the order of its NVML_VALUE_TYPE_* numbers (nvml.h).
_VALUE_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")


@dataclass(frozen=True)
class Link:
    """An active NVLink."""

    gb_per_s: float
    """One way."""
    far_end: str | None
    """The PCI bus id of a GPU, ``SWITCH``, or None where NVML does not tell."""


@dataclass(frozen=True)
class Gpu:
    """A rank's GPU and its active NVLinks."""

    host: str
    bus_id: str
    links: tuple[Link, ...]


def nvlink_peak(groups: ProcessGroups) -> dict[str, Any] | str:
    """The one-way NVLink peak of the rank that has least, as a JSON record; or why it was not measured."""
    return peak(gather_objects(this_gpu(groups.device), groups.tensor))


def peak(gpus: Sequence[Gpu | str]) -> dict[str, Any] | str:
    """``nvlink_peak`` of what every rank found: its GPU, or a reason why not."""
    found = [gpu for gpu in gpus if isinstance(gpu, Gpu)]
    if len(found) < len(gpus):
        return f"not measured: {next(gpu for gpu in gpus if isinstance(gpu, str))}"
    if len({gpu.host for gpu in found}) > 1:
        return "not measured: the ranks are on several hosts"
    # A link whose far end NVML does not name (in some virtual machines) is taken to lead to the others.
    reached = {SWITCH, None, *(gpu.bus_id for gpu in found)}
    useful = [[link.gb_per_s for link in gpu.links if link.far_end in reached] for gpu in found]
    least = min(useful, key=sum)
    if not least:
        return "not measured: no active NVLink between the ranks' GPUs"
    return {"peak_gb_per_s": sum(least), "links": len(least), "source": "NVML, one way, of the rank that has least"}


def this_gpu(device: torch.device) -> Gpu | str:
    """``device`` as NVML describes it, or in words why it does not."""
    if device.type != "cuda":
        return "NVLink joins GPUs; these ranks run on CPUs"
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return "nvidia-ml-py (module pynvml) is not installed"
    try:
        nvml.nvmlInit()
    except Exception as error:  # pynvml raises a class of its own for every fault: no library, no driver, ...
        return f"NVML: {error}"
    try:
        return read_gpu(nvml, f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception as error:  # a driver that does not know a call must not end a benchmark
        return f"NVML: {error}"
    finally:
        nvml.nvmlShutdown()


def read_gpu(nvml: Any, uuid: str) -> Gpu | str:
    """The GPU called ``uuid`` and its active links, through the module ``pynvml``."""
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    links = []
    for number in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            active = nvml.nvmlDeviceGetNvLinkState(handle, number)
        except nvml.NVMLError:
            continue  # this GPU has no link of that number
        if not active:
            continue
        speed = _speed(nvml, handle, number)
        if speed is None:
            return f"NVML does not tell the speed of NVLink {number}"
        links.append(Link(speed, _far_end(nvml, handle, number)))
    return Gpu(socket.gethostname(), _text(nvml.nvmlDeviceGetPciInfo(handle).busId), tuple(links))


def _speed(nvml: Any, handle: Any, number: int) -> float | None:
    """GB/s one way: of this link where the driver knows, or else the one speed of all active links."""
    for name, field_scope in (
        ("NVML_FI_DEV_NVLINK_GET_SPEED", number),
        ("NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON", 0),
    ):
        field = getattr(nvml, name, None)
        if field is None:
            continue
        try:
            (value,) = nvml.nvmlDeviceGetFieldValues(handle, [(field, field_scope)])
        except nvml.NVMLError:
            continue
        if value.nvmlReturn == nvml.NVML_SUCCESS:
            megabytes = getattr(value.value, _VALUE_MEMBERS[value.valueType])
            if megabytes > 0:
                return megabytes / 1e3
    return None


def _far_end(nvml: Any, handle: Any, number: int) -> str | None:
    try:
        if nvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, number) == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
            return SWITCH
        return _text(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, number).busId)
    except (nvml.NVMLError, AttributeError):
        return None


def _text(value: bytes | str) -> str:
    return (value.decode() if isinstance(value, bytes) else value).upper()
