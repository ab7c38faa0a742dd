"""What collect_procgen.py promises of replays: recordings, drawing, videos, --verify."""

import io
import json
import os
import resource
import shutil
import sys
import zipfile

import av
import numpy as np
import pytest
from conftest import assert_one_line, collect
from datasets import contents, die_within, episodes, metadata, verify
from PIL import Image
from runs import run_main

import collect_procgen
import ppo_procgen

# RECORDINGS


def render(source, folder, *more):
    return run_main(
        collect_procgen, ["--render", str(source), "--dataset-saving-dir", str(folder), *more], folder.parent
    )


def test_a_recording_is_small_and_drawn_gives_the_very_files_of_the_dataset(recording, dataset, tmp_path):
    assert not list(recording.glob("*/"))
    steps = metadata(recording)["steps"]
    assert sum(path.stat().st_size for path in recording.glob("*.npz")) < 6 * steps + 3000  # the headers of two files
    process = render(recording, tmp_path / "d")
    assert process.returncode == 0, process.stderr
    assert f"12 episodes, {steps:,} steps, about " in process.stdout
    assert contents(tmp_path / "d") == contents(dataset)
    for key in ("episodes_sha256", "episodes", "return_mean", "checkpoint_sha256", "segments"):
        assert metadata(tmp_path / "d")[key] == metadata(dataset)[key]
    assert verify(tmp_path / "d").returncode == 0


@pytest.mark.parametrize("env_id", ["dodgeball", "miner"])
def test_a_recording_of_a_stateful_game_that_was_extended_is_drawn_the_same(env_id, trained, tmp_path):
    checkpoint = trained(env_id)
    for number in ("1", "2"):
        for name, *more in (("direct",), ("recording", "--no-frames")):
            process = collect(tmp_path / name, checkpoint, "--num-episodes", number, *more, num_envs=2)
            assert process.returncode == 0
    assert render(tmp_path / "recording", tmp_path / "drawn").returncode == 0
    assert contents(tmp_path / "drawn") == contents(tmp_path / "direct") and len(contents(tmp_path / "drawn")) == 2


def test_a_drawing_of_a_recording_that_has_grown_is_not_taken_for_complete(starpilot, tmp_path):
    assert collect(tmp_path / "r", starpilot, "--num-episodes", "2", "--no-frames").returncode == 0
    assert render(tmp_path / "r", tmp_path / "d").returncode == 0
    assert collect(tmp_path / "r", starpilot, "--num-episodes", "3", "--no-frames").returncode == 0
    process = render(tmp_path / "r", tmp_path / "d")
    assert process.returncode == 2
    assert_one_line(process.stderr, "whose rendered_steps is")


def test_every_frame_that_is_drawn_is_compared(rollouts, tmp_path):
    """Also those of a part of a training, and those before and after a stop."""
    for row in (127, 128, 200):
        folder = tmp_path / f"r{row}"
        shutil.copytree(rollouts, folder)
        path = folder / "0_0_00000000.npz"
        chunk = dict(np.load(path))
        chunk["checksums"][row] += 1
        np.savez_compressed(path, **chunk)
        process = render(folder, tmp_path / f"d{row}", "--iterations", "1", "1")
        assert process.returncode == (1 if row < 128 else 0)
        if row < 128:
            assert_one_line(process.stderr, "other checksums than recorded, first at step 127")


def test_drawing_that_was_killed_goes_on(recording, dataset, tmp_path, monkeypatch):
    options = [recording, tmp_path / "d", "--save-interval", "0.001"]
    for name, call in (("act", 300), ("replace", 20), ("act", 500)):
        assert die_within(monkeypatch, name, call, render, *options) is None
    process = render(recording, tmp_path / "d")
    assert process.returncode == 0, process.stderr
    assert contents(tmp_path / "d") == contents(dataset)
    assert "is complete with 12 episodes" in render(recording, tmp_path / "d").stdout


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """The recording of five iterations of 128 steps of two games of leaper, begun, killed and resumed."""
    folder = tmp_path_factory.mktemp("rollouts")
    sizes = "--env-id leaper --num-envs 2 --num-steps 128 --num-minibatches 2 --update-epochs 1 --num-eval-episodes 1"
    command = [*sizes.split(), "--log-interval", "2", "--save-dataset", "--no-cuda", "--resume", "--total-timesteps"]
    for steps in ("512", "1280"):
        assert run_main(ppo_procgen, [*command, steps], folder).returncode == 0
    return next(folder.glob("models/leaper/*/rollouts"))


