"""Composition: adapters of several tasks as one adapter for another."""

from .library import Library as Library
from .lorahub import Composition as Composition
from .lorahub import lorahub as lorahub
from .ziplora import Zipped as Zipped
from .ziplora import ziplora as ziplora
