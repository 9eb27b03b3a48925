"""The delta rule: DeltaNet, Gated DeltaNet, DeltaProduct; and the least-squares memory of MesaNet.

Axis legend: B batch, T time, D model dim, H heads, K key dim and V value dim of a head, N steps per token.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recollect.mixers.base import register
from recollect.mixers.blocks import HeadNorm, draw_time_steps, exact, inverse_softplus, l2_normalize
from recollect.mixers.recurrent import (
    Branch,
    Cached,
    HeadSizeConfig,
    RecurrentMixer,
    check_width,
    empty_matrix,
    no_inputs,
    run_branches,
    zeros,
)
from recollect.mixers.stream import Steps
from recollect.ops.linear_scan import least_squares_scan
from recollect.ops.miras import MirasState, presets, scan


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(HeadSizeConfig):
    """Options: those of `HeadSizeConfig`, and

    Attributes:
        conv_width: taps of the short convolutions after q, k, v.
        negative_eigenvalues: let beta reach 2 instead of 1, so that a write can flip a sign (arXiv 2411.12537).
        output_gate: multiply the output by silu(W_g x) in the norm.
    """

    conv_width: int = 4
    negative_eigenvalues: bool = False
    output_gate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width("conv_width", self.conv_width)


@register(
    "delta_net",
    config=DeltaNetConfig,
    summary="DeltaNet: the memory is corrected by what it answers wrongly; short convolutions",
    source="arXiv 2406.06484",
    state="constant: K V numbers per head",
)
class DeltaNet(RecurrentMixer):
    """DeltaNet: S_t = S_{t-1} - beta_t (S_{t-1} k_t - v_t) k_t^T, y = W_o norm(S_t q_t).

    q, k, v = silu(conv(W x)), q and k of norm one (q scaled by K^(-1/2)), beta = sigmoid(W_b x). 4 D^2 parameters.

    Source: Yang et al. 2024, arXiv 2406.06484, sections 2.2 and 3.3.
    """

    config: DeltaNetConfig

    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__(config)
        dim, n_heads, size = config.dim, config.n_heads, config.value_dim
        self.q = Branch(dim, n_heads, config.key_dim, conv_width=config.conv_width)
        self.k = Branch(dim, n_heads, config.key_dim, conv_width=config.conv_width)
        self.v = Branch(dim, n_heads, size, conv_width=config.conv_width)
        self.beta = nn.Linear(dim, n_heads, bias=False)
        self.gate = nn.Linear(dim, n_heads * size, bias=False) if config.output_gate else None
        self.norm = HeadNorm(size)
        self.o = nn.Linear(n_heads * size, dim, bias=False)
        self.reset_parameters()

    def start(self, batch_size: int) -> tuple[MirasState, Cached]:
        """Zeros [B, H, V, K]."""
        return empty_matrix(self.o.weight, batch_size, self.config), no_inputs((self.q, self.k, self.v), batch_size)

    def mix(self, x: Tensor, memory: MirasState, inputs: Cached, steps: Steps) -> tuple[Tensor, MirasState, Cached]:
        """See `RecurrentMixer.mix`."""
        (q, k, v), inputs = run_branches((self.q, self.k, self.v), x, inputs, steps)
        q, k = l2_normalize(q) * self.config.key_dim**-0.5, l2_normalize(k)
        gates = {"eta": torch.sigmoid(self.beta(x)) * (2 if self.config.negative_eigenvalues else 1)}
        y, memory = scan(presets.delta_net(), q, k, v, gates, memory, reset=steps.reset, valid=steps.valid)
        y = self.norm(y, None if self.gate is None else self.gate(x).unflatten(-1, (self.config.n_heads, -1)))
        return self.o(y.flatten(2)), memory, inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(HeadSizeConfig):
    """Options: those of `HeadSizeConfig`, and

    Attributes:
        conv_width: taps of the short convolutions after q, k, v.
        negative_eigenvalues: let beta reach 2 instead of 1, so that a write can flip a sign (arXiv 2411.12537).
    """

    expand_k: float = 0.5
    conv_width: int = 4
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width("conv_width", self.conv_width)


class Forgetting(nn.Module):
    """One log decay per head and token, -exp(a) softplus(W x + b): Mamba-2's gate, as Gated DeltaNet has it."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, n_heads, bias=False)
        self.log_rate = nn.Parameter(torch.empty(n_heads))
        self.bias = nn.Parameter(torch.empty(n_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """exp(a) uniform on (0, 16), softplus(b) log-uniform on (0.001, 0.1)."""
        nn.init.trunc_normal_(self.linear.weight, std=self.linear.in_features**-0.5)
        self.log_rate.uniform_(0, 16).clamp_(min=1e-4).log_()
        draw_time_steps(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> log decay [B, T, H] < 0, in fp32 (fp64 for fp64)."""
        logits, log_rate, bias = exact(self.linear(x), self.log_rate, self.bias)
        return -log_rate.exp() * F.softplus(logits + bias)


@register(
    "gated_delta_net",
    config=GatedDeltaNetConfig,
    summary="Gated DeltaNet: the delta rule with Mamba-2's forgetting, norm per head, SiLU gate",
    source="arXiv 2412.06464",
    state="constant: K V numbers per head",
)
class GatedDeltaNet(RecurrentMixer):
    """Gated DeltaNet: S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, y = W_o (norm(S_t q_t) * silu(W_g x)).

    q, k, v = silu(conv(W x)), q and k of norm one (q scaled by K^(-1/2)), beta = sigmoid(W_b x), alpha as in `Forgetting`. V = 2 K as
    in the paper, whose keys have 0.75 D channels (6 D^2 parameters); here 0.5 D, for 4 D^2.

    Source: Yang et al. 2024, arXiv 2412.06464, Eq. 10 and section 3.4.
    """

    config: GatedDeltaNetConfig

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        super().__init__(config)
        dim, n_heads, size = config.dim, config.n_heads, config.value_dim
        self.q = Branch(dim, n_heads, config.key_dim, conv_width=config.conv_width)
        self.k = Branch(dim, n_heads, config.key_dim, conv_width=config.conv_width)
        self.v = Branch(dim, n_heads, size, conv_width=config.conv_width)
        self.beta = nn.Linear(dim, n_heads, bias=False)
        self.alpha = Forgetting(dim, n_heads)
        self.gate = nn.Linear(dim, n_heads * size, bias=False)
        self.norm = HeadNorm(size)
        self.o = nn.Linear(n_heads * size, dim, bias=False)
        self.reset_parameters()

    def start(self, batch_size: int) -> tuple[MirasState, Cached]:
        """Zeros [B, H, V, K]."""
        return empty_matrix(self.o.weight, batch_size, self.config), no_inputs((self.q, self.k, self.v), batch_size)

    def mix(self, x: Tensor, memory: MirasState, inputs: Cached, steps: Steps) -> tuple[Tensor, MirasState, Cached]:
        """See `RecurrentMixer.mix`."""
        (q, k, v), inputs = run_branches((self.q, self.k, self.v), x, inputs, steps)
        q, k = l2_normalize(q) * self.config.key_dim**-0.5, l2_normalize(k)
        beta = torch.sigmoid(self.beta(x)) * (2 if self.config.negative_eigenvalues else 1)
        gates = {"eta": beta, "log_alpha": self.alpha(x)}
        y, memory = scan(presets.gated_delta_net(), q, k, v, gates, memory, reset=steps.reset, valid=steps.valid)
        y = self.norm(y, self.gate(x).unflatten(-1, (self.config.n_heads, -1)))
        return self.o(y.flatten(2)), memory, inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaProductConfig(HeadSizeConfig):
    """Options: those of `HeadSizeConfig`, and

    Attributes:
        n_steps: N, delta-rule steps per token, each with its own key, value and beta.
        conv_width: taps of the short convolutions after q, k, v.
        negative_eigenvalues: let beta reach 2 instead of 1: products of reflections are rotations.
        forget: whether there is a decay.
    """

    expand_k: float = 0.5
    expand_v: float = 0.5
    n_steps: int = 2
    conv_width: int = 4
    negative_eigenvalues: bool = True
    forget: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_steps < 1:
            raise ValueError(f"n_steps counts the delta-rule steps per token: at least 1; got {self.n_steps}")
        check_width("conv_width", self.conv_width)


@register(
    "delta_product",
    config=DeltaProductConfig,
    summary="DeltaProduct: several delta-rule steps per token, so a product of Householder matrices",
    source="arXiv 2502.10297",
    state="constant: K V numbers per head",
)
class DeltaProduct(RecurrentMixer):
    """Gated DeltaProduct: a decay, then N steps S <- S (I - beta_j k_j k_j^T) + beta_j v_j k_j^T; the rest as Gated DeltaNet.

    ((1 + N) expand_k + (2 + N) expand_v) D^2 parameters: 3.5 D^2 by default. The paper keeps the head size and takes fewer heads to
    match sizes; here all heads get narrower, with V = K.

    Source: Siems et al. 2025, arXiv 2502.10297, section 3.
    """

    config: DeltaProductConfig

    def __init__(self, config: DeltaProductConfig) -> None:
        super().__init__(config)
        dim, n_heads, n_steps, size = config.dim, config.n_heads, config.n_steps, config.value_dim
        self.q = Branch(dim, n_heads, config.key_dim, conv_width=config.conv_width)
        self.k = Branch(dim, n_steps * n_heads, config.key_dim, conv_width=config.conv_width)
        self.v = Branch(dim, n_steps * n_heads, size, conv_width=config.conv_width)
        self.beta = nn.Linear(dim, n_steps * n_heads, bias=False)
        self.alpha = Forgetting(dim, n_heads) if config.forget else None
        self.gate = nn.Linear(dim, n_heads * size, bias=False)
        self.norm = HeadNorm(size)
        self.o = nn.Linear(n_heads * size, dim, bias=False)
        self.reset_parameters()

    def start(self, batch_size: int) -> tuple[MirasState, Cached]:
        """Zeros [B, H, V, K]."""
        return empty_matrix(self.o.weight, batch_size, self.config), no_inputs((self.q, self.k, self.v), batch_size)

    def mix(self, x: Tensor, memory: MirasState, inputs: Cached, steps: Steps) -> tuple[Tensor, MirasState, Cached]:
        """See `RecurrentMixer.mix`."""
        n_steps, n_heads = self.config.n_steps, self.config.n_heads
        (q, k, v), inputs = run_branches((self.q, self.k, self.v), x, inputs, steps)
        q, k = l2_normalize(q) * self.config.key_dim**-0.5, l2_normalize(k)
        beta = torch.sigmoid(self.beta(x)) * (2 if self.config.negative_eigenvalues else 1)
        k, v, beta = (t.unflatten(2, (n_steps, n_heads)) for t in (k, v, beta))
        gates = {"eta": beta} if self.alpha is None else {"eta": beta, "log_alpha": self.alpha(x)}
        spec = presets.delta_product(n_steps)
        y, memory = scan(spec, q, k, v, gates, memory, reset=steps.reset, valid=steps.valid)
        y = self.norm(y, self.gate(x).unflatten(-1, (n_heads, -1)))
        return self.o(y.flatten(2)), memory, inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class MesaConfig(HeadSizeConfig):
    """Options: those of `HeadSizeConfig`, and

    Attributes:
        conv_width: taps of the short convolutions after q and k.
        ridge_floor: smallest regularisation.
        output_gate: multiply the output by silu(W_g x) in the norm.
    """

    conv_width: int = 4
    ridge_floor: float = 0.25
    output_gate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ridge_floor < 1:
            raise ValueError(f"ridge_floor lies in (0, 1), below the initial regularisation of 1; got {self.ridge_floor}")
        check_width("conv_width", self.conv_width)


@register(
    "mesa",
    config=MesaConfig,
    summary="MesaNet: the memory is the optimal linear map for all tokens so far, by regularised least squares",
    source="arXiv 2506.05233",
    state="constant: K V + K^2 numbers per head",
)
class Mesa(RecurrentMixer):
    """Mesa layer: y = W_o norm(G_t (P_t + Diag(lambda))^(-1) q_t), G_t = gamma_t G_{t-1} + beta_t v_t k_t^T, P_t alike with k_t k_t^T.

    q, k = silu(conv(W x)) of norm one, v = W x; gamma, beta = sigmoid(W x + b) per head; lambda = softplus(p) + 0.25 per key channel,
    one at the start. Solved exactly, where the authors' code takes 30 conjugate-gradient steps. 4 D^2 parameters.

    Source: von Oswald et al. 2025, arXiv 2506.05233, section 3.
    """

    config: MesaConfig

    def __init__(self, config: MesaConfig) -> None:
        super().__init__(config)
        dim, n_heads, size = config.dim, config.n_heads, config.value_dim
        self.q = Branch(dim, n_heads, config.key_dim, conv_width=config.conv_width)
        self.k = Branch(dim, n_heads, config.key_dim, conv_width=config.conv_width)
        self.v = Branch(dim, n_heads, size)
        self.gamma = nn.Linear(dim, n_heads)
        self.beta = nn.Linear(dim, n_heads)
        self.ridge = nn.Parameter(torch.empty(n_heads, config.key_dim))
        self.gate = nn.Linear(dim, n_heads * size, bias=False) if config.output_gate else None
        self.norm = HeadNorm(size)
        self.o = nn.Linear(n_heads * size, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights; a regularisation of one."""
        super().reset_parameters()
        self.ridge.copy_(inverse_softplus(torch.full_like(self.ridge, 1 - self.config.ridge_floor)))

    def start(self, batch_size: int) -> tuple[tuple[Tensor, Tensor], Cached]:
        """Zeros [B, H, V, K] and [B, H, K, K]."""
        n_heads, key_dim = self.config.n_heads, self.config.key_dim
        memory = (
            zeros(self.o.weight, batch_size, n_heads, self.config.value_dim, key_dim),
            zeros(self.o.weight, batch_size, n_heads, key_dim, key_dim),
        )
        return memory, no_inputs((self.q, self.k), batch_size)

    def mix(
        self, x: Tensor, memory: tuple[Tensor, Tensor], inputs: Cached, steps: Steps
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Cached]:
        """See `RecurrentMixer.mix`."""
        (q, k), inputs = run_branches((self.q, self.k), x, inputs, steps)
        v, _ = self.v(x, None, steps)
        gamma, beta, ridge = exact(self.gamma(x), self.beta(x), self.ridge)
        y, memory = least_squares_scan(
            l2_normalize(q),
            l2_normalize(k),
            v,
            F.logsigmoid(gamma),
            memory,
            eta=torch.sigmoid(beta),
            ridge=F.softplus(ridge) + self.config.ridge_floor,
            reset=steps.reset,
            valid=steps.valid,
        )
        y = self.norm(y, None if self.gate is None else self.gate(x).unflatten(-1, (self.config.n_heads, -1)))
        return self.o(y.flatten(2)), memory, inputs
