"""What ppo_procgen.py promises, on the real Procgen. Runs are real processes, compared bit for bit."""

import csv
import errno
import fcntl
import hashlib
import importlib.util
import inspect
import json
import math
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from check_resume import MOMENTS, differences, read_run, run_disturbed, run_undisturbed
from conftest import assert_one_line, run_main, wait_for
from procgen import ProcgenGym3Env
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

import ppo_procgen
from ppo_procgen import Agent, Args, ProcgenVectorEnv

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = [sys.executable, str(ROOT / "ppo_procgen.py")]
XPID = "bossfight-easy-200-ppo-lr0.0005-epoch1-mb2-v0.5-ha0.01-num_envs4-num_steps16_0"
# Six iterations of 64 steps. Saved after 2, 4 and 6; archived after 1, 2, 3, 4 and 6. Episodes of bossfight are short.
SMALL = "--env-id bossfight --num-envs 4 --num-steps 16 --num-minibatches 2 --update-epochs 1 --no-cuda".split()
SMALL += "--total-timesteps 384 --log-interval 2 --archive-interval 3 --num-eval-episodes 2".split()


def launch(folder, *more):
    """Run the script in folder, in a process of its own; return the finished process."""
    command = [*SCRIPT, *SMALL, *more]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def train(folder, *more):
    """The same in this process, which has PyTorch and Procgen's images loaded already."""
    return run_main(ppo_procgen, [*SMALL, *more], folder)


def run_dir(folder, xpid=XPID):
    return folder / "models" / "bossfight" / xpid


def load(path):
    return torch.load(path, weights_only=True)


def final(folder, xpid=XPID):
    (path,) = run_dir(folder, xpid).glob("final/*.pt")
    return load(path)


def progress(folder, xpid=XPID):
    """progress.csv as a list of dicts, without the speed, which is a matter of the clock."""
    with open(run_dir(folder, xpid) / "progress.csv") as file:
        return [{key: value for key, value in row.items() if key != "charts/SPS"} for row in csv.DictReader(file)]


def same(a, b):
    return not differences(a, b)


def assert_same_run(folder, reference, xpid=XPID):
    """The run in folder has left what the reference has: the same names, states and numbers, and nothing else."""

    def names(root):
        return {str(path.relative_to(root)) for path in root.rglob("*") if "tfevents" not in path.name}

    assert names(run_dir(folder, xpid)) == names(run_dir(reference))
    for path in run_dir(reference).rglob("*.pt"):
        ours, theirs = load(run_dir(folder, xpid) / path.relative_to(run_dir(reference))), load(path)
        for state in (ours, theirs):
            state.pop("args"), state.pop("xpid"), state.pop("machine", None)
        assert not differences(ours, theirs), path.name
    assert progress(folder, xpid) == progress(reference)
    ours, theirs = scalars(folder, xpid), scalars(reference)
    assert ours.keys() == theirs.keys()
    for tag in ours.keys() - {"charts/SPS"}:
        assert ours[tag] == theirs[tag], tag


def scalars(folder, xpid=XPID):
    """TensorBoard's scalars as it would show them: {tag: [(step, value), ...]}."""
    accumulator = EventAccumulator(str(run_dir(folder, xpid)), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A folder with a run of six iterations that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = launch(folder)
    assert process.returncode == 0, process.stderr
    (folder / "printed").write_text(process.stdout)
    return folder


# THE ALGORITHM


def test_gae_equals_a_naive_double_loop():
    torch.manual_seed(0)
    steps, envs, gamma, lam = 20, 3, 0.97, 0.9
    rewards, values = torch.randn(steps, envs), torch.randn(steps, envs)
    dones, next_value, next_done = torch.rand(steps, envs) < 0.2, torch.randn(envs), torch.tensor([True, False, False])
    advantages, returns = ppo_procgen.compute_gae(rewards, values, dones, next_value, next_done, gamma, lam)

    all_values, all_dones = torch.cat([values, next_value[None]]), torch.cat([dones, next_done[None]])
    for env in range(envs):
        for t in range(steps):
            expected, weight = 0.0, 1.0
            for k in range(t, steps):
                ended = all_dones[k + 1, env]
                bootstrap = 0.0 if ended else gamma * all_values[k + 1, env]
                expected += weight * (rewards[k, env] + bootstrap - values[k, env])
                if ended:
                    break
                weight *= gamma * lam
            assert advantages[t, env] == pytest.approx(float(expected), abs=1e-5)
    assert torch.equal(returns, advantages + values)


def loss_inputs(n=24):
    """A rollout of n samples on which every branch of the clipping is taken."""
    torch.manual_seed(1)
    agent = Agent(Args(hidden_size=32))
    torch.nn.init.orthogonal_(agent.actor.weight, 3.0)  # far from uniform, so that ratios leave the clipping range
    obs = torch.randint(0, 256, (n, 64, 64, 3), dtype=torch.uint8)
    actions = torch.randint(0, 15, (n,))
    with torch.no_grad():
        _, logprobs, _, values = agent.get_action_and_value(obs, actions)
    logprobs, values = logprobs + 0.4 * torch.randn(n), values + 0.4 * torch.randn(n)
    return agent, (obs, actions, logprobs, values + torch.randn(n), values, torch.randn(n))


@pytest.mark.parametrize("clip_vloss", [True, False])
def test_ppo_loss_and_its_gradient_equal_a_naive_version(clip_vloss):
    agent, sample = loss_inputs()
    args = Args(clip_vloss=clip_vloss)
    loss, parts = ppo_procgen.ppo_loss(agent, *sample, args)
    gradient = torch.autograd.grad(loss, list(agent.parameters()))

    terms, naive_parts, values_clipped = [], [], 0
    for obs, action, logprob, ret, value, advantage in zip(*sample):
        logits, new_value = agent(obs[None])
        log_policy = logits[0].log_softmax(0)
        ratio = torch.exp(log_policy[action] - logprob)
        limited = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.2))
        policy_loss = -min(ratio * advantage, limited * advantage)
        value_loss = (new_value[0] - ret) ** 2
        if clip_vloss:
            near = value + min(max(new_value[0] - value, torch.tensor(-0.2)), torch.tensor(0.2))
            values_clipped += float((near - ret) ** 2 > value_loss)
            value_loss = max(value_loss, (near - ret) ** 2)
        entropy = -(log_policy.exp() * log_policy).sum()
        terms.append(policy_loss - 0.01 * entropy + 0.5 * 0.5 * value_loss)
        clipped = float(abs(ratio - 1) > 0.2)
        parts_here = policy_loss, 0.5 * value_loss, entropy, -ratio.log(), ratio - 1 - ratio.log(), clipped
        naive_parts.append([float(torch.as_tensor(part).detach()) for part in parts_here])
    naive = torch.stack(terms).mean()
    assert loss.item() == pytest.approx(naive.item(), rel=1e-4)
    for ours, theirs in zip(gradient, torch.autograd.grad(naive, list(agent.parameters()))):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    names = ["policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac"]
    expected = dict(zip(names, torch.tensor(naive_parts).mean(0).tolist()))
    assert dict(zip(ppo_procgen.LOSSES, parts.tolist())) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 0 < expected["clipfrac"] < 1  # both kinds were there
    assert 0 < values_clipped < len(terms) or not clip_vloss


