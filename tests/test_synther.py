"""SynthER and what every generating method shares: the network, what is kept of its rows, batches, the report."""

import gc
import math

import h5py
import numpy as np
import pytest
import torch
from conftest import CPU, Killed, kill_after, log_rows, module, tiny_args

from algorithms import iql_synther, synther
from common import edm, run
from common.buffer import Batch, ReplayBuffer

OBS, ACT = 11, 3


# ---- network ----


def test_parameter_count_is_synthers():
    """Hopper without terminal: 26 features, 1024 x 6: 6.66 million."""
    net = synther.TransitionNet(26, 1024, 6, 256)
    count = sum(p.numel() for p in net.parameters())
    layers = [(26, 256), (17, 256), (256, 256), (256, 1024), *6 * [(1024, 1024)], (1024, 26)]
    assert count == sum(i * o + o for i, o in layers)
    assert count == pytest.approx(6.66e6, rel=1e-3)


def test_network_by_hand():
    """Pre-activation residual blocks of one layer; the condition is added to the time embedding."""
    torch.manual_seed(0)
    net = synther.TransitionNet(3, 8, 2, 4)
    x, c_noise, condition = torch.randn(5, 3), torch.randn(5), torch.randn(5, 4)
    angles = 2 * math.pi * c_noise[:, None] * net.frequencies
    time = torch.cat([c_noise[:, None], torch.sin(angles), torch.cos(angles)], 1)
    t = time @ net.time[0].weight.T + net.time[0].bias
    t = (t * torch.sigmoid(t)) @ net.time[2].weight.T + net.time[2].bias
    h = (x @ net.inlet.weight.T + net.inlet.bias + t + condition) @ net.expand.weight.T + net.expand.bias
    for layer in net.blocks:
        h = h + h.clamp(min=0) @ layer.weight.T + layer.bias
    expected = h.clamp(min=0) @ net.out.weight.T + net.out.bias
    assert torch.allclose(net(x, c_noise, condition), expected, atol=1e-6)
    assert torch.equal(net(x, c_noise), net(x, c_noise, torch.zeros(5, 4)))


# ---- what a model learns from, what is kept ----


def filled(rows: int, value: float, terminals: bool = True) -> ReplayBuffer:
    b = ReplayBuffer(rows, OBS, ACT, CPU)
    obs, actions, nothing = torch.full((rows, OBS), value), torch.zeros(rows, ACT), torch.zeros(rows)
    ends = (torch.arange(rows) % 4 == 0).float() * float(terminals)
    b.extend(Batch(obs, actions, nothing, torch.zeros(rows, OBS), ends))
    return b


def test_union_is_uniform_over_rows():
    torch.manual_seed(0)
    a, b = filled(30, 1.0), filled(10, 2.0)
    rows, index = synther.union_rows([a, b], 40_000)
    assert (rows[:, 0] == 1).float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(rows[:, 0] == 1, index < 30) and index.max() == 39
    assert torch.equal(rows[:, -1], torch.where(index < 30, index % 4 == 0, (index - 30) % 4 == 0).float())


def generator(tmp_path, terminals: bool = True, offline: ReplayBuffer | None = None, **changes):
    """A generator of tiny size whose sources are the rows of `offline`."""
    settings = dict(synthetic_rows=6, terminal_flag="joint") | changes
    args = tiny_args("iql_synther", out_dir=tmp_path, **settings)
    r = run.Run(args, "iql_synther.py", "x", {})
    offline = filled(8, 1.0, terminals) if offline is None else offline
    d = iql_synther.Generator.features(args, offline)
    sizes = args.diffusion_width, args.diffusion_depth, args.diffusion_time_dim
    g = iql_synther.Generator(r, args, iql_synther.TransitionNet(d, *sizes), [offline])
    r.register(**g.state())
    return g, offline


def test_kept_rows_are_clipped_thresholded_and_finite(tmp_path):
    """Actions to the box, rewards to their range, flags to 0 or 1, NaN and infinity out; each counted."""
    g, _ = generator(tmp_path)
    assert g.features == 2 * OBS + ACT + 2
    g.bounds.copy_(torch.tensor([-1.0, 2.0]))
    rows = torch.zeros(9, g.features)
    rows[0, OBS], rows[0, OBS + 1] = 3.0, -1.5  # two of three coordinates of one row
    rows[1, OBS + ACT], rows[2, OBS + ACT] = 5.0, -5.0
    rows[3, -1], rows[4, -1], rows[2, -1] = 0.51, 0.49, 7.0
    rows[5, 0] = float("nan")
    g.keep(rows)  # six of the nine are wanted
    kept = g.synthetic.take(torch.arange(5))
    assert len(g.synthetic) == 5
    assert kept.actions[0].tolist() == [1.0, -1.0, 0.0]
    assert kept.rewards.tolist() == [0.0, 2.0, -1.0, 0.0, 0.0]
    assert kept.terminations.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]
    assert g.totals.tolist() == pytest.approx([6, 2 / 3, 2, 1])


