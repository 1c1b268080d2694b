"""The village without its pictures: who is where, who says what, and what they do next.

Thirty-two villagers speak at once. Each has a session of its own: first it says something, word by
word as the model makes it, then it decides on one of a few actions, walks there, and speaks again.
All of it happens in :meth:`World.update`, once a frame, within a budget of milliseconds.
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass, field

import tinyllama

WIDTH, HEIGHT = 1280, 720
NAMES = [
    *("Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Sue"),
    *("Tim", "Lucy", "Jack", "Amy", "Bob", "Ella", "Leo", "Kate"),
    *("Dan", "Rose", "Joe", "Nina", "Pete", "Jane", "Fred", "Zoe"),
    *("Mark", "Emma", "Bill", "Sara", "Nick", "Ruby", "Paul", "Daisy"),
]
SCENE = (
    "Once upon a time there was a little village by a river. It had a well, a big apple tree and a"
    " shop with cakes. Everybody in the village liked to talk and play."
)
# What a villager may decide, and where it goes then.
ACTIONS = {
    " swim in the river.": (1090, 560),
    " sit by the well.": (640, 380),
    " eat an apple.": (250, 220),
    " buy a cake.": (930, 190),
    " go home.": None,
}
SPEED = 90.0  # pixels per second
SPEECH = {"max_new_tokens": 28, "stop": ['"', "\n"], "temperature": 0.8, "top_k": 40}


@dataclass
class Villager:
    """One character: where it is, and the session it speaks from."""

    name: str
    home: tuple[float, float]
    session: tinyllama.Session
    position: list[float] = field(default_factory=list)
    goal: tuple[float, float] = (0.0, 0.0)
    request: tinyllama.Request | None = None
    deciding: bool = False
    bubble: str = ""
    wait: float = 0.0  # seconds before it does the next thing
    n_scene: int = 0  # tokens that it never forgets

    def at_goal(self) -> bool:
        return math.dist(self.position, self.goal) < 1

    def walk(self, seconds: float) -> None:
        left = math.dist(self.position, self.goal)
        part = 1.0 if left <= SPEED * seconds else SPEED * seconds / left
        for axis in range(2):
            self.position[axis] += part * (self.goal[axis] - self.position[axis])


class World:
    """The villagers, and the scheduler that lets them speak."""

    def __init__(
        self, model: tinyllama.Model, n_villagers: int = 32, pause: float = 2.0, seed: int = 1
    ) -> None:
        self.model = model
        self.pause = pause  # seconds that a bubble stays once it is complete
        self.transcript: list[tuple[str, str]] = []  # (name, what it said or decided)
        self._open(n_villagers)
        scene = model.session(seed)
        scene.feed(SCENE)  # read once: the villagers share what came of it
        for i in range(n_villagers):
            home = _home(i, n_villagers)
            villager = Villager(NAMES[i % len(NAMES)], home, scene.fork(seed + 1 + i))
            villager.n_scene = villager.session.n_tokens
            villager.position, villager.goal = list(home), home
            villager.wait = 0.05 * i
            self.villagers.append(villager)

    def _open(self, n_villagers: int) -> None:
        self.villagers: list[Villager] = []
        self.scheduler = self.model.scheduler(
            n_villagers, reserve_tokens=n_villagers * self.model.config.max_seq_len
        )
        self.n_tokens = 0

    def update(self, seconds: float, budget_ms: float) -> None:
        """One frame: the model works for ``budget_ms``, and the world goes on by ``seconds``."""
        speakers = {v.request: v for v in self.villagers if v.request is not None}
        for event in self.scheduler.step(budget_ms):
            villager = speakers[event.request]
            self.n_tokens += len(event.tokens)
            villager.bubble += event.text
            if event.done:
                self._finished(villager, event.request)
        for villager in self.villagers:
            villager.walk(seconds)
            villager.wait -= seconds
            if villager.request is None and villager.wait <= 0 and villager.at_goal():
                self._begin(villager)

    def _begin(self, villager: Villager) -> None:
        session = villager.session
        if session.room < 100:
            session.rewind(villager.n_scene)  # a new day: all but the scene is forgotten
        villager.bubble = ""
        if villager.deciding:
            # The quotation mark that ended its speech is in its past; one that was cut has none.
            end = "" if session.text.endswith('"') else '"'
            session.append(f"{end} {villager.name} wanted to")
            villager.request = self.scheduler.submit(session, choices=list(ACTIONS))
        else:
            session.append(f' {villager.name} smiled and said, "')
            villager.request = self.scheduler.submit(session, **SPEECH)

    def _finished(self, villager: Villager, request: tinyllama.Request) -> None:
        villager.request = None
        self.transcript.append((villager.name, request.text))
        if villager.deciding:
            place = ACTIONS[request.text]
            if place is None:
                villager.goal = villager.home
            else:  # beside the others who are there
                angle = float(sum(villager.name.encode()))
                place = place[0] + 46 * math.cos(angle), place[1] + 34 * math.sin(angle)
                villager.goal = place
            villager.wait = 0.0
        else:
            villager.wait = self.pause
        villager.deciding = not villager.deciding

    def save(self) -> bytes:
        """A save game: every villager in the middle of its word."""
        villagers = []
        for v in self.villagers:
            blob = (v.request or v.session).save()
            villagers.append(
                {
                    "name": v.name,
                    "home": v.home,
                    "position": v.position,
                    "goal": v.goal,
                    "deciding": v.deciding,
                    "bubble": v.bubble,
                    "wait": v.wait,
                    "n_scene": v.n_scene,
                    "speaks": v.request is not None,
                    "state": base64.b64encode(blob).decode(),
                }
            )
        return json.dumps({"version": 1, "villagers": villagers}).encode()

    def load(self, data: bytes) -> None:
        """Go on where :meth:`save` was. Raises tinyllama.errors.FormatError for another model's."""
        saved = json.loads(data)["villagers"]
        self._open(len(saved))
        for s in saved:
            blob, request = base64.b64decode(s.pop("state")), None
            if s.pop("speaks"):
                request = self.scheduler.restore(blob)
            session = request.session if request else self.model.restore(blob)
            for name in ("home", "goal"):
                s[name] = tuple(s[name])
            self.villagers.append(Villager(session=session, request=request, **s))


def _home(i: int, n: int) -> tuple[float, float]:
    """Houses stand in rows, a little out of line."""
    columns = 8
    rows = max(1, math.ceil(n / columns))
    width = WIDTH - 180 if i // columns < rows // 2 else WIDTH - 400  # the river is there
    x = 90 + width * (i % columns) / (columns - 1) + 22 * math.sin(5.1 * i)
    y = 130 + (HEIGHT - 250) * (i // columns) / max(1, rows - 1) + 18 * math.cos(3.3 * i)
    return x, y
