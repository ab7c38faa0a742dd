"""What collect_procgen.py promises of recordings: drawing, videos, and policies besides a checkpoint."""

import hashlib
import io
import itertools
import json
import resource
import shutil
import zipfile
import zlib

import av
import numpy as np
import pytest
import torch
from conftest import assert_one_line, collect
from datasets import add_one_at, change_chunk, contents, die_within, episodes, metadata, rows, verify
from PIL import Image
from runs import ROOT, run_main

import collect_procgen
import ppo_procgen

# RECORDINGS


def render(folder, *more):
    return run_main(collect_procgen, ["--render", str(folder), *more], folder.parent)


@pytest.fixture
def copied(recording, tmp_path):
    shutil.copytree(recording, tmp_path / "r")
    return tmp_path / "r"


def test_a_recording_is_small_and_drawn_gives_the_very_files_of_the_dataset(copied, dataset):
    assert not list(copied.glob("*/"))
    steps = metadata(copied)["steps"]
    assert sum(path.stat().st_size for path in copied.glob("*.npz")) < 6 * steps + 1500  # the headers of a file
    process = render(copied)
    assert process.returncode == 0, process.stderr
    assert contents(copied) == contents(dataset)
    for key in ("log_probs_sha256", "episodes", "return_mean", "checkpoint_sha256", "segments"):
        assert metadata(copied)[key] == metadata(dataset)[key]
    assert verify(copied).returncode == 0
    assert (copied / "preview.png").read_bytes() == (dataset / "preview.png").read_bytes()
    assert "is complete with 12 episodes" in render(copied).stdout


def test_the_view_may_be_deleted_and_drawn_again_by_either_command(copied, dataset, starpilot):
    for name in ("r", "r/"):  # a slash more names the same folder
        assert run_main(collect_procgen, ["--render", name], copied.parent).returncode == 0
        shutil.rmtree(copied / "starpilot")
        assert verify(copied).returncode == 0
    assert collect(copied, starpilot, "--num-episodes", "12").returncode == 0
    assert contents(copied) == contents(dataset)
    for index in (1, 7):
        episodes(copied)[index][0].unlink()
    assert render(copied).returncode == 0 and contents(copied) == contents(dataset)


def test_a_complete_dataset_whose_view_is_being_drawn_again_stays_complete(copied, starpilot, monkeypatch):
    before = (copied / "metadata.json").read_bytes()
    options = [copied, starpilot, "--num-episodes", "12", "--save-interval", "0.001"]
    assert die_within(monkeypatch, "act", 150, collect, *options) is None
    assert 0 < len(contents(copied)) < 12 and (copied / "metadata.json").read_bytes() == before


@pytest.mark.parametrize("env_id", ["dodgeball", "miner"])
def test_a_recording_of_a_stateful_game_that_was_extended_is_drawn_the_same(env_id, trained, tmp_path):
    """In these two games a level seed and the actions do not decide how an episode goes."""
    checkpoint = trained(env_id)
    for number in ("1", "2"):
        for name, *more in (("direct",), ("recording", "--no-frames")):
            process = collect(tmp_path / name, checkpoint, "--num-episodes", number, *more, num_envs=2)
            assert process.returncode == 0
    assert render(tmp_path / "recording").returncode == 0
    assert contents(tmp_path / "recording") == contents(tmp_path / "direct") and len(contents(tmp_path / "direct")) == 2


def test_the_recording_in_the_repository_is_whole_and_begins_as_it_says():
    folder = ROOT / "tests" / "recordings" / "coinrun"
    assert sum(path.stat().st_size for path in folder.glob("*.npz")) < 4_400_000
    recording = collect_procgen.Recording(collect_procgen.Args(), folder)
    recording.read()
    found = metadata(folder)
    assert found["complete"] and found["steps"] == recording.recorded["steps"] > 1_000_000
    assert found["checkpoint_sha256"] in {
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (ROOT / "tests" / "reference_runs").glob("coinrun*.pt")
    }
    first_rows = itertools.islice(recording.read_rows(0), 100)
    for row, recorded, _ in collect_procgen.play(recording.levels, found["segments"][0], first_rows):
        recording.compare(row, recorded)
        recording.rows += 1
    assert recording.rows == 100


