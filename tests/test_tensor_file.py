"""Files of tensors: readable by safetensors, pinned to the byte, and refused when a bit is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qft.disk import tensor_file
from qft.disk.tensor_file import DTYPE_NAMES, DTYPES, Stored
from qft.format import FormatError


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 2 if dtype == torch.bool else 50, shape).to(dtype)


SHAPES = ((), (0,), (1,), (3, 5), (2, 0, 3), (7, 2, 3))
TENSORS = {f"{name}.{list(shape)}": sample(dtype, shape) for name, dtype in DTYPES.items() for shape in SHAPES}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Same names, dtypes, shapes and bytes."""
    return a.keys() == b.keys() and all(
        (a[n].dtype, a[n].shape) == (b[n].dtype, b[n].shape) and Stored.of(a[n]) == Stored.of(b[n]) for n in a
    )


LAYOUTS = {
    "row-major": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_written_is_read_here_and_by_safetensors(tmp_path: Path, layout: Callable[[Tensor], Tensor]) -> None:
    tensors = {name: layout(tensor) for name, tensor in TENSORS.items()}
    written = tensor_file.write(tmp_path / "f", tensors, {"a": "b"})
    assert written == {name: Stored.of(tensor) for name, tensor in tensors.items()}
    mine, theirs = tensor_file.read(tmp_path / "f", written), load_file(tmp_path / "f")
    assert equal(mine, tensors)
    assert equal(theirs, tensors)
    assert tensor_file.read_metadata(tmp_path / "f") == {"a": "b"}
    assert all(t.is_contiguous() for t in mine.values())


def test_the_bytes_are_pinned(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([1, 2, 255], dtype=torch.uint8), "b": torch.tensor([[1.0, -2.0]])}
    tensor_file.write(tmp_path / "f", tensors, {"k": "v"})
    header = (
        b'{"__metadata__":{"k":"v"},"b":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}'
    )
    header += b" " * (-len(header) % 8)
    data = bytes.fromhex("0000803f000000c0") + bytes([1, 2, 255])
    assert (tmp_path / "f").read_bytes() == len(header).to_bytes(8, "little") + header + data


def test_a_read_tensor_does_not_depend_on_the_file(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(5000, dtype=torch.uint8), "b": torch.ones(3)}
    written = tensor_file.write(tmp_path / "f", tensors, {})
    read = tensor_file.read(tmp_path / "f", written)
    (tmp_path / "f").write_bytes(b"")
    assert equal(read, tensors)
    assert all(tensor.data_ptr() % 16 == 0 for tensor in read.values())


SMALL = {"x.weight": torch.arange(12, dtype=torch.uint8).view(3, 4), "x.weight_scales": torch.ones(3, 2)}


def test_a_flipped_bit_is_refused_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "f"
    written = tensor_file.write(path, SMALL, {})
    good, refusals = path.read_bytes(), []
    for position in range(len(good)):
        for bit in (0, 5):
            path.write_bytes(good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :])
            try:
                assert equal(tensor_file.read(path, written), SMALL)  # an unused byte, such as the header's padding
            except FormatError as error:
                refusals.append(str(error))
    assert len(refusals) >= 1.8 * len(good)
    assert all(str(path) in message and "\n" not in message for message in refusals)


def test_a_cut_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "f"
    written = tensor_file.write(path, SMALL, {})
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(FormatError, match="is damaged"):
            tensor_file.read(path, written)
        with pytest.raises(FormatError, match="is damaged"):
            tensor_file.read_metadata(path)


def file(header: bytes, data: int = 0, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(data)


BAD_FILES = {
    "huge header": file(b"{}", length=2**63),
    "header past the end": file(b"{}", length=1 << 20),
    "no JSON": file(b"abcd"),
    "no UTF-8": file(b'{"\xff":1}'),
    "nested": file(b"[" * 200_000),
    "negative size": file(b'{"x":{"dtype":"U8","shape":[-4],"data_offsets":[0,4]}}', 4),
    "unknown dtype": file(b'{"x":{"dtype":"U9","shape":[4],"data_offsets":[0,4]}}', 4),
    "size overflow": file(b'{"x":{"dtype":"U8","shape":[9223372036854775807,9],"data_offsets":[0,4]}}', 4),
    "gap": file(b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}', 8),
    "overlap": file(
        b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"y":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}', 6
    ),
}


ZEROS = torch.zeros(4, dtype=torch.uint8)


def test_the_bad_files_are_bad_for_their_own_reason(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(file(b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', 4))
    assert equal(tensor_file.read(tmp_path / "f", {"x": Stored.of(ZEROS)}), {"x": ZEROS})


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(FormatError, match="is damaged"):
        tensor_file.read(tmp_path / "f", {"x": Stored.of(ZEROS)})


OTHERS = {
    "a tensor less": ({"x.weight": SMALL["x.weight"]}, r"lacks x\.weight_scales;"),
    "a tensor more": (SMALL | {"evil": torch.ones(1)}, "holds evil, which does not belong"),
    "two more": (SMALL | {"a": torch.ones(1), "b": torch.ones(1)}, "holds a and 1 more tensors"),
    "another dtype": (SMALL | {"x.weight": SMALL["x.weight"].to(torch.int8)}, r"x\.weight in .* is I8 \[3, 4\]"),
    "another shape": (SMALL | {"x.weight": SMALL["x.weight"].T.contiguous()}, r"\[4, 3\] and must be U8 \[3, 4\]"),
    "another value": (SMALL | {"x.weight": SMALL["x.weight"] + 1}, r"x\.weight in .* has changed"),
}


@pytest.mark.parametrize(("tensors", "message"), OTHERS.values(), ids=OTHERS)
def test_another_file_is_refused_with_its_tensor(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    tensor_file.write(tmp_path / "f", tensors, {})
    with pytest.raises(FormatError, match=message) as refusal:
        tensor_file.read(tmp_path / "f", {name: Stored.of(tensor) for name, tensor in SMALL.items()})
    assert str(tmp_path / "f") in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("tensor", [torch.ones(2, device="meta"), torch.ones(2, dtype=torch.complex64)], ids=str)
def test_what_a_file_cannot_hold_is_refused_before_it_is_made(tmp_path: Path, tensor: Tensor) -> None:
    with pytest.raises(ValueError, match="x is"):
        tensor_file.write(tmp_path / "f", {"x": tensor}, {})
    assert not (tmp_path / "f").exists()


def test_no_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        tensor_file.read(tmp_path / "none", {})


def test_every_floating_dtype_of_a_model_has_a_name() -> None:
    assert {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64} <= set(DTYPE_NAMES)
