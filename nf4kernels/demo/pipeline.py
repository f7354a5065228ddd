"""The stages, in order: get, load, quantize, fine-tune, merge, write."""

import copy
from pathlib import Path

import torch

import nf4kernels as nf4

from ..model.training import training_dtype
from ..storage.atomic import replacing_directory, write_json
from ..storage.checkpoint import save_checkpoint
from . import byte_model, data, report, smollm2
from .settings import MADE_BY, RESULTS, Settings
from .training import evaluate, train

MAX_LENGTH = 256  # tokens of prompt and answer together; WordNet's are at most 60 in SmolLM2's words, 190 in bytes
SAMPLES, SAMPLE_TOKENS, SAMPLE_BYTES = 3, 24, 96
STORED = torch.bfloat16  # what every file holds, and what the model is quantized from and merged into
GET, LOAD, QUANTIZE, TUNE = "get the model", "load it in 16 bits", "quantize it to 4 bits", "fine-tune LoRA through it"
TRAIN_BYTES, MERGE, WRITE = "train a byte model instead", "merge the adapters into 16 bits", "write everything"
EVALUATE, GENERATE = "evaluate (5 times)", "write sample answers"
BASE, QUANTIZED, TUNED = "16-bit base", "NF4 base", "NF4 + LoRA"
MERGED, MERGED_BASE = "merged into 16-bit Ŵ", "merged into the original base"
DTYPE_LINES = {
    torch.bfloat16: "dense parts compute in bfloat16: this CPU multiplies in it at full speed",
    torch.float32: "dense parts compute in float32: without bf16 instructions bfloat16 would take many times as long",
}


class ModelError(ValueError):
    """What --model names cannot be loaded; the message says why in one line."""


def run(settings: Settings, train_examples: list[data.Example], held_out: list[data.Example]) -> dict:
    """Run every stage, write `settings.out`, print what happens; returns the contents of results.json.

    Raises:
        TargetError: another run writes `settings.out`, or it cannot be made.
        ModelError: transformers does not load `settings.model`.
    """
    print(f"nf4kernels {nf4.__version__}: a language model fine-tuned in 4 bits\n{nf4.backend_info()}")
    print(DTYPE_LINES[training_dtype("cpu")])
    print(f"{len(train_examples)} examples to train on, {len(held_out)} held out")
    quiet_transformers()
    with replacing_directory(settings.out) as out:
        demo = Demo(settings, out, train_examples, held_out)
        demo.get()
        demo.load()
        demo.quantize()
        demo.fine_tune()
        demo.merge()
        demo.write()
        results = demo.results()
        write_json(out / RESULTS, results)
    print(f"\n{report.loss_table(demo.losses)}\n\n{report.time_table(demo.stages.seconds, apart=GET)}\n")
    print(report.file_table(settings.out))
    return results


