"""DACER: mixtures against scikit-learn and closed forms, the regulator's rest, losses against hand-made loops."""

import gc
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU, Killed, equal_states, final_state, kill_after, log_rows, tiny_args
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from test_diffql import ACT, OneStep, by_hand, case, chain_by_hand, q_by_hand, separate
from torch.distributions import MultivariateNormal

from algorithms import dacer, diffql
from common import run
from common.buffer import ReplayBuffer

GAUSS = 0.5 * math.log(2 * math.pi * math.e)  # entropy of N(0, 1)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-0.6, -0.5], [0.5, 0.6], [0.6, -0.6]], dtype=torch.float64)
FACTORS = torch.tensor(
    [[[0.1, 0.0], [0.05, 0.08]], [[0.05, 0.0], [0.0, 0.12]], [[0.07, 0.0], [-0.03, 0.04]]],
    dtype=torch.float64,
)


def drawn(states: int, samples: int, spread: float = 1.0) -> torch.Tensor:
    """Samples (S, N, 2) of the mixture above, the same one for each state; `spread` widens the components."""
    kind = torch.multinomial(WEIGHTS.expand(states, -1), samples, replacement=True)
    xi = torch.randn(states, samples, 2, 1, dtype=torch.float64)
    return MEANS[kind] + spread * (FACTORS[kind] @ xi)[..., 0]


def shares(states: int, samples: int, components: int) -> torch.Tensor:
    return torch.rand(states, samples, components).double().softmax(-1)


def gaussians(mixture: dacer.Mixture, state: int) -> list[MultivariateNormal]:
    pairs = zip(mixture.mean[state], mixture.chol[state], strict=True)
    return [MultivariateNormal(mean, scale_tril=chol) for mean, chol in pairs]


def log_likelihood(x: torch.Tensor, mixture: dacer.Mixture) -> torch.Tensor:
    """Mean log density of the samples of each state (S,)."""
    found = []
    for s, samples in enumerate(x):
        of_each = torch.stack([g.log_prob(samples) for g in gaussians(mixture, s)], -1)
        found.append((of_each + mixture.weight[s].log()).logsumexp(-1).mean())
    return torch.stack(found)


def entropy_by_hand(weights: np.ndarray, covariances: np.ndarray) -> float:
    """The formula of DACER, term by term."""
    total = 0.0
    for w, cov in zip(weights, covariances, strict=True):
        total += -w * math.log(w) + w * 0.5 * math.log(
            (2 * math.pi * math.e) ** len(cov) * np.linalg.det(cov)
        )
    return total


# ---- mixtures ----


def test_the_m_step_is_weighted_moments_of_each_state_and_component():
    torch.manual_seed(0)
    x, share = torch.randn(4, 30, 3).double(), shares(4, 30, 2)
    found = dacer.m_step(x, share)
    for s in range(4):
        for k in range(2):
            weight = share[s, :, k].numpy()
            mean = np.average(x[s].numpy(), axis=0, weights=weight)
            cov = np.cov(x[s].numpy().T, aweights=weight, bias=True) + 1e-6 * np.eye(3)
            chol = found.chol[s, k]
            assert found.weight[s, k].item() == pytest.approx(weight.mean())
            assert found.mean[s, k].numpy() == pytest.approx(mean, abs=1e-10)
            assert (chol @ chol.T).numpy() == pytest.approx(cov, abs=1e-10)
    assert torch.allclose(found.weight.sum(1), torch.ones(4).double())


def test_the_e_step_is_bayes_rule_with_torchs_densities():
    torch.manual_seed(1)
    x = torch.randn(3, 20, 2).double()
    mixture = dacer.m_step(x, shares(3, 20, 3))
    share = dacer.e_step(x, mixture)
    for s in range(3):
        joint = torch.stack(
            [
                w * g.log_prob(x[s]).exp()
                for w, g in zip(mixture.weight[s], gaussians(mixture, s), strict=True)
            ],
            -1,
        )
        assert torch.allclose(share[s], joint / joint.sum(-1, keepdim=True), atol=1e-12)


