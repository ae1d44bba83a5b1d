"""SO2 + OFF2ON: perturbation, targets, losses against a loop over critics, density ratio, priorities, draws, runs."""

import math
import time
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU, equal_states, final_state, log_rows, module, tiny_args
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from algorithms import so2
from common import run
from common.buffer import Batch, ReplayBuffer


def case(rows: int = 8, act_dim: int = 2, n: int = 3, **settings) -> tuple:
    """Nets in double precision whose targets differ, a batch with terminal rows, noise, settings."""
    torch.manual_seed(0)
    args = so2.Args(hidden=16, cql_n_actions=n, n_critics=4, **settings)
    nets = so2.make_so2_nets(5, act_dim, args.hidden, args.critic_layers, args.n_critics).double()
    with torch.no_grad():
        for p in [*nets["q_target"].parameters(), *nets["qf"].parameters()]:
            p.add_(0.1 * torch.randn_like(p))
        nets["weights"]["log_alpha"].fill_(-0.7)
    obs, next_obs = torch.randn(2, rows, 5).double()
    actions = torch.rand(rows, act_dim).double() * 2 - 1
    rewards, terminations = torch.randn(rows).double(), (torch.arange(rows) % 3 == 0).double()
    noise = tuple(x.double() for x in so2.draw_noise(rows, act_dim, n, CPU))
    return nets, Batch(obs, actions, rewards, next_obs, terminations), noise, args


def separate(stacked: so2.EnsembleQ) -> list[nn.Sequential]:
    """Each critic as layers of its own, with parameters of its own."""
    critics = []
    for k in range(stacked.weight[0].shape[0]):
        layers: list[nn.Module] = []
        for weight, bias in zip(stacked.weight, stacked.bias, strict=True):
            layer = nn.Linear(*weight.shape[1:]).double()
            layer.weight.data, layer.bias.data = weight[k].T.clone(), bias[k, 0].clone()
            layers += [layer, nn.ReLU()]
        critics.append(nn.Sequential(*layers[:-1]))
    return critics


def same_gradients(stacked: so2.EnsembleQ, critics: list[nn.Sequential]) -> bool:
    return all(
        torch.allclose(stacked.weight[i].grad[k], layer.weight.grad.T, rtol=1e-6, atol=1e-9)
        and torch.allclose(stacked.bias[i].grad[k, 0], layer.bias.grad, rtol=1e-6, atol=1e-9)
        for k, q in enumerate(critics)
        for i, layer in enumerate(q[::2])
    )


def acted(nets: nn.ModuleDict, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """π's action for that noise (B, A), and its log-probability (B,), from torch.distributions."""
    mean, log_std = nets["actor"](obs)
    actions = torch.tanh(mean + log_std.exp() * noise)
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    return actions, squashed.log_prob(actions).sum(-1)


# ---- perturbed value update, independent targets ----


def test_perturbation_is_a_clipped_gaussian():
    """Shares below points inside the bounds, and at the bounds, are the normal's (5 standard deviations)."""
    torch.manual_seed(0)
    noise = so2.draw_perturbation(100_000, 2, so2.Args(), CPU).flatten()
    assert noise.abs().max() == pytest.approx(0.6)
    for x in (-0.5, -0.2, 0.0, 0.1, 0.4):
        share = 0.5 * (1 + math.erf(x / 0.3 / math.sqrt(2)))
        found = (noise <= x).double().mean().item()
        assert found == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 200_000))
    beyond = 0.5 * math.erfc(2 / math.sqrt(2))  # 0.6 is two standard deviations
    for side in (-1, 1):
        found = (side * noise >= 0.6 - 1e-6).double().mean().item()
        assert found == pytest.approx(beyond, abs=5 * math.sqrt(beyond / 200_000))
    other = so2.Args(perturbation_std=2.0, perturbation_clip=0.1)
    assert so2.draw_perturbation(1_000, 2, other, CPU).abs().max() == pytest.approx(0.1)


