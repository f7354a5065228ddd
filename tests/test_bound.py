"""The bound of docs/design.md, section 7, bites: what the tests of products hold every kernel to."""

import pytest
import torch
from support import cases
from support.cases import DTYPES, Layout, dtype_id
from support.numerics import assert_product_within_bound, assert_unbiased, row_bounds

SCALING = 1.75


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_bound_bites(dtype):
    """One wrong nibble, one wrong scale, one dropped term, a 16-bit accumulator, or one NaN: each is over the bound."""
    N, K, M = 48, 320, 5
    w = cases.dense(cases.quantized(N, K))
    x = cases.activations(M, K, dtype)
    good = (x.double() @ w.double().T).to(dtype)
    assert_product_within_bound(good, x, w.T, "exact")

    def refused(actual):
        with pytest.raises(AssertionError, match=r"wrong, x \[5, 320\].*row \d has error"):
            assert_product_within_bound(actual, x, w.T, "wrong")

    wrong = w.clone()
    wrong[7, :64] *= 1.5
    refused((x.double() @ wrong.double().T).to(dtype))
    wrong = w.clone()
    wrong[:, 319] = 0
    refused((x.double() @ wrong.double().T).to(dtype))
    rolled = good.clone()
    rolled[3] = good[3].roll(1)
    refused(rolled)
    poisoned = good.clone()
    poisoned[4, 47] = torch.nan
    refused(poisoned)
    big, wide = cases.activations(64, K, dtype), cases.dense(cases.quantized(512, K))
    off_by_an_eps = big.double() @ wide.double().T * (1 + torch.finfo(dtype).eps)
    with pytest.raises(AssertionError, match="slope 1"):
        assert_unbiased(off_by_an_eps, big, wide.T, "wrong")
    if dtype != torch.float32:
        running = torch.zeros(M, N, dtype=dtype)
        for k in range(K):
            running += x[:, k : k + 1] * w[:, k].to(dtype)
        refused(running)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_the_bound_bites_on_a_codebook_rounded_to_nearest(dtype):
    """The bias of NF4's levels rounded to 16 bits shows once x has a mean, which is why the bound is checked there."""
    qweight = cases.quantized(64, 4096, Layout(scale_codebook=None))
    rounded = cases.dense(cases.with_tensors(qweight, code=qweight.code.to(dtype).float()))
    for mean, passes in ((0.0, True), (1.0, False)):
        x = cases.activations(16, 4096, dtype, mean)
        actual = (x.double() @ rounded.double().T).to(dtype)
        if passes:
            assert_product_within_bound(actual, x, cases.dense(qweight).T, "rounded levels")
        else:
            with pytest.raises(AssertionError, match="rows over: 16 of 16"):
                assert_product_within_bound(actual, x, cases.dense(qweight).T, "rounded levels")


def test_the_bound_bites_on_lora():
    """One rank left out, the scaling left out, or two columns swapped: each is over the bound."""
    qweight = cases.quantized(48, 320)
    a, small = cases.activations(5, 320, torch.bfloat16), cases.activations(5, 16, torch.bfloat16, seed=3)
    factor = cases.activations(16, 48, torch.bfloat16, seed=4)
    both = torch.cat([a, small], 1), torch.cat([cases.dense(qweight).T, SCALING * factor.float()], 0)
    good, _ = row_bounds(*both)
    assert_product_within_bound(good.bfloat16(), *both, "exact")
    wrong = {
        "rank": good - SCALING * small[:, 15:].double() @ factor[15:].double(),
        "scaling": good - (SCALING - 1) * small.double() @ factor.double(),
        "swapped": good[:, [1, 0, *range(2, 48)]],
    }
    for name, values in wrong.items():
        with pytest.raises(AssertionError, match="has error"):
            assert_product_within_bound(values.bfloat16(), *both, name)
