"""What ppo_procgen.py promises, on the real Procgen. Runs are real processes, compared bit for bit."""

import copy
import csv
import errno
import fcntl
import hashlib
import importlib.util
import inspect
import json
import os
import pty
import re
import resource
import shutil
import struct
import subprocess
import sys
import termios
import threading
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from conftest import assert_one_line
from procgen import ProcgenGym3Env
from runs import ROOT, run_main
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

import collect_procgen
import ppo_procgen
from ppo_procgen import Agent, Args, ProcgenVectorEnv

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
    loss, terms_of_loss = ppo_procgen.ppo_loss(agent, *sample, args)
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
    found = {name: term.item() for name, term in terms_of_loss.items()}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 0 < expected["clipfrac"] < 1  # both kinds were there
    assert 0 < values_clipped < len(terms) or not clip_vloss


def test_rewards_are_divided_by_the_standard_deviation_of_the_discounted_return():
    """Which has a discount of its own, that of the published runs by default, whatever PPO's gamma is."""
    assert Args().norm_reward_gamma == 0.99
    args = Args(env_id="bigfish", num_envs=8, gamma=0.5, norm_reward_gamma=0.9)
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


def test_convolutions_start_glorot_uniform_and_the_hidden_layer_orthogonal_all_without_biases():
    torch.manual_seed(0)
    agent = Agent(Args())
    convolutions = [layer for layer in agent.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert len(convolutions) == 15
    for layer in convolutions:
        bound = (6 / (9 * (layer.in_channels + layer.out_channels))) ** 0.5
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        deviation = bound / 3**0.5  # of a uniform distribution
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.1)
    hidden = agent.network[5].weight / 2**0.5
    torch.testing.assert_close(hidden @ hidden.T, torch.eye(256), rtol=0, atol=1e-5)
    layers = [*convolutions, agent.network[5], agent.actor, agent.critic]
    assert not any(layer.bias.any() for layer in layers)


def test_a_copy_of_an_agent_in_bfloat16_computes_with_its_own_weights():
    agent, frames = Agent(Args(bfloat16=True)), torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
    clone = copy.deepcopy(agent)
    before = clone.get_value(frames)
    torch.nn.init.zeros_(agent.network[5].weight)
    assert torch.equal(clone.get_value(frames), before) and not torch.equal(agent.get_value(frames), before)


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


def test_bfloat16_computes_all_layers_but_the_heads_in_it_and_keeps_the_weights_in_float32():
    agent, frames = Agent(Args()), torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
    logits, _ = agent(frames)
    dtypes = {}
    for name, layer in agent.named_modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.register_forward_hook(lambda _, __, out, name=name: dtypes.update({name: out.dtype}))
    agent.bfloat16 = True
    rounded, value = agent(frames)
    heads = {name: dtypes.pop(name) for name in ("actor", "critic")}
    assert set(heads.values()) == {torch.float32} and set(dtypes.values()) == {torch.bfloat16} and len(dtypes) == 16
    assert not torch.equal(rounded, logits)
    torch.testing.assert_close(rounded, logits, rtol=0.03, atol=0.001)
    (rounded.logsumexp(1) + value).sum().backward()
    assert all(weight.dtype == weight.grad.dtype == torch.float32 for weight in agent.parameters())


