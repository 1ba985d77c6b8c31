"""PEFT's own layers over packed weights: every method of PEFT's trains, merges, unmerges and reloads on a QuantLinear.

PEFT reads and writes `base_layer.weight` as a dense matrix. On a QuantLinear that name holds codes, so each tuner layer
that is put around one becomes a subclass of itself, with `OnPacked` in front: where PEFT asks for the base layer to
read its weight, it gets a `DenseFace` that dequantizes when asked and is dropped when the call returns; what PEFT
merged into it is quantized again in the layer's own format. The arithmetic of each method stays PEFT's.

How it gets in: `BaseTunerLayer.__new__`, the one place where every tuner layer of every method is made, looks whether
the layer it will surround is a QuantLinear. (PEFT has no extension point for that: `LoraConfig._register_custom_module`
serves LoRA alone, is not saved with the adapter, and has to be repeated at every load.) `import qft` has this
module imported once PEFT is, which installs it, and loads neither.

Where PEFT is too old or has changed too much, nothing is installed, which is said once. Then LoRA's merge still works:

    config._register_custom_module({qft.QuantLinear: qft.integrations.peft.on_packed(peft.tuners.lora.Linear)})

for a LoraConfig `config`, to be handed to `get_peft_model` and to `PeftModel.from_pretrained`.

Merging costs one more rounding: `qft.report(model)` tells each merged layer's relative error. The stored tensors from
before the merge are kept beside the adapter, as many bytes again, so that unmerging is exact to the bit. Biases count.

A LoRA of qft's own on the layer (a start such as LoftQ's, or `add_lora`) is what PEFT's LoRA and DoRA begin from where
their rank is the same and `init_lora_weights=True` (peft_start.py): the model computes what it did before, the adapter
contains the start, merges it and saves it, and the layer's own counts only where no such adapter is active: when
adapters are disabled or unloaded, and in the rows `__base__` of a mixed batch. A file of PEFT's is read by the same
rule, so it belongs to the base it was trained on. One of the same rank that was trained without that start, such as on
the dense model, goes beside it by a config whose `init_lora_weights` is False.

Under another rank or method the layer's own LoRA stays: methods see W + scaling B A, and the product is taken out again
of what is stored. It is frozen, as PEFT freezes all that it does not save.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.embedding import QuantEmbedding
from ..nn.experts import QuantExperts
from ..nn.linear import FloatFacingQuantLinear, QuantLinear
from ..nn.packed import Packed
from ..notices import say_once
from .peft_dora import PackedDora
from .peft_embedding import on_packed_embedding
from .peft_start import AroundOwnLora, noting_combinations
from .peft_weight import DenseFace, Stored, store_merged

# Methods of PEFT 0.21 whose forward pass reads the weight itself; they fail on codes somewhere in the middle.
READ_DENSE = ("adamss", "frod", "hira", "hra", "peanut", "shira", "supertuning", "tinylora")
OLDEST = "0.18"  # that this was run with


def _refuse(start: str) -> Callable[..., None]:
    """A start of LoRA's that moves a part of the dense weight into the factors."""

    def init(self: OnPacked, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"init_lora_weights={start!r} takes its factors out of the dense weight, this layer's is packed as "
            f"{self._packed().format}; start from the dense model with qft.quantize_model(model, fmt, init='loftq', "
            "rank=r), or take init_lora_weights=True"
        )

    return init


