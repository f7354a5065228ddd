"""The CUDA kernels of one weight under AddressSanitizer: every test of them on the host executor."""

import pytest
from support.asan_run import run_under_asan

STEMS = ("quantize", "dequantize", "linear", "linear_dgrad", "lora_grad", "ops")


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
def test_no_kernel_reads_or_writes_outside_of_its_tensors(executor, stem):
    run_under_asan(stem)
