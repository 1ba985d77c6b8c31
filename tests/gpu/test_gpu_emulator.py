"""The inputs of the SIMT emulator, on hardware: what the emulated kernels gave, the real ones give too."""

import shutil

import emulated
import pytest
import torch
from formats import BOUND, DTYPES, ODD, error, sample
from place import OWN, here, there
from test_kernels import each_dtype_where_it_matters, weight_of

import qft
from qft import kernels, native
from qft.format import Format

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the emulated kernels")

# A codebook and integers of even and odd width: compiling a code for the emulator takes half a minute.
REPLAYED = tuple(map(Format.parse, ("nf4 g64 dq", "nf4 g32 f32", "int3 g32 f16 zero", "int4 channel f32")))
TILES = ((33, 100), (64, 256), (19, 1160))


@pytest.fixture(scope="module", autouse=True)
def libraries():
    emulated.build(map(emulated.code_of, REPLAYED))


@pytest.mark.parametrize("fmt", REPLAYED, ids=str)
def test_quantize_and_dequantize_give_the_emulators_bits(fmt):
    for shape, dtype in each_dtype_where_it_matters(TILES):
        weight = sample(shape, dtype)
        wanted, got = emulated.quantize(weight, fmt), kernels.quantize(there(weight), fmt, OWN)
        for theirs, ours in zip(wanted[:3], got[:3], strict=True):
            assert (theirs is None) == (ours is None)
            assert theirs is None or torch.equal(here(ours), theirs)
        q = qft.quantize(weight, fmt)
        for out_dtype in DTYPES:
            assert torch.equal(here(kernels.dequantize(there(q), out_dtype, OWN)), emulated.dequantize(q, out_dtype))


@pytest.mark.parametrize("fmt", REPLAYED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_products_agree_with_the_emulators(fmt, dtype):
    """Levels are rounded alike; a tensor core adds in an order of its own, so that y may round to its neighbour."""
    for shape in TILES:
        q = qft.quantize(torch.randn(shape), fmt)
        for rows in (1, 9, 33):
            x = torch.randn(rows, shape[1]).to(dtype)
            ours, theirs = here(kernels.matmul(there(x), there(q), OWN)), emulated.matmul(x, q)
            exact = x.double() @ weight_of(q).T
            assert max(error(ours, exact), error(theirs, exact)) <= BOUND[dtype]
            assert error(ours, theirs.double()) <= BOUND[dtype] / 2


@pytest.mark.parametrize("fmt", REPLAYED, ids=str)
def test_reductions_agree_with_the_emulators(fmt):
    """Sums in fp32, in an order of the kernel's own that both follow."""
    q = qft.quantize(torch.randn(ODD), fmt)
    on_device, table = there(q), kernels._table_of(fmt, OWN)
    for dtype in DTYPES:
        dw = torch.randn(ODD).to(dtype)
        ds = torch.empty(ODD[0], fmt.groups(ODD[1]), device=there(dw).device)
        native.scale_grad(there(dw), on_device, (0, ODD[0]), ds, *table)
        assert error(here(ds), emulated.scale_grad(dw, q).double()) <= BOUND[torch.float32]
        a, b = torch.randn(300, 70).to(dtype), torch.randn(300, 70).to(dtype)
        total = native.dot_columns(there(a), there(b), on_device, *table)
        assert error(here(total), emulated.dot_columns(a, b).double()) <= BOUND[torch.float32]


def test_gradients_of_scales_that_are_0_agree_with_the_emulators():
    q = qft.quantize(torch.randn(ODD), REPLAYED[-1])
    q.weight_scales[::3] = 0
    for dtype in DTYPES:
        dy, x, ds = torch.randn(9, ODD[0]).to(dtype), torch.randn(9, ODD[1]).to(dtype), torch.randn(ODD[0])
        wanted, got = emulated.zero_scale_grad(dy, x, q, ds), there(ds.clone())
        native.zero_scale_grad(there(dy), there(x), there(q), got, *kernels._table_of(q.format, OWN))
        assert error(here(got), wanted.double()) <= BOUND[torch.float32]
        assert (wanted != ds).any()
