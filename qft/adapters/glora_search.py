"""GLoRA's evolutionary search (Chavan et al. 2023, section 3.3) for the config of each layer of a trained supernet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from .glora import PIECES, GLoRAConfig, GLoRALinear, glora_layers

Candidate = tuple[GLoRAConfig, ...]
T = TypeVar("T")
_TRIES = 10  # draws per wanted candidate: a small space runs out of new ones


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        configs: of each GLoRALinear, by path.
        fitness: theirs.
        parameters: how many they use.
        history: best fitness after the first population and after each generation; it never falls.
        evaluations: how often the fitness was asked for.
    """

    configs: dict[str, GLoRAConfig]
    fitness: float
    parameters: int
    history: tuple[float, ...]
    evaluations: int


def search_glora(
    model: nn.Module,
    fitness: Callable[[], float],
    generator: torch.Generator,
    *,
    population: int = 50,
    generations: int = 20,
    top: int = 10,
    mutations: int = 25,
    crossovers: int = 25,
    mutation_probability: float = 0.2,
    most_parameters: int | None = None,
) -> SearchResult:
    """Find the configs of highest fitness, and leave the model with them.

    Each generation mutates and crosses the best seen so far and fills up with random candidates; none is tried twice.
    Two things differ from the authors' code: the base itself (all terms none) is among the first candidates, so the
    result is never worse; and a candidate over the limit is cut to it, term by term at random, where theirs are drawn
    again, which under a tight limit goes on without end.

    Args:
        model: holds GLoRALinear layers, trained under `sample_glora`.
        fitness: called without gradients on the model in eval mode, under a candidate's configs; higher is better, and
            NaN is worse than anything.
        generator: makes all choices.
        population: candidates of the first generation, and least of the later ones.
        generations: how many follow the first.
        top: candidates that are mutated and crossed.
        mutations, crossovers: candidates made each way per generation.
        mutation_probability: of each term of each layer.
        most_parameters: limit on what a candidate uses over all layers; None is no limit.

    Raises:
        ValueError: the model holds no GLoRALinear, or a size or the probability is out of its range.
    """
    least = {"population": 1, "generations": 0, "top": 1, "mutations": 0, "crossovers": 0, "most_parameters": 0}
    given = (population, generations, top, mutations, crossovers, most_parameters or 0)
    for (name, bound), value in zip(least.items(), given, strict=True):
        if value < bound:
            raise ValueError(f"{name}={value} is less than {bound}, the least that makes a search")
    if not 0 <= mutation_probability <= 1:
        raise ValueError(f"mutation_probability={mutation_probability} is outside [0, 1]")
    search = _Search(glora_layers(model), fitness, generator, most_parameters)
    before, mode = search.configs(), model.training
    model.eval()
    try:
        with torch.no_grad():
            search.fill(search.base, 1)
            search.fill(search.random, population - 1)
            history = [search.scores[search.best(1)[0]]]
            for _ in range(generations):
                parents = search.best(top)
                made = search.fill(partial(search.mutated, parents, mutation_probability), mutations)
                made += search.fill(partial(search.crossed, parents), crossovers)
                search.fill(search.random, population - made)
                history.append(search.scores[search.best(1)[0]])
            search.use(search.best(1)[0])
    except BaseException:
        search.use(before)
        raise
    finally:
        model.train(mode)
    found = search.best(1)[0]
    configs = dict(zip(search.layers, found, strict=True))
    return SearchResult(configs, search.scores[found], search.size(found), tuple(history), len(search.scores))


class _Search:
    """The candidates tried so far, and ways to make others."""

    def __init__(
        self,
        layers: dict[str, GLoRALinear],
        fitness: Callable[[], float],
        generator: torch.Generator,
        limit: int | None,
    ) -> None:
        self.layers, self.fitness, self.generator, self.limit = layers, fitness, generator, limit
        self.scores: dict[Candidate, float] = {}
        # parameters of each kind of each term, layer by layer
        self.sizes: list[dict[str, dict[str, int]]] = [
            {
                term: {kind: layer.size(replace(GLoRAConfig(), **{term: kind})) for kind in kinds}
                for term, kinds in layer.choices().items()
            }
            for layer in layers.values()
        ]

    # ------------------------------------------------------------------------------------------------ candidates

    def base(self) -> Candidate:
        return tuple(GLoRAConfig() for _ in self.layers)

    def random(self) -> Candidate:
        return tuple(layer.sample(self.generator) for layer in self.layers.values())

    def mutated(self, parents: Sequence[Candidate], probability: float) -> Candidate:
        """One of the parents, with each term drawn anew at this probability."""
        parent = self._pick(parents)
        return tuple(
            GLoRAConfig(**{term: getattr(other if self._chance() < probability else own, term) for term in PIECES})
            for own, other in zip(parent, self.random(), strict=True)
        )

    def crossed(self, parents: Sequence[Candidate]) -> Candidate:
        """Each term from one of two parents."""
        pair = self._pick(parents), self._pick(parents)
        return tuple(
            GLoRAConfig(**{term: getattr(self._pick(both), term) for term in PIECES})
            for both in zip(*pair, strict=True)
        )

    def within_limit(self, candidate: Candidate) -> Candidate:
        """The candidate, its terms exchanged for smaller kinds, at random, until it keeps the limit."""
        if self.limit is None:
            return candidate
        kinds = [asdict(config) for config in candidate]
        over = self.size(candidate) - self.limit
        while over > 0:
            terms = [(at, term) for at, layer in enumerate(kinds) for term in PIECES if self._size(at, term, layer)]
            at, term = self._pick(terms)
            now = self._size(at, term, kinds[at])
            smaller = [kind for kind, size in self.sizes[at][term].items() if size < now]
            kinds[at][term] = self._pick(smaller)
            over -= now - self._size(at, term, kinds[at])
        return tuple(GLoRAConfig(**layer) for layer in kinds)

    def size(self, candidate: Candidate) -> int:
        return sum(self._size(at, term, asdict(config)) for at, config in enumerate(candidate) for term in PIECES)

    # ------------------------------------------------------------------------------------------------ scores

    def fill(self, make: Callable[[], Candidate], count: int) -> int:
        """Make and score up to `count` candidates that were not tried yet; how many there were."""
        made = 0
        for _ in range(_TRIES * count):
            if made == count:
                break
            candidate = self.within_limit(make())
            if candidate not in self.scores:
                self.use(candidate)
                score = float(self.fitness())
                self.scores[candidate] = -math.inf if math.isnan(score) else score
                made += 1
        return made

    def best(self, count: int) -> list[Candidate]:
        return sorted(self.scores, key=self.scores.__getitem__, reverse=True)[:count]

    def configs(self) -> Candidate:
        """What the model uses now."""
        return tuple(layer.config for layer in self.layers.values())

    def use(self, candidate: Candidate) -> None:
        for layer, config in zip(self.layers.values(), candidate, strict=True):
            layer.use(config)

    def _size(self, at: int, term: str, kinds: dict[str, str]) -> int:
        return self.sizes[at][term][kinds[term]]

    def _pick(self, items: Sequence[T]) -> T:
        return items[int(torch.randint(len(items), (), generator=self.generator, device=self.generator.device))]

    def _chance(self) -> float:
        return torch.rand((), generator=self.generator, device=self.generator.device).item()
