"""DUAL on SO2 + OFF2ON: its Gaussian actor in SO2's losses and targets, the weights of K critics, runs."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, equal_states, final_state, log_rows, tiny_args
from torch.distributions import Normal

from algorithms import calql_dual, so2_dual
from common import data
from common.buffer import Batch

OBS, A, H, K = 5, 2, 3, 4


def case(rows: int = 8, n: int = 3, dtype=torch.float64, **settings) -> tuple:
    """Nets whose means leave the box on some rows, targets that differ, a batch, noise, settings."""
    torch.manual_seed(0)
    args = so2_dual.Args(cql_n_actions=n, hidden=16, n_critics=K, horizon=H, planner_width=16, **settings)
    net = so2_dual.PlannerNet(H, A, torch.randn(OBS), 0.5 + torch.rand(OBS), 16, 1)
    with torch.no_grad():
        net.head.weight.mul_(3)
    nets = so2_dual.make_so2_dual_nets(net, args, OBS, A).to(dtype)
    with torch.no_grad():
        for p in [*nets["q_target"].parameters(), *nets["qf"].parameters()]:
            p.add_(0.1 * torch.randn_like(p))
        nets["qf"].weight[-1].mul_(20)  # Q that is not flat
        nets["actor"].log_std.copy_(torch.tensor([-1.0, -0.3]))
        nets["weights"]["log_alpha"].fill_(-0.7)
    obs, next_obs = torch.randn(2, rows, OBS, dtype=dtype)
    actions, ends = torch.rand(rows, A, dtype=dtype) * 2 - 1, torch.arange(rows) % 3 == 0
    batch = Batch(obs, actions, torch.randn(rows, dtype=dtype), next_obs, ends.to(dtype))
    return nets, batch, tuple(x.to(dtype) for x in so2_dual.draw_noise(rows, A, n, CPU)), args


def acted(
    nets: torch.nn.ModuleDict, obs: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """DUAL's action for that noise and its log-probability, by torch's Normal and the hyperbolic cosine; float64."""
    mean, log_std = nets["actor"](obs)
    u = mean + log_std.exp() * noise
    over = torch.where(u.abs() > 0.9, (u.abs() - 0.9) / 0.1, 0.0)
    actions = torch.where(u.abs() > 0.9, u.sign() * (0.9 + 0.1 * torch.tanh(over)), u)
    log_slope = -2 * torch.log(torch.cosh(over))
    return actions, (Normal(mean, log_std.exp()).log_prob(u) - log_slope).sum(-1)


def one_by_one(qf: torch.nn.Module, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Critic after critic, layer after layer, with weights of its own that nothing else shares: (K, B)."""
    values = []
    for k in range(len(qf.weight[0])):
        x = torch.cat([obs, actions], 1)
        for i, (weight, bias) in enumerate(zip(qf.weight, qf.bias, strict=True)):
            x = x @ weight[k] + bias[k]
            x = F.relu(x) if i + 1 < len(qf.weight) else x
        values.append(x[:, 0])
    return torch.stack(values)


# ---- by hand ----


class Slopes(torch.nn.Module):
    """Q_k = offset_k + slope_k · a, three critics on one action."""

    def __init__(self, offsets: list, slopes: list):
        super().__init__()
        self.offset = torch.nn.Parameter(torch.tensor(offsets, dtype=torch.float64)[:, None])
        self.slope = torch.nn.Parameter(torch.tensor(slopes, dtype=torch.float64)[:, None])

    def forward(self, _, actions):
        return self.offset + self.slope * actions[:, 0]


class Means(torch.nn.Module):
    """The given means, whatever the observations; log σ of the one action."""

    def __init__(self, mean: list, log_std: float):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean, dtype=torch.float64)[:, None])
        self.log_std = torch.nn.Parameter(torch.tensor([log_std], dtype=torch.float64))

    def forward(self, _):
        return self.mean, self.log_std


def by_hand(mean: list, log_std: float) -> torch.nn.ModuleDict:
    """Q of slopes 2, -1 and 0 from 0, 0.3 and 1; targets of other slopes."""
    nets = torch.nn.ModuleDict(
        {"actor": Means(mean, log_std), "qf": Slopes([0.0, 0.3, 1.0], [2.0, -1.0, 0.0])}
    )
    nets["q_target"] = Slopes([1.0, 2.0, 3.0], [1.0, -2.0, 10.0])
    return nets


