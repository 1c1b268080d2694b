"""A small village in which everybody talks at once.

    pip install ".[village]"
    python examples/village/village.py

F5 saves, F9 loads, Escape ends. The numbers above: how long a frame took, of which the model had
its budget, and how many tokens it made per second. Without a screen:

    SDL_VIDEODRIVER=dummy python examples/village/village.py --seconds 60 --report report.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import deque
from pathlib import Path

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
import pygame
from world import ACTIONS, HEIGHT, WIDTH, Villager, World

import tinyllama

FRAMES_PER_SECOND = 60
GRASS, DARK_GRASS, WATER, PATH = (126, 176, 92), (112, 162, 82), (86, 148, 196), (206, 186, 140)
INK, PAPER, THOUGHT = (40, 36, 32), (255, 252, 240), (222, 236, 255)
COATS = ((200, 70, 60), (70, 110, 190), (220, 160, 50), (130, 80, 160), (60, 140, 120))
BUBBLE_WIDTH = 170


class View:
    """Draws a world. What does not change is drawn once."""

    def __init__(self, screen: pygame.Surface, world: World) -> None:
        self.screen = screen
        self.font = pygame.font.Font(None, 17)
        self.large = pygame.font.Font(None, 26)
        self.ground = self._paint_ground(world)
        self.bubbles: dict[str, tuple[str, pygame.Surface]] = {}  # of each name, with its text

    def draw(self, world: World, status: str) -> None:
        self.screen.blit(self.ground, (0, 0))
        for villager in sorted(world.villagers, key=lambda v: v.position[1]):
            self._draw_villager(villager)
        for villager in world.villagers:
            if villager.bubble:
                bubble = self._bubble(villager)
                x, y = villager.position
                place = bubble.get_rect(midbottom=(x, y - 30))
                self.screen.blit(bubble, place.clamp(self.screen.get_rect()))
        self.screen.blit(self.large.render(status, True, INK, PAPER), (10, 8))

    def _draw_villager(self, villager: Villager) -> None:
        x, y = (int(c) for c in villager.position)
        coat = COATS[sum(villager.name.encode()) % len(COATS)]
        pygame.draw.ellipse(self.screen, DARK_GRASS, (x - 11, y - 4, 22, 9))
        pygame.draw.rect(self.screen, coat, (x - 7, y - 17, 14, 17), border_radius=5)
        pygame.draw.circle(self.screen, (240, 208, 176), (x, y - 22), 7)
        pygame.draw.arc(self.screen, (90, 60, 40), (x - 7, y - 30, 14, 14), 0.2, 2.9, 4)

    def _bubble(self, villager: Villager) -> pygame.Surface:
        """Its words on paper; drawn again only when there are more of them."""
        known = self.bubbles.get(villager.name)
        if known is not None and known[0] == villager.bubble:
            return known[1]
        lines, line = [], ""
        for word in f"{villager.name}: {villager.bubble.strip()}".split():
            longer = f"{line} {word}".strip()
            if self.font.size(longer)[0] > BUBBLE_WIDTH and line:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
        rows = [self.font.render(row, True, INK) for row in lines]
        width, height = max(row.get_width() for row in rows) + 14, 14 * len(rows) + 10
        surface = pygame.Surface((width, height + 7), pygame.SRCALPHA)
        paper = THOUGHT if villager.bubble in ACTIONS else PAPER
        pygame.draw.rect(surface, paper, (0, 0, width, height), border_radius=8)
        pygame.draw.rect(surface, INK, (0, 0, width, height), 1, border_radius=8)
        middle = width // 2
        tail = [(middle - 5, height - 1), (middle + 5, height - 1), (middle, height + 6)]
        pygame.draw.polygon(surface, paper, tail)
        for i, row in enumerate(rows):
            surface.blit(row, (7, 6 + 14 * i))
        self.bubbles[villager.name] = villager.bubble, surface
        return surface

    def _paint_ground(self, world: World) -> pygame.Surface:
        ground = pygame.Surface((WIDTH, HEIGHT))
        ground.fill(GRASS)
        for i in range(900):
            spot = (i * 197 % WIDTH, i * 389 % HEIGHT)
            pygame.draw.line(ground, DARK_GRASS, spot, (spot[0] + 3, spot[1] - 5))
        river = [(900 + 90 * t - 12 * t * t, 720 - 60 * t) for t in range(6)]
        shore = [(1280, 330), (1280, 720), (940, 720)]
        pygame.draw.polygon(ground, WATER, [*river[::-1], *shore[::-1]])
        for action, place in ACTIONS.items():
            if place is None or "river" in action:
                continue
            pygame.draw.circle(ground, PATH, place, 46)
        well, tree, shop = (ACTIONS[k] for k in list(ACTIONS)[1:4])
        pygame.draw.circle(ground, (150, 150, 150), well, 20)
        pygame.draw.circle(ground, WATER, well, 13)
        pygame.draw.rect(ground, (110, 80, 50), (tree[0] - 6, tree[1] - 30, 12, 34))
        pygame.draw.circle(ground, (70, 130, 60), (tree[0], tree[1] - 52), 36)
        for i in range(9):
            apple = (tree[0] - 24 + i * 37 % 50, tree[1] - 74 + i * 23 % 44)
            pygame.draw.circle(ground, (210, 60, 50), apple, 4)
        self._paint_house(ground, shop[0], shop[1] - 10, 34, (214, 120, 150))
        for villager in world.villagers:
            self._paint_house(ground, *villager.home, 20, (170, 90, 70))
        return ground

    @staticmethod
    def _paint_house(
        ground: pygame.Surface, x: float, y: float, size: float, roof: tuple[int, int, int]
    ) -> None:
        wall = pygame.Rect(x - size, y - 1.9 * size, 2 * size, 1.2 * size)
        pygame.draw.rect(ground, (236, 222, 196), wall)
        top = [(wall.left - 5, wall.top), (wall.right + 5, wall.top), (x, wall.top - size)]
        pygame.draw.polygon(ground, roof, top)
        door = (x - size / 4, wall.bottom - 0.7 * size, size / 2, 0.7 * size)
        pygame.draw.rect(ground, (120, 84, 60), door)


def play(args: argparse.Namespace) -> None:
    pygame.display.init()
    pygame.font.init()
    screen = pygame.display.set_mode((WIDTH, HEIGHT))
    pygame.display.set_caption("A village that talks")
    model = tinyllama.load(args.model, n_threads=args.threads, kv_dtype="int8")
    world = World(model, args.villagers, args.pause)
    view = View(screen, world)
    times: list[float] = []  # of every frame, in milliseconds
    tokens: deque[tuple[float, int]] = deque(maxlen=FRAMES_PER_SECOND)
    clock, message = pygame.time.Clock(), "F5 save  F9 load"
    start = time.perf_counter()
    running = True
    while running and (args.seconds is None or time.perf_counter() - start < args.seconds):
        begin = time.perf_counter()
        for event in pygame.event.get():
            pressed = event.key if event.type == pygame.KEYDOWN else None
            if event.type == pygame.QUIT or pressed == pygame.K_ESCAPE:
                running = False
            elif pressed == pygame.K_F5:
                message = save(world, args.save)
            elif pressed == pygame.K_F9:
                message = load(world, args.save)
        world.update(1 / FRAMES_PER_SECOND, args.budget)
        tokens.append((begin, world.n_tokens))
        seconds = tokens[-1][0] - tokens[0][0]
        speed = (tokens[-1][1] - tokens[0][1]) / seconds if seconds else 0.0
        last = times[-1] if times else 0.0
        view.draw(
            world,
            f" {last:4.1f} ms per frame, at most {args.budget:g} of it the model, "
            f"{speed:5.0f} tokens per second   {message} ",
        )
        pygame.display.flip()
        times.append(1e3 * (time.perf_counter() - begin))
        clock.tick(FRAMES_PER_SECOND)
    if args.screenshot:
        pygame.image.save(screen, args.screenshot)
    if args.report:
        report(world, times, args)
    pygame.quit()


def save(world: World, path: Path) -> str:
    data = world.save()
    partial = path.with_suffix(".partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        return f"not saved: {error}"
    return f"saved: {len(data) / len(world.villagers):.0f} bytes per villager"


def load(world: World, path: Path) -> str:
    try:
        world.load(path.read_bytes())
    except (OSError, ValueError) as error:
        return f"not loaded: {error}"
    return "loaded"


def report(world: World, times: list[float], args: argparse.Namespace) -> None:
    """What the frames cost, once the first second is over."""
    steady = sorted(times[FRAMES_PER_SECOND:] or times)
    figures = {
        "villagers": len(world.villagers),
        "pause_s": args.pause,
        "budget_ms": args.budget,
        "frames": len(steady),
        "p50_ms": round(steady[len(steady) // 2], 2),
        "p99_ms": round(steady[len(steady) * 99 // 100], 2),
        "max_ms": round(steady[-1], 2),
        "tokens_per_second": round(world.n_tokens / (len(times) / FRAMES_PER_SECOND)),
        "save_bytes": len(world.save()),
        "kv_megabytes": round(world.scheduler.stats()["kv_bytes"] / 1e6, 1),
    }
    args.report.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: the model that ships with the package")
    parser.add_argument("--villagers", type=int, default=32)
    parser.add_argument(
        "--pause", type=float, default=2.0, help="seconds that complete speech stays"
    )
    parser.add_argument("--budget", type=float, default=4.0, help="milliseconds per frame")
    parser.add_argument("--threads", type=int, default=1, help="for the model (default: 1)")
    parser.add_argument("--save", type=Path, default=Path("village.save"))
    parser.add_argument("--seconds", type=float, help="end after so long")
    parser.add_argument("--screenshot", type=Path, help="write the last frame as PNG")
    parser.add_argument("--report", type=Path, help="write what the frames cost as JSON")
    play(parser.parse_args())


if __name__ == "__main__":
    main()
