"""The Elucidated Diffusion Model (EDM) for vectors of unit variance: Karras et al. 2022, arXiv 2206.00364.

Data x (B, D) are normalised to mean 0, std 1 per feature (`Moments`), so sigma_data = 1. `net` is F of the paper:
net(c_in x, ln σ / 4, *condition) -> (B, D). A denoiser D(x; σ) is any function of x (B, D) and σ, so guidance is a
function of denoisers: it acts wherever the sampler evaluates one, at both stages of every step.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise

import torch
import torch.nn as nn

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # noise levels when sampling [EDM Table 1]
P_MEAN, P_STD = -1.2, 1.2  # of ln σ in training [EDM Table 1]
CHURN_MIN, CHURN_MAX, CHURN_NOISE = 0.05, 50.0, 1.003  # [EDM Table 5, ImageNet; SynthER]

Denoiser = Callable[[torch.Tensor, float], torch.Tensor]


def denoise(net: nn.Module, x: torch.Tensor, sigma: torch.Tensor, *condition: torch.Tensor) -> torch.Tensor:
    """D(x; σ) = c_skip x + c_out F(c_in x, ln σ / 4): x (B, D), sigma (B,) -> (B, D).  [EDM Eq. 7, Table 1]"""
    s = sigma[:, None]
    scale = (1 + s.square()).rsqrt()
    return scale.square() * x + s * scale * net(scale * x, sigma.log() / 4, *condition).to(x)


def draw_sigma(rows: int, device: torch.device) -> torch.Tensor:
    """Noise levels for training, (rows,): ln σ ~ N(-1.2, 1.2²).  [EDM Table 1]"""
    return (P_MEAN + P_STD * torch.randn(rows, device=device)).exp()


def loss(net: nn.Module, x: torch.Tensor, sigma: torch.Tensor, *condition: torch.Tensor) -> torch.Tensor:
    """E λ(σ) ||D(x + σ n; σ) - x||² / D, λ = (σ² + 1) / σ²: x (B, D), sigma (B,) -> ().  [EDM Eq. 2, Table 1]

    1 in expectation for F = 0 on N(0, I), and at most 1 at the optimum for any data of unit variance.
    """
    error = denoise(net, x + sigma[:, None] * torch.randn_like(x), sigma, *condition) - x
    return (error.square().mean(1) * (sigma.square() + 1) / sigma.square()).mean()


def sigma_grid(steps: int) -> list[float]:
    """σ_0 = 80 > ... > σ_{steps-1} = 0.002, then 0; float64 on the host.  [EDM Eq. 5]"""
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return [(high + i / max(steps - 1, 1) * (low - high)) ** RHO for i in range(steps)] + [0.0]


def sample(d: Denoiser, x: torch.Tensor, steps: int, churn: float, first: int = 0) -> torch.Tensor:
    """Stochastic Heun: x (B, D) at noise level sigma_grid(steps)[first] -> (B, D).  [EDM Algorithm 2]

    churn 0 is the deterministic ODE; with few steps churn widens the samples (std 1.05 at 32 steps, 1.01 without).
    2 (steps - first) - 1 evaluations of `d`.
    """
    gamma_max = min(churn / steps, math.sqrt(2) - 1)
    for sigma, after in pairwise(sigma_grid(steps)[first:]):
        gamma = gamma_max if CHURN_MIN <= sigma <= CHURN_MAX else 0.0
        hat = sigma * (1 + gamma)
        if gamma > 0:
            x = x + CHURN_NOISE * math.sqrt(hat**2 - sigma**2) * torch.randn_like(x)
        slope = (x - d(x, hat)) / hat
        end = x + (after - hat) * slope
        if after > 0:
            end = x + (after - hat) * 0.5 * (slope + (end - d(end, after)) / after)
        x = end
    return x


def with_guidance(conditional: Denoiser, unconditional: Denoiser, w: float) -> Denoiser:
    """(1 + w) D_c - w D_u: classifier-free guidance of strength w.  [CFDG Eq. 7 = AD2S Eq. 11]"""
    if w == 0:
        return conditional
    return lambda x, sigma: (1 + w) * conditional(x, sigma) - w * unconditional(x, sigma)


def with_energy(d: Denoiser, gradient: Denoiser) -> Denoiser:
    """D - σ² ∇E: adds σ ∇E to the slope, the score of p e^{-E}; `gradient` x (B, D), σ -> ∇E (B, D)."""
    return lambda x, sigma: d(x, sigma) - sigma**2 * gradient(x, sigma)


class Moments:
    """Mean and std of each feature of rows (N, D), on the device; features past `raw` keep mean 0, std 1."""

    def __init__(self, features: int, raw: int, device: torch.device):
        """`raw` trailing features stay as they are (a 0/1 flag of termination)."""
        self.mean, self.std = torch.zeros(features, device=device), torch.ones(features, device=device)
        self.fitted = features - raw

    def fit(self, tables: Sequence[torch.Tensor], weights: Sequence[float] | None = None) -> None:
        """Moments of the mixture of `tables` (N_i, D), weighted by rows unless `weights` are given; in place."""
        total = sum(len(t) for t in tables)
        shares = [len(t) / total for t in tables] if weights is None else [w / sum(weights) for w in weights]
        means = [t[:, : self.fitted].mean(0, dtype=torch.float64) for t in tables]
        squares = [t[:, : self.fitted].double().square().mean(0) for t in tables]
        mean = sum(w * m for w, m in zip(shares, means, strict=True))
        var = (sum(w * s for w, s in zip(shares, squares, strict=True)) - mean.square()).clamp(min=0)
        self.mean[: self.fitted], self.std[: self.fitted] = mean.float(), var.sqrt().float() + 1e-5

    def normalize(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows - self.mean) / self.std

    def denormalize(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.std + self.mean

    def state_dict(self) -> dict:
        return {"mean": self.mean.clone(), "std": self.std.clone()}

    def load_state_dict(self, state: dict) -> None:
        self.mean.copy_(state["mean"])
        self.std.copy_(state["std"])


class EMA:
    """Running average of a module's parameters, moved every 10th gradient step.  [ema-pytorch, SynthER]

    After steps t = 0, 10, 20, ...: copies while t <= 100; then decay = min(0.995, 1 - (t - 99)^(-2/3)).
    """

    EVERY = 10

    def __init__(self, module: nn.Module):
        self.module = deepcopy(module).requires_grad_(False)
        self.step = torch.zeros((), device=next(module.parameters()).device)  # t of the next update

    def restart(self) -> None:
        """The next update copies."""
        self.step.zero_()

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """After step t; nothing in here waits for the device."""
        decay = (1 - (self.step - 99).clamp(min=1).pow(-2 / 3)).clamp(max=0.995)
        share = torch.where(self.step <= 100, 1.0, 1 - decay)
        for mine, other in zip(self.module.parameters(), module.parameters(), strict=True):
            mine.lerp_(other, share)
        for a, b in zip(self.module.buffers(), module.buffers(), strict=True):
            a.copy_(b)
        self.step.add_(self.EVERY)

    def state_dict(self) -> dict:
        return {"module": self.module.state_dict(), "step": self.step.clone()}

    def load_state_dict(self, state: dict) -> None:
        self.module.load_state_dict(state["module"])
        self.step.copy_(state["step"])


def divergence(a: torch.Tensor, b: torch.Tensor, bins: int = 50) -> float:
    """Jensen-Shannon divergence in nats between histograms of two samples (N, D), mean over features.  [CFDG §5.2]"""
    both = torch.cat([a, b])
    total = 0.0
    for k in range(a.shape[1]):
        low, high = both[:, k].min().item(), both[:, k].max().item()
        if high <= low:
            continue
        p, q = (torch.histc(x[:, k].float(), bins, low, high) / len(x) for x in (a, b))
        m = 0.5 * (p + q)
        total += 0.5 * sum(
            torch.where(x > 0, x * (x / m.clamp(min=1e-30)).log(), 0).sum().item() for x in (p, q)
        )
    return total / a.shape[1]


def nearest(x: torch.Tensor, tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """Distance of each row of x (M, D) to the nearest row of all `tables` (N_i, D) -> (M,)."""
    chunks = [chunk for t in tables for chunk in t.split(20_000)]
    # by differences: the products of the usual shortcut leave an exact copy at 1e-3
    distances = (torch.cdist(x, c, compute_mode="donot_use_mm_for_euclid_dist") for c in chunks)
    return torch.stack([d.amin(1) for d in distances]).amin(0)


def describe(
    synthetic: torch.Tensor,
    online: torch.Tensor,
    sources: Sequence[torch.Tensor],
    moments: Moments,
    obs_dim: int,
    act_dim: int,
) -> dict[str, float]:
    """What generated rows (N, D) are like, beside own rows and all those learned from, all [s, a, r, s', ...].

    Moments against the sources, L2 distance to the mean of the online rows [AD2S Fig. 3], median distance of 200 rows
    to the nearest source row (0: copies), both in normalised units, Jensen-Shannon divergences from the online rows
    [CFDG Table 2].
    """
    width = len(moments.mean)
    x, own, *real = (moments.normalize(t[:, :width]) for t in (synthetic, online, *sources))
    parts = {
        "states": slice(0, obs_dim),
        "actions": slice(obs_dim, obs_dim + act_dim),
        "rows": slice(0, width),
    }
    logs = {f"syn/js_{k}": divergence(x[:, c], own[:, c]) for k, c in parts.items()}
    total = Moments(width, 0, x.device)
    total.fit(real)
    moving = total.std > 1e-2  # not the constant features
    logs["syn/mean_gap"] = (x.mean(0) - total.mean).abs().max().item()
    logs["syn/std_ratio"] = (x.std(0, correction=0) / total.std)[moving].mean().item()
    logs["syn/online_l2"] = (x - own.mean(0)).norm(dim=1).mean().item()
    logs["syn/nearest"] = (
        nearest(x[torch.linspace(0, len(x) - 1, min(200, len(x))).long()], real).median().item()
    )
    return logs
