"""Rolls trained checkpoints out on Procgen, into datasets of one .npz per episode; evaluates; verifies datasets.

    python collect_procgen.py --checkpoint models/coinrun/XPID/final/model_9.50.pt  # a dataset of a million steps
    python collect_procgen.py --env-id coinrun --ratio 0.75                         # of every run, at 75 % of its end
    python collect_procgen.py --checkpoint x.pt --no-save-dataset --num-episodes 1000 --start-level 200 --num-levels 0
    python collect_procgen.py --verify datasets/coinrun/XPID/model_9.50             # replays every episode
    python collect_procgen.py --checkpoint y.pt --agent-from my_procgen.py          # the checkpoint of a fork

Exit codes: 0 done, 1 failed, 2 bad arguments, 75 stopped by a signal with everything saved.
"""

import os
import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
EXIT_STOPPED = 75  # EX_TEMPFAIL: run the same command again to continue
if __name__ == "__main__":  # a signal while PyTorch is still loading: there is nothing to save yet
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, lambda *_: os._exit(EXIT_STOPPED))
# OpenMP threads spin while they wait, GNU's so long by default that processes on the same cores stall each other.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import math
import multiprocessing
import platform
import re
import sys
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import filelock
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gym_notices.notices import notices as gym_notices
from PIL import Image, ImageDraw
from torch.distributions import Categorical
from tqdm import tqdm

gym_notices.clear()  # gym prints a notice about its own retirement at import; it is not about this script
from procgen import ProcgenGym3Env
from procgen.env import ENV_NAMES


@dataclass
class Args:
    checkpoint: str | None = None  # roll out this checkpoint
    ratio: float | None = None  # or, of every run of a game, the one whose test return is this share of the final one's
    ratio_checkpoint_dir: str = "models"  # with ratio: the runs are {ratio_checkpoint_dir}/{env_id}/*
    ratio_dataset_dir: str = "test_dataset"  # with ratio: datasets go to {run}/{ratio_dataset_dir}/{ratio}
    verify: str | None = None  # or check this dataset and replay its episodes; with checkpoint, its log_probs as well
    agent_from: str | None = None  # the script whose class Agent is the checkpoint's network, if that is not this one's

    env_id: str | None = None  # the game; by default, like the next four, the checkpoint's
    distribution_mode: str | None = None  # difficulty
    num_levels: int | None = None  # number of levels; 0 means every level from start_level up
    start_level: int | None = None  # first level
    seed: int | None = None  # seed of the games and the actions

    # no episode is started after so many environment steps; those under way are finished
    total_timesteps: int = 1_000_000
    num_episodes: int | None = None  # or exactly so many episodes, the same number in each of the parallel games
    num_envs: int = 64  # number of parallel games
    capacity: int | None = None  # steps of an episode that are reserved per game; by default the game's time limit
    save_dataset: bool = True  # write the episodes; without, this is an evaluation
    dataset_saving_dir: str | None = None  # by default datasets/{env_id}/{xpid}/{name of the checkpoint}
    preview: int = 8  # episodes on the contact sheet preview.png beside metadata.json
    cuda: bool = True  # use the GPU if there is one


MAX_LEVEL = 2**31 - 1  # level seeds are int32
TIME_LIMITS = {"bigfish": 6000, "bossfight": 4000, "plunder": 4000, "leaper": 500, "maze": 500}  # steps; others 1000
# Here something survives a reset, so that a level seed does not decide how an episode goes: a fresh dodgeball shows
# other frames, and a fresh miner may complete a level in the first step. A replay needs the state at the first frame.
STATEFUL_GAMES = ("dodgeball", "miner")
AGENT_OF = "ppo_procgen.py"  # the script whose network Agent is, word for word


def layer_init(layer, std):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, 0.0)
    return layer


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x):
        return x + self.conv1(F.relu_(self.conv0(F.relu(x))))


