"""APL: losses against a loop over separate critics, the pair, the coin, what is recent, the start, refusals."""

import math
from collections import Counter
from itertools import combinations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU, equal_states, final_state, log_rows, module, tiny_args
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from algorithms import apl, apl_cfdg
from common import run
from common.buffer import Batch, ReplayBuffer


def case(rows: int = 8, act_dim: int = 2, n: int = 3, **settings) -> tuple:
    """Nets in double precision whose targets differ, a batch with terminal rows, draws, settings."""
    torch.manual_seed(0)
    args = apl.Args(hidden=16, cql_n_actions=n, **settings)
    nets = apl.make_apl_nets(5, act_dim, args).double()
    with torch.no_grad():
        for p in [*nets["q_target"].parameters(), *nets["qf"].parameters()]:
            p.add_(0.1 * torch.randn_like(p))
        nets["weights"]["log_alpha"].fill_(-0.7)
    obs, next_obs = torch.randn(2, rows, 5).double()
    actions = torch.rand(rows, act_dim).double() * 2 - 1
    rewards, terminations = torch.randn(rows).double(), (torch.arange(rows) % 3 == 0).double()
    noise = tuple(x.double() for x in apl.draw_noise(rows, act_dim, n, CPU))
    return nets, Batch(obs, actions, rewards, next_obs, terminations), (*noise, torch.tensor([3, 1])), args


def separate(stacked: apl.EnsembleQ) -> list[nn.Sequential]:
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


def policy(nets: nn.ModuleDict, obs: torch.Tensor) -> TransformedDistribution:
    mean, log_std = nets["actor"](obs)
    return TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))


