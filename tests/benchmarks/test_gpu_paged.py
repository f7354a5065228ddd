"""The checks that `make gpu` makes of the paged optimizer, on stand-ins for a device: what is wrong is told."""

import platform
import shutil

import pytest
from executor.build import CXX
from support import managed

from benchmarks.gpu import paged
from benchmarks.gpu.records import NOTE, OK, WRONG, Records
from nf4kernels.optim import managed_memory

NUMBERS = 1000


@pytest.fixture
def device(monkeypatch):
    if platform.machine() != "x86_64" or shutil.which(CXX) is None:
        pytest.skip(f"tests/executor needs x86-64 and {CXX}")
    found = managed.Device(managed.load())
    found.patch(monkeypatch)
    yield found
    managed_memory.managed_memory.cache_clear()


def is_managed(tensor) -> bool:
    """Of the stand-in, whose scalars are not on the device."""
    return tensor.dim() == 0 or managed_memory.managed_memory(0).holds(tensor.data_ptr())


def test_state_and_bits(device):
    records = Records("paged")
    kinds = [kind for kind in paged.KINDS if kind != "capturable"]  # which torch refuses on a CPU
    for kind in kinds:
        paged.check_kind(kind, "cpu", is_managed, records)
    assert records.counts == {OK: 3 * len(kinds), WRONG: 0, "refused": 0, NOTE: 0}
    paged.check_kind("plain", "cpu", lambda tensor: False, records)
    assert records.wrong == 2, "of the state that was made and of the one that was loaded"


def test_other_bits_are_told(device, monkeypatch, capsys):
    class Other(paged.PagedAdamW):
        def __init__(self, params, **options):
            super().__init__(params, lr=2e-3, **options)

    monkeypatch.setattr(paged, "PagedAdamW", Other)
    paged.check_kind("plain", "cpu", is_managed, Records("paged"))
    assert "WRONG: plain, bits" in capsys.readouterr().out


@pytest.mark.parametrize(("is_there", "wrong"), [((False, True), 0), ((False, False), 1), ((True, True), 1)])
def test_a_spike_is_to_fit_beside_the_paged_state_alone(device, is_there, wrong):
    asked, answers = [], iter(is_there)

    def fits(nbytes, on):
        asked.append(nbytes)
        return next(answers)

    records = Records("paged")
    paged.check_spike("cpu", records, NUMBERS, fits)
    assert records.wrong == wrong
    assert records.counts[OK] == 3 - wrong
    assert asked == [device.free + 6 * NUMBERS] * 2


def test_a_state_without_room_is_to_be_refused(device, capsys):
    records = Records("paged")
    device.free = 8 * NUMBERS
    paged.check_refused("cpu", records, NUMBERS)
    assert records.counts[OK] == 1
    device.free += managed_memory.SEGMENTS
    paged.check_refused("cpu", records, NUMBERS)
    assert "WRONG: a state without room" in capsys.readouterr().out
