"""ggml's products with Q4_0 and IQ4_NL weights on a CPU, through the shared library of an installed package.

llama-cpp-python is compiled for the machine where it is installed; xllamacpp is a wheel for AVX2. NF4KERNELS_GGML names
another build: the folder with its libggml*.so, or one library with all of it.

ggml takes and gives fp32, and rounds x to Q8_0 (8 bits, a scale for each 32) on the way. Its best path repacks the
weight into groups of eight rows when it is loaded; that is the one which is measured.
"""

import ctypes
import importlib.util
import os
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from nf4kernels.codebook import CODEBOOKS
from nf4kernels.storage.published.ggml_blocks import BLOCK, IN_4_BITS, numbers_from_rows

TYPES = {"IQ4_NL": 20, "Q4_0": 2}  # ggml's numbers of them
F32 = 0
ROWS = 8  # that are repacked together: N is a multiple of it, K of BLOCK
PARTS = ("libggml-base.so", "libggml-cpu.so", "libggml.so")  # in the order of what each needs
MISSING = (
    "ggml is not installed: its IQ4_NL and Q4_0 are not measured (pip install llama-cpp-python, or xllamacpp, or "
    "NF4KERNELS_GGML=<folder of libggml*.so>)"
)


class _Memory(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool))


# name -> what it returns and what it takes
SIGNATURES = {
    "ggml_init": (c_void_p, _Memory),
    "ggml_free": (None, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_get_data": (c_void_p, c_void_p),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_reg": (c_void_p,),
    "ggml_backend_cpu_buffer_type": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_reg_dev_get": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_tensor_alloc": (c_int, c_void_p, c_void_p, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_log_set": (None, c_void_p, c_void_p),
}
_LOG = CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_silent = _LOG(lambda level, text, data: None)


def find() -> list[Path]:
    """The libraries to load, one after the other; none where ggml is not installed."""
    named = os.environ.get("NF4KERNELS_GGML")
    if named:
        return [Path(named)] if Path(named).is_file() else _parts(Path(named))
    for package, pattern in (("llama_cpp", "lib"), ("xllamacpp", "xllamacpp*.so")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for found in Path(folder).glob(pattern):
                libraries = _parts(found) if found.is_dir() else [found]
                if libraries:
                    return libraries
    return []


def _parts(folder: Path) -> list[Path]:
    found = [next(folder.rglob(name), None) for name in PARTS]
    return [] if None in found else found


class Ggml:
    """The library, its backend, and the kinds of buffers."""

    def __init__(self, libraries: list[Path]) -> None:
        for path in libraries:
            self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        for name, (result, *arguments) in SIGNATURES.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.log_set(_silent, None)
        self.backend = self.backend_cpu_init()
        self.plain = self.backend_cpu_buffer_type()
        self.repacked = self._repacked()

    def _repacked(self) -> int:
        """The buffer type that repacks; the plain one in a build without it."""
        registry = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return self.plain
        types = CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.backend_reg_dev_get(registry, 0))
        place = 0
        while types and types[place]:
            if self.backend_buft_name(types[place]) == b"CPU_REPACK":
                return types[place]
            place += 1
        return self.plain

    def context(self) -> int:
        """Room for the descriptions of a few tensors and a graph; their data lie in buffers."""
        return self.init(_Memory(1 << 18, None, True))

    def buffer_of(self, context: int, kind: int) -> int:
        """Memory of that kind under the tensors of a context."""
        buffer: int = self.backend_alloc_ctx_tensors_from_buft(context, kind)
        assert buffer, "ggml gave no memory"
        return buffer

    def __str__(self) -> str:
        has = [name for name in ("avx2", "avx512", "avx512_vnni", "avx512_bf16") if self._has(name)]
        version = getattr(self.library, "ggml_version", None)
        if version is None:
            return f"ggml ({' '.join(has)})"
        version.restype = c_char_p
        return f"{version().decode()} ({' '.join(has)})"

    def _has(self, name: str) -> bool:
        return bool(getattr(self.library, f"ggml_cpu_has_{name}", lambda: 0)())


@cache
def load() -> Ggml | None:
    libraries = find()
    return Ggml(libraries) if libraries else None


def quantize(weight: Tensor, kind: str) -> Tensor:
    """ggml's blocks of fp32 [N, K], uint8 [N, bytes]: each block's largest weight becomes the first level, as in Q4_0.

    ggml's own IQ4_NL also tries other scales, for 6 s a 4096x4096; the speed of a product is the same.
    """
    levels = CODEBOOKS[IN_4_BITS[kind]]
    blocks = weight.view(len(weight), -1, BLOCK)
    largest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    scale = (largest / levels[0]).half()
    values = blocks / torch.where(scale == 0, 1, scale.float())
    codes = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2).byte()
    packed = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    return torch.cat([scale.view(torch.uint8), packed], 2).view(len(weight), -1)


class Activations:
    """x [M,K] and y [M,N] in ggml's memory, fp32."""

    def __init__(self, ggml: Ggml, M: int, shape: tuple[int, int]) -> None:
        (N, K), self.ggml, self.context = shape, ggml, ggml.context()
        self.x_tensor, self.y_tensor = (ggml.new_tensor_2d(self.context, F32, columns, M) for columns in (K, N))
        self.buffer = ggml.buffer_of(self.context, ggml.plain)
        self.x, self.y = _floats(ggml.get_data(self.x_tensor), M, K), _floats(ggml.get_data(self.y_tensor), M, N)
        self.given: Tensor | None = None

    def take(self, x: Tensor) -> None:
        """Bring x there, unless it is there."""
        if x is not self.given:
            self.x.copy_(x)
            self.given = x

    def __del__(self) -> None:
        self.ggml.backend_buffer_free(self.buffer)
        self.ggml.free(self.context)


class GgmlLinear(nn.Module):
    """y[M,N] = x[M,K] @ W[N,K].T in fp32; N a multiple of ROWS, K of BLOCK.

    x and y of the last number of rows lie in memory that a layer and its copies share: thousands of copies of a small
    weight, each with 512 rows of its own, are more than a machine has. So y holds until the next call of any of them.
    An x is brought there at the first call with it: activations are there already where ggml runs a model.
    """

    def __init__(
        self, ggml: Ggml, kind: str, shape: tuple[int, int], blocks: Tensor, shared: dict[int, Activations]
    ) -> None:
        super().__init__()
        self.ggml, self.kind, self.shape, self.blocks, self.shared = ggml, kind, shape, blocks, shared
        N, K = shape
        self.context, self.graph_context = ggml.context(), None
        self.graph: tuple[Activations, int] | None = None
        self.matrix = ggml.new_tensor_2d(self.context, TYPES[kind], K, N)
        self.buffer = ggml.buffer_of(self.context, ggml.repacked)
        ggml.backend_tensor_set(self.matrix, blocks.data_ptr(), 0, blocks.numel())

    @classmethod
    def from_weight(cls, ggml: Ggml, kind: str, weight: Tensor) -> "GgmlLinear":
        blocks = torch.cat([quantize(rows.detach().float(), kind) for rows in weight.split(1024)])
        return cls(ggml, kind, tuple(weight.shape), blocks, {})

    def decoded(self) -> Tensor:
        """W in fp32, by our own reader of ggml's blocks."""
        return numbers_from_rows(self.blocks, self.kind)

    def forward(self, x: Tensor) -> Tensor:
        activations, graph = self._graph(len(x))
        activations.take(x)
        self.ggml.backend_cpu_set_n_threads(self.ggml.backend, torch.get_num_threads())
        status = self.ggml.backend_graph_compute(self.ggml.backend, graph)
        assert status == 0, f"ggml_backend_graph_compute returned {status}"
        return activations.y

    def take(self, x: Tensor) -> None:
        """Bring x into ggml's memory, unless it is there."""
        self._graph(len(x))[0].take(x)

    def _graph(self, M: int) -> tuple[Activations, int]:
        """The activations of so many rows, and the graph from the one to the other."""
        activations = self.shared.get(M)
        if activations is None:
            self.shared.clear()
            activations = self.shared[M] = Activations(self.ggml, M, self.shape)
        if self.graph is None or self.graph[0] is not activations:
            self.graph = activations, self._made(activations)
        return self.graph

    def _made(self, activations: Activations) -> int:
        ggml, (_, K) = self.ggml, self.shape
        if self.graph_context is not None:
            ggml.free(self.graph_context)
        self.graph_context = context = ggml.context()
        x = ggml.new_tensor_2d(context, F32, K, len(activations.x))
        y = ggml.mul_mat(context, self.matrix, x)
        for tensor, memory in ((x, activations.x_tensor), (y, activations.y_tensor)):
            ggml.backend_tensor_alloc(activations.buffer, tensor, ggml.get_data(memory))
        graph = ggml.new_graph(context)
        ggml.build_forward_expand(graph, y)
        return graph

    def __deepcopy__(self, memo: dict) -> "GgmlLinear":
        """Of the matrix in ggml's memory; `blocks` are read alone, and shared."""
        return type(self)(self.ggml, self.kind, self.shape, self.blocks, self.shared)

    def __del__(self) -> None:
        if "buffer" in self.__dict__:
            self.ggml.backend_buffer_free(self.buffer)
            for context in (self.context, self.graph_context):
                if context is not None:
                    self.ggml.free(context)


def _floats(address: int, rows: int, columns: int) -> Tensor:
    memory = (c_float * (rows * columns)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float32).view(rows, columns)


def allowed_error(x: Tensor) -> float:
    """Of a product with x in Q8_0: twice what rounding each 32 to 127 steps of their largest leaves of x's norm."""
    blocks = x.double().view(-1, BLOCK)
    steps = blocks.abs().amax(1) / 127
    return 2 * ((steps.square().sum() * BLOCK / 12).sqrt() / blocks.norm()).item()
