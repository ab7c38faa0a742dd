"""Rolls trained checkpoints out on Procgen, into datasets of one .npz per episode; evaluates, records, draws, verifies.

    python collect_procgen.py --checkpoint models/coinrun/XPID/final/model_9.50.pt  # a dataset of a million steps
    python collect_procgen.py --env-id coinrun --ratio 0.75                         # of every run, at 75 % of its end
    python collect_procgen.py --checkpoint x.pt --no-save-dataset --num-episodes 1000 --start-level 200 --num-levels 0
    python collect_procgen.py --checkpoint x.pt --no-frames                         # a recording: a few bytes a step
    python collect_procgen.py --render RECORDING --dataset-saving-dir OUT           # draws it: the same dataset
    python collect_procgen.py --verify DIR                                          # replays a dataset or a recording
    python collect_procgen.py --checkpoint x.pt --no-save-dataset --num-episodes 9 --video 9    # or --render, --verify
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

import ast
import bisect
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import multiprocessing
import multiprocessing.resource_tracker
import platform
import re
import shutil
import struct
import sys
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import deflate
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
    render: str | None = None  # or draw this recording, a collection's or a training's, into dataset_saving_dir
    verify: str | None = None  # or check this dataset or recording by replay; with checkpoint, its log_probs as well
    agent_from: str | None = None  # the script whose class Agent is the checkpoint's network, if that is not this one's

    env_id: str | None = None  # the game; by default, like the next four, the checkpoint's
    distribution_mode: str | None = None  # difficulty
    num_levels: int | None = None  # number of levels; 0 means every level from start_level up
    start_level: int | None = None  # first level
    seed: int | None = None  # seed of the games and the actions

    # no episode is started after so many environment steps; those under way are finished
    total_timesteps: int = 1_000_000
    num_episodes: int | None = None  # or exactly so many episodes, spread evenly over the parallel games
    num_envs: int = 64  # number of parallel games
    capacity: int | None = None  # no effect, as memory follows the episodes; an error if below the game's time limit
    save_dataset: bool = True  # write the episodes; without, this is an evaluation
    frames: bool = True  # without, write a recording: all but the frames, which --render draws
    dataset_saving_dir: str | None = None  # by default datasets/{env_id}/{xpid}/{name of the checkpoint}
    save_interval: float = 30.0  # seconds between saves of what is under way, 60 at most
    preview: int = 8  # episodes on the contact sheet preview.png beside metadata.json
    iterations: tuple[int, int] | None = None  # with render: only the episodes that end in these of the training
    other_build: bool = False  # with render: go on although the other build of Procgen recorded it, with other frames
    video: int = 0  # draw so many episodes side by side
    video_path: str | None = None  # by default video.mp4 in the dataset's folder; a .gif is possible, too
    cuda: bool = True  # use the GPU if there is one


# Arguments that may be others when a dataset is extended. One of a fork's own may not unless it is added.
FREE_ARGUMENTS = (
    "checkpoint", "ratio", "ratio_checkpoint_dir", "ratio_dataset_dir", "render", "verify", "agent_from", "seed",
    "total_timesteps", "num_episodes", "num_envs", "capacity", "save_dataset", "dataset_saving_dir", "save_interval",
    "preview", "iterations", "other_build", "video", "video_path", "cuda",
)  # fmt: skip
MAX_LEVEL = 2**31 - 1  # level seeds are int32
TIME_LIMITS = {"bigfish": 6000, "bossfight": 4000, "plunder": 4000, "leaper": 500, "maze": 500}  # steps; others 1000
# Here something survives a reset, so that a level seed does not decide how an episode goes: a fresh dodgeball shows
# other frames, and a fresh miner may complete a level in the first step. A replay needs the state at the first frame.
STATEFUL_GAMES = ("dodgeball", "miner")
AGENT_OF = "ppo_procgen.py"  # the script whose network Agent is, word for word
IDLE = 255  # in place of an action: the game goes on with action 0, but no episode of it is wanted any more


def layer_init(layer, std):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def conv3x3(in_channels, out_channels):
    """A 3x3 convolution with Glorot-uniform weights and zero biases, as in train-procgen and gen_dgrl.

    PyTorch's own initial weights have a third of that variance in the 32-channel layers: the features of any two frames
    are then nearly the same at first.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv0 = conv3x3(channels, channels)
        self.conv1 = conv3x3(channels, channels)

    def forward(self, x):
        return x + self.conv1(F.relu_(self.conv0(F.relu(x))))