@pytest.mark.parametrize("steps", [1, 7])
def test_em_is_scikit_learns_step_for_step(steps):
    """From the same mixture, for each state by itself; then the entropies too."""
    torch.manual_seed(2)
    x = drawn(5, 80, spread=2.0)
    start = found = dacer.m_step(x, shares(5, 80, 3) + dacer.seed_shares(x, 3))
    start = start._replace(weight=start.weight / start.weight.sum(1, keepdim=True))
    found = start
    for _ in range(steps):
        found = dacer.m_step(x, dacer.e_step(x, found))
    entropy = dacer.mixture_entropy(found)
    for s in range(5):
        precisions = (start.chol[s] @ start.chol[s].mT).inverse().numpy()
        init = dict(
            weights_init=start.weight[s].numpy(), means_init=start.mean[s].numpy(), precisions_init=precisions
        )
        theirs = GaussianMixture(3, max_iter=steps, tol=0.0, **init)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            theirs.fit(x[s].numpy())
        assert found.weight[s].numpy() == pytest.approx(theirs.weights_, abs=1e-9)
        assert found.mean[s].numpy() == pytest.approx(theirs.means_, abs=1e-9)
        assert (found.chol[s] @ found.chol[s].mT).numpy() == pytest.approx(theirs.covariances_, abs=1e-9)
        wanted = entropy_by_hand(theirs.weights_, theirs.covariances_)
        assert entropy[s].item() == pytest.approx(wanted, abs=1e-8)


def test_fits_from_own_seeds_have_the_entropy_that_scikit_learn_finds():
    """Three clusters: the same optimum; one broad cloud, where optima are many: the same on average over states."""
    torch.manual_seed(3)
    for spread, each, together in ((0.7, 2e-3, 1e-3), (5.0, 1.0, 0.05)):
        x = drawn(40, 200, spread)
        ours = dacer.mixture_entropy(dacer.fit_mixture(x, 3, 200))
        theirs = []
        for samples in x.numpy():
            fit = GaussianMixture(3, tol=1e-7, max_iter=1_000, random_state=42).fit(samples)
            theirs.append(entropy_by_hand(fit.weights_, fit.covariances_))
        gap = ours - torch.tensor(theirs, dtype=torch.float64)
        close = (gap.abs() < each).double().mean()
        assert close >= 0.9 and abs(gap.median()) < together, (spread, gap)


def test_the_entropy_of_clusters_apart_is_exact():
    """-Σ w log w + Σ w H_k of the mixture that the samples are from, to the error of 5,000 of them."""
    torch.manual_seed(4)
    covariances = (FACTORS @ FACTORS.mT).numpy()
    wanted = entropy_by_hand(WEIGHTS.numpy(), covariances)
    found = dacer.mixture_entropy(dacer.fit_mixture(drawn(20, 5_000, 1.0), 3, 50))
    assert found.median().item() == pytest.approx(wanted, abs=0.02)
    assert (found - wanted).abs().sort().values[
        :18
    ].max() < 0.1  # a fit in ten may have two seeds in one cluster


@pytest.mark.parametrize("dim", [1, 2, 6])
def test_one_component_is_the_gaussian_of_the_samples_moments(dim):
    torch.manual_seed(5)
    scale = torch.linspace(0.1, 0.5, dim).double()
    x = torch.randn(200, 400, dim).double() * scale
    found = dacer.mixture_entropy(dacer.fit_mixture(x, 1, 3))
    for s in range(3):
        cov = np.atleast_2d(np.cov(x[s].numpy().T, bias=True)) + 1e-6 * np.eye(dim)
        assert found[s].item() == pytest.approx(GAUSS * dim + 0.5 * np.linalg.slogdet(cov)[1], abs=1e-9)
    true = GAUSS * dim + scale.log().sum().item()
    short = (
        dim * (dim + 3) / (4 * 400)
    )  # by which the likeliest Gaussian is too narrow, to first order in 1 / N
    assert found.mean().item() == pytest.approx(true - short, abs=0.02)


def test_the_entropy_is_never_below_that_of_the_mixture():
    """Equal components: log 3 above; others: above -E log p by Monte Carlo, and below that plus log 3."""
    torch.manual_seed(6)
    same = dacer.Mixture(torch.full((1, 3), 1 / 3), torch.zeros(1, 3, 2), torch.eye(2).repeat(1, 3, 1, 1))
    assert dacer.mixture_entropy(same).item() == pytest.approx(2 * GAUSS + math.log(3), rel=1e-6)
    for spread in (1.0, 3.0, 10.0):
        mixture = dacer.Mixture(WEIGHTS[None], MEANS[None], spread * FACTORS[None])
        true = -log_likelihood(drawn(1, 200_000, spread), mixture).item()
        above = dacer.mixture_entropy(mixture).item() - true
        assert -0.01 < above < math.log(3)
    assert above > 0.5


