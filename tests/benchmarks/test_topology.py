"""NVLink's peak from NVML, with a module in the place of ``pynvml`` that plays a driver."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.bandwidth_report import against_peak
from benchmarks.topology import SWITCH, Gpu, Link, peak, read_gpu, this_gpu

GET_SPEED, COMMON_SPEED = 164, 90  # nvml.h
UNSIGNED_INT = 1
HOPPER_LINK = 26_562  # MB/s, as nvidia-smi nvlink --status shows it


class NVMLError(Exception):
    pass


class FakeDriver:
    """One GPU: ``speeds`` of its links in MB/s, 0 for one that is down; ``ends`` None where it does not tell."""

    NVMLError = NVMLError
    NVML_SUCCESS = 0
    NVML_NVLINK_MAX_LINKS = 18
    NVML_NVLINK_DEVICE_TYPE_SWITCH = 2
    NVML_FI_DEV_NVLINK_GET_SPEED = GET_SPEED
    NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON = COMMON_SPEED

    def __init__(self, speeds: list[int], ends: list[str | None], known: tuple[int, ...] = (GET_SPEED,)) -> None:
        self.speeds, self.ends, self.known = speeds, ends, known

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if not uuid.startswith("GPU-"):
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetNvLinkState(self, handle: str, link: int) -> int:
        if link >= len(self.speeds):
            raise NVMLError("Invalid Argument")
        return int(self.speeds[link] > 0)

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[tuple[int, int]]) -> list[Any]:
        ((field, link),) = fields
        if field not in self.known:
            return [SimpleNamespace(nvmlReturn=3, valueType=UNSIGNED_INT, value=SimpleNamespace(uiVal=0))]
        value = SimpleNamespace(uiVal=self.speeds[link])
        return [SimpleNamespace(nvmlReturn=0, valueType=UNSIGNED_INT, value=value)]

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: str, link: int) -> int:
        if self.ends[link] is None:
            raise NVMLError("Not Supported")
        return 2 if self.ends[link] == SWITCH else 0

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: str, link: int) -> Any:
        return SimpleNamespace(busId=str(self.ends[link]).encode())

    def nvmlDeviceGetPciInfo(self, handle: str) -> Any:
        return SimpleNamespace(busId=b"00000000:1b:00.0")


def gpu(bus_id: str, *links: Link, host: str = "a") -> Gpu:
    return Gpu(host, bus_id, links)


def test_peak_is_the_sum_of_the_active_links_to_switches() -> None:
    found = read_gpu(FakeDriver([HOPPER_LINK] * 17 + [0], [SWITCH] * 18), "GPU-1")
    assert isinstance(found, Gpu)
    assert found.links == (Link(26.562, SWITCH),) * 17
    told = peak([found, replace(found, bus_id="other")])
    assert isinstance(told, dict)
    assert told["peak_gb_per_s"] == pytest.approx(17 * 26.562)
    assert told["links"] == 17


def test_links_to_gpus_outside_the_job_do_not_count() -> None:
    first = gpu("A", Link(25.0, "B"), Link(25.0, "C"), Link(25.0, "B"))
    told = peak([first, gpu("B", Link(25.0, "A"), Link(25.0, "A"), Link(25.0, "C"))])
    assert isinstance(told, dict)
    assert (told["peak_gb_per_s"], told["links"]) == (50.0, 2)


def test_the_rank_with_least_decides() -> None:
    told = peak([gpu("A", Link(25.0, SWITCH), Link(25.0, SWITCH)), gpu("B", Link(25.0, SWITCH))])
    assert isinstance(told, dict)
    assert told["peak_gb_per_s"] == 25.0


def test_far_ends_that_the_driver_does_not_name_are_taken_to_be_peers() -> None:
    found = read_gpu(FakeDriver([25_000, 25_000], [None, None]), "GPU-1")
    assert isinstance(found, Gpu)
    told = peak([found, found])
    assert isinstance(told, dict)
    assert told["peak_gb_per_s"] == 50.0


def test_bus_ids_compare_whatever_their_case() -> None:
    found = read_gpu(FakeDriver([25_000], ["00000000:1b:00.0"]), "GPU-1")
    assert isinstance(found, Gpu)
    assert found.links[0].far_end == found.bus_id == "00000000:1B:00.0"


def test_the_common_speed_serves_where_a_link_has_none_of_its_own() -> None:
    found = read_gpu(FakeDriver([25_000, 25_000], [SWITCH, SWITCH], known=(COMMON_SPEED,)), "GPU-1")
    assert isinstance(found, Gpu)
    assert [link.gb_per_s for link in found.links] == [25.0, 25.0]


def test_what_is_not_known_is_not_measured() -> None:
    speechless = read_gpu(FakeDriver([25_000], [SWITCH], known=()), "GPU-1")
    assert speechless == "NVML does not tell the speed of NVLink 0"
    assert peak([gpu("A"), speechless]) == f"not measured: {speechless}"
    assert peak([gpu("A"), gpu("B")]) == "not measured: no active NVLink between the ranks' GPUs"
    both = [gpu("A", Link(25.0, SWITCH)), gpu("B", Link(25.0, SWITCH), host="b")]
    assert peak(both) == "not measured: the ranks are on several hosts"


def test_a_missing_module_or_driver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert this_gpu(device) == "nvidia-ml-py (module pynvml) is not installed"

    def no_driver() -> None:
        raise NVMLError("NVML Shared Library Not Found")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=no_driver))
    assert this_gpu(device) == "NVML: NVML Shared Library Not Found"


def test_fraction_is_bus_bandwidth_over_peak() -> None:
    record = {"busbw_gb_per_s": 360.0}
    assert against_peak(record, {"peak_gb_per_s": 450.0})["of_nvlink"] == 0.8
    assert against_peak(record, "not measured: no driver")["of_nvlink"] is None