def acted(nets: nn.ModuleDict, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """π's action for that noise (B, A), and its log-probability (B,)."""
    mean, log_std = nets["actor"](obs)
    actions = torch.tanh(mean + log_std.exp() * noise)
    return actions, policy(nets, obs).log_prob(actions).sum(-1)


# ---- losses ----


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_critics_learn_as_a_loop_over_five_of_them_says(weight):
    """Σ_k MSE(Q_k, y) + weight · mean(logsumexp of 30 terms - Q_k): loss and gradients; y has no entropy term.

    With weight 0, as for a batch of recent rows, that is the TD loss and nothing else.
    """
    nets, batch, draws, args = case()
    uniform, normal, pair = draws
    n = args.cql_n_actions
    critics, targets = separate(nets["qf"]), separate(nets["q_target"])
    with torch.no_grad():
        next_actions, _ = acted(nets, batch.next_obs, normal[:, 2 * n])
        both = [targets[k](torch.cat([batch.next_obs, next_actions], 1))[:, 0] for k in pair]
        y = batch.rewards + 0.99 * (1 - batch.terminations) * torch.minimum(*both)
        sampled = [(uniform[:, i], torch.full((8,), -2 * math.log(2)).double()) for i in range(n)]
        sampled += [acted(nets, batch.obs, normal[:, i]) for i in range(n)]
        sampled += [acted(nets, batch.next_obs, normal[:, n + i]) for i in range(n)]
    td = cql = 0.0
    for q in critics:
        q_data = q(torch.cat([batch.obs, batch.actions], 1))[:, 0]
        terms = [q(torch.cat([batch.obs, a], 1))[:, 0] - log_prob for a, log_prob in sampled]
        td = td + F.mse_loss(q_data, y)
        cql = cql + (torch.stack(terms, 1).logsumexp(1) - q_data).mean()
    expected = td if weight == 0 else td + weight * cql
    expected.backward()
    loss, logs = apl.losses(nets, batch, weight, draws, args)
    loss.backward()
    assert logs["loss/q"].item() == pytest.approx(
        td.item(), rel=1e-6
    )  # atanh(tanh u) in what is compared with
    if weight:
        assert logs["cql/gap"].item() == pytest.approx(cql.item() / 5, rel=1e-6)
    else:
        assert "cql/gap" not in logs
    others = logs["loss/actor"] + logs["loss/alpha"]
    assert (loss - others).item() == pytest.approx(expected.item(), rel=1e-6)
    for k, q in enumerate(critics):
        for i, layer in enumerate(q[::2]):
            assert torch.allclose(nets["qf"].weight[i].grad[k], layer.weight.grad.T, rtol=1e-6, atol=1e-9)
            assert torch.allclose(nets["qf"].bias[i].grad[k, 0], layer.bias.grad, rtol=1e-6, atol=1e-9)
    assert all(p.grad is None for p in nets["q_target"].parameters())


def test_actor_maximises_the_mean_of_five_and_alpha_meets_the_target_entropy():
    """mean(α log π - Σ_k Q_k / 5), gradients to the actor alone; -mean(log α (log π - A))."""
    nets, batch, draws, args = case()
    noise = draws[1][:, 3 * args.cql_n_actions]
    actions, log_pi = acted(nets, batch.obs, noise)
    values = [q(torch.cat([batch.obs, actions], 1))[:, 0] for q in separate(nets["qf"])]
    expected = (math.exp(-0.7) * log_pi - sum(values) / 5).mean()
    gradients = torch.autograd.grad(expected, [*nets["actor"].parameters()])
    loss, logs = apl.losses(nets, batch, 5.0, draws, args)
    assert logs["loss/actor"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert logs["loss/alpha"].item() == pytest.approx((0.7 * (log_pi - 2).mean()).item(), rel=1e-6)
    loss.backward()
    for p, gradient in zip(nets["actor"].parameters(), gradients, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-5, atol=1e-8)
    assert nets["weights"]["log_alpha"].grad.item() == pytest.approx(-(log_pi - 2).mean().item(), rel=1e-6)
    spread = torch.stack([q(torch.cat([batch.obs, batch.actions], 1))[:, 0] for q in separate(nets["qf"])])
    assert logs["q/spread"].item() == pytest.approx(spread.std(0, correction=0).mean().item(), rel=1e-6)


def test_stacked_critics_are_separate_critics():
    nets, batch, _, _ = case()
    stacked = nets["qf"](batch.obs, batch.actions)
    for k, q in enumerate(separate(nets["qf"])):
        assert torch.allclose(stacked[k], q(torch.cat([batch.obs, batch.actions], 1))[:, 0])


def test_targets_start_as_copies_and_critics_differ():
    torch.manual_seed(0)
    nets = apl.make_apl_nets(5, 2, apl.Args(hidden=16))
    assert equal_states(nets["qf"].state_dict(), nets["q_target"].state_dict())
    assert not any(p.requires_grad for p in nets["q_target"].parameters())
    first = nets["qf"].weight[0]
    assert len(first) == 5 and all(not torch.equal(first[i], first[j]) for i, j in combinations(range(5), 2))


# ---- what is drawn ----


def test_pairs_are_different_critics_and_all_as_likely(capsys):
    """20,000 pairs of five: ten kinds, χ² of 9 degrees of freedom below its 99.9 % quantile, 27.9."""
    torch.manual_seed(0)
    pairs = [apl.draw_pair(5, 2, CPU).tolist() for _ in range(20_000)]
    counts = Counter(tuple(sorted(p)) for p in pairs)
    assert set(counts) == set(combinations(range(5), 2))
    chi2 = sum((c - 2_000) ** 2 / 2_000 for c in counts.values())
    with capsys.disabled():
        print(f" [χ² {chi2:.1f}]", end="")
    assert chi2 < 27.9
    assert sorted(apl.draw_pair(5, 5, CPU).tolist()) == [0, 1, 2, 3, 4]


def numbered(first: int, n: int, capacity: int) -> ReplayBuffer:
    """n rows, every number of the i-th is first + i."""
    buffer = ReplayBuffer(capacity, 2, 1, CPU)
    buffer.append((first + torch.arange(n))[:, None].expand(n, 7).float())
    return buffer


def drawn(own: int, draws: int, n: int = 64, **settings) -> list[tuple[list[int], bool]]:
    """Of a dataset of rows 0-99 and own rows 100, 101, ...: the rows of each batch, and whether they are recent."""
    torch.manual_seed(0)
    args = apl.Args(**dict(fifo_rows=20, fifo_from=10) | settings)
    offline, online = numbered(0, 100, 100), numbered(100, own, 200)
    found = []
    for update in range(draws):
        recent = apl.toss(args, online, update)
        batch = apl.draw_oorb(offline, online, n, recent, args)
        columns = torch.cat([x if x.ndim == 2 else x[:, None] for x in batch], 1)
        assert columns.shape == (n, 7) and (columns == columns[:, :1]).all()  # whole rows
        found.append((columns[:, 0].int().tolist(), recent))
    return found


def test_no_batch_is_recent_until_there_are_more_own_rows_than_the_threshold():
    assert not any(recent for own in (0, 1, 10) for _, recent in drawn(own, 300))
    assert any(recent for _, recent in drawn(11, 300))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_recent_batches_are_as_frequent_as_the_coin_says(p):
    share = sum(recent for _, recent in drawn(50, 2_000, n=1, fifo_prob=p)) / 2_000
    assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 2_000))


