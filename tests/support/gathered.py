"""What a sharded module holds, gathered."""

from support.numerics import assert_same_bits
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_state(cut: nn.Module, expected: dict[str, Tensor], what: str) -> None:
    state = cut.state_dict()
    assert state.keys() == expected.keys(), what
    for name in expected:
        assert_same_bits(whole(state[name]), expected[name], f"{what}: {name}")
