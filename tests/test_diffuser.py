"""Diffuser: returns, windows of own episodes, losses, guided sampling and distillation against closed forms."""

import gc
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, Killed, equal_states, final_state, kill_after, log_rows, tiny_args

from algorithms import diffuser
from common import run
from common.buffer import Batch, ReplayBuffer

OBS, ACT = 2, 1
ROW = ACT + OBS


def buffer_of(rewards: list[float], terminations: list[float], room: int = 0) -> ReplayBuffer:
    """Rows whose observation, action and successor tell their number."""
    n = len(rewards)
    buffer = ReplayBuffer(n + room, OBS, ACT, CPU)
    obs = torch.stack([torch.arange(n), -torch.arange(n)], 1).float()
    actions, next_obs = torch.arange(n)[:, None] / 100, obs + torch.tensor([0.5, -0.5])
    buffer.extend(Batch(obs, actions, torch.tensor(rewards), next_obs, torch.tensor(terminations)))
    return buffer


def add(buffer: ReplayBuffer, reward: float, terminated: bool = False) -> None:
    """One own row, which tells its number too."""
    k = float(len(buffer))
    obs = torch.tensor([k, -k])
    buffer.add(obs, torch.tensor([k / 100]), reward, obs + torch.tensor([0.5, -0.5]), terminated)


# ---- returns and windows ----


def test_returns_by_hand():
    """A terminated episode, one that was cut off, and what the dataset cuts off."""
    args = diffuser.Args(gamma=0.5, terminal_reward=-100.0, cutoff_reward=-8.0)
    rewards = np.array([1, 2, 4, 1, 2, 3, 5], np.float32)
    terminations, ends = np.array([0, 0, 1, 0, 0, 0, 0.0]), np.array([0, 0, 1, 0, 1, 0, 0], bool)
    wanted = [1 + 0.5 * (2 + 0.5 * -96), 2 + 0.5 * -96, -96, 1 + 0.5 * -6, -6, 3 + 0.5 * -3, -3]
    assert diffuser.returns_to_go(rewards, terminations, ends, args).tolist() == wanted
    assert not ends[-1], "the caller's array is left alone"
    plain = diffuser.Args(gamma=1.0, terminal_reward=0.0, cutoff_reward=0.0)
    assert diffuser.returns_to_go(rewards, terminations, ends, plain).tolist() == [7, 6, 4, 3, 2, 8, 5]


def test_in_antmaze_a_missed_goal_is_worth_no_goal_for_ever():
    """-1 a step at γ = 0.99 is -100 for ever; a goal in n steps is -(1 - γⁿ⁻¹) 100: its last step's reward is 0."""
    args = run.with_presets(diffuser.Args, diffuser.ENV_PRESETS, "antmaze-umaze-v2")
    rewards, ends = np.full(50, -1, np.float32), np.arange(50) == 49
    missed = diffuser.returns_to_go(rewards, np.zeros(50), ends, args)
    assert np.all((missed >= -101) & (missed <= -100))
    rewards[-1] += 1
    reached = diffuser.returns_to_go(rewards, ends.astype(float), ends, args)
    assert reached == pytest.approx([-(1 - 0.99 ** (49 - t)) * 100 for t in range(50)], abs=1e-4)


def check_windows(episodes: diffuser.Episodes, stops: list[int], horizon: int) -> None:
    """Windows of all rows that count, entry by entry: episodes end before `stops`."""
    x, mask = episodes.windows.take(torch.arange(stops[-1]))
    x = x.clone()
    x[..., ACT:] = x[..., ACT:] * episodes.windows.std + episodes.windows.mean
    for start in range(stops[-1]):
        last = min(s for s in stops if s > start) - 1
        for h in range(horizon):
            row = start + h
            state = row if row <= last else last + 0.5
            action = row / 100 if row <= last else 0.0
            assert x[start, h].tolist() == pytest.approx([action, state, -state], abs=1e-4)
            assert mask[start, h].tolist() == [float(row <= last), 1, 1]