def test_a_run_in_bfloat16(uninterrupted, tmp_path, monkeypatch):
    """It has a name of its own, learns something else than one in float32, and is refused where it would be slow."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False})
    process = runs.train(tmp_path, "--bfloat16")
    assert process.returncode == 2
    assert_one_line(process.stderr, "--bfloat16 needs a GPU, or a CPU with avx512_bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": True})
    assert runs.train(tmp_path, "--bfloat16", "--total-timesteps", "64").returncode == 0
    xpid = runs.XPID.replace("_0", "-bfloat16True_0")
    (path,) = runs.run_dir(uninterrupted).glob("checkpoint/model_1_*.pt")
    weights, first = (state["model_state_dict"] for state in (runs.final(tmp_path, xpid), runs.load(path)))
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    distance = sum((weights[name] - first[name]).norm() for name in first)
    assert 0 < distance < 1
    process = runs.train(tmp_path, "--total-timesteps", "128", "--resume", "--xpid", xpid)
    assert process.returncode == 2
    assert_one_line(process.stderr, "--bfloat16 was True, is False")


def test_the_gradient_accumulated_over_microbatches_is_that_of_the_minibatch(tmp_path, monkeypatch):
    one = ("--total-timesteps", "64", "--max-grad-norm", "1e9")
    assert runs.train(tmp_path, *one, "--xpid", "whole").returncode == 0
    # Of minibatches of 32: three of 10 and one of 2.
    monkeypatch.setattr(ppo_procgen, "choose_microbatch_size", lambda device: 10)
    assert runs.train(tmp_path, *one, "--xpid", "microbatches").returncode == 0
    (whole,), (accumulated,) = runs.progress(tmp_path, "whole"), runs.progress(tmp_path, "microbatches")
    for tag in whole:
        if tag.startswith("losses/"):
            assert float(accumulated[tag]) == pytest.approx(float(whole[tag]), rel=1e-3, abs=1e-6), tag


def plain_ppo(num_iterations, lr=0.001, norm_adv=True, clip_vloss=True):
    """PPO as in the paper: whole minibatches, loops, float64 returns. Yields weights, ends and progress.csv's row."""
    num_envs, num_steps, gamma, gae_lambda = 8, 20, 0.9, 0.8
    torch.manual_seed(8)
    agent = Agent(Args(hidden_size=64))
    optimizer = torch.optim.Adam(agent.parameters(), lr, eps=0.001)
    games = ProcgenGym3Env(num_envs, "dodgeball", distribution_mode="hard", start_level=10, num_levels=40, rand_seed=8)
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
            discounted = 0.7 * discounted + reward
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
                gain = torch.min(ratio * advantage, ratio.clamp(0.99, 1.01) * advantage).mean()
                error = (value - returns[picked]) ** 2
                if clip_vloss:
                    moved = values[picked] + (value - values[picked]).clamp(-0.01, 0.01)
                    error = torch.max(error, (moved - returns[picked]) ** 2)
                error, entropy = error.mean() / 2, policy.entropy().mean()
                optimizer.zero_grad()
                (-gain + 0.7 * error - 0.05 * entropy).backward()
                norm = torch.sqrt(sum((p.grad**2).sum() for p in agent.parameters()))
                for p in agent.parameters():
                    p.grad *= min(1.0, 0.05 / norm)
                optimizer.step()
                clipped = (ratio < 0.99) | (ratio > 1.01)
                kls = -log_ratio.mean(), (ratio - 1 - log_ratio).mean()
                losses.append([x.item() for x in (-gain, error, entropy, *kls, clipped.double().mean(), norm)])
        names = "policy_loss value_loss entropy old_approx_kl approx_kl clipfrac grad_norm".split()
        row = {f"losses/{name}": x for name, x in zip(names, np.mean(losses, axis=0))}
        row["losses/explained_variance"] = float(1 - (returns - values).var() / returns.var())
        names = ("charts/episodic_return", "charts/episodic_length", "charts/level_complete")
        yield agent.state_dict(), ends, row | dict(zip(names, np.mean(episodes, axis=0)))


def assert_is_plain_ppo(run, results):
    """The weights of a run's last iteration, and the rows of its progress.csv, are those of plain_ppo()."""
    trained = runs.load(run / "rolling" / "model.pt")["model_state_dict"]
    for name, expected in results[-1][0].items():
        torch.testing.assert_close(trained[name], expected, rtol=0, atol=8e-5)  # float32 against float64
    with open(run / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results)
    for row, (_, _, expected) in zip(rows, results):
        # A rounding error may move a sample across the edge of the clipping range.
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=2e-2, abs=2e-6)


def test_iterations_of_main_are_those_of_a_plain_ppo_loop(dodgeball, tmp_path):
    shutil.copytree(dodgeball, tmp_path / "run")
    process = run_main(ppo_procgen, [*runs.DODGEBALL, "--resume", "--total-timesteps", "480"], tmp_path / "run")
    assert process.returncode == 0, process.stderr
    (run,) = (tmp_path / "run").glob("models/dodgeball/*")
    results = list(plain_ppo(3))
    assert_is_plain_ppo(run, results)
    first, (second, row) = results[0][1], results[1][1:]
    assert any(end.any() for end in first[:-1]) and second[-1].any()  # episodes ended within a rollout and on its edge
    assert 0 < row["losses/clipfrac"] < 1
    recorded = [np.load(path)["dones"] for path in sorted(run.glob("rollouts/*.npz"))]
    np.testing.assert_array_equal(np.concatenate(recorded)[20:40], torch.stack(second))


def test_an_iteration_without_normalised_advantages_and_clipped_values_is_a_plain_one(tmp_path):
    """With a learning rate at which the unclipped value loss does not blow up what the last bits differ by."""
    one = "--learning-rate 0.0001 --no-norm-adv --no-clip-vloss --total-timesteps 160 --xpid x".split()
    assert run_main(ppo_procgen, [*runs.DODGEBALL, *one], tmp_path).returncode == 0
    (run,) = tmp_path.glob("models/dodgeball/*")
    assert_is_plain_ppo(run, list(plain_ppo(1, 0.0001, norm_adv=False, clip_vloss=False)))