class Demo:
    """The state that the stages hand on; every method is one stage."""

    def __init__(self, settings: Settings, out: Path, train_examples: list, held_out: list) -> None:
        self.settings, self.out, self.train_examples, self.held_out = settings, out, train_examples, held_out
        self.compute_dtype = training_dtype("cpu")  # of the dense parts while the model runs; files are in 16 bits
        self.stages = report.Stages()
        self.losses: dict[str, float] = {}
        self.samples = [{"prompt": x.prompt, "reference": x.answer.strip()} for x in held_out[:SAMPLES]]

    def get(self) -> None:
        """Set `name`, `directory` and `lasting`; where SmolLM2 cannot be had, train the byte model."""
        settings = self.settings
        with self.stages.stage(GET):
            try:
                self.directory = settings.model or smollm2.fetch(settings.cache)
                self.name = self.directory.resolve().name
                self.lasting = self.directory
                print(f"  {self.name} from {self.directory}")
                return
            except smollm2.FetchError as error:
                print(
                    f"  {error}\n  No SmolLM2 then. The demo goes on with a small model over bytes, trained right here."
                )
        with self.stages.stage(TRAIN_BYTES):
            self.name, self.directory = "byte-model", self.out / "byte-model"
            self.lasting = settings.out / "byte-model"  # where it is when the run is over
            byte_model.make(self.directory, self.train_examples, settings.byte_steps, settings.seed)

    def load(self) -> None:
        with self.stages.stage(LOAD):
            self.model, self.tokenizer = self.loaded()
            self.model.config._name_or_path = str(self.lasting)  # the adapter's files name the base model
            rows = [data.encode(x, self.tokenizer, MAX_LENGTH) for x in self.held_out]
            self.tests = data.evaluation_batches(rows)
            print(f"  {sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M parameters")
            self.evaluate(BASE, self.model)

    def quantize(self) -> None:
        with self.stages.stage(QUANTIZE):
            cast_parameters(self.model, STORED)
            self.report = nf4.quantize_model(self.model)
            print(f"\n{report.memory_table(self.report)}\n")
            with self.stages.aside(WRITE):
                self.model.config.save_pretrained(self.out / "nf4")
                self.tokenizer.save_pretrained(self.out / "nf4")
                save_checkpoint(self.model, self.out / "nf4" / "model.safetensors")
            self.evaluate(QUANTIZED, self.model)
            self.generate("before")

    def fine_tune(self) -> None:
        settings = self.settings
        with self.stages.stage(TUNE):
            torch.manual_seed(settings.seed)
            adapter = nf4.LoraConfig(r=settings.rank, alpha=2 * settings.rank)
            self.model.requires_grad_(False)
            for layer in self.report.layers:  # fp32: a step of the optimizer is below bf16's resolution
                self.model.get_submodule(layer.name).add_lora(adapter, dtype=torch.float32)
            count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            print(f"  rank {settings.rank}, {count / 1e6:.2f} M adapter parameters in fp32, {settings.steps} steps of "
                  f"{settings.batch} examples, learning rate up to {settings.lr:g}")  # fmt: skip
            rows = [data.encode(x, self.tokenizer, MAX_LENGTH) for x in self.train_examples]
            batches = data.training_batches(rows, settings.batch, settings.steps, settings.seed)
            self.training_loss, self.rate = train(self.model, batches, settings.lr, "fine-tune")
            self.evaluate(TUNED, self.model)
            self.generate("after")
            with self.stages.aside(WRITE):
                nf4.save_adapters(self.model, self.out / "adapter")
        print(f"\n{report.sample_text(self.samples)}")

    def merge(self) -> None:
        """The two merges; `model` becomes the one merged into the original weights."""
        with self.stages.stage(MERGE):
            base, _ = self.loaded()
            merged = copy.deepcopy(self.model)
            nf4.merge_model(merged, dtype=STORED)
            self.evaluate(MERGED, merged)
            nf4.merge_model(self.model, base=base, dtype=STORED)
            self.evaluate(MERGED_BASE, self.model)

    def write(self) -> None:
        with self.stages.stage(WRITE):
            cast_parameters(self.model, STORED)
            self.model.save_pretrained(self.out / "merged")
            self.tokenizer.save_pretrained(self.out / "merged")
            report.plot_loss(self.out / "loss.png", self.training_loss, self.losses)
            report.plot_weight_error(self.out / "weight_error.png", self.report)

    def results(self) -> dict:
        options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.settings).items()}
        return {
            "made_by": MADE_BY, "version": nf4.__version__, "model": self.name, "threads": torch.get_num_threads(),
            "compute_dtype": str(self.compute_dtype).removeprefix("torch."),
            "settings": options, "loss": self.losses, "seconds": self.stages.seconds,
            "training_loss": self.training_loss, "tokens_per_second": self.rate, "rms_error": self.report.rms_error,
            "bytes_before": self.report.model_bytes_before, "bytes_after": self.report.model_bytes_after,
            "samples": self.samples,
        }  # fmt: skip

    def loaded(self):
        """As `load`; ModelError where it is the user's model that does not load."""
        try:
            return load(self.directory)
        except Exception as error:  # what transformers raises about a directory has no common type
            if self.settings.model is None:
                raise
            first, *_ = str(error).strip().splitlines() or [""]
            expected = "must be a causal language model with its tokenizer"
            raise ModelError(
                f"--model {expected}, got {self.settings.model}: {type(error).__name__}: {first}"
            ) from None

    def evaluate(self, name: str, model: torch.nn.Module) -> None:
        """From here on `model` computes in `compute_dtype`; a cast that is exact for what 16 bits hold."""
        cast_parameters(model, self.compute_dtype)
        with self.stages.aside(EVALUATE):
            self.losses[name] = evaluate(model, self.tests, f"evaluate {name}")
        print(f"  held-out loss, {name}: {self.losses[name]:.3f}")

    @torch.no_grad()
    def generate(self, when: str) -> None:
        """The model's own answers to the first held-out prompts, always its likeliest next token."""
        length = SAMPLE_BYTES if len(self.tokenizer) < 1000 else SAMPLE_TOKENS
        with self.stages.aside(GENERATE):
            for sample in self.samples:
                tokens, prompt_length = data.encode(data.Example(sample["prompt"], ""), self.tokenizer, MAX_LENGTH)
                ids = torch.tensor([tokens[:prompt_length]])
                out = self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False,
                    pad_token_id=self.tokenizer.eos_token_id,
                )  # fmt: skip
                text = self.tokenizer.decode(out[0, prompt_length:], skip_special_tokens=True)
                sample[when] = text.strip().split("\n")[0]


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Of what is no adapter; buffers stay: rotary embeddings' frequencies are fp32 in a model of any dtype."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and ".lora_" not in name:
            parameter.data = parameter.data.to(dtype)


def load(directory: Path):
    """(model in bf16, evaluating, its tokenizer) of a Hugging Face directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # "eager": for rows of 20 tokens the backward of torch's fused CPU attention takes 2.8 ms a layer, the plain one 0.4
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=STORED, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