def test_actor_loss_by_hand():
    """σ = 1/2, α = 0.2; u = 0.3 + σ/2 · 0.8 = 0.7 and 1.5 - σ · 2.2 = 0.4 and 0.2 - σ · 1.4 = -0.5 and σ · 2 = 1.

    The least Q is the falling critic's (0.3 - a) at 0.7, 0.4 and box(1), the rising one's (2 a) at -0.5.
    """
    nets, a1, steep = by_hand([0.3, 1.5, 0.2, 0.0], math.log(0.5)), 0.9 + 0.1 * math.tanh(1), math.tanh(1)
    xi = [0.8, -2.2, -1.4, 2.0]
    noise = torch.tensor(xi, dtype=torch.float64)[:, None]
    loss, logs = so2_dual.dual_actor_losses(nets, torch.zeros(4, 1).double(), noise, 0.2)
    log_pi = [-0.5 * x * x - 0.5 * math.log(2 * math.pi) + math.log(2) for x in xi]
    log_pi[3] -= math.log(1 - steep**2)
    q = [0.3 - 0.7, 0.3 - 0.4, 2 * -0.5, 0.3 - a1]
    assert loss.item() == pytest.approx(sum(0.2 * p - x for p, x in zip(log_pi, q, strict=True)) / 4)
    assert logs["policy/outside"].item() == pytest.approx(0.5 / 4)
    assert logs["policy/log_prob"].item() == pytest.approx(sum(log_pi) / 4)
    loss.backward()
    # d/du of -Q, and at the border of α times -log slope, 2 tanh(x) / 0.1
    by_u = [1.0, 1.0, -2.0, 1 - steep**2 + 0.2 * 2 * steep / 0.1]
    assert nets["actor"].mean.grad[:, 0].tolist() == pytest.approx([x / 4 for x in by_u])
    std_grad = sum(-0.2 + x * 0.5 * z for x, z in zip(by_u, xi, strict=True)) / 4
    assert nets["actor"].log_std.grad.item() == pytest.approx(std_grad)
    assert all(p.grad is None for p in nets["qf"].parameters())


def targets_of_update(args: so2_dual.Args, monkeypatch, epsilon: list) -> tuple:
    """y (3, 3) of one update with σ = 1/2 on three rows, the noise of a' that it drew, and the nets."""
    nets, zeros, drawn, found = by_hand([0.5, 2.0, -1.0], math.log(0.5)), torch.zeros(3, 1).double(), [], []
    batch = Batch(
        zeros, zeros, torch.tensor([1.0, 2.0, 3.0]).double(), zeros, torch.tensor([0.0, 0.0, 1.0]).double()
    )
    opt = torch.optim.SGD(nets.parameters(), 0.0)
    known = torch.tensor(epsilon, dtype=torch.float64)[:, None]
    monkeypatch.setattr(so2_dual, "draw_perturbation", lambda *_: known)
    boxed = so2_dual.boxed
    monkeypatch.setattr(so2_dual, "boxed", lambda m, s, z: drawn.append(z) or boxed(m, s, z))

    def of_values(nets, batch, target):
        found.append(target)
        return so2_dual.value_losses(nets, batch, target)

    def draw() -> tuple:
        return torch.tensor([0, 5, 6]), batch, {}

    logs = so2_dual.update(nets, opt, draw, 5, of_values, so2_dual.dual_actor_losses, args)
    assert logs["replay/own_share"].item() == pytest.approx(2 / 3)
    return found[0], drawn[0][:, 0].tolist(), nets


@pytest.mark.parametrize("perturbed", [True, False])
def test_targets_by_hand_are_at_the_perturbed_action_of_duals_actor(perturbed, monkeypatch):
    """r + γ (Q̂_k(clip(box(u) + ε)) - α log π(box(u))), each critic's own; u by the noise drawn; nothing at the end."""
    torch.manual_seed(0)
    args = so2_dual.Args(utd=1, perturbation=perturbed, gamma=0.9, entropy_weight=0.2)
    y, xi, _ = targets_of_update(args, monkeypatch, [-0.25, 0.6, 0.0])
    for row, (mean, epsilon, reward) in enumerate([(0.5, -0.25, 1.0), (2.0, 0.6, 2.0)]):
        u, z = mean + 0.5 * xi[row], xi[row]
        x = max(abs(u) - 0.9, 0.0) / 0.1
        a = math.copysign(0.9 + 0.1 * math.tanh(x), u) if x else u
        log_pi = -0.5 * z * z - 0.5 * math.log(2 * math.pi) + math.log(2) + 2 * math.log(math.cosh(x))
        moved = max(-1.0, min(1.0, a + epsilon)) if perturbed else a
        for k, (offset, slope) in enumerate([(1.0, 1.0), (2.0, -2.0), (3.0, 10.0)]):
            assert y[k, row].item() == pytest.approx(reward + 0.9 * (offset + slope * moved - 0.2 * log_pi))
    assert y[:, 2].tolist() == [3.0] * 3 and not y.requires_grad


