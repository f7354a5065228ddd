"""What is published and not read here: one sentence that says why, and the model as it was."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import published, tiny

import nf4kernels as nf4
from nf4kernels.cli import main
from nf4kernels.storage.published.layouts import layout_of

NF4_INSTEAD = r"quantize the 16-bit model to NF4 instead \(nf4kernels quantize\)"


def group(**weights):
    usual = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {**usual, **weights}}}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
CONFIGS = {
    "awq": ({"quant_method": "awq"}, r"quant_method awq stores zero points \(asymmetric\), .*: " + NF4_INSTEAD),
    "unknown": ({"quant_method": "fp8"}, "quant_method must be one of mxfp4, modelopt, .*, got 'fp8'"),
    "none": ({}, "quant_method must be one of .*, got None"),
    "modelopt-fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_algo .* must be NVFP4 .*, got FP8"),
    "modelopt-awq": ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "quant_algo .*, got NVFP4_AWQ"),
    "modelopt-mixed": (
        {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "FP8"}}},
         "quant_method": "modelopt"}, "quant_algo .*, got FP8",
    ),
    "bits": (group(num_bits=8), "num_bits of group_0 must be 4, got 8"),
    "zero-points": (group(symmetric=False), r"zero points \(asymmetric\), .*: " + NF4_INSTEAD),
    "blocks": (group(strategy="block"), "strategy of group_0 must be of a row or a part of it, got 'block'"),
    "rotated": ({**group(), "transform_config": {"a": 1}}, "transform_config must be empty"),
    "sparse": ({**group(), "sparsity_config": {"format": "sparse-24"}}, "must be dense, got 'sparse-24'"),
    "a list of groups": ({**group(), "config_groups": [1]}, "must have its fields as compressed-tensors writes them"),
    "a list of algorithms": ({"quant_method": "modelopt", "quant_algo": ["NVFP4"]}, "its fields as modelopt writes"),
    "gptq-3": ({**GPTQ, "bits": 3}, "bits must be 4, got 3"),
    "gptq-asymmetric": ({**GPTQ, "sym": False}, r"sym=false stores zero points \(asymmetric\), .*: " + NF4_INSTEAD),
    "gptq-marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format must be gptq or gptq_v2, got marlin"),
    "gptq-group": ({**GPTQ, "group_size": 0}, "group_size must be above 0, or -1 for a row, got 0"),
    "auto-round-awq": (
        {**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
        "packing_format must be .*, got auto_round:auto_awq",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_is_refused_by_one_sentence(case):
    fields, sentence = CONFIGS[case]
    with pytest.raises(ValueError, match=sentence):
        layout_of(fields)


def without(tensors, ending):
    del tensors[next(name for name in tensors if name.endswith(ending))]


def change(tensors, ending, value):
    name = next(name for name in tensors if name.endswith(ending))
    tensors[name] = value(tensors[name])


def with_value(value):
    def changed(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return changed


NAN_E4M3 = torch.tensor(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
# layout, what is done to the tensors, the sentence
DAMAGED = {
    "e8m0-nan": ("compressed_mxfp4", (".weight_scale", with_value(255)), r"must be E8M0 numbers, got NaN \(255\)"),
    "e4m3-nan": ("compressed_nvfp4", (".weight_scale", with_value(NAN_E4M3)), "must be E4M3 numbers, got NaN"),
    "whole-nan": ("modelopt", ("_scale_2", with_value(torch.nan)), "weight_scale_2 must be one number above 0"),
    "whole-0": ("compressed_nvfp4", ("global_scale", with_value(0)), "weight_global_scale must be one number above 0"),
    "fp16-inf": ("gptq", (".scales", with_value(torch.inf)), "the scales must be finite, got NaN or inf"),
    "int4-nan": ("compressed_int4", ("_scale", with_value(torch.nan)), "the scales must be finite, got NaN or inf"),
    "cut": ("compressed_nvfp4", ("_packed", lambda t: t[:, :-8]), r"must be float8_e4m3fn \[\d+, \d+\], got"),
    "cut-rows": ("modelopt", (".weight_scale", lambda t: t[:-1]), r"must be float8_e4m3fn \[\d+, \d+\], got"),
    "other-block": ("compressed_mxfp4", ("_scale", lambda t: t[:, ::2]), r"must be uint8 \[\d+, \d+\], got"),
    "gptq-cut": ("gptq", (".qweight", lambda t: t[:-1]), "must hold 4 bits for each of the .* columns of g_idx"),
    "gptq-zero": ("gptq", (".qzeros", with_value(0)), r"qzeros must be 8 everywhere \(symmetric\), .*"),
    "gptq-version": ("gptq_v2", (".qzeros", with_value(0x77777777)), "qzeros must be 8 everywhere"),
    "gptq-g_idx": ("gptq_act_order", (".g_idx", with_value(0)), "must give each group 32 columns, got other counts"),
    "int4-bits": ("compressed_int4", ("_packed", lambda t: t[:, ::2]), "must hold the .* of weight_shape"),
}  # fmt: skip


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    made = {}

    def directory(layout):
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp(layout)
            published.publish(made[layout], tiny.llama(torch.bfloat16, num_hidden_layers=1), layout)
        return made[layout]

    return directory


def damaged(directories, tmp_path, layout, damage):
    source = directories(layout)
    tensors = load_file(source / "model.safetensors")
    damage(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


def assert_refused(directory, sentence, capsys):
    model = tiny.llama(torch.bfloat16, num_hidden_layers=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"nf4kernels\.load_checkpoint: .*{sentence}"):
        nf4.load_checkpoint(model, directory)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    out = directory / "out" if directory.is_file() else directory.parent / "out"
    assert main(["convert", str(directory), str(out)]) == 2
    assert not out.exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nf4kernels convert: ")]
    assert line


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_weight_leaves_the_model_as_it_was(directories, tmp_path, capsys, case):
    layout, (ending, value), sentence = DAMAGED[case]
    (tmp_path / "in").mkdir()
    directory = damaged(directories, tmp_path / "in", layout, lambda tensors: change(tensors, ending, value))
    assert_refused(directory, sentence, capsys)


@pytest.mark.parametrize(("layout", "ending", "sentence"), [
    ("compressed_int4", "_scale", r"\*\.weight_scale must be there beside \*\.weight_packed"),
    ("compressed_int4", "_packed", "must be a part of a 4-bit weight, got one without the others"),
    ("gptq_act_order", ".g_idx", r"\*\.g_idx must be there beside \*\.qweight"),
])  # fmt: skip
def test_a_missing_part_is_named(directories, tmp_path, capsys, layout, ending, sentence):
    (tmp_path / "in").mkdir()
    directory = damaged(directories, tmp_path / "in", layout, lambda tensors: without(tensors, ending))
    assert_refused(directory, sentence, capsys)


def test_a_method_that_is_unknown_is_named(directories, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    directory = damaged(directories, tmp_path / "in", "gptq", lambda tensors: None)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "quark"}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert_refused(directory, "quant_method must be one of mxfp4, .*, got 'quark'", capsys)


# what is in the way -> (the arguments beside SRC and DST, the line)
LINES = {
    "no source": ([], r"SRC must be a Hugging Face model directory, got .*No such file"),
    "no JSON": ([], r".*config\.json must hold JSON, got Expecting value"),
    "a list": ([], r".*config\.json must hold a JSON object, got list"),
    "dense": ([], r"SRC must be published in 4 bits by others, got .*"),
    "DST exists": ([], r"DST must not exist \(or say --overwrite\), got .*"),
    "DST inside": ([], r"DST must be outside SRC, got .*"),
    "dense to mxfp4": (["--to", "mxfp4"], r"SRC must have experts or linear layers in 4 bits, got neither"),
    "cut gguf": ([], r".*in\.gguf must be a whole GGUF file, got .*"),
}


@pytest.mark.parametrize("case", LINES)
def test_the_command_line_ends_in_one_line(tmp_path, capsys, case):
    options, sentence = LINES[case]
    source, out = tmp_path / "in", tmp_path / ("in/out" if case == "DST inside" else "out")
    if case != "no source":
        tiny.llama(num_hidden_layers=1).save_pretrained(source)
        capsys.readouterr()
    if case == "cut gguf":
        source = tmp_path / "in.gguf"
        source.write_bytes(b"GGUF")
    elif case in ("no JSON", "a list"):
        (source / "config.json").write_text("[]" if case == "a list" else "", encoding="utf-8")
    elif case == "DST exists":
        out.mkdir()
    assert main(["convert", str(source), str(out), *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nf4kernels convert: ")]
    assert len(lines) == 1
    assert re.match(f"nf4kernels convert: {sentence}", lines[0])


def test_a_target_that_cannot_be_made_is_named(directories, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["convert", str(directories("gptq")), str(tmp_path / "file" / "out")]) == 2
    assert "nf4kernels convert: DST must be a path that can be made, got " in capsys.readouterr().err


def test_from_pretrained_says_the_same(directories, tmp_path):
    integration = pytest.importorskip("nf4kernels.integrations.transformers")
    transformers = tiny.transformers()
    options = {"quantization_config": integration.Nf4Config()}
    nan = with_value(NAN_E4M3)
    directory = damaged(directories, tmp_path, "compressed_nvfp4", lambda t: change(t, ".weight_scale", nan))
    with pytest.raises(ValueError, match=r"nf4kernels\.Nf4Config: .*weight_scale must be E4M3 numbers, got NaN"):
        transformers.AutoModelForCausalLM.from_pretrained(directory, **options)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for fields, sentence in (CONFIGS["awq"], CONFIGS["unknown"], CONFIGS["modelopt-fp8"]):
        (directory / "config.json").write_text(json.dumps({**config, "quantization_config": fields}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"nf4kernels\.Nf4Config: " + sentence):
            transformers.AutoModelForCausalLM.from_pretrained(directory, **options)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        ValueError, match="codebook must be left out for a checkpoint that is in 4 bits already, got 'fp4'"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=integration.Nf4Config(codebook="fp4")
        )
