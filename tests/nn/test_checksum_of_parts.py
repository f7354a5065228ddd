"""A checksum's sums over parts of the bytes add up to that of all of them, wherever they are cut."""

from itertools import pairwise

import pytest
import torch

from nf4kernels.nn import checksum as checksums


@pytest.mark.parametrize("size", [0, 5, 2048, 5000, 3 * 2048 + 7])
@pytest.mark.parametrize("cuts", [(), (1,), (2048,), (999, 1000, 4096), (4097,), (2048 * 3,)])
def test_parts_add_up(size, cuts):
    generator = torch.Generator().manual_seed(size)
    packed = torch.randint(256, (size,), dtype=torch.uint8, generator=generator)
    places = [0, *(min(cut, size) for cut in cuts), size]
    parts = [checksums.sum_of_part(packed[a:b], a, size) for a, b in pairwise(places)]
    total = torch.stack(parts).sum()
    absmax = torch.zeros(1)  # numbers, which count for nothing
    assert torch.equal(checksums.of_sums(total), checksums.checksum(packed, absmax))
    codes = checksums.sum_of_part(packed, 0, size)
    assert torch.equal(checksums.of_sums(total, codes), checksums.checksum(packed, packed))


def test_a_part_elsewhere_is_another():
    packed = torch.arange(100, dtype=torch.uint8)
    assert checksums.sum_of_part(packed, 0, 5000) != checksums.sum_of_part(packed, 8, 5000)