class ConvSequence(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.res_block0 = ResidualBlock(out_channels)
        self.res_block1 = ResidualBlock(out_channels)

    def forward(self, x):
        x = F.max_pool2d(self.conv(x), kernel_size=3, stride=2, padding=1)
        return self.res_block1(self.res_block0(x))


class Agent(nn.Module):
    """Actor-critic on the IMPALA CNN (Espeholt et al. 2018, figure 3): 64x64 RGB frames to 15 logits and a value.

    Made from the script's arguments, of which it reads hidden_size.
    """

    def __init__(self, args):
        super().__init__()
        self.network = nn.Sequential(
            ConvSequence(3, 16),
            ConvSequence(16, 32),
            ConvSequence(32, 32),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(32 * 8 * 8, args.hidden_size),
            nn.ReLU(inplace=True),
        ).to(memory_format=torch.channels_last)
        self.actor = layer_init(nn.Linear(args.hidden_size, 15), std=0.01)
        self.critic = layer_init(nn.Linear(args.hidden_size, 1), std=1.0)

    def forward(self, x):
        """(N, 64, 64, 3) uint8 frames to (N, 15) logits and (N,) values. Permuted frames already are channels_last."""
        hidden = self.network(x.permute(0, 3, 1, 2) / 255.0)
        return self.actor(hidden), self.critic(hidden).squeeze(-1)

    def get_value(self, x):
        return self(x)[1]

    def get_action_and_value(self, x, action=None):
        """Action (sampled unless given), its log-probability, the policy's entropy and the value, each (N,)."""
        logits, value = self(x)
        policy = Categorical(logits=logits, validate_args=False)
        if action is None:
            action = policy.sample()
        return action, policy.log_prob(action), policy.entropy(), value


def time_limit(env_id: str, distribution_mode: str) -> int:
    return 2000 if (env_id, distribution_mode) == ("jumper", "memory") else TIME_LIMITS.get(env_id, 1000)


def make_games(num: int, env_id: str, distribution_mode: str, start_level: int, num_levels: int, seed: int):
    options = {"distribution_mode": distribution_mode, "rand_seed": seed, "num_threads": torch.get_num_threads()}
    if distribution_mode != "exploration":  # which has one level, fixed by Procgen
        # Procgen's own num_levels=0 would ignore start_level.
        options.update(start_level=start_level, num_levels=num_levels or MAX_LEVEL - start_level)
    try:
        return ProcgenGym3Env(num, env_id, **options)
    except OSError as error:  # the shared libraries that Procgen needs are loaded here
        packages = "libgl1 and libglib2.0-0 (libglib2.0-0t64 on newer systems)"
        fail(f"Procgen misses a library of the system ({error}); on Debian or Ubuntu install {packages}")


class Half:
    """Half of the games and the episodes under way in them: while one half steps, the policy acts in the other.

    frames, (num, time limit, 64, 64, 3), is reserved, not filled: it takes memory only as far as episodes reach.
    """

    def __init__(self, num: int, seed: int, quota: np.ndarray, args: Args):
        levels = (args.distribution_mode, args.start_level, args.num_levels)
        self.games = make_games(num, args.env_id, *levels, seed)
        shape = (num, time_limit(args.env_id, args.distribution_mode))  # no episode is longer
        self.frames = np.empty((*shape, 64, 64, 3), np.uint8) if args.save_dataset else None
        self.actions = np.empty(shape, np.int64)
        self.rewards, self.log_probs = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self.length = np.zeros(num, int)  # steps of the episode under way
        self.quota = quota  # episodes left to start or finish, (num,)
        self.initial_states = [None] * num
        self.stateful = args.save_dataset and args.env_id in STATEFUL_GAMES

    def take(self, game: int, info: dict) -> dict:
        """The episode that has just ended in a game, copied out of the buffers."""
        kept = slice(0, self.length[game])
        episode = {name: getattr(self, name)[game, kept].copy() for name in ("actions", "rewards", "log_probs")}
        episode["frames"] = None if self.frames is None else self.frames[game, kept].copy()
        episode["level_seed"] = int(info["prev_level_seed"])
        episode["level_complete"] = bool(info["prev_level_complete"])
        episode["initial_state"] = self.initial_states[game]
        return episode


@torch.inference_mode()
def play(agent, halves, max_steps, device):
    """Yield episodes as they end.

    No episode starts once max_steps have been taken, but every one that has started is finished: to drop those under
    way would leave too few long ones.
    """
    steps = 0
    while any(half.quota.any() for half in halves):
        for half in halves:
            stop_if_asked()
            rewards, observations, first = half.games.observe()  # waits for this half only
            under_way = np.flatnonzero(half.length)
            half.rewards[under_way, half.length[under_way] - 1] = rewards[under_way]
            ended = under_way[first[under_way]]
            if len(ended):
                infos = half.games.get_info()
            for game in ended:
                yield half.take(game, infos[game])
                half.length[game] = 0
                half.quota[game] = half.quota[game] - 1 if steps < max_steps else 0
            playing = np.flatnonzero(half.quota)
            if not len(playing):
                continue
            if half.stateful and not half.length[playing].all():
                states = half.games.get_state()
                for game in playing[half.length[playing] == 0]:
                    half.initial_states[game] = states[game]
            frames, now = observations["rgb"][playing], (playing, half.length[playing])
            action, log_prob, _, _ = agent.get_action_and_value(torch.from_numpy(frames).to(device))
            half.actions[now], half.log_probs[now] = action.cpu().numpy(), log_prob.cpu().numpy()
            everywhere = np.zeros(half.games.num, np.int32)
            everywhere[playing] = half.actions[now]
            half.games.act(everywhere)  # returns at once
            if half.frames is not None:
                half.frames[now] = frames
            half.length[playing] += 1
            steps += len(playing)


def to_arrays(episode: dict, limit: int) -> dict:
    """The content of an episode's file; the keys are explained in the README."""
    frames, length = episode["frames"], len(episode["actions"])
    observations = np.empty((length + 1, 3, 64, 64), np.uint8)
    observations[:-1] = frames.transpose(0, 3, 1, 2)
    observations[-1] = observations[-2]  # Procgen never renders the terminal frame
    last = np.arange(length) == length - 1
    arrays = {
        "observations": observations,
        "actions": episode["actions"][:, None],
        "rewards": episode["rewards"][:, None],
        "dones": last,
        "truncations": last & (length == limit) & (not episode["level_complete"]),
        "log_probs": episode["log_probs"],
        "level_complete": np.array(episode["level_complete"]),
        "level_seed": np.array(episode["level_seed"]),
    }
    if episode["initial_state"] is not None:
        arrays["initial_state"] = np.frombuffer(episode["initial_state"], np.uint8)
    return arrays


def collect(args: Args, path: Path, state: dict, folder: Path | None, chosen: dict) -> None:
    """Roll a checkpoint out into the dataset in folder, or only evaluate it if that is None."""
    args = fill_in(args, state["args"])
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    agent = load_agent(args, state, path).to(device)
    max_steps, num_episodes, continuation, next_index = args.total_timesteps, args.num_episodes, 0, 1
    if folder:
        made_with = {
            "format": 1,
            **{name: getattr(args, name) for name in ("env_id", "distribution_mode", "num_levels", "start_level")},
            "args": asdict(args),
            "checkpoint": str(path),
            "checkpoint_sha256": state["sha256"],
            **{name: state[name] for name in ("script", "script_sha256", "xpid", "iteration", "global_step")},
            "test_return": state["test_return"],
            "agent_from": describe_agent_from(args),
            "device": device.type,
            **chosen,
            "versions": versions(),
        }
        metadata, lock = open_dataset(folder, made_with)
        present = list_episodes(folder)
        if num_episodes is None:
            left = max_steps = max_steps - sum(length for _, length, *_ in present)
        else:
            left = num_episodes = num_episodes - len(present)
        if left <= 0:
            contact_sheet(folder, args.preview)
            if not metadata["complete"]:
                write_metadata(folder, {**metadata, "complete": True})
            print(f"{folder} is complete with {len(present)} episodes; ask for more to extend it")
            lock.release()
            return
        metadata |= made_with
        continuation = metadata["continuations"] = metadata["continuations"] + 1
        next_index = present[-1][0] + 1 if present else 1
        # An interruption is counted before it can happen, and taken back at the end: so SIGKILL counts as well.
        interrupted = {**metadata, "complete": False, "interruptions": metadata["interruptions"] + 1}
        write_metadata(folder, interrupted)

    # Every continuation draws on seeds of its own, so that no episode is collected twice.
    seeds = [int(seed) for seed in np.random.SeedSequence([args.seed, continuation]).generate_state(3) % MAX_LEVEL]
    torch.manual_seed(seeds[0])
    quota = np.full(args.num_envs, np.iinfo(np.int64).max)
    if num_episodes is not None:  # the same number in each game, as the first to end would be the short ones
        quota = num_episodes // args.num_envs + (np.arange(args.num_envs) < num_episodes % args.num_envs)
        max_steps = math.inf
    halves = [Half(len(half), seed, half, args) for half, seed in zip(np.array_split(quota, 2), seeds[1:]) if len(half)]
    limit = time_limit(args.env_id, args.distribution_mode)

    print(f"{args.env_id}, {args.distribution_mode}, {path} -> {folder or 'evaluation only'}", flush=True)
    unit, total = ("steps", max_steps) if num_episodes is None else ("episodes", num_episodes)
    shown, summary, pending, start_time = Shown(unit, total), [], deque(), time.time()
    workers = min(4, os.cpu_count())
    try:
        with ThreadPoolExecutor(workers) as pool:
            for episode in play(agent, halves, max_steps, device):
                steps, episode_return = len(episode["rewards"]), float(episode["rewards"].sum(dtype=float))
                summary.append((episode_return, steps, episode["level_complete"], episode["level_seed"]))
                if folder:
                    while len(pending) > workers:  # a bound on the memory that waits to be written
                        pending.popleft().result()
                    pending.append(pool.submit(write_episode, folder, args.env_id, next_index, limit, episode))
                    next_index += 1
                shown.update(steps if unit == "steps" else 1, f"{len(summary)} episodes")
    except Stopped as stop:
        shown.bar.close()
        if folder:  # the pool has written what had ended
            write_metadata(folder, interrupted)
        print(f"stopped by {stop} after {len(summary)} episodes" + ("; the same command continues" if folder else ""))
        sys.exit(EXIT_STOPPED)
    finally:
        shown.bar.close()
        for half in halves:
            half.games.close()
    for write in pending:
        write.result()
    if folder:
        contact_sheet(folder, args.preview)
        write_metadata(folder, {**metadata, "complete": True})
        lock.release()
    print_summary(args, summary, time.time() - start_time)


# ======================================================================================================================
# No fork needs to change anything below: arguments, signals, checkpoints, files, verifying.
# ======================================================================================================================

SCRIPT = Path(__file__).name
# The games that have more modes than easy and hard. Asked for any other, Procgen's library ends the whole process.
EXTRA_MODES = {
    "extreme": ("chaser", "dodgeball", "leaper", "starpilot"),
    "memory": ("caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"),
    "exploration": ("caveflyer", "climber", "coinrun", "heist", "jumper", "leaper", "maze", "ninja"),
}
INHERITED = ("env_id", "distribution_mode", "num_levels", "start_level", "seed")  # from the checkpoint unless given
LOCK_PATIENCE = 600  # seconds
# Return ranges of Cobbe et al. 2020, appendix C, for the normalised return (R - min) / (max - min).
RANGES = {
    "easy": {
        "bigfish": (1, 40), "bossfight": (0.5, 13), "caveflyer": (3.5, 12), "chaser": (0.5, 13), "climber": (2, 12.6),
        "coinrun": (5, 10), "dodgeball": (1.5, 19), "fruitbot": (-1.5, 32.4), "heist": (3.5, 10), "jumper": (3, 10),
        "leaper": (3, 10), "maze": (5, 10), "miner": (1.5, 13), "ninja": (3.5, 10), "plunder": (4.5, 30),
        "starpilot": (2.5, 64),
    },
    "hard": {
        "bigfish": (0, 40), "bossfight": (0.5, 13), "caveflyer": (2, 13.4), "chaser": (0.5, 14.2), "climber": (1, 12.6),
        "coinrun": (5, 10), "dodgeball": (1.5, 19), "fruitbot": (-0.5, 27.2), "heist": (2, 10), "jumper": (1, 10),
        "leaper": (1.5, 10), "maze": (4, 10), "miner": (1.5, 20), "ninja": (2, 10), "plunder": (3, 30),
        "starpilot": (1.5, 35),
    },
}  # fmt: skip
EPISODE_NAME = re.compile(r"(\d{8}T\d{6})_(\d+)_(\d+)_(\d+)_(-?\d+\.\d\d)\.npz")
EVALUATED = re.compile(r"model_(\d+_)?-?\d+\.\d\d\.pt")  # other files in a run are the user's


def fail(message: str, code: int = 1) -> NoReturn:
    """End the process with one line on stderr; code 2 is for arguments, 1 for the rest."""
    print(f"{SCRIPT}: error: {message}", file=sys.stderr)
    sys.exit(code)


class Unfit(Exception):
    """A checkpoint that cannot be rolled out: the reason and the exit code. With --ratio the others go on."""


def require(args: Args, condition: bool, name: str, wanted: str) -> None:
    """Exit with code 2 and one line that names the flag, its value and what would be right, unless condition holds."""
    if not condition:
        fail(f"--{name.replace('_', '-')} is {getattr(args, name)!r}; it must be {wanted}", 2)


def check_args(args: Args) -> None:
    """Check what can be told without a checkpoint."""
    what = tuple(x is not None for x in (args.checkpoint, args.ratio, args.verify))
    if sum(what) != 1 and what != (True, False, True):
        fail("give one of --checkpoint FILE, --ratio R (with --env-id) and --verify DIR (with --checkpoint or not)", 2)
    if args.ratio is not None:
        require(args, 0 < args.ratio <= 1, "ratio", "above 0 and at most 1, such as 0.75")
        require(args, args.env_id is not None, "env_id", "given with --ratio")
        if args.dataset_saving_dir is not None:
            fail("--dataset-saving-dir goes with --checkpoint; with --ratio it is --ratio-dataset-dir, in each run", 2)
    require(args, args.env_id is None or args.env_id in ENV_NAMES, "env_id", f"one of {', '.join(ENV_NAMES)}")
    require(args, args.num_envs <= 2**16, "num_envs", "at most 65536")
    for name in ("total_timesteps", "num_episodes", "num_envs", "preview"):
        value, least = getattr(args, name), 0 if name == "preview" else 1
        require(args, value is None or value >= least, name, f"at least {least}")


def fill_in(args: Args, trained: dict) -> Args:
    """The arguments with what was left out taken from the checkpoint's, and checked against each other."""
    args = replace(args, **{name: trained[name] for name in INHERITED if getattr(args, name) is None})
    require(args, args.env_id == trained["env_id"], "env_id", f"{trained['env_id']}, the game of the checkpoint")
    modes = ["easy", "hard"] + [mode for mode, games in EXTRA_MODES.items() if args.env_id in games]
    require(args, args.distribution_mode in modes, "distribution_mode", f"one of {', '.join(modes)} for {args.env_id}")
    require(args, 0 <= args.seed < MAX_LEVEL, "seed", f"between 0 and {MAX_LEVEL - 1}")
    require(args, 0 <= args.start_level < MAX_LEVEL, "start_level", f"between 0 and {MAX_LEVEL - 1}")
    most = MAX_LEVEL - args.start_level
    require(args, 0 <= args.num_levels <= most, "num_levels", f"between 0 and {most} with this --start-level")
    limit = time_limit(args.env_id, args.distribution_mode)
    capacity = limit if args.capacity is None else args.capacity
    require(args, capacity >= limit, "capacity", f"at least {limit}, the time limit of {args.env_id}")
    return args


class Stopped(Exception):
    """One of STOP_SIGNALS came."""


signals_received = []


def stop_if_asked() -> None:
    """Raise Stopped after a signal."""
    if signals_received:
        raise Stopped(signal.Signals(signals_received[0]).name)


def write_file(path: Path, content: bytes, temporaries: Path | None = None) -> None:
    """Replace a file at one stroke: at any instant, killed or not, there is the whole old or the whole new one."""
    temporary = (temporaries or path.parent) / f".{path.name}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_episode(folder: Path, env_id: str, index: int, limit: int, episode: dict) -> None:
    """Compress and write one episode. Runs in a thread: zlib releases the GIL."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **to_arrays(episode, limit))
    numbers = f"{index}_{len(episode['actions'])}_{episode['level_seed']}"
    name = f"{time.strftime('%Y%m%dT%H%M%S')}_{numbers}_{decimals(episode['rewards'].sum(dtype=float))}.npz"
    write_file(folder / env_id / name, buffer.getvalue(), folder)  # nothing but episodes stands in their folder


def decimals(number: float) -> str:
    return f"{round(number, 2) + 0.0:.2f}"  # + 0.0 turns -0.0 into 0.0


def list_episodes(folder: Path) -> list:
    """(index, length, level seed, return, path) of every episode of a dataset, by index."""
    matches = [(EPISODE_NAME.fullmatch(path.name), path) for path in folder.glob("*/*.npz")]
    return sorted((int(m[2]), int(m[3]), int(m[4]), float(m[5]), path) for m, path in matches if m)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint without running any code in it. Raises Unfit if it is missing, damaged or foreign."""
    if not path.is_file():
        raise Unfit(f"checkpoint {path} does not exist", 1)
    try:
        content = path.read_bytes()
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever it stumbles over
        raise Unfit(
            f"checkpoint {path} is damaged or holds more than plain values ({type(error).__name__})", 1
        ) from None
    try:
        trained, xpid = state["args"], state["xpid"]
        sound = state["format"] == 1 and trained["env_id"] in ENV_NAMES and isinstance(state["script"], str)
        sound &= all(type(trained[key]) is int for key in ("num_levels", "start_level", "seed"))
        sound &= xpid not in ("", "..") and xpid == Path(xpid).name and xpid.isprintable()
        sound &= type(state["iteration"]) is int and type(state["global_step"]) is int
        sound &= isinstance(state["test_return"], (float, int, type(None))) and "distribution_mode" in trained
        finite = all(bool(x.isfinite().all()) for x in state["model_state_dict"].values())
    except Exception as error:  # depends on what is in the file
        raise Unfit(f"checkpoint {path} is none of these scripts in format 1 ({one_line(error)})", 1) from None
    if not sound or not finite:
        reason = "holds values that no script here writes" if not sound else "has weights that are not finite"
        raise Unfit(f"checkpoint {path} {reason}", 1)
    return {**state, "sha256": hashlib.sha256(content).hexdigest()}  # of what was read: the file may be replaced


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def find_agent(args: Args) -> type:
    """The class Agent to use: this script's, or the one of --agent-from, which is run as the user's own code."""
    if args.agent_from is None:
        return Agent
    try:
        spec = importlib.util.spec_from_file_location("agent_from", args.agent_from)
        sys.modules["agent_from"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.Agent
    except Exception as error:  # whatever the file does
        fail(f"--agent-from {args.agent_from} cannot be imported, or has no class Agent ({one_line(error)})", 2)


def describe_agent_from(args: Args) -> dict | None:
    if args.agent_from is None:
        return None
    path = Path(args.agent_from)
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def agent_sha256(agent: type) -> str:
    """Hash of the source of all networks in the module of the class agent, as the training script takes it."""
    networks = [
        x for x in vars(sys.modules[agent.__module__]).values() if inspect.isclass(x) and issubclass(x, nn.Module)
    ]
    source = "".join(inspect.getsource(x) for x in networks if x.__module__ == agent.__module__)
    return hashlib.sha256(source.encode()).hexdigest()


def load_agent(args: Args, state: dict, path: Path) -> nn.Module:
    """The checkpoint's network. Raises Unfit unless it is known to be the one that Agent defines."""
    agent_class, same_network = find_agent(args), True
    if args.agent_from is None or "agent_sha256" in state:
        same_network = agent_sha256(agent_class) == state.get("agent_sha256")
    if args.agent_from is None and (state["script"] != AGENT_OF or not same_network):
        whose = f"by {state['script']}" if state["script"] != AGENT_OF else f"by a {AGENT_OF} with another network"
        way_out = "--agent-from FILE names the script whose class Agent it needs; its run folder has a copy"
        raise Unfit(f"checkpoint {path} was written {whose}: {way_out}", 2)
    if not same_network and args.ratio is not None:  # one network for many runs: take those that it has made
        raise Unfit(f"checkpoint {path} was made by other networks than those in {args.agent_from}", 2)
    if not same_network:
        print(f"note: the networks in {args.agent_from} are not word for word those that made {path}")
    try:
        agent = agent_class(SimpleNamespace(**state["args"]))
        agent.load_state_dict(state["model_state_dict"])
    except Exception as error:  # depends on what is in the file
        raise Unfit(f"checkpoint {path} does not fit the network: {one_line(error)}", 1) from None
    return agent


def versions() -> dict:
    procgen = importlib.metadata.packages_distributions()["procgen"][0]  # procgen or procgen-mirror
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    return {**found, "procgen": f"{procgen} {importlib.metadata.version(procgen)}"}


def open_dataset(folder: Path, made_with: dict) -> tuple:
    """Make or continue a dataset. Returns metadata and lock; exits if another checkpoint, mode or range made it."""
    lock = filelock.FileLock(folder / ".lock")
    on_cluster = "SLURM_JOB_ID" in os.environ  # there, whoever holds it may be about to end
    patience = LOCK_PATIENCE if on_cluster else 1  # sweep.py may be asking whether the dataset is in use
    try:
        (folder / made_with["env_id"]).mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=patience)
    except filelock.Timeout:
        in_use = f"{folder} is in use by another process, {patience} s long"
        fail(f"{in_use}; wait for it to end or choose another folder", EXIT_STOPPED if on_cluster else 1)
    except OSError as error:
        fail(f"{folder} cannot be written: {error.strerror}; choose another folder")
    metadata = {"continuations": -1, "interruptions": 0, "complete": False}
    if (folder / "metadata.json").exists():
        try:
            metadata = {**metadata, **json.loads((folder / "metadata.json").read_text())}
        except (ValueError, TypeError):
            fail(f"{folder / 'metadata.json'} is damaged; choose another folder")
        there, here = ({**x, "procgen": x.get("versions", {}).get("procgen")} for x in (metadata, made_with))
        # One dataset, one network, one build of Procgen: the two builds draw differently.
        same = "env_id distribution_mode num_levels start_level checkpoint_sha256 agent_from procgen".split()
        for name in same:
            if there.get(name) != here[name]:
                fail(f"{folder} holds a dataset whose {name} is {there.get(name)}, not {here[name]}; choose another", 2)
    elif any(folder.glob("**/*.npz")):
        fail(f"{folder} holds episodes without a metadata.json; choose another folder", 2)
    for pattern in (".*.npz.tmp", ".metadata.json.tmp", ".preview.png.tmp"):  # of a write that was killed
        for leftover in folder.glob(pattern):
            leftover.unlink()
    return metadata, lock


def write_metadata(folder: Path, metadata: dict) -> None:
    episodes = list_episodes(folder)
    returns = np.array([episode_return for _, _, _, episode_return, _ in episodes])
    counts = {"episodes": len(episodes), "steps": sum(length for _, length, *_ in episodes)}
    for name in ("mean", "std", "min", "max"):
        counts[f"return_{name}"] = float(getattr(returns, name)()) if len(returns) else None
    write_file(folder / "metadata.json", json.dumps({**metadata, **counts}, indent=2).encode())


class Shown:
    """How far it is: a bar on a terminal, a line every half minute in a log."""

    def __init__(self, unit: str, total: float):
        self.in_log = not (sys.stdout.isatty() and sys.stderr.isatty())
        self.bar = tqdm(total=total, unit=f" {unit}", unit_scale=True, smoothing=0, disable=self.in_log)
        self.unit, self.done, self.start_time, self.last_line = unit, 0, time.time(), time.time()

    def update(self, number: int, text: str) -> None:
        self.bar.update(number)
        self.done += number
        if self.in_log and time.time() - self.last_line > 30:
            self.last_line = time.time()
            speed = self.done / (self.last_line - self.start_time)
            print(f"{text}, {self.done:,} {self.unit}, {speed:.0f} {self.unit}/s", flush=True)


def print_summary(args: Args, summary: list, seconds: float) -> None:
    returns, lengths, completed, level_seeds = map(np.array, zip(*summary))
    error = returns.std(ddof=1) / math.sqrt(len(returns)) if len(returns) > 1 else math.nan
    print(f"episodes            {len(returns)}, {lengths.sum():,} steps, {lengths.sum() / seconds:.0f} steps/s")
    print(f"mean return         {returns.mean():.2f} +- {error:.2f} (standard error)")
    print(f"median, min, max    {np.median(returns):.2f}, {returns.min():.2f}, {returns.max():.2f}")
    if args.distribution_mode in RANGES:
        low, high = RANGES[args.distribution_mode][args.env_id]
        print(f"normalised return   {(returns.mean() - low) / (high - low):.3f} (0 is {low}, 1 is {high})")
    print(f"mean length         {lengths.mean():.1f}")
    print(f"levels completed    {100 * np.mean(completed):.1f} %")
    print(f"levels seen         {len(set(level_seeds))}", flush=True)


def choose_checkpoints(args: Args) -> tuple:
    """(path, state, folder, note) for every run of a game: the checkpoint nearest to ratio x the final test return.

    Returns these and the number of runs that were skipped because something in them is wrong.
    """
    root, jobs, odd = Path(args.ratio_checkpoint_dir) / args.env_id, [], 0
    if not root.is_dir():
        fail(f"{root} does not exist; --ratio-checkpoint-dir and --env-id say where the runs are")

    def load(run, folder):
        paths = [path for path in run.glob(f"{folder}/*.pt") if EVALUATED.fullmatch(path.name)]
        states = [(path, load_checkpoint(path)) for path in sorted(paths)]
        for path, state in states:
            if state["args"]["env_id"] != args.env_id:
                raise Unfit(f"checkpoint {path} is one of {state['args']['env_id']}", 1)
            load_agent(args, state, path)
        return [(path, state) for path, state in states if state["test_return"] is not None]

    for run in sorted(path for path in root.iterdir() if path.is_dir()):
        try:
            final, archived = load(run, "final"), load(run, "checkpoint") if args.ratio != 1 else []
        except Unfit as error:
            print(f"{run} is skipped: {error.args[0]}")
            odd += 1
            continue
        if not final or (args.ratio != 1 and not archived):
            print(f"{run} is skipped: it has no {'archived' if final else 'final'} checkpoint")
            continue
        path, state = max(final, key=lambda x: x[1]["iteration"])
        target = args.ratio * state["test_return"]
        if args.ratio != 1:
            path, state = min(archived, key=lambda x: (abs(x[1]["test_return"] - target), x[1]["iteration"]))
        print(f"{run.name}: {path.name} with test return {state['test_return']:.2f}, wanted {target:.2f}")
        note = {"ratio": args.ratio, "target_return": target}
        jobs.append((path, state, run / args.ratio_dataset_dir / str(args.ratio), note))
    return jobs, odd


def contact_sheet(folder: Path, num_episodes: int) -> None:
    """Write preview.png: first, middle and last frame of some episodes, spread evenly over the dataset."""
    episodes = list_episodes(folder)
    if not num_episodes or not episodes:
        return
    picked = [episodes[i] for i in np.unique(np.linspace(0, len(episodes) - 1, num_episodes).astype(int))]
    size, text, gap = 128, 14, 4
    sheet = Image.new("RGB", (3 * size + 2 * gap, len(picked) * (size + text)))
    for row, (index, length, level_seed, episode_return, path) in enumerate(picked):
        with np.load(path) as episode:
            observations = episode["observations"]
        top = row * (size + text)
        caption = f"episode {index}: level {level_seed}, {length} steps, return {episode_return:.2f}"
        ImageDraw.Draw(sheet).text((2, top + 1), caption)
        for column, t in enumerate((0, length // 2, length - 1)):
            frame = Image.fromarray(observations[t].transpose(1, 2, 0)).resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(frame, (column * (size + gap), top + text))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_file(folder / "preview.png", buffer.getvalue())


DTYPES = {"observations": "uint8", "actions": "int64", "rewards": "float32", "dones": "bool", "truncations": "bool"}
DTYPES |= {"log_probs": "float32", "level_complete": "bool", "level_seed": "int64"}


def fault_in(path: Path, metadata: dict, compare_frames: bool) -> str | None:
    """What is wrong with an episode's file, or None: its form, its name, and a replay in a fresh game, bit for bit."""
    match = EPISODE_NAME.fullmatch(path.name)
    if not match:
        return "the name is not that of an episode"
    try:
        with np.load(path, allow_pickle=False) as file:
            episode = {key: file[key] for key in file.files}
    except Exception as error:  # numpy and zipfile raise whatever they stumble over
        return f"the file is damaged ({type(error).__name__}: {error})"
    length = int(match[3])
    shapes = {"observations": (length + 1, 3, 64, 64), "actions": (length, 1), "rewards": (length, 1)}
    stateful = metadata["env_id"] in STATEFUL_GAMES
    wanted = set(DTYPES) | ({"initial_state"} if stateful else set())
    if set(episode) != wanted:
        return f"the keys differ from the format's: {sorted(set(episode) ^ wanted)}"
    for key, dtype in DTYPES.items():
        shape = shapes.get(key, () if key.startswith("level") else (length,))
        if (episode[key].shape, episode[key].dtype) != (shape, dtype):
            return f"{key} is {episode[key].dtype} {episode[key].shape}, not {dtype} {shape}"
    obs, actions, rewards = episode["observations"], episode["actions"][:, 0], episode["rewards"][:, 0]
    if int(match[4]) != episode["level_seed"] or match[5] != decimals(rewards.sum(dtype=float)):
        return "the level seed or the return in the name is not that of the content"
    first_level, num_levels = metadata["start_level"], metadata["num_levels"] or MAX_LEVEL - metadata["start_level"]
    if not first_level <= episode["level_seed"] < first_level + num_levels:
        if metadata["distribution_mode"] != "exploration":
            return f"level {episode['level_seed']} is not one of the dataset's"
    if stateful and (episode["initial_state"].dtype != np.uint8 or episode["initial_state"].ndim != 1):
        return "initial_state is not a row of bytes"
    last = np.arange(length) == length - 1
    cut = length == time_limit(metadata["env_id"], metadata["distribution_mode"]) and not episode["level_complete"]
    if not np.array_equal(episode["dones"], last) or not np.array_equal(episode["truncations"], last & cut):
        return "dones or truncations do not mark the end"
    if not np.array_equal(obs[-1], obs[-2]) or not (episode["log_probs"] <= 0).all():
        return "the padding frame or the log-probabilities are wrong"
    if not ((actions >= 0) & (actions < 15)).all():
        return "an action is not between 0 and 14"

    game = make_games(1, metadata["env_id"], metadata["distribution_mode"], int(episode["level_seed"]), 1, 0)
    if stateful:
        game.set_state([episode["initial_state"].tobytes()])
    try:
        for t in range(length):
            _, frame, first = game.observe()
            if compare_frames and not np.array_equal(frame["rgb"][0].transpose(2, 0, 1), obs[t]):
                return f"the replay shows another frame at step {t}"
            if t and first[0]:
                return f"the replay ends after {t} steps"
            game.act(actions[t : t + 1])
            if game.observe()[0][0] != rewards[t]:
                return f"the replay gives another reward at step {t}"
        info = game.get_info()[0]
        if not game.observe()[2][0] or bool(info["prev_level_complete"]) != episode["level_complete"]:
            return "the replay does not end like the episode"
        if info["prev_level_seed"] != episode["level_seed"]:
            return "the replay plays another level"
    finally:
        game.close()
    return None


def wrong_log_probs(path: Path, agent: nn.Module, tolerance: float) -> str | None:
    """What is wrong with the log-probabilities of an episode, if this network played it, or None."""
    with np.load(path) as episode, torch.inference_mode():
        frames = torch.from_numpy(episode["observations"][:-1].transpose(0, 2, 3, 1).copy())
        actions = torch.from_numpy(episode["actions"][:, 0])
        chunks = zip(frames.split(256), actions.split(256))
        expected = torch.cat([agent.get_action_and_value(*chunk)[1] for chunk in chunks]).numpy()
        error = float(np.abs(episode["log_probs"] - expected).max())
    return None if error <= tolerance else f"log_probs are up to {error:.3g} from those of the checkpoint's network"


def verify(args: Args) -> int:
    """Check every episode of a dataset with all cores; print what fails. Returns the exit code."""
    folder, agent = Path(args.verify), None
    try:
        metadata = json.loads((folder / "metadata.json").read_text())
        rendered_by, here = metadata["versions"]["procgen"], versions()["procgen"]
        wanted = {"env_id", "distribution_mode", "start_level", "num_levels", "episodes", "complete", "device"}
        if missing := wanted - metadata.keys():
            raise KeyError(missing)
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{folder / 'metadata.json'} cannot be read ({type(error).__name__}); --verify takes a dataset's folder")
    if args.checkpoint is not None:
        state = load_checkpoint(Path(args.checkpoint))
        if state["sha256"] != metadata["checkpoint_sha256"]:
            fail(f"{folder} was not collected from --checkpoint {args.checkpoint}: another file's sha256 is on record")
        agent = load_agent(args, state, Path(args.checkpoint))
    tolerance = 1e-4 if metadata["device"] == "cpu" else 0.02  # a GPU's convolutions are less precise
    compare_frames = rendered_by == here
    if not compare_frames:
        print(f"rendered by {rendered_by}, which draws some pixels unlike {here} here: all but the frames is compared")
    paths, failed = sorted(folder.glob("*/*.npz")), []
    indices = [index for index, *_ in list_episodes(folder)]
    if len(set(indices)) < len(indices):
        print("two episodes have the same index in their names")
        failed.append(folder)
    if len(paths) != metadata["episodes"] and metadata["complete"]:
        print(f"metadata.json counts {metadata['episodes']} episodes, the folder holds {len(paths)}")
        failed.append(folder / "metadata.json")
    shown = Shown("episodes", len(paths))
    spawn = multiprocessing.get_context("spawn")  # Procgen does not survive a fork
    with ProcessPoolExecutor(os.cpu_count(), spawn) as pool:
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the workers inherit it: this process stops them
            futures = {pool.submit(fault_in, path, metadata, compare_frames): path for path in paths}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            for future in as_completed(futures):
                stop_if_asked()
                try:
                    fault = future.result()
                except Exception as error:  # a state or a level that makes Procgen itself give up
                    fault = f"the replay failed ({type(error).__name__}: {error})"
                if agent and not fault:
                    fault = wrong_log_probs(futures[future], agent, tolerance)
                if fault:
                    failed.append(futures[future])
                    tqdm.write(f"{futures[future]}: {fault}")
                shown.update(1, f"{len(failed)} failed")
        except Stopped as stop:
            pool.shutdown(cancel_futures=True)
            print(f"stopped by {stop} before every episode was checked")
            return EXIT_STOPPED
        finally:
            shown.bar.close()
    if not metadata["complete"]:
        print("the collection of this dataset has not ended: metadata.json says complete: false")
    proof = "all replayed bit for bit" if compare_frames else "all but the frames replayed"
    proof += ", and every log-probability is that of the checkpoint" if agent else ""
    print(f"{folder}: {len(paths)} episodes checked, {len(failed)} failed" + ("" if failed else f", {proof}"))
    return 1 if failed or not paths else 0


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    check_args(args)
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, lambda signum, _: signals_received.append(signum))
    folder, odd = args.verify, 0
    try:
        if args.verify is not None:
            sys.exit(verify(args))
        if args.ratio is not None:
            jobs, odd = choose_checkpoints(args)
            if not jobs:
                fail(f"no run of {args.env_id} in {args.ratio_checkpoint_dir} has what --ratio {args.ratio} needs")
        else:
            path = Path(args.checkpoint)
            state = load_checkpoint(path)
            folder = Path("datasets") / state["args"]["env_id"] / state["xpid"] / path.stem
            jobs = [(path, state, Path(args.dataset_saving_dir) if args.dataset_saving_dir else folder, {})]
        for path, state, folder, note in jobs:
            collect(args, path, state, folder if args.save_dataset else None, note)
    except Unfit as error:
        fail(*error.args)
    except BrokenPipeError:
        fail("whoever read the output has gone")
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        fail(f"{folder} could not be written: {reason}; it is incomplete, and the same command continues it")
    if odd:
        fail(f"{odd} runs were skipped, as something in them is wrong; the others are collected")


if __name__ == "__main__":
    main()
