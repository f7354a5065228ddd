"""nf4kernels.optim.PagedAdamW on a device: its state is managed, its bits are AdamW's, and a spike pages it out.

    python -m benchmarks.gpu.paged

The spike is an allocation of more than what is free: beside torch's AdamW it must be out of memory, beside the paged
one it must succeed, and the steps after it must have the same bits as without it.
"""

import argparse
import ctypes
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from nf4kernels.optim import PagedAdamW

from .records import NOTE, OK, WRONG, Records

KINDS = {
    "plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}, "amsgrad": {"amsgrad": True},
    "capturable": {"capturable": True, "foreach": True},
}  # fmt: skip
SHAPES = ((64, 4096), (4096, 64), (257,), (), (0, 8))
STEPS = 3
LARGEST = 1 << 28  # numbers of the parameter beside the spike: 1 GiB, and 2 GiB of state
CU_POINTER_ATTRIBUTE_IS_MANAGED = 8


def is_managed(tensor: Tensor) -> bool:
    """As the driver tells it."""
    value = ctypes.c_uint()
    attribute, pointer = ctypes.c_int(CU_POINTER_ATTRIBUTE_IS_MANAGED), ctypes.c_uint64(tensor.data_ptr())
    error = ctypes.CDLL("libcuda.so.1").cuPointerGetAttribute(ctypes.byref(value), attribute, pointer)
    if error:
        raise RuntimeError(f"cuPointerGetAttribute failed with {error}")
    return bool(value.value)


def parameters(device: str, shapes: Iterable[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            generator = torch.Generator(param.device).manual_seed(seed)
            param.grad = torch.randn(param.shape, generator=generator, device=param.device)
    optimizer.step()


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for own in optimizer.state.values() for value in own.values()]


def same(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> bool:
    found = [
        [*(param for group in each.param_groups for param in group["params"]), *state_of(each)]
        for each in (left, right)
    ]
    return len(found[0]) == len(found[1]) and all(map(torch.equal, *found))


def unmanaged(optimizer: torch.optim.Optimizer, device: str, managed: Callable[[Tensor], bool]) -> int:
    """Of the state on the device, tensors that are not managed."""
    own = [tensor for tensor in state_of(optimizer) if tensor.device.type == device and tensor.numel()]
    return sum(not managed(tensor) for tensor in own)


def check_kind(kind: str, device: str, managed: Callable[[Tensor], bool], records: Records) -> None:
    """Some steps, a state that is loaded into the other class each, and some more."""
    plain = torch.optim.AdamW(parameters(device, SHAPES), **KINDS[kind])
    paged = PagedAdamW(parameters(device, SHAPES), **KINDS[kind])
    for seed in range(STEPS):
        step(plain, seed)
        step(paged, seed)
    wrong = unmanaged(paged, device, managed)
    records.add(f"{kind}, managed", WRONG if wrong else OK, f"{wrong} tensors are not" if wrong else "")
    records.add(f"{kind}, bits", OK if same(plain, paged) else WRONG)
    again = PagedAdamW(plain.param_groups[0]["params"], **KINDS[kind])
    again.load_state_dict(plain.state_dict())
    plain = torch.optim.AdamW(paged.param_groups[0]["params"], **KINDS[kind])
    plain.load_state_dict(paged.state_dict())
    for optimizer in (plain, again):
        step(optimizer, STEPS)
    is_right = same(plain, again) and not unmanaged(again, device, managed)
    records.add(f"{kind}, loaded", OK if is_right else WRONG)


def fits(nbytes: int, device: str) -> bool:
    """Whether so much can be allocated and written to at once."""
    try:
        spike = torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return False
    spike.fill_(1)
    torch.cuda.synchronize()
    del spike
    torch.cuda.empty_cache()
    return True


def check_spike(device: str, records: Records, numbers: int, fits: Callable[[int, str], bool] = fits) -> None:
    """More than is free, by three quarters of the state: which is what must go to the host."""
    bits = []
    for make in (torch.optim.AdamW, PagedAdamW):
        optimizer = make(parameters(device, [(numbers,)]), fused=True)
        step(optimizer, 0)
        optimizer.zero_grad()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        state = 2 * 4 * numbers
        is_there = fits(free + 3 * state // 4, device)
        what = f"{(free + 3 * state // 4) / 2**30:.1f} GiB where {free / 2**30:.1f} are free, {make.__name__}"
        if make is PagedAdamW:
            records.add(f"a spike of {what}", OK if is_there else WRONG, "" if is_there else "out of memory")
        else:
            records.add(f"a spike of {what}", WRONG if is_there else OK, "it fits, and was not to" if is_there else "")
        times = []
        for seed in (1, 2):
            begin = time.perf_counter()
            step(optimizer, seed)
            torch.cuda.synchronize()
            times.append(f"{1e3 * (time.perf_counter() - begin):.1f}")
        records.add(f"steps after it, {make.__name__}", NOTE, f"{' and '.join(times)} ms, of {numbers} numbers")
        bits.append([tensor.cpu() for tensor in (*optimizer.param_groups[0]["params"], *state_of(optimizer))])
        del optimizer
        torch.cuda.empty_cache()
    records.add("bits after the spike", OK if all(map(torch.equal, *bits)) else WRONG)


def check_refused(device: str, records: Records, numbers: int) -> None:
    """Where the state has no room nothing is allocated."""
    paged = PagedAdamW(parameters(device, [(numbers,)]))
    torch.cuda.empty_cache()
    room = torch.cuda.mem_get_info()[0] - 4 * numbers  # of the gradient
    filler = torch.empty(max(room - 4 * numbers, 0), dtype=torch.uint8, device=device)
    try:
        step(paged, 0)
    except torch.OutOfMemoryError as error:
        is_right = "the state must fit" in str(error) and not state_of(paged)
        records.add("a state without room", OK if is_right else WRONG, "" if is_right else str(error).splitlines()[0])
    else:
        records.add("a state without room", WRONG, f"it was allocated beside {filler.nbytes} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.paged", description=__doc__)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    records = Records("paged", args.records)
    for kind in KINDS:
        check_kind(kind, "cuda", is_managed, records)
    numbers = min(LARGEST, torch.cuda.mem_get_info()[0] // 24)
    check_spike("cuda", records, numbers)
    check_refused("cuda", records, numbers)
    print(f"paged optimizer state: {records}", flush=True)
    raise SystemExit(1 if records.wrong else 0)


if __name__ == "__main__":
    main()
