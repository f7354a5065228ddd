"""merge_adapter against PEFT's own merge of the loaded model, and what it does with tied, renamed and other layers."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.llama_directory import all_tensors, tiny_llama, tree
from support.paths import python_path
from support.peft_adapter import merged_by_peft, peft, save_adapter, transformers

import nf4kernels as nf4
from nf4kernels.cli.meta_model import meta_model
from nf4kernels.storage.convert import convert_directory
from nf4kernels.storage.directory_checks import ConversionError
from nf4kernels.storage.merge_adapter import Recipe, merge_adapter
from nf4kernels.storage.shards import parse_size

EVERY = {"target_modules": "all-linear"}
SETTINGS = {
    "plain": {},
    "every layer": EVERY,
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}},
    "modules to save": {"modules_to_save": ["lm_head", "norm"]},
    "embeddings saved": {"modules_to_save": ["embed_tokens"]},
}


@pytest.fixture
def base(tmp_path):
    tiny_llama(tmp_path / "base", "60KB")
    return tmp_path / "base"


def merge(adapter, base, out, **options):
    options = {"model_of": meta_model, "progress": False} | options
    return merge_adapter(adapter, base, out, **options)


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("model_of", [meta_model, None], ids=["with the model", "without"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_is_what_peft_makes_of_the_dense_model(settings, model_of, base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", **SETTINGS[settings])
    done = merge(adapter, base, tmp_path / "out", model_of=model_of)
    assert done.layers == len({n for n in load_file(adapter / "adapter_model.safetensors") if "lora_A" in n})
    expected = merged_by_peft(base, adapter).state_dict()
    assert_same_tensors(all_tensors(tmp_path / "out"), expected)
    changed = [n for n, t in all_tensors(base).items() if not torch.equal(t, expected[n])]
    assert len(changed) == done.layers + len(done.replaced)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_of_another_dtype(dtype, tmp_path):
    tiny_llama(tmp_path / "base", dtype=dtype)
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter", **EVERY)
    merge(adapter, tmp_path / "base", tmp_path / "out")
    assert_same_tensors(all_tensors(tmp_path / "out"), merged_by_peft(tmp_path / "base", adapter).state_dict())


def test_an_old_adapter_in_bin(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", safe=False)
    merge(adapter, base, tmp_path / "out")
    assert_same_tensors(all_tensors(tmp_path / "out"), merged_by_peft(base, adapter).state_dict())


def test_the_directory_loads_and_carries_the_rest_over(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter")
    save_adapter(base, base / "adapter")  # left behind, and what would be a configuration without tensors
    (base / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.warns(match="these stay where they are: .*base, .*adapter"):
        merge(adapter, base, tmp_path / "out", max_shard_size=60_000)
    (base / "adapter_config.json").unlink()  # which transformers would follow
    assert [name for name in tree(tmp_path / "out") if not name.startswith("model")] == [
        "config.json", "generation_config.json", "templates", "templates/chat.jinja", "tokenizer.json",
    ]  # fmt: skip
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    for file in shards:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 60_000
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_tensors(loaded.state_dict(), merged_by_peft(base, adapter).state_dict())


@pytest.mark.parametrize("into", ["base", "dequantized", "4bit"])
@pytest.mark.parametrize("where", ["file", "config", None])
def test_the_tokenizer_is_the_adapters(where, into, base, tmp_path):
    """With its chat template, which base's would hide, wherever the adapter has it."""
    adapter = save_adapter(base, tmp_path / "adapter")
    (base / "chat_template.jinja").write_text("base", encoding="utf-8")
    (base / "merges.txt").write_text("base", encoding="utf-8")
    brought = {"tokenizer.json": "adapter", "tokenizer_config.json": "{}"}
    if where == "file":
        brought["chat_template.jinja"] = "adapter"
    elif where == "config":
        brought["tokenizer_config.json"] = json.dumps({"chat_template": "adapter"})
    for name, text in {**brought, "README.md": "of the run"}.items():
        (adapter / name).write_text(text, encoding="utf-8")
    done = merge(adapter, base, tmp_path / "out", into=into)
    assert sorted(done.tokenizer) == sorted(brought)
    copied = {"merges.txt": "base", **({} if where == "config" else {"chat_template.jinja": "base"}), **brought}
    found = {file.name: file for file in (tmp_path / "out").iterdir()}
    assert {name: found[name].read_text(encoding="utf-8") for name in copied} == copied
    assert "README.md" not in found
    assert ("chat_template.jinja" in found) == (where != "config")


