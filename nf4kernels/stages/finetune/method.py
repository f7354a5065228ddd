"""What of a model a recipe trains, and what is written of it in the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import load_peft_weights, set_peft_model_state_dict
from transformers.integrations import is_deepspeed_zero3_enabled

from .loading import load_model, with_adapter
from .outputs import Card
from .recipe import Recipe
from .trainer import Trainer


class Method:
    """PEFT's adapters on weights in 4 bits; what trains something else overrides what is different."""

    trainer: Callable[..., Trainer] = Trainer
    card = Card()
    has_forecast = True  # whether the memory of such a run can be told beforehand

    def load(self, recipe: Recipe, has_images: bool) -> Any:
        """The model as the trainer is to get it."""
        model = load_model(recipe, has_images)
        return model if recipe.adapter is None else with_adapter(model, recipe.adapter, recipe)

    def peft_config(self, recipe: Recipe) -> Any:
        """What the trainer wraps the model in; None for nothing."""
        return recipe.lora if recipe.adapter is None else None

    def rank(self, recipe: Recipe) -> int | None:
        """Of the adapters that are trained; None where there are none."""
        return recipe.lora.r

    def parameters(self, model: Any) -> tuple[int, int]:
        """(those that are trained, all)."""
        trained, of = model.get_nb_trainable_parameters()
        return trained, of

    def take(self, trainer: Any, checkpoint: Path) -> None:
        """Give the trainer's model what the last checkpoint of a run has, as it is after training.

        DeepSpeed makes no engine for what is not trained, but under ZeRO-3: else each process has all weights.
        """
        trainer.is_deepspeed_enabled = is_deepspeed_zero3_enabled()
        set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint), device="cpu"))

    def write(self, trainer: Any, recipe: Recipe) -> None:
        """Write what was trained to the recipe's output_dir."""
        trainer.save_model(str(recipe.out))


ADAPTERS = Method()
