"""Diffusion-QL: schedule, chain, losses and gradients against closed forms, hand-made loops and finite differences."""

import gc
import math
from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU, Killed, equal_states, final_state, kill_after, log_rows, tiny_args

from algorithms import diffql
from common import run
from common.buffer import Batch, ReplayBuffer

OBS, ACT = 5, 2


def case(rows: int = 8, **settings) -> tuple:
    """Nets in double precision, copies moved away from their originals; a batch with terminal rows; draws; settings."""
    torch.manual_seed(0)
    args = diffql.Args(hidden=12, batch_size=rows, backup_actions=3, **settings)
    nets = diffql.make_diffql_nets(OBS, ACT, args).double()
    alpha_bar = torch.tensor(by_hand(args.denoise_steps)[1], dtype=torch.float64)
    with torch.no_grad():
        for p in nets.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for name in ("actor", "average"):  # in float32 so far
            nets[name].alpha_bar.copy_(alpha_bar)
            nets[name].frequencies.copy_(10_000 ** (-torch.arange(8).double() / 7))
    obs, next_obs = torch.randn(2, rows, OBS).double()
    actions = torch.rand(rows, ACT).double() * 2 - 1
    rewards, terminations = torch.randn(rows).double(), (torch.arange(rows) % 3 == 0).double()
    draws = diffql.draw_step(nets["actor"], args, CPU)
    draws = diffql.Draws(*(x.double() if x.is_floating_point() else x for x in draws))
    return nets, Batch(obs, actions, rewards, next_obs, terminations), draws, args


def by_hand(steps: int) -> tuple[list[float], list[float]]:
    """β and ᾱ for t = 1, ..., T as the paper writes them: 0.1 and 10 are the least and the largest rate."""
    betas = [
        1 - math.exp(-0.1 / steps - 0.5 * (10 - 0.1) * (2 * t - 1) / steps**2) for t in range(1, steps + 1)
    ]
    return betas, [float(x) for x in np.cumprod([1 - b for b in betas])]


def denoised_by_hand(actor: diffql.Denoiser, obs: torch.Tensor, x: torch.Tensor, t: int) -> torch.Tensor:
    """The noise estimate, layer by layer, one level for all rows; t counts from 0."""
    angles = [t / 10_000 ** (i / 7) for i in range(8)]
    row = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
    time = actor.time[2](F.mish(actor.time[0](row))).repeat(len(x), 1)
    h = torch.cat([x, time, obs], 1)
    for i in (0, 2, 4):
        h = F.mish(actor.net[i](h))
    return actor.net[6](h)