def test_coins_are_those_of_seed_and_update_and_not_all_alike():
    """What a stopped run needs: the same again, whatever was drawn in between; another seed has others."""
    online = numbered(0, 50, 50)
    first, again, other = (
        [apl.toss(apl.Args(seed=seed, fifo_from=10), online, k) for k in range(200)] for seed in (0, 0, 1)
    )
    assert first == again != other and 60 < sum(first) < 140


@pytest.mark.parametrize("own", [15, 20, 21, 150])
def test_the_fifo_is_the_newest_own_rows_and_the_growing_buffer_all_rows(own):
    """Every row of either is met, and no other; each as often as any other (5 standard deviations)."""
    batches = drawn(own, 1_000)
    newest = range(max(100, 100 + own - 20), 100 + own)
    for kind, rows in ((True, newest), (False, range(100 + own))):
        counts = Counter(row for batch, recent in batches if recent == kind for row in batch)
        assert set(counts) == set(rows)
        expected = counts.total() / len(rows)
        assert max(abs(c - expected) for c in counts.values()) < 5 * math.sqrt(expected)


def test_updates_of_a_run(random_rows, tmp_path, monkeypatch):
    """utd per environment step after the warm-up; weight 0 exactly on batches of the newest own rows."""
    seen, losses, like = [], apl.losses, ReplayBuffer.like
    buffers: list[ReplayBuffer] = []

    def spy_like(buffer, capacity):
        buffers.append(like(buffer, capacity))
        return buffers[-1]

    def spy(nets, batch, weight, draws, args):
        own = {tuple(x) for x in buffers[0].obs[-8:].tolist()} if buffers[0].rows else set()
        newest = all(tuple(x) in own for x in batch.obs.tolist())
        seen.append((buffers[0].rows, float(weight), newest))
        assert len(set(draws[2].tolist())) == 2
        return losses(nets, batch, weight, draws, args)

    monkeypatch.setattr(apl, "losses", spy)
    monkeypatch.setattr(ReplayBuffer, "like", spy_like)
    apl.train(tiny_args("apl", dataset=random_rows, out_dir=tmp_path, utd=3))
    offline, online = seen[:20], seen[20:]
    assert offline == [(0, 5.0, False)] * 20 and len(online) == 3 * 20
    assert [rows for rows, *_ in online] == [rows for rows in range(11, 31) for _ in range(3)]
    assert {weight for rows, weight, _ in online if rows <= 12} == {5.0}
    assert all(newest == (weight == 0) for _, weight, newest in online)
    assert {weight for rows, weight, _ in online if rows > 12} == {0.0, 5.0}


# ---- whole runs ----


def test_targets_are_copies_when_a_run_starts_and_follow(random_rows, tmp_path):
    apl.train(tiny_args("apl", dataset=random_rows, out_dir=tmp_path, polyak=1.0))
    nets = final_state(tmp_path)["nets"]
    weights = {k.removeprefix("qf."): v for k, v in nets.items() if k.startswith("qf.")}
    assert weights and all(torch.equal(v, nets[f"q_target.{k}"]) for k, v in weights.items())


