"""EDIS: energies against Gaussians whose ratios are known, guidance by hand, batches and regenerations."""

import contextlib
import gc
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import log_rows, module, tiny_args

from algorithms import edis, iql_edis
from common import data, edm, run
from common.buffer import ReplayBuffer

CPU = torch.device("cpu")
BOTH = ["edis", "iql_edis"]


# ---- the contrast ----


def test_info_nce_by_hand():
    """Two groups of one positive and two negatives; one negative: softplus; the cross entropy of finding the first."""
    energy = torch.tensor([[0.0, math.log(2), math.log(4)], [1.0, 1.0, 1.0]])
    by_hand = (0 + math.log(1 + 1 / 2 + 1 / 4), 1 + math.log(3 * math.exp(-1)))
    assert edis.info_nce(energy).item() == pytest.approx(sum(by_hand) / 2)
    pair = torch.randn(50, 2)
    assert edis.info_nce(pair).item() == pytest.approx(F.softplus(pair[:, 0] - pair[:, 1]).mean().item())
    group = torch.randn(50, 11)
    first = torch.zeros(50, dtype=torch.long)
    assert edis.info_nce(group).item() == pytest.approx(F.cross_entropy(-group, first).item())


def test_network_sees_scaled_features_and_the_noise_level():
    torch.manual_seed(0)
    net = edis.TransitionEnergy(2, 8)
    assert [tuple(layer.weight.shape) for layer in net.net[::2]] == [(8, 3), (8, 8), (8, 8), (1, 8)]
    x, sigma = torch.randn(5, 4, 2), torch.tensor([0.01, 0.5, 1.0, 9.0, 80.0]).view(5, 1, 1)
    h = torch.cat([x / (1 + sigma**2).sqrt(), (sigma.log() / 4).expand(5, 4, 1)], -1)
    for layer in net.net[::2]:
        h = h.clamp(min=0) if layer is not net.net[0] else h
        h = h @ layer.weight.T + layer.bias
    assert torch.allclose(net(x, sigma), h[..., 0], atol=1e-6)


def test_a_group_has_one_noise_level_and_one_noise_on_what_is_known():
    torch.manual_seed(0)
    sigma = torch.tensor([0.1, 10.0]).view(2, 1, 1)
    noise = edis.noised_groups(torch.zeros(2, 50_000, 3), sigma, 2) / sigma
    assert torch.equal(noise[:, :1, :2].expand(-1, 50_000, -1), noise[..., :2])
    assert noise[..., 2].std(1).tolist() == pytest.approx([1, 1], abs=0.02)
    free = edis.noised_groups(torch.zeros(2, 50_000, 3), sigma, 0) / sigma
    assert torch.corrcoef(free[0].T).sub(torch.eye(3)).abs().max() < 0.02


# ---- Gaussians: s, a, r, s' with one coordinate each ----

MODEL = torch.tensor([[1, 0, 0.4], [0, 1, 0.4], [0.4, 0.4, 0.96]])  # of s, a, s': s' = 0.4 s + 0.4 a + 0.8 n
REAL = torch.tensor([[1, 0, 0.8], [0, 1, 0.4], [0.8, 0.4, 0.96]])  # s' = 0.8 s + 0.4 a + 0.4 n
SHIFT = torch.tensor([1.0, 0.5, 1.0])  # mean of real rows
POLICY = torch.tensor([[1, 0.5], [0.5, 0.61]])  # of s, a at the model's states: a = 0.5 s + 0.6 n


