"""Tensor and expert parallel over four processes: layers, models, state and refusals, beside what one process has."""

import pytest
from support import parallel_steps
from support.torchrun import same_cases


@pytest.mark.slow
def test_layers_models_and_experts_cut_by_ranks_are_those_of_one_process(tmp_path):
    """On 4 ranks, and on 2 of a 2 x 2 mesh.

    Forward of a column-wise cut, experts whose tokens are exchanged, and the gathered state: bit for bit.
    """
    pytest.importorskip("transformers", reason="transformers is not installed: no model is cut")
    same_cases(parallel_steps, tuple(parallel_steps.CASES), tmp_path, ranks=4)