def test_a_tree_finds_the_rule_of_a_box_and_costs_nothing_without_terminals():
    """Ends outside two intervals of four features; cuts halfway between the nearest rows; other rows judged right."""
    torch.manual_seed(0)
    x, new = torch.randn(20_000, 4), torch.randn(20_000, 4)

    def rule(rows: torch.Tensor) -> torch.Tensor:
        return (rows[:, 1] < -2) | (rows[:, 3].abs() > 2.2)

    y = rule(x)
    weight = torch.where(y, 1 / y.sum(), 1 / (~y).sum()).double()
    tree = synther.grow_tree(x, y, weight, 12)
    share = synther.leaf_shares(tree, new)
    assert ((share > 0.5) == rule(new)).float().mean() > 0.999
    assert torch.equal(synther.leaf_shares(tree, x) > 0.5, y)
    one = torch.tensor([[0.0], [1.0], [1.0], [4.0]])
    flags = torch.tensor([False, False, False, True])
    assert synther.grow_tree(one, flags, torch.ones(4).double(), 12) == (0, 2.5, 0.0, 1.0)
    assert synther.grow_tree(one, ~flags, torch.ones(4).double(), 0) == 0.75  # no depth: the share
    assert synther.grow_tree(one, flags & False, torch.ones(4).double(), 12) == 0.0
    same = torch.zeros(4, 2)
    assert synther.grow_tree(same, flags, torch.ones(4).double(), 12) == 0.25  # nothing to cut
    close = torch.tensor([[1 + 2**-23], [1 + 2**-22], [1 + 2**-22]])  # no number between them
    assert synther.grow_tree(close, flags[1:], torch.ones(3).double(), 12) == pytest.approx(1 / 3)


def test_splits_have_the_least_impurity():
    """Against all cuts of all features by brute force, with weights."""
    torch.manual_seed(1)
    x, y = torch.randn(60, 3), torch.rand(60) < 0.3
    weight = torch.rand(60).double()

    def gini(side: torch.Tensor) -> float:
        yes, no = weight[side & y].sum(), weight[side & ~y].sum()
        return float(2 * yes * no / (yes + no)) if yes + no else 0.0

    cuts = [(k, c) for k in range(3) for c in x[:, k].sort().values[:-1]]
    best = min(cuts, key=lambda kc: gini(x[:, kc[0]] <= kc[1]) + gini(x[:, kc[0]] > kc[1]))
    feature, cut, *_ = synther.grow_tree(x, y, weight, 1)
    above = x[:, feature][x[:, feature] > best[1]].min()
    assert feature == best[0] and cut == pytest.approx(float(0.5 * (best[1] + above)))


def test_flags_of_kept_rows_come_from_real_ones(tmp_path):
    """Terminal where s'_0 > 1, in three of four real rows beyond it; a generated row alike, with that probability."""
    torch.manual_seed(0)
    table = torch.zeros(8_000, 2 * OBS + ACT + 2)
    table[:, OBS + ACT + 1] = torch.where(torch.arange(8_000) < 400, 1.5, 0.5)
    table[:, -1] = (torch.arange(8_000) < 300).float()
    real = ReplayBuffer(8_000, OBS, ACT, CPU)
    real.append(table)
    g, _ = generator(tmp_path, offline=real, terminal_flag="classifier", synthetic_rows=4_000)
    assert g.features == 2 * OBS + ACT + 1  # no flag among them
    g.bounds.copy_(torch.tensor([-1.0, 1.0]))
    g.tree = g.terminal_tree()
    rows = torch.zeros(4_000, g.features)
    rows[:2_000, OBS + ACT + 1] = 2.0
    g.keep(rows)
    flags = g.synthetic.table[:, -1]
    assert flags[:2_000].mean().item() == pytest.approx(0.75, abs=0.03) and not flags[2_000:].any()