def test_rewards_are_divided_by_the_standard_deviation_of_the_discounted_return():
    args = Args(env_id="bigfish", num_envs=8, gamma=0.9)
    envs, raw = ppo_procgen.make_envs(args), ProcgenVectorEnv(8, "bigfish", "easy", 0, 200, seed=0)
    envs.reset(), raw.reset()
    generator, discounted, seen = np.random.default_rng(0), np.zeros(8), []
    largest = 0.0
    for _ in range(400):
        actions = generator.integers(0, 15, 8)
        normalised, (_, rewards, done, _, _) = envs.step(actions)[1], raw.step(actions)
        discounted = 0.9 * discounted + rewards
        seen.append(discounted.copy())
        discounted[done] = 0
        # gym's running moments begin with a sample of weight 1e-4, mean 0 and variance 1
        sample, prior = np.concatenate(seen), 1e-4
        mean = sample.sum() / (len(sample) + prior)
        variance = (prior + (sample**2).sum()) / (len(sample) + prior) - mean**2
        expected = np.clip(rewards / np.sqrt(variance + 1e-8), -10, 10)
        np.testing.assert_allclose(normalised, expected, rtol=1e-4)
        largest = max(largest, normalised.max())
    assert largest == 10  # the clipping took part


def test_heads_start_with_a_near_uniform_policy_and_uint8_frames_are_scaled_to_one():
    torch.manual_seed(0)
    agent = Agent(Args())
    weight = agent.actor.weight / 0.01
    torch.testing.assert_close(weight @ weight.T, torch.eye(15))
    assert agent.critic.weight.norm().item() == pytest.approx(1.0, rel=1e-5)
    seen = []
    agent.network[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    agent(torch.full((2, 64, 64, 3), 255, dtype=torch.uint8))
    assert seen[0].shape == (2, 3, 64, 64) and seen[0].min() == seen[0].max() == 1.0
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_the_gradient_summed_over_chunks_is_that_of_the_minibatch(tmp_path, monkeypatch):
    one = ("--total-timesteps", "64", "--max-grad-norm", "1e9")
    assert train(tmp_path, *one, "--xpid", "whole").returncode == 0
    monkeypatch.setattr(
        ppo_procgen, "frames_per_backward", lambda device: 10
    )  # of minibatches of 32: three of 10 and one of 2
    assert train(tmp_path, *one, "--xpid", "chunks").returncode == 0
    (whole,), (chunks,) = progress(tmp_path, "whole"), progress(tmp_path, "chunks")
    for tag in whole:
        if tag.startswith("losses/"):
            assert float(chunks[tag]) == pytest.approx(float(whole[tag]), rel=1e-3, abs=1e-6), tag


# Three iterations of 160 steps, with no default that has a part in them. With this seed, episodes end within a rollout
# and in the last step of the second one.
DODGEBALL = "--env-id dodgeball --distribution-mode hard --seed 6 --start-level 10 --num-levels 40".split()
DODGEBALL += "--num-envs 8 --num-steps 20 --total-timesteps 320 --num-minibatches 2 --update-epochs 2".split()
DODGEBALL += (
    "--learning-rate 0.001 --gamma 0.9 --gae-lambda 0.8 --clip-coef 0.002 --ent-coef 0.05 --vf-coef 0.7".split()
)
DODGEBALL += (
    "--max-grad-norm 0.05 --adam-eps 0.001 --hidden-size 64 --num-eval-episodes 1 --archive-interval 100".split()
)
DODGEBALL += ["--no-cuda", "--save-dataset"]


@pytest.fixture(scope="module")
def dodgeball(tmp_path_factory):
    """A folder with two of the three iterations."""
    folder = tmp_path_factory.mktemp("dodgeball")
    process = run_main(ppo_procgen, DODGEBALL, folder)
    assert process.returncode == 0, process.stderr
    return folder


def plain_ppo(num_iterations, lr=0.001, norm_adv=True, clip_vloss=True):
    """PPO as in the paper: whole minibatches, loops, float64 returns. Yields weights, ends and progress.csv's row."""
    num_envs, num_steps, gamma, gae_lambda = 8, 20, 0.9, 0.8
    torch.manual_seed(6)
    agent = Agent(Args(hidden_size=64))
    optimizer = torch.optim.Adam(agent.parameters(), lr, eps=0.001)
    games = ProcgenGym3Env(num_envs, "dodgeball", distribution_mode="hard", start_level=10, num_levels=40, rand_seed=6)
    discounted, count, mean, var = np.zeros(num_envs), 1e-4, 0.0, 1.0
    returns_under_way, lengths_under_way = np.zeros(num_envs), np.zeros(num_envs)
    episodes = []  # (return, length, level_complete)
    for _ in range(num_iterations):
        frames, actions, log_probs, values, rewards, ends, losses = [], [], [], [], [], [], []
        for _ in range(num_steps):
            frames.append(torch.from_numpy(games.observe()[1]["rgb"].copy()))
            with torch.no_grad():
                logits, value = agent(frames[-1])
            policy = torch.distributions.Categorical(logits=logits)
            actions.append(policy.sample())
            log_probs.append(policy.log_prob(actions[-1]))
            values.append(value.double())
            games.act(actions[-1].numpy())
            reward, _, end = games.observe()
            returns_under_way, lengths_under_way = returns_under_way + reward, lengths_under_way + 1
            for env in np.flatnonzero(end):
                complete = games.get_info()[env]["prev_level_complete"]
                episodes.append((returns_under_way[env], lengths_under_way[env], complete))
                returns_under_way[env] = lengths_under_way[env] = 0
            discounted = gamma * discounted + reward
            total = count + num_envs  # the moments of all discounted returns so far
            new_mean = mean + (discounted.mean() - mean) * num_envs / total
            spread = var * count + discounted.var() * num_envs
            var = (spread + (discounted.mean() - mean) ** 2 * count * num_envs / total) / total
            mean, count = new_mean, total
            discounted[end] = 0
            rewards.append(torch.from_numpy(np.clip(reward / np.sqrt(var + 1e-8), -10, 10)))
            ends.append(torch.from_numpy(end.copy()))
        with torch.no_grad():
            values.append(agent(torch.from_numpy(games.observe()[1]["rgb"].copy()))[1].double())
        advantages = torch.zeros(num_steps, num_envs, dtype=torch.float64)
        for env in range(num_envs):
            for t in range(num_steps):
                weight = 1.0
                for k in range(t, num_steps):
                    after = 0.0 if ends[k][env] else gamma * values[k + 1][env]
                    advantages[t, env] += weight * (rewards[k][env] + after - values[k][env])
                    if ends[k][env]:
                        break
                    weight *= gamma * gae_lambda
        columns = (torch.cat(column) for column in (frames, actions, log_probs, values[:-1]))
        frames, actions, log_probs, values = columns
        advantages, returns = advantages.flatten(), advantages.flatten() + values
        for _ in range(2):
            order = torch.randperm(num_envs * num_steps)
            for picked in (order[: len(order) // 2], order[len(order) // 2 :]):
                advantage = advantages[picked]
                if norm_adv:
                    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                logits, value = agent(frames[picked])
                policy = torch.distributions.Categorical(logits=logits)
                log_ratio = policy.log_prob(actions[picked]) - log_probs[picked]
                ratio = log_ratio.exp()
                gain = torch.min(ratio * advantage, ratio.clamp(0.998, 1.002) * advantage).mean()
                error = (value - returns[picked]) ** 2
                if clip_vloss:
                    moved = values[picked] + (value - values[picked]).clamp(-0.002, 0.002)
                    error = torch.max(error, (moved - returns[picked]) ** 2)
                error, entropy = error.mean() / 2, policy.entropy().mean()
                optimizer.zero_grad()
                (-gain + 0.7 * error - 0.05 * entropy).backward()
                norm = torch.sqrt(sum((p.grad**2).sum() for p in agent.parameters()))
                for p in agent.parameters():
                    p.grad *= min(1.0, 0.05 / norm)
                optimizer.step()
                clipped = (ratio < 0.998) | (ratio > 1.002)
                kls = -log_ratio.mean(), (ratio - 1 - log_ratio).mean()
                losses.append([x.item() for x in (-gain, error, entropy, *kls, clipped.double().mean(), norm)])
        names = "policy_loss value_loss entropy old_approx_kl approx_kl clipfrac grad_norm".split()
        row = {f"losses/{name}": x for name, x in zip(names, np.mean(losses, axis=0))}
        row["losses/explained_variance"] = float(1 - (returns - values).var() / returns.var())
        names = ("charts/episodic_return", "charts/episodic_length", "charts/level_complete")
        yield agent.state_dict(), ends, row | dict(zip(names, np.mean(episodes, axis=0)))


def assert_is_plain_ppo(run, results):
    """The weights of a run's last iteration, and the rows of its progress.csv, are those of plain_ppo()."""
    trained = load(run / "rolling" / "model.pt")["model_state_dict"]
    for name, expected in results[-1][0].items():
        torch.testing.assert_close(trained[name], expected, rtol=0, atol=5e-6)
    with open(run / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results)
    for row, (_, _, expected) in zip(rows, results):
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_iterations_of_main_are_those_of_a_plain_ppo_loop(dodgeball, tmp_path):
    shutil.copytree(dodgeball, tmp_path / "run")
    process = run_main(ppo_procgen, [*DODGEBALL, "--resume", "--total-timesteps", "480"], tmp_path / "run")
    assert process.returncode == 0, process.stderr
    (run,) = (tmp_path / "run").glob("models/dodgeball/*")
    results = list(plain_ppo(3))
    assert_is_plain_ppo(run, results)
    second, row = results[1][1:]
    assert second[-1].any() and any(end.any() for end in second[:-1])  # episodes ended on the edge and within
    assert 0 < row["losses/clipfrac"] < 1
    recorded = [np.load(path)["dones"] for path in sorted(run.glob("rollouts/*.npz"))]
    np.testing.assert_array_equal(np.concatenate(recorded)[20:40], torch.stack(second))


def test_an_iteration_without_normalised_advantages_and_clipped_values_is_a_plain_one(tmp_path):
    """With a learning rate at which the unclipped value loss does not blow up what the last bits differ by."""
    one = "--learning-rate 0.0001 --no-norm-adv --no-clip-vloss --total-timesteps 160 --xpid x".split()
    assert run_main(ppo_procgen, [*DODGEBALL, *one], tmp_path).returncode == 0
    (run,) = tmp_path.glob("models/dodgeball/*")
    assert_is_plain_ppo(run, list(plain_ppo(1, 0.0001, norm_adv=False, clip_vloss=False)))


# THE GAMES


def play(envs, actions):
    """Step through (T, num_envs) actions; return every frame, reward and end."""
    steps = [envs.step(step) for step in actions]
    return [np.stack([step[i] for step in steps]) for i in range(3)]


def test_the_seed_decides_the_games():
    actions = np.random.default_rng(0).integers(0, 15, (100, 4))
    first, again, other = (play(ProcgenVectorEnv(4, "starpilot", "easy", 0, 200, seed), actions) for seed in (3, 3, 4))
    assert all(map(np.array_equal, first, again))
    assert not np.array_equal(first[0], other[0])


def level_seeds(envs, steps=300):
    """Seeds of the levels that a random policy finishes, and of those under way."""
    seeds = {game["level_seed"] for game in envs.games.get_info()}
    for actions in np.random.default_rng(0).integers(0, 15, (steps, envs.num_envs)):
        _, _, done, _, infos = envs.step(actions)
        if done.any():
            seeds |= set(infos["prev_level_seed"][done])
    return seeds


def test_training_levels_are_the_range_and_test_levels_everything_above():
    args = Args(env_id="bossfight", start_level=7, num_levels=5, num_envs=16, num_eval_episodes=16)
    assert level_seeds(ppo_procgen.make_envs(args).unwrapped) == set(range(7, 12))
    tested = level_seeds(ppo_procgen.make_test_envs(args))
    assert min(tested) >= 12 and max(tested) > 10**6


def test_the_test_levels_are_exactly_those_above_the_training_levels():
    """Near the top of the range few are left, and each of them is met."""
    args = Args(env_id="bossfight", start_level=2**31 - 12, num_levels=5, num_envs=16, num_eval_episodes=16)
    top = 2**31 - 1
    assert level_seeds(ppo_procgen.make_envs(args).unwrapped, 800) == set(range(top - 11, top - 6))
    assert level_seeds(ppo_procgen.make_test_envs(args), 800) == set(range(top - 6, top))


def test_no_end_of_the_level_range_keeps_start_level():
    assert min(level_seeds(ProcgenVectorEnv(8, "bossfight", "easy", start_level=10**9, num_levels=0, seed=0))) >= 10**9


def test_reset_starts_new_episodes():
    envs = ProcgenVectorEnv(4, "bossfight", "easy", 0, 0, seed=0)
    envs.reset()
    before = [game["level_seed"] for game in envs.games.get_info()]
    assert not envs.step(np.full(4, 4))[2].any()
    envs.reset()
    assert all(np.not_equal(before, [game["level_seed"] for game in envs.games.get_info()]))
    with pytest.raises(ValueError, match="seed"):
        envs.reset(seed=1)


@pytest.mark.parametrize("env_id", ppo_procgen.ENV_NAMES)
def test_a_saved_state_continues_in_another_environment(env_id):
    actions = np.random.default_rng(0).integers(0, 15, (60, 2))
    envs, other = (ProcgenVectorEnv(2, env_id, "easy", 0, 200, seed) for seed in (0, 1))
    play(envs, actions)
    other.set_state(envs.get_state())
    assert all(map(np.array_equal, play(envs, actions), play(other, actions)))


def test_every_mode_that_is_offered_exists():
    """Asked for a mode that a game lacks, Procgen ends the process: this test would not return."""
    for mode, games in ppo_procgen.EXTRA_MODES.items():
        for env_id in games:
            assert ProcgenVectorEnv(1, env_id, mode, 0, 1, 0).reset()[0].shape == (1, 64, 64, 3)


# EVALUATION


def test_evaluation_plays_one_episode_in_each_environment():
    args = Args(env_id="bossfight", num_eval_episodes=6)
    envs, device = ppo_procgen.make_test_envs(args), torch.device("cpu")
    start = envs.get_state()
    torch.manual_seed(0)
    agent = Agent(Args(hidden_size=32))
    returns, lengths, complete = ppo_procgen.evaluate(agent, envs, start, 5, device)

    obs, episodes = envs.set_state(start), {}
    torch.manual_seed(5)
    sums, steps = np.zeros(6), 0
    while len(episodes) < 6:
        action = agent.get_action_and_value(torch.from_numpy(obs))[0].numpy()
        obs, reward, done, _, infos = envs.step(action)
        sums, steps = sums + reward, steps + 1
        for i in np.flatnonzero(done):
            episodes.setdefault(i, (sums[i], steps, infos["prev_level_complete"][i]))  # the first one only
    expected = [episodes[i] for i in range(6)]
    assert list(zip(returns, lengths, complete)) == expected
    assert len(set(lengths)) > 1


def test_evaluation_is_repeatable_and_leaves_the_random_generator_alone():
    envs, device = ppo_procgen.make_test_envs(Args(env_id="bossfight", num_eval_episodes=3)), torch.device("cpu")
    start, agent, before = envs.get_state(), Agent(Args(hidden_size=32)), torch.get_rng_state()
    first = ppo_procgen.evaluate(agent, envs, start, 0, device)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)  # the training goes on
    second = ppo_procgen.evaluate(agent, envs, start, 0, device)
    assert all(map(np.array_equal, first, second))


# A RUN ON DISK


def test_files_and_names(uninterrupted):
    files = [path.relative_to(run_dir(uninterrupted)) for path in run_dir(uninterrupted).rglob("*") if path.is_file()]
    names = {str(path) for path in files if "tfevents" not in path.name}
    archived = {path.name for path in run_dir(uninterrupted).glob("checkpoint/*")}
    assert {name.rsplit("_", 1)[0] for name in archived} == {f"model_{i}" for i in (1, 2, 3, 4, 6)}
    (last,) = (path.name for path in run_dir(uninterrupted).glob("final/*"))
    checkpoints = {f"checkpoint/{name}" for name in archived} | {f"final/{last}", "rolling/model.pt"}
    assert names == checkpoints | {"progress.csv", ".lock", "ppo_procgen.py"} and len(files) == len(names) + 1
    for name in checkpoints - {"rolling/model.pt"}:
        state = load(run_dir(uninterrupted) / name)
        iteration = int(re.search(r"model_(\d+)_", name)[1]) if "checkpoint" in name else 6
        assert float(re.search(r"_(-?\d+\.\d\d)\.pt$", name)[1]) == pytest.approx(state["test_return"], abs=0.005)
        assert (state["format"], state["iteration"], state["global_step"]) == (1, iteration, 64 * iteration)
        assert state["xpid"] == XPID and state["args"]["env_id"] == "bossfight"
        assert set(state["args"]) == set(vars(Args()))
        assert set(state["versions"]) == {"python", "torch", "numpy", "procgen"}
        Agent(Args()).load_state_dict(state["model_state_dict"])


def test_a_run_keeps_the_source_that_made_it(uninterrupted):
    source = (ROOT / "ppo_procgen.py").read_bytes()
    assert (run_dir(uninterrupted) / "ppo_procgen.py").read_bytes() == source
    state = final(uninterrupted)
    assert (state["script"], state["script_sha256"]) == ("ppo_procgen.py", hashlib.sha256(source).hexdigest())
    networks = (ppo_procgen.ResidualBlock, ppo_procgen.ConvSequence, Agent)
    network = "".join(map(inspect.getsource, networks))
    assert state["agent_sha256"] == hashlib.sha256(network.encode()).hexdigest()


def test_progress_and_tensorboard_hold_the_same_numbers(uninterrupted):
    rows, tags = progress(uninterrupted), scalars(uninterrupted)
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [int(row["global_step"]) for row in rows] == [64, 128, 192, 256, 320, 384]
    for tag in rows[0].keys() - {"iteration", "global_step"}:
        expected = [(int(row["global_step"]), float(row[tag])) for row in rows if row[tag] != "nan"]
        assert tags[tag] == [(step, pytest.approx(value)) for step, value in expected], tag
    assert [step for step, _ in tags["charts/test_return"]] == [64, 128, 192, 256, 384]
    text = EventAccumulator(str(run_dir(uninterrupted))).Reload()
    (panel,) = text.Tensors("hyperparameters/text_summary")
    assert b"|learning_rate|0.0005|" in panel.tensor_proto.string_val[0]


def test_the_curves_count_every_finished_episode(tmp_path):
    """With 200 steps of 8 games in one iteration, the statistics are those of a plain count over the same games."""
    sizes = "--num-envs 8 --num-steps 200 --total-timesteps 1600 --num-minibatches 8 --update-epochs 1".split()
    assert train(tmp_path, "--env-id", "jumper", *sizes, "--xpid", "x").returncode == 0
    envs = ProcgenVectorEnv(8, "jumper", "easy", 0, 200, seed=0)
    torch.manual_seed(0)
    agent, obs = Agent(Args()), envs.reset()[0]
    running, steps, episodes = np.zeros(8), np.zeros(8), []
    for _ in range(200):
        with torch.inference_mode():
            action = agent.get_action_and_value(torch.from_numpy(obs))[0].numpy()
        obs, reward, done, _, infos = envs.step(action)
        running, steps = running + reward, steps + 1
        episodes += [(running[i], steps[i], infos["prev_level_complete"][i]) for i in np.flatnonzero(done)]
        running[done] = steps[done] = 0
    (run,) = tmp_path.glob("models/jumper/x")
    with open(run / "progress.csv") as file:
        (row,) = csv.DictReader(file)
    returns, lengths, complete = np.mean(episodes, axis=0)
    assert len(episodes) == 3 and 0 < complete < 1
    assert float(row["charts/episodic_return"]) == pytest.approx(returns)
    assert float(row["charts/episodic_length"]) == pytest.approx(lengths)
    assert float(row["charts/level_complete"]) == pytest.approx(complete)

    (path,) = run.glob("final/*.pt")
    agent.load_state_dict(load(path)["model_state_dict"])
    envs = ppo_procgen.make_test_envs(Args(env_id="jumper", num_eval_episodes=2))
    tested = ppo_procgen.evaluate(agent, envs, envs.get_state(), 0, torch.device("cpu"))
    names = ("charts/test_return", "charts/test_length", "charts/test_level_complete")
    assert [float(row[name]) for name in names] == [pytest.approx(x.mean()) for x in tested]


def test_the_seed_decides_the_weights(uninterrupted, tmp_path):
    """The run in this process equals that of another process."""
    assert train(tmp_path).returncode == 0
    assert_same_run(tmp_path, uninterrupted)
    assert train(tmp_path, "--seed", "1").returncode == 0
    other = final(tmp_path, XPID[:-1] + "1")
    assert not same(other["model_state_dict"], final(uninterrupted)["model_state_dict"])


def test_log_archive_and_evaluation_settings_do_not_change_the_weights(uninterrupted, tmp_path):
    assert train(tmp_path, *"--log-interval 1 --archive-interval 1 --num-eval-episodes 5".split()).returncode == 0
    for key in ("model_state_dict", "optimizer_state_dict"):
        assert same(final(tmp_path)[key], final(uninterrupted)[key])
    assert len(list(run_dir(tmp_path).glob("checkpoint/*.pt"))) == 6


def test_a_log_file_gets_plain_lines(uninterrupted):
    lines = (uninterrupted / "printed").read_text().splitlines()
    assert any(f"models/bossfight/{XPID}" in line for line in lines)
    assert any("384 (6 iterations of 64)" in line for line in lines)
    assert any("626,256" in line for line in lines)
    saved = [line.split(",")[0] for line in lines if line.startswith("iteration")]
    assert saved == ["iteration 2/6", "iteration 4/6", "iteration 6/6"]


def test_a_terminal_gets_a_bar(tmp_path):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 140, 0, 0))
    short = ("--total-timesteps", "128", "--archive-interval", "100")
    process = subprocess.Popen([*SCRIPT, *SMALL, *short], cwd=tmp_path, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 4096):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    assert re.search(rb"128/128 .*steps/s.*train return .*test return", shown)