@pytest.mark.parametrize("perturbed", [True, False])
def test_targets_are_each_critics_own_at_the_perturbed_action(perturbed):
    """r + γ (1 - d) (Q̂_k(s', clip(a' + ε)) - α log π(a'|s')), critic by critic; log π of a' itself; no gradient."""
    nets, batch, noise, args = case()
    epsilon = torch.linspace(-0.6, 0.6, 16).double().view(8, 2) if perturbed else None
    with torch.no_grad():
        next_policy = so2.squash(*nets["actor"](batch.next_obs), 3 * noise[1][:, 0])
    y = so2.own_targets(nets, batch, next_policy, epsilon, 0.2, args.gamma)
    actions, log_pi = acted(nets, batch.next_obs, 3 * noise[1][:, 0])
    moved = (actions + epsilon).clamp(-1, 1) if perturbed else actions
    assert not perturbed or (moved.abs() == 1).any()  # the clip is felt
    for k, q_target in enumerate(separate(nets["q_target"])):
        q_next = q_target(torch.cat([batch.next_obs, moved], 1))[:, 0]
        expected = batch.rewards + 0.99 * (1 - batch.terminations) * (q_next - 0.2 * log_pi)
        assert torch.allclose(y[k], expected, rtol=1e-6)
    assert not y.requires_grad
    assert torch.equal(y[:, 0], batch.rewards[0].expand(4)) and len(set(y[:, 1].tolist())) == 4


def test_critics_follow_their_own_targets_online():
    """Σ_k MSE(Q_k, y_k): loss and gradients of separate critics; nothing else has a gradient."""
    nets, batch, _, _ = case()
    target = torch.randn(4, 8).double()
    critics = separate(nets["qf"])
    values = [q(torch.cat([batch.obs, batch.actions], 1))[:, 0] for q in critics]
    expected = sum(F.mse_loss(q, y) for q, y in zip(values, target, strict=True))
    expected.backward()
    loss, logs = so2.value_losses(nets, batch, target)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item()) and same_gradients(nets["qf"], critics)
    assert all(p.grad is None for k in ("actor", "q_target", "weights") for p in nets[k].parameters())
    assert logs["q/spread"].item() == pytest.approx(torch.stack(values).std(0, correction=0).mean().item())


