"""The input of `nf4kernels quantize`."""

import pytest


@pytest.fixture
def in_dir(tmp_path):
    from support.llama_directory import tiny_llama  # skips the test, not all of them, where transformers is missing

    tiny_llama(tmp_path / "in")
    return tmp_path / "in"
