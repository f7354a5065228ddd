"""One weight on disk: the same bits as bitsandbytes both ways, and damaged metadata refused by name."""

import json
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import cases
from support.stored_weights import assert_same_weight, quantized
from support.unchanged import assert_unchanged, snapshot
from torch import nn

import nf4kernels as nf4
from nf4kernels.codebook import CODEBOOKS, default_block_size
from nf4kernels.published_formats import WRITERS

SCALES = ("e4m3", "dynamic8", None)


def state_of(tensors, bnb):
    """bitsandbytes' QuantState of what is stored as "weight"."""
    parts = {name.removeprefix("weight."): tensor.clone() for name, tensor in tensors.items() if name != "weight"}
    return bnb.functional.QuantState.from_dict(parts, device="cpu")


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no checkpoint is compared to it")


@hypothesis.given(
    st.integers(0, 40), st.integers(0, 200), st.sampled_from(["nf4", "fp4", "int4", "af4", "custom", *WRITERS]),
    st.sampled_from(SCALES),
    st.sampled_from(cases.BLOCK_SIZES[:4]), st.sampled_from(cases.DTYPES),
)  # fmt: skip
@hypothesis.settings(max_examples=60)
def test_every_weight_reads_back(N, K, codebook, scale, block_size, dtype):
    weight = torch.randn(N, K).to(dtype)
    block_size = default_block_size(codebook) if codebook in WRITERS else block_size
    qweight = quantized(weight, cases.CUSTOM_CODE if codebook == "custom" else codebook, scale, block_size)
    tensors = nf4.weight_to_tensors(qweight, "a.weight")
    assert_same_weight(nf4.weight_from_tensors(tensors, "a.weight"), qweight)


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.dtype_id)
def test_bitsandbytes_decodes_ours(bnb, codebook, scale, block_size, dtype):
    # 300 * 1024 / 64 blocks are 18.75 superblocks.
    qweight = quantized(torch.randn(300, 1024).to(dtype), codebook, scale, block_size)
    tensors = nf4.weight_to_tensors(qweight, bitsandbytes=True)
    state = state_of(tensors, bnb)
    assert state.dtype == dtype
    assert torch.equal(bnb.functional.dequantize_4bit(tensors["weight"], state), nf4.dequantize(qweight, dtype))


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_size", [64, 256])
def test_we_decode_theirs(bnb, codebook, nested, storage, block_size):
    weight = torch.randn(300, 1024)
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=nested, quant_type=codebook, quant_storage=storage
    )
    expected = bnb.functional.dequantize_4bit(packed, state)
    tensors = {"weight": packed} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    qweight = nf4.weight_from_tensors(tensors)
    assert torch.equal(nf4.dequantize(qweight, torch.float32), expected)
    assert (qweight.codebook, qweight.block_size) == (codebook, block_size)
    assert qweight.scale_codebook == ("dynamic8" if nested else None)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.dtype_id)
def test_names_shapes_and_json_bytes_are_theirs(bnb, nested, dtype):
    weight = torch.randn(32, 64).to(dtype)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    theirs = {"weight": packed} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    rewritten = nf4.weight_to_tensors(nf4.weight_from_tensors(theirs))
    assert rewritten.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert rewritten[name].dtype == tensor.dtype, name
        assert rewritten[name].shape == tensor.shape, name
        assert torch.equal(rewritten[name], tensor), name


def test_json_bytes_of_our_own_quantization():
    qweight = quantized(torch.randn(32, 64), scale="dynamic8")
    stored = nf4.weight_to_tensors(qweight)["weight.quant_state.bitsandbytes__nf4"]
    assert bytes(stored.numpy()).decode() == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [32, 64], "nested_blocksize": 256, '
        f'"nested_dtype": "float32", "nested_offset": {qweight.scale_offset.item()!r}}}'
    )


@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_layer_state_loads(bnb, nested, tmp_path):
    layer = bnb.nn.Linear4bit(128, 96, compress_statistics=nested, quant_type="nf4").to("cpu")
    save_file({f"fc.{name}": tensor for name, tensor in layer.state_dict().items()}, tmp_path / "a.safetensors")
    model = nn.ModuleDict({"fc": nn.Linear(128, 96)})
    nf4.load_checkpoint(model, tmp_path / "a.safetensors")
    expected = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    assert torch.equal(model["fc"].dequantize(torch.float32), expected)
    assert torch.equal(model["fc"].bias, layer.bias)


@pytest.mark.parametrize("codebook", ["int4", "af4", "custom"])
def test_other_codebooks_have_their_own_key(codebook):
    qweight = quantized(torch.randn(8, 64), cases.CUSTOM_CODE if codebook == "custom" else codebook)
    assert f"weight.quant_state.nf4kernels__{codebook}" in nf4.weight_to_tensors(qweight)
    with pytest.raises(ValueError, match=rf"codebook must be 'nf4' or 'fp4' in bitsandbytes' format, got '{codebook}'"):
        nf4.weight_to_tensors(qweight, bitsandbytes=True)