@pytest.mark.parametrize("from_dense", [True, False])
def test_into_dequantized(from_dense, base, tmp_path):
    """Ŵ in fp32 plus the product, rounded once, of a base that was in 4 bits and of one that is quantized for it."""
    adapter = save_adapter(base, tmp_path / "adapter")
    convert_directory(base, tmp_path / "quantized", "fp4", 128, model_of=meta_model, progress=False)
    if from_dense:
        options = {"recipe": Recipe("fp4", 128)}
        merge(adapter, base, tmp_path / "out", into="dequantized", **options)
    else:
        merge(adapter, tmp_path / "quantized", tmp_path / "out", into="dequantized")
    stored = load_file(adapter / "adapter_model.safetensors")
    expected = all_tensors(base)
    for name in expected:
        if not name.endswith("_proj.weight"):
            continue
        what = nf4.dequantize(nf4.quantize(expected[name], "fp4", 128), torch.float32)
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in stored:
            what = what + (stored[f"{key}.lora_B.weight"] @ stored[f"{key}.lora_A.weight"]) * 2
        expected[name] = what.to(torch.bfloat16)
    assert_same_tensors(all_tensors(tmp_path / "out"), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config == json.loads((base / "config.json").read_text(encoding="utf-8"))
    assert not any(path.is_dir() and path.name != "templates" for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("from_dense", [True, False])
def test_into_4_bits(from_dense, base, tmp_path):
    """The directory is what `quantize` makes of the merged one, and the measured errors are those of its layers."""
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    convert_directory(base, tmp_path / "before", block_size=32, model_of=meta_model, progress=False)
    asked = []
    options = {"recipe": Recipe(block_size=32)} if from_dense else {}
    source = base if from_dense else tmp_path / "before"
    done = merge(adapter, source, tmp_path / "out", into="4bit", confirm=lambda s: asked.append(s) or True, **options)
    merge(adapter, source, tmp_path / "dense", into="base" if from_dense else "dequantized")
    convert_directory(tmp_path / "dense", tmp_path / "expected", block_size=32, model_of=meta_model, progress=False)
    assert_same_tensors(all_tensors(tmp_path / "out"), all_tensors(tmp_path / "expected"))
    assert asked == [done.survival]
    assert done.survival.unmeasured == ["lm_head"]
    before, after = (all_tensors(tmp_path / name) for name in ("before", "out"))
    stored = load_file(adapter / "adapter_model.safetensors")
    layers = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    lost = total = 0
    for layer in layers:
        A, B = (stored[f"base_model.model.{layer}.lora_{factor}.weight"] for factor in "AB")
        delta = B @ A * 2
        w, w_new = (
            nf4.dequantize(nf4.weight_from_tensors(t, f"{layer}.weight"), torch.float32) for t in (before, after)
        )
        error = (w_new - w - delta).norm() / delta.norm()
        assert done.survival.layers[layer] == pytest.approx(error.item(), rel=1e-5)
        lost, total = lost + (error * delta.norm()) ** 2, total + delta.norm() ** 2
    assert done.survival.error == pytest.approx((lost / total).sqrt().item(), rel=1e-5)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "expected"))


def test_no_to_4_bits_writes_nothing(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter")
    with pytest.raises(ConversionError, match="not merged, nothing was written"):
        merge(adapter, base, tmp_path / "out", into="4bit", confirm=lambda survival: False)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_tied_embeddings_part_where_one_is_changed(settings, tmp_path):
    base = tmp_path / "base"
    tiny_llama(base, tie_word_embeddings=True)
    assert "lm_head.weight" not in all_tensors(base)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    done = merge(adapter, base, tmp_path / "out")
    assert done.untied == ["lm_head.weight"]
    x = torch.arange(12).reshape(2, 6)
    unmerged = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    unmerged = peft.PeftModel.from_pretrained(unmerged, adapter).eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        expected, found = unmerged(x).logits, merged(x).logits
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()(x).logits
    assert (found - expected).norm() < 0.02 * (plain - expected).norm()


def test_gpt2_whose_weights_are_transposed(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["c_attn", "c_proj"],
                           fan_in_fan_out=True)  # fmt: skip
    expected = merged_by_peft(tmp_path / "base", adapter).state_dict()
    for number, model_of in enumerate((meta_model, None)):  # of a square weight the shape does not tell
        merge(adapter, tmp_path / "base", tmp_path / f"out{number}", model_of=model_of)
        found = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / f"out{number}").state_dict()
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name  # B @ A is summed in another order


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def set_config(adapter, **changes):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


