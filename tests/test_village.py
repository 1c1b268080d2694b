"""The village in examples/: a frame of it, looked at, and its save game."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tinyllama
from tinyllama.errors import FormatError

pygame = pytest.importorskip("pygame")
FOLDER = Path(__file__).parent.parent / "examples" / "village"


@pytest.fixture(scope="module")
def world_module():
    sys.path.insert(0, str(FOLDER))
    try:
        import world

        yield world
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def model():
    return tinyllama.load(n_threads=1, kv_dtype="int8")


def test_a_frame_of_it(tmp_path):
    screenshot, report = tmp_path / "frame.png", tmp_path / "report.json"
    command = [sys.executable, str(FOLDER / "village.py"), "--seconds", "4", "--pause", "9"]
    command += ["--screenshot", str(screenshot), "--report", str(report)]
    environment = {**os.environ, "SDL_VIDEODRIVER": "dummy"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    figures = json.loads(report.read_text())
    assert figures["villagers"] == 32
    assert figures["frames"] > 60
    assert figures["tokens_per_second"] > 30
    assert 5_000 < figures["save_bytes"] < 60_000
    frame = pygame.image.load(str(screenshot))
    assert frame.get_size() == (1280, 720)
    paper = pygame.mask.from_threshold(frame, (255, 252, 240), (6, 6, 6))
    bubbles = [mask for mask in paper.connected_components(minimum=400)]
    assert len(bubbles) >= 12, "everybody talks"
    # A bubble has words on it, and the line above the village has figures.
    assert all(mask.count() < 0.98 * _area(mask) for mask in bubbles)
    assert paper.get_at((14, 10)) or paper.get_at((12, 20))
    grass = pygame.mask.from_threshold(frame, (126, 176, 92), (6, 6, 6))
    assert grass.count() > 200_000


def _area(mask):
    bounds = mask.get_bounding_rects()[0]
    return bounds.width * bounds.height


def run(world, n_said):
    """Until every villager has said so much; what each said, in its order."""
    for _ in range(20_000):
        world.update(0.5, 5.0)
        said = {v.name: [] for v in world.villagers}
        for name, text in world.transcript:
            said[name].append(text)
        if min(len(texts) for texts in said.values()) >= n_said:
            return {name: texts[:n_said] for name, texts in said.items()}
    raise AssertionError("the village fell silent")


def test_a_saved_village_goes_on_where_it_was(world_module, model):
    world = world_module.World(model, 6, pause=0.5)
    for _ in range(5):
        world.update(0.1, 0.4)
    assert any(v.request is not None for v in world.villagers), "in the middle of a word"
    data = world.save()
    again = world_module.World(model, 2)
    again.pause = 0.5
    again.load(data)
    bubbles = [v.bubble for v in again.villagers]
    assert bubbles == [v.bubble for v in world.villagers]
    world.transcript.clear()
    assert run(world, 5) == run(again, 5)
    actions = set(world_module.ACTIONS)
    assert actions & {text for _, text in world.transcript}, "they decide as well"


def test_a_village_of_another_model_is_refused(world_module, model):
    data = world_module.World(model, 2).save()
    other = tinyllama.load(n_threads=1, dtype="f32")
    world = world_module.World(other, 2)
    with pytest.raises(FormatError, match="another model"):
        world.load(data)


def test_days_are_forgotten_but_not_the_scene(world_module, model):
    short = tinyllama.load(n_threads=1, kv_dtype="int8", max_seq_len=200)
    world = world_module.World(short, 3, pause=0.0)
    run(world, 12)
    n_scene = len(short.tokenizer.encode(world_module.SCENE))
    for villager in world.villagers:
        scene = villager.session.model.tokenizer.encode(world_module.SCENE)
        tokens = villager.request.session if villager.request else villager.session
        assert tokens.tokens[:n_scene] == scene