def test_target_kl_ends_the_epochs_early(tmp_path):
    three_epochs = ("--update-epochs", "3", "--total-timesteps", "64", "--xpid", "x")
    assert runs.train(tmp_path, *three_epochs, "--target-kl", "1e-9").returncode == 0
    steps = {int(moments["step"]) for moments in runs.final(tmp_path, "x")["optimizer_state_dict"]["state"].values()}
    assert steps == {2}  # one epoch of two minibatches instead of three


def test_weights_that_the_last_step_ruined_are_noticed(tmp_path):
    one = "--learning-rate 1e30 --num-minibatches 1 --update-epochs 1 --total-timesteps 64 --xpid x".split()
    process = runs.train(tmp_path, *one)
    assert process.returncode == 1
    assert_one_line(process.stderr, "training diverged in iteration 1")
    assert runs.load(runs.run_dir(tmp_path, "x") / "rolling" / "model.pt")["iteration"] == 0


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


def test_a_seed_for_reset_is_refused():
    """Procgen takes it when the environments are made."""
    with pytest.raises(ValueError, match="pass the seed to ProcgenVectorEnv"):
        ProcgenVectorEnv(2, "bossfight", "easy", 0, 0, seed=0).reset(seed=1)


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
    found = ppo_procgen.evaluate(agent, envs, start, 5, device)

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
    assert list(zip(found["returns"], found["lengths"], found["level_complete"])) == expected
    assert len(set(found["lengths"])) > 1


def test_evaluation_is_repeatable_and_leaves_the_random_generator_alone():
    envs, device = ppo_procgen.make_test_envs(Args(env_id="bossfight", num_eval_episodes=3)), torch.device("cpu")
    start, agent, before, modes = envs.get_state(), Agent(Args(hidden_size=32)), torch.get_rng_state(), set()
    agent.network.register_forward_pre_hook(lambda network, _: modes.add(network.training))
    first = ppo_procgen.evaluate(agent, envs, start, 0, device)
    assert torch.equal(torch.get_rng_state(), before)
    assert modes == {False} and agent.training  # as a fork's dropout wants it
    torch.rand(1)  # the training goes on
    second = ppo_procgen.evaluate(agent, envs, start, 0, device)
    assert all(np.array_equal(first[name], second[name]) for name in ("returns", "lengths", "level_complete"))


# A RUN ON DISK


def test_files_and_names(uninterrupted):
    files = [
        path.relative_to(runs.run_dir(uninterrupted))
        for path in runs.run_dir(uninterrupted).rglob("*")
        if path.is_file()
    ]
    names = {str(path) for path in files if "tfevents" not in path.name}
    archived = {path.name for path in runs.run_dir(uninterrupted).glob("checkpoint/*")}
    assert {name.rsplit("_", 1)[0] for name in archived} == {f"model_{i}" for i in (1, 2, 3, 4, 6)}
    (last,) = (path.name for path in runs.run_dir(uninterrupted).glob("final/*"))
    checkpoints = {f"checkpoint/{name}" for name in archived} | {f"final/{last}", "rolling/model.pt"}
    assert names == checkpoints | {"progress.csv", ".lock", "ppo_procgen.py"} and len(files) == len(names) + 1
    for name in checkpoints - {"rolling/model.pt"}:
        state = runs.load(runs.run_dir(uninterrupted) / name)
        iteration = int(re.search(r"model_(\d+)_", name)[1]) if "checkpoint" in name else 6
        assert float(re.search(r"_(-?\d+\.\d\d)\.pt$", name)[1]) == pytest.approx(state["test_return"], abs=0.005)
        assert (state["format"], state["iteration"], state["global_step"]) == (1, iteration, 64 * iteration)
        assert state["xpid"] == runs.XPID and state["args"]["env_id"] == "bossfight"
        assert set(state["args"]) == set(vars(Args()))
        assert set(state["versions"]) == {"python", "torch", "numpy", "procgen"}
        Agent(Args()).load_state_dict(state["model_state_dict"])


def test_early_iterations_are_archived_too():
    run = SimpleNamespace(args=Args(archive_interval=50))
    archived = [i for i in range(1, 151) if ppo_procgen.Run.archives(run, i)]
    assert archived == [1, 2, 4, 8, 16, 32, 50, 100, 150]