def test_actor_sees_the_least_of_all_critics():
    """mean(α log π - min_k Q_k), gradients to the actor alone; α as given."""
    nets, batch, noise, _ = case()
    actions, log_pi = acted(nets, batch.obs, noise[1][:, 0])
    values = torch.stack([q(torch.cat([batch.obs, actions], 1))[:, 0] for q in separate(nets["qf"])])
    assert len(set(values.argmin(0).tolist())) > 1
    expected = (0.2 * log_pi - values.amin(0)).mean()
    gradients = torch.autograd.grad(expected, [*nets["actor"].parameters()])
    loss, _ = so2.actor_losses(nets, batch.obs, noise[1][:, 0], 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for p, gradient in zip(nets["actor"].parameters(), gradients, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-5, atol=1e-8)
    assert all(p.grad is None for k in ("qf", "q_target", "weights") for p in nets[k].parameters())


def test_offline_critics_learn_as_a_loop_over_them_says():
    """Σ_k MSE(Q_k, y_k) + α_cql mean(logsumexp of 30 terms - Q_k), y_k of its own target with learned α, no noise."""
    nets, batch, noise, args = case()
    (uniform, normal), n, alpha = noise, 3, math.exp(-0.7)
    critics, targets = separate(nets["qf"]), separate(nets["q_target"])
    with torch.no_grad():
        next_actions, next_log_pi = acted(nets, batch.next_obs, normal[:, 2 * n])
        sampled = [(uniform[:, i], torch.full((8,), -2 * math.log(2)).double()) for i in range(n)]
        sampled += [acted(nets, batch.obs, normal[:, i]) for i in range(n)]
        sampled += [acted(nets, batch.next_obs, normal[:, n + i]) for i in range(n)]
    td = cql = 0.0
    for q, q_target in zip(critics, targets, strict=True):
        with torch.no_grad():
            q_next = q_target(torch.cat([batch.next_obs, next_actions], 1))[:, 0] - alpha * next_log_pi
            y = batch.rewards + 0.99 * (1 - batch.terminations) * q_next
        q_data = q(torch.cat([batch.obs, batch.actions], 1))[:, 0]
        terms = [q(torch.cat([batch.obs, a], 1))[:, 0] - log_prob for a, log_prob in sampled]
        td = td + F.mse_loss(q_data, y)
        cql = cql + (torch.stack(terms, 1).logsumexp(1) - q_data).mean()
    (td + 5.0 * cql).backward()
    actions, log_pi = acted(nets, batch.obs, normal[:, 3 * n])
    values = torch.stack([q(torch.cat([batch.obs, actions], 1))[:, 0] for q in separate(nets["qf"])])
    actor_loss = (alpha * log_pi - values.amin(0)).mean()
    gradients = torch.autograd.grad(actor_loss, [*nets["actor"].parameters()])
    loss, logs = so2.losses(nets, batch, noise, args)
    loss.backward()
    assert logs["loss/q"].item() == pytest.approx(td.item(), rel=1e-6)
    assert logs["cql/gap"].item() == pytest.approx(cql.item() / 4, rel=1e-6)
    assert logs["loss/actor"].item() == pytest.approx(actor_loss.item(), rel=1e-6)
    assert logs["loss/alpha"].item() == pytest.approx((0.7 * (log_pi - 2).mean()).item(), rel=1e-6)
    total = td + 5.0 * cql + logs["loss/actor"] + logs["loss/alpha"]
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    assert same_gradients(nets["qf"], critics)
    for p, gradient in zip(nets["actor"].parameters(), gradients, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-5, atol=1e-8)
    assert all(p.grad is None for p in nets["q_target"].parameters())


def test_targets_start_as_copies_and_critics_differ():
    torch.manual_seed(0)
    nets = so2.make_so2_nets(5, 2, 16, 3, 4)
    assert equal_states(nets["qf"].state_dict(), nets["q_target"].state_dict())
    assert not any(p.requires_grad for p in nets["q_target"].parameters())
    first = nets["qf"].weight[0]
    assert all(not torch.equal(first[i], first[j]) for i, j in combinations(range(4), 2))


# ---- density ratio ----


class Known(nn.Module):
    """log w of N(1, 1) to N(0, 1) in the first number of the observation: x - 1/2."""

    def forward(self, obs: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return obs[:, 0] - 0.5


def gaussian(mean: float, n: int, width: int = 1) -> Batch:
    """Rows whose observation is N(mean, 1) in the first number and N(0, 1) in the others, as are the actions."""
    obs = torch.randn(n, width).double()
    obs[:, 0] += mean
    return Batch(obs, torch.randn(n, 1).double(), torch.zeros(n), obs, torch.zeros(n))


def test_ratio_loss_is_the_bound_on_the_jensen_shannon_divergence():
    """At w itself it is 2 ln 2 - 2 JS(N(1, 1), N(0, 1)), JS by quadrature; as written in the code it is the same."""
    torch.manual_seed(0)
    own, dataset = gaussian(1.0, 400_000), gaussian(0.0, 400_000)
    loss, _, logs = so2.ratio_losses(Known(), own, dataset, dataset, 5.0)
    x = np.linspace(-10, 11, 200_001)
    p, q = (np.exp(-0.5 * (x - mean) ** 2) / math.sqrt(2 * math.pi) for mean in (1.0, 0.0))
    m = (p + q) / 2
    js = 0.5 * np.sum(p * np.log(p / m) + q * np.log(q / m)) * (x[1] - x[0])
    assert loss.item() == pytest.approx(2 * math.log(2) - 2 * js, abs=0.005)
    assert logs["replay/w_dataset"].item() == pytest.approx(1.0, abs=0.02)  # E_off[w] = 1
    w_own, w_dataset = (b.obs[:, 0].sub(0.5).exp() for b in (own, dataset))
    literal = -(2 / (w_dataset + 1)).log().mean() - (2 * w_own / (w_own + 1)).log().mean()
    assert loss.item() == pytest.approx(literal.item() + 2 * math.log(2))


def test_ratio_learns_the_closed_form_of_two_gaussians():
    """log w = x - 1/2 where there are data, from scratch, in a few seconds."""
    torch.manual_seed(0)
    ratio = so2.Ratio(3, 1, 64).double()
    opt = torch.optim.Adam(ratio.parameters(), 1e-3)
    assert ratio(*gaussian(0.0, 9, 3)[:2]).tolist() == [0.0] * 9  # w = 1 before anything is learned
    for _ in range(1_500):
        own, dataset = gaussian(1.0, 512, 3), gaussian(0.0, 512, 3)
        so2.learn(opt, so2.ratio_losses(ratio, own, dataset, dataset, 5.0)[0])
    x = torch.linspace(-1.0, 2.0, 13).double()
    obs = torch.zeros(13, 3).double()
    obs[:, 0] = x
    with torch.no_grad():
        error = ratio(obs, torch.zeros(13, 1).double()) - (x - 0.5)
    assert error.abs().max() < 0.2


def test_priorities_are_the_tempered_ratio_in_units_of_the_datasets_mean():
    """w^(1/T) / E_off[w^(1/T)], of N(0, 1): E[e^((x - 1/2) / T)] = e^(-1/(2T) + 1/(2T²)); within [1e-3, 1e3]."""
    torch.manual_seed(0)
    own, dataset, batch = gaussian(1.0, 9), gaussian(0.0, 400_000), gaussian(0.0, 50)
    for temperature in (5.0, 1.0):
        _, priorities, _ = so2.ratio_losses(Known(), own, dataset, batch, temperature)
        mean = math.exp(-0.5 / temperature + 0.5 / temperature**2)
        expected = ((batch.obs[:, 0] - 0.5) / temperature).exp() / mean
        assert torch.allclose(priorities, expected, rtol=0.01)
        assert not priorities.requires_grad
    far = Batch(torch.tensor([[-60.0], [60.0]]).double(), *batch[1:])
    assert so2.ratio_losses(Known(), own, dataset, far, 5.0)[1].tolist() == [1e-3, 1e3]


# ---- draws ----


def with_priorities(values: torch.Tensor, n_dataset: int = 0) -> so2.Priorities:
    priorities = so2.Priorities(len(values), n_dataset)
    priorities.assign(torch.arange(len(values)), values)
    return priorities


@pytest.mark.parametrize("rows", [1, 5, 128, 129, 700])
def test_draws_are_those_of_one_cumulative_sum(rows):
    """The row whose interval of the whole cumulative sum has (i + u) / n of the total, row for row."""
    torch.manual_seed(0)
    values = torch.rand(rows) ** 4
    values[torch.rand(rows) < 0.3] = 0.0
    values[rows // 2] = 1.0
    priorities = with_priorities(values)
    torch.manual_seed(1)
    found = priorities.draw(1_000)
    torch.manual_seed(1)
    points = (np.arange(1_000) + torch.rand(1_000, dtype=torch.float64).numpy()) / 1_000
    ends = np.cumsum(values.double().numpy())
    assert found.tolist() == np.searchsorted(ends, points * ends[-1], side="right").tolist()


def test_draws_are_as_frequent_as_the_priorities_say(capsys):
    """300 rows in three blocks, draws of one so that none is bound to another: χ² below its 99.9 % quantile."""
    torch.manual_seed(0)
    values = torch.rand(300) * (torch.rand(300) < 0.5)
    priorities = with_priorities(values)
    counts = torch.zeros(300)
    for _ in range(20_000):
        counts[priorities.draw(1)] += 1
    assert (counts[values == 0] == 0).all()
    expected = 20_000 * values / values.sum()
    known = expected > 5
    chi2 = ((counts - expected) ** 2 / expected)[known].sum().item()
    freedom = int(known.sum()) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson, Hilferty
    with capsys.disabled():
        print(f" [χ² {chi2:.0f} of {freedom}]", end="")
    assert chi2 < limit


def test_rows_without_priority_are_never_drawn():
    """Also at both ends of every interval, and where priorities span nine orders of magnitude."""
    values = torch.zeros(1_000)
    values[[127, 128, 640]] = torch.tensor([1e-6, 1e3, 1e-6])
    priorities = with_priorities(values)
    assert set(priorities.draw(4_096).tolist()) <= {127, 128, 640}
    ends = values.double().cumsum(0)[None]
    points = torch.tensor([[0.0, 1e-6, 1.0, 2.0]]).double() * ends[0, -1]
    index, left = priorities._find(ends, points)
    assert set(index[0].tolist()) <= {127, 128, 640} and (left >= 0).all()


def test_sums_follow_new_priorities():
    """Of rows drawn twice, of rows of one block, of rows that enter."""
    torch.manual_seed(0)
    priorities = so2.Priorities(500, 300)
    expected = torch.cat([torch.ones(300), torch.zeros(212)])
    assert torch.equal(priorities.of_rows.flatten(), expected)
    index = torch.randint(300, (64,))
    index[:8] = index[8:16]
    values = index.float() / 7 + 0.1  # a row has one priority
    priorities.assign(index, values)
    expected[index] = values
    for row in (300, 301, 383, 384):
        priorities.enter(row, 2.5)
        expected[row] = 2.5
    assert torch.equal(priorities.of_rows.flatten(), expected)
    assert torch.allclose(priorities.of_blocks, expected.double().view(-1, 128).sum(1))
    other = so2.Priorities(500, 300)
    other.load_state_dict(priorities.state_dict())
    assert torch.equal(other.of_blocks, priorities.of_blocks)


@pytest.mark.parametrize("own_frac", [0.5, 0.75, 0.1])
def test_own_rows_begin_with_their_share(own_frac):
    """After the warm-up's rows came in, f of the draws are of them, however many the dataset has."""
    torch.manual_seed(0)
    n_dataset, n_own = 5_000, 120
    priorities = so2.Priorities(6_000, n_dataset)
    for row in range(n_dataset, n_dataset + n_own):
        priorities.enter(row, so2.first_priority(own_frac, n_dataset, n_own))
    index = priorities.draw(20_000)
    assert (index >= n_dataset).float().mean().item() == pytest.approx(own_frac, abs=2 / 20_000 + 1e-3)
    assert len(set(index[index >= n_dataset].tolist())) == n_own and index.max() < n_dataset + n_own


def test_cost_of_a_draw_from_two_million_rows(capsys):
    """Milliseconds of a draw of 256 and of their new priorities, beside one cumulative sum of all rows; printed."""
    priorities, all_rows = so2.Priorities(2_000_000, 1_000_000), torch.ones(2_000_000, dtype=torch.float64)

    def median(program) -> float:
        times = []
        for _ in range(15):
            start = time.perf_counter()
            program()
            times.append(1e3 * (time.perf_counter() - start))
        return sorted(times)[7]

    def draw() -> None:
        priorities.assign(priorities.draw(256), torch.full((256,), 2.0))

    ours, whole = median(draw), median(lambda: all_rows.cumsum(0))
    with capsys.disabled():
        print(f" [draw and assign {ours:.2f} ms; one cumulative sum of all {whole:.2f} ms]", end="")
    assert ours < 50


# ---- whole runs ----


def spied(monkeypatch, name: str) -> list:
    """The arguments and the result of every call of so2.<name>."""
    calls, original = [], getattr(so2, name)

    def spy(*args):
        calls.append((args, original(*args)))
        return calls[-1][1]

    monkeypatch.setattr(so2, name, spy)
    return calls


def test_updates_of_a_run(random_rows, tmp_path, monkeypatch):
    """utd steps of the critics, one of ratio with each, to one of the actor, whose states are the last batch's."""
    values, actors, ratios, targets = (
        spied(monkeypatch, k) for k in ("value_losses", "actor_losses", "ratio_losses", "own_targets")
    )
    so2.train(tiny_args("so2", dataset=random_rows, out_dir=tmp_path, utd=3))
    assert len(values) == len(ratios) == 3 * 20 and len(actors) == 20
    for i, ((_, obs, _, alpha), _) in enumerate(actors):
        assert torch.equal(obs, values[3 * i + 2][0][1].obs) and alpha == 0.2
    offline, online = targets[:20], targets[20:]
    assert all(args[3] is None for args, _ in offline)
    assert all(0 < args[3].abs().max() <= 0.6 and args[4] == 0.2 for args, _ in online)
    for ((_, batch, target), _), ((_, own, dataset, drawn, _), _), (_, y) in zip(
        values, ratios, online, strict=True
    ):
        assert torch.equal(batch.obs, drawn.obs) and torch.equal(target, y)
        assert len(own.obs) == len(dataset.obs) == 16


def test_ratio_batches_are_of_either_kind_and_priorities_are_kept(random_rows, tmp_path, monkeypatch):
    """Own rows are those after the dataset's; what is stored of drawn rows is what the last step gave them."""
    ratios, drawn = spied(monkeypatch, "ratio_losses"), []
    assign = so2.Priorities.assign

    def spy(priorities, index, values):
        drawn.append((index.clone(), values.clone()))
        assign(priorities, index, values)

    monkeypatch.setattr(so2.Priorities, "assign", spy)
    so2.train(tiny_args("so2", dataset=random_rows, out_dir=tmp_path, utd=2))
    state = final_state(tmp_path)
    own = {tuple(x) for x in state["replay"]["rows"][:, :11].tolist()}
    n_dataset = state["replay"]["fixed"]
    expected = torch.ones(n_dataset + 30)
    expected[n_dataset:] = so2.first_priority(0.5, n_dataset, 10)
    for index, values in drawn:
        expected[index] = values
    assert torch.allclose(state["priorities"]["of_rows"].flatten()[: n_dataset + 30], expected)
    assert len(ratios) == len(drawn) == 40
    for (_, mine, dataset, _, _), _ in ratios:
        assert all(tuple(x) in own for x in mine.obs.tolist())
        assert not any(tuple(x) in own for x in dataset.obs.tolist())
    first, last = ((index >= n_dataset).float().mean() for index, _ in (drawn[0], drawn[-1]))
    assert 0.4 < first < 0.7  # f, one row more than the warm-up's
    logged = [row["replay/own_share"] for row in log_rows(tmp_path) if row["replay/own_share"]]
    assert float(logged[-1]) == last


def test_so2_alone_has_own_rows_and_rows_of_all(random_rows, tmp_path, monkeypatch):
    """batch_size own rows first, then mixed_rows of everything; no ratio is learned."""
    values = spied(monkeypatch, "value_losses")
    settings = dict(utd=2, balanced_replay=False, mixed_rows=24)
    so2.train(tiny_args("so2", dataset=random_rows, out_dir=tmp_path, **settings))
    state = final_state(tmp_path)
    assert "ratio" not in state and "priorities" not in state
    own = {tuple(x) for x in state["replay"]["rows"][:, :11].tolist()}
    kinds = [[tuple(x) in own for x in batch.obs.tolist()] for (_, batch, _), _ in values]
    assert len(kinds) == 40 and all(len(k) == 16 + 24 and all(k[:16]) for k in kinds)
    share = sum(sum(k[16:]) for k in kinds) / (40 * 24)
    assert 0 < share < 0.1  # 11 to 30 of 600 and so many


def test_draw_own_is_uniform_over_the_rows_after_the_dataset():
    replay = ReplayBuffer(20, 2, 1, CPU)
    replay.append(torch.zeros(12, 7))
    replay.fixed = 12
    replay.append(torch.ones(5, 7))
    torch.manual_seed(0)
    counts = torch.bincount(so2.draw_own(replay, 10_000), minlength=20)
    assert (counts[:12] == 0).all() and (counts[17:] == 0).all()
    assert (counts[12:17] - 2_000).abs().max() < 5 * math.sqrt(2_000)


def test_without_perturbation_targets_are_at_the_policys_action(random_rows, tmp_path, monkeypatch):
    targets = spied(monkeypatch, "own_targets")
    so2.train(tiny_args("so2", dataset=random_rows, out_dir=tmp_path, perturbation=False))
    assert all(args[3] is None for args, _ in targets)


def test_targets_follow(random_rows, tmp_path):
    so2.train(tiny_args("so2", dataset=random_rows, out_dir=tmp_path, polyak=1.0))
    nets = final_state(tmp_path)["nets"]
    weights = {k.removeprefix("qf."): v for k, v in nets.items() if k.startswith("qf.")}
    assert weights and all(torch.equal(v, nets[f"q_target.{k}"]) for k, v in weights.items())


def test_it_starts_from_its_own_offline_phase_and_from_no_other(random_rows, tmp_path):
    whole = so2.train(tiny_args("so2", dataset=random_rows, out_dir=tmp_path / "a"))
    (source,) = (tmp_path / "a").glob("**/offline.pt")
    second = so2.train(tiny_args("so2", dataset=random_rows, out_dir=tmp_path / "b", from_offline=source))
    assert whole["final_score"] == second["final_score"]
    assert equal_states(final_state(tmp_path / "a")["nets"], final_state(tmp_path / "b")["nets"])
    alone = tiny_args(
        "so2", dataset=random_rows, out_dir=tmp_path / "c", from_offline=source, balanced_replay=False
    )
    so2.train(alone)  # one offline phase for both
    module("apl").train(tiny_args("apl", dataset=random_rows, out_dir=tmp_path / "d", online_steps=0))
    (other,) = (tmp_path / "d").glob("**/offline.pt")
    with pytest.raises(run.UsageError, match="--from-offline"):
        so2.train(tiny_args("so2", dataset=random_rows, out_dir=tmp_path / "e", from_offline=other))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(own_frac=1.0),
        dict(own_frac=0.0),
        dict(mixed_rows=100),
        dict(perturbation=False, perturbation_std=1.0),
        dict(balanced_replay=False, ratio_temperature=1.0),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(wrong, random_rows, tmp_path):
    with pytest.raises(run.UsageError, match=run.flag(list(wrong)[-1])):
        so2.train(tiny_args("so2", dataset=random_rows, out_dir=tmp_path, **wrong))
