"""What ppo_procgen.py promises, on the real Procgen. Runs are real processes, compared bit for bit."""

import csv
import fcntl
import importlib.util
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
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_one_line, run_main, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_procgen
from ppo_procgen import Agent, Args, ProcgenVectorEnv

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = [sys.executable, str(ROOT / "ppo_procgen.py")]
XPID = "starpilot-easy-200-ppo-lr0.0005-epoch3-mb2-v0.5-ha0.01_0"
# Six iterations of 64 steps. Saved after 2, 4 and 6; archived after 3 and 6.
SMALL = "--env-id starpilot --num-envs 4 --num-steps 16 --num-minibatches 2 --no-cuda".split()
SMALL += "--total-timesteps 384 --log-interval 2 --archive-interval 3 --num-eval-episodes 2".split()


def launch(folder, *more, **options):
    """Run the script in folder, in a process of its own; return the finished process."""
    command = [*SCRIPT, *SMALL, *more]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, **options)


def train(folder, *more):
    """The same in this process, which has PyTorch and Procgen's images loaded already."""
    return run_main(ppo_procgen, [*SMALL, *more], folder)


def run_dir(folder, xpid=XPID):
    return folder / "models" / "starpilot" / xpid


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
    """Whether two trees of dicts, sequences, tensors and plain values are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def assert_same_run(folder, reference, xpid=XPID):
    """The run in folder has left what the reference has: the same names, states and numbers, and nothing else."""

    def names(root):
        return {str(path.relative_to(root)) for path in root.rglob("*")}

    assert names(run_dir(folder, xpid)) == names(run_dir(reference))
    for path in run_dir(reference).rglob("*.pt"):
        ours, theirs = load(run_dir(folder, xpid) / path.relative_to(run_dir(reference))), load(path)
        for state in (ours, theirs):
            state.pop("args"), state.pop("xpid")
        assert same(ours, theirs), path.name
    assert progress(folder, xpid) == progress(reference)
    ours, theirs = scalars(folder, xpid), scalars(reference)
    assert ours.keys() == theirs.keys()
    for tag in ours.keys() - {"charts/SPS"}:
        assert ours[tag] == theirs[tag], tag


def scalars(folder, xpid=XPID):
    """TensorBoard's scalars as it would show them: {tag: [(step, value), ...]}."""
    accumulator = EventAccumulator(str(folder / "runs" / "starpilot" / xpid), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A folder with a run of six iterations that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = launch(folder)
    assert process.returncode == 0, process.stderr
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
    agent = Agent(hidden_size=32)
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
    agent = Agent(hidden_size=256)
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
    monkeypatch.setattr(ppo_procgen, "CPU_CHUNK", 10)  # of minibatches of 32: three of 10 and one of 2
    assert train(tmp_path, *one, "--xpid", "chunks").returncode == 0
    (whole,), (chunks,) = progress(tmp_path, "whole"), progress(tmp_path, "chunks")
    for tag in whole:
        if tag.startswith("losses/"):
            assert float(chunks[tag]) == pytest.approx(float(whole[tag]), rel=1e-3, abs=1e-6), tag


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
    agent = Agent(32)
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
    start, agent, before = envs.get_state(), Agent(32), torch.get_rng_state()
    first = ppo_procgen.evaluate(agent, envs, start, 0, device)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)  # the training goes on
    second = ppo_procgen.evaluate(agent, envs, start, 0, device)
    assert all(map(np.array_equal, first, second))


# A RUN ON DISK