@pytest.mark.parametrize("module", [ppo_procgen, collect_procgen])
def test_a_file_is_whole_and_on_the_disk_before_it_gets_its_name(module, tmp_path, monkeypatch):
    path, flushed = tmp_path / "file", []
    path.write_bytes(b"old")
    fsync, replace = os.fsync, os.replace

    def check_and_replace(source, target):
        assert flushed == [str(source)] and target == path
        assert path.read_bytes() == b"old" and source.read_bytes() == b"new"
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", check_and_replace)
    module.write_file(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_run_keeps_the_source_that_made_it(uninterrupted):
    source = (ROOT / "ppo_procgen.py").read_bytes()
    assert (runs.run_dir(uninterrupted) / "ppo_procgen.py").read_bytes() == source
    state = runs.final(uninterrupted)
    assert (state["script"], state["script_sha256"]) == ("ppo_procgen.py", hashlib.sha256(source).hexdigest())
    assert state["agent_sha256"] == ppo_procgen.agent_sha256(source)


def test_both_scripts_do_the_same_in_the_same_words():
    """With another agent_sha256, a checkpoint that one of them writes would be refused by the other."""
    for name in ("agent_sha256", "spell_out"):
        assert inspect.getsource(getattr(ppo_procgen, name)) == inspect.getsource(getattr(collect_procgen, name))


def test_the_hash_of_the_network_covers_all_that_agent_refers_to_and_nothing_else():
    source = (ROOT / "ppo_procgen.py").read_bytes()
    before = ppo_procgen.agent_sha256(source)
    assert collect_procgen.agent_sha256((ROOT / "collect_procgen.py").read_bytes()) == before
    # A method, a class beside Agent, a function that such a class calls, and a constant that a fork names in Agent.
    fork = source.replace(b"x.permute(0, 3, 1, 2) / 255.0", b"x.permute(0, 3, 1, 2) / SCALE")
    fork = fork.replace(b"def layer_init", b"SCALE = 255.0\n\n\ndef layer_init")
    of_fork = ppo_procgen.agent_sha256(fork)
    for old, new, whole, wanted in (
        (b"return self(x)[1]", b"return -self(x)[1]", source, before),
        (b"F.relu(x)", b"F.elu(x)", source, before),
        (b"xavier_uniform_", b"xavier_normal_", source, before),
        (b"SCALE = 255.0", b"SCALE = 128.0", fork, of_fork),
    ):
        assert old in whole and ppo_procgen.agent_sha256(whole.replace(old, new)) != wanted, new
    for old, new in ((b"ent_coef: float = 0.01", b"ent_coef: float = 0.02"), (b"1.0 - next_done", b"2.0 - next_done")):
        assert old in source and ppo_procgen.agent_sha256(source.replace(old, new)) == before, new


def test_progress_and_tensorboard_hold_the_same_numbers(uninterrupted):
    rows, tags = runs.progress(uninterrupted), runs.scalars(uninterrupted)
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [int(row["global_step"]) for row in rows] == [64, 128, 192, 256, 320, 384]
    for tag in rows[0].keys() - {"iteration", "global_step"}:
        expected = [(int(row["global_step"]), float(row[tag])) for row in rows if row[tag] != "nan"]
        assert tags[tag] == [(step, pytest.approx(value)) for step, value in expected], tag
    assert [step for step, _ in tags["charts/test_return"]] == [64, 128, 192, 256, 384]
    text = EventAccumulator(str(runs.run_dir(uninterrupted))).Reload()
    (panel,) = text.Tensors("hyperparameters/text_summary")
    assert b"|learning_rate|0.0005|" in panel.tensor_proto.string_val[0]


def test_the_curves_count_every_finished_episode(tmp_path):
    """With 64 steps of 8 games in one iteration, the statistics are those of a plain count over the same games."""
    sizes = "--num-envs 8 --num-steps 64 --total-timesteps 512 --num-minibatches 4".split()
    assert runs.train(tmp_path, "--env-id", "leaper", *sizes, "--xpid", "x").returncode == 0
    envs = ProcgenVectorEnv(8, "leaper", "easy", 0, 200, seed=0)
    torch.manual_seed(0)
    agent, obs = Agent(Args()), envs.reset()[0]
    running, steps, episodes = np.zeros(8), np.zeros(8), []
    for _ in range(64):
        with torch.inference_mode():
            action = agent.get_action_and_value(torch.from_numpy(obs))[0].numpy()
        obs, reward, done, _, infos = envs.step(action)
        running, steps = running + reward, steps + 1
        episodes += [(running[i], steps[i], infos["prev_level_complete"][i]) for i in np.flatnonzero(done)]
        running[done] = steps[done] = 0
    (run,) = tmp_path.glob("models/leaper/x")
    with open(run / "progress.csv") as file:
        (row,) = csv.DictReader(file)
    returns, lengths, complete = np.mean(episodes, axis=0)
    assert len(episodes) == 5 and 0 < complete < 1
    assert float(row["charts/episodic_return"]) == pytest.approx(returns)
    assert float(row["charts/episodic_length"]) == pytest.approx(lengths)
    assert float(row["charts/level_complete"]) == pytest.approx(complete)

    (path,) = run.glob("final/*.pt")
    agent.load_state_dict(runs.load(path)["model_state_dict"])
    envs = ppo_procgen.make_test_envs(Args(env_id="leaper", num_eval_episodes=2))
    tested = ppo_procgen.evaluate(agent, envs, envs.get_state(), 0, torch.device("cpu"))
    names = {"returns": "charts/test_return", "lengths": "charts/test_length"}
    names["level_complete"] = "charts/test_level_complete"
    for key, name in names.items():
        assert float(row[name]) == pytest.approx(tested[key].mean())


def test_the_curves_are_means_over_the_last_100_episodes(tmp_path, monkeypatch):
    seen, enter = [], ppo_procgen.Run.__enter__
    monkeypatch.setattr(ppo_procgen.Run, "__enter__", lambda run: seen.append(run.state) or enter(run))
    monkeypatch.setattr(ppo_procgen, "stop_if_asked", lambda: (_ for _ in ()).throw(ppo_procgen.Stopped("a test")))
    assert runs.train(tmp_path).returncode == 75
    envs = seen[0].envs
    assert [x.maxlen for x in (envs.return_queue, envs.length_queue, seen[0].level_complete)] == [100] * 3


def test_the_seed_decides_the_weights(uninterrupted, tmp_path):
    """The run in this process equals that of another process."""
    assert runs.train(tmp_path).returncode == 0
    runs.assert_same_run(tmp_path, uninterrupted)
    assert runs.train(tmp_path, "--seed", "1").returncode == 0
    other = runs.final(tmp_path, runs.XPID[:-1] + "1")
    assert not runs.same(other["model_state_dict"], runs.final(uninterrupted)["model_state_dict"])


def test_log_archive_and_evaluation_settings_do_not_change_the_weights(uninterrupted, tmp_path):
    assert runs.train(tmp_path, *"--log-interval 1 --archive-interval 1 --num-eval-episodes 5".split()).returncode == 0
    for key in ("model_state_dict", "optimizer_state_dict"):
        assert runs.same(runs.final(tmp_path)[key], runs.final(uninterrupted)[key])
    assert len(list(runs.run_dir(tmp_path).glob("checkpoint/*.pt"))) == 6


def test_a_log_file_gets_plain_lines(uninterrupted):
    lines = (uninterrupted / "printed").read_text().splitlines()
    assert any(f"models/bossfight/{runs.XPID}" in line for line in lines)
    assert any("384 (6 iterations of 64)" in line for line in lines)
    assert any("626,256" in line for line in lines)
    saved = [line.split(",")[0] for line in lines if line.startswith("iteration")]
    assert saved == ["iteration 2/6", "iteration 4/6", "iteration 6/6"]


def test_a_terminal_gets_a_bar(tmp_path):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 140, 0, 0))
    short = ("--total-timesteps", "128", "--archive-interval", "100")
    process = subprocess.Popen([*runs.SCRIPT, *runs.SMALL, *short], cwd=tmp_path, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 4096):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    assert re.search(rb"128/128 .*steps/s.*train return .*test return", shown)


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