def test_own_episodes_count_when_they_are_over():
    """Windows, returns and draws before, at and after an own episode's end; an interrupted one is cut off."""
    args = diffuser.Args(horizon=3, gamma=0.5, planner_batch=200, cutoff_reward=-8.0)
    buffer = buffer_of([1.0, 1.0, 1.0, 2.0], [0.0, 0.0, 1.0, 0.0], room=10)
    episodes = diffuser.Episodes(buffer, np.array([0, 0, 1, 0], bool), args)
    moments = episodes.windows.mean.clone()
    assert episodes.returns[:4].tolist() == [1 + 0.5 * (1 + 0.5 * -99), 1 + 0.5 * -99, -99, -6]
    check_windows(episodes, [3, 4], 3)
    add(buffer, 4.0)
    add(buffer, 2.0)
    assert episodes.windows.rows == 4, "it is not over"
    add(buffer, 1.0, terminated=True)
    episodes.finish(3)
    assert episodes.windows.rows == 7
    assert episodes.returns[4:7].tolist() == [4 + 0.5 * (2 + 0.5 * -99), 2 + 0.5 * -99, -99]
    add(buffer, 3.0)  # interrupted: no end
    add(buffer, 5.0)
    add(buffer, 6.0)
    episodes.finish(2)  # truncated
    check_windows(episodes, [3, 4, 7, 8, 10], 3)
    assert episodes.returns[7:10].tolist() == [3 - 8, 5 + 0.5 * -2, -2]
    add(buffer, 9.0)  # of an episode that goes on
    x, returns = episodes.labelled()
    drawn = (x[:, 0, 1] * episodes.windows.std[0] + episodes.windows.mean[0]).round().int()
    assert set(drawn.tolist()) == set(range(10))
    assert torch.equal(returns, episodes.returns[drawn])
    assert torch.equal(moments, episodes.windows.mean), "the dataset's, for good"
    again = buffer_of([1.0, 1.0, 1.0, 2.0], [0.0, 0.0, 1.0, 0.0], room=10)
    again.load_state_dict(buffer.state_dict())
    other = diffuser.Episodes(again, np.array([0, 0, 1, 0], bool), args)
    other.load_state_dict(episodes.state_dict())
    assert other.rows == 10 and other.windows.rows == 10
    assert torch.equal(other.windows.last[:10], episodes.windows.last[:10])
    assert torch.equal(other.returns[4:], episodes.returns[4:])
    other.windows.mean, other.windows.std = moments, episodes.windows.std  # of a run: the dataset's, again
    check_windows(other, [3, 4, 7, 8, 10], 3)


# ---- losses ----


def small_case(**settings) -> tuple:
    """Episodes of 8 rows, nets moved away from where they start, settings."""
    torch.manual_seed(0)
    args = diffuser.Args(horizon=3, planner_batch=8, planner_width=8, planner_blocks=1, gamma=0.5, **settings)
    rewards, terminations = [1.0, 2.0, 0.0, -1.0, 3.0, 1.0, 0.5, 2.0], [0.0] * 4 + [1.0] + [0.0] * 3
    episodes = diffuser.Episodes(buffer_of(rewards, terminations), np.arange(8) == 4, args)
    nets = diffuser.make_diffuser_nets(episodes, ACT, args)
    with torch.no_grad():
        for p in nets.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return episodes, nets, args


def test_the_planners_loss_by_hand():
    """Row by row: v = cos φ ε - sin φ τ; the known part has none, the first action ten times as much, padding none."""
    episodes, nets, _ = small_case()
    torch.manual_seed(1)
    x, weights = episodes.weighted()
    _, mask = episodes.windows.take(
        (x[:, 0, 1] * episodes.windows.std[0] + episodes.windows.mean[0]).round().long()
    )
    assert set(mask[:, 1:, 0].flatten().tolist()) == {0.0, 1.0}, "some windows are padded"
    torch.manual_seed(2)
    got = diffuser.planner_loss(nets["planner"], x, weights).item()
    torch.manual_seed(2)
    u, given, eps = 1 - torch.rand(8), torch.rand(8) < 0.5, torch.randn_like(x)
    total = count = 0.0
    for b in range(8):
        cos, sin = math.cos(0.5 * math.pi * u[b]), math.sin(0.5 * math.pi * u[b])
        z = cos * x[b] + sin * eps[b]
        z[0, ACT:] = x[b, 0, ACT:]
        if given[b]:
            z[0] = x[b, 0]
        out = nets["planner"](z[None], u[b : b + 1], given[b : b + 1].float())[0]
        for h in range(3):
            for d in range(ROW):
                if h == 0 and (d >= ACT or given[b]):
                    continue
                weight = mask[b, h, d] * (10 if (h, d) == (0, 0) else 1)
                total += weight * (out[h, d] - (cos * eps[b, h, d] - sin * x[b, h, d])) ** 2
                count += weight
    assert got == pytest.approx((total / count).item(), rel=1e-5)