class ConvSequence(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = conv3x3(in_channels, out_channels)
        self.res_block0 = ResidualBlock(out_channels)
        self.res_block1 = ResidualBlock(out_channels)

    def forward(self, x):
        x = F.max_pool2d(self.conv(x), kernel_size=3, stride=2, padding=1)
        return self.res_block1(self.res_block0(x))


class Agent(nn.Module):
    """Actor-critic on the IMPALA CNN (Espeholt et al. 2018, figure 3): 64x64 RGB frames to 15 logits and a value.

    It reads args.hidden_size and args.bfloat16. With bfloat16, all layers but the heads compute in it; weights,
    gradients and outputs stay float32.
    """

    def __init__(self, args):
        super().__init__()
        self.bfloat16 = args.bfloat16
        self.network = nn.Sequential(
            ConvSequence(3, 16),
            ConvSequence(16, 32),
            ConvSequence(32, 32),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            layer_init(nn.Linear(32 * 8 * 8, args.hidden_size), std=2**0.5),
            nn.ReLU(inplace=True),
        ).to(memory_format=torch.channels_last)
        self.actor = layer_init(nn.Linear(args.hidden_size, 15), std=0.01)
        self.critic = layer_init(nn.Linear(args.hidden_size, 1), std=1.0)

    def forward(self, x):
        """(N, 64, 64, 3) uint8 frames to (N, 15) logits and (N,) values."""
        x = x.permute(0, 3, 1, 2) / 255.0  # already channels_last in memory
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            hidden = self.network(x)
        hidden = hidden.float()
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


def make_games(num: int, env_id: str, distribution_mode: str, start_level: int, num_levels: int, seed: int, **options):
    options = {"distribution_mode": distribution_mode, "rand_seed": seed, "num_threads": CORES, **options}
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

    The same levels, seed and actions give the same frames, so with a tape (actions, log_probs, rewards, dones and a
    checksum of the frames, of every step) the frames can be drawn again.
    """

    def __init__(self, stream: dict, levels: dict, keep_frames: bool = False, keep_tape: bool = False):
        num, self.stream, self.levels = stream["num_envs"], stream, levels
        self.games = make_games(num, **levels, seed=stream["seed"])
        shape = (num, time_limit(levels["env_id"], levels["distribution_mode"]))  # no episode is longer
        self.actions = np.zeros(shape, np.uint8)
        self.rewards, self.log_probs = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.frames = [[] for _ in range(num)] if keep_frames else None  # of the episodes under way
        self.tape = [] if keep_tape else None
        self.length = np.zeros(num, int)  # steps of the episode under way
        self.initial_states = [None] * num
        self.steps = 0  # that the games have taken
        self.arrived = True  # whether the last step's outcome has been read
        self.observed = self.games.observe()[1]["rgb"]  # (num, 64, 64, 3) uint8, what the policy acts on

    def receive(self) -> list:
        """Wait for this half only, and return the episodes that its last step has ended."""
        if self.arrived:
            return []
        self.arrived = True
        rewards, observations, first = self.games.observe()
        self.observed = observations["rgb"]
        if self.tape is not None:
            self.tape[-1] |= {"rewards": rewards.copy(), "dones": first.copy()}
        under_way = np.flatnonzero(self.length)
        self.rewards[under_way, self.length[under_way] - 1] = rewards[under_way]
        ended = under_way[first[under_way]]
        infos = self.games.get_info() if len(ended) else None  # slow
        return [self.take(game, infos[game]) for game in ended]

    def take(self, game: int, info: dict) -> dict:
        """The episode that has just ended in a game."""
        kept = slice(0, self.length[game])
        episode = {name: getattr(self, name)[game, kept].copy() for name in ("actions", "rewards", "log_probs")}
        episode |= {"level_seed": int(info["prev_level_seed"]), "level_complete": bool(info["prev_level_complete"])}
        episode |= {"initial_state": self.initial_states[game], "game": game, "ended_at": self.steps, "frames": None}
        if self.frames is not None:
            episode["frames"], self.frames[game] = self.frames[game], []
        self.length[game] = 0
        return episode

    def act(self, actions: np.ndarray, log_probs: np.ndarray) -> None:
        """Begin a step of the games, which goes on in the background. (num,) uint8, IDLE where no episode is wanted."""
        playing = np.flatnonzero(actions != IDLE)
        if self.levels["env_id"] in STATEFUL_GAMES:
            for game in playing[self.length[playing] == 0]:
                self.initial_states[game] = get_state(self.games, game)
        if self.frames is not None:
            for game in playing:
                self.frames[game].append(self.observed[game].copy())
        if self.tape is not None:
            self.tape.append({"actions": actions.copy(), "log_probs": log_probs.astype(np.float32)})
            self.tape[-1]["checksums"] = np.uint32(deflate.crc32(self.observed))
        now = (playing, self.length[playing])
        self.actions[now], self.log_probs[now] = actions[playing], log_probs[playing]
        self.length[playing] += 1
        self.steps += 1
        self.arrived = False
        self.games.act(np.where(actions == IDLE, 0, actions).astype(np.int32))  # returns at once

    def get_state(self) -> dict:
        """All but the frames under way, in tensors and plain values; once the last step's outcome has been read."""
        longest = self.length.max()
        arrays = {name: getattr(self, name)[:, :longest] for name in ("actions", "rewards", "log_probs")}
        level_seeds = [int(info["level_seed"]) for info in self.games.get_info()]
        states = [get_state(self.games, game) for game in range(self.games.num)]
        state = {name: torch.from_numpy(x.copy()) for name, x in {**arrays, "length": self.length}.items()}
        return {**state, "steps": self.steps, "level_seeds": level_seeds, "games": states,
                "initial_states": self.initial_states}  # fmt: skip

    def set_state(self, state: dict) -> None:
        """Continue from get_state()'s return value. The frames under way are drawn again, by all cores."""
        self.games.set_state(state["games"])
        self.observed = self.games.observe()[1]["rgb"]
        self.length, self.steps = state["length"].numpy().copy(), state["steps"]
        self.initial_states, longest = state["initial_states"], self.length.max()
        for name in ("actions", "rewards", "log_probs"):
            getattr(self, name)[:, :longest] = state[name].numpy()

        def draw(game):
            actions, level_seed = self.actions[game, : self.length[game]], state["level_seeds"][game]
            steps = replay(self.levels, level_seed, self.initial_states[game], actions) if len(actions) else ()
            return [frame for frame, *_ in steps]

        if self.frames is not None:
            with ThreadPoolExecutor(CORES) as pool:
                self.frames = list(pool.map(draw, range(self.games.num)))


class Policy:
    """Plays with a checkpoint's network, each game as many episodes as its quota, until max_steps have been taken.

    Then no episode starts, but every one that has started is finished: to drop those under way would leave too few
    long ones.
    """

    def __init__(self, agent, quota, max_steps, device):
        self.agent, self.quota, self.max_steps, self.device, self.steps = agent, quota, max_steps, device, 0
        self.steps_at = [0] * len(quota)  # steps of all games when each half last acted

    @torch.inference_mode()
    def choose(self, half, number):
        """Actions and log-probabilities, (num,), of a half of the games; None if there is nothing left to play."""
        playing = np.flatnonzero(self.quota[number])
        if not len(playing):
            return None
        frames = torch.from_numpy(half.observed[playing]).to(self.device)
        chosen = self.agent.get_action_and_value(frames)
        actions, log_probs = np.full(half.games.num, IDLE, np.uint8), np.zeros(half.games.num, np.float32)
        actions[playing], log_probs[playing] = (x.cpu().numpy() for x in chosen[:2])
        self.steps += len(playing)
        self.steps_at[number] = self.steps
        return actions, log_probs

    def learn(self, half, number, episodes):
        """What the last step of a half has ended. That the other half may have acted since must not matter."""
        quota, enough = self.quota[number], self.steps_at[number] >= self.max_steps
        for episode in episodes:
            quota[episode["game"]] = 0 if enough else quota[episode["game"]] - 1

    def get_state(self):
        state = {"steps": self.steps, "steps_at": self.steps_at, "quota": [x.tolist() for x in self.quota]}
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {**state, "torch": torch.get_rng_state(), "cuda": cuda}

    def set_state(self, state):
        self.steps, self.steps_at = state["steps"], state["steps_at"]
        self.quota = [np.array(x) for x in state["quota"]]
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda" and state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], self.device)


def roll_out(halves, player, dataset):
    """Let player act in the games until nothing is left to play; hand every episode to dataset as it ends."""

    def receive(number, half):
        episodes = half.receive()
        player.learn(half, number, episodes)
        for episode in episodes:
            dataset.keep(episode)

    acted = True
    while acted:
        acted = False
        for number, half in enumerate(halves):
            receive(number, half)
            chosen = player.choose(half, number)
            if chosen is not None:
                half.act(*chosen)
                acted = True
        if signals_received or time.monotonic() > dataset.next_save:
            for number, half in enumerate(halves):
                receive(number, half)
            dataset.save()
            stop_if_asked()
    dataset.save()


def collect(args: Args, path: Path, state: dict, folder: Path | None, chosen: dict) -> None:
    """Roll a checkpoint out into the dataset in folder, or only evaluate it if that is None."""
    args = fill_in(args, state["args"])
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    agent = load_agent(args, state, path).to(device)
    made_with = {
        "kind": "episodes" if args.frames else "recording",
        "collector": SCRIPT,
        **{name: getattr(args, name) for name in LEVELS},
        "args": asdict(args),
        "checkpoint": str(path),
        "checkpoint_sha256": state["sha256"],
        **{name: state[name] for name in ("script", "script_sha256", "xpid", "iteration", "global_step")},
        "test_return": state["test_return"],
        "agent_from": describe_agent_from(args),
        "device": device.type,
        **chosen,
    }
    print(f"{args.env_id}, {args.distribution_mode}, {path} -> {folder or 'evaluation only'}", flush=True)
    shown = ("steps", args.total_timesteps) if args.num_episodes is None else ("episodes", args.num_episodes)
    with Dataset(folder, args, made_with, shown) as dataset:
        if dataset.found == "complete":
            return
        # Every extension draws on seeds of its own, so that no episode is collected twice.
        seeds = np.random.SeedSequence([args.seed, dataset.segment]).generate_state(3) % MAX_LEVEL
        torch.manual_seed(int(seeds[0]))
        max_steps, num_episodes = dataset.left()
        quota = np.full(args.num_envs, MAX_LEVEL)
        if num_episodes is not None:  # the same number in each game, as the first to end would be the short ones
            quota = num_episodes // args.num_envs + (np.arange(args.num_envs) < num_episodes % args.num_envs)
        quota = [half for half in np.array_split(quota, 2) if half.any()]
        streams = [{"seed": int(seed), "num_envs": len(half)} for seed, half in zip(seeds[1:], quota)]
        kept = {"keep_frames": args.frames, "keep_tape": not args.frames} if folder else {}
        halves = [Half(stream, dataset.levels, **kept) for stream in streams]
        player = Policy(agent, quota, math.inf if max_steps is None else max_steps, device)
        dataset.begin(halves, player, dataset.segment)
        roll_out(halves, player, dataset)
        for half in halves:
            half.games.close()
    report(dataset)


class Replay:
    """Plays as a recording did. Raises Unfit where something else comes out."""

    def __init__(self, recording, segment, agent=None, compare_frames=True, last_step=math.inf):
        self.recording, self.segment = recording, segment
        self.chunks = [(0, {"actions": ()})] * 2  # (number of the first step, arrays), of each half
        self.agent, self.log_prob_error, self.last_step = agent, 0.0, last_step
        self.compared = ("rewards", "dones", "checksums") if compare_frames else ("rewards", "dones")

    def choose(self, half, number):
        first, chunk = self.chunks[number]
        if half.steps >= first + len(chunk["actions"]):
            first, chunk = self.chunks[number] = self.recording.chunk_at(half.steps, self.segment, number)
        if half.steps >= self.last_step or not len(chunk["actions"]):
            return None
        actions, log_probs = (chunk[name][half.steps - first] for name in ("actions", "log_probs"))
        playing = np.flatnonzero(actions != IDLE)
        if self.agent is not None and len(playing):
            with torch.inference_mode():
                given = torch.from_numpy(half.observed[playing]), torch.from_numpy(actions[playing].astype(np.int64))
                error = self.agent.get_action_and_value(*given)[1].numpy() - log_probs[playing]
            self.log_prob_error = max(self.log_prob_error, float(np.abs(error).max()))
        return actions, log_probs

    def learn(self, half, number, episodes):
        """Compare what the last step of a half gave with what it gave then."""
        (first, chunk), rows, half.tape = self.chunks[number], half.tape, []
        for row in rows:
            for name in self.compared:
                if not np.array_equal(row[name], chunk[name][half.steps - 1 - first]):
                    raise Unfit(f"the replay gives other {name} than recorded, first at step {half.steps - 1}", 1)

    def get_state(self):  # the games know how far they are
        return {}

    def set_state(self, state):
        pass


def render(args: Args) -> None:
    """Draw a recording into the dataset that collecting with frames would have written."""
    recording, folder = Recording(Path(args.render)), Path(args.dataset_saving_dir)
    source, rendered_by, here = recording.metadata, recording.metadata["versions"]["procgen"], versions()["procgen"]
    if rendered_by != here and not args.other_build:
        differ = f"{args.render} was recorded with {rendered_by}, whose frames differ from those of {here} here"
        fail(f"{differ}; --other-build draws it all the same", 2)
    wanted, num_steps = (0, math.inf), source["args"].get("num_steps", 0)
    if args.iterations is not None:
        wanted = ((args.iterations[0] - 1) * num_steps, args.iterations[1] * num_steps)
    lengths, recorded = recording.lengths(*wanted)
    if args.iterations is not None:
        most = recorded[0] // num_steps if num_steps else 0
        sound = 1 <= args.iterations[0] <= args.iterations[1] <= most
        require(args, sound, "iterations", f"the first and the last wanted of the {most} of the training {args.render}")
    elif not source["complete"]:
        fail(f"--render {args.render} is unfinished; finish it, or draw part of a training with --iterations", 2)
    made_with = {key: value for key, value in source.items() if key not in (*COUNTS, "before")}
    made_with |= {"kind": "episodes", "rendered_from": args.render, "iterations": args.iterations}
    made_with["rendered_steps"] = None if args.iterations else recorded  # a recording may grow
    with Dataset(folder, args, made_with, ("steps", sum(lengths)), wanted) as dataset:
        if dataset.found == "complete":
            return
        size, free = sum(lengths) * bytes_per_step(recording), shutil.disk_usage(folder).free
        size = f"about {size / 1e9:.3g} GB, of {free / 1e9:,.0f} GB that are free"
        print(f"{args.render} -> {folder}: {len(lengths):,} episodes, {sum(lengths):,} steps, {size}", flush=True)
        for number in range(dataset.segment, len(recording.segments)):
            streams = recording.segments[number]
            halves = [Half(stream, recording.levels, keep_frames=True, keep_tape=True) for stream in streams]
            player = Replay(recording, number, None, rendered_by == here, wanted[1])
            dataset.begin(halves, player, number)
            roll_out(halves, player, dataset)
            for half in halves:
                half.games.close()
    report(dataset)


# ======================================================================================================================
# No fork needs to change anything below: arguments, signals, checkpoints, files, pictures, verifying.
# ======================================================================================================================

SCRIPT = Path(__file__).name
# The games that have more modes than easy and hard. Asked for any other, Procgen's library ends the whole process.
EXTRA_MODES = {
    "extreme": ("chaser", "dodgeball", "leaper", "starpilot"),
    "memory": ("caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"),
    "exploration": ("caveflyer", "climber", "coinrun", "heist", "jumper", "leaper", "maze", "ninja"),
}
LEVELS = ("env_id", "distribution_mode", "start_level", "num_levels")
INHERITED = (*LEVELS, "seed")  # from the checkpoint unless given
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
# One dataset has one of each, also one build of Procgen: the two builds draw differently.
ONE_DATASET = (*LEVELS, "kind", "collector", "checkpoint_sha256", "agent_from", "procgen")
ONE_DATASET += ("rendered_from", "rendered_steps", "iterations")
COUNTS = ("episodes", "steps", "return_mean", "return_std", "return_min", "return_max", "episodes_sha256")
ONLY = {  # what goes with a flag that is no collection
    "render": "render dataset_saving_dir iterations other_build save_interval preview video video_path cuda".split(),
    "verify": "verify checkpoint agent_from video video_path cuda".split(),
}
NOTHING = {"episodes": 0, "steps": 0, "episodes_sha256": ""}
FRAMES_PER_SECOND = 15  # of videos, as when a person plays Procgen


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and no more than OMP_NUM_THREADS."""
    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(threads)) if threads.isdecimal() and int(threads) else cores


CORES = usable_cores()


def fail(message: str, code: int = 1) -> NoReturn:
    """End the process with one line on stderr; code 2 is for arguments, 1 for the rest."""
    print(f"{SCRIPT}: error: {message}", file=sys.stderr)
    sys.exit(code)


class Unfit(Exception):
    """A checkpoint that cannot be rolled out: the reason and the exit code, 0 if nothing is wrong with it.

    With --ratio the others go on.
    """


def require(args: Args, condition: bool, name: str, wanted: str) -> None:
    """Exit with code 2 and one line that names the flag, its value and what would be right, unless condition holds."""
    if not condition:
        fail(f"--{name.replace('_', '-')} is {getattr(args, name)!r}; it must be {wanted}", 2)


def check_args(args: Args) -> None:
    """Check what can be told without a checkpoint."""
    what = tuple(x is not None for x in (args.checkpoint, args.ratio, args.render, args.verify))
    if sum(what) != 1 and what != (True, False, False, True):
        modes = "--checkpoint FILE, --ratio R (with --env-id), --render DIR and --verify DIR (with --checkpoint or not)"
        fail(f"give one of {modes}", 2)
    if args.ratio is not None:
        require(args, 0 < args.ratio <= 1, "ratio", "above 0 and at most 1, such as 0.75")
        require(args, args.env_id is not None, "env_id", "given with --ratio")
        if args.dataset_saving_dir is not None:
            fail("--dataset-saving-dir goes with --checkpoint; with --ratio it is --ratio-dataset-dir, in each run", 2)
    if args.render is not None:
        require(args, args.dataset_saving_dir is not None, "dataset_saving_dir", "given with --render")
    mode = "render" if args.render is not None else "verify" if args.verify is not None else None
    for field in fields(args):
        belongs = field.name in ONLY[mode] if mode else field.name not in ("iterations", "other_build")
        if getattr(args, field.name) != field.default and not belongs:
            flag = field.name.replace("_", "-")
            fail(f"--{flag} has no part in " + (f"--{mode}" if mode else "a collection") + "; leave it out", 2)
    require(args, args.env_id is None or args.env_id in ENV_NAMES, "env_id", f"one of {', '.join(ENV_NAMES)}")
    require(args, args.num_envs <= 2**16, "num_envs", "at most 65536")
    require(args, 0 < args.save_interval <= 60, "save_interval", "above 0 and at most 60 seconds")
    require(args, 0 <= args.video <= 100, "video", "a number of episodes up to 100")
    suffix = Path(args.video_path or "video.mp4").suffix
    require(args, suffix in (".mp4", ".gif"), "video_path", "a file that ends in .mp4 or .gif")
    for name in ("total_timesteps", "num_episodes", "num_envs", "preview"):
        value, least = getattr(args, name), 0 if name == "preview" else 1
        require(args, value is None or value >= least, name, f"at least {least}")


def modes_of(env_id: str) -> list:
    return ["easy", "hard"] + [mode for mode, games in EXTRA_MODES.items() if env_id in games]


def fill_in(args: Args, trained: dict) -> Args:
    """The arguments with what was left out taken from the checkpoint's, and checked against each other."""
    args = replace(args, **{name: trained[name] for name in INHERITED if getattr(args, name) is None})
    require(args, args.env_id == trained["env_id"], "env_id", f"{trained['env_id']}, the game of the checkpoint")
    modes = modes_of(args.env_id)
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


def ignore_signals() -> None:
    """Once all is saved: while Python ends, it has no handlers any more, and a signal would change the exit code."""
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)