def test_every_step_of_em_raises_the_likelihood():
    torch.manual_seed(7)
    x = drawn(6, 100, 3.0)
    mixture = dacer.m_step(x, dacer.seed_shares(x, 3))
    last = log_likelihood(x, mixture)
    for _ in range(20):
        mixture = dacer.m_step(x, dacer.e_step(x, mixture))
        now = log_likelihood(x, mixture)
        assert (now > last - 1e-4).all()  # to the floor of the covariances
        last = now


def test_seeds_are_samples_drawn_by_squared_distance():
    """Samples at 0 (three), 1 and 3: with two seeds the groups are known; the chance of each by hand."""
    torch.manual_seed(8)
    at = torch.tensor([0.0, 0.0, 0.0, 1.0, 3.0])[:, None]
    share = dacer.seed_shares(at.expand(40_000, -1, -1), 2)
    assert (share.sum(-1) == 1).all()
    found = (share[:, 3] == share[:, 0]).all(-1).double().mean()  # 1 with the samples at 0
    # first seed at 0 (3/5): the second at 3 by 9/10, or at 1; at 1 (1/5): at 3 by 4/7, or at 0; at 3 (1/5): either
    assert found.item() == pytest.approx(0.6 * 9 / 10 + 0.2 * 4 / 7 + 0.2, abs=0.01)


def test_samples_in_one_point_or_on_a_face_of_the_box_have_finite_entropy():
    """One point: a Gaussian as narrow as the floor. A face: narrow in one dimension."""
    torch.manual_seed(9)
    point = torch.full((2, 50, 3), 0.4)
    found = dacer.mixture_entropy(dacer.fit_mixture(point, 3, 20))
    assert found.tolist() == pytest.approx([3 * (GAUSS + 0.5 * math.log(1e-6))] * 2, abs=1e-3)
    face = torch.rand(5, 200, 2) * 2 - 1
    face[..., 0] = 1
    found = dacer.mixture_entropy(dacer.fit_mixture(face, 3, 50))
    assert found.isfinite().all() and (found < math.log(4) + GAUSS + 0.5 * math.log(1e-6)).all()


# ---- noise and its regulator ----


def test_noise_is_added_and_clipped_and_its_gradient_ends_at_the_box():
    actions = torch.tensor([[0.5, -0.9], [0.0, 0.9]], requires_grad=True)
    xi = torch.tensor([[1.0, -1.0], [-2.0, 1.0]])
    got = dacer.perturbed(actions, torch.tensor(0.3), xi)
    assert got.tolist() == [pytest.approx([0.8, -1.0]), pytest.approx([-0.6, 1.0])]
    assert torch.autograd.grad(got.sum(), actions)[0].tolist() == [[1, 0], [1, 0]]


def regulated(act_dim: int, **settings) -> tuple[dacer.Regulator, torch.optim.Optimizer, dacer.Args]:
    args = dacer.Args(**settings)
    regulator = dacer.Regulator(act_dim, args)
    return regulator, torch.optim.Adam(regulator.parameters(), args.alpha_lr), args


@pytest.mark.parametrize(("entropy", "direction"), [(-1.0, -1), (-3.0, 1), (40.0, -1)])
def test_alpha_falls_where_entropy_is_above_its_target_and_climbs_below(entropy, direction):
    """Two dimensions, target -1.8. Adam's first step is as long as its rate, whatever the gap."""
    regulator, opt, _ = regulated(2)
    loss = regulator.loss(torch.tensor(entropy))
    assert loss.item() == pytest.approx(math.log(3) * (entropy + 1.8), rel=1e-5)
    assert torch.autograd.grad(loss, regulator.log_alpha)[0].item() == pytest.approx(entropy + 1.8, rel=1e-5)
    dacer.regulate(regulator, opt, torch.tensor(entropy, dtype=torch.float64))
    assert regulator.log_alpha.item() == pytest.approx(math.log(3) + direction * 3e-2, abs=1e-5)
    assert regulator.std().item() == pytest.approx(0.3 * math.exp(direction * 3e-2), rel=1e-4)
    assert not regulator.std().requires_grad


