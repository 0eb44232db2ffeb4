import os
import time

import pytest
import torch

from qat.cli.meter import Meter


def test_time_passes_and_work_is_told_from_waiting():
    meter = Meter(torch.device("cpu"))
    time.sleep(0.1)
    waited = meter.read()
    start = time.process_time()
    while time.process_time() - start < 0.1:
        pass
    worked = meter.read()
    assert waited.keys() == {"seconds", "cpu_seconds", "peak_mem_mb"}
    assert waited["seconds"] >= 0.1
    assert waited["cpu_seconds"] < 0.09
    assert worked["cpu_seconds"] - waited["cpu_seconds"] >= 0.09
    assert worked["seconds"] >= worked["cpu_seconds"]


def test_a_peak_is_seen_after_the_memory_is_free_again():
    meter = Meter(torch.device("cpu"))
    before = meter.read()["peak_mem_mb"]
    big = torch.ones(64 * 2**20)  # 256 MiB
    del big
    assert meter.read()["peak_mem_mb"] >= before + 200


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux resets the mark")
def test_a_meter_starts_from_the_memory_of_now():
    big = torch.ones(64 * 2**20)
    high = Meter(torch.device("cpu")).read()["peak_mem_mb"]
    del big
    assert Meter(torch.device("cpu")).read()["peak_mem_mb"] <= high - 200
