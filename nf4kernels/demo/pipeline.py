"""The stages, in order: get, load, quantize, fine-tune, merge, write. Each is the function behind a verb."""

import csv
import shutil
from functools import partial
from importlib.resources import files
from pathlib import Path
from textwrap import indent
from typing import Any

import torch

import nf4kernels as nf4

from ..cli.meta_model import meta_model
from ..model.training import training_dtype
from ..stages.data.reading import Source, Split, read
from ..stages.data.view import View, Viewer
from ..stages.errors import StageError, first_line
from ..stages.finetune.outputs import CARD, LOG, RECIPE, write_picture
from ..stages.finetune.recipe import Recipe, read_recipe
from ..stages.finetune.run import finetune
from ..stages.inspect import inspect_directory
from ..stages.plots import plot_inspection
from ..stages.text_loss import Batch, batches_of, held_out_loss
from ..storage.atomic import replacing_directory, write_json
from ..storage.convert import convert_directory
from ..storage.directory_checks import Words
from ..storage.merge_adapter import merge_adapter
from ..storage.peft_format import CONFIG as PEFT_CONFIG
from . import byte_model, report, smollm2
from .data import PLAIN, WORDNET
from .loading import ATTENTION, STORED, cast_parameters, load, quiet_transformers
from .settings import MADE_BY, RESULTS, Settings

CPU_RECIPE = Path(str(files("nf4kernels.stages.finetune"))) / "recipes" / "cpu-small.yaml"
HELD_OUT = 64  # examples at most: they are evaluated seven times
LOGGED = 20  # losses of the fine-tuning, each the mean of as many steps
MODEL_OF = partial(meta_model, verb="demo")
SAMPLES, SAMPLE_TOKENS, SAMPLE_BYTES, PLAIN_TOKENS = 3, 24, 96, 16
GET, LOAD, QUANTIZE, TUNE = "get the model", "load it in 16 bits", "quantize it to 4 bits", "fine-tune LoRA through it"
TRAIN_BYTES, MERGE, WRITE = "train a byte model instead", "merge the adapters into 16 bits", "write everything"
EVALUATE, GENERATE = "evaluate (5 times)", "write sample answers"
BASE, QUANTIZED, TUNED = "16-bit base", "NF4 base", "NF4 + LoRA"
MERGED, MERGED_BASE = "merged into 16-bit Ŵ", "merged into the original base"
DTYPE_LINES = {
    torch.bfloat16: "dense parts compute in bfloat16: this CPU multiplies in it at full speed",
    torch.float32: "dense parts compute in float32: without bf16 instructions bfloat16 would take many times as long",
}
# Of what the fine-tuning says, by its beginning: the rest stands in the tables, or names where things are for now.
SHOWN = ("training:", "held out:", "trainable:", "one example", "memory:", "time:")


def run(settings: Settings) -> dict[str, Any]:
    """Run every stage, write `settings.out`, print what happens; returns the contents of results.json.

    Raises:
        StageError: the data or `settings.model` is not as it must be; nothing was written.
        ConversionError: the same, of what the files of `settings.model` hold.
        TargetError: another run writes `settings.out`, or it cannot be made.
    """
    split, held_out = read_split(settings)
    print(f"nf4kernels {nf4.__version__}: a language model fine-tuned in 4 bits\n{nf4.backend_info()}")
    print(DTYPE_LINES[training_dtype("cpu")])
    print(f"{len(split.train)} examples to train on, {len(split.held_out)} held out")
    quiet_transformers()
    with replacing_directory(settings.out) as out:
        demo = Demo(settings, out, split, held_out)
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


def read_split(settings: Settings) -> tuple[Split, float]:
    """The examples, and the recipe's `held_out` that splits them so: a tenth of them, or HELD_OUT where that is less.

    Raises:
        StageError: the file is not as it must be.
    """
    sources = [Source(settings.data or WORDNET)]
    try:
        split, held_out = read(sources, 0.1, settings.seed), 0.1
        if len(split.held_out) > HELD_OUT:
            split, held_out = read(sources, HELD_OUT, settings.seed), HELD_OUT
    except (StageError, OSError) as error:
        raise StageError(f"--data {first_line(error)}") from None
    return split, held_out


