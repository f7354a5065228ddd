"""A pytest plugin that leaves the tests which run on a GPU: `pytest -p benchmarks.gpu.tests`."""


def runs_on_a_gpu(item) -> bool:
    """Whether a test asks for the GPU, or for CUDA's or Triton's ops in their turn there, by conftest.py's fixtures."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    in_turn = "cuda" in (params.get("cuda_ops"), params.get("triton_ops"))
    return in_turn or not {"gpu", "triton_gpu"}.isdisjoint(item.fixturenames)


def pytest_collection_modifyitems(config, items) -> None:
    config.hook.pytest_deselected(items=[item for item in items if not runs_on_a_gpu(item)])
    items[:] = filter(runs_on_a_gpu, items)