@pytest.mark.parametrize("start", [0.1, 3.0])
def test_the_fixed_point_is_the_gaussian_of_the_target_entropy(start):
    """A chain that always ends at 0: the policy is N(0, c² α²), log std + log(2πe)/2 = -0.9 where it rests."""
    torch.manual_seed(10)
    regulator, opt, args = regulated(1, alpha_start=start, alpha_lr=0.1, mixture_components=1, em_steps=1)
    actor, obs = OneStep(lambda x: 0 * x), torch.zeros(64, 3)
    stds = []
    for _ in range(150):
        entropy = dacer.policy_entropy(actor, obs, regulator.std(), args)
        dacer.regulate(regulator, opt, entropy)
        stds.append(regulator.std().item())
    assert np.mean(stds[-30:]) == pytest.approx(math.exp(-0.9 - GAUSS), rel=0.02)
    assert entropy.item() == pytest.approx(-0.9, abs=0.05)


def test_entropy_of_a_policy_is_the_mean_over_states_of_chain_and_noise():
    """Ends at ±0.5 with equal chance where obs is 1, at 0 where it is 0: log 2 more there, so log 2 / 2 in the mean."""
    torch.manual_seed(11)
    args = dacer.Args(entropy_samples=2_000, mixture_components=2)
    obs = torch.tensor([[0.0], [1.0]]).repeat(32, 1)

    class Sided(OneStep):
        def __call__(self, obs, x, t):
            self.end = lambda x: 0.5 * obs[:, :1] * x.sign()
            return super().__call__(obs, x, t)

    std, one = torch.tensor(0.05), GAUSS + math.log(0.05)
    ends_at_zero = dacer.policy_entropy(Sided(None), 0 * obs, std, args).item()
    assert one - 0.02 < ends_at_zero < one + math.log(2)  # two components share one Gaussian
    both = dacer.policy_entropy(Sided(None), 0 * obs + 1, std, args).item()
    assert both == pytest.approx(one + math.log(2), abs=0.02)
    mixed = dacer.policy_entropy(Sided(None), obs, std, args).item()
    assert mixed == pytest.approx((ends_at_zero + both) / 2, abs=0.05)


# ---- losses ----


def double_case(rows: int = 8, **settings) -> tuple:
    """As diffql's, with this file's settings, ξ and c α."""
    theirs = {k: v for k, v in settings.items() if k in diffql.Args.__dataclass_fields__}
    nets, batch, draws, _ = case(rows, **theirs)
    args = dacer.Args(hidden=12, batch_size=rows, backup_actions=3, **settings)
    xi = dacer.draw_xi(draws)
    return nets, batch, dacer.Draws(*draws), xi, torch.tensor(0.3, dtype=torch.float64), args


def test_without_noise_the_losses_are_diffusion_qls():
    nets, batch, draws, xi, std, args = double_case(max_q_backup=True)
    calm, logs = dacer.dacer_losses(nets, 0 * std, batch, draws, xi, args)
    theirs, their_logs = dacer.losses(nets, batch, draws, args)
    assert calm.item() == theirs.item() and {k: v.item() for k, v in logs.items()} == {
        k: v.item() for k, v in their_logs.items()
    }


