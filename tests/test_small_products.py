"""LoRA's products with few columns: within the bound on every instruction set, and never by a slow one of torch's."""

import pytest
import torch
from support import cases
from support.cases import DTYPES, dtype_id
from support.numerics import assert_product_within_bound
from torch.utils._python_dispatch import TorchDispatchMode

import nf4kernels as nf4
from nf4kernels import autograd_lora
from nf4kernels.backends import select

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::mv", "aten::linear"}
ISAS = select.CPU_LIBRARY.isas if select.CPU_LIBRARY else []
every_isa = pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "reference"] or ["reference"])


class Recorded(TorchDispatchMode):
    """The (name, dtype) of every matrix product of torch's."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removesuffix(".default")
        if name in PRODUCTS:
            self.products.append((name, args[0].dtype))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def running(isa):
    if isa == "reference":
        pytest.skip("no compiled library for this CPU")
    with select.CPU_LIBRARY.running_isa(isa):
        yield isa


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_within_the_bound(isa, running, dtype):
    for M, D, r in ((1, 100, 8), (5, 72, 16), (40, 300, 17)):
        x = cases.activations(M, D, dtype, 1.0)
        A = cases.activations(r, D, dtype, seed=1)
        B = A.T.contiguous()
        for strided in (x, x.T.contiguous().T, x.view(M, 1, D)):
            P = autograd_lora._lora_inner(strided, A)
            assert_product_within_bound(P, x, A.float().T, f"{isa} {M} {D} {r}")
            if M > 1:  # one row in fp32 is torch's
                assert torch.equal(autograd_lora._lora_inner(strided, A.T.contiguous().T), P)
        assert_product_within_bound(
            autograd_lora._lora_inner(x, B, True), x, B.float(), f"{isa} {M} {D} {r} transposed"
        )
        Q = cases.activations(M, r, dtype, seed=2)
        assert_product_within_bound(autograd_lora._lora_outer(Q, A), Q, A.float(), f"{isa} {M} {D} {r} outer")


@every_isa
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_no_product_of_16_bits_is_torchs_without_bf16_instructions(isa, running, dropout_p):
    """Forward and backward of a layer with an adapter; torch's takes up to 50 times as long there."""
    qweight = cases.quantized(96, 64)
    for dtype in (torch.bfloat16, torch.float16):
        x, A, B = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((12, 64), (8, 64), (96, 8)))
        with Recorded() as recorded:
            nf4.lora_linear(x, qweight, A, B, 2.0, dropout_p=dropout_p).square().sum().backward()
        if isa in ("avx512_bf16", "amx_bf16") and dtype == torch.bfloat16 and dropout_p:
            continue  # the dropped-out term is torch's there
        assert recorded.products == []
