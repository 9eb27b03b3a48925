"""Which form runs, and what is said where it is a slower one than the device has."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from recollect.kernels import missing, multi_token, triton
from recollect.kernels.compile import compiler
from recollect.kernels.dispatch import SlowerFormWarning, recorded
from recollect.ops import Mixing, forms, multi_token_attention
from recollect.ops.delta_scan import delta_rule_scan
from recollect.ops.miras import MirasSpec, scan
from recollect.ops.miras.biases import BIASES
from recollect.ops.miras.memories import matrix, mlp
from recollect.ops.miras.retentions import l2 as l2_retention
from recollect.ops.miras.rules import gd
from recollect.ops.miras.scan import BACKENDS as SCANS
from recollect.ops.miras.scan import LACKS, Call
from recollect.ops.multi_token import choose

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C compiler on this machine")


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(forms, "_told", set())


def said(run) -> list[str]:
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in found if issubclass(warning.category, SlowerFormWarning)]


def large(n_tokens: int = 1024) -> tuple[Tensor, Mixing]:
    """Queries and kernels of more taps than the compiled form has."""
    return torch.zeros(1, n_tokens, 2, 4), Mixing(kq_pre=torch.zeros(2, 17, 33))


@needs_compiler
def test_a_slower_form_is_told_once_for_each_reason() -> None:
    """Prevents a kernel of one tap too many from costing 22 times as much without a word, and a warning at every step."""
    q, mixing = large()
    (text,) = said(lambda: choose(q, q, mixing))
    assert text == (
        "multi_token_attention runs as 'blocked', several times slower than 'native', which cannot: it has kernels of at most "
        "16 queries x 32 keys. Naming it, backend='blocked', silences this."
    )
    assert said(lambda: choose(q, q, mixing)) == []
    (other,) = said(lambda: choose(q, q, Mixing(kq_pre=torch.zeros(2, 2, 3, 3))))
    assert "merged over pairs of heads" in other


def test_nothing_is_told_where_it_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents noise: a short call, decoding, a form that was asked for, the fast form itself, a call inside torch.compile."""
    q, mixing = large()
    short, _ = large(1023)
    token = torch.zeros(2048, 1, 2, 4)
    keys = torch.zeros(2048, 9, 2, 4)
    assert said(lambda: choose(short, short, mixing)) == []
    assert said(lambda: choose(token, keys, mixing)) == []
    assert said(lambda: choose(q, q, mixing, "blocked")) == []
    if compiler():
        assert said(lambda: choose(q, q, Mixing(kq_pre=torch.zeros(2, 16, 31)))) == []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert said(lambda: choose(q, q, mixing)) == []


def test_a_missing_compiler_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a machine without a compiler from being several times slower without anybody's knowing."""
    monkeypatch.setattr(multi_token, "_built", lambda *shape: False)
    monkeypatch.setattr(missing, "compiler", lambda: None)
    q, _ = large()
    (text,) = said(lambda: [choose(q, q, Mixing(kq_pre=torch.zeros(2, 3, c_k))) for c_k in (3, 5)])
    assert "there is no C compiler on the PATH (install cc, gcc or clang)" in text


def test_an_error_says_why() -> None:
    """Prevents "cannot run here" without a reason."""
    q, mixing = large(4)
    with pytest.raises(RuntimeError, match=r"'native' cannot run .*at most 16 queries x 32 keys; pass backend='blocked'"):
        multi_token_attention(q, q, q, **mixing._asdict(), backend="native")
    with pytest.raises(RuntimeError, match=r"'fla' cannot run delta_rule_scan here: .*; pass backend='chunked'"):
        delta_rule_scan(q, q, q, q[..., 0], backend="fla")
    with pytest.raises(
        RuntimeError, match=r"'native' cannot run scan of memory 'mlp' here: it has no bias 'huber' with \('switch', "
    ):
        written("huber", 4, backend="native", options=("switch",))


def written(bias: str, n_tokens: int, *, backend: str | None = None, memory=mlp, options: tuple = ()) -> None:
    """A scan of one of the biases, a threshold given to those that take one."""
    made = BIASES[bias](*options)
    spec = MirasSpec(memory=memory(), bias=made, retention=l2_retention(), rule=gd(), chunk_size=16)
    q = torch.randn(1, n_tokens, 1, 16)
    gates = {name: torch.ones(1, n_tokens, 1) for name in made.gates}
    parameters = spec.memory.init(1, 16, 16)
    scan(spec, q, q, q, gates, parameters=parameters, backend=backend)


@needs_compiler
def test_memories_tell_too() -> None:
    """Prevents a bias without a kernel from running slowly unseen; one matrix has no kernel on a CPU to be missed."""
    (text,) = said(lambda: written("huber", 1024, options=("switch",)))
    assert "scan of memory 'mlp' runs as 'chunked', several times slower than 'native', which cannot: it has no bias" in text
    assert said(lambda: written("l2", 1024)) == []
    assert said(lambda: written("huber", 1024, memory=matrix, options=("switch",))) == []


# Bias and options -> whether a perceptron has it: compiled for a CPU, in Triton.
BUILT_IN: dict[tuple[str, tuple], tuple[bool, bool]] = {
    ("dot_product", ()): (False, False),
    ("l2", ()): (True, True),
    ("l1", ()): (True, True),
    ("lp", ()): (True, True),
    ("lp", (1.5,)): (True, True),
    ("l_infinity", ()): (True, True),
    ("huber", ()): (True, True),
    ("huber", ("norm",)): (True, True),
    ("huber", ("switch",)): (False, False),
    ("huber", ("switch_rms",)): (False, False),
    ("pseudo_huber", ()): (True, True),
    ("value_shift", ()): (True, True),
}


def test_every_bias_is_listed() -> None:
    """Prevents a bias from being added without a word on which kernels have it."""
    assert {name for name, _ in BUILT_IN} == set(BIASES)


@needs_compiler
@pytest.mark.parametrize(("bias", "built_in"), BUILT_IN.items(), ids=lambda x: str(x))
def test_biases_are_built_in_or_named_in_the_reason(
    bias: tuple[str, tuple], built_in: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a bias that is refused without being named, or that is taken by a kernel that has no code for it."""
    monkeypatch.setattr(triton, "nowhere", lambda x: "")
    name, options = bias
    calls: list[Call] = []
    monkeypatch.setitem(SCANS, "chunked", lambda call: calls.append(call) or (call.inputs.v, call.state))
    written(name, 4, backend="chunked", options=options)
    for lacks, has in zip((LACKS["native"], LACKS["triton"]), built_in, strict=True):
        assert (lacks(calls[0]) == "") == has
        if not has:
            assert name in lacks(calls[0])


@needs_compiler
def test_what_was_taken_is_recorded() -> None:
    """Prevents a run's record from claiming a form that did not run, inside torch.compile too."""
    q, mixing = large(4)
    with recorded() as taken:
        multi_token_attention(q, q, q)
        written("l2", 4)
    multi_token_attention(q, q, q, **mixing._asdict())
    assert taken == {("multi_token_attention", "native"), ("scan of memory 'mlp'", "native")}
    torch._dynamo.reset()
    with recorded() as taken:
        torch.compile(lambda q: multi_token_attention(q, q, q, **mixing._asdict()), fullgraph=True, backend="eager")(q)
    assert taken == {("multi_token_attention", "blocked")}