def test_the_recording_of_a_training_is_drawn_in_whole_or_in_part(rollouts, tmp_path):
    assert render(rollouts, tmp_path / "all").returncode == 0
    chunks = [dict(np.load(path)) for path in sorted(rollouts.glob("0_0_*.npz"))]
    actions, dones, rewards, log_probs = (
        np.concatenate([chunk[name] for chunk in chunks]) for name in ("actions", "dones", "rewards", "log_probs")
    )
    assert actions.shape == (640, 2)
    ends = [(t, game) for t, game in np.argwhere(dones)]
    found = episodes(tmp_path / "all")
    assert len(found) == len(ends) > 4
    begins, numbers = [0] * 2, {}
    for number, (t, game) in enumerate(ends, 1):
        for key, array in (("actions", actions), ("rewards", rewards)):
            assert np.array_equal(found[number][1][key][:, 0], array[begins[game] : t + 1, game])
        assert np.array_equal(found[number][1]["log_probs"], log_probs[begins[game] : t + 1, game])
        begins[game] = t + 1
        numbers.setdefault(t // 128 + 1, []).append(number)
    assert verify(tmp_path / "all").returncode == 0
    assert render(rollouts, tmp_path / "part", "--iterations", "2", "3").returncode == 0
    part = episodes(tmp_path / "part")
    assert sorted(part) == numbers.get(2, []) + numbers.get(3, [])
    assert all(part[number][0].read_bytes() == found[number][0].read_bytes() for number in part)
    assert verify(rollouts).returncode == 0 and verify(tmp_path / "part").returncode == 0


@pytest.mark.parametrize("range", [("0", "1"), ("2", "1"), ("1", "6")])
def test_iterations_that_a_recording_has_not(range, rollouts, tmp_path):
    process = render(rollouts, tmp_path / "d", "--iterations", *range)
    assert process.returncode == 2
    assert_one_line(process.stderr, "--iterations is", "of the 5 of the training")
    assert not (tmp_path / "d").exists()


def test_a_recording_of_the_other_build_is_drawn_on_purpose_only(recording, starpilot, tmp_path):
    shutil.copytree(recording, tmp_path / "r")
    found = metadata(recording)
    found["versions"]["procgen"] = "procgen-from-elsewhere 0.10.7"
    (tmp_path / "r" / "metadata.json").write_text(json.dumps(found))
    process = render(tmp_path / "r", tmp_path / "d")
    assert process.returncode == 2
    assert_one_line(process.stderr, "procgen-from-elsewhere", "--other-build")
    process = verify(tmp_path / "r", "--checkpoint", str(starpilot))
    assert process.returncode == 2
    assert_one_line(process.stderr, "--checkpoint needs the frames that procgen-from-elsewhere")
    assert render(tmp_path / "r", tmp_path / "d", "--other-build").returncode == 0
    assert metadata(tmp_path / "d")["versions"]["procgen"].startswith("procgen-mirror") or sys.version_info < (3, 11)


def change_chunk(folder, **changes):
    path = folder / "0_1_00000000.npz"
    chunk = dict(np.load(path))
    for key, change in changes.items():
        chunk[key] = change(chunk[key])
    np.savez_compressed(path, **chunk)


def add_one_at(row):
    def change(array):
        array[row] += 1
        return array

    return change


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda r: change_chunk(r, rewards=add_one_at(7)), "other rewards than recorded, first at step 7"),
        (lambda r: change_chunk(r, checksums=add_one_at(3)), "other checksums than recorded, first at step 3"),
        (lambda r: change_chunk(r, actions=lambda x: (x + 1) % 15), "than recorded"),
        (lambda r: change_chunk(r, actions=lambda x: x + 20), "0_1_00000000.npz is damaged"),
        (lambda r: change_chunk(r, log_probs=np.zeros_like), "metadata.json: episodes_sha256"),
        (lambda r: change_chunk(r, log_probs=lambda x: x * np.nan), "0_1_00000000.npz is damaged"),
        (lambda r: (r / "0_0_00000000.npz").write_bytes(b"no chunk"), "0_0_00000000.npz is damaged"),
        (lambda r: (r / "0_0_00000000.npz").unlink(), "has no 0_0_00000000.npz"),
    ],
)
def test_a_spoilt_recording_does_not_verify(spoil, message, recording, tmp_path):
    shutil.copytree(recording, tmp_path / "r")
    spoil(tmp_path / "r")
    process = run_main(collect_procgen, ["--verify", str(tmp_path / "r")], tmp_path)
    assert process.returncode == 1 and message in process.stdout, process.stdout


