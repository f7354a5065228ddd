"""Files of other versions and of parts of a model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny

import nf4kernels as nf4

CONFIG = nf4.LoraConfig(r=4)


def rewritten(path, change):
    """The safetensors file with other keys."""
    save_file(change(load_file(path)), path, {"format": "pt"})
    return path


@pytest.fixture
def model():
    return tiny.quantized_llama()


@pytest.fixture
def file(model, tmp_path):
    nf4.save_checkpoint(model, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def same(a, b):
    with torch.no_grad():
        return torch.equal(a(tiny.IDS).logits, b(tiny.IDS).logits)


# Checkpoints


def test_old_rotary_buffers_are_ignored(model, file):
    """Files of before transformers 4.32 hold them for every layer."""
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    rewritten(file, lambda t: t | extra)
    fresh = tiny.llama()
    nf4.load_checkpoint(fresh, file)
    assert same(fresh, model)


def test_an_unknown_weight_is_still_an_error(model, file):
    """Only what the library itself ignores is ignored."""
    rewritten(file, lambda t: t | {"model.layers.7.extra.weight": torch.ones(8)})
    with pytest.raises(ValueError, match=r"unknown.*model\.layers\.7\.extra\.weight"):
        nf4.load_checkpoint(tiny.llama(), file)


def test_a_file_of_the_whole_model_loads_into_the_bare_one(model, file):
    """Every name has one prefix too many, and the head, which is left out, is named."""
    bare = tiny.make("LlamaModel")
    with pytest.warns(UserWarning, match=r"the model is a part of the file's, not loaded: lm_head\.weight"):
        nf4.load_checkpoint(bare, file)
    assert torch.equal(bare(tiny.IDS).last_hidden_state, model.model(tiny.IDS).last_hidden_state)


def test_a_file_of_the_bare_model_loads_into_the_whole_one(model, tmp_path):
    """And back; the head is not in it, so it is named (a warning), as transformers does."""
    nf4.save_checkpoint(model.model, tmp_path / "bare.safetensors")
    whole = tiny.llama()
    with pytest.warns(UserWarning, match=r"a part of the model, left as they were: lm_head\.weight"):
        nf4.load_checkpoint(whole, tmp_path / "bare.safetensors")
    assert torch.equal(whole.model(tiny.IDS).last_hidden_state, model.model(tiny.IDS).last_hidden_state)


def test_a_whole_model_inside_a_larger_one_s_file(model, file):
    """A language model out of a vision-language model's file: one prefix, and what is beside it is not needed."""
    rewritten(file, lambda t: {f"language_model.{k}": v for k, v in t.items()} | {"tower.weight": torch.ones(3)})
    fresh = tiny.llama()
    with pytest.warns(UserWarning, match=r"not loaded: tower\.weight"):
        nf4.load_checkpoint(fresh, file)
    assert same(fresh, model)


def test_two_parts_that_fit_are_an_error(file):
    """No guess: the message has the names as they are."""
    rewritten(file, lambda t: {f"{part}.{k}": v.clone() for part in ("a", "b") for k, v in t.items()})
    with pytest.raises(ValueError, match=r"must have a Linear or QuantLinear as a\.model\.layers"):
        nf4.load_checkpoint(tiny.llama(), file)


