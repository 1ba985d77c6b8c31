"""CuTe's layouts: the statement of fragment and tile layouts that the emulator's twins are checked against.

A layout is a pair (shape, stride) of nested tuples of one form. It maps an integer, taken as a coordinate with the
first mode running fastest, to the sum of coordinates times strides.
"""

Nested = int | tuple


def _flat(nested: Nested) -> list[int]:
    return [nested] if isinstance(nested, int) else [leaf for part in nested for leaf in _flat(part)]


def offset(layout: tuple[Nested, Nested], index: int) -> int:
    """Where the layout puts element `index`."""
    shape, stride = layout
    total = 0
    for size, step in zip(_flat(shape), _flat(stride), strict=True):
        total += index % size * step
        index //= size
    assert index == 0, "the index lies outside the layout"
    return total


def swizzle(bits: int, base: int, shift: int, address: int) -> int:
    """CuTe's Swizzle<bits, base, shift>: `bits` bits from `base` up are XORed with those `shift` above them."""
    mask = ((1 << bits) - 1) << base
    return address ^ (address >> shift & mask)
