"""from_pretrained with an Nf4Config: what becomes of a dense checkpoint while it is read."""

import os
import subprocess
import sys

import pytest
import torch
from support import tiny
from support.directories import dense_directory, load, logits, same_state, transformers
from support.paths import python_path
from transformers.quantizers.base import HfQuantizer

import nf4kernels as nf4
from nf4kernels.integrations.transformers import Nf4Config


@pytest.mark.parametrize("family", ["Llama", "tied", "Mixtral", "Qwen3-MoE", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_loads_what_quantize_model_makes(tmp_path, family, dtype):
    directory = dense_directory(tmp_path, family)
    expected = load(directory, dtype=dtype)
    report = nf4.quantize_model(expected, progress=False)
    model = load(directory, dtype=dtype, quantization_config=Nf4Config())
    assert report.layers
    assert same_state(model, expected)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("codebook", ["mxfp4", "int4_symmetric"])
def test_experts_in_a_published_format(tmp_path, codebook):
    """Of which int4_symmetric leaves the block size open, so that the configuration has none."""
    directory = dense_directory(tmp_path / "dense", "Mixtral")
    expected = load(directory)
    nf4.quantize_model(expected, codebook=codebook, block_size=None, progress=False)
    model = load(directory, quantization_config=Nf4Config(codebook=codebook))
    assert any(isinstance(module, nf4.QuantExperts) for module in model.modules())
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(expected))


@pytest.mark.parametrize(
    "options",
    [
        {"codebook": "fp4", "block_size": 128, "scale_codebook": "dynamic8"},
        {"codebook": [i / 15 * 2 - 1 for i in range(16)], "double_quant": False},
        {"codebook": "af4", "block_size": 32, "compute_dtype": torch.float32},
    ],
)
def test_options_reach_the_layers(tmp_path, options):
    directory = dense_directory(tmp_path)
    expected = load(directory)
    levels = options["codebook"]
    options = options | {"codebook": levels if isinstance(levels, str) else torch.tensor(levels)}
    nf4.quantize_model(expected, progress=False, skip=["v_proj", "layers.1.mlp"], **options)
    model = load(directory, quantization_config=Nf4Config(skip=["v_proj", "layers.1.mlp"], **options))
    assert same_state(model, expected)
    assert {layer.compute_dtype for layer in tiny.layers(model).values()} == {options.get("compute_dtype")}
    assert torch.equal(logits(model), logits(expected))


def test_experts_under_a_conversion_of_their_own(tmp_path):
    """transformers transposes these where a file has them so, by the shape of the dense tensor that is to come."""
    text = tiny.SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64}
    vision = {"depth": 1, "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0], **sizes}
    model_class = transformers.Qwen3VLMoeForConditionalGeneration
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model_class(config).to(torch.bfloat16).save_pretrained(tmp_path)
    expected = model_class.from_pretrained(tmp_path)
    nf4.quantize_model(expected, progress=False)
    model = model_class.from_pretrained(tmp_path, quantization_config=Nf4Config())
    assert isinstance(model.model.language_model.layers[0].mlp.experts, nf4.QuantExperts)
    assert same_state(model, expected)
    model.save_pretrained(tmp_path / "saved")
    if hasattr(HfQuantizer, "update_weight_conversions"):
        assert same_state(model_class.from_pretrained(tmp_path / "saved"), model)
    else:
        with pytest.raises(ValueError, match="must be one that can leave out the conversion of mlp"):
            model_class.from_pretrained(tmp_path / "saved")


def test_conv1d_is_transposed_once(tmp_path):
    directory = dense_directory(tmp_path, "GPT-2")
    dense, model = load(directory), load(directory, quantization_config=Nf4Config())
    names = [name for name, module in dense.named_modules() if type(module).__name__ == "Conv1D"]
    assert list(tiny.layers(model)) == names
    for name, layer in tiny.layers(model).items():
        conv = dense.get_submodule(name)
        assert (layer.out_features, layer.in_features) == (conv.nf, conv.nx)
        assert torch.equal(layer.qweight.packed, nf4.quantize(conv.weight.t().contiguous()).packed)
        assert torch.equal(layer.bias, conv.bias)
    skipped = load(directory, quantization_config=Nf4Config(skip=["c_fc"]))
    assert list(tiny.layers(skipped)) == [name for name in names if not name.endswith("c_fc")]


def test_what_a_class_keeps_in_fp32_stays_dense(tmp_path):
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    tiny.make("T5ForConditionalGeneration", **sizes).save_pretrained(tmp_path)
    read = transformers.T5ForConditionalGeneration.from_pretrained
    model = read(tmp_path, dtype=torch.float16, quantization_config=Nf4Config())
    expected = read(tmp_path, dtype=torch.float16)
    nf4.quantize_model(expected, progress=False)
    assert same_state(model, expected)
    outputs = [module.wo for module in model.modules() if hasattr(module, "wo")]
    assert {(type(layer), layer.weight.dtype) for layer in outputs} == {(torch.nn.Linear, torch.float32)}
    model.save_pretrained(tmp_path / "saved")
    assert same_state(read(tmp_path / "saved"), model)


def test_the_first_use_needs_nothing_recorded_anew(tmp_path):
    model = load(dense_directory(tmp_path), quantization_config=Nf4Config())
    for layer in tiny.layers(model).values():
        recorded = layer.checksum.clone()
        layer.record_bytes()
        assert torch.equal(layer.checksum, recorded)
        assert recorded.any()
        assert layer.dense_dtype == torch.bfloat16
        assert not layer.weight.requires_grad


def test_dense_experts_are_reported(tmp_path, caplog):
    load(dense_directory(tmp_path, "gpt-oss"), quantization_config=Nf4Config(block_size=128))
    (record,) = [r for r in caplog.records if r.name.startswith("nf4kernels") and r.levelname == "WARNING"]
    assert "experts stay dense" in record.message
    assert "model.layers.0.mlp.experts.gate_up_proj" in record.message
    assert "GptOssExperts, where gate_up_proj" in record.message
    assert "have rows that are no multiple of 128" in record.message


def test_a_layer_that_the_checkpoint_lacks_stays_dense(tmp_path):
    directory = dense_directory(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, quantization_config=Nf4Config(), num_labels=3
    )
    assert type(model.score) is torch.nn.Linear
    assert model.score.weight.isfinite().all()
    assert len(tiny.layers(model)) == 14


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps_change_nothing(tmp_path, device_map):
    pytest.importorskip("accelerate", reason="accelerate is not installed: there are no device maps")
    directory = dense_directory(tmp_path, "Mixtral")
    expected = load(directory, quantization_config=Nf4Config())
    model = load(directory, quantization_config=Nf4Config(), device_map=device_map)
    assert same_state(model, expected)


def test_device_maps_are_made_for_4_bit_sizes(tmp_path):
    """Of two limits the 4-bit model fits under one, though the dense one would not; what does not fit goes to disk."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: there are no device maps")
    directory = dense_directory(tmp_path, hidden_size=256, intermediate_size=512, vocab_size=32)
    dense = load(directory).get_memory_footprint()
    options = {"quantization_config": Nf4Config(), "device_map": "auto"}
    model = load(directory, max_memory={"cpu": int(0.6 * dense)}, **options)
    assert model.get_memory_footprint() < 0.4 * dense
    with pytest.raises(ValueError, match="device_map must not offload to disk while a dense checkpoint is quantized"):
        load(directory, max_memory={"cpu": int(0.2 * dense)}, **options)


MEASURE = """
import sys, threading, time
import torch, transformers
from nf4kernels.integrations.transformers import Nf4Config

def resident():  # of this process, without the pages of files
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) for line in status if line.startswith('RssAnon')) / 1024

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, resident())
        time.sleep(0.0005)

