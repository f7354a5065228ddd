"""Checkpoints as others publish them, written here by the layouts' specifications, with the numbers they stand for.

Each writer takes a dense state and gives (tensors of the file, the same state decoded by a decoder of its own that
shares nothing with the package's). Weights of `is_linear` names are in 4 bits.
"""

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def is_linear(name, tensor) -> bool:
    dense = ("embed", "lm_head", "mlp.gate.weight")
    return tensor.dim() == 2 and name.endswith(".weight") and not any(part in name for part in dense)


def is_packed(layout, name, tensor) -> bool:
    return tensor.dim() == 3 if layout == "gpt_oss" else is_linear(name, tensor)


def low_first(codes):
    """uint8 [..., K/2]: the even element in the low nibble."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def words(codes):
    """int32 [N, K/8]: eight codes a word, from the low bits on."""
    shifts = torch.arange(0, 32, 4)
    return (
        (codes.long().unflatten(-1, (-1, 8)) << shifts)
        .sum(-1)
        .to(torch.int64)
        .add(2**31)
        .remainder(2**32)
        .sub(2**31)
        .int()
    )


def modelopt(name, weight):
    codes, scales, whole = _random_nvfp4(weight)
    base = name.removesuffix(".weight")
    decoded = E2M1[codes.long()] * (scales.float() * whole).repeat_interleave(16, 1)
    return {
        name: low_first(codes), f"{base}.weight_scale": scales, f"{base}.weight_scale_2": whole,
        f"{base}.input_scale": torch.tensor(0.5),
    }, decoded.to(weight.dtype)  # fmt: skip


def compressed_nvfp4(name, weight):
    codes, scales, whole = _random_nvfp4(weight)
    base, divisor = name.removesuffix(".weight"), (1 / whole).reshape(1)
    decoded = E2M1[codes.long()] * (scales.float() / divisor).repeat_interleave(16, 1)
    return {
        f"{base}.weight_packed": low_first(codes), f"{base}.weight_scale": scales,
        f"{base}.weight_global_scale": divisor,
    }, decoded.to(weight.dtype)  # fmt: skip


def _random_nvfp4(weight):
    """Codes that are all in use, and scales that make them about weight's size; each weight a whole of its own."""
    N, K = weight.shape
    whole = (torch.rand(()) + 0.5) * weight.float().std() / 1000
    scales = (100 + 300 * torch.rand(N, K // 16)).to(torch.float8_e4m3fn)
    return torch.randint(0, 16, (N, K)), scales, whole


def compressed_mxfp4(name, weight):
    N, K = weight.shape
    codes = torch.randint(0, 16, (N, K))
    scales = torch.randint(119, 123, (N, K // 32), dtype=torch.uint8)
    base = name.removesuffix(".weight")
    decoded = E2M1[codes] * (2.0 ** (scales.float() - 127)).repeat_interleave(32, 1)
    return {f"{base}.weight_packed": low_first(codes), f"{base}.weight_scale": scales}, decoded.to(weight.dtype)


def compressed_int4(name, weight, group=32):
    """group None: a scale a row."""
    N, K = weight.shape
    codes, group = torch.randint(0, 16, (N, K)), group or K
    scales = ((0.5 + torch.rand(N, K // group)) * weight.float().std() / 5).to(weight.dtype)
    base = name.removesuffix(".weight")
    decoded = (codes - 8).to(weight.dtype) * scales.repeat_interleave(group, 1)
    return {
        f"{base}.weight_packed": words(codes), f"{base}.weight_scale": scales,
        f"{base}.weight_shape": torch.tensor([N, K]),
    }, decoded  # fmt: skip


def gptq(name, weight, group=32, act_order=False, version=1):
    N, K = weight.shape
    codes = torch.randint(0, 16, (K, N))
    scales = ((0.5 + torch.rand(K // group, N)) * weight.float().std() / 5).half()
    g_idx = torch.arange(K) // group
    if act_order:
        g_idx = g_idx[torch.randperm(K)]
    zero = 7 if version == 1 else 8
    base = name.removesuffix(".weight")
    decoded = (codes - 8).float() * scales[g_idx].float()
    return {
        f"{base}.qweight": words(codes.T.contiguous()).T.contiguous(), f"{base}.scales": scales,
        f"{base}.qzeros": words(torch.full((K // group, N), zero)), f"{base}.g_idx": g_idx.int(),
    }, decoded.T.contiguous().to(weight.dtype)  # fmt: skip


def gpt_oss(name, weight):
    """Of a dense [E, K, N]: blocks and scales of its transpose."""
    E, K, N = weight.shape
    codes = torch.randint(0, 16, (E, N, K))
    scales = torch.randint(118, 122, (E, N, K // 32), dtype=torch.uint8)
    decoded = E2M1[codes] * (2.0 ** (scales.float() - 127)).repeat_interleave(32, 2)
    return {
        f"{name}_blocks": low_first(codes).view(E, N, K // 32, 16), f"{name}_scales": scales
    }, decoded.mT.contiguous().to(weight.dtype)  # fmt: skip


CONFIGS = {
    "gpt_oss": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
    "compressed_nvfp4": {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}}},
    },
    "compressed_mxfp4": {
        "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}}},
    },
    "compressed_int4": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}}},
    },
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
    "gptq_act_order": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq_v2"},
    "auto_round": {
        "quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True,
        "packing_format": "auto_round:auto_gptq", "data_type": "int",
    },
}  # fmt: skip
WRITERS = {
    "gpt_oss": gpt_oss,
    "modelopt": modelopt,
    "compressed_nvfp4": compressed_nvfp4,
    "compressed_mxfp4": compressed_mxfp4,
    "compressed_int4": compressed_int4,
    "gptq": gptq,
    "gptq_act_order": lambda name, weight: gptq(name, weight, act_order=True),
    "gptq_v2": lambda name, weight: gptq(name, weight, version=2),
    "auto_round": gptq,
}


def publish(directory, dense, layout):
    """Write `dense`, a model of transformers, into `directory` in that layout; a dense one of the same numbers."""
    dense.save_pretrained(directory / "names")  # a checkpoint has a matrix for each expert where the model has not
    with safe_open(directory / "names" / "model.safetensors", "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors, decoded = {}, {}
    for name, tensor in state.items():
        if is_packed(layout, name, tensor):
            parts, decoded[name] = WRITERS[layout](name, tensor)
            tensors |= parts
        else:
            tensors[name] = decoded[name] = tensor
    for where, content in (
        (directory / "model.safetensors", tensors),
        (directory / "names" / "model.safetensors", decoded),
    ):
        save_file({name: tensor.contiguous().clone() for name, tensor in content.items()}, where, {"format": "pt"})
    config = json.loads((directory / "names" / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(
        json.dumps(config | {"quantization_config": CONFIGS[layout]}), encoding="utf-8"
    )
    return type(dense).from_pretrained(directory / "names", dtype=dense.dtype).eval()