def test_rows_without_a_known_successor_are_not_learned_from(tmp_path, monkeypatch, random_rows):
    """A file without next_observations: G, the tree and the report see no terminal row of it; the learner does."""
    path = tmp_path / "plain.hdf5"
    with h5py.File(random_rows) as old, h5py.File(path, "w") as new:
        for k in old:
            if k != "next_observations":
                new[k] = old[k][()]
        terminal = int(old["terminals"][()].sum())
    seen, rows = [], []
    original, union = synther.losses, synther.union_rows

    def losses(nets, batch, *rest):
        rows.append(batch.terminations.sum().item())
        return original(nets, batch, *rest)

    def terminal_tree(generator):
        seen.append(generator.real[0].table[:, -1].sum().item())
        return 0.0

    def union_rows(buffers, n):
        seen.append(buffers[0].table[:, -1].sum().item())
        return union(buffers, n)

    monkeypatch.setattr(synther, "losses", losses)
    monkeypatch.setattr(synther, "union_rows", union_rows)
    monkeypatch.setattr(synther.Generator, "terminal_tree", terminal_tree)
    settings = dict(dataset=path, out_dir=tmp_path, synther_data="both", batch_size=64)
    synther.train(tiny_args("synther", **settings))
    assert terminal > 20 and set(seen) == {0.0} and sum(rows) > 0


def test_many_rows_that_are_not_finite_are_an_error(tmp_path, monkeypatch):
    g, offline = generator(tmp_path)
    monkeypatch.setattr(g, "sample_step", lambda _: {"rows": torch.full((25, g.features), float("inf"))})
    with pytest.raises(FloatingPointError, match="6 of 6 generated rows"):
        g.regenerate(0, [offline])


def test_a_regeneration_starts_from_scratch_and_replaces_the_rows(tmp_path):
    """Other parameters, other frequencies, zero moments of Adam, learning rate back up; as many rows as asked."""
    g, offline = generator(tmp_path)
    g.regenerate(0, [offline])
    first = g.synthetic.table.clone(), g.net.frequencies.clone(), g.net.out.weight.detach().clone()
    assert len(g.synthetic) == 6 and g.count == 15
    rate = g.opt.param_groups[0]["lr"].item()
    assert rate == pytest.approx(0.5 * 3e-4 * (1 + math.cos(14 / 15 * math.pi)), rel=1e-4)
    g.restart([offline], None)
    assert g.count == 0 and all((x == 0).all() for s in g.opt.state.values() for x in s.values())
    assert not torch.equal(first[1], g.net.frequencies) and not torch.equal(first[2], g.net.out.weight)
    g.regenerate(1, [offline])
    assert len(g.synthetic) == 6 and not torch.equal(first[0], g.synthetic.table)
    assert torch.equal(g.ema.module.frequencies, g.net.frequencies)


def test_more_rows_than_a_chunk_come_in_chunks(tmp_path):
    g, offline = generator(tmp_path, sample_batch=4)
    sizes = []
    g.begin = lambda n: sizes.append(n) or (lambda x, _: 0 * x, g.noise(n), 0)
    g.regenerate(0, [offline])
    assert sizes == [4, 4] and len(g.synthetic) == 6


def test_training_fits_a_known_law(tmp_path):
    """Two rows, each other's negative: the loss falls well below 1, and all features agree on which of them it is."""
    torch.manual_seed(0)
    table = torch.randn(1, 2 * OBS + ACT + 2).repeat(2, 1)
    table[1] *= -1
    table[:, -1] = torch.tensor([0.0, 1.0])
    two = ReplayBuffer(2, OBS, ACT, CPU)
    two.append(table)
    sizes = dict(diffusion_width=64, diffusion_time_dim=64, synthetic_rows=2_000)
    sizes |= dict(sample_batch=2_000, sample_steps=32)
    few = dict(diffusion_steps=600, diffusion_batch=128, diffusion_lr=3e-3)
    g, _ = generator(tmp_path, offline=two, **sizes, **few)
    losses, step = [], g.train_step
    g.train_step = lambda: losses.append(step()["loss/diffusion"].item()) or {}
    g.regenerate(0, [two])
    assert sum(losses[-50:]) / 50 < 0.5 < 0.9 < losses[0]
    x = g.synthetic.table
    assert x[:, -1].mean().item() == pytest.approx(0.5, abs=0.1)
    second = torch.sign(x[:, 0] * table[1, 0]) > 0
    assert (second == (x[:, -1] > 0.5)).float().mean() > 0.9


# ---- the whole program ----


FILES = ["synther", "iql_synther"]


@pytest.mark.parametrize("stem", FILES)
@pytest.mark.parametrize("which", ["online", "both"])
def test_batches_and_times(stem, which, dataset, tmp_path, monkeypatch):
    """All real until the first regeneration, then the asked share; the model learns from the asked rows."""
    algorithm, shares, learned = module(stem), [], []
    original, union = algorithm.losses, algorithm.union_rows
    with h5py.File(dataset) as f:
        known = {row.tobytes() for row in f["observations"][()].astype(np.float32)}

    def losses(nets, batch, *rest):
        shares.append(sum(o.numpy().tobytes() in known for o in batch.obs))
        return original(nets, batch, *rest)

    def union_rows(buffers, n):
        learned.append([len(b) for b in buffers])
        return union(buffers, n)

    monkeypatch.setattr(algorithm, "losses", losses)
    monkeypatch.setattr(algorithm, "union_rows", union_rows)
    changes = dict(synther_data=which, normalize_obs=False, synthetic_frac=0.5)
    algorithm.train(tiny_args(stem, dataset=dataset, out_dir=tmp_path, **changes))
    online = shares[20:]
    assert online == [8] * 1 + [4] * 19  # steps 11; 12 to 30, after the regeneration at step 11
    extra = [] if which == "online" else [600]
    assert learned == [[*extra, 11]] * 15 + [[*extra, 22]] * 15


