"""Intrinsic dimension (Aghajanyan et al., ACL 2021): how few numbers it takes to learn a task.

All weight matrices move inside one random subspace of d dimensions: W_i = W0_i + lambda_i P_i theta (SAID, section 3.2;
lambda_i per layer counts into d; without it, DID). The least d that reaches 90 % of what full tuning gains is d90.

P is a Fastfood matrix (Le et al., ICML 2013), blocks of H G Pi H B: B random signs, Pi a permutation, G Gaussian, H the
Walsh-Hadamard matrix. It is drawn anew from a seed whenever it is needed and never stored. So W0 stays packed: a
layer's offset P_i theta exists, as a dense `[out, in]`, only while the layer runs forward or backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.targets import matches

CHUNK = 1 << 20  # entries drawn at a time: what a projection holds beside its result
SHARE = 0.9


def walsh_hadamard(x: Tensor) -> Tensor:
    """H x along the last dimension, not normalised: `[..., n]` with n a power of two, in n log n additions.

    Raises:
        ValueError: n is no power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Walsh-Hadamard transform of {n} values does not exist; pad to a power of two")
    shape, half = x.shape, 1
    while half < n:
        pairs = x.reshape(-1, n // (2 * half), 2, half)
        x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        half *= 2
    return x.reshape(shape)


@dataclass(frozen=True)
class Fastfood:
    """A random linear map from d to n dimensions, drawn from its seed at every use.

    Entries have variance 1 / norm², so that where the n of all maps together is norm², they keep lengths on average.
    The numbers depend on the kind of device: a generator of the CPU draws others than one of a GPU.

    Attributes:
        d, n: its shape, both 1 or more.
        seed: of the draw.
        norm: what it is divided by; sqrt(n) keeps ‖P theta‖ near ‖theta‖.
    """

    d: int
    n: int
    seed: int
    norm: float

    @property
    def block(self) -> int:
        """Values of one H G Pi H B: the power of two from d on."""
        return 1 << (self.d - 1).bit_length()

    def apply(self, theta: Tensor) -> Tensor:
        """P theta: `[n]` for `[d]`, in theta's dtype."""
        padded = nn.functional.pad(theta, (0, self.block - self.d))
        parts = []
        for signs, order, gauss in self._draws(theta):
            mixed = walsh_hadamard(padded * signs).gather(1, order)
            parts.append(walsh_hadamard(mixed * gauss).flatten())
        return torch.cat(parts)[: self.n] / self._scale

    def apply_t(self, delta: Tensor) -> Tensor:
        """Pᵀ delta: `[d]` for `[n]`, in delta's dtype."""
        total, first = delta.new_zeros(self.block), 0
        for signs, order, gauss in self._draws(delta):
            part = delta[first : first + gauss.numel()]
            part = nn.functional.pad(part, (0, gauss.numel() - len(part))).view_as(gauss)
            mixed = torch.zeros_like(part).scatter(1, order, walsh_hadamard(part) * gauss)
            total += (walsh_hadamard(mixed) * signs).sum(0)
            first += gauss.numel()
        return total[: self.d] / self._scale

    @property
    def _scale(self) -> float:
        return self.norm * math.sqrt(self.block)  # an entry of H G Pi H B is a sum of `block` Gaussians

    def _draws(self, like: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """B, Pi and G of a few blocks at a time, each `[blocks, block]`."""
        generator = torch.Generator(like.device).manual_seed(self.seed)
        at_a_time, left = max(1, CHUNK // self.block), math.ceil(self.n / self.block)
        drawn: dict[str, Any] = {"device": like.device, "generator": generator}  # fp32 whatever theta's dtype
        while left:
            shape = (min(at_a_time, left), self.block)
            signs = torch.randint(0, 2, shape, **drawn).to(like.dtype) * 2 - 1
            order = torch.rand(shape, **drawn).argsort(dim=1)
            gauss = torch.randn(shape, **drawn).to(like.dtype)
            yield signs, order, gauss
            left -= shape[0]


class _Offset(torch.autograd.Function):
    """x (scale · P theta)ᵀ, whose dense offset is made in the forward pass and once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, scale: Tensor, projection: Fastfood, out: int) -> Tensor:
        ctx.save_for_backward(x, theta, scale)
        ctx.projection, ctx.out = projection, out
        return nn.functional.linear(x, _dense(projection, theta, scale, out).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, theta, scale = ctx.saved_tensors
        dx = dtheta = dscale = None
        if ctx.needs_input_grad[0]:
            dx = dy @ _dense(ctx.projection, theta, scale, ctx.out).to(dy.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            flat = (dy.flatten(0, -2).T @ x.flatten(0, -2).to(dy.dtype)).flatten().to(theta.dtype)
            along = ctx.projection.apply_t(flat)
            dtheta, dscale = scale * along, (along * theta).sum()
        return dx, dtheta, dscale, None, None


def _dense(projection: Fastfood, theta: Tensor, scale: Tensor, out: int) -> Tensor:
    return (scale * projection.apply(theta)).view(out, -1)


class Subspace(nn.Module):
    """The d numbers that train, in place of every weight of a model.

    Parameters: `theta` fp32 `[d - layers]` (`[d]` without `said`), zero at first, so that nothing changes; `scales`
    fp32 `[layers]`, lambda, one at first, with `said`. Built by `confine`; `remove()` takes it off the model.
    """

    def __init__(self, layers: dict[str, nn.Linear], d: int, seed: int, said: bool) -> None:
        super().__init__()
        free = d - len(layers) if said else d
        if free < 1:
            spent = f"{len(layers)} of them scale the layers" if said else "none is left"
            raise ValueError(f"d={d} leaves no dimension to train, {spent}; use {d - free + 1} or more, or said=False")
        device = next(iter(layers.values())).weight.device
        self.theta = nn.Parameter(torch.zeros(free, device=device))
        self.scales = nn.Parameter(torch.ones(len(layers), device=device), requires_grad=said)
        sizes = [layer.in_features * layer.out_features for layer in layers.values()]
        norm = math.sqrt(sum(sizes))
        seeds = torch.randint(0, 2**62, (len(sizes),), generator=torch.Generator().manual_seed(seed)).tolist()
        self.projections = {
            path: Fastfood(free, size, own, norm) for path, size, own in zip(layers, sizes, seeds, strict=True)
        }
        self._hooks = [
            layer.register_forward_hook(partial(self._add, path=path, place=place))
            for place, (path, layer) in enumerate(layers.items())
        ]

    @property
    def d(self) -> int:
        """Numbers that train."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def remove(self) -> None:
        """Let the layers compute what they did without."""
        for hook in self._hooks:
            hook.remove()

    def forward(self, x: Tensor) -> Tensor:
        """x itself: an nn.Sequential calls whatever submodule it is given."""
        return x

    def _add(self, layer: nn.Linear, given: tuple[Tensor], y: Tensor, path: str, place: int) -> Tensor:
        offset = _Offset.apply(given[0], self.theta, self.scales[place], self.projections[path], layer.out_features)
        return y + offset.to(y.dtype)  # type: ignore[no-untyped-call]


def confine(model: nn.Module, d: int, *, seed: int = 0, said: bool = True, targets: Iterable[str] = ("*",)) -> Subspace:
    """Let a model train in a random subspace of d dimensions and nowhere else, in place.

    Every other parameter is frozen. The subspace becomes the model's submodule `subspace`, so that a Trainer, or
    `qft.training.finetune.run`, trains and saves it. A step is a step of all weights together, so learning rates are
    large: ‖W - W0‖ over all layers is about ‖theta‖. `prepare_for_training`, if wanted, comes before: it freezes what
    it does not know.

    Args:
        model: its nn.Linear layers move, packed (QuantLinear) or dense; the output head, embeddings, norms and biases
            stay.
        d: numbers to train, the layers' scales among them.
        seed: of the subspace.
        said: one trained scale per layer (SAID), or none (DID).
        targets: layers that move: paths, last names or globs over paths.

    Raises:
        ValueError: d leaves nothing to train, no layer is named, or the model is confined already.
    """
    if hasattr(model, "subspace"):
        raise ValueError(f"{type(model).__name__} has a subspace already; call release(model) first")
    patterns = tuple(targets)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and any(matches(path, pattern) for pattern in patterns)
    }
    if not layers:
        raise ValueError(f"targets {', '.join(patterns)} name no linear layer of {type(model).__name__}")
    subspace = Subspace(layers, d, seed, said)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.subspace = subspace
    return subspace


def release(model: nn.Module) -> None:
    """Take the subspace off a model; what it learned goes with it. The other parameters stay frozen."""
    subspace: Any = model.subspace
    subspace.remove()
    del model.subspace


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        d90: the least d measured that reached the share; None where none did.
        scores: the score of each d that was measured.
    """

    d90: int | None
    scores: dict[int, float]


def find_d90(
    score: Callable[[int], float],
    start: float,
    full: float,
    *,
    least: int = 1,
    most: int = 1 << 20,
    share: float = SHARE,
) -> Search:
    """The smallest d whose training reaches `share` of what full tuning gains.

    Doubles d until it reaches, then halves the interval; the score is taken to improve with d.

    Args:
        score: trains in d dimensions and returns a score: a loss, a perplexity or an accuracy.
        start: the score without training.
        full: the score of full tuning; above `start` or below, as the score has it.
        least, most: range of d.
        share: 0.9 is d90.

    Raises:
        ValueError: full tuning changed nothing, or a range or share that is none.
    """
    if full == start or not (math.isfinite(full) and math.isfinite(start)):
        raise ValueError(f"full tuning goes from {start} to {full}, which leaves no gain to reach; train it longer")
    if not (1 <= least <= most and 0 < share <= 1):
        raise ValueError(f"least={least}, most={most}, share={share}: use 1 <= least <= most and 0 < share <= 1")
    scores: dict[int, float] = {}

    def reaches(d: int) -> bool:
        scores[d] = score(d)
        return (scores[d] - start) / (full - start) >= share

    below, above = least - 1, least
    while not reaches(above):
        if above == most:
            return Search(None, scores)
        below, above = above, min(2 * above, most)
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if reaches(middle) else (middle, above)
    return Search(above, scores)