@pytest.mark.parametrize("backup", [False, True])
@pytest.mark.parametrize("cloning", [0.0, 0.4])
@pytest.mark.parametrize("coin", [0.2, 0.8])
def test_all_losses_and_gradients_are_those_of_a_loop_over_separate_networks(backup, cloning, coin):
    settings = dict(max_q_backup=backup, eta=2.0, gamma=0.9)
    nets, batch, draws, xi, std, args = double_case(**settings, cloning_online=cloning)
    draws = draws._replace(coin=torch.tensor(coin))
    many = 3 if backup else 1
    critics, targets = separate(nets["qf"]), separate(nets["q_target"])
    best = []
    with torch.no_grad():
        for target in targets:
            values = []
            for k in range(many):  # action k of each row
                actions = chain_by_hand(nets["average"], batch.next_obs, draws.following[:, k::many])
                noisy = torch.minimum(
                    torch.maximum(actions + 0.3 * xi.following[k::many], -torch.ones(1)), torch.ones(1)
                )
                values.append(q_by_hand(target, batch.next_obs, noisy))
            best.append(torch.stack(values).amax(0))
    y = batch.rewards + 0.9 * (1 - batch.terminations) * torch.minimum(*best)
    assert torch.equal(y[batch.terminations == 1], batch.rewards[batch.terminations == 1])
    q_loss = sum(F.mse_loss(q_by_hand(c, batch.obs, batch.actions), y) for c in critics)
    q_loss.backward()
    wanted = {"qf": [[layer.weight.grad.T for layer in c if isinstance(layer, nn.Linear)] for c in critics]}
    own = chain_by_hand(nets["actor"], batch.obs, draws.own)
    noisy = (own + 0.3 * xi.own).clip(-1, 1)
    assert (noisy.abs() == 1).any() and (noisy.abs() < 1).any()
    first, second = critics if coin > 0.5 else critics[::-1]
    size = q_by_hand(second, batch.obs, noisy).abs().mean().detach()
    bars = torch.tensor(by_hand(5)[1], dtype=torch.float64)[draws.t][:, None]
    x = bars.sqrt() * batch.actions + (1 - bars).sqrt() * draws.eps
    imitation = F.mse_loss(nets["actor"](batch.obs, x, draws.t), draws.eps)
    actor_loss = cloning * imitation - 2.0 * q_by_hand(first, batch.obs, noisy).mean() / size
    wanted["actor"] = torch.autograd.grad(actor_loss, [*nets["actor"].parameters()])
    loss, logs = dacer.dacer_losses(nets, std, batch, draws, xi, args)
    loss.backward()
    assert logs["loss/q"].item() == pytest.approx(q_loss.item(), rel=1e-10)
    assert logs["loss/actor"].item() == pytest.approx(actor_loss.item(), rel=1e-10)
    assert logs["loss/bc"].item() == pytest.approx(imitation.item(), rel=1e-10)
    assert logs["actor/data_gap"].item() == pytest.approx((own - batch.actions).square().mean().item())
    for layer, weight in enumerate(nets["qf"].weight):  # the actor's loss adds nothing to the critics
        for k in (0, 1):
            assert torch.allclose(weight.grad[k], wanted["qf"][k][layer], atol=1e-10)
    for p, gradient in zip(nets["actor"].parameters(), wanted["actor"], strict=True):
        assert torch.allclose(p.grad, gradient, atol=1e-10)
    assert all(p.grad is None for name in ("average", "q_target") for p in nets[name].parameters())


def test_the_policy_gradient_through_chain_and_noise_is_that_of_finite_differences():
    """Central differences along random directions of the denoiser's parameters, without cloning."""
    nets, batch, draws, xi, std, args = double_case(rows=16, eta=3.0, cloning_online=0.0)
    draws = draws._replace(own=0.3 * draws.own, coin=torch.tensor(0.9))
    parameters = [*nets["actor"].parameters()]
    loss, _ = dacer.dacer_losses(nets, std, batch, draws, xi, args)
    gradient = torch.autograd.grad(loss, parameters)
    noisy = dacer.perturbed(dacer.run_chain(nets["actor"], batch.obs, draws.own), std, xi.own)
    size = dacer.frozen_q(nets["qf"], batch.obs, noisy)[1].abs().mean().item()  # the divisor, a constant

    def q_term() -> float:
        actions = dacer.run_chain(nets["actor"], batch.obs, draws.own)
        q = q_by_hand(separate(nets["qf"])[0], batch.obs, (actions + 0.3 * xi.own).clip(-1, 1))
        return -3.0 * q.mean().item() / size

    for seed in range(4):
        torch.manual_seed(seed)
        direction = [torch.randn_like(p) for p in parameters]
        values = []
        with torch.no_grad():
            for shift in (1e-6, -2e-6, 1e-6):
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(shift * d)
                values.append(q_term())
        along = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)).item()
        assert along == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_noise_of_a_step_is_standard_normal_and_independent_of_the_chains():
    torch.manual_seed(12)
    args = dacer.Args(batch_size=50_000, max_q_backup=True, backup_actions=2)
    draws = dacer.draw_step(dacer.Denoiser(3, ACT, 4, 5), args, CPU)
    xi = dacer.draw_xi(draws)
    assert xi.own.shape == (50_000, ACT) and xi.following.shape == (100_000, ACT)
    for noise, chain in ((xi.own, draws.own), (xi.following, draws.following)):
        assert abs(noise.mean()) < 0.01 and noise.std().item() == pytest.approx(1, abs=0.01)
        assert all(abs((noise * x).mean()) < 0.02 for x in chain)


