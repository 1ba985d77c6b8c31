"""Intruder dimensions (Shuttleworth et al., NeurIPS 2025): directions a LoRA puts at the top that the base never had.

PEFT's `reduce_intruder_dimension` does this for PEFT's LoRA on dense weights; here the base is packed, W_0 what its
codes stand for, and the LoRA is QuantLinear's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters.peft_format import Factors, lora_factors, lora_layers
from ..nn.linear import QuantLinear

TOP_K = 10  # the authors' find_intruder_dimensions.py, and PEFT's
EPSILON = 0.5
LAMBDA = 0.75  # PEFT's

OnLayer = Callable[[int, int], None]


@dataclass(frozen=True)
class IntruderLayer:
    """One layer with a LoRA.

    Attributes:
        path: of the layer.
        cosines: of the top k left singular vectors of W_0 + ΔW, largest singular value first: the largest |cosine|
            with any left singular vector of W_0.
        singular_values: theirs.
        intruders: places in these of the vectors whose cosine is below epsilon.
    """

    path: str
    cosines: tuple[float, ...]
    singular_values: tuple[float, ...]
    intruders: tuple[int, ...]


@dataclass(frozen=True)
class IntruderReport:
    """The intruder dimensions of a model's LoRA.

    Attributes:
        layers: those with a LoRA.
        top_k, epsilon: what was asked for.
    """

    layers: tuple[IntruderLayer, ...]
    top_k: int
    epsilon: float

    @property
    def total(self) -> int:
        """Intruders of all layers together."""
        return sum(len(layer.intruders) for layer in self.layers)

    def __str__(self) -> str:
        lines = [f"{layer.path}: {len(layer.intruders)} of {len(layer.cosines)}" for layer in self.layers]
        asked = f"top {self.top_k} singular vectors, |cosine| below {self.epsilon:g}"
        return "\n".join([*lines, f"{self.total} intruder dimensions in {len(self.layers)} layers ({asked})"])


def find_intruders(
    model: nn.Module, top_k: int = TOP_K, epsilon: float = EPSILON, on_layer: OnLayer | None = None
) -> IntruderReport:
    """Count the intruder dimensions of every layer that carries a LoRA (Shuttleworth et al., section 3, algorithm 1).

    A left singular vector y_j among the top k of W_0 + ΔW is an intruder if max_i |cos(u_i, y_j)| < epsilon over all
    left singular vectors u_i of W_0, the dequantized weight. Two fp32 SVDs of `[out, in]` per layer.

    Args:
        model: holds QuantLinear layers with LoRA. It is not changed.
        top_k: 1 or more; a layer of fewer features has fewer.
        epsilon: in (0, 1].
        on_layer: called with (layers done, layers in all).

    Raises:
        ValueError: no layer carries a LoRA, or an argument is out of range.
    """
    return _visit(model, top_k, epsilon, on_layer, lambda layer, factors, vectors: None)


def reduce_intruders(
    model: nn.Module,
    lam: float = LAMBDA,
    top_k: int = TOP_K,
    epsilon: float = EPSILON,
    *,
    keep_rank: bool = True,
    on_layer: OnLayer | None = None,
) -> IntruderReport:
    """Scale the intruder dimensions of a model's LoRA by lam, in place: less is forgotten, and less of the task kept.

    The update becomes ΔW + (lam − 1) Σ σ_j y_j z_jᵀ over the intruders, with σ, y and z from the SVD of W_0 + ΔW
    (Shuttleworth et al., section 5). It stays a LoRA: the best of the same rank, as PEFT's, or exact with up to one
    rank more for each intruder. Codes and scales stay, and so does the LoRA of layers without intruders.

    Args:
        lam: in [0, 1]; 1 changes nothing, 0 takes the intruders out.
        keep_rank: cut the new update to the rank it had; otherwise it grows.
        model, top_k, epsilon, on_layer: as `find_intruders`.

    Returns:
        The intruders there were.

    Raises:
        ValueError: as `find_intruders`, or lam is out of range.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam={lam} is outside [0, 1]: 1 keeps the intruder dimensions, 0 removes them")

    def reduce(layer: QuantLinear, factors: Factors, vectors: tuple[Tensor, Tensor, Tensor]) -> None:
        if lam < 1:
            _shrink(layer, factors, vectors, lam, keep_rank)

    return _visit(model, top_k, epsilon, on_layer, reduce)


@torch.no_grad()
def _visit(
    model: nn.Module,
    top_k: int,
    epsilon: float,
    on_layer: OnLayer | None,
    handle: Callable[[QuantLinear, Factors, tuple[Tensor, Tensor, Tensor]], None],
) -> IntruderReport:
    """Describe every layer, and hand those with intruders on with their U `[out, n]`, S `[n]`, Vᵀ `[n, in]`."""
    if top_k < 1 or not 0 < epsilon <= 1:
        raise ValueError(f"top_k={top_k} and epsilon={epsilon} must be 1 or more, and in (0, 1]")
    layers, factors = lora_layers(model), lora_factors(model)
    found = []
    for done, (path, layer) in enumerate(layers.items(), start=1):
        with torch.autocast(layer.device.type, enabled=False):
            base = layer.dequantize()
            a, b = factors[path].unscaled()
            u, _, _ = torch.linalg.svd(base, full_matrices=False)
            y, s, zt = torch.linalg.svd(base.addmm_(b, a), full_matrices=False)
            y, s, zt = y[:, :top_k], s[:top_k], zt[:top_k]
            cosines = (u.T @ y).abs().amax(dim=0)
            places = (cosines < epsilon).nonzero().flatten()
            found.append(
                IntruderLayer(path, tuple(cosines.tolist()), tuple(s.tolist()), tuple(map(int, places.tolist())))
            )
            if len(places):
                handle(layer, factors[path], (y[:, places], s[places], zt[places]))
        if on_layer:
            on_layer(done, len(layers))
    return IntruderReport(tuple(found), top_k, epsilon)


def _shrink(
    layer: QuantLinear, factors: Factors, vectors: tuple[Tensor, Tensor, Tensor], lam: float, keep_rank: bool
) -> None:
    """Give the layer the LoRA of ΔW + (lam − 1) U S Vᵀ, with the scaling and dropout it had."""
    u, s, vt = vectors
    a, b = factors.unscaled()
    root = s.sqrt()
    a, b = torch.cat([a, root[:, None] * vt]), torch.cat([b, (lam - 1) * root * u], dim=1)
    largest = factors.shape.rank if keep_rank else min(layer.in_features, layer.out_features)
    if len(a) > largest:
        a, b = _cut(a, b, largest)
    scaling, dropout = factors.shape.scaling, float(getattr(layer.lora_dropout, "p", 0.0))
    alpha, rslora = (factors.alpha, factors.rslora) if keep_rank else (scaling * len(a), False)
    layer.remove_lora()
    layer.add_lora(len(a), alpha, dropout, rslora, a / scaling**0.5, b / scaling**0.5)


def _cut(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of this rank of the product B A, through QR: no matrix `[out, in]` is made."""
    q_out, r_out = torch.linalg.qr(b)
    q_in, r_in = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(r_out @ r_in.T)
    root = s[:rank].sqrt()
    return root[:, None] * (vt[:rank] @ q_in.T), q_out @ u[:, :rank] * root