for directory in sys.argv[1:]:
    before, peak, done = resident(), 0.0, threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, quantization_config=Nf4Config())
    done.set()
    watcher.join()
    after = resident()
    print(peak - after, after - before, model.get_memory_footprint() / 2**20, model.num_parameters() * 2 / 2**20)
    del model
"""


def test_one_dense_tensor_at_a_time(tmp_path):
    """Beside the 4-bit model there is at most the largest dense matrix, of experts one; the models are far larger.

    The checkpoint is in fp32 and loaded as bf16, so that each dense tensor is a copy in memory, not pages of the file.
    """
    sizes = {"vocab_size": 32, "num_hidden_layers": 3, "dtype": torch.float32}
    dense_directory(tmp_path / "Llama", hidden_size=1024, intermediate_size=2048, **sizes)
    experts = {"hidden_size": 512, "intermediate_size": 512, "num_local_experts": 8}
    dense_directory(tmp_path / "Mixtral", "Mixtral", **experts, **sizes)
    # MiB in bf16: a matrix; the gate and the up of one expert, and the two as one, or of all where transformers merges
    merged_at_once = 1 if hasattr(HfQuantizer, "update_weight_conversions") else 8
    beside = {"Llama": 2 * 1024 * 2048 / 2**20, "Mixtral": merged_at_once * 2 * 2 * (2 * 512 * 512) / 2**20}
    # Every block of memory goes back to the system when it is freed.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in beside)],
        env=os.environ | python_path() | malloc, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    for largest, line in zip(beside.values(), result.stdout.splitlines(), strict=True):
        extra, grown, model, dense = map(float, line.split())
        assert dense - model > 1.5 * largest
        assert grown > 0.8 * model  # what is measured is the model's memory
        assert extra < largest + 3  # Python and torch allocate something meanwhile