# RESUME


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run with --save-dataset that nothing disturbed: its content, and the counts of check_resume."""
    folder = tmp_path_factory.mktemp("undisturbed")
    counts = run_undisturbed(ROOT / "ppo_procgen.py", RECORDED, folder)
    return read_run(folder), counts


RECORDED = ["--save-dataset", "--no-cuda"]


def test_a_run_that_was_stopped_or_killed_ends_like_one_that_was_not(undisturbed, tmp_path):
    """In a rollout, an update or a write: weights, optimizer, games, generators, table, recording are the same."""
    expected, counts = undisturbed

    def check(i):
        wrong = run_disturbed(ROOT / "ppo_procgen.py", RECORDED, tmp_path / str(i), counts, MOMENTS[i])
        return wrong or differences(read_run(tmp_path / str(i)), expected)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(check, range(len(MOMENTS)))) == [[] for _ in MOMENTS]
    assert {"recording actions", "progress.csv", "rolling/model.pt"} < expected.keys()


def test_check_resume_names_what_a_fork_forgot(tmp_path):
    """A fork that mixes the mean of its past frames into every frame, and keeps that mean outside of carry."""
    source = (ROOT / "ppo_procgen.py").read_text()
    rollout = "                obs[step], dones[step] = carry.next_obs, carry.next_done\n"
    mixed = "                past = (past * 0.9 + carry.next_obs.float() * 0.1)\n" + rollout.replace(
        "= carry.next_obs", "= (carry.next_obs * 0.5 + past * 0.5).to(torch.uint8)"
    )
    fork = source.replace(
        "    test = None  #", "    past = torch.zeros((args.num_envs, 64, 64, 3), device=device)\n    test = None  #"
    )
    fork = fork.replace(rollout, mixed)
    kept = fork.replace("    past = torch.zeros(", "    carry.past = torch.zeros(").replace(
        "past = (past * 0.9", "carry.past = (carry.past * 0.9"
    )
    kept = kept.replace("+ past * 0.5", "+ carry.past * 0.5")
    moment = ("act", 0.7, signal.SIGKILL)

    def check(name, text):
        script = tmp_path / f"{name}_procgen.py"
        script.write_text(text)
        counts = run_undisturbed(script, ["--no-cuda"], tmp_path / f"{name}_undisturbed")
        assert not run_disturbed(script, ["--no-cuda"], tmp_path / name, counts, moment)
        return differences(read_run(tmp_path / name), read_run(tmp_path / f"{name}_undisturbed"))

    with ThreadPoolExecutor(2) as pool:
        forgotten, kept = pool.map(check, ("forgetful", "careful"), (fork, kept))
    assert any("model_state_dict" in name for name in forgotten)
    assert kept == []


def stop_at_once(monkeypatch):
    """Let the next run be stopped after it has restored its state, before its first step."""

    def stop():
        raise ppo_procgen.Stopped("a test")

    monkeypatch.setattr(ppo_procgen, "stop_if_asked", stop)


def test_a_resumed_run_has_every_piece_of_its_state(dodgeball, tmp_path, monkeypatch):
    """Of a run that was saved with an episode that ended in the last step of its rollout."""
    folder = tmp_path / "run"
    shutil.copytree(dodgeball, folder)
    (run,) = folder.glob("models/dodgeball/*")
    before = load(run / "rolling" / "model.pt")
    assert before["carry"]["next_done"]["numpy"].any() and before["carry"]["level_complete"]
    stop_at_once(monkeypatch)
    assert run_main(ppo_procgen, [*DODGEBALL, "--resume", "--total-timesteps", "640"], folder).returncode == 75
    before["args"] |= {"resume": True, "total_timesteps": 640}
    assert not differences(load(run / "rolling" / "model.pt"), before)


def test_a_random_generator_of_a_wrapper_is_saved_and_restored(tmp_path):
    wrapper = SimpleNamespace(rng=np.random.default_rng(7), steps=3)
    wrapper.rng.integers(10, size=5)
    torch.save(ppo_procgen.freeze(wrapper), tmp_path / "state.pt")
    expected = wrapper.rng.random(4)
    other = SimpleNamespace(rng=np.random.default_rng(0), steps=0)
    ppo_procgen.thaw(torch.load(tmp_path / "state.pt", weights_only=True), other)
    assert np.array_equal(other.rng.random(4), expected) and other.steps == 3


def test_a_fork_may_do_without_an_argument():
    fields = {**vars(ppo_procgen.Args(xpid="x")), "my_width": 3}
    for name in ("hidden_size", "target_kl"):
        del fields[name]
    ppo_procgen.check_args(SimpleNamespace(**fields))


def test_a_signal_saves_and_exits_75(uninterrupted, tmp_path):
    def stop(signum):
        folder = tmp_path / signum.name
        folder.mkdir()
        command = [*SCRIPT, *SMALL, "--resume", "--log-interval", "100"]  # so that only the signal saves
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        wait_for((run_dir(folder) / "progress.csv").exists, process)
        process.send_signal(signum)
        return folder, signum, process.communicate(timeout=60)[0], process.returncode

    with ThreadPoolExecutor() as pool:
        stopped = list(pool.map(stop, ppo_procgen.STOP_SIGNALS))
    assert len(stopped) == 3
    for folder, signum, output, code in stopped:
        assert code == 75
        assert f"stopped by {signum.name}" in output
        saved = load(run_dir(folder) / "rolling" / "model.pt")["iteration"]
        assert 1 <= saved < 6 and len(progress(folder)) == saved
        assert train(folder, "--resume").returncode == 0
        assert_same_run(folder, uninterrupted)


def test_a_signal_while_pytorch_is_loading_exits_75(tmp_path):
    process = subprocess.Popen([*SCRIPT, *SMALL], cwd=tmp_path)

    def handled():
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1]
        return int(caught, 16) >> (signal.SIGUSR2 - 1) & 1

    wait_for(handled, process)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=60) == 75


def test_resuming_a_finished_run_says_so_and_changes_nothing(uninterrupted):
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}
    process = train(uninterrupted, "--resume")
    assert process.returncode == 0 and "is finished" in process.stdout
    assert {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()} == before


def test_a_run_can_be_made_longer_and_has_no_final_checkpoint_meanwhile(uninterrupted, tmp_path, monkeypatch):
    assert train(tmp_path, "--total-timesteps", "200", "--archive-interval", "100").returncode == 0  # three iterations
    own = run_dir(tmp_path) / "final" / "model_keep_me.pt"
    own.write_bytes(b"a copy of the user's")
    (end,) = run_dir(tmp_path).glob("final/model_*.??.pt")
    with monkeypatch.context() as patch:
        stop_at_once(patch)
        assert train(tmp_path, "--resume").returncode == 75
    assert list(run_dir(tmp_path).glob("final/*")) == [own]
    assert load(run_dir(tmp_path) / "checkpoint" / end.name.replace("model_", "model_3_"))["iteration"] == 3
    assert train(tmp_path, "--resume").returncode == 0
    own.unlink()
    assert_same_run(tmp_path, uninterrupted)


def test_a_larger_total_can_be_taken_back(uninterrupted, tmp_path, monkeypatch):
    """The run has gone beyond the new total: it ends where it is, with a final checkpoint of that."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at_once(patch)
        assert train(tmp_path / "run", "--resume", "--total-timesteps", "1000000").returncode == 75
    assert not list(run_dir(tmp_path / "run").glob("final/*"))
    process = train(tmp_path / "run", "--resume", "--total-timesteps", "320")
    assert process.returncode == 0, process.stderr
    assert same(final(tmp_path / "run")["model_state_dict"], final(uninterrupted)["model_state_dict"])
    assert final(tmp_path / "run")["test_return"] == final(uninterrupted)["test_return"]
    assert "is finished after iteration 6" in train(tmp_path / "run", "--resume").stdout