def exit_stopped() -> NoReturn:
    ignore_signals()
    sys.exit(EXIT_STOPPED)


# GAMES


def get_state(games: ProcgenGym3Env, game: int) -> bytes:
    """The state of one of the games; games.get_state() takes all of them."""
    buffer = games._ffi.new("char[]", 2**20)  # procgen.env.MAX_STATE_SIZE
    return bytes(games._ffi.buffer(buffer, games.call_c_func("get_state", game, buffer, 2**20)))


def replay(levels: dict, level_seed: int, initial_state: bytes | None, actions: np.ndarray, **options):
    """Play an episode again in a game of its own. Yields frame, reward, whether it has ended, and then Procgen's info.

    The frame is (64, 64, 3) uint8, with render_mode="rgb_array" it is (512, 512, 3).
    """
    one_level = (levels["env_id"], levels["distribution_mode"], level_seed, 1)
    game = make_games(1, *one_level, seed=0, **{"num_threads": 0, **options})
    try:
        if initial_state is not None:
            game.set_state([initial_state])
        for action in actions:
            frame = game.get_info()[0]["rgb"] if "render_mode" in options else game.observe()[1]["rgb"][0]
            frame = frame.copy()
            game.act(np.array([action], np.int32))
            rewards, _, first = game.observe()
            yield frame, rewards[0], first[0], game.get_info()[0] if first[0] else None
    finally:
        game.close()


