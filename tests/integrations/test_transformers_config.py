"""Nf4Config as a value: its fields, their checks and JSON."""

import json

import pytest
import torch
from support.directories import transformers

import nf4kernels as nf4
from nf4kernels.integrations.transformers import Nf4Config

LEVELS = [-1.0, -0.8, -0.6, -0.5, -0.4, -0.3, -0.2, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"codebook": "int4", "block_size": 128, "double_quant": False, "compute_dtype": torch.float16},
        {"codebook": LEVELS, "scale_codebook": "dynamic8", "skip": ("a", "*.b"), "modules_to_not_convert": ["lm_head"]},
        {"codebook": torch.tensor(LEVELS), "compute_dtype": "bfloat16"},
    ],
)
def test_round_trip(options):
    config = Nf4Config(**options)
    fields = json.loads(json.dumps(config.to_dict()))
    assert fields["quant_method"] == "nf4kernels"
    again = Nf4Config.from_dict(fields)
    assert again.to_dict() == config.to_dict()
    assert vars(again) == vars(config)
    kind = transformers.quantizers.AutoQuantizationConfig.from_dict(fields)
    assert (type(kind), vars(kind)) == (Nf4Config, vars(config))


def test_custom_levels_are_those_of_fp32():
    config = Nf4Config(codebook=LEVELS)
    assert config.codebook == nf4.quantize(torch.ones(1, 64), torch.tensor(LEVELS)).code.tolist()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 4}, TypeError, r"fields must be among codebook, .*, got bits$"),
        ({"load_in_4bit": True}, TypeError, r"fields must be among codebook, .*, got load_in_4bit$"),
        ({"codebook": "nf5"}, ValueError, r"codebook must be one of .* or 16 levels, got 'nf5'"),
        ({"codebook": [0.0, 1.0]}, ValueError, r"codebook must have 16 levels, got shape \[2\]"),
        ({"codebook": 4}, TypeError, r"codebook must be a name or 16 levels, got 4"),
        ({"block_size": 48}, ValueError, r"block_size must be one of \[16, .*\], got 48"),
        ({"block_size": 64.0}, ValueError, r"block_size must be one of \[16, .*\], got 64.0"),
        ({"scale_codebook": "e5m2"}, ValueError, r"scale_codebook must be .*got 'e5m2'"),
        (
            {"compute_dtype": torch.int8},
            TypeError,
            r"compute_dtype must be float32, bfloat16 or float16, got torch.int8",
        ),
        ({"compute_dtype": "bf17"}, TypeError, r"compute_dtype must be float32, bfloat16 or float16, got 'bf17'"),
        ({"skip": "q_proj"}, TypeError, r"skip must be a sequence of names, got 'q_proj'"),
        ({"skip": [3]}, TypeError, r"skip must be a sequence of names, got \[3\]"),
    ],
)
def test_refused(options, error, message):
    with pytest.raises(error, match=r"nf4kernels\.Nf4Config: .*" + message):
        Nf4Config(**options)
