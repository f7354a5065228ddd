"""A pytest plugin that leaves the tests which run on a GPU: `pytest -p benchmarks.gpu_tests`."""


def runs_on_a_gpu(item) -> bool:
    """Whether a test asks for the GPU, or for the CUDA ops in their turn on the GPU; fixtures of tests/conftest.py."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return "gpu" in item.fixturenames or params.get("cuda_ops") == "cuda"


def pytest_collection_modifyitems(config, items) -> None:
    config.hook.pytest_deselected(items=[item for item in items if not runs_on_a_gpu(item)])
    items[:] = filter(runs_on_a_gpu, items)