# FILES


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


def to_npz(arrays: dict) -> bytes:
    """What np.savez_compressed writes, by libdeflate: level 4 is four times as fast as zlib's 6 on Procgen's frames.

    The zip format is https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT; the date in it is always 1980-01-01.
    """
    members, directory, offset = [], [], 0
    for key, array in arrays.items():
        file, name = io.BytesIO(), f"{key}.npy".encode()
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        content = file.getvalue() + array.tobytes()
        packed = deflate.deflate_compress(content, 4)
        version, method, date, sizes = 20, 8, 33, (deflate.crc32(content), len(packed), len(content), len(name), 0)
        header = struct.pack("<5H3I2H", version, 0, method, 0, date, *sizes)
        members += [b"PK\x03\x04", header, name, packed]
        directory += [b"PK\x01\x02", struct.pack("<H", version), header, struct.pack("<3H2I", 0, 0, 0, 0, offset), name]
        offset += 4 + len(header) + len(name) + len(packed)
    directory = b"".join(directory)
    end = struct.pack("<4H2IH", 0, 0, len(arrays), len(arrays), len(directory), offset, 0)
    return b"".join([*members, directory, b"PK\x05\x06", end])


def to_arrays(episode: dict, levels: dict) -> dict:
    """The content of an episode's file; the keys are explained in the README."""
    length, limit = len(episode["actions"]), time_limit(levels["env_id"], levels["distribution_mode"])
    observations = np.empty((length + 1, 3, 64, 64), np.uint8)
    for t, frame in enumerate(episode["frames"]):
        observations[t] = frame.transpose(2, 0, 1)
    observations[-1] = observations[-2]  # Procgen never renders the terminal frame
    last = np.arange(length) == length - 1
    arrays = {
        "observations": observations,
        "actions": episode["actions"][:, None].astype(np.int64),
        "rewards": episode["rewards"][:, None],
        "dones": last,
        "truncations": last & (length == limit) & (not episode["level_complete"]),
        "log_probs": episode["log_probs"],
        "level_complete": np.array(episode["level_complete"]),
        "level_seed": np.array(episode["level_seed"], np.int64),
    }
    if episode["initial_state"] is not None:
        arrays["initial_state"] = np.frombuffer(episode["initial_state"], np.uint8)
    return arrays


def episode_name(index: int, episode: dict) -> str:
    """The name of an episode's file but for the time."""
    episode_return = round(episode["rewards"].sum(dtype=float), 2) + 0.0  # which turns -0.0 into 0.0
    return f"{index}_{len(episode['actions'])}_{episode['level_seed']}_{episode_return:.2f}.npz"


def write_episode(folder: Path, levels: dict, index: int, episode: dict) -> None:
    """Compress and write one episode. Runs in a thread: the compressor releases the GIL."""
    name = f"{time.strftime('%Y%m%dT%H%M%S')}_{episode_name(index, episode)}"
    write_file(folder / levels["env_id"] / name, to_npz(to_arrays(episode, levels)), folder)


def list_episodes(folder: Path) -> list:
    """(index, length, level seed, return, path) of every episode of a dataset, by index."""
    matches = [(EPISODE_NAME.fullmatch(path.name), path) for path in folder.glob("*/*.npz")]
    return sorted((int(m[2]), int(m[3]), int(m[4]), float(m[5]), path) for m, path in matches if m)


def extend_sha256(sha256: str, episode: dict) -> str:
    """A hash over what was played in all episodes so far, in the order of their indices."""
    parts = [sha256.encode(), np.array([episode["level_seed"], episode["level_complete"]], np.int64)]
    parts += [episode["actions"].astype(np.uint8), episode["rewards"], episode["log_probs"]]
    return hashlib.sha256(b"".join(bytes(part) for part in parts)).hexdigest()


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint without running any code in it. Raises Unfit if it is missing, damaged or foreign."""
    if not path.is_file():
        raise Unfit(f"checkpoint {path} does not exist", 1)
    try:
        content = path.read_bytes()
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever it stumbles over
        kind = type(error).__name__
        raise Unfit(f"checkpoint {path} is damaged or holds more than plain values ({kind})", 1) from None
    try:
        trained, xpid = state["args"], state["xpid"]
        sound = state["format"] == 1 and trained["env_id"] in ENV_NAMES
        sound &= all(isinstance(state[key], str) for key in ("script", "script_sha256"))
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
    state.pop("optimizer_state_dict", None)  # large, and not played
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
        if not issubclass(module.Agent, nn.Module):
            raise TypeError("it is no torch.nn.Module")
        return module.Agent
    except Exception as error:  # whatever the file does
        fail(f"--agent-from {args.agent_from} cannot be imported, or has no class Agent ({one_line(error)})", 2)


def describe_agent_from(args: Args) -> dict | None:
    if args.agent_from is None:
        return None
    path = Path(args.agent_from)
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def agent_sha256(source: bytes) -> str:
    """Hash of the text of class Agent in a script and of everything the script defines that Agent refers to.

    Args is left out, so that its defaults may change.
    """
    text, definitions = source.decode(), {}
    for statement in ast.parse(text).body:
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
            definitions[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            definitions.update({name.id: statement for name in statement.targets if isinstance(name, ast.Name)})
    definitions.pop("Args", None)
    needed = ["Agent"]
    for name in needed:  # grows on the way
        for node in ast.walk(definitions[name]):
            if isinstance(node, ast.Name) and node.id in definitions and node.id not in needed:
                needed.append(node.id)
    segments = [ast.get_source_segment(text, definitions[name]) for name in needed]
    return hashlib.sha256("\n".join(segments).encode()).hexdigest()


def load_agent(args: Args, state: dict, path: Path) -> nn.Module:
    """The checkpoint's network. Raises Unfit unless it is known to be the one that Agent defines."""
    agent_class, source = find_agent(args), args.agent_from or AGENT_OF
    same_network = agent_sha256(Path(args.agent_from or __file__).read_bytes()) == state.get("agent_sha256")
    if not same_network or (args.agent_from is None and state["script"] != AGENT_OF):
        other_script = state["script"] != Path(source).name
        whose = f"by {state['script']}" if other_script else f"by a {source} with another network"
        way_out = "--agent-from FILE names the script whose class Agent it needs; its run folder has a copy"
        raise Unfit(f"checkpoint {path} was written {whose}: {way_out}", 2)
    if args.agent_from is not None and describe_agent_from(args)["sha256"] != state["script_sha256"]:
        print(f"note: {source} has changed since it wrote {path}, outside the text of its networks")
    try:
        agent = agent_class(SimpleNamespace(**{**state["args"], "bfloat16": False}))  # acting in float32
        agent.load_state_dict(state["model_state_dict"])
        agent.eval()  # this network has no layers to which it matters, but yours may
    except Exception as error:  # depends on what is in the file
        raise Unfit(f"checkpoint {path} does not fit the network: {one_line(error)}", 1) from None
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            _, _, _, _ = agent.get_action_and_value(torch.zeros((1, 64, 64, 3), dtype=torch.uint8))
    except Exception as error:  # it may want more than a frame
        needs = "it needs a fork of this script, whose Policy plays it"
        raise Unfit(f"the network of {path} does not play from a frame alone ({one_line(error)}): {needs}", 1) from None
    return agent


