"""Multi-Token Attention: one attention weight depends on several queries, keys and heads. Talking Heads is the same with heads only.

Axis legend: B batch, T time, D model dim, H heads, Hkv key-value heads, K head dim, G groups of c_h heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recollect.mixers.attention import AttentionState, HeadConfig, Projections, empty_cache, extend_cache
from recollect.mixers.base import Mixer, register
from recollect.mixers.differential import depth_factor, rms_norm
from recollect.ops.attention import visible
from recollect.ops.multi_token import (
    Mixing,
    Rows,
    backends,
    check_mixing,
    key_padding,
    multi_token_attention,
    multi_token_rows,
    scores,
)

INITS = ("identity", "zero", "const", "uniform", "normal", "diagonal")
NORMS = ("none", "rms", "depth", "gate", "vector_gate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiTokenConfig(HeadConfig):
    """Options of Multi-Token Attention: those of `HeadConfig`, and the following. The defaults are the paper's second version.

    Attributes:
        kq: whether this layer has key-query convolutions at all (the paper: every 4th); head mixing, norm and gate are on every layer.
        kq_pre, kq_post: key-query convolution before / after the softmax.
        c_q, c_k: its size in queries (current and earlier) and keys.
        pad_key: keys reached: "both" (centred), "left" or "right".
        head_pre, head_post: head mixing before / after the softmax.
        c_h: heads mixed together, a divisor of n_heads; None: all.
        merged: where a side has both, one 3-D convolution with a kernel per ordered head pair instead of kernel, then matrix.
        norm: of each head's output: "none", "rms", "depth" (rms times 1 - lambda_init(layer)), "gate" (rms times a sigmoid of itself,
            one number per token and head), "vector_gate" (one number per channel).
        init, init_post: start of the kernels before / after the softmax: "identity", "zero", "const" (0.3), "uniform" (-1, 1),
            "normal" (std 0.3, our choice: the paper names it without a value), "diagonal" (query i - a with key j - a: "same phrase").
        backend: form of the op, "materialized", "blocked", "native" (on a CPU) or "triton" (on a GPU); None: the fastest that can run.
    """

    kq: bool = True
    kq_pre: bool = True
    kq_post: bool = True
    c_q: int = 6
    c_k: int = 11
    pad_key: str = "both"
    head_pre: bool = True
    head_post: bool = True
    c_h: int | None = None
    merged: bool = False
    norm: str = "gate"
    init: str = "identity"
    init_post: str = "identity"
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.c_q < 1 or self.c_k < 1:
            raise ValueError(f"c_q and c_k are at least 1; got c_q={self.c_q}, c_k={self.c_k}")
        if self.c_h is not None and (self.c_h < 1 or self.n_heads % self.c_h):
            raise ValueError(f"c_h must divide n_heads: c_h={self.c_h}, n_heads={self.n_heads}")
        for name, value, known in (
            ("norm", self.norm, NORMS),
            ("init", self.init, INITS),
            ("init_post", self.init_post, INITS),
        ):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}; got {value!r}")
        if self.backend is not None and self.backend not in backends():
            raise ValueError(f"backend is one of {', '.join(sorted(backends()))} or None; got {self.backend!r}")
        check_mixing(Mixing(torch.empty(1, self.c_q, self.c_k)), 1, self.pad_key)


class MultiTokenState(NamedTuple):
    """The key-value cache and the last c_q - 1 rows that each convolution reads."""

    cache: AttentionState
    rows: Rows


def every_fourth(layer: int, n_layers: int) -> dict[str, Any]:
    """Key-query convolutions in layers 2, 6, 10, ... (0-based), as in the paper; in the last layer of a model of one or two."""
    return {"kq": layer % 4 == min(2, n_layers - 1)}


_STATE = "2 Hkv K + (c_q - 1) H numbers per token and convolution"
_HEADS_ONLY = {"kq": False, "norm": "none"}
_V1 = {"kq_post": False, "head_pre": False, "c_h": 2, "norm": "depth"}
_TOY = {"c_q": 2, "c_k": 9, "kq_post": False, "head_pre": False, "head_post": False, "norm": "none"}


@register(
    "mta",
    config=MultiTokenConfig,
    pattern=every_fourth,
    summary="Multi-Token Attention (as mta_v2): kernels over queries and keys, head mixing, norm and gate",
    source="arXiv 2504.00927 v2",
    state=_STATE,
)
@register(
    "mta_v2",
    config=MultiTokenConfig,
    pattern=every_fourth,
    summary="Multi-Token Attention, second version: convolution and mixing on both sides of the softmax, scalar gate",
    source="arXiv 2504.00927 v2",
    state=_STATE,
)
@register(
    "mta_v1",
    config=MultiTokenConfig,
    options=_V1,
    pattern=every_fourth,
    summary="Multi-Token Attention, first version: convolution before, pairwise head mixing after, depth-scaled norm",
    source="arXiv 2504.00927 v1",
    state=_STATE,
)
@register(
    "mta_toy",
    config=MultiTokenConfig,
    options=_TOY,
    summary="Multi-Token Attention of the paper's toy task: one convolution before the softmax in every layer",
    source="arXiv 2504.00927 v2, section 4.1",
    state=_STATE,
)
@register(
    "talking_heads",
    config=MultiTokenConfig,
    options=_HEADS_ONLY,
    summary="Talking-Heads attention: all heads mixed before and after the softmax",
    source="arXiv 2003.02436",
    state="2 Hkv K numbers per token",
)
class MultiTokenAttention(Mixer):
    """Multi-Token Attention.

    Order: rotary q, k -> logits -> convolution -> head mixing -> softmax -> convolution -> head mixing -> dropout -> values -> per-head
    norm and gate -> output projection.

    Source: Golovneva et al. 2025, arXiv 2504.00927, section 3.
    """

    config: MultiTokenConfig

    def __init__(self, config: MultiTokenConfig) -> None:
        super().__init__(config)
        self.project = Projections(config.dim, config.n_heads, config.n_kv_heads, config.head_dim)
        heads, group = config.n_heads, config.c_h or config.n_heads

        def kernel(used: bool, mixed: bool) -> nn.Parameter | None:
            if not (used and config.kq):
                return None
            size = (heads, group, config.c_q, config.c_k) if config.merged and mixed else (heads, config.c_q, config.c_k)
            return nn.Parameter(torch.empty(size))

        def matrix(used: bool, convolved: bool) -> nn.Parameter | None:
            merged = config.merged and convolved and config.kq
            return nn.Parameter(torch.empty(heads // group, group, group)) if used and not merged else None

        self.kq_pre = kernel(config.kq_pre, config.head_pre)
        self.kq_post = kernel(config.kq_post, config.head_post)
        self.head_pre = matrix(config.head_pre, config.kq_pre)
        self.head_post = matrix(config.head_post, config.kq_post)
        size = self.project.head_dim
        self.norm_weight = nn.Parameter(torch.empty(size)) if config.norm != "none" else None
        gates = {"gate": 1, "vector_gate": size}.get(config.norm)
        self.gate = nn.Linear(size, gates) if gates else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights; mixing starts as the identity unless the config says otherwise (arXiv 2504.00927, section 4.6)."""
        self.project.reset_parameters()
        for kernel, init in ((self.kq_pre, self.config.init), (self.kq_post, self.config.init_post)):
            if kernel is not None:
                init_kernel(kernel, init, self.config.pad_key)
        for matrix in (self.head_pre, self.head_post):
            if matrix is not None:
                with torch.no_grad():
                    matrix.copy_(torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype).expand_as(matrix))
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)
        if self.gate is not None:
            std = self.config.dim**-0.5
            nn.init.trunc_normal_(self.gate.weight, std=std, a=-3 * std, b=3 * std)
            nn.init.zeros_(self.gate.bias)

    @property
    def mixing(self) -> Mixing:
        """The learned kernels and matrices of this layer."""
        return Mixing(self.kq_pre, self.head_pre, self.kq_post, self.head_post)

    def init_state(self, batch_size: int) -> MultiTokenState:
        """No keys, and zero rows above the first."""
        cache = empty_cache(self.project, batch_size)

        def none_above(kernel: Tensor | None) -> Tensor | None:
            if kernel is None:
                return None
            dtype = torch.promote_types(kernel.dtype, torch.float32)
            return torch.zeros(batch_size, self.config.n_heads, self.config.c_q - 1, 0, dtype=dtype, device=kernel.device)

        return MultiTokenState(cache, Rows(none_above(self.kq_pre), none_above(self.kq_post)))

    def forward(
        self,
        x: Tensor,
        state: MultiTokenState | None = None,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, MultiTokenState]:
        """x [B, T, D] -> y [B, T, D] and the grown state; see `Mixer.forward`."""
        q, k, v = self.project(x)
        cache, rows = (None, Rows()) if state is None else state
        q, cache, start = extend_cache(q, k, v, cache, self.config.rope_theta, mask, document_ids)
        heads, rows = multi_token_rows(
            q,
            cache.k,
            cache.v,
            self.mixing,
            rows,
            start=start,
            pad_key=self.config.pad_key,
            dropout_p=self.config.dropout if self.training else 0.0,
            backend=self.config.backend,
        )
        return self.project.out(self.normalise(heads)), MultiTokenState(cache, rows)

    def normalise(self, heads: Tensor) -> Tensor:
        """Per-head norm and gate: [B, T, H, K] -> [B, T, H, K]. Source: arXiv 2504.00927, section 3.3."""
        if self.norm_weight is None:
            return heads
        heads = rms_norm(heads, self.norm_weight)
        if self.config.norm == "depth":
            return (1 - depth_factor(self.config.layer)) * heads
        return heads if self.gate is None else heads * self.gate(heads).sigmoid()

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """{"before": softmax of the raw logits, "after": the weights that values are read with}, [B, H, T, T]."""
        q, k, v = self.project(x)
        q, cache, _ = extend_cache(q, k, v, None, self.config.rope_theta, None, None)
        length = x.shape[1]
        seen = visible(length, length, device=x.device)
        before = scores(q, cache.k, q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf")).softmax(-1)
        one_hot = (
            torch.eye(length, dtype=x.dtype, device=x.device)
            .expand(x.shape[0], cache.v.shape[2], length, length)
            .transpose(1, 2)
        )
        after = multi_token_attention(q, cache.k, one_hot, **self.mixing._asdict(), pad_key=self.config.pad_key)
        return {"before": before, "after": after.transpose(1, 2)}


def init_kernel(kernel: Tensor, init: str, pad_key: str) -> None:
    """Fill a key-query kernel [H, c_q, c_k] or [H, c_h, c_q, c_k] in place. Source: arXiv 2504.00927, section 4.6 and its code."""
    c_q, c_k = kernel.shape[-2:]
    same = key_padding(pad_key, c_k)[0]
    with torch.no_grad():
        if init in ("const", "uniform", "normal"):
            {
                "const": lambda: kernel.fill_(0.3),
                "uniform": lambda: kernel.uniform_(-1, 1),
                "normal": lambda: kernel.normal_(std=0.3),
            }[init]()
            return
        kernel.zero_()
        if init == "zero":
            return
        heads = range(kernel.shape[0])
        own = kernel if kernel.dim() == 3 else [kernel[head, head % kernel.shape[1]] for head in heads]
        for (
            head
        ) in heads:  # a head reads itself: the same key for the current query, and for "diagonal" key j - a for query i - a
            for a in range(1 if init == "identity" else min(c_q, same + 1)):
                own[head][c_q - 1 - a, same - a] = 1