def test_the_recording_of_a_training_that_lacks_a_chunk_does_not_verify(rollouts, tmp_path):
    for number, message in (
        (0, "has no 0_0_00000000.npz"),
        (1, "lacks the steps between"),
        (-1, "steps of each game, not"),
    ):
        folder = tmp_path / str(number)
        shutil.copytree(rollouts, folder)
        sorted(folder.glob("*.npz"))[number].unlink()
        process = run_main(collect_procgen, ["--verify", str(folder)], tmp_path)
        assert process.returncode == 1 and message in process.stdout, process.stdout


def test_a_recording_and_its_log_probs_verify_with_the_checkpoint(recording, starpilot, tmp_path):
    options = ["--checkpoint", str(starpilot), "--verify"]
    process = run_main(collect_procgen, [*options, str(recording)], tmp_path)
    assert process.returncode == 0 and "12 episodes checked, 0 failed" in process.stdout, process.stdout
    shutil.copytree(recording, tmp_path / "r")
    change_chunk(tmp_path / "r", log_probs=lambda x: x - 0.01)
    process = run_main(collect_procgen, [*options, str(tmp_path / "r")], tmp_path)
    assert process.returncode == 1 and "from those of the checkpoint's network" in process.stdout


def test_a_recording_and_a_dataset_do_not_share_a_folder(recording, dataset, starpilot):
    for folder, option in ((recording, "--frames"), (dataset, "--no-frames")):
        process = collect(folder, starpilot, "--num-episodes", "12", option)
        assert process.returncode == 2
        assert_one_line(process.stderr, "whose kind is")


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


def test_memory_is_taken_as_far_as_episodes_reach(starpilot, tmp_path):
    """A thousand games of bigfish, whose episodes may take 6,000 steps, are 75 GB of frames."""
    levels = {"env_id": "bigfish", "distribution_mode": "easy", "start_level": 0, "num_levels": 200}
    half = collect_procgen.Half({"seed": 0, "num_envs": 1024}, levels, keep_frames=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        half.act(np.zeros(1024, np.uint8), np.zeros(1024, np.float32))
        half.receive()
    assert sum(map(len, half.frames)) <= 3 * 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KB
    half.games.close()


@pytest.mark.parametrize("cores, threads, expected", [(8, "", 8), (8, "3", 3), (2, "16", 2), (4, "nonsense", 4)])
def test_the_cores_that_a_process_may_use(cores, threads, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert collect_procgen.usable_cores() == expected


# VIDEOS


@pytest.mark.parametrize("source", ["checkpoint", "dataset", "recording", "render"])
def test_a_video_shows_episodes_side_by_side(source, starpilot, dataset, recording, tmp_path):
    path = tmp_path / "v.mp4"
    options = {
        "checkpoint": ["--checkpoint", str(starpilot), *"--no-save-dataset --num-episodes 4 --num-envs 4".split()],
        "dataset": ["--verify", str(dataset)],
        "recording": ["--verify", str(recording)],
        "render": ["--render", str(recording), "--dataset-saving-dir", str(tmp_path / "d")],
    }[source]
    process = run_main(collect_procgen, [*options, "--video", "4", "--video-path", str(path), "--no-cuda"], tmp_path)
    assert process.returncode == 0, process.stderr
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert frames[0].shape == (2 * (256 + 26), 2 * 256, 3)
    if source != "checkpoint":
        shown = [episode for _, episode in list(episodes(dataset).values())[:4]]
        assert len(frames) == max(len(episode["dones"]) for episode in shown) + 15
        small = frames[0][26 : 26 + 256].reshape(64, 4, 2, 64, 4, 3).mean(axis=(1, 4)).swapaxes(0, 1)  # halves to 64x64
        for picture, episode in zip(small, shown):
            difference = picture - episode["observations"][0].transpose(1, 2, 0)
            assert np.abs(difference).mean() < 20  # the large rendering is not the small one enlarged


def test_a_moving_picture_for_a_web_page(dataset, tmp_path):
    options = ["--verify", str(dataset), "--video", "1", "--video-path", str(tmp_path / "v.gif")]
    assert run_main(collect_procgen, options, tmp_path).returncode == 0
    with Image.open(tmp_path / "v.gif") as picture:
        assert picture.size == (128, 128 + 26) and picture.n_frames > 10 and picture.info["loop"] == 0
