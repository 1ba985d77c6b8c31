"""Where these tests run, and how tensors get there and back."""

from dataclasses import replace

from torch import Tensor

from qft.tensor import QuantTensor

DEVICE = "cuda"
OWN = "cuda"  # the row of qft's own kernels
BOTH = (OWN, "panel")


def to(value, device: str):
    """A tensor, or a stored weight with all its tensors, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    assert isinstance(value, QuantTensor)
    return replace(value, **{name: tensor.to(device) for name, tensor in value.tensors().items()})


def there(value):
    return to(value, DEVICE)


def here(value):
    return to(value, "cpu")


def misaligned(tensor: Tensor) -> Tensor:
    """The same contiguous values on the device, one element past what the allocator aligned."""
    room = tensor.new_empty(tensor.numel() + 1, device=DEVICE)
    room[1:] = tensor.flatten()
    return room[1:].view(tensor.shape)