@pytest.mark.parametrize("stem", FILES)
def test_offline_upsample_learns_from_generated_rows_only(stem, dataset, tmp_path, monkeypatch):
    algorithm = module(stem)
    seen, original = [], algorithm.losses

    def losses(nets, batch, *rest):
        seen.append(batch.obs.clone())
        return original(nets, batch, *rest)

    monkeypatch.setattr(algorithm, "losses", losses)
    changes = dict(offline_upsample=True, normalize_obs=False)
    changes |= dict(calibrate=False) if stem == "synther" else {}
    algorithm.train(tiny_args(stem, dataset=dataset, out_dir=tmp_path, **changes))
    with h5py.File(dataset) as f:
        known = {row.tobytes() for row in f["observations"][()].astype(np.float32)}
    real = [sum(o.numpy().tobytes() in known for o in obs) for obs in seen]
    assert real[:20] == [0] * 20 and min(real[20:]) > 0
    assert (tmp_path / stem).exists() and len(list(tmp_path.glob("**/synthetic-*.npz"))) == 3
    (source,) = tmp_path.glob("**/offline.pt")
    for other, words in (
        (dict(diffusion_steps=16), "diffusion_steps 15 -> 16"),
        (dict(terminal_flag="joint"), "terminal_flag classifier -> joint"),
        (dict(offline_upsample=False), "offline_ups"),
    ):
        with pytest.raises(run.UsageError, match=words):  # not the same offline phase
            few = dict(dataset=dataset, out_dir=tmp_path / "b", from_offline=source, overwrite=True)
            algorithm.train(tiny_args(stem, **changes | few | other))


def test_bad_settings_are_refused(dataset, tmp_path):
    rows = "rows of a batch: got 0 dataset, 0 own, 16 generated; .*--synthetic-frac 0.99"
    for stem, changes, words in [
        ("synther", dict(synthetic_frac=0.99), rows),
        ("iql_synther", dict(synthetic_frac=0.01), "synthetic-frac"),
        ("synther", dict(offline_upsample=True), "--no-calibrate"),
        ("iql_synther", dict(sample_steps=1), r"sample-steps: got 1; allowed: \[2, inf\)"),
        ("iql_synther", dict(synthetic_rows=0), "synthetic-rows"),
    ]:
        with pytest.raises(run.UsageError, match=words):
            module(stem).train(tiny_args(stem, dataset=dataset, out_dir=tmp_path, **changes))


def test_a_cleared_buffer_keeps_its_dataset():
    data, own = filled(4, 1.0), ReplayBuffer(10, OBS, ACT, CPU)
    data.clear()
    assert len(data) == data.size == 4
    own.append(data.table)
    own.append(data.table[:2])
    assert len(own) == own.size == 6
    own.clear()
    assert len(own) == own.size == 0


@pytest.mark.parametrize("stem", FILES)
@pytest.mark.parametrize(("where", "calls"), [("draw_sigma", (4, 9, 7)), ("sample", (1, 0, 1))])
def test_a_run_killed_inside_a_regeneration_resumes_to_the_same_rows(
    stem, where, calls, dataset, tmp_path, monkeypatch
):
    """Killed in the training of the model or between chunks, checkpoints at every step: same logs, same rows."""
    algorithm = module(stem)
    algorithm.train(tiny_args(stem, dataset=dataset, out_dir=tmp_path / "straight"))
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    args = tiny_args(stem, dataset=dataset, out_dir=tmp_path / "killed")
    for limit in calls:
        with monkeypatch.context() as patch:
            kill_after(patch, edm, where, limit)
            with pytest.raises(Killed):
                algorithm.train(args)
        gc.collect()
    algorithm.train(args)
    logs = [log_rows(tmp_path / x) for x in ("straight", "killed")]
    assert logs[0] == logs[1]
    for k in (0, 1):
        rows = []
        for x in ("straight", "killed"):
            (path,) = (tmp_path / x).glob(f"**/synthetic-{k}.npz")
            with np.load(path) as f:
                rows.append(f["synthetic"])
        assert np.array_equal(*rows)