class Demo:
    """The state that the stages hand on; every method is one stage."""

    def __init__(self, settings: Settings, out: Path, split: Split, held_out: float) -> None:
        self.settings, self.out, self.split, self.held_out = settings, out, split, held_out
        self.compute_dtype = training_dtype("cpu")  # of the dense parts while the model runs; files are in 16 bits
        self.stages = report.Stages()
        self.losses: dict[str, float] = {}
        self.asked: list[list[int]] = []
        self.samples: list[dict[str, str]] = []

    def get(self) -> None:
        """Set `name` and `directory`; where SmolLM2 cannot be had, train the byte model."""
        settings = self.settings
        with self.stages.stage(GET):
            try:
                self.directory = settings.model or smollm2.fetch(settings.cache)
                self.name = self.directory.resolve().name
                print(f"  {self.name} from {self.directory}")
                return
            except smollm2.FetchError as error:
                print(
                    f"  {error}\n  No SmolLM2 then. The demo goes on with a small model over bytes, trained right here."
                )
        with self.stages.stage(TRAIN_BYTES):
            self.name, self.directory = "byte-model", self.out / "byte-model"
            byte_model.make(self.directory, byte_model.text_of(self.split), settings.byte_steps, settings.seed)

    def load(self) -> None:
        with self.stages.stage(LOAD):
            model, self.tokenizer = self.loaded()
            if self.settings.model is None:
                self.tokenizer.chat_template = PLAIN.read_text(encoding="utf-8")
            self.recipe = self.make_recipe()
            viewer = Viewer(self.tokenizer, self.split.form)
            views = [viewer.view(row) for row in self.split.held_out]
            self.tests = self.batches(views)
            for view in views[:SAMPLES]:
                asked, expected = view.ids[: answer_of(view)], view.ids[answer_of(view) :]
                self.asked.append(asked)
                self.samples.append({"prompt": self.text(asked), "reference": self.text(expected).strip()})
            print(f"  {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
            self.evaluate(BASE, model)

    def quantize(self) -> None:
        with self.stages.stage(QUANTIZE):
            words = Words("demo", "--model", "--out")
            done = convert_directory(
                self.directory, self.out / "nf4", dtype=STORED, model_of=MODEL_OF, progress=False, words=words
            )
            self.report = done.report
            print(f"\n{report.memory_table(self.report)}\n")
            self.model, _ = self.loaded()
            nf4.load_checkpoint(self.model, self.out / "nf4")
            self.evaluate(QUANTIZED, self.model)
            self.generate("before")

    def fine_tune(self) -> None:
        adapter = self.out / "adapter"
        with self.stages.stage(TUNE):
            finetune(self.recipe, lambda text: print(indent(text, "  ")) if text.startswith(SHOWN) else None, samples=0)
            for name in (CARD, RECIPE, PEFT_CONFIG):  # they name directories, which are elsewhere when the run is over
                text = (adapter / name).read_text(encoding="utf-8")
                (adapter / name).write_text(text.replace(self.out.name, self.settings.out.name), encoding="utf-8")
            nf4.load_adapters(self.model, adapter)
            self.evaluate(TUNED, self.model)
            self.generate("after")
        print(f"\n{report.sample_text(self.samples)}")

    def merge(self) -> None:
        with self.stages.stage(MERGE):
            for name, into in ((MERGED, "dequantized"), (MERGED_BASE, "base")):
                target = self.out / "merged"
                shutil.rmtree(target, ignore_errors=True)
                words = Words("demo", "--model", "--out")
                merge_adapter(
                    self.out / "adapter", self.directory, target, into, model_of=MODEL_OF, progress=False, words=words
                )
                model, _ = load(target)
                self.evaluate(name, model)
            self.tokenizer.save_pretrained(target)

    def write(self) -> None:
        with self.stages.stage(WRITE):
            with (self.out / "adapter" / LOG).open(encoding="utf-8", newline="") as log:
                history = [
                    {"step": int(row["step"]), "loss": float(row["loss"])} for row in csv.DictReader(log) if row["loss"]
                ]
            self.training_loss = [entry["loss"] for entry in history]
            write_picture(self.out / "loss.png", history, self.losses[QUANTIZED], self.losses[TUNED])
            inspection = inspect_directory(self.directory, model_of=MODEL_OF, progress=False)
            plot_inspection(self.out / "weight_error.png", inspection)

    def results(self) -> dict[str, Any]:
        options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.settings).items()}
        return {
            "made_by": MADE_BY, "version": nf4.__version__, "model": self.name, "threads": torch.get_num_threads(),
            "compute_dtype": str(self.compute_dtype).removeprefix("torch."),
            "settings": options, "loss": self.losses, "seconds": self.stages.seconds,
            "training_loss": self.training_loss, "rms_error": self.report.rms_error,
            "bytes_before": self.report.model_bytes_before, "bytes_after": self.report.model_bytes_after,
            "samples": self.samples,
        }  # fmt: skip

    def make_recipe(self) -> Recipe:
        """The shipped recipe for a CPU with what the user chose; the template is that of the models of our own."""
        its = self.settings
        fields = {
            "model": self.directory, "data": its.data or WORDNET, "held_out": self.held_out,
            "output_dir": self.out / "adapter", "max_steps": its.steps, "per_device_train_batch_size": its.batch,
            "learning_rate": its.lr, "r": its.rank, "lora_alpha": 2 * its.rank, "seed": its.seed,
            "logging_steps": max(1, its.steps // LOGGED), "save_strategy": "no", "attn_implementation": ATTENTION,
        }  # fmt: skip
        if its.model is None:
            fields["chat_template_path"] = PLAIN
        if its.data is None:  # all of it is short: the examples of a step in one row, each with attention to itself
            fields |= {"padding_free": True, "max_length": "none"}
        return read_recipe(CPU_RECIPE, [f"--{name}={value}" for name, value in fields.items()])

    def batches(self, views: list[View]) -> list[Batch]:
        length = self.recipe.training.max_length
        rows, has_loss = [view.ids[:length] for view in views], [view.has_loss[:length] for view in views]
        if not any(any(tokens[1:]) for tokens in has_loss):
            raise StageError(f"--data must have an answer within the first {length} tokens of an example, got none")
        return batches_of(rows, torch.device("cpu"), has_loss)

    def loaded(self) -> tuple[Any, Any]:
        """As `load`; StageError where it is the user's model that does not load."""
        try:
            return load(self.directory)
        except Exception as error:  # what transformers raises about a directory has no common type
            if self.settings.model is None:
                raise
            expected = "must be a causal language model with its tokenizer"
            raise StageError(
                f"--model {expected}, got {self.settings.model}: {type(error).__name__}: {first_line(error)}"
            ) from None

    def evaluate(self, name: str, model: torch.nn.Module) -> None:
        """From here on `model` computes in `compute_dtype`; a cast that is exact for what 16 bits hold."""
        cast_parameters(model, self.compute_dtype)
        with self.stages.aside(EVALUATE):
            self.losses[name] = held_out_loss(model, self.tests)
        print(f"  held-out loss, {name}: {self.losses[name]:.3f}")

    @torch.no_grad()
    def generate(self, when: str) -> None:
        """The model's own answers to the first held-out prompts, always its likeliest next token."""
        length = SAMPLE_BYTES if len(self.tokenizer) < 1000 else SAMPLE_TOKENS
        with self.stages.aside(GENERATE):
            for sample, ids in zip(self.samples, self.asked):
                prompt = torch.tensor([ids])
                out = self.model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, do_sample=False,
                    pad_token_id=self.tokenizer.eos_token_id,
                )  # fmt: skip
                sample[when] = self.text(out[0, len(ids) :]).strip().split("\n")[0]

    def text(self, ids: Any) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def answer_of(view: View) -> int:
    """The place of the first token that is learned; of plain text, all of which is, a place to go on from."""
    return view.has_loss.index(True) or PLAIN_TOKENS
