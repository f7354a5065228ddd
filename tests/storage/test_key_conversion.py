"""Directories whose tensors have other names or shapes than the model's modules: quantized, loaded, named."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import tiny

import nf4kernels as nf4
from nf4kernels.cli import main
from nf4kernels.storage.key_conversion import group_tensors
from nf4kernels.storage.matrices import Header, matrices_of, units_of

TEXT = {k: v for k, v in tiny.SIZES.items() if k != "tie_word_embeddings"}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
          "image_size": 16, "patch_size": 8}  # fmt: skip


def vision_language(name):
    library = tiny.transformers()
    if name == "Llava":
        config = library.LlavaConfig(
            text_config=library.LlamaConfig(**TEXT),
            vision_config=library.CLIPVisionConfig(**VISION),
            image_token_id=5,
            tie_word_embeddings=False,
        )
        return library.LlavaForConditionalGeneration(config)
    if name == "PaliGemma":
        config = library.PaliGemmaConfig(
            text_config={"model_type": "gemma", **TEXT, "head_dim": 16},
            vision_config={"model_type": "siglip_vision_model", **VISION},
            projection_dim=64,
            image_token_id=5,
        )
        return library.PaliGemmaForConditionalGeneration(config)
    if name == "Idefics3":
        config = library.Idefics3Config(
            text_config={"model_type": "llama", **TEXT}, vision_config=VISION, image_token_id=5, scale_factor=1
        )
        return library.Idefics3ForConditionalGeneration(config)
    if name == "Qwen2VL":
        config = library.Qwen2VLConfig(
            text_config={**TEXT, "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]}},
            vision_config={"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 8},
            tie_word_embeddings=False,
            image_token_id=5,
            video_token_id=6,
            vision_start_token_id=7,
            vision_end_token_id=8,
        )
        return library.Qwen2VLForConditionalGeneration(config)
    if name == "Gemma3":
        config = library.Gemma3Config(
            text_config={**TEXT, "head_dim": 16},
            vision_config={"model_type": "siglip_vision_model", **VISION},
            mm_tokens_per_image=4,
            image_token_index=5,
            image_token_id=5,
        )
        return library.Gemma3ForConditionalGeneration(config)
    config = library.AyaVisionConfig(
        text_config={"model_type": "cohere2", **TEXT, "head_dim": 16},
        vision_config={"model_type": "siglip_vision_model", **VISION},
        image_token_index=5,
    )
    return library.AyaVisionForConditionalGeneration(config)  # fmt: skip


EXPERTS = {
    "Mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3Moe": ("Qwen3MoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                                          "head_dim": 16}),
    "Olmoe": ("OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip


def experts_model(name="Mixtral"):
    class_name, changes = EXPERTS[name]
    return tiny.make(class_name, dtype=torch.bfloat16, **changes)


def saved(model, directory, **options):
    model.to(torch.bfloat16).eval().save_pretrained(directory, **options)
    return directory


def stored(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def fresh(model):
    torch.manual_seed(1)
    return type(model)(model.config).to(torch.bfloat16).eval()


def quantize(tmp_path, *flags):
    return main(["quantize", str(tmp_path / "in"), str(tmp_path / "out"), *flags])


@pytest.mark.parametrize("name", ["Llava", "PaliGemma", "Idefics3", "Qwen2VL", "Gemma3", "AyaVision"])
def test_a_vision_language_model_goes_there_and_back(tmp_path, name):
    """Its file says language_model.model, its module model.language_model: the file's names are kept."""
    model = vision_language(name)
    before = stored(saved(model, tmp_path / "in"))
    assert quantize(tmp_path, "--skip", "lm_head") == 0  # tied or not
    expected = fresh(model)
    expected.load_state_dict(model.state_dict())
    wanted = {layer.name for layer in nf4.quantize_model(expected, progress=False).layers}
    after = stored(tmp_path / "out")
    in_4_bits = {key.rpartition(".quant_state.")[0] for key in after if ".quant_state." in key}
    assert in_4_bits <= before.keys()
    assert len(in_4_bits) == len(wanted)
    assert {name for name in after if name in before} == before.keys()
    loaded = fresh(model)
    nf4.load_checkpoint(loaded, tmp_path / "out")
    assert set(tiny.layers(loaded)) == wanted
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tiny.IDS + 10).logits, expected(input_ids=tiny.IDS + 10).logits)