def test_the_guides_loss_by_hand():
    """The mean square of J - R over noised windows whose first state is clean, in units of the labels' variance."""
    episodes, nets, _ = small_case()
    labels = episodes.returns.double()
    assert nets["guide"].mean == pytest.approx(labels.mean().item(), rel=1e-5)
    assert nets["guide"].std == pytest.approx(labels.std(correction=0).item(), abs=2e-3)
    torch.manual_seed(1)
    x, returns = episodes.labelled()
    torch.manual_seed(2)
    loss, bias = diffuser.guide_loss(nets["guide"], x, returns)
    torch.manual_seed(2)
    u, eps = 1 - torch.rand(8), torch.randn_like(x)
    errors = []
    for b in range(8):
        z = math.cos(0.5 * math.pi * u[b]) * x[b] + math.sin(0.5 * math.pi * u[b]) * eps[b]
        z[0, ACT:] = x[b, 0, ACT:]
        trunk = nets["guide"].trunk
        features = trunk.features(z[None], u[b : b + 1], torch.zeros(1))[0]
        j = nets["guide"].mean + nets["guide"].std * (trunk.head.weight[0] @ features + trunk.head.bias[0])
        errors.append(((j - returns[b]) / nets["guide"].std).item())
    assert loss.item() == pytest.approx(np.mean(np.square(errors)), rel=1e-5)
    assert bias.item() == pytest.approx(np.mean(errors), rel=1e-4)


def test_the_average_is_a_copy_then_moves_every_tenth_step(monkeypatch):
    monkeypatch.setattr(diffuser, "EMA_START", 3)
    average, net = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    updates, mean, moves = torch.zeros(()), 0.0, 0
    for n in range(1, 45):
        net.weight.data.fill_(float(n))
        diffuser.move_average(average, net, updates)
        if n <= 3:
            mean = float(n)
        elif n % 10 == 0:
            share = max(1 / (1 + (n - 3) / 10), 0.005)
            mean, moves = mean + share * (n - mean), moves + 1
        assert average.weight.item() == pytest.approx(mean, rel=1e-5)
    assert moves == 4


# ---- sampling ----


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_a_denoising_step_is_ddpms(steps):
    """Mean and variance of q(z_{i-1} | z_i, x) from β and ᾱ, by Bayes' rule on two Gaussians."""
    bars = [math.cos(0.5 * math.pi * i / steps) ** 2 for i in range(steps + 1)]
    for i in range(1, steps + 1):
        alpha, before = bars[i] / bars[i - 1], bars[i - 1]
        got = diffuser.posterior(0.5 * math.pi * i / steps, 0.5 * math.pi * (i - 1) / steps)
        if i == 1:
            assert got == pytest.approx((1.0, 0.0, 0.0), abs=1e-12)  # the clean estimate itself
            continue
        precision = alpha / (1 - alpha) + 1 / (1 - before)  # of z_{i-1}: from z_i, and from x
        wanted = (
            math.sqrt(before) / (1 - before) / precision,
            math.sqrt(alpha) / (1 - alpha) / precision,
            1 / precision,
        )
        assert got == pytest.approx(wanted, rel=1e-9, abs=1e-12)


