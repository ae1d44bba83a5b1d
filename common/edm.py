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