# Each entry: what is done to the tensors, and what the message must name.
STATE = "weight.quant_state.bitsandbytes__nf4"


def with_metadata(**changes):
    def damage(tensors):
        metadata = json.loads(bytes(tensors[STATE].numpy()))
        metadata = {name: value for name, value in {**metadata, **changes}.items() if value != "REMOVED"}
        tensors[STATE] = torch.tensor(list(json.dumps(metadata).encode()), dtype=torch.uint8)

    return damage


def replaced(name, change):
    def damage(tensors):
        tensors[name] = change(tensors[name])

    return damage


DAMAGE = {
    "no metadata": (lambda t: t.pop(STATE), "weight.quant_state"),
    "metadata twice": (lambda t: t.update({STATE + "x": t[STATE].clone()}), "weight.quant_state"),
    "no packed": (lambda t: t.pop("weight"), "must have weight"),
    "no absmax": (lambda t: t.pop("weight.absmax"), "weight.absmax"),
    "no map": (lambda t: t.pop("weight.quant_map"), "weight.quant_map"),
    "no nested absmax": (lambda t: t.pop("weight.nested_absmax"), "weight.nested_absmax"),
    "no nested map": (lambda t: t.pop("weight.nested_quant_map"), "weight.nested_quant_map"),
    "packed cut": (replaced("weight", lambda t: t[:-1]), "weight must have 1024 elements, got 1023"),
    "absmax cut": (replaced("weight.absmax", lambda t: t[:-1]), "weight.absmax must have 32 elements"),
    "absmax dtype": (replaced("weight.absmax", lambda t: t.float()), "absmax must be torch.uint8"),
    "map cut": (replaced("weight.quant_map", lambda t: t[:8]), "weight.quant_map must hold 16 levels"),
    "map of another": (replaced("weight.quant_map", lambda t: CODEBOOKS["af4"]), "must be the nf4 codebook"),
    "nested cut": (replaced("weight.nested_quant_map", lambda t: t[:100]), "scale_code must have shape"),
    "nested absmax": (replaced("weight.nested_absmax", lambda t: t.half()), "scale_absmax must be torch.float32"),
    "json cut": (replaced(STATE, lambda t: t[:-5]), f"{STATE} must hold a quant_state"),
    "json bytes": (replaced(STATE, lambda t: t | 0x80), f"{STATE} must hold a quant_state"),
    "json a list": (replaced(STATE, lambda t: torch.tensor([91, 93], dtype=torch.uint8)), f"{STATE} must hold"),
    "shape 1-D": (with_metadata(shape=[2048]), rf"shape in {STATE} must be \[N, K\]"),
    "shape text": (with_metadata(shape=["a", "b"]), rf"shape in {STATE}"),
    "shape gone": (with_metadata(shape="REMOVED"), f"{STATE} must hold a quant_state"),
    "shape other": (with_metadata(shape=[32, 128]), "weight must have 2048 elements, got 1024"),
    "dtype": (with_metadata(dtype="int8"), f"dtype in {STATE} must be float32"),
    "block size": (with_metadata(blocksize=63), "block_size must be one of"),
    "block size text": (with_metadata(blocksize="64"), f"blocksize in {STATE} must be an integer"),
    "quant type": (with_metadata(quant_type="fp4"), f"quant_type in {STATE}"),
    "offset": (with_metadata(nested_offset=math.nan), "nested_offset in .* must be finite"),
    "offset text": (with_metadata(nested_offset="0.1"), "nested_offset in .* must be finite"),
    "nested size": (with_metadata(nested_blocksize=128), "nested_blocksize and nested_dtype"),
    "nested dtype": (with_metadata(nested_dtype="float16"), "nested_blocksize and nested_dtype"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_weights_are_refused(case, tmp_path):
    damage, message = DAMAGE[case]
    tensors = nf4.weight_to_tensors(quantized(torch.randn(32, 64)))
    damage(tensors)
    with pytest.raises((TypeError, ValueError), match=message):
        nf4.weight_from_tensors(tensors)
    model = nn.ModuleDict({"fc": nn.Linear(64, 32, bias=False)})
    before = snapshot(model)
    save_file({f"fc.{name}": tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"nf4kernels\.load_checkpoint"):
        nf4.load_checkpoint(model, tmp_path / "a.safetensors")
    assert_unchanged(model, before)


def test_bitsandbytes_has_no_blocks_of_16():
    qweight = nf4.quantize(torch.randn(8, 64), block_size=16)
    with pytest.raises(ValueError, match="block_size must be 32 to 4096 in bitsandbytes' format, got 16"):
        nf4.weight_to_tensors(qweight, bitsandbytes=True)
    again = nf4.weight_from_tensors(nf4.weight_to_tensors(qweight))
    assert torch.equal(nf4.dequantize(again), nf4.dequantize(qweight))
