"""Weights in others' layouts, bit for bit as the reference implementation of each decodes them."""

import pytest
import torch
from support import published

import nf4kernels as nf4
from nf4kernels.storage.published import ggml_blocks, mxfp4, nvfp4
from nf4kernels.storage.published.layouts import layout_of

N, K = 24, 512
DTYPES = (torch.float32, torch.bfloat16)


def packed(layout, weight):
    """(the weight that we read, the tensors of the layout by their endings, what it decodes to)."""
    tensors, decoded = published.WRITERS[layout]("x.weight", weight)
    parts = {name.removeprefix("x"): tensor for name, tensor in tensors.items()}
    read = layout_of(published.CONFIGS[layout]).read
    return read({k: v for k, v in parts.items() if k != ".input_scale"}, weight.dtype), parts, decoded


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_experts_are_those_of_transformers(dtype):
    integration = pytest.importorskip("transformers.integrations.mxfp4", reason="transformers is not installed")
    tensors, _ = published.gpt_oss("x", torch.empty(3, K, N))
    blocks, scales = tensors["x_blocks"], tensors["x_scales"]
    scales[0, 0, :3] = torch.tensor([0, 1, 254], dtype=torch.uint8)  # a subnormal, and the largest
    experts = mxfp4.experts_from_blocks(blocks, scales, dtype)
    expected = integration.convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    ours = torch.stack([nf4.dequantize(expert, dtype) for expert in experts])
    assert torch.equal(ours.mT, expected)
    assert experts.nbytes - 4 * (16 + 3 * 256) == 3 * N * K * 17 // 32  # 4.25 bits a weight


def test_mxfp4_goes_back_byte_for_byte():
    tensors, _ = published.gpt_oss("x", torch.empty(2, K, N))
    experts = mxfp4.experts_from_blocks(tensors["x_blocks"], tensors["x_scales"], torch.bfloat16)
    blocks, scales = mxfp4.blocks_from_experts(experts)
    assert torch.equal(blocks, tensors["x_blocks"])
    assert torch.equal(scales, tensors["x_scales"])


@pytest.mark.parametrize("layout", [layout for layout in published.WRITERS if layout != "gpt_oss"])
def test_every_layout_decodes_as_its_specification_says(layout):
    weight, _, decoded = packed(layout, torch.randn(N, K).bfloat16())
    assert torch.equal(nf4.dequantize(weight, torch.bfloat16), decoded)


@pytest.mark.parametrize(("group", "blocks"), [(None, K), (96, 32), (64, 64), (16, 16)])
def test_a_group_is_cut_into_blocks(group, blocks):
    columns = 3 * K if group == 96 else K
    tensors, decoded = published.compressed_int4("x.weight", torch.randn(N, columns).bfloat16(), group)
    parts = {name.removeprefix("x"): tensor for name, tensor in tensors.items()}
    weight = layout_of(published.CONFIGS["compressed_int4"]).read(parts, torch.bfloat16)
    assert weight.block_size == blocks
    assert torch.equal(nf4.dequantize(weight, torch.bfloat16), decoded)


def test_act_order_is_kept_with_the_weight():
    weight, parts, _ = packed("gptq_act_order", torch.randn(N, K).half())
    order = weight.column_order.long()
    assert not torch.equal(order, torch.arange(K))
    assert torch.equal(parts[".g_idx"].long()[order], torch.arange(K) // 32)
    assert packed("gptq", torch.randn(N, K).half())[0].column_order is None


def test_an_nvfp4_scale_is_in_its_own_bytes():
    weight, parts, _ = packed("modelopt", torch.randn(N, K).bfloat16())
    assert torch.equal(weight.absmax, parts[".weight_scale"].view(torch.uint8))
    assert (weight.scales, weight.block_size, weight.codebook) == ("codes", 16, "nvfp4")
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(weight.scale_code[:127], e4m3 * parts[".weight_scale_2"])
    assert torch.equal(nvfp4.scale_table(torch.tensor([3.0]), True)[:127], e4m3 / torch.full_like(e4m3, 3))


def test_ggml_blocks_are_those_of_gguf():
    quants = pytest.importorskip("gguf.quants", reason="gguf is not installed")
    from gguf import GGMLQuantizationType as Kind
    from support.gguf_files import iq4_nl

    dense = torch.randn(N, K).numpy()
    for kind, rows in (("Q4_0", quants.quantize(dense, Kind.Q4_0)), ("IQ4_NL", iq4_nl(dense))):
        weight = ggml_blocks.weight_from_rows(torch.from_numpy(rows), kind.lower(), torch.float32)
        expected = torch.from_numpy(quants.dequantize(rows, Kind[kind]))
        assert torch.equal(nf4.dequantize(weight, torch.float32), expected)
        assert torch.equal(ggml_blocks.numbers_from_rows(torch.from_numpy(rows), kind), expected)
    random = torch.randint(0, 256, (N, 2 * 210), dtype=torch.uint8)
    random.view(N, 2, 210)[..., 208:] = torch.randn(N, 2, 1).half().view(torch.uint8)
    for kind, rows in (("Q8_0", torch.from_numpy(quants.quantize(dense, Kind.Q8_0))), ("Q6_K", random)):
        expected = torch.from_numpy(quants.dequantize(rows.numpy(), Kind[kind]))
        assert torch.equal(ggml_blocks.numbers_from_rows(rows, kind), expected)


@pytest.mark.parametrize("layout", ["compressed_nvfp4", "compressed_mxfp4", "compressed_int4"])
def test_compressed_tensors_own_decompressor_agrees(layout):
    """Its compressor writes the tensors, from weights, and its decompressor says what they are."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = published.CONFIGS[layout]
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    _, parts, _ = packed(layout, torch.randn(N, K).bfloat16())
    state = {name.removeprefix("."): tensor for name, tensor in parts.items()}
    decompressed = compressor.decompress(state, scheme)
    again = compressor.compress(decompressed, scheme)
    parts |= {f".{name}": again[name] for name in ("weight_packed", "weight_global_scale") if name in again}
    weight = layout_of(config).read(parts, torch.bfloat16)
    assert torch.equal(nf4.dequantize(weight, torch.bfloat16), decompressed["weight"])