def test_resuming_with_other_arguments_names_them(uninterrupted):
    other = "--xpid", XPID, "--learning-rate", "0.001", "--num-levels", "0", "--log-interval", "7"
    process = train(uninterrupted, "--resume", *other)
    assert process.returncode == 2
    assert_one_line(process.stderr, "--learning-rate was 0.0005, is 0.001", "--num-levels was 200, is 0")
    assert "log-interval" not in process.stderr


def test_an_annealed_run_cannot_be_made_longer(tmp_path):
    short = ("--anneal-lr", "--total-timesteps", "128", "--xpid", "x")
    assert train(tmp_path, *short).returncode == 0
    assert [float(row["charts/learning_rate"]) for row in progress(tmp_path, "x")] == [0.0005, 0.00025]
    process = train(tmp_path, "--anneal-lr", "--xpid", "x", "--resume")
    assert process.returncode == 2
    assert_one_line(process.stderr, "--total-timesteps was 128, is 384")


def test_an_existing_run_is_never_overwritten(uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in run_dir(uninterrupted).rglob("*.pt")}
    process = train(uninterrupted)
    assert process.returncode == 2
    assert_one_line(process.stderr, XPID, "--resume", "--xpid")
    assert {path: path.stat().st_mtime_ns for path in run_dir(uninterrupted).rglob("*.pt")} == before


