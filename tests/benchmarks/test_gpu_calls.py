"""The table of kernel launches and allocations, pinned: one more of either is a decision, not an accident."""

import torch
from support import cases, cuda_backend

from benchmarks.gpu import calls

# (M, LoRA) -> launches and allocations of the forward, of the backward; 4096 x 4096 in bf16 on an H200, no bias.
EXPECTED = {
    (1, False): ((1, 1), (1, 2)),
    (1, True): ((2, 2), (4, 5)),
    (16, False): ((1, 2), (1, 2)),
    (16, True): ((2, 3), (4, 5)),
    (64, False): ((1, 2), (1, 2)),
    (64, True): ((2, 3), (4, 5)),
    (2048, False): ((4, 2), (4, 2)),
    (2048, True): ((7, 3), (9, 7)),
}
BIAS = {(2048, False): 2}  # more launches in the forward: the bias is written to each of two slices of out


def test_launches_and_allocations(executor_ops):
    executor_ops.pretend(90, 132)
    table = calls.table(executor_ops.executor, cuda_backend.NAMESPACE, 4096, 4096)
    found = {
        (M, lora): tuple((count.launches, count.allocations) for count in counts)
        for (M, lora, bias), counts in table.items()
        if not bias
    }
    assert found == EXPECTED
    for (M, lora, bias), (forward, backward) in table.items():
        without = table[M, lora, False]
        more = BIAS.get((M, lora), 0) if bias else 0
        assert forward.launches == without[0].launches + more
        assert (forward.allocations, backward.launches) == (without[0].allocations, without[1].launches)


def test_what_is_only_counted_does_not_run(executor_ops):
    """And after it launches run again."""
    executor, qweight = executor_ops.executor, cases.quantized(4, 64)
    arguments = (*qweight.op_args(), 0, 4, 0, 64, torch.bfloat16)
    with executor.planning():
        assert executor_ops.ops.dequantize(*arguments).isnan().all()  # what an allocation is filled with in tests
    assert executor_ops.ops.dequantize(*arguments).isfinite().all()
    assert [launch.count for launch in executor.launches()] == [2]