def versions() -> dict:
    procgen = importlib.metadata.packages_distributions()["procgen"][0]  # procgen or procgen-mirror
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    return {**found, "procgen": f"{procgen} {importlib.metadata.version(procgen)}"}


def read_metadata(folder: Path) -> dict:
    """metadata.json of a dataset or a recording. Exits with code 1 if it is not there, or cannot be one."""
    path = folder / "metadata.json"
    try:
        metadata = json.loads(path.read_text())
        sound = metadata["distribution_mode"] in modes_of(metadata["env_id"]) and metadata["env_id"] in ENV_NAMES
        sound &= all(type(metadata[name]) is int for name in ("start_level", "num_levels"))
        sound &= isinstance(metadata["versions"]["procgen"], str) and metadata["kind"] in ("episodes", "recording")
        streams = [stream for segment in metadata["segments"] for stream in segment["streams"]]
        sound &= all(type(stream[name]) is int for stream in streams for name in ("seed", "num_envs"))
        sound &= isinstance(metadata["args"], dict) and isinstance(metadata["complete"], bool)
        if metadata["complete"] and "num_steps" not in metadata["args"]:  # a training does not count its episodes
            sound &= all(name in metadata for name in COUNTS)
        if not sound:
            raise ValueError("it holds values that no script here writes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{path} cannot be read as that of a dataset or a recording ({one_line(error)})")
    return metadata


class Recording:
    """What a collection without frames or a training has kept: chunks of the steps of each of its vectors of games."""

    def __init__(self, folder: Path):
        self.folder, self.metadata = folder, read_metadata(folder)
        if self.metadata["kind"] != "recording":
            fail(f"{folder} is no recording, but {self.metadata['kind']}; --no-frames and --save-dataset make those")
        self.levels = {name: self.metadata[name] for name in LEVELS}
        self.segments = [segment["streams"] for segment in self.metadata["segments"]]

    def chunk_at(self, step: int, segment: int, stream: int) -> tuple:
        """Number of its first step, and arrays, of the chunk that holds a step. After the last one they are empty."""
        firsts, paths = zip(*list_chunks(self.folder, segment, stream) or [(math.inf, None)])
        number = bisect.bisect(firsts, step) - 1
        if number < 0:
            raise Unfit(f"{self.folder} has no {segment}_{stream}_{0:08d}.npz", 1)
        first, chunk = firsts[number], load_chunk(paths[number], self.segments[segment][stream]["num_envs"])
        if step < first + len(chunk["actions"]):
            return first, chunk
        if paths[number + 1 :]:
            raise Unfit(f"{self.folder} lacks the steps between {paths[number].name} and {paths[number + 1].name}", 1)
        return step, {name: array[:0] for name, array in chunk.items()}

    def lengths(self, first_step: float, last_step: float) -> tuple:
        """Lengths of the episodes that end after first_step and not after last_step; number of steps of each stream."""
        found, steps = [], []
        for segment, streams in enumerate(self.segments):
            for stream, options in enumerate(streams):
                begins, end = np.zeros(options["num_envs"], int), 0
                while len((chunk := self.chunk_at(end, segment, stream)[1])["actions"]):
                    for t, game in np.argwhere(chunk["dones"] & (chunk["actions"] != IDLE)):
                        if first_step < end + t + 1 <= last_step:
                            found.append(int(end + t + 1 - begins[game]))
                        begins[game] = end + t + 1
                    end += len(chunk["actions"])
                steps.append(end)
        return found, steps