def test_a_lost_rolling_checkpoint_is_an_error(uninterrupted, tmp_path):
    """To start from scratch would overwrite what the run has left."""
    shutil.copytree(uninterrupted, tmp_path / "copy")
    (run_dir(tmp_path / "copy") / "rolling" / "model.pt").unlink()
    process = train(tmp_path / "copy", "--resume")
    assert process.returncode == 2
    assert_one_line(process.stderr, "rolling/model.pt back, which is missing")
    assert final(tmp_path / "copy")["iteration"] == 6


def test_a_second_process_on_the_same_run_fails(tmp_path, monkeypatch):
    endless = ("--total-timesteps", "1000000")
    first = subprocess.Popen([*SCRIPT, *SMALL, *endless], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        wait_for((run_dir(tmp_path) / "rolling" / "model.pt").exists, first)
        second = train(tmp_path, "--resume", *endless)
        assert second.returncode == 1
        assert_one_line(second.stderr, XPID, "in use by another process")
        # On a cluster the holder may be about to end: wait, then ask to be run again.
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        monkeypatch.setattr(ppo_procgen, "LOCK_PATIENCE", 2)
        waiting = train(tmp_path, "--resume", *endless)
        assert waiting.returncode == 75
        assert_one_line(waiting.stderr, "in use by another process, 2 s long")
    finally:
        first.kill()
        first.wait()
    # The lock has died with its holder: this one gets as far as the arguments that differ.
    assert train(tmp_path, "--resume", *endless, "--seed", "9", "--xpid", XPID).returncode == 2


def test_a_new_run_can_start_from_a_checkpoint(uninterrupted, tmp_path):
    (source,) = run_dir(uninterrupted).glob("final/*.pt")
    # A learning rate too small to move a float32 weight: what ends is what was loaded.
    new = ("--checkpoint", str(source), "--learning-rate", "1e-30", "--xpid", "new", "--total-timesteps", "64")
    assert train(tmp_path, *new).returncode == 0
    started = final(tmp_path, "new")
    assert same(started["model_state_dict"], load(source)["model_state_dict"])
    steps = {int(moments["step"]) for moments in started["optimizer_state_dict"]["state"].values()}
    assert steps == {6 * 2 + 2}  # Adam goes on counting
    assert started["optimizer_state_dict"]["param_groups"][0]["lr"] == 1e-30
    assert started["iteration"] == 1


def test_target_kl_ends_the_epochs_early(tmp_path):
    three_epochs = ("--update-epochs", "3", "--total-timesteps", "64", "--xpid", "x")
    assert train(tmp_path, *three_epochs, "--target-kl", "1e-9").returncode == 0
    steps = {int(moments["step"]) for moments in final(tmp_path, "x")["optimizer_state_dict"]["state"].values()}
    assert steps == {2}  # one epoch of two minibatches instead of three


def test_what_ends_a_run_early_saves_its_last_iteration_first(uninterrupted, tmp_path, monkeypatch):
    """An exception, a diverged update and a full disk, all in iteration 4, with nothing due to be saved."""
    gae, calls = ppo_procgen.compute_gae, []

    def broken(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyError("a mistake in a fork")
        return gae(*args)

    often = ("--log-interval", "100", "--archive-interval", "100")
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(ppo_procgen, "compute_gae", broken)
        train(tmp_path, *often)
    assert load(run_dir(tmp_path) / "rolling" / "model.pt")["iteration"] == 3

    with monkeypatch.context() as patch:
        patch.setattr(ppo_procgen, "compute_gae", lambda *args: [x * math.nan for x in gae(*args)])
        process = train(tmp_path, *often, "--resume")
    assert process.returncode == 1
    assert_one_line(process.stderr, "training diverged in iteration 4", "--learning-rate")
    assert load(run_dir(tmp_path) / "rolling" / "model.pt")["iteration"] == 3

    def full(path, state):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(ppo_procgen.Run, "write_table", lambda run: full(run.table, None))
        process = train(tmp_path, *often, "--resume")
    assert process.returncode == 1
    assert_one_line(process.stderr, "progress.csv could not be used: No space left on device")
    assert train(tmp_path, "--resume", *often).returncode == 0
    assert same(final(tmp_path)["model_state_dict"], final(uninterrupted)["model_state_dict"])


def test_weights_that_the_last_step_ruined_are_noticed(tmp_path):
    one = "--learning-rate 1e30 --num-minibatches 1 --update-epochs 1 --total-timesteps 64 --xpid x".split()
    process = train(tmp_path, *one)
    assert process.returncode == 1
    assert_one_line(process.stderr, "training diverged in iteration 1")
    assert load(run_dir(tmp_path, "x") / "rolling" / "model.pt")["iteration"] == 0


def test_a_reader_that_has_gone_is_not_a_full_disk(tmp_path):
    command = " ".join([*SCRIPT, *SMALL, "--log-interval", "1", "| head -1"])
    process = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert_one_line(process.stderr, "whoever read the output has gone", "--resume")
    assert load(run_dir(tmp_path) / "rolling" / "model.pt")["iteration"] >= 0


def test_a_moved_run_is_resumed_where_it_is(uninterrupted, tmp_path):
    assert train(tmp_path, "--total-timesteps", "128", "--archive-interval", "100").returncode == 0
    (tmp_path / "elsewhere" / "bossfight").mkdir(parents=True)
    run_dir(tmp_path).rename(tmp_path / "elsewhere" / "bossfight" / "renamed")
    moved = ("--model-saving-dir", "elsewhere", "--xpid", "renamed", "--resume")
    assert train(tmp_path, *moved).returncode == 0
    (path,) = tmp_path.glob("elsewhere/bossfight/renamed/final/*.pt")
    assert same(load(path)["model_state_dict"], final(uninterrupted)["model_state_dict"])
    assert not (tmp_path / "models" / "bossfight" / "renamed").exists()


def test_an_annealed_run_that_was_killed_ends_like_one_that_was_not(tmp_path):
    arguments = ["--anneal-lr", "--no-cuda"]
    script, moment = ROOT / "ppo_procgen.py", ("backward", 0.6, signal.SIGKILL)
    counts = run_undisturbed(script, arguments, tmp_path / "undisturbed")
    assert run_disturbed(script, arguments, tmp_path / "killed", counts, moment) == []
    assert differences(read_run(tmp_path / "killed"), read_run(tmp_path / "undisturbed")) == []


# IDENTITY


def fork(folder, *changes, name="ppo_drac_procgen.py"):
    """Copy the script into folder under another name, with these replacements of text; return its module."""
    source = (ROOT / "ppo_procgen.py").read_text()
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (folder / name).write_text(source)
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), folder / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


NEW_ARGUMENT = (
    "    vf_coef: float = 0.5",
    "    drac_coef: float = 0.1  # weight of the augmentation loss\n    vf_coef: float = 0.5",
)


def test_a_copy_is_another_algorithm(tmp_path):
    copy = fork(tmp_path, NEW_ARGUMENT)
    assert copy.default_xpid(copy.Args(seed=3)) == "coinrun-easy-200-ppo_drac-lr0.0005-epoch3-mb8-v0.5-ha0.01_3"
    process = run_main(copy, ["--env-id", "pong"], tmp_path)
    assert process.returncode == 2 and process.stderr.startswith("ppo_drac_procgen.py: error: --env-id")


def test_a_copy_does_not_go_on_with_its_parents_run_nor_the_other_way_round(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    copy = fork(tmp_path, NEW_ARGUMENT)
    process = run_main(copy, [*SMALL, "--xpid", XPID, "--resume"], tmp_path / "run")
    assert process.returncode == 2
    assert_one_line(process.stderr, "is a run of ppo_procgen.py, not of ppo_drac_procgen.py")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before

    copied = [*SMALL, "--xpid", "x", "--total-timesteps", "64"]
    assert run_main(copy, copied, tmp_path).returncode == 0
    process = run_main(ppo_procgen, [*copied, "--resume"], tmp_path)
    assert process.returncode == 2
    assert_one_line(process.stderr, "is a run of ppo_drac_procgen.py, not of ppo_procgen.py")


def test_an_argument_that_the_run_lacks_or_has_besides_is_refused(tmp_path):
    one = [*SMALL, "--xpid", "x", "--total-timesteps", "64", "--resume"]
    assert train(tmp_path, *one).returncode == 0
    (tmp_path / "changed").mkdir()
    changed = fork(tmp_path / "changed", NEW_ARGUMENT, name="ppo_procgen.py")
    process = run_main(changed, one, tmp_path)
    assert process.returncode == 2
    assert_one_line(process.stderr, "--drac-coef was absent, is 0.1")
    assert run_main(changed, [*one, "--xpid", "y"], tmp_path).returncode == 0
    process = run_main(ppo_procgen, [*one, "--xpid", "y"], tmp_path)
    assert process.returncode == 2
    assert_one_line(process.stderr, "--drac-coef was 0.1, is absent")


def test_a_changed_source_and_other_threads_are_said_and_kept(tmp_path):
    one = [*SMALL, "--xpid", "x", "--total-timesteps", "64", "--archive-interval", "9"]
    assert run_main(ppo_procgen, one, tmp_path).returncode == 0
    (tmp_path / "changed").mkdir()
    column = ('        "charts/learning_rate":', '        "charts/mine": 1.0,\n        "charts/learning_rate":')
    changed = fork(tmp_path / "changed", column, name="ppo_procgen.py")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        process = run_main(changed, [*one, "--resume", "--total-timesteps", "192"], tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert process.returncode == 0, process.stderr
    (note,) = (line for line in process.stdout.splitlines() if line.startswith("note: "))
    assert "the source was" in note and f"threads was {threads}, is {threads + 1}" in note
    run = run_dir(tmp_path, "x")
    assert (run / "ppo_procgen.py").read_bytes() == (ROOT / "ppo_procgen.py").read_bytes()
    assert (run / "ppo_procgen_after_1.py").read_bytes() == (tmp_path / "changed" / "ppo_procgen.py").read_bytes()
    rows = progress(tmp_path, "x")
    assert [row["charts/mine"] for row in rows] == ["nan", "1.0", "1.0"]  # one header for all rows
    assert [row["iteration"] for row in rows] == ["1", "2", "3"]


def test_state_that_a_run_lacks_is_one_line(tmp_path):
    one = [*SMALL, "--xpid", "x", "--total-timesteps", "64"]
    assert train(tmp_path, *one).returncode == 0
    (tmp_path / "changed").mkdir()
    memory = (
        "        latest_test_return=math.nan,\n",
        "        latest_test_return=math.nan,\n        memory=torch.zeros(3),\n",
    )
    changed = fork(tmp_path / "changed", memory, name="ppo_procgen.py")
    more = [*one, "--resume", "--total-timesteps", "128"]
    process = run_main(changed, more, tmp_path)
    assert process.returncode == 1
    assert_one_line(process.stderr, "rolling/model.pt does not fit this script", "carry.memory")


def test_a_run_of_a_gpu_does_not_go_on_without_one_by_accident(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    rolling = run_dir(tmp_path / "run") / "rolling" / "model.pt"
    state = load(rolling)
    torch.save({**state, "machine": {"device": "cuda", "model": "NVIDIA H100"}}, rolling)
    on_gpu = [argument for argument in SMALL if argument != "--no-cuda"] + ["--resume", "--total-timesteps", "448"]
    if not torch.cuda.is_available():
        process = run_main(ppo_procgen, on_gpu, tmp_path / "run")
        assert process.returncode == 2
        assert_one_line(process.stderr, "was on a GPU (NVIDIA H100)", "--no-cuda goes on without one")
    process = run_main(ppo_procgen, [*on_gpu, "--no-cuda"], tmp_path / "run")
    assert process.returncode == 0 and "device was cuda, is cpu" in process.stdout


def test_every_argument_with_a_part_in_the_result_stands_in_the_name():
    assert ppo_procgen.default_xpid(Args()) == "coinrun-easy-200-ppo-lr0.0005-epoch3-mb8-v0.5-ha0.01_0"
    changed = Args(gamma=0.9, anneal_lr=True, total_timesteps=99, log_interval=3, model_saving_dir="x", seed=7)
    name = "coinrun-easy-200-ppo-lr0.0005-epoch3-mb8-v0.5-ha0.01-anneal_lrTrue-gamma0.9_7"
    assert ppo_procgen.default_xpid(changed) == name
    assert "/" not in ppo_procgen.default_xpid(Args(checkpoint="models/a b.pt"))


def test_tracking_has_one_run_for_each_game_and_xpid(tmp_path, monkeypatch):
    """Against a package wandb that writes down what it is asked for."""
    (tmp_path / "wandb").mkdir()
    stub = "import json\nclass Error(Exception): pass\n"
    stub += "def init(**run):\n    with open('asked.jsonl', 'a') as file: file.write(json.dumps(run) + '\\n')\n"
    (tmp_path / "wandb" / "__init__.py").write_text(stub)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "wandb", None)  # so that it is forgotten afterwards
    del sys.modules["wandb"]
    one = ["--xpid", "x", "--total-timesteps", "64", "--track"]
    for arguments in (one, [*one, "--resume", "--total-timesteps", "128"], [*one, "--env-id", "jumper"]):
        assert train(tmp_path, *arguments).returncode == 0
    asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    first, resumed, other = asked
    assert first["id"] == resumed["id"] != other["id"]
    assert [run["name"] for run in asked] == ["x"] * 3 and first["config"]["xpid"] == "x"
    assert {run["resume"] for run in asked} == {"allow"} and all(run["sync_tensorboard"] for run in asked)


# THE RECORDING


def test_a_recording_holds_what_the_games_showed(dodgeball):
    """Given the recorded actions, fresh games of the same seed show frames of the same checksums, rewards and ends."""
    (folder,) = dodgeball.glob("models/dodgeball/*/rollouts")
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["complete"] and metadata["args"]["num_steps"] == 20
    assert (metadata["kind"], metadata["env_id"], metadata["num_levels"]) == ("recording", "dodgeball", 40)
    ((stream,),) = (segment["streams"] for segment in metadata["segments"])
    assert stream == {"seed": 6, "num_envs": 8}
    paths = sorted(folder.glob("*.npz"))
    assert paths[0].name == "0_0_00000000.npz"
    chunks = [np.load(path) for path in paths]
    actions, rewards, dones, checksums, log_probs = (
        np.concatenate([chunk[key] for chunk in chunks])
        for key in ("actions", "rewards", "dones", "checksums", "log_probs")
    )
    assert (actions.dtype, actions.shape, checksums.shape, log_probs.dtype) == (np.uint8, (40, 8), (40,), np.float32)
    games = ProcgenGym3Env(8, "dodgeball", distribution_mode="hard", start_level=10, num_levels=40, rand_seed=6)
    torch.manual_seed(6)
    agent = Agent(Args(hidden_size=64))
    for t in range(40):
        frames = games.observe()[1]["rgb"]
        assert zlib.crc32(np.ascontiguousarray(frames)) == checksums[t]
        if t == 0:
            with torch.no_grad():
                expected = agent.get_action_and_value(torch.from_numpy(frames), torch.from_numpy(actions[0]).long())[1]
            np.testing.assert_allclose(log_probs[0], expected, atol=1e-6)
        games.act(actions[t].astype(np.int32))
        reward, _, end = games.observe()
        assert np.array_equal(reward, rewards[t]) and np.array_equal(end, dones[t])
    assert dones.any() and rewards.any()


def test_a_recording_cannot_begin_in_the_middle(tmp_path):
    one = ("--xpid", "x", "--total-timesteps", "64")
    assert train(tmp_path, *one).returncode == 0
    process = train(tmp_path, *one, "--resume", "--total-timesteps", "128", "--save-dataset")
    assert process.returncode == 2
    assert_one_line(process.stderr, "rollouts lacks steps before iteration 2", "--no-save-dataset")
    assert not (run_dir(tmp_path, "x") / "rollouts").exists()


# BAD INPUT


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--env-id pong", "--env-id is 'pong'; it must be one of bigfish, bossfight, caveflyer"),
        (
            "--distribution-mode memory",
            "--distribution-mode is 'memory'; it must be one of easy, hard for bossfight",
        ),
        ("--distribution-mode medium", "--distribution-mode is 'medium'"),
        ("--num-minibatches 3", "--num-minibatches is 3; it must be a divisor of num_envs * num_steps = 64"),
        ("--num-minibatches 64", "--num-minibatches is 64; it must be at most 32"),
        (
            "--total-timesteps 63",
            "--total-timesteps is 63; it must be at least one iteration",
        ),
        ("--num-envs 0", "--num-envs is 0"),
        ("--num-envs 1000000000000 --total-timesteps 1000000000000000", "--num-envs is 1000000000000"),
        ("--num-eval-episodes 1000000000000", "--num-eval-episodes is 1000000000000"),
        ("--num-steps -1", "--num-steps is -1"),
        ("--update-epochs 0", "--update-epochs is 0"),
        ("--hidden-size 0", "--hidden-size is 0"),
        ("--log-interval 0", "--log-interval is 0"),
        ("--archive-interval -5", "--archive-interval is -5"),
        ("--num-eval-episodes 0", "--num-eval-episodes is 0"),
        ("--learning-rate nan", "--learning-rate is nan"),
        ("--learning-rate inf", "--learning-rate is inf"),
        ("--gamma 1.5", "--gamma is 1.5"),
        ("--target-kl 0", "--target-kl is 0.0"),
        ("--seed -1", "--seed is -1"),
        ("--num-levels -1", "--num-levels is -1"),
        ("--start-level 2147483000 --num-levels 1000", "--num-levels is 1000; it must be at most 646"),
        ("--xpid a/b", "--xpid is 'a/b'"),
        ("--xpid=", "--xpid is ''"),
        ("--xpid ..", "--xpid is '..'"),
        (f"--xpid {'x' * 300}", "at most 200 bytes"),
        ("--xpid \udcff", "--xpid is '\\udcff'"),
        ("--checkpoint=", "--checkpoint is ''"),
    ],
)
def test_a_bad_argument_is_one_line_before_anything_is_written(arguments, message, tmp_path):
    process = train(tmp_path, *arguments.split())
    assert process.returncode == 2
    assert_one_line(process.stderr, message)
    assert not list(tmp_path.iterdir())


def test_an_unknown_flag_exits_2(tmp_path):
    process = train(tmp_path, "--learning-rat", "0.1")
    assert process.returncode == 2 and "learning-rat" in process.stderr + process.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
def test_tracking_without_wandb(tmp_path):
    process = train(tmp_path, "--track")
    assert process.returncode == 2
    assert_one_line(process.stderr, "--track", "pip install wandb")
    assert not list(tmp_path.iterdir())


class Intruder:
    """Leaves a file named `intruded` behind when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("intruded",))


def write_checkpoint(path, kind, good):
    """Write a damaged, foreign or hostile file in place of a good checkpoint."""
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:100_000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "foreign":
        torch.save({"state_dict": {}}, path)
    elif kind == "another format":
        torch.save({**load(good), "format": 99}, path)
    elif kind == "another network":
        torch.save({**load(good), "model_state_dict": Agent(Args(hidden_size=64)).state_dict()}, path)
    elif kind == "archived":  # lacks the states of the games
        shutil.copy(next(good.parent.parent.glob("checkpoint/*.pt")), path)
    elif kind == "with code":
        torch.save({**load(good), "extra": Intruder()}, path)


KINDS = ("missing", "truncated", "empty", "text", "foreign", "another format", "another network", "with code")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_checkpoint_is_refused(kind, uninterrupted, tmp_path):
    path = tmp_path / "bad.pt"
    write_checkpoint(path, kind, next(run_dir(uninterrupted).glob("final/*.pt")))
    process = train(tmp_path, "--checkpoint", str(path))
    assert process.returncode == 1
    assert_one_line(process.stderr, str(path))
    assert {entry.name for entry in tmp_path.iterdir()} <= {"bad.pt"}


@pytest.mark.parametrize("kind", ["truncated", "with code", "archived"])
def test_a_bad_rolling_checkpoint_is_refused(kind, uninterrupted, tmp_path):
    rolling = run_dir(tmp_path) / "rolling" / "model.pt"
    rolling.parent.mkdir(parents=True)
    write_checkpoint(rolling, kind, run_dir(uninterrupted) / "rolling" / "model.pt")
    before = rolling.read_bytes()
    process = train(tmp_path, "--resume")
    assert process.returncode == 1
    assert_one_line(process.stderr, "rolling/model.pt")
    assert rolling.read_bytes() == before and not list(tmp_path.rglob("*tfevents*")) + list(tmp_path.glob("intruded"))


@pytest.mark.parametrize("name", ["a table that is a folder", "another number of games"])
def test_a_run_folder_that_does_not_fit_is_one_line(name, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    run = run_dir(tmp_path / "run")
    if name == "another number of games":
        state = load(run / "rolling" / "model.pt")
        state["envs"]["env"]["env"]["env"] = state["envs"]["env"]["env"]["env"][:2]
        torch.save(state, run / "rolling" / "model.pt")
        expected = ("does not fit this script", "put back one that does")
    else:
        (run / "progress.csv").unlink()
        (run / "progress.csv").mkdir()
        expected = ("progress.csv could not be used: Is a directory",)
    process = train(tmp_path / "run", "--resume", "--total-timesteps", "448")
    assert process.returncode == 1
    assert_one_line(process.stderr, *expected)


def test_a_missing_library_of_the_system_is_named(tmp_path, monkeypatch):
    def without_libgl(*args, **kwargs):
        raise OSError("cannot load library libenv.so: libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(ppo_procgen, "ProcgenGym3Env", without_libgl)
    process = train(tmp_path)
    assert process.returncode == 1
    assert_one_line(process.stderr, "libGL.so.1", "libgl1", "libglib2.0-0")
    assert not list(tmp_path.iterdir())


def test_sizes_that_memory_does_not_hold_are_one_line(tmp_path):
    sizes = "--num-steps 65536 --num-envs 64000 --num-minibatches 64 --total-timesteps 1000000000000".split()
    process = train(tmp_path, *sizes)
    assert process.returncode == 1
    assert_one_line(process.stderr, "not enough memory", "--num-steps")
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "models").write_text("a file where a folder should be")
    process = train(tmp_path)
    assert process.returncode == 1
    assert_one_line(process.stderr, "models", "could not be used: Not a directory")
    assert [path.name for path in tmp_path.rglob("*")] == ["models"]


def test_a_full_disk_is_one_line_and_no_partial_file(tmp_path):
    """A file may have a megabyte here: as on a full disk, the system call fails in the middle of a write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        process = train(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert process.returncode == 1
    assert_one_line(process.stderr, "rolling/model.pt could not be used: File too large")
    assert not list(run_dir(tmp_path).rglob("*.pt*"))


def test_a_disk_that_is_full_when_tensorboard_opens_its_file_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalFileSystem, "write", full)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # Python's own, instead of pytest's
    process = train(tmp_path)
    assert process.returncode == 1
    assert_one_line(process.stderr, "models could not be used: No space left on device")


def test_a_gpu_gets_chunks_that_its_free_memory_holds(monkeypatch):
    for free, frames in ((83e9, 32768), (82e9, 32768), (7e9, 2048), (1e9, 256)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (int(free), 10**11))
        assert ppo_procgen.frames_per_backward(torch.device("cuda")) == frames
        assert frames * 1.2e6 < free  # measured: 8,192 frames take some 10 GB
