"""GLoRA (Chavan et al. 2023, section 3) on packed weights: f(x) = (W + W o A + B) x + W c + d o b + e + b.

A multiplies W elementwise, B adds to it, c is a prompt, d scales the bias b and e adds to it. Each is as large as a
config says, from low-rank factors down to one number or nothing, and everything merges into one weight and one bias.
A layer holds the largest pieces; the smaller ones are their first column or entry, as in the authors' code, so that a
supernet of all configs trains in the memory of one. Only A's `columns`, which scale the inputs, are a vector apart.

W stays packed: with A of rank r, (W o UV) x = sum_k u_k o W (v_k o x), where W multiplies r + 1 inputs in one product,
and so holds r + 1 times the activations.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import kernels, ops
from ..nn.linear import QuantLinear
from ..notices import say_once
from ..tensor import quantize
from .adapted import AdaptedLinear, adapted_layers, bare_layers

_ALL, _COLUMN, _FIRST, _CORNER = ..., (slice(None), 0), slice(1), (slice(1), 0)

# What each term can be, and the parameters, or parts of them, that it then uses.
PIECES: dict[str, dict[str, tuple[tuple[str, Any], ...]]] = {
    "A": {
        "lora": (("Ad", _ALL), ("Au", _ALL)),
        "rows": (("Ad", _COLUMN),),
        "columns": (("A_columns", _ALL),),
        "constant": (("Ad", _CORNER),),
        "none": (),
    },
    "B": {
        "lora": (("Bd", _ALL), ("Bu", _ALL)),
        "vector": (("Bd", _COLUMN),),
        "constant": (("Bd", _CORNER),),
        "none": (),
    },
    "C": {"lora": (("Cd", _ALL), ("Cu", _ALL)), "vector": (("Cd", _COLUMN),), "none": ()},
    "D": {"vector": (("D", _ALL),), "constant": (("D", _FIRST),), "none": ()},
    "E": {"vector": (("E", _ALL),), "constant": (("E", _FIRST),), "none": ()},
}


@dataclass(frozen=True)
class GLoRAConfig:
    """What each term of a layer is.

    Attributes:
        A: lora (U V of rank r), rows (a vector that scales outputs), columns (one that scales inputs), constant, none.
        B: lora, vector (`[out]`, the same for every column), constant, none.
        C: lora (a product `[in, r] [r, 1]`), vector (`[in]`), none.
        D, E: vector (`[out]`), constant, none.

    Raises:
        ValueError: a term is something else.
    """

    A: str = "none"
    B: str = "none"
    C: str = "none"
    D: str = "none"
    E: str = "none"

    def __post_init__(self) -> None:
        for term, kind in asdict(self).items():
            if kind not in PIECES[term]:
                raise ValueError(f"{term}={kind!r} is unknown; use one of {', '.join(PIECES[term])}")


class GLoRALinear(AdaptedLinear):
    """A QuantLinear with GLoRA's terms. It starts as the base, whatever `config`, and without one it is the base.

    Parameters, fp32: `glora_Ad` and `glora_Bd` `[out, r]`, `glora_Cd` `[in, r]`, `glora_A_columns` `[in]`, `glora_D`
    (of a layer with a bias) and `glora_E` `[out]` start at 0; `glora_Au` and `glora_Bu` `[r, in]`, `glora_Cu` `[r, 1]`
    are Xavier-uniform.
    """

    prefix = "glora_"
    way_to_save = "save the adapter with qft.save_glora, or merge it with qft.merge_glora first"
    config = GLoRAConfig()  # what is computed; all pieces stay whatever it is

    @classmethod
    def adopt(cls, layer: QuantLinear, rank: int) -> GLoRALinear:
        """Turn a layer into one, in place.

        Args:
            rank: r of the terms that are `lora`, 1 <= r <= min(in, out).

        Raises:
            ValueError: the rank is out of its range, or the layer has such an adapter already.
        """
        largest = min(layer.in_features, layer.out_features)
        if not (isinstance(rank, int) and 1 <= rank <= largest):
            raise ValueError(f"rank={rank} is no whole number in 1..{largest}, what this layer can hold")
        taken = cls._take(layer)
        out, in_features = taken.out_features, taken.in_features
        for name, shape in (
            ("Ad", (out, rank)), ("Bd", (out, rank)), ("Cd", (in_features, rank)),
            ("A_columns", (in_features,)), ("D", (out,)), ("E", (out,)),
        ):  # fmt: skip
            if name != "D" or taken.bias is not None:
                taken._new(name, torch.zeros(shape))
        for name, shape in (("Au", (rank, in_features)), ("Bu", (rank, in_features)), ("Cu", (rank, 1))):
            taken._new(name, nn.init.xavier_uniform_(torch.empty(shape, device=taken.device)))
        return taken

    # -------------------------------------------------------------------------------------------------- configs

    @property
    def glora_rank(self) -> int:
        """r of the terms that are `lora`."""
        return self._parameters["glora_Au"].shape[0]  # type: ignore[union-attr]

    def choices(self) -> dict[str, tuple[str, ...]]:
        """What each term may be here; a layer without a bias has no use for D."""
        return {
            term: tuple(kinds) if term != "D" or self.bias is not None else ("none",) for term, kinds in PIECES.items()
        }

    def use(self, config: GLoRAConfig) -> None:
        """Compute with this config from now on.

        Raises:
            ValueError: it scales a bias, and the layer has none.
        """
        if config.D != "none" and self.bias is None:
            raise ValueError(f"D={config.D!r} scales a bias, which this layer does not have; use D='none'")
        self.config = config

    def sample(self, generator: torch.Generator) -> GLoRAConfig:
        """A random config of this layer, each term by itself and each kind as likely."""

        def draw(kinds: tuple[str, ...]) -> str:
            return kinds[int(torch.randint(len(kinds), (), generator=generator, device=generator.device))]

        return GLoRAConfig(**{term: draw(kinds) for term, kinds in self.choices().items()})

    def pieces(self, term: str, config: GLoRAConfig | None = None) -> dict[str, Tensor]:
        """What a term uses under a config, the layer's own where None: views of parameters, by name."""
        kind = getattr(config or self.config, term)
        return {name: self._parameters[self.prefix + name][part] for name, part in PIECES[term][kind]}  # type: ignore[index]

    def size(self, config: GLoRAConfig) -> int:
        """Parameters that a config uses."""
        return sum(piece.numel() for term in PIECES for piece in self.pieces(term, config).values())

    # -------------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor) -> Tensor:
        """As `QuantLinear.forward`; with every term none, that very function."""
        if self.config == GLoRAConfig():
            return super().forward(x)
        given, x = x, self._activations(x)
        flat = x.reshape(-1, self.in_features)
        y = self._add_b(self._product(flat), flat)
        bias = self._merged_bias()
        if bias is not None:
            y = y + bias.to(y.dtype)
        if self.lora_A is not None and self.lora_B is not None:
            y = self._add_lora(y, flat, self.lora_A, self.lora_B, given)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        """(W + W o A) x, `[rows, out]` in x's dtype; factors near 1 are multiplied in fp32."""
        q, a, dtype = self.quant_tensor, list(self.pieces("A").values()), x.dtype
        if self.config.A == "lora":
            u, v = a[0].T.to(dtype), a[1].to(dtype)
            y = ops.matmul(torch.cat([x[None], x * v[:, None]]), q)
            return y[0] + (y[1:] * u[:, None]).sum(0)
        if self.config.A == "columns":
            return ops.matmul((x * (1 + a[0])).to(dtype), q)
        y = ops.matmul(x, q)
        return (y * (1 + a[0])).to(dtype) if a else y

    def _add_b(self, y: Tensor, x: Tensor) -> Tensor:
        b = list(self.pieces("B").values())
        if self.config.B == "lora":
            dtype = kernels.product_dtype(x.dtype, x.device.type)
            low = nn.functional.linear(x.to(dtype), b[1].to(dtype))
            return y + nn.functional.linear(low, b[0].to(dtype)).to(y.dtype)
        return y + x.sum(1, keepdim=True) * b[0].to(y.dtype) if b else y

    def _merged_bias(self) -> Tensor | None:
        """b + W c + d o b + e, fp32 `[out]`; None where there is nothing to add."""
        parts = []
        if self.bias is not None:
            d = list(self.pieces("D").values())
            parts.append(self.bias.float() * (1 + d[0]) if d else self.bias.float())
        parts += [e.expand(self.out_features) for e in self.pieces("E").values()]
        c = list(self.pieces("C").values())
        if c:
            prompt = c[0] if len(c) == 1 else (c[0] * c[1].T).sum(1)
            parts.append(ops.matmul(prompt[None].float(), self.quant_tensor)[0])
        return sum(parts[1:], parts[0]) if parts else None

    # -------------------------------------------------------------------------------------------------- merging

    def _dense(self, term: str) -> Tensor:
        """A or B as something that broadcasts to `[out, in]`."""
        pieces, kind = list(self.pieces(term).values()), getattr(self.config, term)
        if kind == "lora":
            return pieces[0] @ pieces[1]
        if kind in ("rows", "vector"):
            return pieces[0][:, None]
        return pieces[0] if pieces else torch.zeros((), device=self.device)

    @torch.no_grad()
    def merged(self) -> tuple[Tensor, Tensor | None]:
        """The one weight `[out, in]` and bias `[out]`, fp32 and dense, that compute what the terms do."""
        return self.dequantize() * (1 + self._dense("A")) + self._dense("B"), self._merged_bias()

    @torch.no_grad()
    def merge(self, search: bool = True) -> float:
        """Become a QuantLinear again, in the same format, with the terms inside its weight and bias.

        The merged weight is quantized anew, except where A only scales rows and B is none: then the scales take it. At
        2 bits that costs as much as a small update adds (measured: for updates of 2 to 10 % of W, 0.98 to 1.07 of the
        update's norm with a search, 1.28 to 1.62 without), so there the terms are better kept beside the weight.

        Args:
            search: as in `qft.quantize`: the scales of least error instead of the absmax.

        Returns:
            What storing it cost: ||stored - merged|| / ||merged|| of the weight.

        Raises:
            FormatError: a merged scale does not fit its type. ValueError: a merged weight is not finite.
        """
        weight, bias = self.merged()
        q, config = self.quant_tensor, self.config
        untouched = (config.A, config.B) == ("none", "none")
        if config.B == "none" and config.A in ("rows", "constant") and self.format.scale != "dq":
            q = q.with_scales(q.scales * (1 + self._dense("A")), self.format.scale)
        elif not untouched:
            q = quantize(weight, self.format, search=search, name="the merged weight")
        norm = weight.norm().item()
        error = 0.0 if untouched or not norm else (q.dequantize() - weight).norm().item() / norm
        if not untouched:
            self.set_quantized(q)
        if bias is not None:
            now = self.bias
            dtype, trains = (torch.float32, False) if now is None else (now.dtype, now.requires_grad)
            self.bias = nn.Parameter(bias.to(dtype), requires_grad=trains)
        self.release()
        return error

    def release(self) -> None:
        """Drop the terms and be a QuantLinear again; the base is as it was."""
        super().release()
        self.__dict__.pop("config", None)

    def extra_repr(self) -> str:
        terms = "".join(f", {field.name}={getattr(self.config, field.name)}" for field in fields(GLoRAConfig))
        return f"{super().extra_repr()}, glora_rank={self.glora_rank}{terms}"