def test_a_part_of_a_file_that_lacks_a_tensor_is_an_error(file):
    rewritten(file, lambda t: {f"a.{k}": v for k, v in t.items() if k != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"must have a Linear or QuantLinear as a\.model\.layers"):
        nf4.load_checkpoint(tiny.llama(), file)


def test_embed_out_is_the_head(tmp_path):
    """GPT-NeoX: old files say embed_out, the module says lm_head (and the other way round)."""
    model = tiny.make("GPTNeoXForCausalLM")
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    other = {"lm_head": "embed_out", "embed_out": "lm_head"}[head]
    nf4.quantize_model(model, progress=False)
    nf4.save_checkpoint(model, tmp_path / "a.safetensors")
    rewritten(tmp_path / "a.safetensors", lambda t: {k.replace(f"{head}.", f"{other}."): v for k, v in t.items()})
    fresh = tiny.make("GPTNeoXForCausalLM")
    nf4.load_checkpoint(fresh, tmp_path / "a.safetensors")
    assert same(fresh, model)


# Adapters


@pytest.fixture
def adapter(tmp_path):
    torch.manual_seed(3)
    model = tiny.fill_adapters(tiny.quantized_llama(lora=CONFIG))
    nf4.prepare_for_training(model)
    nf4.save_adapters(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


def configure(directory, **fields):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


HARMLESS = {
    "an unknown field, false": {"use_new_thing": False},
    "an unknown field, none": {"new_config": None},
    "an unknown field, empty": {"new_list": []},
    "an unknown field, zero": {"new_rate": 0},
    "an unknown field at a usual default": {"new_mode": "auto"},
    "an unknown number at one": {"new_scale": 1.0},
    "an old field": {"enable_lora": None, "merge_weights": False},
    "a version": {"peft_version": "99.0.0"},
    "layer replication off": {"layer_replication": None},
    "trainable tokens off": {"trainable_token_indices": None},
    "a target parameter list that is empty": {"target_parameters": []},
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.filterwarnings("ignore")
def test_a_config_of_another_version_loads(adapter, name):
    """PEFT adds fields with every version."""
    model, directory = adapter
    configure(directory, **HARMLESS[name])
    fresh = tiny.quantized_llama()
    nf4.load_adapters(fresh, directory)
    assert same(fresh, model)


def test_an_unknown_field_warns_by_name(adapter):
    """It may matter: say so, once."""
    _, directory = adapter
    configure(directory, new_mode="auto")
    with pytest.warns(UserWarning, match="new_mode"):
        nf4.load_adapters(tiny.quantized_llama(), directory)


@pytest.mark.parametrize(
    "field", [{"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"peft_type": "IA3"}], ids=str
)
def test_what_changes_the_result_is_still_refused(adapter, field):
    """A switch that is on."""
    _, directory = adapter
    configure(directory, **field)
    with pytest.raises(ValueError, match=next(iter(field))):
        nf4.load_adapters(tiny.quantized_llama(), directory)


def test_a_bin_file_loads(adapter):
    """Adapters of before safetensors: adapter_model.bin, read with weights_only=True."""
    model, directory = adapter
    torch.save(load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()
    fresh = tiny.quantized_llama()
    nf4.load_adapters(fresh, directory)
    assert same(fresh, model)


class Bad:
    def __reduce__(self):
        return (print, ("run",))


def test_a_bin_file_runs_no_code(adapter, capsys):
    """And nothing but tensors is read from it."""
    _, directory = adapter
    (directory / "adapter_model.safetensors").unlink()
    torch.save({"a": Bad()}, directory / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin"):
        nf4.load_adapters(tiny.quantized_llama(), directory)
    assert "run" not in capsys.readouterr().out


def test_alpha_zero_loads(adapter):
    """An adapter switched off."""
    _, directory = adapter
    configure(directory, lora_alpha=0)
    fresh = tiny.quantized_llama()
    nf4.load_adapters(fresh, directory)
    assert same(fresh, tiny.quantized_llama())


@pytest.mark.parametrize("prefix", ["language_model.", "model.", "module.", "base_model.model."])
def test_a_wrappers_prefix_is_seen_through(adapter, prefix):
    """An adapter trained inside a vision-language model, or a wrapper, on the language model alone."""
    model, directory = adapter
    inner = "base_model.model."
    rewritten(directory / "adapter_model.safetensors",
              lambda t: {k.replace(inner, inner + prefix, 1): v for k, v in t.items()})  # fmt: skip
    fresh = tiny.quantized_llama()
    nf4.load_adapters(fresh, directory)
    assert same(fresh, model)


def test_the_bare_models_adapter_loads_into_the_whole_one(adapter):
    """And the other way: names without the prefix that the model has."""
    model, directory = adapter
    rewritten(directory / "adapter_model.safetensors",
              lambda t: {k.replace("model.model.model.", "model.model.", 1): v for k, v in t.items()})  # fmt: skip
    fresh = tiny.quantized_llama()
    nf4.load_adapters(fresh, directory)
    assert same(fresh, model)


def test_keys_with_the_adapters_name_load(adapter):
    """torch.save(model.state_dict()) of a PeftModel: lora_A.default.weight."""
    model, directory = adapter
    rewritten(directory / "adapter_model.safetensors",
              lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()})  # fmt: skip
    fresh = tiny.quantized_llama()
    nf4.load_adapters(fresh, directory)
    assert same(fresh, model)


def test_an_ambiguous_prefix_is_an_error(adapter):
    """Where no one prefix makes all names fit, the layer is named."""
    _, directory = adapter
    rewritten(directory / "adapter_model.safetensors",
              lambda t: {k.replace("layers.0", "layers.9"): v for k, v in t.items()})  # fmt: skip
    with pytest.raises(ValueError, match=r"layers\.9"):
        nf4.load_adapters(tiny.quantized_llama(), directory)