class OnPacked(AroundOwnLora):
    """Goes before a class of PEFT's tuner layers; `on_packed` makes the two one."""

    peft_class: type[Any]
    base_layer: nn.Module
    _face: tuple[DenseFace, ...] = ()  # while PEFT reads the weight
    _unmerged: Stored | None = None  # what the layer held before the first merge

    def get_base_layer(self) -> nn.Module:
        return self._face[0] if self._face else super().get_base_layer()  # type: ignore[misc]

    @contextmanager
    def _facing(self, values: bool = True) -> Iterator[DenseFace]:
        """While this lasts, PEFT's code finds a dense base layer."""
        if self._face:
            yield self._face[0]
            return
        self._face = (DenseFace(self._packed(), values),)
        try:
            yield self._face[0]
        finally:
            self._face = ()

    # -------------------------------------------------------------------------------------------------- building

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with self._facing(values=not hasattr(self, "rank_dropout")):  # LoHa and LoKr ask for the shape alone
            super().update_layer(adapter_name, *args, **kwargs)  # type: ignore[misc]
        self._leave_out_own([adapter_name])
        PackedDora.adopt(self, adapter_name, self._packed())
        self._leave_out_own()
        self._freeze_own(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, *args: Any, **kwargs: Any) -> None:
        face, self._face = self._face, ()  # to the device of the codes, in the adapter's own dtype
        try:
            super()._move_adapter_to_device_of_base_layer(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._face = face

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self._packed().device, torch.uint8  # an integer: the adapter keeps its dtype

    def get_delta_weight(self, *args: Any, **kwargs: Any) -> Tensor:
        if not hasattr(self, "rank_dropout"):
            return super().get_delta_weight(*args, **kwargs)  # type: ignore[misc]
        with self._facing(values=False):  # LoHa and LoKr, at every forward
            return super().get_delta_weight(*args, **kwargs)  # type: ignore[misc]

    pissa_init = _refuse("pissa")
    olora_init = _refuse("olora")
    corda_init = _refuse("corda")
    loftq_init = _refuse("loftq")
    lora_ga_init = _refuse("lora_ga")

    # -------------------------------------------------------------------------------------------------- merging

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's merge, into the dequantized weight, quantized once for all adapters merged so far.

        Raises:
            ValueError: the merged weight is not finite; then the layer is as it was.
            FormatError: a scale of the merged weight does not fit the format; then too.
        """
        from peft.tuners.tuners_utils import check_adapters_to_merge

        if self._face:  # DoRA merges what came before it again
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
            return
        this: Any = self
        wanted = check_adapters_to_merge(this, adapter_names)
        if not wanted:
            return
        layer, earlier = self._packed(), list(self.merged_adapters)
        before = Stored(layer)
        original = self._unmerged or before
        self._leave_out_own([*earlier, *wanted])
        try:
            if earlier:  # all of them into the weight as it was: one rounding, not one for each
                original.put_back(layer)
                self.merged_adapters.clear()
            with self._facing() as face:
                super().merge(safe_merge, [*earlier, *wanted])  # type: ignore[misc]
                if face.read:
                    store_merged(layer, face.weight.detach())
        except Exception:
            before.put_back(layer)
            self.merged_adapters[:] = earlier
            raise
        finally:
            self._leave_out_own()
        if self.merged_adapters:
            self._unmerged = original

    def unmerge(self) -> None:
        """Every merged adapter out again: the stored tensors are put back, the same bits."""
        if self._face or self._unmerged is None:  # DoRA's own bookkeeping in a merge; or PEFT's "nothing to do"
            super().unmerge()  # type: ignore[misc]
            return
        self._unmerged.put_back(self._packed())
        self._unmerged = None
        self.merged_adapters.clear()
        self._leave_out_own()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled as PEFT's class with a state: a class made at run time has no name to be found by."""
        return _unpickle, (self.peft_class,), self.__dict__


def on_packed(peft_class: Any) -> Any:
    """The subclass of one of PEFT's tuner layer classes that works on a QuantLinear; the same one each time."""
    return _on_packed(peft_class) if not issubclass(peft_class, OnPacked) else peft_class


@functools.cache
def _on_packed(peft_class: Any) -> Any:
    body = {"__module__": __name__, "__doc__": peft_class.__doc__, "peft_class": peft_class}
    return type(peft_class.__name__, (OnPacked, peft_class), body)  # PEFT asks some layers for their class's name


def _unpickle(peft_class: type[Any]) -> Any:
    packed = on_packed(peft_class)
    return packed.__new__(packed)


def _new_tuner_layer(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
    """What `BaseTunerLayer.__new__` becomes: around a QuantLinear, the class that knows one."""
    layer: Any = args[0] if args else kwargs.get("base_layer")
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    if isinstance(layer, QuantExperts):
        raise ValueError("experts are packed and take no LoRA; train their scales with qft.train_only(model, 'scales')")
    if isinstance(layer, Packed) and cls.__name__ == "ParamWrapper":
        raise ValueError("target_parameters names a packed weight; name its layer in target_modules instead")
    if isinstance(layer, QuantEmbedding):
        cls = on_packed_embedding(cls)
    if isinstance(layer, QuantLinear):
        method = cls.__module__.removeprefix("peft.tuners.").partition(".")[0]
        if method in READ_DENSE:
            raise ValueError(
                f"PEFT's {method} reads the dense weight at every step, this one is packed as {layer.format}; LoRA, "
                "DoRA, VeRA, AdaLoRA, IA3, LoHa and LoKr take packed weights"
            )
        if type(layer) not in (QuantLinear, FloatFacingQuantLinear):
            raise ValueError(f"PEFT cannot go around a {type(layer).__name__}; merge or release its adapter first")
        cls = on_packed(cls)
    return object.__new__(cls)


def _prepare(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's preparation of a model with QuantLinears: stored tensors keep their dtypes, the rest is its business.

    It switches gradient checkpointing on for models it takes for quantized, which a qft model is for this call alone:
    with that mark on, transformers and accelerate would treat it as one of bitsandbytes'.
    """
    layers = [module for module in model.modules() if isinstance(module, Packed)]
    if not layers:
        return original(model, *args, **kwargs)
    tensors = [layer._parameters[name] for layer in layers for name in layer.stored]
    stored = [(tensor, tensor.dtype) for tensor in tensors if tensor is not None]
    kept = {id(tensor) for tensor, _ in stored}
    others = [parameter for parameter in model.parameters() if id(parameter) not in kept]
    before = sum(parameter.nbytes for parameter in others)
    model.is_loaded_in_4bit = True
    try:
        prepared = original(model, *args, **kwargs)
    finally:
        del model.is_loaded_in_4bit
        for tensor, dtype in stored:
            tensor.data = tensor.data.to(dtype)  # from a wider one: exact
    grown = sum(parameter.nbytes for parameter in others) - before
    if grown:
        say_once(
            f"prepare_model_for_kbit_training cast embeddings, norms and other dense weights to fp32, "
            f"{grown / 2**20:.2f} MiB more; qft.prepare_for_training casts nothing"
        )
    return prepared


def _refusing_packed(check: Callable[..., None]) -> Callable[..., None]:
    """`ModulesToSaveWrapper.check_module`, which refuses what PEFT would try to train whole."""

    @functools.wraps(check)
    def check_module(wrapper: Any) -> None:
        check(wrapper)
        for module in wrapper.original_module.modules():
            if isinstance(module, Packed):
                raise ValueError(
                    f"modules_to_save trains a copy of every weight, and this {type(module).__name__} is packed as "
                    f"{module.format}; name it in target_modules, or leave it dense when quantizing (skip)"
                )

    return check_module


def _replace_everywhere(function: Callable[..., Any], around: Callable[..., Any]) -> None:
    """Put `around(function, ...)` in the place of a module's function, also where others imported it by name."""
    wrapped = functools.wraps(function)(functools.partial(around, function))
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})  # not getattr(module, name): that would load lazy modules
        if names.get(function.__name__) is function:
            names[function.__name__] = wrapped


def install() -> None:
    """Teach the PEFT that is imported what a QuantLinear is. Calling it again changes nothing."""
    import peft
    from packaging.version import Version
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    maker = BaseTunerLayer.__new__
    if maker is _new_tuner_layer:
        return
    hooks = ("get_base_layer", "merge", "unmerge", "_move_adapter_to_device_of_base_layer")
    if Version(peft.__version__) < Version(OLDEST):
        reason = f"is older than {OLDEST}"
    elif maker is not object.__new__ or not all(hasattr(BaseTunerLayer, name) for name in hooks):
        reason = "has layers that are built otherwise"
    else:
        BaseTunerLayer.__new__ = staticmethod(_new_tuner_layer)  # type: ignore[assignment]
        _replace_everywhere(peft.prepare_model_for_kbit_training, _prepare)
        ModulesToSaveWrapper.check_module = _refusing_packed(ModulesToSaveWrapper.check_module)  # type: ignore[method-assign]
        LoraModel.add_weighted_adapter = noting_combinations(LoraModel.add_weighted_adapter)  # type: ignore[method-assign]
        return
    say_once(
        f"PEFT {peft.__version__} {reason}: LoRA trains on quantized layers, but merging, DoRA, LoHa and LoKr fail; "
        "help(qft.integrations.peft) says what is left"
    )


install()