def test_a_fork_may_do_without_an_argument():
    fields = {**vars(ppo_procgen.Args(xpid="x")), "my_width": 3}
    for name in ("hidden_size", "target_kl", "num_minibatches", "norm_adv", "anneal_lr", "learning_rate"):
        del fields[name]
    ppo_procgen.check_args(SimpleNamespace(**fields))


def test_the_algorithm_stands_in_the_name_without_a_learning_rate(tmp_path):
    copy = fork(tmp_path, ("    learning_rate: float = 5e-4", "    step_size: float = 5e-4"))
    assert copy.default_xpid(copy.Args()) == "coinrun-easy-200-ppo_drac-epoch3-mb8-v0.5-ha0.01_0"


def test_a_copy_does_not_go_on_with_its_parents_run_nor_the_other_way_round(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    copy = fork(tmp_path, NEW_ARGUMENT)
    process = run_main(copy, [*runs.SMALL, "--xpid", runs.XPID, "--resume"], tmp_path / "run")
    assert process.returncode == 2
    assert_one_line(process.stderr, "is a run of ppo_procgen.py, not of ppo_drac_procgen.py")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before

    copied = [*runs.SMALL, "--xpid", "x", "--total-timesteps", "64"]
    assert run_main(copy, copied, tmp_path).returncode == 0
    process = run_main(ppo_procgen, [*copied, "--resume"], tmp_path)
    assert process.returncode == 2
    assert_one_line(process.stderr, "is a run of ppo_drac_procgen.py, not of ppo_procgen.py")


def test_an_argument_that_the_run_lacks_or_has_besides_is_refused(tmp_path):
    one = [*runs.SMALL, "--xpid", "x", "--total-timesteps", "64", "--resume"]
    assert runs.train(tmp_path, *one).returncode == 0
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
    one = [*runs.SMALL, "--xpid", "x", "--total-timesteps", "64", "--archive-interval", "9"]
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
    run = runs.run_dir(tmp_path, "x")
    assert (run / "ppo_procgen.py").read_bytes() == (ROOT / "ppo_procgen.py").read_bytes()
    assert (run / "ppo_procgen_after_1.py").read_bytes() == (tmp_path / "changed" / "ppo_procgen.py").read_bytes()
    rows = runs.progress(tmp_path, "x")
    assert [row["charts/mine"] for row in rows] == ["nan", "1.0", "1.0"]  # one header for all rows
    assert [row["iteration"] for row in rows] == ["1", "2", "3"]


def test_state_that_a_run_lacks_is_one_line(tmp_path):
    one = [*runs.SMALL, "--xpid", "x", "--total-timesteps", "64"]
    assert runs.train(tmp_path, *one).returncode == 0
    (tmp_path / "changed").mkdir()
    memory = (
        '        self.test_return = saved["last_test_return"]\n',
        '        self.test_return = saved["last_test_return"]\n        self.memory = saved["memory"]\n',
    )
    changed = fork(tmp_path / "changed", memory, name="ppo_procgen.py")
    more = [*one, "--resume", "--total-timesteps", "128"]
    process = run_main(changed, more, tmp_path)
    assert process.returncode == 1
    assert_one_line(process.stderr, "rolling/model.pt does not fit this script", "KeyError: 'memory'")


def test_a_run_of_a_gpu_does_not_go_on_without_one_by_accident(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    rolling = runs.run_dir(tmp_path / "run") / "rolling" / "model.pt"
    state = runs.load(rolling)
    torch.save({**state, "machine": {"device": "cuda", "model": "NVIDIA H100"}}, rolling)
    on_gpu = [argument for argument in runs.SMALL if argument != "--no-cuda"] + ["--resume", "--total-timesteps", "448"]
    if not torch.cuda.is_available():
        process = run_main(ppo_procgen, on_gpu, tmp_path / "run")
        assert process.returncode == 2
        assert_one_line(process.stderr, "was on a GPU (NVIDIA H100)", "--no-cuda continues without one")
    process = run_main(ppo_procgen, [*on_gpu, "--no-cuda"], tmp_path / "run")
    assert process.returncode == 0 and "device was cuda, is cpu" in process.stdout


def test_every_argument_with_a_part_in_the_result_stands_in_the_name():
    assert ppo_procgen.default_xpid(Args()) == "coinrun-easy-200-ppo-lr0.0005-epoch3-mb8-v0.5-ha0.01_0"
    changed = Args(gamma=0.9, anneal_lr=True, total_timesteps=99, log_interval=3, model_saving_dir="x", seed=7)
    name = "coinrun-easy-200-ppo-lr0.0005-epoch3-mb8-v0.5-ha0.01-anneal_lrTrue-gamma0.9_7"
    assert ppo_procgen.default_xpid(changed) == name


def test_a_checkpoint_stands_in_the_name_by_its_file_name_and_its_content(tmp_path):
    path = tmp_path / ("a b" * 60) / "c d.pt"
    path.parent.mkdir()
    path.write_bytes(b"content")
    content_hash = hashlib.sha256(b"content").hexdigest()[:8]
    expected = f"coinrun-easy-200-ppo-lr0.0005-epoch3-mb8-v0.5-ha0.01-checkpointc%20d-{content_hash}_0"
    assert ppo_procgen.default_xpid(Args(checkpoint=str(path))) == expected
    long_name = tmp_path / ("x" * 200 + ".pt")
    long_name.write_bytes(b"content")
    assert f"-checkpoint{'x' * 40}-{content_hash}_0" in ppo_procgen.default_xpid(Args(checkpoint=str(long_name)))


def test_a_default_of_zero_in_a_fork_names_the_run_like_its_flag(tmp_path, monkeypatch):
    copy = fork(tmp_path, ("    ent_coef: float = 0.01", "    ent_coef: float = 0"))
    names = set()
    for words in ([], ["--ent-coef", "0"], ["--ent-coef", "0.0"]):
        monkeypatch.setattr(sys, "argv", ["ppo_drac_procgen.py", *words])
        names.add(copy.parse_args().xpid)
    assert names == {"coinrun-easy-200-ppo_drac-lr0.0005-epoch3-mb8-v0.5-ha0.0_0"}


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
        assert runs.train(tmp_path, *arguments).returncode == 0
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
    assert (metadata["format"], metadata["env_id"], metadata["num_levels"]) == (2, "dodgeball", 40)
    assert metadata["segments"] == [{"seed": 8, "num_envs": 8, "rows": 40}]
    paths = sorted(folder.glob("*.npz"))
    assert paths[0].name == "0_00000000.npz"
    chunks = [np.load(path) for path in paths]
    actions, rewards, dones, checksums, log_probs = (
        np.concatenate([chunk[key] for chunk in chunks])
        for key in ("actions", "rewards", "dones", "checksums", "log_probs")
    )
    assert (actions.dtype, actions.shape, checksums.shape, log_probs.dtype) == (np.uint8, (40, 8), (40,), np.float32)
    games = ProcgenGym3Env(8, "dodgeball", distribution_mode="hard", start_level=10, num_levels=40, rand_seed=8)
    torch.manual_seed(8)
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
    assert metadata["log_probs_sha256"] == hashlib.sha256(log_probs.tobytes()).hexdigest()


def test_a_recording_cannot_begin_in_the_middle(tmp_path):
    one = ("--xpid", "x", "--total-timesteps", "64")
    assert runs.train(tmp_path, *one).returncode == 0
    process = runs.train(tmp_path, *one, "--resume", "--total-timesteps", "128", "--save-dataset")
    assert process.returncode == 2
    assert_one_line(process.stderr, "rollouts lacks steps from 0 on, before iteration 2", "--no-save-dataset")
    assert not (runs.run_dir(tmp_path, "x") / "rollouts").exists()


# BAD INPUT


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--env-id pong", "--env-id is 'pong'; it must be one of bigfish, bossfight, caveflyer"),
        ("--lr 0.1", "--lr is gen_dgrl's name of an argument; here it is --learning-rate"),
        ("--num_processes=4", "--num-processes is gen_dgrl's name of an argument; here it is --num-envs"),
        ("--checkpoint a.pt b.pt c.pt --seed 1", "--checkpoint takes one file; yours matched 3: a.pt b.pt c.pt"),
        (
            "--num-envs 1 --num-steps 1 --num-minibatches 1 --total-timesteps 5",
            "--num-steps is 1; it must be more than 1 with one environment",
        ),
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
    ],
)
def test_a_bad_argument_is_one_line_before_anything_is_written(arguments, message, tmp_path):
    process = runs.train(tmp_path, *arguments.split())
    assert process.returncode == 2
    assert_one_line(process.stderr, message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--total-timesteps", "2.5e6"], ["--total_timesteps=25e5"]])
def test_the_total_may_be_written_with_an_exponent(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppo_procgen.py", *words, "--xpid", "1e6"])
    args = ppo_procgen.parse_args()
    assert args.total_timesteps == 2_500_000 and args.xpid == "1e6"


def test_a_folder_is_no_checkpoint(tmp_path):
    process = runs.train(tmp_path, "--checkpoint", ".")
    assert process.returncode == 2
    assert_one_line(process.stderr, "--checkpoint . is a folder", "final/model_*.pt")


def test_an_unknown_flag_exits_2(tmp_path):
    process = runs.train(tmp_path, "--learning-rat", "0.1")
    assert process.returncode == 2 and "learning-rat" in process.stderr + process.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
def test_tracking_without_wandb(tmp_path):
    process = runs.train(tmp_path, "--track")
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
        torch.save({**runs.load(good), "format": 99}, path)
    elif kind == "another network":
        torch.save({**runs.load(good), "model_state_dict": Agent(Args(hidden_size=64)).state_dict()}, path)
    elif kind == "archived":  # lacks the states of the games
        shutil.copy(next(good.parent.parent.glob("checkpoint/*.pt")), path)
    elif kind == "with code":
        torch.save({**runs.load(good), "extra": Intruder()}, path)


KINDS = ("missing", "truncated", "empty", "text", "foreign", "another format", "another network", "with code")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_checkpoint_is_refused(kind, uninterrupted, tmp_path):
    path = tmp_path / "bad.pt"
    write_checkpoint(path, kind, next(runs.run_dir(uninterrupted).glob("final/*.pt")))
    process = runs.train(tmp_path, "--checkpoint", str(path))
    assert process.returncode == 1
    assert_one_line(process.stderr, str(path))
    assert {entry.name for entry in tmp_path.iterdir()} <= {"bad.pt"}


@pytest.mark.parametrize("kind", ["truncated", "with code", "archived"])
def test_a_bad_rolling_checkpoint_is_refused(kind, uninterrupted, tmp_path):
    rolling = runs.run_dir(tmp_path) / "rolling" / "model.pt"
    rolling.parent.mkdir(parents=True)
    write_checkpoint(rolling, kind, runs.run_dir(uninterrupted) / "rolling" / "model.pt")
    before = rolling.read_bytes()
    process = runs.train(tmp_path, "--resume")
    assert process.returncode == 1
    assert_one_line(process.stderr, "rolling/model.pt")
    assert rolling.read_bytes() == before and not list(tmp_path.rglob("*tfevents*")) + list(tmp_path.glob("intruded"))


@pytest.mark.parametrize("name", ["a table that is a folder", "another number of games"])
def test_a_run_folder_that_does_not_fit_is_one_line(name, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    run = runs.run_dir(tmp_path / "run")
    if name == "another number of games":
        state = runs.load(run / "rolling" / "model.pt")
        state["environments"] = state["environments"][:2]
        torch.save(state, run / "rolling" / "model.pt")
        expected = ("does not fit this script", "put back one that does")
    else:
        (run / "progress.csv").unlink()
        (run / "progress.csv").mkdir()
        expected = ("progress.csv could not be used: Is a directory",)
    process = runs.train(tmp_path / "run", "--resume", "--total-timesteps", "448")
    assert process.returncode == 1
    assert_one_line(process.stderr, *expected)


def test_a_missing_library_of_the_system_is_named(tmp_path, monkeypatch):
    def without_libgl(*args, **kwargs):
        raise OSError("cannot load library libenv.so: libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(ppo_procgen, "ProcgenGym3Env", without_libgl)
    process = runs.train(tmp_path)
    assert process.returncode == 1
    assert_one_line(process.stderr, "libGL.so.1", "libgl1", "libglib2.0-0")
    assert not list(tmp_path.iterdir())


def test_an_error_about_memory_that_is_not_a_lack_of_it_is_not_called_one(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("more than one element of the written-to tensor refers to a single memory location")

    monkeypatch.setattr(ppo_procgen, "compute_gae", broken)
    with pytest.raises(RuntimeError, match="single memory location"):
        runs.train(tmp_path)


def test_sizes_that_memory_does_not_hold_are_one_line(tmp_path):
    sizes = "--num-steps 65536 --num-envs 64000 --num-minibatches 64 --total-timesteps 1000000000000".split()
    process = runs.train(tmp_path, *sizes)
    assert process.returncode == 1
    assert_one_line(process.stderr, "not enough memory", "--num-steps")
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "models").write_text("a file where a folder should be")
    process = runs.train(tmp_path)
    assert process.returncode == 1
    assert_one_line(process.stderr, "models", "could not be used: Not a directory")
    assert [path.name for path in tmp_path.rglob("*")] == ["models"]


def test_a_full_disk_is_one_line_and_no_partial_file(tmp_path):
    """A file may have a megabyte here: as on a full disk, the system call fails in the middle of a write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        process = runs.train(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert process.returncode == 1
    assert_one_line(process.stderr, "rolling/model.pt could not be used: File too large")
    assert not list(runs.run_dir(tmp_path).rglob("*.pt*"))


def test_a_disk_that_is_full_when_tensorboard_opens_its_file_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalFileSystem, "write", full)
    monkeypatch.setattr(threading, "excepthook", lambda error: None)  # TensorBoard writes in a thread of its own
    process = runs.train(tmp_path)
    assert process.returncode == 1
    assert_one_line(process.stderr, "models could not be used: No space left on device")


def test_a_microbatch_on_a_gpu_follows_its_total_memory_not_what_is_free(monkeypatch):
    for total, frames in ((80e9, 1024), (6e9, 1024), (3e9, 512), (1e9, 128)):
        for free in (0, total / 2):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, memory=(int(free), int(total)): memory)
            assert ppo_procgen.choose_microbatch_size(torch.device("cuda")) == frames
        assert frames * 1.2e6 < total / 2  # measured: 8,192 frames take some 10 GB