def list_chunks(folder: Path, segment: int, stream: int) -> list:
    """(number of its first step, path) of every chunk of a recording's vector of games, in order."""
    matches = [(re.fullmatch(rf"{segment}_{stream}_(\d+)\.npz", path.name), path) for path in folder.glob("*.npz")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def load_chunk(path: Path, num_envs: int) -> dict:
    try:
        with np.load(path, allow_pickle=False) as file:
            chunk = {name: file[name] for name in ("actions", "log_probs", "rewards", "dones", "checksums")}
        shapes = {chunk[name].shape[1:] for name in chunk if name != "checksums"}
        actions, sizes = chunk["actions"], {len(array) for array in chunk.values()}
        if shapes != {(num_envs,)} or len(sizes) != 1 or actions[actions != IDLE].max(initial=0) > 14:
            raise ValueError("shapes or actions are not those of these games")
        if not (chunk["log_probs"] <= 0).all():
            raise ValueError("log_probs are above 0 or no numbers")
    except Exception as error:  # numpy and zipfile raise whatever they stumble over
        raise Unfit(f"{path} is damaged ({one_line(error)})", 1) from None
    return chunk


def bytes_per_step(recording: Recording) -> float:
    """Size of a dataset's files per step, measured on the first 200 steps of up to eight of the games."""
    chunk, num = recording.chunk_at(0, 0, 0)[1], min(8, recording.segments[0][0]["num_envs"])
    half = Half({**recording.segments[0][0], "num_envs": num}, recording.levels, keep_frames=True)
    frames = []
    for actions, log_probs in zip(chunk["actions"][:200, :num], chunk["log_probs"][:200, :num]):
        half.act(actions, log_probs)
        frames += [episode["frames"] for episode in half.receive()]
    half.games.close()
    frames = [np.stack(x).transpose(0, 3, 1, 2) for x in (*frames, *half.frames) if x]
    size = sum(len(deflate.deflate_compress(x.tobytes(), 4)) for x in frames)
    return 5 + size / sum(map(len, frames))  # 5 for all but the frames


class Dataset:
    """Episodes on disk, or in a recording: their lock, where they go on, their files. Without a folder, an evaluation.

    In a `with` block, begin() comes before roll_out(), which hands over every episode and has the rest saved.
    """

    def __init__(self, folder: Path | None, args: Args, made_with: dict, shown: tuple, wanted: tuple = (0, math.inf)):
        self.folder, self.args, self.made_with, self.wanted = folder, args, made_with, wanted
        self.levels = {name: made_with[name] for name in LEVELS}
        self.metadata = {"format": 1, "segments": [], **made_with, "versions": versions(), "complete": False}
        self.before = NOTHING
        self.found, self.segment, self.next_index, self.sha256, self.summary = "nothing", 0, 1, "", []
        self.saved, self.pending, self.films, self.pool = None, deque(), [], ThreadPoolExecutor(CORES)
        self.shown, self.next_save, self.lock = Shown(*shown), math.inf, None

    def __enter__(self):
        if self.folder is not None and (self.folder / "metadata.json").exists():
            self.read()  # whoever only asks whether it is complete needs no lock, and no disk that can be written
        if self.folder is not None and self.found != "complete":
            self.open()
        return self

    def open(self) -> None:
        """Lock the folder, and read in it where to go on."""
        if not (self.folder / "metadata.json").exists() and any(self.folder.glob("**/*.npz")):
            fail(f"{self.folder} holds episodes without a metadata.json; choose another folder", 2)
        self.lock = filelock.FileLock(self.folder / ".lock")
        on_cluster = "SLURM_JOB_ID" in os.environ  # there, whoever holds it may be about to end
        patience = LOCK_PATIENCE if on_cluster else 1  # sweep.py may be asking whether the dataset is in use
        try:
            subfolder = self.levels["env_id"] if self.metadata["kind"] == "episodes" else ""
            (self.folder / subfolder).mkdir(parents=True, exist_ok=True)
            for _ in range(patience):
                try:
                    self.lock.acquire(timeout=1)
                    break
                except filelock.Timeout:
                    stop_if_asked()
            else:
                in_use = f"{self.folder} is in use by another process, {patience} s long"
                fail(f"{in_use}; wait for it to end or choose another folder", EXIT_STOPPED if on_cluster else 1)
        except OSError as error:
            fail(f"{self.folder} cannot be written: {error.strerror}; choose another folder")
        if not (self.folder / "metadata.json").exists():
            return
        self.read()
        for leftover in self.folder.glob(".*.tmp"):  # of a write that was killed
            leftover.unlink()
        if self.found != "unfinished":
            (self.folder / "state.pt").unlink(missing_ok=True)
        elif (self.folder / "state.pt").exists():
            try:
                self.saved = torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True)
                self.segment = self.saved["segment"]
            except Exception as error:  # torch.load raises whatever it stumbles over
                fail(f"{self.folder / 'state.pt'} is damaged ({one_line(error)}); begin anew in another folder")

    def read(self) -> None:
        """Take over the metadata on disk. Exits with code 2 if they are another dataset's, or of another command."""
        found, asked = read_metadata(self.folder), json.loads(json.dumps(self.metadata))
        there, here = ({**x, "procgen": x["versions"]["procgen"]} for x in (found, asked))
        for name in ONE_DATASET:
            if there.get(name) != here.get(name):
                differs = f"whose {name} is {there.get(name)}, not {here.get(name)}"
                fail(f"{self.folder} holds a dataset {differs}; choose another folder", 2)
        rendered = self.args.render is not None
        begun_with = set() if found["complete"] else {"total_timesteps", "num_episodes", "num_envs", "seed"}
        free = set(FREE_ARGUMENTS) - begun_with
        for name in (found["args"] | asked["args"]).keys() - free if not rendered else ():
            then, now = (x["args"].get(name, "absent") for x in (found, asked))
            if then != now:
                way_out = "choose another folder" if found["complete"] else "repeat that command, as it is unfinished"
                fail(f"{self.folder} was begun with --{name.replace('_', '-')} {then}, not {now}; {way_out}", 2)
        if not found["complete"]:
            self.before, self.segment, self.found = found["before"], len(found["segments"]) - 1, "unfinished"
        else:
            self.before, self.segment, self.found = {x: found[x] for x in COUNTS}, len(found["segments"]), "extensible"
        if rendered:
            self.segment = 0
        self.metadata = {**asked, "segments": found["segments"]}
        if found.get("device") == "cuda":  # its log_probs are less precise, also if a CPU goes on
            self.metadata["device"] = "cuda"
        self.next_index, self.sha256 = self.before["episodes"] + 1, self.before["episodes_sha256"]
        if found["complete"] and (rendered or min(x for x in self.left() if x is not None) <= 0):
            self.found = "complete"
            more = "" if rendered else "; ask for more to extend it"
            more += f"; --verify {self.folder} --video {self.args.video} shows them" if self.args.video else ""
            print(f"{self.folder} is complete with {found['episodes']} episodes{more}")

    def left(self) -> tuple:
        """The steps and episodes that were missing when this segment began; None for what does not count."""
        if self.args.num_episodes is not None:
            return None, self.args.num_episodes - self.before["episodes"]
        return self.args.total_timesteps - self.before["steps"], None

    def begin(self, halves: list, player, segment: int) -> None:
        """Go on as it was saved, or begin a segment, and drop what was written since."""
        self.segment, self.halves, self.player = segment, halves, player
        if self.saved is not None:
            for half, state in zip(halves, self.saved["halves"]):
                half.set_state(state)
            player.set_state(self.saved["player"])
            self.next_index, self.sha256, self.summary = (self.saved[x] for x in ("next_index", "sha256", "summary"))
            self.saved = None
            self.shown.restore(sum(x[1] for x in self.summary), len(self.summary))
        if self.folder is None:
            return
        for index, *_, path in list_episodes(self.folder):
            if index >= self.next_index:
                path.unlink()
        for number, half in enumerate(halves):
            for first_step, path in list_chunks(self.folder, segment, number):
                if first_step >= half.steps:
                    path.unlink()
        self.metadata |= {"complete": False, "before": self.before}
        if segment == len(self.metadata["segments"]):
            self.metadata["segments"].append({"streams": [half.stream for half in halves]})
        self.save()

    def keep(self, episode: dict) -> None:
        """Take an episode that has ended: write it, in the background, if it has frames."""
        index, self.next_index = self.next_index, self.next_index + 1
        if not self.wanted[0] < episode["ended_at"] <= self.wanted[1]:
            return
        self.sha256 = extend_sha256(self.sha256, episode)
        steps, episode_return = len(episode["rewards"]), float(episode["rewards"].sum(dtype=float))
        self.summary.append((episode_return, steps, episode["level_complete"], episode["level_seed"]))
        if len(self.films) < self.args.video:
            self.films.append({**episode, "frames": None})
        if self.folder is not None and episode["frames"] is not None:
            while len(self.pending) > CORES:  # a bound on the memory that waits to be written
                self.pending.popleft().result()
            self.pending.append(self.pool.submit(write_episode, self.folder, self.levels, index, episode))
        self.shown.update(steps)

    def save(self) -> None:
        """Write all that an exact continuation needs. Called while no half has a step under way."""
        if self.folder is None:
            return
        while self.pending:
            self.pending.popleft().result()
        for number, half in enumerate(self.halves):
            if half.tape and self.metadata["kind"] == "recording":
                chunk = {name: np.stack([row[name] for row in half.tape]) for name in half.tape[0]}
                name = f"{self.segment}_{number}_{half.steps - len(half.tape):08d}.npz"
                write_file(self.folder / name, to_npz(chunk))
                half.tape.clear()
        state = {"segment": self.segment, "next_index": self.next_index, "sha256": self.sha256}
        state |= {"halves": [half.get_state() for half in self.halves], "player": self.player.get_state()}
        buffer = io.BytesIO()
        torch.save({**state, "summary": self.summary}, buffer)
        self.write_metadata()
        write_file(self.folder / "state.pt", buffer.getvalue())
        self.next_save = time.monotonic() + self.args.save_interval

    def write_metadata(self) -> None:
        self.metadata |= {**counts(self.before, self.summary), "episodes_sha256": self.sha256}
        write_file(self.folder / "metadata.json", json.dumps(self.metadata, indent=2).encode())

    def __exit__(self, kind, error, _):
        self.shown.bar.close()
        with self.pool:  # it ends when all is written that was handed over
            if kind is Stopped:
                way_out = "; the same command continues" if self.folder else ""
                print(f"stopped by {error} after {len(self.summary)} episodes{way_out}", flush=True)
                exit_stopped()
        if kind is None and self.folder is not None and self.found != "complete":
            if self.metadata["kind"] == "episodes":
                contact_sheet(self.folder, self.args.preview)
            del self.metadata["before"]
            self.metadata["complete"] = True
            self.write_metadata()
            (self.folder / "state.pt").unlink()
            self.lock.release()


def counts(before: dict, summary: list) -> dict:
    """Numbers of episodes and steps, and mean, standard deviation and range of the returns, of both together."""
    returns, number = np.array([x[0] for x in summary]), before["episodes"]
    total = {"episodes": number + len(returns), "steps": before["steps"] + sum(x[1] for x in summary)}
    if not total["episodes"]:
        return {**total, **dict.fromkeys(("return_mean", "return_std", "return_min", "return_max"))}
    mean, std, low, high = (before.get(f"return_{x}") or 0.0 for x in ("mean", "std", "min", "max"))
    sums = [number * mean + returns.sum(), number * (std**2 + mean**2) + (returns**2).sum()]
    mean, square = (float(x) / total["episodes"] for x in sums)
    ends = [*returns, low, high] if number else returns
    total |= {"return_mean": mean, "return_std": math.sqrt(max(0.0, square - mean**2))}
    return {**total, "return_min": float(min(ends)), "return_max": float(max(ends))}