def test_files_and_names(uninterrupted):
    names = {str(path.relative_to(run_dir(uninterrupted))) for path in run_dir(uninterrupted).rglob("*.*")} - {".lock"}
    third = next(run_dir(uninterrupted).glob("checkpoint/model_3_*.pt"))
    sixth = next(run_dir(uninterrupted).glob("checkpoint/model_6_*.pt"))
    last = next(run_dir(uninterrupted).glob("final/model_*.pt"))
    archived = {f"checkpoint/{third.name}", f"checkpoint/{sixth.name}", f"final/{last.name}"}
    assert names == {"rolling/model.pt", "progress.csv"} | archived
    for path, iteration in ((third, 3), (sixth, 6), (last, 6)):
        state = load(path)
        assert float(re.search(r"_(-?\d+\.\d\d)\.pt$", path.name)[1]) == pytest.approx(state["test_return"], abs=0.005)
        assert (state["format"], state["iteration"], state["global_step"]) == (1, iteration, 64 * iteration)
        assert state["xpid"] == XPID and state["args"]["env_id"] == "starpilot"
        assert set(state["args"]) == set(vars(Args()))
        assert set(state["versions"]) == {"python", "torch", "numpy", "procgen"}
        Agent(256).load_state_dict(state["model_state_dict"])
    assert list((uninterrupted / "runs" / "starpilot" / XPID).glob("events.out.tfevents.*"))


def test_progress_and_tensorboard_hold_the_same_numbers(uninterrupted):
    rows, tags = progress(uninterrupted), scalars(uninterrupted)
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [int(row["global_step"]) for row in rows] == [64, 128, 192, 256, 320, 384]
    for tag in rows[0].keys() - {"iteration", "global_step"}:
        expected = [(int(row["global_step"]), float(row[tag])) for row in rows if row[tag] != "nan"]
        assert tags[tag] == [(step, pytest.approx(value)) for step, value in expected], tag
    assert [step for step, _ in tags["charts/test_return"]] == [192, 384]
    text = EventAccumulator(str(uninterrupted / "runs" / "starpilot" / XPID)).Reload()
    (panel,) = text.Tensors("hyperparameters/text_summary")
    assert b"|learning_rate|0.0005|" in panel.tensor_proto.string_val[0]


def test_returns_count_every_finished_episode(tmp_path):
    """With 200 steps of 8 games in one iteration, the statistics are those of a plain count over the same games."""
    sizes = "--num-envs 8 --num-steps 200 --total-timesteps 1600 --num-minibatches 8 --update-epochs 1".split()
    assert train(tmp_path, *sizes, "--xpid", "x").returncode == 0
    envs = ProcgenVectorEnv(8, "starpilot", "easy", 0, 200, seed=0)
    torch.manual_seed(0)
    agent, obs = Agent(256), envs.reset()[0]
    running, returns, lengths, steps = np.zeros(8), [], [], np.zeros(8)
    for _ in range(200):
        with torch.inference_mode():
            action = agent.get_action_and_value(torch.from_numpy(obs))[0].numpy()
        obs, reward, done, _, _ = envs.step(action)
        running, steps = running + reward, steps + 1
        returns += list(running[done])
        lengths += list(steps[done])
        running[done] = steps[done] = 0
    (row,) = progress(tmp_path, "x")
    assert 8 < len(returns) < 100
    assert float(row["charts/episodic_return"]) == pytest.approx(np.mean(returns))
    assert float(row["charts/episodic_length"]) == pytest.approx(np.mean(lengths))


def test_the_seed_decides_the_weights(uninterrupted, tmp_path):
    assert launch(tmp_path).returncode == 0
    assert_same_run(tmp_path, uninterrupted)
    assert train(tmp_path, "--seed", "1").returncode == 0
    other = final(tmp_path, XPID[:-1] + "1")
    assert not same(other["model_state_dict"], final(uninterrupted)["model_state_dict"])


def test_log_archive_and_evaluation_settings_do_not_change_the_weights(uninterrupted, tmp_path):
    assert train(tmp_path, *"--log-interval 1 --archive-interval 1 --num-eval-episodes 5".split()).returncode == 0
    for key in ("model_state_dict", "optimizer_state_dict"):
        assert same(final(tmp_path)[key], final(uninterrupted)[key])
    assert len(list(run_dir(tmp_path).glob("checkpoint/*.pt"))) == 6