def test_one_step_of_the_actor_to_many_of_the_critics():
    """utd steps of qf and q_target, after which the actor takes its one against the last of them; α rests."""
    nets, batch, _, _ = case(dtype=torch.float32)
    opt = so2_dual.make_so2_optimizer(nets, 1e-3, 1e-3, CPU)
    start = {k: v.clone() for k, v in nets.state_dict().items()}
    order = []

    def of_values(*inputs):
        order.append("critics")
        return so2_dual.value_losses(*inputs)

    def of_actor(*inputs):
        order.append("actor")
        still = all(torch.equal(v, start[k]) for k, v in nets.state_dict().items() if k.startswith("actor"))
        assert still
        return so2_dual.dual_actor_losses(*inputs)

    so2_dual.update(
        nets, opt, lambda: (torch.arange(8), batch, {}), 4, of_values, of_actor, so2_dual.Args(utd=5)
    )
    assert order == ["critics"] * 5 + ["actor"]
    steps = {name: {int(opt.state[p]["step"]) for p in nets[name].parameters()} for name in ("qf", "actor")}
    assert steps == {"qf": {5}, "actor": {1}}
    after = nets.state_dict()
    rest = [k for k in after if k.startswith(("transition", "weights"))]
    assert all(torch.equal(after[k], start[k]) for k in rest)
    moved = [k for k in after if k.startswith("q_target") and not torch.equal(after[k], start[k])]
    assert len(moved) == len([k for k in after if k.startswith("q_target")])


# ---- the offline loss ----


@pytest.mark.parametrize("settings", [{}, {"distill_steps": 2}], ids=str)
def test_offline_losses_and_gradients_equal_a_loop_over_critics(settings):
    """Σ_k MSE(Q_k, y_k) + α_cql mean(logsumexp of 3n terms - Q_k), y_k without ε; SAC's losses of actor and α."""
    nets, batch, noise, args = case(**settings)
    (uniform, normal), n, alpha = noise, 3, math.exp(-0.7)
    means = nets["actor"](batch.obs)[0]
    assert (means.abs() > 1).any() and (means.abs() < 1).any()
    loss, logs = so2_dual.losses(nets, batch, noise, args)
    with torch.no_grad():
        next_actions, next_log_pi = acted(nets, batch.next_obs, normal[:, 2 * n])
        soft = one_by_one(nets["q_target"], batch.next_obs, next_actions) - alpha * next_log_pi
        y = batch.rewards + 0.99 * (1 - batch.terminations) * soft
        sampled = [(uniform[:, i], torch.full((8,), -A * math.log(2)).double()) for i in range(n)]
        sampled += [acted(nets, batch.obs, normal[:, i]) for i in range(n)]
        sampled += [acted(nets, batch.next_obs, normal[:, n + i]) for i in range(n)]
    q_data = one_by_one(nets["qf"], batch.obs, batch.actions)
    terms = [one_by_one(nets["qf"], batch.obs, a) - log_prob for a, log_prob in sampled]
    td = sum(F.mse_loss(q_data[k], y[k]) for k in range(K))
    cql = sum((torch.stack(terms).logsumexp(0) - q_data)[k].mean() for k in range(K))
    actions, log_pi = acted(nets, batch.obs, normal[:, 3 * n])
    values = one_by_one(nets["qf"], batch.obs, actions)
    assert len(set(values.argmin(0).tolist())) > 1
    actor_loss = (alpha * log_pi - values.amin(0)).mean()
    alpha_loss = (0.7 * (log_pi.detach() - A)).mean()
    found = dict(zip(("loss/q", "loss/actor", "loss/alpha"), (td, actor_loss, alpha_loss), strict=True))
    for k, expected in found.items():
        assert logs[k].item() == pytest.approx(expected.item(), rel=1e-6), k
    assert logs["cql/gap"].item() == pytest.approx(cql.item() / K, rel=1e-6)
    total = td + 5.0 * cql + actor_loss + alpha_loss
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    loss.backward()
    for name, own in (("qf", td + 5.0 * cql), ("actor", actor_loss)):
        params = [*nets[name].parameters()]
        expected = torch.autograd.grad(own, params, retain_graph=True)
        assert all(torch.allclose(p.grad, g, atol=1e-7) for p, g in zip(params, expected, strict=True)), name
    assert nets["weights"]["log_alpha"].grad.item() == pytest.approx(-(log_pi - A).mean().item())
    assert all(p.grad is None for k in ("q_target", "transition") for p in nets[k].parameters())


