"""The models of the paper's Table 1, and the three new ones, as one expression each.

A preset is the recurrence; what a published layer has around it (convolutions, norms, gates and their generators) is in
`recollect.mixers`. Gates named in a docstring are what the model feeds to `scan`.
"""

from __future__ import annotations

from recollect.ops.miras.biases import dot_product, huber, l2, lp
from recollect.ops.miras.memories import gated_mlp, growing, matrix, mlp, slots
from recollect.ops.miras.retentions import kl, lq, none
from recollect.ops.miras.retentions import l2 as decay
from recollect.ops.miras.rules import gd, implicit, least_squares, momentum, multi_step, muon, nonparametric
from recollect.ops.miras.rules import omega as last_tokens
from recollect.ops.miras.spec import MirasSpec

__all__ = [
    "atlas",
    "delta_net",
    "delta_product",
    "gated_delta_net",
    "gla",
    "gsa",
    "hgrn2",
    "lightning",
    "linear_attention",
    "longhorn",
    "mamba2",
    "memora",
    "mesa",
    "moneta",
    "omega",
    "retnet",
    "rwkv7",
    "softmax_attention",
    "titans",
    "ttt_linear",
    "ttt_mlp",
    "yaad",
]


def moneta(p: float = 3.0, q: float = 4.0, mode: str = "safe", *, chunk_size: int = 16, read: str = "linear") -> MirasSpec:
    """l_p bias, l_q retention. Gates: eta, alpha.

    Args:
        p: exponent of the bias, at least 1.
        q, mode: exponent and form of the retention, see `lq`; "safe" takes q >= 2.
        chunk_size: see `MirasSpec`.
        read: see `MirasSpec`. With mode "ftrl" the linear read is rough (errors of 5 to 80 %): pass "exact".
    Raises:
        ValueError: what `lp`, `lq` or `MirasSpec` refuses.
    Source: arXiv 2504.13173, Eq. 24-25.
    """
    return MirasSpec(memory=mlp(), bias=lp(p), retention=lq(q, mode), rule=gd(), chunk_size=chunk_size, read=read)


def yaad(kind: str = "norm", *, chunk_size: int = 16) -> MirasSpec:
    """Huber bias, l2 retention. Gates: eta, alpha, delta.

    Args:
        kind: reading of the Huber loss, see `huber`. "norm" is ours: it alone stays stable over long texts (LOG.md).
        chunk_size: see `MirasSpec`.
    Raises:
        ValueError: unknown kind, or chunk_size < 1.
    Source: arXiv 2504.13173, Eq. 26.
    """
    return MirasSpec(memory=mlp(), bias=huber(kind), retention=decay(), rule=gd(), chunk_size=chunk_size)


def memora(*, chunk_size: int = 16, read: str = "linear") -> MirasSpec:
    """l2 bias, KL retention. Gates: eta, alpha.

    Args:
        chunk_size, read: see `MirasSpec`.
    Raises:
        ValueError: chunk_size < 1 or unknown read.
    Source: arXiv 2504.13173, Eq. 27.
    """
    return MirasSpec(memory=mlp(), bias=l2(), retention=kl(), rule=gd(), chunk_size=chunk_size, read=read)


def titans(depth: int = 2, *, chunk_size: int = 16) -> MirasSpec:
    """Titans' long-term memory. Gates: eta, alpha, momentum.

    Args:
        depth: matrices of the perceptron, at least 1.
        chunk_size: see `MirasSpec`.
    Raises:
        ValueError: either is below 1.
    Source: arXiv 2501.00663, Eq. 13-14.
    """
    return MirasSpec(memory=mlp(depth), bias=l2(), retention=decay(), rule=momentum(), chunk_size=chunk_size)


def ttt_linear(*, chunk_size: int = 16) -> MirasSpec:
    """TTT-Linear: one matrix with a norm and a residual. Gate: eta.

    Args:
        chunk_size: see `MirasSpec`; the paper's mini-batch, 16 tokens there.
    Raises:
        ValueError: chunk_size < 1.
    Source: arXiv 2407.04620, Eq. 7.
    """
    return MirasSpec(memory=mlp(1), bias=l2(), retention=none(), rule=gd(), chunk_size=chunk_size)


def ttt_mlp(*, chunk_size: int = 16) -> MirasSpec:
    """TTT-MLP: a perceptron of two matrices. Gate: eta.

    Args:
        chunk_size: as in `ttt_linear`.
    Raises:
        ValueError: chunk_size < 1.
    Source: arXiv 2407.04620, Eq. 7.
    """
    return MirasSpec(memory=mlp(), bias=l2(), retention=none(), rule=gd(), chunk_size=chunk_size)


def linear_attention() -> MirasSpec:
    """Linear attention (arXiv 2006.16236). No gates."""
    return MirasSpec(memory=matrix(), bias=dot_product(), retention=none(), rule=gd())