class Shown:
    """How far it is, in steps or episodes: a bar on a terminal, a line every half minute in a log."""

    def __init__(self, unit: str, total: int | None):
        self.in_log = not (sys.stdout.isatty() and sys.stderr.isatty())
        self.bar = tqdm(total=total, unit=f" {unit}", unit_scale=True, smoothing=0, disable=self.in_log)
        self.unit, self.steps, self.episodes, self.steps_before = unit, 0, 0, 0
        self.start_time = self.last_line = time.time()

    def restore(self, steps: int, episodes: int) -> None:
        """What an earlier process has done."""
        self.steps = self.steps_before = steps
        self.episodes = self.bar.n = self.bar.initial = episodes
        if self.unit == "steps":
            self.bar.n = self.bar.initial = steps

    def update(self, steps: int) -> None:
        self.bar.update(steps if self.unit == "steps" else 1)
        self.steps, self.episodes = self.steps + steps, self.episodes + 1
        if self.in_log and time.time() - self.last_line > 30:
            self.last_line = time.time()
            print(f"{self.episodes:,} episodes, {self.steps:,} steps, {self.speed():.0f} steps/s", flush=True)

    def speed(self) -> float:
        return (self.steps - self.steps_before) / (time.time() - self.start_time)


def report(dataset: Dataset) -> None:
    """Print what was played, and draw the video if one is wanted."""
    if dataset.summary:
        if dataset.before["episodes"]:
            print(f"{dataset.folder} had {dataset.before['episodes']} episodes; these are new:")
        print_summary(dataset.levels, dataset.summary, dataset.shown.speed())
    if dataset.films:
        path = Path(dataset.args.video_path or (dataset.folder or Path()) / "video.mp4")
        draw_video(path, dataset.films, dataset.levels)


def print_summary(levels: dict, summary: list, speed: float) -> None:
    returns, lengths, completed, level_seeds = map(np.array, zip(*summary))
    error = returns.std(ddof=1) / math.sqrt(len(returns)) if len(returns) > 1 else math.nan
    print(f"episodes            {len(returns)}, {lengths.sum():,} steps, {speed:.0f} steps/s")
    print(f"mean return         {returns.mean():.2f} +- {error:.2f} (standard error)")
    print(f"median, min, max    {np.median(returns):.2f}, {returns.min():.2f}, {returns.max():.2f}")
    if levels["distribution_mode"] in RANGES:
        low, high = RANGES[levels["distribution_mode"]][levels["env_id"]]
        print(f"normalised return   {(returns.mean() - low) / (high - low):.3f} (0 is {low}, 1 is {high})")
    print(f"mean length         {lengths.mean():.1f}")
    print(f"levels completed    {100 * np.mean(completed):.1f} %")
    print(f"levels seen         {len(set(level_seeds))}", flush=True)


def choose_checkpoints(args: Args) -> tuple:
    """(path, state, folder, note) for every run of a game: the checkpoint nearest to ratio x the final test return.

    Returns these and the number of runs that were skipped because something in them is wrong.
    """
    root, jobs, odd = Path(args.ratio_checkpoint_dir) / args.env_id, [], 0
    trained_by = Path(args.agent_from or AGENT_OF).name
    if not root.is_dir():
        fail(f"{root} does not exist; --ratio-checkpoint-dir and --env-id say where the runs are")

    def load(run, folder):
        paths = [path for path in run.glob(f"{folder}/*.pt") if EVALUATED.fullmatch(path.name)]
        states = [(path, load_checkpoint(path)) for path in sorted(paths)]
        for path, state in states:
            if state["args"]["env_id"] != args.env_id:
                raise Unfit(f"checkpoint {path} is one of {state['args']['env_id']}", 1)
            if state["script"] != trained_by:
                way_out = f"--agent-from {state['script']} collects from the runs of that script"
                raise Unfit(f"it is a run of {state['script']}, not of {trained_by}; {way_out}", 0)
            load_agent(args, state, path)
        return [(path, state) for path, state in states if state["test_return"] is not None]

    for run in sorted(path for path in root.iterdir() if path.is_dir()):
        stop_if_asked()
        try:
            final, archived = load(run, "final"), load(run, "checkpoint") if args.ratio != 1 else []
        except Unfit as error:
            reason, code = error.args
            print(f"{run} is skipped: {reason}")
            odd += code != 0
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


# PICTURES


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


def draw_video(path: Path, episodes: list, levels: dict) -> None:
    """Replay episodes side by side in a grid, in Procgen's own large rendering; each halts at its last frame."""
    columns = math.ceil(math.sqrt(len(episodes)))
    rows, strip = math.ceil(len(episodes) / columns), 26
    size = 256 if columns < 4 and path.suffix == ".mp4" else 128
    limit = time_limit(levels["env_id"], levels["distribution_mode"])

    def pictures():
        games = [replay(levels, x["level_seed"], x["initial_state"], x["actions"], render_mode="rgb_array")
                 for x in episodes]  # fmt: skip
        sheet = Image.new("RGB", (columns * size, rows * (size + strip)))
        for t in range(max(len(x["actions"]) for x in episodes)):
            stop_if_asked()
            for i, (game, episode) in enumerate(zip(games, episodes)):
                length, corner = len(episode["actions"]), (i % columns * size, i // columns * (size + strip))
                if t >= length:
                    continue
                frame = Image.fromarray(next(game)[0]).resize((size, size), Image.Resampling.BILINEAR)
                end = "completed" if episode["level_complete"] else "time limit" if length == limit else "ended"
                caption = f"level {episode['level_seed']}\nreturn {episode['rewards'][: t + 1].sum():.2f}"
                caption += f"  {end}" if t == length - 1 else ""
                ImageDraw.Draw(sheet).rectangle((*corner, corner[0] + size, corner[1] + strip), "black")
                ImageDraw.Draw(sheet).text((corner[0] + 2, corner[1] + 1), caption)
                sheet.paste(frame, (corner[0], corner[1] + strip))
            yield sheet
        yield from [sheet] * FRAMES_PER_SECOND

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".gif":
            first, *more = (picture.quantize(64, Image.Quantize.FASTOCTREE, dither=0) for picture in pictures())
            options = {"duration": 1000 / FRAMES_PER_SECOND, "loop": 0}
            first.save(temporary, "GIF", save_all=True, append_images=more, **options)
        else:
            import av

            with av.open(str(temporary), "w", format="mp4") as file:
                stream = file.add_stream("h264", rate=FRAMES_PER_SECOND)
                stream.width, stream.height, stream.pix_fmt = columns * size, rows * (size + strip), "yuv420p"
                for picture in pictures():
                    file.mux(stream.encode(av.VideoFrame.from_image(picture)))
                file.mux(stream.encode(None))
        os.replace(temporary, path)
    except OSError as error:
        fail(f"the video {path} could not be written: {error.strerror}")
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{path}: {len(episodes)} episodes")


# VERIFYING


def read_episode(path: Path) -> dict:
    """An episode's file as keep() takes it, without its frames."""
    with np.load(path, allow_pickle=False) as file:
        episode = {key: file[key][:, 0] for key in ("actions", "rewards")} | {"log_probs": file["log_probs"]}
        episode |= {"level_seed": int(file["level_seed"]), "level_complete": bool(file["level_complete"])}
        stateful = "initial_state" in file.files
        return {**episode, "initial_state": file["initial_state"].tobytes() if stateful else None, "ended_at": 1}


def fault_in(path: Path, levels: dict, compare_frames: bool) -> str | None:
    """What is wrong with an episode's file, or None: played again in a fresh game, it must be the same, bit for bit."""
    match = EPISODE_NAME.fullmatch(path.name)
    if not match:
        return "the name is not that of an episode"
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in file.files}
        actions, level_seed, log_probs = found["actions"][:, 0], int(found["level_seed"]), found["log_probs"]
        initial_state = found["initial_state"].tobytes() if levels["env_id"] in STATEFUL_GAMES else None
        if not ((actions >= 0) & (actions < 15)).all() or not (log_probs <= 0).all():
            return "actions are not between 0 and 14, or log_probs above 0"
    except Exception as error:  # numpy and zipfile raise whatever they stumble over
        return f"the file is damaged ({one_line(error)})"
    first_level = levels["start_level"]
    above = first_level + (levels["num_levels"] or MAX_LEVEL - first_level)
    if not first_level <= level_seed < above and levels["distribution_mode"] != "exploration":
        return f"level {level_seed} is not one of the dataset's"
    frames, rewards, ends, infos = zip(*replay(levels, level_seed, initial_state, actions))
    if not ends[-1] or any(ends[:-1]):
        return f"the replay ends after {ends.index(True) + 1 if any(ends) else 'more'} steps, not {len(actions)}"
    episode = {"frames": frames, "actions": actions, "rewards": np.array(rewards), "log_probs": log_probs}
    episode |= {"level_seed": infos[-1]["prev_level_seed"], "level_complete": bool(infos[-1]["prev_level_complete"])}
    expected = to_arrays({**episode, "initial_state": initial_state}, levels)
    if expected.keys() != found.keys():
        return f"the keys differ from the format's: {sorted(expected.keys() ^ found.keys())}"
    for key, array in expected.items():
        if (found[key].shape, found[key].dtype) != (array.shape, array.dtype):
            return f"{key} is {found[key].dtype} {found[key].shape}, not {array.dtype} {array.shape}"
        if not np.array_equal(found[key], array) and (compare_frames or key != "observations"):
            where = np.argwhere(np.atleast_1d(found[key] != array))[0, 0]
            return f"the replay gives other {key}, first at step {where}"
    if path.name[16:] != episode_name(match[2], episode):
        return "the length, the level seed or the return in the name is not that of the content"
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