def test_it_starts_from_its_own_offline_phase_and_from_no_other(random_rows, tmp_path):
    whole = apl.train(tiny_args("apl", dataset=random_rows, out_dir=tmp_path / "a"))
    (source,) = (tmp_path / "a").glob("**/offline.pt")
    second = apl.train(tiny_args("apl", dataset=random_rows, out_dir=tmp_path / "b", from_offline=source))
    assert whole["final_score"] == second["final_score"]
    assert equal_states(final_state(tmp_path / "a")["nets"], final_state(tmp_path / "b")["nets"])
    assert {row["apl/recent"] for row in log_rows(tmp_path / "a") if row["apl/recent"]} <= {"0.0", "1.0"}
    module("calql").train(tiny_args("calql", dataset=random_rows, out_dir=tmp_path / "c", online_steps=0))
    (other,) = (tmp_path / "c").glob("**/offline.pt")
    with pytest.raises(run.UsageError, match="--from-offline"):
        apl.train(tiny_args("apl", dataset=random_rows, out_dir=tmp_path / "d", from_offline=other))
    with pytest.raises(run.UsageError, match="critics 5 -> 4"):
        apl.train(
            tiny_args("apl", dataset=random_rows, out_dir=tmp_path / "e", from_offline=source, n_critics=4)
        )


@pytest.mark.parametrize(
    "wrong",
    [dict(critic_subset=6), dict(n_critics=1), dict(fifo_prob=1.5), dict(fifo_prob=0.0, fifo_rows=5)],
    ids=str,
)
def test_wrong_settings_are_refused(wrong, random_rows, tmp_path):
    name = "critic_subset" if "n_critics" in wrong else list(wrong)[-1]
    with pytest.raises(run.UsageError, match=run.flag(name)):
        apl.train(tiny_args("apl", dataset=random_rows, out_dir=tmp_path, **wrong))


# ---- CFDG on APL ----


def test_batches_have_a_third_of_generated_rows_of_both_labels_in_both_branches(
    random_rows, tmp_path, monkeypatch
):
    """256 rows: all real until there are generated ones, then 171 and 68 + 17; weight 0 with newest own rows alone."""
    seen, batches = {}, []
    losses, init = apl_cfdg.losses, apl_cfdg.LabelledGenerator.__init__

    def spy_init(g, r, args, offline, online):
        init(g, r, args, offline, online)
        seen.update(online=online, generator=g)

    def spy(nets, batch, weight, draws, args):
        end, kept, own = int(seen["generator"].boundary), seen["generator"].synthetic.obs, seen["online"].obs
        known = [{tuple(row) for row in x.tolist()} for x in (kept[:end], kept[end:], own[-8:])]
        rows = [tuple(row) for row in batch.obs.tolist()]
        n_first, n_second, n_newest = (sum(row in x for row in rows) for x in known)
        n_real = len(rows) - n_first - n_second
        batches.append((n_real, n_first, n_second, float(weight), n_newest == n_real))
        assert len(draws[0]) == len(rows)  # pessimism, where it is felt, is on generated rows too
        return losses(nets, batch, weight, draws, args)

    monkeypatch.setattr(apl_cfdg.LabelledGenerator, "__init__", spy_init)
    monkeypatch.setattr(apl_cfdg, "losses", spy)
    settings = dict(dataset=random_rows, out_dir=tmp_path, batch_size=256, warmup_steps=5, utd=2)
    apl_cfdg.train(tiny_args("apl_cfdg", **settings))
    assert [b[:3] for b in batches] == [(256, 0, 0)] * (20 + 10) + [(171, 68, 17)] * 40
    assert all(newest == (weight == 0) for *_, weight, newest in batches[30:])
    assert {b[3] for b in batches[:30]} == {5.0} and {b[3] for b in batches[30:]} == {0.0, 5.0}


def test_without_a_regeneration_the_run_is_that_of_apl(random_rows, tmp_path):
    ours = apl_cfdg.train(tiny_args("apl_cfdg", dataset=random_rows, out_dir=tmp_path / "a", regenerations=1))
    theirs = apl.train(tiny_args("apl", dataset=random_rows, out_dir=tmp_path / "b"))
    assert all(ours[k] == theirs[k] for k in ("offline_score", "final_score", "score_last4"))
    assert log_rows(tmp_path / "a") == log_rows(tmp_path / "b")