def retnet() -> MirasSpec:
    """RetNet (arXiv 2307.08621). Gate: alpha, a constant of each head."""
    return MirasSpec(memory=matrix(), bias=dot_product(), retention=decay(), rule=gd())


def lightning() -> MirasSpec:
    """Lightning Attention (arXiv 2401.04658). Gate: alpha, a constant of each head and layer."""
    return retnet()


def mamba2() -> MirasSpec:
    """Mamba2 (arXiv 2405.21060). Gates: alpha per head; eta, the discretised step."""
    return retnet()


def gla() -> MirasSpec:
    """Gated linear attention (arXiv 2312.06635). Gate: alpha per key channel."""
    return retnet()


def hgrn2() -> MirasSpec:
    """HGRN2 (arXiv 2404.07904). Gate: alpha per key channel; the key is 1 - alpha."""
    return retnet()


def gsa(n_slots: int = 64) -> MirasSpec:
    """Gated slot attention. Gate: alpha per slot, [B, T, H, n_slots].

    Args:
        n_slots: at least 1.
    Raises:
        ValueError: n_slots < 1.
    Source: arXiv 2409.07146.
    """
    return MirasSpec(memory=slots(n_slots), bias=dot_product(), retention=decay(), rule=gd())


def delta_net() -> MirasSpec:
    """DeltaNet (arXiv 2102.11174, 2406.06484). Gate: eta."""
    return MirasSpec(memory=matrix(), bias=l2(), retention=none(), rule=gd(), chunk_size=1)


def gated_delta_net() -> MirasSpec:
    """Gated DeltaNet (arXiv 2412.06464): the gradient is taken after the decay. Gates: eta, alpha."""
    return MirasSpec(memory=matrix(), bias=l2(), retention=decay(), rule=gd(), chunk_size=1, gradient_at="decayed")


def rwkv7() -> MirasSpec:
    """RWKV-7 (arXiv 2503.14456). Gates: alpha and eta per key channel, write; k is the key that is erased."""
    return MirasSpec(memory=matrix(), bias=l2(), retention=decay(), rule=gd(), chunk_size=1)


def longhorn() -> MirasSpec:
    """Longhorn (arXiv 2407.14207): the implicit step. Gate: eta, per value channel."""
    return MirasSpec(memory=matrix(), bias=l2(), retention=none(), rule=implicit(), chunk_size=1)


def delta_product(n: int = 2) -> MirasSpec:
    """Gated DeltaProduct: n delta steps per token. Gates: eta per step, [B, T, n, H]; alpha per token.

    Args:
        n: steps per token, at least 1, each on a key and value of its own (`multi_step`).
    Raises:
        ValueError: n < 1.
    Source: arXiv 2502.10297.
    """
    return MirasSpec(memory=matrix(), bias=l2(), retention=decay(), rule=multi_step(n), chunk_size=1, gradient_at="decayed")


def mesa(ridge: float = 1.0) -> MirasSpec:
    """The Mesa layer: least squares, solved exactly. Gates: eta, alpha.

    Args:
        ridge: weight of |M|^2, > 0.
    Raises:
        ValueError: ridge is not positive.
    Source: arXiv 2309.05858, 2506.05233.
    """
    return MirasSpec(memory=matrix(), bias=l2(), retention=decay(), rule=least_squares(ridge), chunk_size=1)


def omega(window: int = 4, *, chunk_size: int = 16) -> MirasSpec:
    """OmegaNet: descent on the last tokens. Gates: eta, alpha, gamma.

    Args:
        window: tokens per step, the current one included, at least 1.
        chunk_size: see `MirasSpec`.
    Raises:
        ValueError: either is below 1.
    Source: arXiv 2505.23735, Eq. 9.
    """
    return MirasSpec(memory=mlp(), bias=l2(), retention=decay(), rule=last_tokens(window), chunk_size=chunk_size)


def atlas(window: int = 4, *, gated: bool = False, chunk_size: int = 16) -> MirasSpec:
    """Atlas: Muon on the last tokens. Gates: eta, alpha, momentum, gamma.

    Args:
        window: as in `omega`.
        gated: Atlas++, whose memory is a gated perceptron.
        chunk_size: see `MirasSpec`; the step is taken once per chunk.
    Raises:
        ValueError: window or chunk_size is below 1.
    Source: arXiv 2505.23735, Eq. 32-33, without its polynomial features.
    """
    memory = gated_mlp(activation="gelu") if gated else mlp()
    return MirasSpec(memory=memory, bias=l2(), retention=decay(), rule=muon(window=window), chunk_size=chunk_size)


def softmax_attention() -> MirasSpec:
    """Softmax attention (arXiv 1706.03762): the non-parametric memory. No gates."""
    return MirasSpec(memory=growing(), bias=l2(), retention=none(), rule=nonparametric())
