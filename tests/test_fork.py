"""A child of a process whose threads have run: every verb still answers, in time, and with the right numbers."""

import json

import pytest

# Runs the verbs in the parent first, so that its thread pools exist, then each one in a child of its own. A child that
# waits for threads it does not have is ended by its alarm.
PROGRAM = """
import json, os, signal, torch, qft
from qft import kernels

torch.set_num_threads(4)
torch.manual_seed(0)
weight, x, dy = torch.randn(1024, 1024), torch.randn(512, 1024), torch.randn(512, 1024)
few, half, dy_half = x[:1].clone(), x.bfloat16(), dy.bfloat16()
q, nested = qft.quantize(weight, "nf4 g64"), qft.quantize(weight, "int4 g32 dq zero")

def with_threads(verb, *inputs):
    torch.set_num_threads(3)
    output = verb(*inputs)
    torch.set_num_threads(1)
    return output

verbs = {
    "quantize": lambda: qft.quantize(weight, "nf4 g64").weight,
    "quantize dq": lambda: qft.quantize(weight, "int4 g32 dq zero").weight_scales,
    "quantize by the reference": lambda: qft.quantize(weight, "nf4 g64", kernel="reference").weight,
    "dequantize": lambda: q.dequantize(),
    "dequantize dq": lambda: nested.dequantize(torch.bfloat16),
    "scales dq": lambda: nested.scales,
    "unpack": lambda: q.unpack(),
    "matmul, 1 row": lambda: kernels.matmul(few, q),
    "matmul, 512 rows": lambda: kernels.matmul(x, q),
    "matmul, 512 rows, bf16": lambda: kernels.matmul(half, nested),
    "matmul, 512 rows, threads asked for": lambda: with_threads(kernels.matmul, x, q),
    "matmul_t, 1 row": lambda: kernels.matmul_t(few, q),
    "matmul_t, 512 rows": lambda: kernels.matmul_t(dy, q),
    "matmul_t, 512 rows, bf16": lambda: kernels.matmul_t(dy_half, nested),
    "scale_grad": lambda: kernels.scale_grad(dy, x, q),
    "scale_grad, bf16": lambda: kernels.scale_grad(dy_half, half, nested),
}

outcome = {}
for name, verb in verbs.items():
    expected = verb().double()
    torch.set_num_threads(4)
    (weight @ weight).sum()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        output = verb().double()
        os._exit(0 if (output - expected).norm() <= 1e-2 * expected.norm() else 1)
    outcome[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(outcome))
"""


def test_every_verb_answers_in_a_child(python):
    outcome = json.loads(python(PROGRAM, timeout=400))
    hung = [name for name, code in outcome.items() if code < 0]
    wrong = [name for name, code in outcome.items() if code > 0]
    assert (hung, wrong) == ([], [])
    assert len(outcome) == 16


@pytest.mark.parametrize("threads", [1, 4])
def test_a_child_runs_on_the_calling_thread_and_the_parent_as_before(python, threads):
    program = f"""
import os, torch, qft
from qft import native
torch.set_num_threads({threads})
before = native.threads()
child = os.fork()
if child == 0:
    os._exit(10 * native.threads() + torch.get_num_threads())
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(before, code, native.threads(), native.forked())
"""
    assert python(program) == f"{threads} 11 {threads} False\n"
