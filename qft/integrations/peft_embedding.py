"""PEFT's LoRA around a packed embedding: it trains, saves and reloads; it cannot be merged into the packed rows."""

from __future__ import annotations

import functools
from typing import Any


def on_packed_embedding(peft_class: type[Any]) -> type[Any]:
    """The subclass of PEFT's LoRA embedding that leaves packed rows alone.

    Raises:
        ValueError: the class is another method's, which reads the dense weight.
    """
    from peft.tuners.lora import Embedding

    if not issubclass(peft_class, Embedding):
        raise ValueError(
            f"PEFT's {peft_class.__name__} reads the dense embedding, this one is packed; LoRA takes packed "
            "embeddings, or leave it dense"
        )
    return _class()


@functools.cache
def _class() -> type[Any]:
    from peft.tuners.lora import Embedding

    class PackedEmbedding(Embedding):  # type: ignore[misc]
        """PEFT's LoRA embedding, without what would read or write codes as if they were weights."""

        def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
            if any(getattr(given, "use_dora", False) for given in (*args, *kwargs.values())):
                raise ValueError("DoRA reads the dense embedding, this one is packed; take LoRA, or leave it dense")
            super().update_layer(adapter_name, *args, **kwargs)

        def merge(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError(
                "PEFT cannot merge an adapter into a packed embedding; keep the adapter beside it, or leave the "
                "embedding dense"
            )

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            """Copied and pickled by what makes the class: one made at run time has no name to be found by."""
            return _unpickle, (), self.__dict__

    PackedEmbedding.__name__ = Embedding.__name__  # PEFT asks some layers for their class's name
    return PackedEmbedding


def _unpickle() -> Any:
    packed: Any = _class()
    return packed.__new__(packed)