class GaussianPlanner:
    """The exact v̂ for windows of two rows ~ N(m, S) whose first state is known: from E(x | z) of that Gaussian."""

    act_dim, horizon, row = ACT, 2, ROW

    def __init__(self, first_state: torch.Tensor):
        torch.manual_seed(3)
        a = torch.randn(2 * ROW, 2 * ROW, dtype=torch.float64)
        s, m = 0.1 * a @ a.T + 0.2 * torch.eye(2 * ROW), torch.randn(2 * ROW, dtype=torch.float64) / 2
        known, self.free = [1, 2], [0, 3, 4, 5]
        k = s[self.free][:, known] @ torch.linalg.inv(s[known][:, known])
        self.mean = m[self.free] + k @ (first_state - m[known])
        self.cov = s[self.free][:, self.free] - k @ s[known][:, self.free]
        self.first = torch.cat([torch.zeros(ACT, dtype=torch.float64), first_state])

    def start(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        known = (torch.arange(ROW) >= ACT).expand(rows, ROW)
        return self.first.expand(rows, ROW), known

    def normalize(self, obs: torch.Tensor) -> torch.Tensor:
        return obs

    def law(self, z: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (B, 4) and covariance of the free entries of x given z (B, 2, D) at level u (1,)."""
        cos, sin = math.cos(0.5 * math.pi * u[0].item()), math.sin(0.5 * math.pi * u[0].item())
        total = cos**2 * self.cov + sin**2 * torch.eye(4)
        gain = cos * self.cov @ torch.linalg.pinv(total)
        free = z.flatten(1)[:, self.free]
        return self.mean + (free - cos * self.mean) @ gain.T, self.cov - cos * gain @ self.cov

    def __call__(self, z: torch.Tensor, u: torch.Tensor, _given: torch.Tensor) -> torch.Tensor:
        cos, sin = math.cos(0.5 * math.pi * u[0].item()), math.sin(0.5 * math.pi * u[0].item())
        flat = z.flatten(1)
        v = torch.zeros_like(flat)
        v[:, self.free] = (cos * flat[:, self.free] - self.law(z, u)[0]) / sin  # from x̂ = cos z - sin v
        return v.view(z.shape)


FIRST_STATE = torch.tensor([0.3, -0.4], dtype=torch.float64)
GOAL = torch.tensor([0.8, -0.5, 0.4, 0.1], dtype=torch.float64)
CURVE = torch.diag(torch.tensor([2.0, 1.0, 0.5, 3.0], dtype=torch.float64)) + 0.2


def quadratic(z: torch.Tensor, _u: torch.Tensor) -> torch.Tensor:
    """J = -½ (x - c)ᵀ Q (x - c) at the noised window itself."""
    left = z.flatten(1)[:, [0, 3, 4, 5]] - GOAL
    return -0.5 * ((left @ CURVE) * left).sum(1)


def test_guided_means_in_closed_form():
    """Without noise each step is affine: its matrix and shift, from the textbook's β and ᾱ, applied to the start."""
    planner = GaussianPlanner(FIRST_STATE)
    args = diffuser.Args(denoise_steps=6, guide_scale=0.7, guide_repeats=2, guide_stop=2, temperature=0.0)
    first, known = planner.start(3)
    plans = diffuser.guided_plans(planner, quadratic, first, known, 2, args)
    eye = torch.eye(4, dtype=torch.float64)
    z = torch.zeros(4, dtype=torch.float64)
    for i in range(6, 0, -1):
        bar, before = (math.cos(0.5 * math.pi * k / 6) ** 2 for k in (i, i - 1))
        beta = 1 - bar / before
        variance = beta * (1 - before) / (1 - bar)
        if i > 2:
            shrink = eye - 0.7 * variance * CURVE  # z + ω Σ ∇J = shrink z + (1 - shrink) c, twice
            z = shrink @ (shrink @ z) + (eye - shrink @ shrink) @ GOAL
        gain = math.sqrt(bar) * planner.cov @ torch.linalg.inv(bar * planner.cov + (1 - bar) * eye)
        clean = planner.mean + gain @ (z - math.sqrt(bar) * planner.mean)
        z = (
            math.sqrt(before) * beta / (1 - bar) * clean
            + math.sqrt(bar / before) * (1 - before) / (1 - bar) * z
        )
    for plan in plans:
        assert torch.allclose(plan.flatten()[planner.free], z, atol=1e-9)
        assert torch.equal(plan[0, ACT:], FIRST_STATE), "the known state, bit for bit"
    unguided = diffuser.Args(denoise_steps=6, guide_repeats=0, temperature=0.0)
    plain = diffuser.guided_plans(planner, quadratic, first, known, 2, unguided)
    assert torch.allclose(plain[0].flatten()[planner.free], planner.mean, atol=1e-9)


def test_guided_plans_are_drawn_from_the_plans_times_exp_of_their_return():
    """With J(z, u) = log E(exp J(x) | z), many steps draw from N(m, S) exp J: precision S⁻¹ + Q, in closed form."""
    planner = GaussianPlanner(FIRST_STATE)

    def exact(z: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        mean, cov = planner.law(z, u)
        left = mean - GOAL
        return -0.5 * ((left @ torch.linalg.inv(torch.linalg.inv(CURVE) + cov)) * left).sum(1)

    plain = dict(guide_scale=1.0, guide_stop=0, temperature=1.0, denoise_steps=300)
    first, known = planner.start(4_000)
    for repeats in (0, 1):
        args = diffuser.Args(guide_repeats=repeats, **plain)
        torch.manual_seed(repeats)
        plans = diffuser.guided_plans(planner, exact, first, known, 2, args)
        free = plans.flatten(1)[:, planner.free]
        precision = torch.linalg.inv(planner.cov) + repeats * CURVE
        cov = torch.linalg.inv(precision)
        mean = cov @ (torch.linalg.inv(planner.cov) @ planner.mean + repeats * CURVE @ GOAL)
        assert torch.allclose(free.mean(0), mean, atol=0.03), repeats
        assert torch.allclose(free.T.cov(), cov, atol=0.03), repeats
    moved = (mean - planner.mean).norm()
    assert moved > 0.3, "else unguided plans would pass"


def test_the_noise_of_plans_is_scaled():
    """Without a guide all steps are affine in the noise: half the noise, half the distance from the mean."""
    planner, plans = GaussianPlanner(FIRST_STATE), {}
    first, known = planner.start(5)
    for scale in (0.5, 1.0):
        args = diffuser.Args(denoise_steps=8, guide_repeats=0, temperature=scale)
        torch.manual_seed(0)
        drawn = diffuser.guided_plans(planner, quadratic, first, known, 2, args)
        plans[scale] = drawn.flatten(1)[:, planner.free] - planner.mean
    assert torch.allclose(2 * plans[0.5], plans[1.0], atol=1e-9)
    assert plans[1.0].std() > 0.1


def test_the_best_plan_of_each_state_is_begun():
    """J reads the first action: each state gets the largest of its own plans', inside the box; more plans, more J."""
    planner, seen = GaussianPlanner(FIRST_STATE), []

    def guide(z: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        if u.item() == 0:
            seen.append(z)
        return z[:, 0, 0]

    obs = torch.stack([FIRST_STATE, FIRST_STATE]) + torch.tensor([[0.0], [5.0]])
    means = []
    for many in (1, 6, 60):
        args = diffuser.Args(denoise_steps=4, plans=many, guide_repeats=0, temperature=1.0)
        torch.manual_seed(0)
        actions = diffuser.pick_actions(planner, guide, obs, args)
        plans = seen[-1].view(2, many, 2, ROW)
        assert torch.equal(plans[:, :, 0, ACT:], obs[:, None].expand(2, many, OBS)), "of its own state"
        assert torch.equal(actions, plans[:, :, 0, :ACT].amax(1).clamp(-1, 1))
        means.append(actions.mean().item())
    assert means == sorted(means) and means[0] < means[2]


# ---- D-Diffuser ----


class Halved:
    """What a perfect student of `teacher`, of so many steps, answers."""

    act_dim, horizon, row = ACT, 2, ROW

    def __init__(self, teacher, steps: int, first: torch.Tensor, known: torch.Tensor):
        self.teacher, self.steps, self.start = teacher, steps, (first, known)

    def __call__(self, z: torch.Tensor, u: torch.Tensor, _given: torch.Tensor) -> torch.Tensor:
        return diffuser.distill_target(self.teacher, z, u, *self.start, self.steps)


def test_distillation_keeps_the_teachers_plans_and_so_their_mean():
    """Perfect students, 32 steps to 1, end where the teacher does from every noise; from zero noise that is m."""
    planner = GaussianPlanner(FIRST_STATE)
    first, known = planner.start(50)
    half = torch.randn(25, 2, ROW, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = torch.cat([half, -half])  # noise of mean 0
    wanted, student = diffuser.unroll(planner, z, first, known, 32), planner
    for steps in (16, 8, 4, 2, 1):
        student = Halved(student, steps, first, known)
        assert torch.allclose(diffuser.unroll(student, z, first, known, steps), wanted, atol=1e-9)
    plans = diffuser.unroll(student, z, first, known, 1)
    assert torch.allclose(plans.flatten(1)[:, planner.free].mean(0), planner.mean, atol=1e-9)
    fine = diffuser.unroll(planner, z, first, known, 2_000).flatten(1)[:, planner.free]
    assert torch.allclose(fine.T.cov(), plans.flatten(1)[:, planner.free].T.cov(), atol=0.1)


def test_the_followers_target_is_the_planners_plan_from_its_noise():
    """No loss for a student that answers minus the plan; for one that is off by 0.5 everywhere, 0.25."""
    planner = GaussianPlanner(FIRST_STATE)
    first, known = planner.start(6)
    x = torch.cat([first[:, None], torch.randn(6, 1, ROW).double()], 1)

    def student(off: float) -> SimpleNamespace:
        class Net(SimpleNamespace):
            act_dim = ACT

            def __call__(self, z: torch.Tensor, u: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
                assert torch.equal(u, torch.ones(6).double()) and not given.any()
                return off - diffuser.unroll(planner, z, first, known, 8)

        return Net()

    for off in (0.0, 0.5):
        loss = diffuser.follow_loss(student(off), planner, x, torch.ones_like(x), 8)
        assert loss.item() == pytest.approx(off**2, abs=1e-12)


# ---- the run ----


@pytest.mark.parametrize("distill", [False, True])
def test_a_run_that_is_killed_in_every_phase_resumes_to_the_same_result(
    distill, dataset, tmp_path, monkeypatch
):
    """In the middle of gradient steps of guide, planner, halvings and online."""
    sizes = dict(dataset=dataset, distill=distill)
    diffuser.train(tiny_args("diffuser", out_dir=tmp_path / "whole", **sizes))
    rows = log_rows(tmp_path / "whole")
    phases = ["guide", "offline", *(["distill"] if distill else []), "online"]
    assert list(dict.fromkeys(r["phase"] for r in rows)) == phases
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    args, deaths = tiny_args("diffuser", out_dir=tmp_path / "killed", **sizes), 0
    for _ in range(40):
        with monkeypatch.context() as patch:
            kill_after(patch, ReplayBuffer, "draw", 7)
            try:
                diffuser.train(args)
                break
            except Killed:
                deaths += 1
        gc.collect()  # the lock goes with the process; here with the object
    assert deaths >= 6
    assert equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))


def test_from_offline_goes_on_like_the_run_that_it_came_from(dataset, tmp_path):
    """Average, its count and optimizer included; and a run that distils starts from the same offline phase."""
    whole = tiny_args("diffuser", dataset=dataset, out_dir=tmp_path / "whole")
    diffuser.train(whole)
    (path,) = (tmp_path / "whole").glob("**/offline.pt")
    diffuser.train(tiny_args("diffuser", dataset=dataset, out_dir=tmp_path / "taken", from_offline=path))
    assert equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "taken"))
    for name in ("planner", "guide"):
        assert final_state(tmp_path / "whole")["nets"][f"{name}_updates"] == 20 + 20
    small = dict(dataset=dataset, out_dir=tmp_path / "d", from_offline=path, distill=True)
    diffuser.train(tiny_args("diffuser", **small))
    errors = [float(r["distill/error"]) for r in log_rows(tmp_path / "d") if r.get("distill/error")]
    assert len(errors) == math.log2(tiny_args("diffuser", distill=True).distill_from)
    assert all(0 < x < 10 for x in errors)
    with pytest.raises(run.UsageError, match="--distill-from: got 6; allowed: a power of two"):
        diffuser.train(tiny_args("diffuser", **small | dict(out_dir=tmp_path, distill_from=6)))


def test_without_a_guide_returns_do_not_matter(dataset, tmp_path):
    """One unguided plan is behavior: other returns leave every score as it is; of several plans, they choose."""
    for plans, same in ((1, True), (8, False)):
        scores = []
        for gamma in (0.99, 0.5):
            args = tiny_args(
                "diffuser", dataset=dataset, out_dir=tmp_path / f"{plans} {gamma}", guide_repeats=0,
                plans=plans, gamma=gamma, denoise_steps=3, online_steps=0,
            )  # fmt: skip
            scores.append(diffuser.train(args)["offline_score"])
        assert (scores[0] == scores[1]) == same


def test_what_is_logged(dataset, tmp_path):
    diffuser.train(tiny_args("diffuser", dataset=dataset, out_dir=tmp_path, distill=True))
    row = [r for r in log_rows(tmp_path) if r["phase"] == "online" and r.get("loss/planner")][-1]
    for name in ("loss/planner", "loss/guide", "loss/follow"):
        assert 0 < float(row[name]) < 1e3
    assert math.isfinite(float(row["guide/bias"]))
