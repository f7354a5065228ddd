"""A GGUF file with its matrices rounded anew, to Q4_0 or IQ4_NL, by gguf's or ggml's own quantizer.

    python -m benchmarks.model.requantize_gguf IN.gguf OUT.gguf {Q4_0,IQ4_NL}

Embeddings, the head, norms and all metadata stay as they are. IQ4_NL needs ggml, which the package xllamacpp brings.
"""

import argparse
import ctypes
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy

DENSE = ("token_embd.weight", "output.weight")
TYPES = ("Q4_0", "IQ4_NL")


def requantize(source: Path, target: Path, type_name: str) -> None:
    """Write `target`: the layers' matrices of `source` in the type, everything else as it is."""
    wanted = gguf.GGMLQuantizationType[type_name]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{type_name}"])
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if len(tensor.shape) == 2 and tensor.name not in DENSE:
            data, kind = quantize(gguf.quants.dequantize(data, kind).astype(numpy.float32), wanted), wanted
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(weight: numpy.ndarray, kind: gguf.GGMLQuantizationType) -> numpy.ndarray:
    """The bytes of fp32 `[N, K]` in `kind`, `[N, bytes of a row]`."""
    if kind != gguf.GGMLQuantizationType.IQ4_NL:  # the one of the two that gguf cannot write
        return gguf.quants.quantize(weight, kind)
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise SystemExit("requantize_gguf: IQ4_NL needs ggml's quantizer: pip install xllamacpp")
    (library,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    ggml_quantize_chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    ggml_quantize_chunk.restype = ctypes.c_size_t
    N, K = weight.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    packed = numpy.empty((N, K // block * size), numpy.uint8)
    weight = numpy.ascontiguousarray(weight)
    written = ggml_quantize_chunk(int(kind), weight.ctypes.data, packed.ctypes.data, 0, N, K, None)
    if written != packed.nbytes:
        raise SystemExit(f"requantize_gguf: ggml must write {packed.nbytes} bytes, got {written}")
    return packed


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model.requantize_gguf", description=__doc__.split("\n")[0]
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("type", choices=TYPES)
    arguments = parser.parse_args()
    requantize(arguments.source, arguments.target, arguments.type)


if __name__ == "__main__":
    main()