def test_transformers_and_bitsandbytes_load_renamed_layers(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    model = vision_language("Llava")
    saved(model, tmp_path / "in")
    assert quantize(tmp_path) == 0
    theirs = type(model).from_pretrained(tmp_path / "out", device_map="cpu")
    ours = fresh(model)
    nf4.load_checkpoint(ours, tmp_path / "out")
    layers = {name: module for name, module in theirs.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert layers.keys() == tiny.layers(ours).keys()
    for name, layer in layers.items():
        decoded = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
        assert torch.equal(ours.get_submodule(name).dequantize(decoded.dtype), decoded), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_of_a_directory_are_in_4_bits(tmp_path, capsys, name, device):
    """A matrix for each expert in the file, two 3-D weights in the module: what quantize_model makes, bit for bit."""
    model = experts_model(name)
    saved(model, tmp_path / "in")
    capsys.readouterr()
    assert quantize(tmp_path) == 0
    assert "bitsandbytes has no format for the experts in 4 bits" in capsys.readouterr().out
    expected = fresh(model)
    expected.load_state_dict(model.state_dict())
    nf4.quantize_model(expected, progress=False)
    with torch.device(device):
        loaded = type(model)(model.config)
    if device == "cpu":
        loaded = fresh(model)
    nf4.load_checkpoint(loaded, tmp_path / "out")
    state = loaded.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert any("experts.gate_up_proj.weight" in key for key in state)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(state[key], tensor), key
    if device == "cpu":
        with torch.no_grad():
            assert torch.equal(loaded(tiny.IDS).logits, expected(tiny.IDS).logits)
            again = nf4.merge_model(loaded)
        assert any(each.endswith("experts") for each in again)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--codebook", "fp4", "--scale-codebook", "dynamic8"], {"codebook": "fp4", "scale_codebook": "dynamic8"}),
        (["--no-double-quant", "--block-size", "32"], {"double_quant": False, "block_size": 32}),
        (["--dtype", "float32"], {}),
    ],
)
def test_experts_keep_their_options(tmp_path, flags, options):
    model = experts_model()
    saved(model, tmp_path / "in")
    assert quantize(tmp_path, *flags) == 0
    loaded = fresh(model)
    nf4.load_checkpoint(loaded, tmp_path / "out")
    experts = loaded.model.layers[1].mlp.experts
    assert isinstance(experts, nf4.QuantExperts)
    expected = nf4.quantize_experts(model.model.layers[1].mlp.experts.down_proj.detach(), **options)
    got = experts.down_proj.qweight
    for name in ("packed", "absmax", "code"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for name in ("block_size", "codebook", "scale_codebook"):
        assert getattr(got, name) == getattr(expected, name)
    assert got.dtype == (torch.float32 if "--dtype" in flags else torch.bfloat16)


def test_experts_across_shards(tmp_path):
    """The experts of a layer lie in several files; the index lists what each file then holds."""
    model = experts_model()
    saved(model, tmp_path / "in", max_shard_size="60KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 4
    assert quantize(tmp_path) == 0
    listed = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert set(opened.keys()) == {name for name, at in listed.items() if at == file.name}
    nf4.quantize_model(model, progress=False)
    loaded = experts_model()
    nf4.load_checkpoint(loaded, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(tiny.IDS).logits, model(tiny.IDS).logits)


def test_transformers_does_not_make_up_experts(tmp_path, monkeypatch):
    """bitsandbytes would find none and transformers would draw them at random: the method is not bitsandbytes'."""
    methods = tiny.transformers().quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    monkeypatch.delitem(methods, "nf4kernels", raising=False)  # as where integrations.transformers was not imported
    saved(experts_model(), tmp_path / "in")
    assert quantize(tmp_path) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "nf4kernels"
    with pytest.raises(RuntimeError, match="mismatch"):
        tiny.transformers().MixtralForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("skip", ["experts", "model.layers.*.mlp.experts", "*.experts.*.w1"])
def test_skipped_experts_stay_in_the_file_as_they_are(tmp_path, capsys, skip):
    model = experts_model()
    before = stored(saved(model, tmp_path / "in"))
    assert quantize(tmp_path, "--skip", skip) == 0
    after = stored(tmp_path / "out")
    for name, tensor in before.items():
        if "experts" in name:
            assert torch.equal(after[name], tensor), name
    loaded = fresh(model)
    nf4.load_checkpoint(loaded, tmp_path / "out")
    weights = model.model.layers[0].mlp.experts.gate_up_proj, loaded.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(*weights)
    assert "stay dense" in capsys.readouterr().out


def test_a_dense_directory_of_experts_loads(tmp_path):
    model = experts_model()
    saved(model, tmp_path / "in")
    loaded = fresh(model)
    nf4.load_checkpoint(loaded, tmp_path / "in")
    with torch.no_grad():
        assert torch.equal(loaded(tiny.IDS).logits, model(tiny.IDS).logits)


def test_experts_that_save_checkpoint_wrote_load_into_a_dense_model(tmp_path):
    model = experts_model()
    nf4.quantize_model(model, progress=False)
    nf4.save_checkpoint(model, tmp_path / "a.safetensors")
    for loaded in (experts_model(), model):
        nf4.load_checkpoint(loaded, tmp_path / "a.safetensors")
        with torch.no_grad():
            assert torch.equal(loaded(tiny.IDS).logits, model(tiny.IDS).logits)


def damaged(tmp_path, change):
    model = experts_model()
    nf4.quantize_model(model, progress=False)
    nf4.save_checkpoint(model, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    return tmp_path / "a.safetensors"


EXPERT = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{EXPERT}.down")], "one of their two weights"),
        (lambda t: t.update({f"{EXPERT}.down_proj.absmax": t[f"{EXPERT}.down_proj.absmax"][:, :, :1].clone()}), EXPERT),
        (lambda t: t[f"{EXPERT}.down_proj.source_dtype"].fill_(9), EXPERT),
        (lambda t: t.update({f"x.{n}": t.pop(n) for n in list(t) if n.startswith(EXPERT)}), "no such module"),
    ],
)
def test_damaged_experts_change_nothing(tmp_path, change, message):
    model = experts_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"nf4kernels.load_checkpoint: ") as error:
        nf4.load_checkpoint(model, damaged(tmp_path, change))
    assert message in str(error.value)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_run_that_leaves_most_bytes_dense_says_so(tmp_path, capsys):
    saved(tiny.llama(vocab_size=4096), tmp_path / "in")
    capsys.readouterr()
    assert quantize(tmp_path) == 0
    *_, note, last = capsys.readouterr().out.strip().splitlines()
    assert note == "note: most of the bytes stay dense, in lm_head, model.embed_tokens"
    after = stored(tmp_path / "out")
    dense = sum(tensor.nbytes for name, tensor in after.items() if "embed" in name or "head" in name or "norm" in name)
    share = 100 * dense / sum(tensor.nbytes for tensor in after.values())
    assert last.endswith(f"{share:.0f} % of it dense")


