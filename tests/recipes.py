"""How other libraries load a dataset: copy the function that you need. `episodes` are dicts of arrays (see README.md).

python tests/recipes.py DATASET    # behaviour cloning on up to 1,000 episodes of a dataset, as a first look
"""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np


def draw_episodes(folder):
    """Yield the episodes of a recording, drawn on the way, in the order in which they ended."""
    import collect_procgen as collector  # in the project's folder

    recording = collector.Recording(collector.Args(), Path(folder))
    recording.read()
    for number, segment in enumerate(recording.metadata["segments"]):
        rows = recording.read_rows(number)
        for row, recorded, ended in collector.play(recording.levels, segment, rows, keep_frames=True):
            if row["checksums"] != recorded["checksums"]:
                raise ValueError("other frames than recorded: another build of Procgen?")
            for episode in ended:
                yield collector.to_arrays(episode, recording.levels)


def terminals_of(episodes):
    """Ends that are no time limits, an array (T,) bool for each episode."""
    return [episode["dones"] & ~episode["truncations"] for episode in episodes]


def to_d3rlpy(episodes):
    """A dataset of https://github.com/takuseno/d3rlpy. Run with version 2.8.1."""
    import d3rlpy

    return d3rlpy.dataset.MDPDataset(
        observations=np.concatenate([x["observations"][:-1] for x in episodes]),
        actions=np.concatenate([x["actions"] for x in episodes]),
        rewards=np.concatenate([x["rewards"] for x in episodes]),
        terminals=np.concatenate(terminals_of(episodes)).astype(np.float32),
        timeouts=np.concatenate([x["truncations"] for x in episodes]).astype(np.float32),
        action_space=d3rlpy.constants.ActionSpace.DISCRETE,
        action_size=15,
    )


def to_minari(episodes, dataset_id="procgen/coinrun/ppo-v0"):
    """A dataset of https://github.com/Farama-Foundation/Minari. Run with 0.5.4, which stores channels-last as JPEG."""
    import minari
    from gymnasium.spaces import Box, Discrete
    from minari.data_collector import EpisodeBuffer

    buffers = []
    for number, (episode, terminals) in enumerate(zip(episodes, terminals_of(episodes))):
        buffer = EpisodeBuffer(
            id=number,
            seed=int(episode["level_seed"]),
            observations=list(episode["observations"]),
            actions=list(episode["actions"][:, 0]),
            rewards=list(episode["rewards"][:, 0]),
            terminations=list(terminals),
            truncations=list(episode["truncations"]),
        )
        buffers.append(buffer)
    observation_space = Box(0, 255, (3, 64, 64), np.uint8)
    return minari.create_dataset_from_buffers(
        dataset_id, buffers, observation_space=observation_space, action_space=Discrete(15)
    )


def to_torchrl(episodes, window=16, batch_size=256):
    """A replay buffer of https://github.com/pytorch/rl that samples windows within an episode. Run with 0.14.1."""
    import torch
    from tensordict import TensorDict
    from torchrl.data import LazyMemmapStorage, SliceSampler, TensorDictReplayBuffer

    steps = sum(len(episode["actions"]) for episode in episodes)
    sampler = SliceSampler(slice_len=window, traj_key="episode", strict_length=False)
    buffer = TensorDictReplayBuffer(storage=LazyMemmapStorage(steps), sampler=sampler, batch_size=batch_size)
    for number, (episode, terminals) in enumerate(zip(episodes, terminals_of(episodes))):
        length = len(episode["actions"])
        observations = episode["observations"]
        transitions = TensorDict({"observation": observations[:-1], "action": episode["actions"][:, 0]}, [length])
        transitions["next"] = TensorDict({"observation": observations[1:], "reward": episode["rewards"]}, [length])
        transitions["next", "done"] = torch.from_numpy(episode["dones"])[:, None]
        transitions["next", "terminated"] = torch.from_numpy(terminals)[:, None]
        transitions["episode"] = torch.full([length], number)
        buffer.extend(transitions)
    return buffer


def clone_behaviour(episodes, steps=300):
    """Train the network on the actions of a dataset. Returns the last loss.

    With much data it nears the policy's entropy; with little it falls below, as the network learns the data by heart.
    """
    import torch
    import torch.nn.functional as F

    from collect_procgen import Agent  # in the project's folder

    frames = np.concatenate([x["observations"][:-1] for x in episodes])
    obs = torch.from_numpy(frames).permute(0, 2, 3, 1)
    actions = torch.from_numpy(np.concatenate([x["actions"][:, 0] for x in episodes]))
    agent = Agent(SimpleNamespace(hidden_size=256, bfloat16=False))
    optimizer = torch.optim.Adam(agent.parameters(), lr=5e-4)
    for _ in range(steps):
        batch = torch.randint(len(obs), (256,))
        logits, _ = agent(obs[batch])
        loss = F.cross_entropy(logits, actions[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    episodes = []
    for path in itertools.islice(sorted(Path(sys.argv[1]).glob("*/*.npz")), 1000):
        with np.load(path) as file:
            episodes.append(dict(file))
    entropy = -np.concatenate([x["log_probs"] for x in episodes]).mean()
    loss = clone_behaviour(episodes)
    print(f"loss {loss:.3f} after 300 steps; the policy's entropy is {entropy:.3f}, that of random actions 2.708")


if __name__ == "__main__":
    main()
