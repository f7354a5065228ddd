"""AdaptedModule: the adapters of a module in 4 bits, of which one is active."""

from typing import Any

import torch
from torch import Tensor, nn

from ..modes import outside_inference_mode
from .dtensors import is_dtensor
from .lora import FROM_WEIGHT, LoraConfig, WaitingAdapter, check_adapter_name, init_adapter
from .quant_module import QuantModule


class AdaptedModule(QuantModule):
    """A weight in 4 bits with any number of adapters.

    The active one's factors are `lora_A` and `lora_B`, modules with a `weight`, and its name is `adapter_name`. The
    others wait, frozen, in the child `adapters`, by name.
    """

    PLACES_ADAPTERS = False  # whether it puts new adapters on the mesh that its weight is on
    WAITING = "adapters"  # the child that holds the adapters which wait, there where there are any
    lora: LoraConfig | None = None  # of the active adapter
    lora_A: Any  # noqa: N815 (PEFT's name)
    lora_B: Any  # noqa: N815
    adapter_name: str = "default"  # of the active adapter
    adapters_off: bool = False  # inside disable_adapters

    @property
    def adapter_names(self) -> list[str]:
        """Of all adapters on this layer, the active one first."""
        active = [] if self.lora is None else [self.adapter_name]
        return [*active, *self._waiting()]

    def _waiting(self) -> dict[str, Any]:
        """name -> WaitingAdapter."""
        waiting = self._modules.get(self.WAITING)
        return {} if waiting is None else waiting._modules

    def new_factors(self, config: LoraConfig, dtype: torch.dtype | None) -> tuple[nn.Module, nn.Module]:
        """Fresh lora_A and lora_B on the weight's device, not initialised; a dtype of None is the module's own."""
        raise NotImplementedError

    @outside_inference_mode
    def add_lora(self, config: LoraConfig, dtype: torch.dtype | None = None, name: str = "default") -> None:
        """Attach a fresh adapter; ValueError where one of that name is attached already.

        It is active at once where no other is; else it waits, frozen, until `set_adapter` names it.

        Args:
            dtype: of lora_A and lora_B; None takes the dtype of bias, or the one the weight was quantized from.
            name: a part of the names of parameters, so without dots.
        """
        self.check_new_adapter(config, name, f"{self.WHO}.add_lora")
        self.attach_lora(config, dtype, name)

    def check_new_adapter(self, config: LoraConfig, name: str, who: str) -> None:
        """ValueError where `add_lora` could not attach it."""
        if config.init in FROM_WEIGHT:
            raise ValueError(
                f"{who}: init must be 'default' or 'gaussian' on a layer in 4 bits, whose dense weight is gone"
                f" (quantize_model, from_linear and from_experts have it), got {config.init!r}"
            )
        self._check_adapter_name(name, who)

    def _check_adapter_name(self, name: str, who: str) -> None:
        check_adapter_name(name, who)
        if name in self.adapter_names:
            raise ValueError(f"{who}: the layer must have no adapter {name!r} yet, got one already")
        if is_dtensor(self.weight) and not self.PLACES_ADAPTERS:
            raise ValueError(
                f"{who}: the layer must not be sharded yet (quantize, add adapters, then fully_shard), since a sharded"
                " model takes no new parameters, got a DTensor as its weight"
            )
        if self.weight.is_meta and hasattr(self, "_hf_hook"):
            raise ValueError(f"{who}: the layer must not be offloaded yet: add adapters, then let accelerate dispatch")

    @outside_inference_mode
    def attach_lora(self, config: LoraConfig, dtype: torch.dtype | None = None, name: str = "default") -> None:
        """`add_lora` also for a start from the weight, whose values the caller has."""
        self._check_adapter_name(name, f"{self.WHO}.add_lora")
        factors: tuple[Any, Any] = self.new_factors(config, dtype)
        lora_A, lora_B = factors
        if config.init in FROM_WEIGHT:  # kept for what an adapter over the original weight is: the change since then
            for factor in (lora_A, lora_B):
                factor.register_buffer("start", torch.zeros_like(factor.weight))
        if not self.weight.is_meta:
            init_adapter(lora_A, lora_B, config)
        if self.lora is None:
            self.lora, self.lora_A, self.lora_B, self.adapter_name = config, lora_A, lora_B, name
        else:
            self._let_wait(name, WaitingAdapter(config, lora_A, lora_B))

    def set_start(self, A: Tensor, B: Tensor) -> None:
        """The values that the active adapter, which `attach_lora` made of such a start, begins with."""
        factors: Any = (self.lora_A, self.lora_B)
        for factor, values in zip(factors, (A, B)):
            if not factor.weight.is_meta:
                factor.weight.data.copy_(values)
                factor.start.copy_(values)

    def _let_wait(self, name: str, adapter: WaitingAdapter) -> None:
        if self._modules.get(self.WAITING) is None:
            self.add_module(self.WAITING, nn.ModuleDict())
        waiting: Any = self._modules[self.WAITING]
        waiting[name] = adapter

    def get_adapter(self, name: str | None = None) -> tuple[LoraConfig, Any, Any] | None:
        """(configuration, lora_A, lora_B) of the adapter of that name, of the active one for None; None: no such."""
        if self.lora is not None and name in (None, self.adapter_name):
            return self.lora, self.lora_A, self.lora_B
        adapter = None if name is None else self._waiting().get(name)
        return None if adapter is None else (adapter.config, adapter.lora_A, adapter.lora_B)

    def set_adapter(self, name: str | None) -> None:
        """Make the adapter of that name active and trainable; the others wait, frozen.

        None, and a name that this layer does not have, leave it without an active one.
        """
        active = self.get_adapter()
        if active is not None and name != self.adapter_name:
            self._let_wait(self.adapter_name, WaitingAdapter(*active))
            self.lora = self.lora_A = self.lora_B = None
        if self.lora is None and name in self._waiting():
            adapter = self._take(name)
            self.lora, self.lora_A, self.lora_B, self.adapter_name = (
                adapter.config, adapter.lora_A, adapter.lora_B, name,
            )  # fmt: skip
        if self.lora is not None:
            for factor in (self.lora_A, self.lora_B):
                factor.requires_grad_(True)  # type: ignore[union-attr]  # set with lora

    def remove_adapter(self, name: str = "default") -> None:
        """Detach the adapter of that name, active or not; ValueError where there is none."""
        if name not in self.adapter_names:
            raise ValueError(f"{self.WHO}.remove_adapter: name must be one of {self.adapter_names}, got {name!r}")
        if self.lora is not None and name == self.adapter_name:
            self.lora = self.lora_A = self.lora_B = None
        else:
            self._take(name)

    def _take(self, name: str) -> WaitingAdapter:
        waiting = self._waiting()
        adapter: WaitingAdapter = waiting.pop(name)
        if not waiting:
            del self._modules[self.WAITING]
        return adapter

    def __getstate__(self) -> dict[str, Any]:
        """Without `adapters_off`: a copy made inside disable_adapters is not inside it."""
        return {name: value for name, value in self.__dict__.items() if name != "adapters_off"}

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Where the state has this layer's adapters, but another one active, that one is made active here as well."""
        stored = {key[len(prefix) :].split(".")[1] for key in state_dict if key.startswith(f"{prefix}{self.WAITING}.")}
        active = [name for name in self.adapter_names if name not in stored]
        has_active = f"{prefix}lora_A.weight" in state_dict
        is_other = stored != set(self._waiting()) and stored <= set(self.adapter_names) and len(active) == has_active
        if is_other and not self.state_errors(state_dict, prefix):
            self.set_adapter(active[0] if active else None)
        super()._load_from_state_dict(state_dict, prefix, *args)