class Worker(threading.local):
    """For each thread that checks episodes a process, as Procgen ends the whole process where a state is damaged."""

    pool, pools = None, []  # this thread's, and those of all threads

    def fault_in(self, *arguments) -> str | None:
        if self.pool is None:  # Procgen does not survive a fork; PyTorch is loaded before it, once, as that takes long
            multiprocessing.resource_tracker.ensure_running()  # which leaves this thread's signals unblocked
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the worker inherits it: this process ends it
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["torch"])
            self.pool = ProcessPoolExecutor(1, context)
            self.pools.append(self.pool)
        try:
            return self.pool.submit(fault_in, *arguments).result()
        except BrokenProcessPool:
            self.pool = None
            return "the replay makes Procgen end its process"
        except Exception as error:  # whatever a strange value leads to
            return f"the replay failed ({one_line(error)})"

    def close(self) -> None:
        while self.pools:
            self.pools.pop().shutdown()


WORKER = Worker()


def verify(args: Args) -> int:
    """Check a dataset or a recording with all cores; print what fails. Returns the exit code."""
    folder, agent = Path(args.verify), None
    metadata = read_metadata(folder)
    if args.checkpoint is not None:
        state = load_checkpoint(Path(args.checkpoint))
        if state["sha256"] != metadata.get("checkpoint_sha256"):
            fail(f"{folder} was not collected from --checkpoint {args.checkpoint}: another file's sha256 is on record")
        agent = load_agent(args, state, Path(args.checkpoint))
    rendered_by, here = metadata["versions"]["procgen"], versions()["procgen"]
    if rendered_by != here:
        print(f"rendered by {rendered_by}, which draws some pixels unlike {here} here: all but the frames is compared")
        if agent and metadata["kind"] == "recording":  # whose frames are not the ones that the policy saw
            fail(f"--checkpoint needs the frames that {rendered_by} draws; leave it out, or verify where that is", 2)
    check = verify_recording if metadata["kind"] == "recording" else verify_episodes
    dataset, number, failed = check(args, folder, metadata, agent, rendered_by == here)
    if not metadata["complete"]:
        print("it is unfinished: metadata.json says complete: false")
    elif not failed and "episodes" in metadata:  # the recording of a training does not count its episodes
        for name, value in {**counts(NOTHING, dataset.summary), "episodes_sha256": dataset.sha256}.items():
            there, numbers = metadata[name], isinstance(value, float) and isinstance(metadata[name], float)
            if value != there and not (numbers and math.isclose(value, there, rel_tol=1e-6)):
                failed.append("metadata.json")
                print(f"{folder / 'metadata.json'}: {name} is {there} there, {value} by what was played")
    if dataset.films:
        draw_video(Path(args.video_path or folder / "video.mp4"), dataset.films, dataset.levels)
    proof = "all replayed bit for bit" if rendered_by == here else "all but the frames replayed"
    proof += f", and every log-probability is that of {args.checkpoint}" if agent else ""
    print(f"{folder}: {number} episodes checked, {len(failed)} failed" + ("" if failed else f", {proof}"))
    return 1 if failed or not number else 0


def tolerance(metadata: dict) -> float:
    return 1e-4 if metadata.get("device") == "cpu" else 0.02  # a GPU's convolutions are less precise


def verify_recording(args, folder, metadata, agent, compare_frames) -> tuple:
    """Play a recording again: every reward, end and checksum of the frames must come out the same."""
    recording, failed = Recording(folder), []
    with Dataset(None, args, metadata, ("steps", metadata.get("steps"))) as dataset:
        for number, streams in enumerate(recording.segments):
            halves = [Half(stream, recording.levels, keep_tape=True) for stream in streams]
            player = Replay(recording, number, agent, compare_frames)
            dataset.begin(halves, player, number)
            try:
                roll_out(halves, player, dataset)
            except Unfit as error:
                failed.append(number)
                print(f"{folder}, segment {number}: {error.args[0]}")
            of_training = metadata["args"].get("num_steps")
            if of_training and metadata["complete"] and not failed:
                iterations = metadata["args"]["total_timesteps"] // (of_training * halves[0].games.num)
                if halves[0].steps != iterations * of_training:
                    failed.append(number)
                    print(f"{folder}: it has {halves[0].steps} steps of each game, not {iterations * of_training}")
            if not player.log_prob_error <= tolerance(metadata):
                failed.append(number)
                error = f"up to {player.log_prob_error:.3g} from those of the checkpoint's network"
                print(f"{folder}: log_probs are {error}")
            for half in halves:
                half.games.close()
    return dataset, len(dataset.summary), failed


def verify_episodes(args, folder, metadata, agent, compare_frames) -> tuple:
    """Play every episode of a dataset again, each on its own."""
    paths, failed = sorted(folder.glob("*/*.npz")), []
    indices = [index for index, *_ in list_episodes(folder)]
    for index in sorted(set(range(indices[0], indices[-1])) - set(indices)) if indices and metadata["complete"] else ():
        print(f"episode {index} is missing")
        failed.append(index)
    if len(set(indices)) < len(indices):
        print("two episodes have the same index in their names")
        failed.append(folder)
    dataset = Dataset(None, args, metadata, ("episodes", len(paths)))
    with dataset, contextlib.closing(WORKER), ThreadPoolExecutor(CORES) as pool:
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the threads inherit it: this one is told
            futures = {pool.submit(WORKER.fault_in, path, dataset.levels, compare_frames): path for path in paths}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            for future in as_completed(futures):
                stop_if_asked()
                path, fault = futures[future], future.result()
                if agent and not fault:
                    fault = wrong_log_probs(path, agent, tolerance(metadata))
                if fault:
                    failed.append(path)
                    tqdm.write(f"{path}: {fault}")
                match = EPISODE_NAME.fullmatch(path.name)
                dataset.shown.update(int(match[3]) if match else 0)
        except Stopped:
            pool.shutdown(cancel_futures=True)
            raise
    for *_, path in list_episodes(folder) if not failed else ():
        dataset.keep(read_episode(path))
    return dataset, len(paths), failed


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    check_args(args)
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, lambda signum, _: signals_received.append(signum))
    folder, odd = args.verify or args.dataset_saving_dir, 0
    try:
        if args.verify is not None:
            sys.exit(verify(args))
        if args.render is not None:
            return render(args)
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
            try:
                collect(args, path, state, folder if args.save_dataset else None, note)
            except SystemExit as failure:  # its line has been printed; with --ratio, the others go on
                if args.ratio is None or failure.code == EXIT_STOPPED:
                    raise
                odd += 1
    except Unfit as error:
        fail(*error.args)
    except Stopped as stop:  # while nothing was played
        print(f"stopped by {stop}", flush=True)
        exit_stopped()
    except BrokenPipeError:
        fail("whoever read the output has gone")
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        fail(f"{folder} could not be written: {reason}; it is incomplete, and the same command continues it")
    ignore_signals()
    if odd:
        fail(f"{odd} runs were skipped, as something in them is wrong; the others are collected")


if __name__ == "__main__":
    main()