def log_density(cov: torch.Tensor, mean: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Of N(mean, cov + σ² I), up to a constant: x (..., W), sigma (..., 1) -> (...)."""
    scale = sigma[..., None] ** 2 * torch.eye(len(cov)).to(x) + cov.to(x)  # (..., W, W), of size 1 where σ is
    gap = x - mean.to(x)
    return -0.5 * ((gap @ scale[(0,) * (scale.ndim - 2)].inverse() * gap).sum(-1) + scale.logdet())


def ratio_energy(positive: tuple, negative: tuple):
    """-log p+/p- at noise level σ."""
    return lambda x, sigma: log_density(*negative, x, sigma) - log_density(*positive, x, sigma)


OPTIMA = {
    "state": ratio_energy((MODEL[:1, :1], SHIFT[:1]), (MODEL[:1, :1], torch.zeros(1))),
    "policy": ratio_energy((POLICY, torch.zeros(2)), (MODEL[:2, :2], torch.zeros(2))),
    "dynamics": ratio_energy((REAL, SHIFT), (MODEL, torch.zeros(3))),
}


def case(out, rows: int = 50_000, **changes) -> edis.Energies:
    """Energies whose pool, own rows and policy are those of the Gaussians above; half the own rows in each buffer."""
    settings = dict(energy_pool=rows, sample_steps=32, energy_width=32, energy_lr=1e-3) | changes
    args = tiny_args("edis", out_dir=out, **settings)
    torch.manual_seed(0)
    real = torch.randn(rows, 3) @ torch.linalg.cholesky(REAL).T + SHIFT
    model = torch.randn(rows, 3) @ torch.linalg.cholesky(MODEL).T
    buffers = [ReplayBuffer(rows // 2, 1, 1, CPU) for _ in range(2)]
    table = torch.cat([real[:, :2], torch.zeros(rows, 1), real[:, 2:], torch.zeros(rows, 1)], 1)
    for buffer, part in zip(buffers, table.chunk(2), strict=True):
        buffer.append(part)
    r = run.Run(args, "edis.py", "x", {})
    net = edis.TransitionNet(4, args.diffusion_width, 1, args.diffusion_time_dim)
    e = edis.Energies(r, args, edis.Generator(r, args, net, buffers[0], 1, 1), *buffers)
    e.pool.copy_(torch.cat([model[:, :2], torch.randn(rows, 1), model[:, 2:]], 1))
    e.act = lambda s: 0.5 * s + 0.6 * torch.randn_like(s)
    return e


@pytest.mark.parametrize("name", ["state", "policy", "dynamics"])
@pytest.mark.parametrize("sigma", [0.2, 2.0])
def test_least_loss_is_at_the_log_ratio_of_noised_densities(name, sigma, tmp_path):
    """The groups as drawn, noised as trained: any change of the closed form costs, in every direction tried."""
    others = {f"{k}_energy": 0.0 for k in OPTIMA if k != name}
    e = case(tmp_path, energy_groups=30_000, **others)
    groups, level = e.groups(), torch.full((30_000, 1, 1), sigma)
    assert list(groups) == [name]
    free = lambda x: x[..., -1] / (1 + sigma)  # noqa: E731
    known = lambda x: x[..., 0] / (1 + sigma)  # noqa: E731
    changes = [lambda _, e: 0.3 * e, lambda x, _: 0.2 * free(x), lambda x, _: 0.1 * free(x).square()]
    if name != "state":
        changes.append(lambda x, _: 0.2 * free(x) * known(x))

    def loss(change) -> float:
        e.nets = {name: lambda x, s: OPTIMA[name](x, s) + change(x, OPTIMA[name](x, s))}
        torch.manual_seed(1)
        return e.group_losses(groups, {name: level})[0].item()

    least = loss(lambda *_: 0.0)
    assert least < math.log(2 if name == "policy" else 11)
    for change in changes:
        assert loss(change) > least and loss(lambda *x, c=change: -c(*x)) > least


def test_next_state_gradient_of_the_joint_ratio_is_that_of_the_conditional_one():
    """D43: ∇_s' log p(s, a, s') / q(s, a, s') = ∇_s' log p(s'|s, a) / q(s'|s, a), at any noise level."""
    torch.manual_seed(0)
    x = torch.randn(100, 3).double()
    for sigma in (0.05, 1.0, 20.0):
        free = x[:, 2:].clone().requires_grad_()
        full, level = torch.cat([x[:, :2], free], 1), torch.full((1, 1), sigma).double()
        (joint,) = torch.autograd.grad(OPTIMA["dynamics"](full, level).sum(), free)
        scores = []
        for cov, mean in ((MODEL, torch.zeros(3)), (REAL, SHIFT)):  # of N(m + b (x - μ), v)
            s = cov.double() + sigma**2 * torch.eye(3).double()
            b = torch.linalg.solve(s[:2, :2], s[:2, 2])
            v = s[2, 2] - s[2, :2] @ b
            scores.append(-(x[:, 2] - mean[2] - (x[:, :2] - mean[:2]) @ b) / v)
        assert torch.allclose(joint[:, 0], scores[0] - scores[1], rtol=1e-6)


def test_two_gaussians_learned_energy_and_guided_samples(tmp_path, capsys):
    """Model N(0, 1), own states N(1, 1): slope -1 / (1 + σ²); guided samples have mean 1 and std 1."""
    e = case(tmp_path, rows=20_000, policy_energy=0.0, dynamics_energy=0.0, energy_groups=256)
    for _ in range(500):
        e.energy_step()
    e.opt.param_groups[0]["lr"] = 1e-4
    for _ in range(100):
        e.energy_step()
    slopes = {}
    for sigma in (0.1, 0.5, 1.0, 2.0):
        x = 0.5 + math.sqrt(1 + sigma**2) * torch.randn(5_000, 4)
        slopes[sigma] = e.gradient(x, sigma)[:, 0].mean().item()
    exact = edm.with_energy(lambda x, sigma: x / (1 + sigma**2), e.gradient)  # the model of N(0, I)
    x = edm.sample(exact, 80 * torch.randn(20_000, 4), 32, 0.0)
    mean, std = x.mean(0).tolist(), x.std(0).tolist()
    with capsys.disabled():
        print(f" [slopes {slopes}, guided mean {mean[0]:.3f}, std {std[0]:.3f}]", end="")
    for sigma, slope in slopes.items():
        assert slope == pytest.approx(-1 / (1 + sigma**2), rel=0.2)
    assert mean[0] == pytest.approx(1.0, abs=0.12) and std[0] == pytest.approx(1.012, abs=0.13)
    assert mean[1:] == pytest.approx([0, 0, 0], abs=0.03) and std[1:] == pytest.approx([1.012] * 3, abs=0.02)


# ---- replacement ----


@pytest.mark.parametrize(
    ("repeats", "mean", "std"), [(1, 0.49, 0.81), (32, 1.16, 0.615)], ids=["one pass", "32 repeats"]
)
def test_replacement_reaches_the_conditional_only_with_repeats(repeats, mean, std, capsys):
    """Unit Gaussians of correlation 0.8 given y = 1.5: N(1.2, 0.6²). D43's figures."""
    torch.manual_seed(0)
    cov, known = torch.tensor([[1, 0.8], [0.8, 1]]), torch.full((15_000, 1), 1.5)
    shrink = lambda sigma: torch.linalg.solve(cov + sigma**2 * torch.eye(2), cov)  # noqa: E731
    d = lambda x, sigma: x @ shrink(sigma)  # noqa: E731
    x = edis.sample_given(d, known, 80 * torch.randn(15_000, 2), 32, repeats)
    with capsys.disabled():
        print(f" [mean {x[:, 1].mean().item():.3f}, std {x[:, 1].std().item():.3f}]", end="")
    assert torch.equal(x[:, :1], known)
    assert x[:, 1].mean().item() == pytest.approx(mean, abs=0.03)
    assert x[:, 1].std().item() == pytest.approx(std, abs=0.025)


# ---- guidance ----


def test_gradients_act_on_free_features_only_with_their_scales(tmp_path):
    """E = Σ of the squares of all it sees: 2 λ s, 2 λ a, 2 λ s'; nothing on the reward."""
    e = case(tmp_path, rows=10, state_energy=1.0, policy_energy=0.5, dynamics_energy=3.0)
    e.nets = {k: lambda x, _: x.square().sum(-1) for k in e.scales}
    x = torch.tensor([[0.1, 0.2, 0.3, 0.4], [-0.1, 0.0, 1.0, -0.2]])
    expected = torch.stack([2 * x[:, 0], x[:, 1], 0 * x[:, 2], 6 * x[:, 3]], 1)
    assert torch.allclose(e.gradient(x, 1.0), expected)
    e.scales.pop("state")
    assert torch.allclose(e.gradient(x, 1.0)[:, 0], torch.zeros(2))


def test_sum_of_guidance_is_clipped_row_by_row(tmp_path):
    """σ |Σ λ ∇E| is at most 10 √D; D = 4; a shorter row is left alone; both counted."""
    e = case(tmp_path, rows=10)
    e.nets = {k: lambda x, _: x.square().sum(-1) for k in e.scales}
    x = torch.tensor([[30.0, 40.0, 7.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    got = e.gradient(x, 2.0)
    assert torch.allclose(got[0], torch.tensor([6.0, 8.0, 0.0, 0.0]))  # 20 / 2 long
    assert torch.allclose(got[1], torch.tensor([2.0, 2.0, 0.0, 2.0]))
    assert e.guided.tolist() == [2, 1]


def test_no_energy_is_no_guidance(tmp_path):
    e = case(tmp_path, rows=10, state_energy=0.0, policy_energy=0.0, dynamics_energy=0.0)
    assert e.gradient(torch.randn(3, 4), 1.0).abs().max() == 0 and e.groups() == {}


# ---- what the energies learn from ----


def test_groups_hold_what_they_should(tmp_path):
    """Positives of E_s from own rows alone, of E_T from both buffers; E_π: one state, the policy's action."""
    e = case(tmp_path, rows=1_000, energy_groups=4_000)
    g = e.generator
    g.moments.mean.copy_(torch.tensor([2.0, 0.5, 0.0, 2.0]))
    g.moments.std.copy_(torch.tensor([4.0, 2.0, 1.0, 4.0]))
    e.sources[0].table[:, 0], e.online.table[:, 0] = 10.0, 20.0
    e.pool[:, 0], e.pool[:, 1] = 1.0, -7.0
    e.act = lambda s: 3 * s  # s = 1 · 4 + 2
    groups = e.groups()
    assert {k: tuple(x.shape) for k, x in groups.items()} == {
        "state": (4_000, 11, 1),
        "policy": (4_000, 2, 2),
        "dynamics": (4_000, 11, 3),
    }
    assert groups["state"][:, 0, 0].unique().tolist() == [4.5]  # (20 - 2) / 4
    assert groups["state"][:, 1:].unique().tolist() == [1.0]
    assert groups["policy"][0].tolist() == [[1.0, (18 - 0.5) / 2], [1.0, -7.0]]
    first, share = groups["dynamics"][:, 0, 0].unique(return_counts=True)
    assert first.tolist() == [2.0, 4.5] and share[0].item() == pytest.approx(2_000, abs=150)
    assert groups["dynamics"][:, 1:, 0].unique().tolist() == [1.0]


def test_replacement_groups_share_state_and_action(tmp_path):
    e = case(tmp_path, rows=200, dynamics_negatives="replacement", energy_groups=64, sample_batch=100)
    e.generator.denoiser = lambda _: lambda x, sigma: x / (1 + sigma**2)
    step = e.replacement_step()
    assert step["real"].shape == (10, 4) and step["made"].shape == (10, 10, 4)
    assert torch.equal(step["made"][..., :2], step["real"][:, None, :2].expand(-1, 10, -1))
    assert step["made"][..., 3].std(1).min() > 0.1
    e.real, e.made = step["real"], step["made"]
    seen = {}
    e.nets = {k: lambda x, _, k=k: seen.update({k: x}) or x.sum(-1) for k in e.scales}
    groups = e.groups()
    e.group_losses(groups, {k: torch.ones(64, 1, 1) for k in groups})
    assert torch.equal(seen["dynamics"][..., :2], seen["dynamics"][:, :1, :2].expand(-1, 11, -1))
    assert torch.equal(seen["policy"][:, 0, 0], seen["policy"][:, 1, 0])
    assert not torch.equal(seen["policy"][:, 0, 1], seen["policy"][:, 1, 1])


def test_noise_levels_are_the_samplers_one_per_group(tmp_path):
    e = case(tmp_path, rows=100, energy_groups=4_000, sample_steps=5)
    e.losses = lambda groups, sigmas: seen.update(sigmas) or (e.group_losses(groups, sigmas))
    seen = {}
    e.energy_step()
    for sigma in seen.values():
        assert sigma.shape == (4_000, 1, 1)
        levels, count = sigma.unique(return_counts=True)
        assert levels.tolist() == pytest.approx(edm.sigma_grid(5)[-2::-1], rel=1e-5)
        assert count.min() > 600


# ---- settings ----


@pytest.mark.parametrize("stem", BOTH)
@pytest.mark.parametrize(
    ("changes", "named"),
    [(dict(synthetic_frac=0.01), "--synthetic-frac"), (dict(warmup_steps=0), "--warmup-steps")],
)
def test_mistakes_are_named(stem, changes, named, dataset, tmp_path):
    with pytest.raises(run.UsageError, match=named):
        module(stem).train(tiny_args(stem, dataset=dataset, out_dir=tmp_path, **changes))


# ---- whole runs ----


@pytest.mark.parametrize("stem", BOTH)
def test_batches_regenerations_and_columns(stem, dataset, tmp_path, monkeypatch):
    """First after the warm-up, then at multiples; batches of own and generated rows; energies go on, the model not."""
    algorithm, mixed = module(stem), []
    mix = algorithm.mix
    monkeypatch.setattr(algorithm, "mix", lambda a, b: mixed.append((len(a.obs), len(b.obs))) or mix(a, b))
    algorithm.train(tiny_args(stem, dataset=dataset, out_dir=tmp_path, synthetic_frac=0.3))
    assert mixed == [(12, 4)] * 20  # int(0.3 · 16); 30 steps less 10 of warm-up
    rows = log_rows(tmp_path)
    reports = [row for row in rows if row["syn/nearest"]]
    assert [int(row["step"]) for row in reports] == [10, 11, 22]
    for row in reports:
        for kind in ("unguided", "guided"):
            for what in ("js_states", "policy_gap", "sim_error"):
                assert math.isfinite(float(row[f"energy/{kind}_{what}"]))
        assert 0 <= float(row["energy/clipped"]) <= 1
    learned = [row for row in rows if row["phase"] == "energies"]
    assert [int(row["step"]) for row in learned] == [5, 10, 15, 20]  # 7 updates each time
    for name in ("state", "policy", "dynamics"):
        assert all(float(row[f"loss/{name}_energy"]) > 0 for row in learned)
        assert all(0 <= float(row[f"energy/{name}_found"]) <= 1 for row in learned)
    (path,) = tmp_path.glob("**/state.pt")
    state = torch.load(path, weights_only=True)["objects"]
    assert state["energy_opt"]["state"][0]["step"] == 21 and state["generator_opt"]["state"][0]["step"] == 15
    assert len(list(tmp_path.glob("**/synthetic-*.npz"))) == 3


def test_updates_and_generation_draw_from_the_right_rows(dataset, tmp_path, monkeypatch):
    """The model learns uniformly from both buffers."""
    seen = []
    union = edis.union_rows
    monkeypatch.setattr(edis, "union_rows", lambda b, n: seen.append([len(x) for x in b]) or union(b, n))
    edis.train(tiny_args("edis", dataset=dataset, out_dir=tmp_path, online_steps=12))
    offline = len(data.load("hopper-medium-v2", dataset).rewards)
    assert {tuple(x) for x in seen} == {(offline, 10), (offline, 11)}


@pytest.mark.parametrize("stem", BOTH)
def test_ablations_train_and_change_the_rows(stem, dataset, tmp_path):
    without = dict(state_energy=0.0), dict(policy_energy=0.0), dict(dynamics_energy=0.0)
    other = dict(dynamics_negatives="replacement"), dict(sample_churn=80.0)
    seen = []
    for k, changes in enumerate([{}, *without, without[0] | without[1] | without[2], *other]):
        args = tiny_args(stem, dataset=dataset, out_dir=tmp_path / str(k), online_steps=11, **changes)
        result = module(stem).train(args)
        assert all(math.isfinite(result[k]) for k in ("offline_score", "final_score"))
        (row,) = [x for x in log_rows(tmp_path / str(k)) if x["syn/nearest"]]
        seen.append(row["syn/nearest"])
    assert len(set(seen)) == len(seen)


def test_a_run_killed_while_replacing_resumes_to_the_same_result(dataset, tmp_path, monkeypatch):
    settings = dict(dataset=dataset, online_steps=14, dynamics_negatives="replacement", energy_pool=90)
    straight = iql_edis.train(tiny_args("iql_edis", out_dir=tmp_path / "straight", **settings))
    args, calls = tiny_args("iql_edis", out_dir=tmp_path / "killed", **settings), []
    original = iql_edis.sample_given

    def deadly(*given):
        calls.append(1)
        if len(calls) in (2, 7):
            raise InterruptedError
        return original(*given)

    monkeypatch.setattr(iql_edis, "sample_given", deadly)
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    for _ in range(3):
        with contextlib.suppress(InterruptedError):
            result = iql_edis.train(args)
        gc.collect()  # the lock goes with the run
    assert len(calls) == 12  # two regenerations of five chunks, two of them twice
    assert {k: v for k, v in result.items() if "seconds" not in k} == {
        k: v for k, v in straight.items() if "seconds" not in k
    }
    assert log_rows(tmp_path / "straight") == log_rows(tmp_path / "killed")