WEIGHTS = "adapter_model.safetensors"
BAD = {
    "no adapter": (lambda a, b: (a / WEIGHTS).unlink(), "ADAPTER must be a directory of PEFT's with adapter_model"),
    "no config": (lambda a, b: (a / "adapter_config.json").unlink(), "with adapter_config.json"),
    "cut adapter": (lambda a, b: cut(a / WEIGHTS), "adapter_model.safetensors must be a whole safetensors file"),
    "cut base": (lambda a, b: cut(sorted(b.glob("*.safetensors"))[2]), "must be a whole safetensors file"),
    "missing shard": (lambda a, b: sorted(b.glob("*.safetensors"))[2].unlink(), "must name files that exist"),
    "no base config": (lambda a, b: (b / "config.json").unlink(), "must be a Hugging Face model directory"),
    "dora": (lambda a, b: set_config(a, use_dora=True), "use_dora in .* must be unset, it is not supported"),
    "pissa": (lambda a, b: set_config(a, init_lora_weights="pissa"), "must leave the base weight as it is"),
    "experts": (
        lambda a, b: set_config(a, target_parameters=["experts.up"]),
        "weights of the model's experts .* got 'experts.up'",
    ),
    "nan": (
        lambda a, b: edit(a / WEIGHTS, lambda tensors: next(iter(tensors.values())).fill_(float("nan"))),
        r"the merged model\.layers\.\d\..*weight must be finite, got nan",
    ),
    "embedding": (
        lambda a, b: edit(
            a / WEIGHTS,
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 96)}),
        ),
        "of linear layers and experts alone, got model.embed_tokens.lora_embedding_A",
    ),
    "quantized by others": (
        lambda a, b: (b / "config.json").write_text(
            '{"quantization_config": {"quant_method": "gptq"}}', encoding="utf-8"
        ),
        "must be dense or in 4 bits of nf4kernels or bitsandbytes, got one quantized by gptq",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_damaged_or_not_supported_ends_in_a_sentence(case, base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter")
    damage, message = BAD[case]
    damage(adapter, base)
    before = tree(tmp_path)
    with pytest.raises(ConversionError, match=message):
        merge(adapter, base, tmp_path / "out")
    assert tree(tmp_path) == before


def test_an_adapter_of_another_model(base, tmp_path):
    tiny_llama(tmp_path / "wide", intermediate_size=192)
    tiny_llama(tmp_path / "deep", num_hidden_layers=3)
    for name, message in (("wide", r"down_proj.weight must have shape \[64, 128\] as in .*is \[64, 192\]"),
                          ("deep", r"must have the tensor model.layers.2.* got none")):  # fmt: skip
        adapter = save_adapter(tmp_path / name, tmp_path / f"adapter of {name}")
        before = tree(tmp_path)
        with pytest.raises(ConversionError, match=message):
            merge(adapter, base, tmp_path / "out")
        assert tree(tmp_path) == before


def test_a_base_in_4_bits_is_no_base(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter")
    convert_directory(base, tmp_path / "quantized", model_of=meta_model, progress=False)
    with pytest.raises(ConversionError, match="must be the 16-bit model that was quantized, got a 4-bit one"):
        merge(adapter, tmp_path / "quantized", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_output_stays_as_it_is(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConversionError, match="out_dir must not exist"):
        merge(adapter, base, tmp_path / "out")
    for inside in (base / "out", adapter / "out"):
        with pytest.raises(ConversionError, match="out_dir must be outside"):
            merge(adapter, base, inside)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("700", 700)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "5 apples"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="must be a size such as 5GB"):
        parse_size(text)


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from nf4kernels.storage.merge_adapter import merge_adapter
merge_adapter(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), progress=False)  # warms all up

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

before = peak = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.0005)
watcher = threading.Thread(target=watch)
watcher.start()
merge_adapter(sys.argv[1], sys.argv[2], sys.argv[3] + "2", sys.argv[4], int(sys.argv[5]), progress=False)
done.set()
watcher.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("into", ["base", "dequantized"])
def test_memory_is_a_shard_and_a_few_copies_of_one_tensor(into, tmp_path):
    """The model is far larger than what the process takes beside its adapter."""
    base, shard = tmp_path / "base", 4 << 20  # bytes of an output file
    tiny_llama(base, "4MB", num_hidden_layers=20, hidden_size=512, intermediate_size=1024)
    adapter = save_adapter(base, tmp_path / "adapter", **EVERY)
    tensor = 512 * 1024 * 4  # the largest matrix in fp32
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (adapter, base, tmp_path / "out")), into, str(shard)],
        env=os.environ | python_path() | malloc, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    peak = float(result.stdout)
    with safe_open(adapter / WEIGHTS, "pt") as opened:
        own = sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    model = sum(t.nbytes for t in all_tensors(base).values())
    bound = (shard + 4 * tensor + own) / 2**20 + 3
    assert model / 2**20 > 2.5 * bound
    assert shard / 2**20 / 2 < peak < bound