def test_what_is_not_converted_is_named(tmp_path, capsys):
    saved(tiny.llama(), tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    save_file(load_file(file) | {"odd.part.weight": torch.zeros(64, 64, dtype=torch.bfloat16)}, file, {"format": "pt"})
    assert quantize(tmp_path) == 0
    assert "not a module of LlamaForCausalLM, left as in the file: odd.part\n" in capsys.readouterr().out


def test_4_bit_weights_of_single_experts_are_refused_by_name(tmp_path):
    """As transformers 4 with bitsandbytes wrote them: their scales cannot be merged into the module's."""
    model = experts_model()
    tensors = stored(saved(model, tmp_path / "in"))
    name = next(name for name in tensors if "experts.1.w1" in name)
    tensors.update(nf4.weight_to_tensors(nf4.quantize(tensors.pop(name)), name))
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"experts.1.w1.weight must be dense, since the model has it inside of"):
        nf4.load_checkpoint(fresh(model), tmp_path / "in")


def test_tensors_that_do_not_convert_stay_as_they_are():
    """One expert of another shape, or of one matrix too few: no conversion, and every tensor in a unit of its own."""
    model = experts_model().to("meta")
    names = {
        f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight": (64, 128) if w == "w2" else (128, 64)
        for e in range(4) for w in ("w1", "w2", "w3")
    }  # fmt: skip
    whole = units_of(model, [Header(name, shape, torch.bfloat16) for name, shape in names.items()])
    assert {key: matrix.shape for key, matrix in matrices_of(whole, experts=True).items()} == {
        f"{EXPERT}.gate_up_proj": (4, 256, 64), f"{EXPERT}.down_proj": (4, 64, 128),
    }  # fmt: skip
    odd = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    for headers in (
        [Header(name, (96, 64) if name == odd else shape, torch.bfloat16) for name, shape in names.items()],
        [Header(name, shape, torch.bfloat16) for name, shape in names.items() if name != odd],
    ):
        units = units_of(model, headers)
        kept = [unit for unit in units if unit.group.converter is None]
        assert {unit.headers[0].name for unit in kept} == {h.name for h in headers if ".w2." not in h.name}


def test_a_plain_module_has_no_rules():
    names = ["embed.weight", "blocks.0.0.weight", "other"]
    groups = group_tensors(tiny.Net(), names, tiny.Net().state_dict())
    assert [list(group.sources) for group in groups] == [[name] for name in names]
    assert not any(group.is_renamed for group in groups)


def test_a_matrix_that_is_cut_into_layers(tmp_path):
    """q, k and v are one matrix in the file: cut first, quantized as layers, under the names that both sides load."""
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny.make("NomicBertModel", dtype=torch.bfloat16)
    before = stored(saved(model, tmp_path / "in"))
    assert any("qkv" in name.lower() for name in before)
    assert quantize(tmp_path) == 0
    ours, expected = fresh(model), fresh(model)
    expected.load_state_dict(model.state_dict())
    nf4.quantize_model(expected, progress=False)
    nf4.load_checkpoint(ours, tmp_path / "out")
    assert tiny.layers(ours).keys() == tiny.layers(expected).keys()
    assert any("q_proj" in name for name in tiny.layers(ours))
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    theirs = type(model).from_pretrained(tmp_path / "out", device_map="cpu")
    layers = {name: module for name, module in theirs.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert layers.keys() == tiny.layers(ours).keys()
    for name, layer in layers.items():
        decoded = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
        assert torch.equal(ours.get_submodule(name).dequantize(decoded.dtype), decoded), name