# ------------------------------------------------------------------------------------------------------------ models


def add_glora(model: nn.Module, rank: int) -> nn.Module:
    """Make every QuantLinear of a model a GLoRALinear, in place; its config is all none until one is set or sampled.

    Args:
        rank: r of the terms that are `lora`; a layer that cannot hold it takes what it can.

    Returns:
        The model itself.

    Raises:
        ValueError: the model holds no QuantLinear, a layer has such an adapter already, or the rank is no positive
            whole number.
    """
    for path, layer in bare_layers(model).items():
        held = min(rank, layer.in_features, layer.out_features)
        if held < rank:
            say_once(f"{path} has {held} features on one side: its adapter takes rank {held}, not {rank}")
        GLoRALinear.adopt(layer, held)
    return model


def glora_layers(model: nn.Module) -> dict[str, GLoRALinear]:
    """The GLoRALinear layers of a model by path.

    Raises:
        ValueError: there are none.
    """
    return adapted_layers(model, GLoRALinear, "qft.add_glora(model, rank)")


def sample_glora(model: nn.Module, generator: torch.Generator) -> RemovableHandle:
    """Train a model's GLoRA layers as a supernet: each forward pass in training mode draws a config for each layer.

    The draw is the model's, not the layer's, so that a checkpointed layer computes the same again in backward. Pieces
    that a draw leaves out get no gradient in that step: what `prepare_for_training` says of them is as it should be,
    and DistributedDataParallel needs `find_unused_parameters=True`.

    Args:
        generator: whose draws are used; ranks of one job need one seed.

    Returns:
        A handle whose `remove()` ends the sampling.

    Raises:
        ValueError: the model holds no GLoRALinear.
    """
    layers = glora_layers(model)

    def draw(module: nn.Module, inputs: Any) -> None:
        if module.training:
            for layer in layers.values():
                layer.use(layer.sample(generator))

    return model.register_forward_pre_hook(draw)


def merge_glora(model: nn.Module, search: bool = True) -> dict[str, float]:
    """Merge each GLoRALinear of a model, as its config has it, into a QuantLinear, in place.

    Args:
        search: as in `GLoRALinear.merge`.

    Returns:
        What `GLoRALinear.merge` does, by path.

    Raises:
        ValueError: the model holds no GLoRALinear.
    """
    return {path: layer.merge(search) for path, layer in glora_layers(model).items()}