# ---- the posterior's weights ----


def test_weights_of_rows_are_those_of_the_least_of_all_critics():
    """5,000 rows, two chunks: the least Q of four, less its mean over four drawn actions, in units of its std."""
    nets, *_ = case()
    rows = 5_000
    obs, actions = torch.randn(rows, OBS).double(), torch.rand(rows, A).double() * 2 - 1
    zeros = torch.zeros(rows).double()
    torch.manual_seed(3)
    got = so2_dual.posterior_weight(nets, Batch(obs, actions, zeros, obs, zeros))
    torch.manual_seed(3)
    noise = torch.cat([torch.randn(k, 4, A) for k in (4_096, rows - 4_096)])
    with torch.no_grad():
        values = one_by_one(nets["qf"], obs, actions)
        assert len(set(values.argmin(0).tolist())) == K
        v = sum(one_by_one(nets["qf"], obs, acted(nets, obs, noise[:, k])[0]).amin(0) for k in range(4)) / 4
    adv = values.amin(0) - v
    expected = (adv / adv.std(correction=0)).clip(-5, 5).exp()
    assert torch.allclose(got, expected, rtol=1e-6) and got.std() > 0.5


# ---- runs ----


def test_nets_are_one_student_twice_and_critics_that_differ():
    nets, *_ = case()
    net = so2_dual.PlannerNet(H, A, torch.randn(OBS), 0.5 + torch.rand(OBS), 16, 1)
    made = so2_dual.make_so2_dual_nets(net, so2_dual.Args(hidden=16, n_critics=K), OBS, A)
    assert equal_states(made["actor"].net.state_dict(), made["transition"].net.state_dict())
    assert equal_states(made["qf"].state_dict(), made["q_target"].state_dict())
    assert made["qf"].weight[0].shape[0] == K and not torch.equal(*made["qf"].weight[0][:2])
    for frozen in ("transition", "q_target"):
        assert not any(p.requires_grad for p in nets[frozen].parameters())


def test_targets_of_a_run_have_sigma_and_epsilon_but_no_epistemic_noise(dataset, tmp_path, monkeypatch):
    """Draws of the last layer as wide as they get: the next action in every online target is box(μ + σ ξ)."""
    targets, checked = so2_dual.own_targets, []

    def spied(nets, batch, next_policy, perturbation, alpha, gamma):
        if perturbation is not None:
            mean, log_std = nets["actor"](batch.next_obs)
            with torch.no_grad():
                inside = (mean.abs() < 0.9) & (next_policy[0].abs() < 0.9)
                checked.append((((next_policy[0] - mean) / log_std.exp())[inside]).abs().max().item())
            assert alpha == 0.2 and perturbation.abs().max() <= 0.6 + 1e-6
        return targets(nets, batch, next_policy, perturbation, alpha, gamma)

    monkeypatch.setattr(so2_dual, "own_targets", spied)
    args = tiny_args(
        "so2_dual", dataset=dataset, out_dir=tmp_path, utd=2, laplace_std=0.5, laplace_prior=1e-3
    )
    so2_dual.train(args)
    assert final_state(tmp_path)["explorer_offsets"].abs().max() > 0.1
    assert len(checked) == 40 and 0.5 < max(checked) < 5.0


def test_own_rows_enter_balanced_replay_and_the_posterior(dataset, tmp_path, monkeypatch):
    """Every environment step has a priority; a fit has all rows, the dataset's and own ones, and all but the first."""
    weigh, sizes = so2_dual.posterior_weight, []
    monkeypatch.setattr(
        so2_dual, "posterior_weight", lambda nets, b: sizes.append(len(b.obs)) or weigh(nets, b)
    )
    so2_dual.train(
        tiny_args("so2_dual", dataset=dataset, out_dir=tmp_path, laplace_rows=5_000, laplace_every=10)
    )
    assert sizes == [600, 610, 620, 630]
    state = final_state(tmp_path)
    priorities = state["priorities"]["of_rows"].view(-1)
    assert (priorities[:630] > 0).all() and (priorities[630:] == 0).all()
    assert torch.equal(state["nets"]["weights.log_alpha"], final_offline(tmp_path)["weights.log_alpha"])