def chain_by_hand(actor: diffql.Denoiser, obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Ho et al.'s ancestral sampling in its second form: clipped x₀, then mean and variance of q(x_{t-1} | x_t, x₀)."""
    steps = len(noise)
    betas, bars = by_hand(steps)
    x = noise[0]
    for t in range(steps - 1, -1, -1):
        beta, bar, before = betas[t], bars[t], bars[t - 1] if t else 1.0
        eps = denoised_by_hand(actor, obs, x, t)
        clean = (math.sqrt(1 / bar) * x - math.sqrt(1 / bar - 1) * eps).clamp(-1, 1)
        mean = beta * math.sqrt(before) / (1 - bar) * clean
        mean = mean + (1 - before) * math.sqrt(1 - beta) / (1 - bar) * x
        variance = beta * (1 - before) / (1 - bar)
        x = mean if t == 0 else mean + math.sqrt(variance) * noise[steps - t]
    return x


def separate(stacked: diffql.MishTwinQ) -> list[nn.Sequential]:
    """Each critic as layers of its own, with parameters of its own."""
    critics = []
    for k in (0, 1):
        layers: list[nn.Module] = []
        for weight, bias in zip(stacked.weight, stacked.bias, strict=True):
            layer = nn.Linear(*weight.shape[1:]).double()
            layer.weight.data, layer.bias.data = weight[k].T.clone(), bias[k, 0].clone()
            layers += [layer, nn.Mish()]
        critics.append(nn.Sequential(*layers[:-1]))
    return critics


def q_by_hand(critic: nn.Module, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    return critic(torch.cat([obs, actions], 1))[:, 0]


class PointMass:
    """The exact ε̂ for data that are one action: (x - √ᾱ a) / √(1 - ᾱ). Keeps what it was asked for."""

    def __init__(self, steps: int, action: torch.Tensor):
        self.alphas, self.action, self.act_dim, self.asked = diffql.vp_alphas(steps), action, len(action), {}
        self.alpha_bar = torch.tensor(by_hand(steps)[1])

    def __call__(self, _obs: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.asked[int(t[0])] = x
        bar = self.alpha_bar[t][:, None]
        return (x - bar.sqrt() * self.action) / (1 - bar).sqrt()


class OneStep:
    """A chain of one step from noise x to end(x)."""

    alphas, act_dim, draws = [0.5], 1, 1

    def __init__(self, end: Callable[[torch.Tensor], torch.Tensor]):
        self.end = end

    def __call__(self, _obs: torch.Tensor, x: torch.Tensor, _t: torch.Tensor) -> torch.Tensor:
        return (x - math.sqrt(0.5) * self.end(x)) / math.sqrt(0.5)


# ---- schedule and chain ----


@pytest.mark.parametrize("steps", [1, 2, 5, 8, 20])
def test_what_is_left_of_an_action_is_a_gaussian_in_time(steps):
    """Σ (2t - 1) = k², so ᾱ_k = exp(-0.1 k/T - 4.95 (k/T)²); at the end exp(-5.05) for every T."""
    shares = np.arange(1, steps + 1) / steps
    assert np.cumprod(diffql.vp_alphas(steps)) == pytest.approx(np.exp(-0.1 * shares - 4.95 * shares**2))
    assert np.prod(diffql.vp_alphas(steps)) == pytest.approx(math.exp(-5.05))
    actor = diffql.Denoiser(OBS, ACT, 8, steps)
    assert actor.alpha_bar.tolist() == pytest.approx(by_hand(steps)[1], rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_chain_is_the_loop_written_by_hand(steps):
    nets, batch, draws, _ = case(denoise_steps=steps)
    for scale in (1.0, 0.2):  # far out nearly every step is clipped, near the middle hardly any
        noise = scale * draws.own
        got = diffql.run_chain(nets["actor"], batch.obs, noise)
        assert torch.allclose(got, chain_by_hand(nets["actor"], batch.obs, noise), rtol=0, atol=1e-12)
        assert got.abs().max() <= 1


def test_the_denoiser_takes_a_level_for_each_row_or_one_for_all():
    nets, batch, draws, _ = case()
    together = nets["actor"](batch.obs, batch.actions, draws.t)
    for i, t in enumerate(draws.t):
        one = batch.obs[i : i + 1], batch.actions[i : i + 1]
        assert torch.allclose(together[i : i + 1], denoised_by_hand(nets["actor"], *one, int(t)))
    same = nets["actor"](batch.obs, batch.actions, torch.tensor([2]))
    assert torch.allclose(same, denoised_by_hand(nets["actor"], batch.obs, batch.actions, 2))


def test_with_an_exact_denoiser_every_marginal_and_the_end_are_right():
    """Data at one action a: x_t ~ N(√ᾱ a, 1 - ᾱ) at each level on the way, and the chain ends at a."""
    torch.manual_seed(0)
    action, rows = torch.tensor([0.3, -0.8]), 200_000
    actor = PointMass(5, action)
    noise = torch.randn(5, rows, 2)
    bar = actor.alpha_bar[4]
    noise[0] = bar.sqrt() * action + (1 - bar).sqrt() * noise[0]  # where the forward process ends
    end = diffql.run_chain(actor, torch.zeros(rows, OBS), noise)
    assert torch.allclose(end, action.expand_as(end), atol=1e-5)
    for t, x in actor.asked.items():
        bar = actor.alpha_bar[t]
        assert torch.allclose(x.mean(0), bar.sqrt() * action, atol=0.01)
        assert torch.allclose(x.var(0), (1 - bar).expand(2), atol=0.01)
    t, eps = torch.randint(5, (64,)), torch.randn(64, 2)
    assert diffql.bc_loss(actor, torch.zeros(64, OBS), action.expand(64, 2), t, eps) < 1e-10


# ---- losses ----


def test_the_denoising_loss_is_the_mean_over_rows_of_hand_made_ones():
    nets, batch, draws, _ = case()
    _, bars = by_hand(5)
    total = 0.0
    for i, t in enumerate(draws.t.tolist()):
        x = math.sqrt(bars[t]) * batch.actions[i] + math.sqrt(1 - bars[t]) * draws.eps[i]
        total += (
            (denoised_by_hand(nets["actor"], batch.obs[i : i + 1], x[None], t)[0] - draws.eps[i])
            .square()
            .sum()
        )
    got = diffql.bc_loss(nets["actor"], batch.obs, batch.actions, draws.t, draws.eps)
    assert got.item() == pytest.approx(total.item() / (8 * ACT), rel=1e-12)


def test_the_q_term_is_minus_one_critic_over_the_others_size_and_only_the_first_is_learned():
    """-mean(1, -3) / mean(|2|, |4|) = 1/3, the other way round -3/2; the divisor has no gradient."""
    q = torch.tensor([[1.0, -3.0], [2.0, 4.0]], requires_grad=True)
    for coin, value, gradient in [
        (0.9, 1 / 3, [[-1 / 6, -1 / 6], [0, 0]]),
        (0.1, -1.5, [[0, 0], [-1 / 4, -1 / 4]]),
    ]:
        loss = diffql.normalised_q_loss(q, torch.tensor(coin))
        assert loss.item() == pytest.approx(value)
        assert torch.autograd.grad(loss, q)[0].tolist() == [pytest.approx(x) for x in gradient]


def test_the_q_term_does_not_feel_the_unit_of_rewards():
    q, coin = torch.randn(2, 50), torch.tensor(0.7)
    a, b = diffql.normalised_q_loss(q, coin), diffql.normalised_q_loss(1_000 * q, coin)
    assert a.item() == pytest.approx(b.item(), rel=1e-5)


def test_both_critics_are_followed_about_as_often():
    torch.manual_seed(0)
    args = diffql.Args(batch_size=2)
    actor = diffql.Denoiser(OBS, ACT, 4, 5)
    ups = sum(float(diffql.draw_step(actor, args, CPU).coin) > 0.5 for _ in range(2_000))
    assert abs(ups - 1_000) < 4 * math.sqrt(500)
    levels = torch.cat([diffql.draw_step(actor, args, CPU).t for _ in range(2_000)])
    counts = torch.bincount(levels, minlength=5)
    assert len(counts) == 5 and (counts - 800).abs().max() < 4 * math.sqrt(800)


def test_a_target_takes_the_best_action_of_each_critic_then_the_lower_critic():
    """Q₁ = a, Q₂ = -a of actions ±0.5: the best are 0.5 for both; min over critics first would give -0.5."""
    ends = torch.tensor([0.5, -0.5, 0.5, -0.5])[:, None]

    def critics(obs, actions):
        return torch.stack([actions[:, 0], -actions[:, 0]]) + obs[:, 0]

    nets = {"average": OneStep(lambda _: ends), "q_target": critics}
    q = diffql.next_q(nets, torch.tensor([[0.0], [10.0]]), torch.randn(1, 4, 1))
    assert q.tolist() == pytest.approx([0.5, 10.5])


@pytest.mark.parametrize("backup", [False, True])
@pytest.mark.parametrize("coin", [0.2, 0.8])
def test_all_losses_and_gradients_are_those_of_a_loop_over_separate_networks(backup, coin):
    nets, batch, draws, args = case(max_q_backup=backup, eta=2.0, gamma=0.9)
    draws = draws._replace(coin=torch.tensor(coin))
    many = 3 if backup else 1
    critics, targets = separate(nets["qf"]), separate(nets["q_target"])
    best = []
    with torch.no_grad():
        for target in targets:
            values = []
            for k in range(many):  # action k of each row
                actions = chain_by_hand(nets["average"], batch.next_obs, draws.following[:, k::many])
                values.append(q_by_hand(target, batch.next_obs, actions))
            best.append(torch.stack(values).amax(0))
    y = batch.rewards + 0.9 * (1 - batch.terminations) * torch.minimum(*best)
    assert torch.equal(y[batch.terminations == 1], batch.rewards[batch.terminations == 1])
    q_loss = sum(F.mse_loss(q_by_hand(c, batch.obs, batch.actions), y) for c in critics)
    q_loss.backward()
    wanted = {"qf": [[layer.weight.grad.T for layer in c if isinstance(layer, nn.Linear)] for c in critics]}
    own = chain_by_hand(nets["actor"], batch.obs, draws.own)
    first, second = critics if coin > 0.5 else critics[::-1]
    size = q_by_hand(second, batch.obs, own).abs().mean().detach()
    bars = torch.tensor(by_hand(5)[1], dtype=torch.float64)[draws.t][:, None]
    x = bars.sqrt() * batch.actions + (1 - bars).sqrt() * draws.eps
    cloning = F.mse_loss(nets["actor"](batch.obs, x, draws.t), draws.eps)
    actor_loss = cloning - 2.0 * q_by_hand(first, batch.obs, own).mean() / size
    wanted["actor"] = torch.autograd.grad(actor_loss, [*nets["actor"].parameters()])
    loss, logs = diffql.losses(nets, batch, draws, args)
    loss.backward()
    assert logs["loss/q"].item() == pytest.approx(q_loss.item(), rel=1e-10)
    assert logs["loss/actor"].item() == pytest.approx(actor_loss.item(), rel=1e-10)
    assert logs["loss/bc"].item() == pytest.approx(cloning.item(), rel=1e-10)
    assert loss.item() == pytest.approx((q_loss + actor_loss).item(), rel=1e-10)
    for layer, weight in enumerate(nets["qf"].weight):  # the actor's loss adds nothing to the critics
        for k in (0, 1):
            assert torch.allclose(weight.grad[k], wanted["qf"][k][layer], atol=1e-10)
    for p, gradient in zip(nets["actor"].parameters(), wanted["actor"], strict=True):
        assert torch.allclose(p.grad, gradient, atol=1e-10)
    assert all(p.grad is None for name in ("average", "q_target") for p in nets[name].parameters())


@pytest.mark.parametrize("steps", [1, 5])
def test_the_policy_gradient_through_the_chain_is_that_of_finite_differences(steps):
    """Central differences along random directions of the denoiser's parameters; some steps are clipped, some not."""
    nets, batch, draws, _ = case(rows=16, denoise_steps=steps, eta=3.0)
    actor, coin = nets["actor"], torch.tensor(0.9)
    noise = 0.3 * draws.own

    def q_term() -> torch.Tensor:
        q = diffql.frozen_q(nets["qf"], batch.obs, diffql.run_chain(actor, batch.obs, noise))
        return q[0].mean()  # without the divisor, which moves too but counts as a constant

    parameters = [*actor.parameters()]
    q = diffql.frozen_q(nets["qf"], batch.obs, diffql.run_chain(actor, batch.obs, noise))
    size = q[1].abs().mean().item()
    gradient = torch.autograd.grad(diffql.normalised_q_loss(q, coin), parameters)
    assert max(g.abs().max() for g in gradient) > 1e-6
    for seed in range(4):
        torch.manual_seed(seed)
        direction = [torch.randn_like(p) for p in parameters]
        values = []
        with torch.no_grad():
            for shift in (1e-6, -2e-6, 1e-6):
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(shift * d)
                values.append(q_term().item())
        slope = -(values[0] - values[1]) / 2e-6 / size
        along = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)).item()
        assert along == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_the_chain_passes_autograds_own_check():
    nets, batch, draws, _ = case(rows=3)
    noise = (0.3 * draws.own).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, obs: diffql.run_chain(nets["actor"], obs, x), (noise, batch.obs.requires_grad_())
    )


# ---- update ----


def test_target_average_and_clipping_by_hand():
    """The average stays until ema_start, moves every ema_every-th update; each network's step has its own bound."""
    settings = dict(ema_start=4, ema_every=2, ema_decay=0.75, polyak=0.1, grad_clip=0.5)
    nets, batch, draws, args = case(**settings)
    groups = [{"params": [*nets[name].parameters()]} for name in ("actor", "qf")]
    opt = torch.optim.SGD(groups, lr=1.0)
    for i in range(8):
        before = {
            k: [p.clone() for p in nets[k].parameters()] for k in ("actor", "average", "qf", "q_target")
        }
        loss, _ = diffql.losses(nets, batch, draws, args)
        raw = {
            k: torch.autograd.grad(loss, [*nets[k].parameters()], retain_graph=True) for k in ("actor", "qf")
        }
        diffql.update(nets, opt, loss, args)
        assert nets.updates.item() == i + 1
        for name, gradients in raw.items():
            norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
            share = min(1.0, 0.5 / norm)
            for p, old, g in zip(nets[name].parameters(), before[name], gradients, strict=True):
                assert torch.allclose(p, old - share * g, atol=1e-5)
        moved = i >= 4 and i % 2 == 0
        for p, old, live in zip(
            nets["average"].parameters(), before["average"], nets["actor"].parameters(), strict=True
        ):
            assert torch.allclose(p, 0.75 * old + 0.25 * live if moved else old)
        for p, old, live in zip(
            nets["q_target"].parameters(), before["q_target"], nets["qf"].parameters(), strict=True
        ):
            assert torch.allclose(p, 0.9 * old + 0.1 * live)


# ---- acting ----


def test_acting_draws_candidates_by_softmax_of_the_lower_critic():
    """Two candidates at ±0.5 of equal chance, min Q = a: P(+0.5) follows from the three kinds of pairs."""

    def critics(obs, actions):
        return torch.stack([actions[:, 0], actions[:, 0] + obs[:, 0].abs()])

    nets = {"actor": OneStep(lambda x: 0.5 * x.sign()), "q_target": critics}
    torch.manual_seed(0)
    actions = diffql.pick_action(nets, torch.ones(100_000, 1), 2)
    share = (actions > 0).double().mean().item()
    expected = 0.25 + 0.5 / (1 + math.exp(-1))  # both +, or one of each and then softmax(0.5, -0.5)
    assert share == pytest.approx(expected, abs=0.005)
    assert torch.allclose(actions.abs(), torch.tensor(0.5))


def test_candidates_belong_to_their_own_state():
    """With one candidate the action is the chain's at that state."""
    nets, batch, _, _ = case()
    nets = nets.float()
    obs = batch.obs.float()
    torch.manual_seed(3)
    got = diffql.pick_action(nets, obs, 1)
    noise = torch.randn(5, 8, ACT, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(got, diffql.run_chain(nets["actor"], obs, noise))


# ---- distillation ----


class Gaussian:
    """The exact v̂ for data N(m, s²) in each dimension: of v = cos φ ε - sin φ a, the mean given x."""

    act_dim, draws, mean, var = 1, 1, 0.2, 0.04

    def __init__(self, levels: int):
        self.levels = levels

    def __call__(self, _obs: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        phi = 0.5 * math.pi * (t[:, None] + 1).double() / self.levels
        left = x - phi.cos() * self.mean
        total = phi.cos() ** 2 * self.var + phi.sin() ** 2
        a, eps = self.mean + phi.cos() * self.var / total * left, phi.sin() / total * left
        return phi.cos() * eps - phi.sin() * a


class Halved:
    """What a perfect student of `teacher` answers."""

    act_dim, draws = 1, 1

    def __init__(self, teacher: Gaussian):
        self.teacher, self.levels = teacher, teacher.levels // 2

    def __call__(self, obs: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return diffql.halved_target(self.teacher, obs, x, t, self.levels)


def test_halving_to_one_step_keeps_where_each_noise_ends():
    """Perfect students from 8 levels to 1 have the teacher's action for every noise; many levels, the flow."""
    noise, obs = torch.linspace(-2, 2, 9).double()[None, :, None], torch.zeros(9, OBS)
    chain = Gaussian(8)
    wanted = diffql.quiet_chain(chain, obs, noise)
    assert wanted.abs().max() < 1, "clipping would hide errors"
    for levels in (4, 2, 1):
        chain = Halved(chain)
        assert chain.levels == levels
        assert torch.allclose(diffql.quiet_chain(chain, obs, noise), wanted, atol=1e-12)
    fine = diffql.quiet_chain(Gaussian(2_000), obs, noise)  # the flow of a Gaussian: m + s ε
    assert torch.allclose(fine, 0.2 + 0.2 * noise[0], atol=2e-3)


def test_the_v_loss_by_hand():
    torch.manual_seed(0)
    actor = diffql.VDenoiser(OBS, ACT, 8, 4)
    obs, actions, eps, t = (
        torch.randn(3, OBS),
        torch.rand(3, ACT),
        torch.randn(3, ACT),
        torch.tensor([0, 2, 3]),
    )
    total = 0.0
    for i, share in enumerate((0.25, 0.75, 1.0)):
        cos, sin = math.cos(0.5 * math.pi * share), math.sin(0.5 * math.pi * share)
        got = actor(obs[i : i + 1], (cos * actions[i] + sin * eps[i])[None], t[i : i + 1])[0]
        total += (got - (cos * eps[i] - sin * actions[i])).square().sum().item()
    assert diffql.v_loss(actor, obs, actions, t, eps).item() == pytest.approx(total / 6, rel=1e-5)
    halved = deepcopy(actor)
    halved.levels = 2  # u = 1/2 and 1 are what levels 1 and 3 of four were
    same = halved(obs, actions, torch.tensor([0, 1, 1])), actor(obs, actions, torch.tensor([1, 3, 3]))
    assert torch.allclose(*same)


def test_the_gradient_through_the_quiet_chain():
    torch.manual_seed(0)
    actor = diffql.VDenoiser(OBS, ACT, 8, 4).double()
    noise, obs = (0.3 * torch.randn(1, 3, ACT).double()).requires_grad_(), torch.randn(3, OBS).double()
    assert torch.autograd.gradcheck(lambda x: diffql.quiet_chain(actor, obs, x), (noise,))


def test_a_distilled_run_acts_in_one_step_and_resumes_to_the_same_result(dataset, tmp_path, monkeypatch):
    """Killed in the middle of gradient steps of every phase, and in the halvings."""
    diffql.train(tiny_args("diffql", dataset=dataset, out_dir=tmp_path / "whole", distill=True))
    errors = [float(r["distill/error"]) for r in log_rows(tmp_path / "whole") if r.get("distill/error")]
    assert len(errors) == 3 and all(0 < x < 4 for x in errors)
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    args, deaths = tiny_args("diffql", dataset=dataset, out_dir=tmp_path / "killed", distill=True), 0
    for _ in range(30):
        with monkeypatch.context() as patch:
            kill_after(patch, ReplayBuffer, "draw", 8)
            try:
                diffql.train(args)
                break
            except Killed:
                deaths += 1
        gc.collect()  # the lock goes with the process; here with the object
    assert deaths >= 6
    assert equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))
    with pytest.raises(run.UsageError, match="--distill-from: got 6; allowed: a power of two"):
        diffql.train(tiny_args("diffql", dataset=dataset, out_dir=tmp_path, distill=True, distill_from=6))


# ---- rewards ----


def test_rewards_in_training():
    """AntMaze: 0 and 1 become -2 and 2 [4 (r - 0.5)]; Adroit: mean 0, std 1."""
    rewards = np.array([3.0, 5.0, 10.0, -2.0], np.float32)
    dataset = SimpleNamespace(rewards=rewards, return_range=lambda: 50.0)

    def scaled(**settings) -> np.ndarray:
        scale, bias = diffql.reward_units(diffql.Args(**settings), dataset)
        return scale * rewards + bias

    maze = run.with_presets(diffql.Args, diffql.ENV_PRESETS, "antmaze-umaze-v2")
    scale, bias = diffql.reward_units(maze, dataset)
    assert (bias, scale + bias) == (-2.0, 2.0)
    standard = scaled(standardize_reward=True)
    assert standard.mean() == pytest.approx(0, abs=1e-6) and standard.std() == pytest.approx(1, rel=1e-6)
    assert scaled(normalize_reward=True) == pytest.approx(20 * rewards)
    both = scaled(standardize_reward=True, reward_scale=2.0, reward_bias=1.0)
    assert both == pytest.approx(2 * standard + 1, rel=1e-5)
    dataset.rewards = np.ones(3, np.float32)
    with pytest.raises(run.UsageError, match="rewards of the dataset: got all 1"):
        scaled(standardize_reward=True)


# ---- the run ----


def test_from_offline_goes_on_like_the_run_that_it_came_from(dataset, tmp_path):
    """Average, its count and optimizer state included: the online phases agree to the last bit."""
    whole = tiny_args("diffql", dataset=dataset, out_dir=tmp_path / "whole")
    diffql.train(whole)
    (path,) = (tmp_path / "whole").glob("**/offline.pt")
    diffql.train(tiny_args("diffql", dataset=dataset, out_dir=tmp_path / "taken", from_offline=path))
    assert equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "taken"))
    assert final_state(tmp_path / "whole")["nets"]["updates"] == 20 + 20


def test_without_eta_the_critic_does_not_reach_the_actor(dataset, tmp_path):
    """Behavior cloning: another critic (by its learning rate) leaves the denoiser as it is."""
    states = []
    for name, rate in {"a": 3e-4, "b": 1e-2}.items():
        args = tiny_args(
            "diffql", dataset=dataset, out_dir=tmp_path / name, eta=0.0, qf_lr=rate, online_steps=0
        )
        diffql.train(args)
        states.append(final_state(tmp_path / name)["nets"])
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0] if k.startswith("actor."))
    assert not all(torch.equal(states[0][k], states[1][k]) for k in states[0] if k.startswith("qf."))


def test_what_is_logged(dataset, tmp_path):
    diffql.train(tiny_args("diffql", dataset=dataset, out_dir=tmp_path))
    row = [r for r in log_rows(tmp_path) if r.get("loss/bc")][-1]
    assert float(row["loss/bc"]) > 0 and math.isfinite(float(row["q/policy"]))
    assert 0 <= float(row["actor/data_gap"]) <= 4