def test_a_log_file_gets_plain_lines(tmp_path):
    lines = launch(tmp_path).stdout.splitlines()
    assert any("models/starpilot/" + XPID in line for line in lines)
    assert any("384 (6 iterations of 64)" in line for line in lines)
    assert any("626,256" in line for line in lines)
    saved = [line.split(",")[0] for line in lines if line.startswith("iteration")]
    assert saved == ["iteration 2/6", "iteration 4/6", "iteration 6/6"]


def test_a_terminal_gets_a_bar(tmp_path):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 140, 0, 0))
    process = subprocess.Popen([*SCRIPT, *SMALL], cwd=tmp_path, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 4096):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    assert re.search(rb"384/384 .*steps/s.*train return .*test return", shown)


# RESUME

# Runs main() with one function replaced, so that the process is killed in the middle of what is under way.
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import ppo_procgen
module, name, fatal_call = {where}, {name!r}, {fatal_call}
original, calls = getattr(module, name), 0
def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls == fatal_call:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(module, name, dying)
ppo_procgen.main()
"""


def killed(folder, where, name, fatal_call):
    code = KILLED.format(root=str(ROOT), where=where, name=name, fatal_call=fatal_call)
    process = subprocess.run([sys.executable, "-c", code, *SMALL, "--resume"], cwd=folder, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr


@pytest.mark.parametrize(
    "moments",
    [
        # 16 steps, 6 backward passes an iteration; the order of files is rolling 0 | csv 1 | csv 2, rolling 2 |
        # model_3, csv 3 | csv 4, rolling 4 | csv 5 | model_6, final, csv 6, rolling 6
        pytest.param([("os", "replace", 1)], id="during the first save"),
        pytest.param([("ppo_procgen", "ppo_loss", 3)], id="in the first iteration"),
        pytest.param([("os", "replace", 4)], id="during the second save"),
        pytest.param([("os", "fsync", 8)], id="during the third save"),
        pytest.param([("ppo_procgen.ProcgenVectorEnv", "step_wait", 40)], id="mid-rollout"),
        pytest.param([("ppo_procgen", "ppo_loss", 27)], id="mid-update"),
        pytest.param([("ppo_procgen", "evaluate", 1)], id="at an evaluation"),
        pytest.param([("os", "replace", 6)], id="after a checkpoint is archived"),
        pytest.param([("ppo_procgen", "evaluate", 2)], id="before the final checkpoint"),
        pytest.param([("os", "replace", 12)], id="after the final checkpoint"),
        pytest.param([("ppo_procgen", "ppo_loss", 20), ("ppo_procgen", "ppo_loss", 15)], id="twice"),
    ],
)
def test_a_killed_run_ends_like_one_that_was_not(uninterrupted, tmp_path, moments):
    for moment in moments:
        killed(tmp_path, *moment)
        for path in run_dir(tmp_path).rglob("*.pt"):  # whatever is there under its name is whole
            load(path)
    process = launch(tmp_path, "--resume")
    assert process.returncode == 0, process.stderr
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_saves_and_exits_75(uninterrupted, tmp_path, signum):
    command = [*SCRIPT, *SMALL, "--resume", "--log-interval", "100"]  # so that only the signal saves
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: (run_dir(tmp_path) / "progress.csv").exists(), process)
    process.send_signal(signum)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75
    assert f"stopped by {signum.name}" in output
    saved = load(run_dir(tmp_path) / "rolling" / "model.pt")["iteration"]
    assert 1 <= saved < 6 and len(progress(tmp_path)) == saved
    assert train(tmp_path, "--resume").returncode == 0
    assert_same_run(tmp_path, uninterrupted)


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


def test_a_run_can_be_made_longer(uninterrupted, tmp_path):
    assert train(tmp_path, "--total-timesteps", "200").returncode == 0  # three iterations
    assert final(tmp_path)["iteration"] == 3
    assert train(tmp_path, "--resume").returncode == 0
    assert_same_run(tmp_path, uninterrupted)


def test_resuming_with_other_arguments_names_them(uninterrupted):
    other = "--xpid", XPID, "--learning-rate", "0.001", "--num-levels", "0", "--log-interval", "7"
    process = train(uninterrupted, "--resume", *other)
    assert process.returncode == 2
    assert_one_line(process.stderr, "--learning-rate was 0.0005, is 0.001", "--num-levels was 200, is 0")
    assert "log-interval" not in process.stderr
    assert train(uninterrupted, "--resume", "--total-timesteps", "128").returncode == 2


def test_an_annealed_run_cannot_be_made_longer(tmp_path):
    short = ("--anneal-lr", "--total-timesteps", "128")
    assert train(tmp_path, *short).returncode == 0
    assert [float(row["charts/learning_rate"]) for row in progress(tmp_path)] == [0.0005, 0.00025]
    process = train(tmp_path, "--anneal-lr", "--resume")
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
    assert_one_line(process.stderr, "rolling/model.pt is missing")
    assert final(tmp_path / "copy")["iteration"] == 6


def test_another_model_folder_does_not_take_over_the_tensorboard_folder(uninterrupted):
    process = train(uninterrupted, "--model-saving-dir", "elsewhere")
    assert process.returncode == 2
    assert_one_line(process.stderr, f"runs/starpilot/{XPID}")


def test_a_second_process_on_the_same_run_fails_at_once(tmp_path):
    endless = ("--total-timesteps", "1000000")
    first = subprocess.Popen([*SCRIPT, *SMALL, *endless], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        wait_for((run_dir(tmp_path) / "rolling" / "model.pt").exists, first)
        second = launch(tmp_path, "--resume", *endless)
        assert second.returncode == 1
        assert_one_line(second.stderr, XPID, "in use by another process")
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
    assert steps == {6 * 6 + 6}  # Adam goes on counting
    assert started["optimizer_state_dict"]["param_groups"][0]["lr"] == 1e-30
    assert started["iteration"] == 1


def test_target_kl_ends_the_epochs_early(tmp_path):
    assert train(tmp_path, "--target-kl", "1e-9", "--total-timesteps", "64").returncode == 0
    steps = {int(moments["step"]) for moments in final(tmp_path)["optimizer_state_dict"]["state"].values()}
    assert steps == {2}  # one epoch of two minibatches instead of three


# BAD INPUT


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--env-id pong", "--env-id is 'pong'; it must be one of bigfish, bossfight, caveflyer"),
        (
            "--distribution-mode memory",
            "--distribution-mode is 'memory'; it must be one of easy, hard, extreme",
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
        torch.save({**load(good), "model_state_dict": Agent(64).state_dict()}, path)
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


@pytest.mark.parametrize("blocked", ["models", "runs"])
def test_an_unwritable_folder(blocked, tmp_path):
    (tmp_path / blocked).write_text("a file where a folder should be")
    process = train(tmp_path)
    assert process.returncode == 1
    assert_one_line(process.stderr, blocked, "cannot be written")
    assert [path.name for path in tmp_path.rglob("*")] == [blocked]


def test_a_full_disk_is_one_line_and_no_partial_file(tmp_path):
    limit = 1_000_000  # bytes a file: as on a full disk, the system call fails in the middle of a write
    process = launch(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert process.returncode == 1
    assert_one_line(process.stderr, "rolling/model.pt could not be written")
    assert not list(run_dir(tmp_path).rglob("*.pt*"))


def test_the_readmes_curve_is_that_of_the_reference_run():
    """Every number of the table in the README stands in the progress.csv of the run."""
    (path,) = (ROOT / "tests" / "reference_runs").glob("coinrun-*.csv")
    run = {int(row["global_step"]): row for row in csv.DictReader(open(path))}
    table = re.findall(r"^\| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(table) == sum(row["charts/test_return"] != "nan" for row in run.values())
    for step, train_return, test_return in table:
        row = run[int(step.replace(",", ""))]
        assert train_return == f"{float(row['charts/episodic_return']):.2f}"
        assert test_return == f"{float(row['charts/test_return']):.2f}"