def test_every_frame_that_is_drawn_is_compared(rollouts, tmp_path):
    """Also those of a part of a training, and those before and after a stop."""
    for row in (127, 128, 200):
        folder = tmp_path / f"r{row}"
        shutil.copytree(rollouts, folder)
        change_chunk(folder, checksums=add_one_at(row))
        process = render(folder, "--iterations", "1", "1")
        assert process.returncode == (1 if row < 128 else 0)
        if row < 128:
            assert_one_line(process.stderr, "other checksums than recorded, first at step 127")


def test_drawing_that_was_killed_continues(copied, dataset, monkeypatch):
    options = [copied, "--save-interval", "0.001"]
    (copied / ".0_00000128.npz.tmp").touch()  # of a training that still runs
    for name, call in (("act", 100), ("replace", 5), ("act", 150)):
        assert die_within(monkeypatch, name, call, render, *options) is None
    assert 1 < len(contents(copied)) < 12
    process = render(copied)
    assert process.returncode == 0, process.stderr
    assert contents(copied) == contents(dataset)
    assert [path.name for path in copied.glob(".*.tmp")] == [".0_00000128.npz.tmp"]


def test_the_episodes_that_have_ended_in_an_unfinished_collection_are_drawn(dataset, starpilot, tmp_path, monkeypatch):
    options = [tmp_path / "r", starpilot, "--num-episodes", "12"]
    assert die_within(monkeypatch, "act", 250, collect, *options, "--no-frames", "--save-interval", "0.01") is None
    assert render(tmp_path / "r").returncode == 0
    drawn = contents(tmp_path / "r")
    assert 0 < len(drawn) < 12 and drawn.items() <= contents(dataset).items()
    assert metadata(tmp_path / "r")["complete"] is False and not (tmp_path / "r" / "README.md").exists()
    assert collect(*options).returncode == 0
    assert contents(tmp_path / "r") == contents(dataset)


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """The recording of five iterations of 128 steps of two environments of leaper, begun, finished and resumed."""
    folder = tmp_path_factory.mktemp("rollouts")
    sizes = "--env-id leaper --num-envs 2 --num-steps 128 --num-minibatches 2 --update-epochs 1 --num-eval-episodes 1"
    command = [*sizes.split(), "--log-interval", "2", "--save-dataset", "--no-cuda", "--resume", "--total-timesteps"]
    for steps in ("512", "1280"):
        assert run_main(ppo_procgen, [*command, steps], folder).returncode == 0
    return next(folder.glob("models/leaper/*/rollouts"))