# ---- the run ----


def test_the_offline_phase_is_diffusion_qls_to_the_last_bit(dataset, tmp_path):
    """From diffql.py's checkpoint the run is the one that does all itself; --distill has another actor: refused."""
    tiny = partial(tiny_args, dataset=dataset)
    diffql.train(tiny("diffql", out_dir=tmp_path / "base", online_steps=0))
    (path,) = (tmp_path / "base").glob("**/offline.pt")
    dacer.train(tiny("dacer", out_dir=tmp_path / "whole"))
    dacer.train(tiny("dacer", out_dir=tmp_path / "taken", from_offline=path))
    assert equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "taken"))
    diffql.train(tiny("diffql", out_dir=tmp_path / "distilled", online_steps=0, distill=True))
    (path,) = (tmp_path / "distilled").glob("**/offline.pt")
    with pytest.raises(run.UsageError, match=r"--from-offline: got .*distill True -> False"):
        dacer.train(tiny("dacer", out_dir=tmp_path / "no", from_offline=path))


def test_alpha_moves_from_the_end_of_the_warm_up_on_and_is_logged(dataset, tmp_path):
    """Updates begin at step 10, α moves every 7th step: 10, 17, 24, counted from 0."""
    dacer.train(tiny_args("dacer", dataset=dataset, out_dir=tmp_path / "a"))
    rows = [r for r in log_rows(tmp_path / "a") if r.get("dacer/entropy")]
    assert [int(r["step"]) for r in rows] == [11, 18, 25]
    alphas = [float(r["dacer/alpha"]) for r in rows]
    assert alphas[0] == pytest.approx(3 * math.exp(-3e-2), rel=1e-4)  # noise of 0.3 has too much entropy
    assert alphas == sorted(alphas, reverse=True)
    assert float(rows[-1]["dacer/std"]) == pytest.approx(0.1 * alphas[-1])
    assert all(float(r["dacer/entropy"]) > -0.9 * 3 for r in rows)
    dacer.train(tiny_args("dacer", dataset=dataset, out_dir=tmp_path / "b", alpha_lr=0.0))
    still = final_state(tmp_path / "b")["regulator"]["log_alpha"]
    assert still.item() == pytest.approx(math.log(3), rel=1e-6)


def test_online_actions_have_the_noise_and_evaluation_has_none(dataset, tmp_path):
    """Noise far above the box: all stored actions lie at its corners; scores of the warm-up are the offline one."""
    noisy = dict(alpha_start=1e8, online_steps=30, warmup_steps=20, eval_every=10)
    dacer.train(tiny_args("dacer", dataset=dataset, out_dir=tmp_path, **noisy))
    (obs, act) = (11, 3)
    actions = final_state(tmp_path)["online"]["rows"][:, obs : obs + act]
    assert len(actions) == 30 and (actions.abs() == 1).double().mean() > 0.99
    scores = [(r["phase"], r["eval/score"]) for r in log_rows(tmp_path) if r.get("eval/score")]
    offline = [x for phase, x in scores if phase == "offline"][-1]
    assert [x for phase, x in scores if phase == "online"][:2] == [offline] * 2


def test_a_run_killed_online_resumes_to_the_same_result(dataset, tmp_path, monkeypatch):
    """α, its optimizer and the next estimate included: killed every few draws, between steps of α and within one."""
    dacer.train(tiny_args("dacer", dataset=dataset, out_dir=tmp_path / "whole"))
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    args, deaths = tiny_args("dacer", dataset=dataset, out_dir=tmp_path / "killed"), 0
    for _ in range(30):
        with monkeypatch.context() as patch:
            kill_after(patch, ReplayBuffer, "draw", 5)
            try:
                dacer.train(args)
                break
            except Killed:
                deaths += 1
        gc.collect()  # the lock goes with the process; here with the object
    assert deaths >= 6
    assert equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))