def final_offline(folder) -> dict:
    (path,) = folder.glob("**/offline.pt")
    return torch.load(path, weights_only=True)["objects"]["nets"]


def test_the_planner_is_calql_duals_and_the_offline_phase_its_own(dataset, tmp_path):
    """With the same planner settings its planner serves; from its offline phase comes the run that computes it all."""
    whole = so2_dual.train(tiny_args("so2_dual", dataset=dataset, out_dir=tmp_path / "a", normalize_obs=True))
    calql_dual.train(tiny_args("calql_dual", dataset=dataset, out_dir=tmp_path / "calql", online_steps=0))
    (source,) = (tmp_path / "calql").glob("**/planner.pt")
    second = so2_dual.train(
        tiny_args(
            "so2_dual", dataset=dataset, out_dir=tmp_path / "b", normalize_obs=True, from_planner=source
        )
    )
    (source,) = (tmp_path / "a").glob("**/offline.pt")
    third = so2_dual.train(
        tiny_args(
            "so2_dual", dataset=dataset, out_dir=tmp_path / "c", normalize_obs=True, from_offline=source
        )
    )
    assert whole["final_score"] == second["final_score"] == third["final_score"]
    states = [final_state(tmp_path / k) for k in "abc"]
    for name in ("nets", "online_opt", "priorities", "explorer_offsets"):
        assert equal_states(states[0][name], states[1][name]) and equal_states(
            states[0][name], states[2][name]
        ), name
    for k, v in states[0]["planner_net"].items():  # P̂ stays as it was
        assert torch.equal(v, states[0]["nets"][f"transition.net.{k}"])


@pytest.mark.parametrize(
    "changes",
    [
        dict(horizon=1, shift_weight=0.0, balanced_replay=False, mixed_rows=24),
        dict(distill_steps=2, latent="sample", perturbation=False, bc_coef=0.1),
        dict(uq="latent"),
        dict(laplace_weights="elbo", laplace_noise="sigma"),
    ],
    ids=str,
)
def test_ablations_train(changes, dataset, tmp_path):
    result = so2_dual.train(tiny_args("so2_dual", dataset=dataset, out_dir=tmp_path, utd=2, **changes))
    assert all(math.isfinite(v) for v in result.values())


def test_metrics_are_those_of_the_docstring(dataset, tmp_path):
    so2_dual.train(tiny_args("so2_dual", dataset=dataset, out_dir=tmp_path, utd=1, bc_coef=0.1))
    rows = log_rows(tmp_path)
    where = {k: {x["phase"] for x in rows if x.get(k)} for k in rows[0]}
    both = "loss/q loss/actor loss/bc q/mean q/spread policy/log_prob policy/outside log_std/mean"
    both += " laplace/n_eff laplace/condition laplace/data_std"
    assert all(where[k] == {"offline", "online"} for k in both.split())
    assert (
        where["cql/gap"]
        == where["loss/alpha"]
        == where["alpha/entropy"]
        == where["shift/offline"]
        == {"offline"}
    )
    online = "loss/ratio replay/own_share replay/w_dataset uq/epistemic_std uq/share_shift"
    assert all(where[k] == {"online"} for k in online.split())


def test_actions_and_means_of_a_run_are_in_the_box(dataset, tmp_path, monkeypatch):
    """What is stored, what is evaluated, although the Gaussian is as wide as it gets."""
    seen, original = [], data.Evaluator.__call__

    def spied(self, policy, device):
        return original(self, lambda obs: seen.append(policy(obs)) or seen[-1], device)

    monkeypatch.setattr(data.Evaluator, "__call__", spied)
    monkeypatch.setattr(so2_dual, "LOG_STD_START", 0.5)
    so2_dual.train(tiny_args("so2_dual", dataset=dataset, out_dir=tmp_path, utd=1))
    stored = final_state(tmp_path)["replay"]["rows"][:, 11:14]
    assert 0.9 < stored.abs().max() <= 1 and torch.cat(seen).abs().max() <= 1
    assert ((stored.abs() > 0.9) & (stored.abs() < 1)).any()  # pushed in, not cut off