def test_the_recording_of_a_training_is_drawn_in_whole_or_in_part(rollouts, tmp_path):
    for name in ("all", "part"):
        shutil.copytree(rollouts, tmp_path / name)
    assert render(tmp_path / "all").returncode == 0
    played = rows(rollouts)
    assert played["actions"].shape == (640, 2)
    found = episodes(tmp_path / "all")
    ends = np.argwhere(played["dones"])
    assert len(found) == len(ends) > 4
    begins, numbers = [0] * 2, {}
    for number, (t, env) in enumerate(ends, 1):
        for key in ("actions", "rewards"):
            assert np.array_equal(found[number][1][key][:, 0], played[key][begins[env] : t + 1, env])
        assert np.array_equal(found[number][1]["log_probs"], played["log_probs"][begins[env] : t + 1, env])
        begins[env] = t + 1
        numbers.setdefault(t // 128 + 1, []).append(number)
    assert render(tmp_path / "part", "--iterations", "2", "3").returncode == 0
    part = episodes(tmp_path / "part")
    assert sorted(part) == numbers.get(2, []) + numbers.get(3, [])
    assert contents(tmp_path / "part").items() <= contents(tmp_path / "all").items()
    for folder in (rollouts, tmp_path / "all", tmp_path / "part"):
        process = verify(folder)
        assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("range", [("0", "1"), ("2", "1"), ("1", "6")])
def test_iterations_that_a_recording_has_not(range, rollouts):
    process = render(rollouts, "--iterations", *range)
    assert process.returncode == 2
    assert_one_line(process.stderr, "--iterations is", "it must be")
    assert not (rollouts / "leaper").exists()


def test_the_recording_of_a_collection_has_no_iterations(copied):
    process = render(copied, "--iterations", "1", "1")
    assert process.returncode == 2
    assert_one_line(process.stderr, "--iterations is (1, 1); it must be left out")


def test_a_recording_of_the_other_build_is_not_drawn(copied, starpilot):
    found = metadata(copied)
    found["versions"]["procgen"] = "procgen-from-elsewhere 0.10.7"
    (copied / "metadata.json").write_text(json.dumps(found))
    process = render(copied)
    assert process.returncode == 2
    assert_one_line(process.stderr, "was recorded by procgen-from-elsewhere")
    process = verify(copied, "--checkpoint", str(starpilot))
    assert process.returncode == 2
    assert_one_line(process.stderr, "--checkpoint needs the frames of procgen-from-elsewhere")


def test_a_packed_file_is_what_numpy_writes():
    arrays = {"a": np.arange(12, dtype=np.uint8).reshape(3, 4), "b": np.array(True), "c": np.zeros((0, 2), np.float32)}
    packed, plain = io.BytesIO(collect_procgen.to_npz(arrays)), io.BytesIO()
    np.savez_compressed(plain, **arrays)
    with zipfile.ZipFile(packed) as ours, zipfile.ZipFile(plain) as numpys:
        assert ours.testzip() is None and ours.namelist() == numpys.namelist()
        for one, other in zip(ours.infolist(), numpys.infolist()):
            assert (one.CRC, one.file_size, one.compress_type) == (other.CRC, other.file_size, other.compress_type)
            assert ours.read(one) == numpys.read(other)
    packed.seek(0)
    with np.load(packed, allow_pickle=False) as file:
        assert all(np.array_equal(file[key], array) for key, array in arrays.items())


def test_memory_is_taken_as_far_as_episodes_reach():
    """A thousand environments of bigfish, whose episodes may take 6,000 steps, are 75 GB of frames."""
    levels = {"env_id": "bigfish", "distribution_mode": "easy", "start_level": 0, "num_levels": 200}
    segment, policy = {"seed": 0, "num_envs": 1024}, collect_procgen.RandomPolicy()
    steps = collect_procgen.play(levels, segment, policy=policy, keep_frames=True)
    next(steps)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        next(steps)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


# POLICIES BESIDES A CHECKPOINT


def test_random_actions_need_no_checkpoint(tmp_path):
    options = "--random --env-id miner --num-episodes 4 --num-envs 4 --num-levels 3 --start-level 7".split()
    assert run_main(collect_procgen, options, tmp_path).returncode == 0
    folder = tmp_path / "datasets" / "miner" / "random"
    actions = np.concatenate([episode["actions"] for _, episode in episodes(folder).values()])
    expected = len(actions) / 15
    assert np.abs(np.bincount(actions[:, 0], minlength=15) - expected).max() < 5 * expected**0.5
    for _, episode in episodes(folder).values():
        assert np.allclose(episode["log_probs"], -np.log(15)) and episode["level_seed"] in (7, 8, 9)
    found = metadata(folder)
    assert found["checkpoint_sha256"] is None and "uniformly random actions" in (folder / "README.md").read_text()
    assert verify(folder).returncode == 0
    change_chunk(folder, log_probs=lambda x: np.where(x < 0, x - np.float32(0.01), x))
    process = verify(folder)
    assert process.returncode == 1 and "log_probs are up to 0.01 from those of the policy" in process.stdout


def test_epsilon_mixes_random_actions_into_a_policy(starpilot, tmp_path):
    """A checkpoint whose policy nearly always takes action 7, so that the others are those of epsilon."""
    state = torch.load(starpilot, weights_only=True)
    weights = state["model_state_dict"]
    weights["actor.weight"].zero_()
    weights["actor.bias"][:] = -20.0
    weights["actor.bias"][7] = 0.0
    torch.save(state, tmp_path / "seven.pt")
    options = ["--num-episodes", "12", "--epsilon", "0.3"]
    assert collect(tmp_path / "d", tmp_path / "seven.pt", *options).returncode == 0
    found = [episode for _, episode in episodes(tmp_path / "d").values()]
    actions = np.concatenate([episode["actions"][:, 0] for episode in found])
    others, n = (actions != 7).mean(), len(actions)
    assert abs(others - 0.28) < 5 * (0.28 * 0.72 / n) ** 0.5 and len(np.unique(actions)) > 10
    log_probs = np.concatenate([episode["log_probs"] for episode in found])
    assert np.allclose(log_probs, np.where(actions == 7, np.log(0.7 + 0.02), np.log(0.02)), atol=1e-4)
    process = verify(tmp_path / "d", "--checkpoint", str(tmp_path / "seven.pt"))
    assert process.returncode == 0, process.stdout
    assert "but each action is uniformly random with probability 0.3" in (tmp_path / "d" / "README.md").read_text()


# VIDEOS


def frames_of(path):
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


@pytest.mark.parametrize("source", ["checkpoint", "dataset", "recording", "render"])
def test_a_video_shows_episodes_side_by_side(source, starpilot, dataset, copied, tmp_path):
    path = tmp_path / "v.mp4"
    options = {
        "checkpoint": ["--checkpoint", str(starpilot), *"--no-save-dataset --num-episodes 4 --num-envs 4".split()],
        "dataset": ["--verify", str(dataset)],
        "recording": ["--verify", str(copied)],
        "render": ["--render", str(copied)],
    }[source]
    process = run_main(collect_procgen, [*options, "--video", "4", "--video-path", str(path), "--no-cuda"], tmp_path)
    assert process.returncode == 0, process.stderr
    frames = frames_of(path)
    assert frames[0].shape == (2 * (256 + 26), 2 * 256, 3)
    if source != "checkpoint":
        played = rows(copied)
        ends = played["dones"].argmax(axis=0)  # of the first episode of each environment
        assert len(frames) == ends.max() + 1 + 15
        firsts = {}
        for _, episode in episodes(dataset).values():
            for env in range(4):
                if np.array_equal(episode["actions"][:, 0], played["actions"][: ends[env] + 1, env]):
                    firsts[env] = episode["observations"][0].transpose(1, 2, 0)
        for env, shown in firsts.items():
            top, left = env // 2 * 282 + 26, env % 2 * 256
            small = frames[0][top : top + 256, left : left + 256].reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
            assert np.abs(small - shown).mean() < 20  # the large rendering is not the small one enlarged
        assert len(firsts) == 4


def test_a_moving_picture_for_a_web_page(dataset, tmp_path):
    options = ["--verify", str(dataset), "--video", "1", "--video-path", str(tmp_path / "v.gif")]
    assert run_main(collect_procgen, options, tmp_path).returncode == 0
    with Image.open(tmp_path / "v.gif") as picture:
        assert picture.size == (128, 128 + 26) and picture.n_frames > 10 and picture.info["loop"] == 0


def test_more_videos_than_episodes_is_told(starpilot, tmp_path):
    options = "--no-save-dataset --num-episodes 2 --video 9 --no-cuda".split()
    process = run_main(collect_procgen, ["--checkpoint", str(starpilot), *options], tmp_path)
    assert process.returncode == 0 and "note: --video 9 shows 2 episodes" in process.stdout
    assert "video.mp4: 2 episodes side by side" in process.stdout


def test_a_collection_that_was_killed_and_continued_makes_its_video(starpilot, tmp_path, monkeypatch):
    options = [starpilot, "--num-episodes", "4", "--video", "4"]
    assert collect(tmp_path / "whole", *options).returncode == 0
    assert die_within(monkeypatch, "act", 60, collect, tmp_path / "killed", *options, "--save-interval", "0.01") is None
    assert collect(tmp_path / "killed", *options).returncode == 0
    assert np.array_equal(frames_of(tmp_path / "killed" / "video.mp4"), frames_of(tmp_path / "whole" / "video.mp4"))


def test_a_video_of_a_complete_dataset_that_cannot_be_written_does_not_call_it_incomplete(dataset, starpilot):
    process = collect(dataset, starpilot, "--num-episodes", "12", "--video", "1", "--video-path", "/proc/v.mp4")
    assert process.returncode == 1 and "is complete with 12 episodes" in process.stdout
    assert_one_line(process.stderr, "the video /proc/v.mp4 could not be written")


# Another build of Procgen, or another game, may show otherwise what only more environments are shown here.
@pytest.mark.parametrize("env_id", collect_procgen.ENV_NAMES)
def test_an_environment_does_not_depend_on_how_many_there_are(env_id):
    """So the first columns of a recording are enough for a video, in all sixteen games."""
    actions = np.random.default_rng(0).integers(15, size=(300, 8), dtype=np.int32)
    shown = {}
    for num in (8, 2):
        envs = collect_procgen.make_envs(num, env_id, "easy", 0, 200, seed=3)
        checksums = []
        for row in actions:
            rewards, frames, first = envs.observe()
            checksums.append([(zlib.crc32(frames["rgb"][i]), rewards[i], first[i]) for i in range(2)])
            envs.act(row[:num])
        envs.close()
        shown[num] = checksums
    assert shown[8] == shown[2]
