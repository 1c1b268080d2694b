"""Whatever is done to texts, and beside them, each is what it is alone: bit for bit.

A hundred random schedules by default; ten thousand with TINYLLAMA_FULL_TESTS=1.
"""

import dataclasses
import math
import os

import numpy as np
import pytest

from random_models import tiny_checkpoint
from tinyllama import SamplingParams, load
from tinyllama.formats.gguf import gguf_bytes

N_SCHEDULES = 10_000 if os.environ.get("TINYLLAMA_FULL_TESTS") else 100
N_PARTS = 20
N_EVENTS = 50
CONTEXT = 128
# Letters that go on until they are stopped: of bytes beyond ASCII, what may follow would hang on
# what a rewind took away.
BIAS = dict.fromkeys([1, 2, *range(3 + 0x80, 3 + 0x100)], -math.inf)
STORY = SamplingParams(temperature=1.2, top_p=0.95, logit_bias=BIAS)
CHOICE = dataclasses.replace(STORY, choices=["a", " ab", " ac", " the cat", " and the dog ran"])
PERSONAS = [[1, *(3 + (k * i) % 280 for i in range(40 + 25 * k))] for k in (1, 2)]


@pytest.fixture(scope="module", params=["f32", "q8_0"])
def models(request):
    """One model on one thread, again on two, and a third that only ever runs sessions alone."""
    data = gguf_bytes(tiny_checkpoint(max_seq_len=CONTEXT), request.param)
    kv_dtype = {"f32": "f32", "q8_0": "int8"}[request.param]
    return [load(data, n_threads=n, kv_dtype=kv_dtype) for n in (1, 2, 1)]


class Character:
    """A session that a scheduler works on, beside one that is alone."""

    def __init__(self, session, alone):
        self.session, self.alone = session, alone
        self.request = None
        self.n_seen = 0
        self.params = STORY

    def submit(self, scheduler, n, chooses=False):
        n = min(n, self.session.room)
        self.params = CHOICE if chooses else STORY
        self.request = scheduler.submit(self.session, params=self.params, max_new_tokens=n)
        self.n_seen = 0
        self.n_most = n

    def follow(self):
        """Let the lone session draw as many tokens as were drawn since, and compare."""
        new = self.request.tokens[self.n_seen :] if self.request else []
        if new:
            n = len(new) if self.params is STORY else self.n_most
            list(self.alone.generate(params=self.params, max_new_tokens=n))
            assert self.alone.tokens[-len(new) :] == new
        self.n_seen += len(new)
        assert self.session.tokens == self.alone.tokens

    def check_logits(self):
        found, expected = self.session._core.logits(), self.alone._core.logits()
        assert found.tobytes() == expected.tobytes()


class Schedule:
    def __init__(self, models, seed):
        self.rng = np.random.default_rng(seed)
        self.models = models
        sizes = self.rng.integers(1, 9, 2)
        self.schedulers = [models[i].scheduler(int(sizes[i])) for i in range(2)]
        self.characters = []
        self.n_born = 0

    def run(self):
        events = [
            *[self.admit] * 3,
            *[self.step] * 12,
            self.cancel,
            self.fork,
            self.rewind,
            self.append,
            self.save_and_restore,
            self.move,
            self.drop_cache,
            self.look,
            self.pause,
        ]
        for _ in range(N_EVENTS):
            events[self.rng.integers(len(events))]()
            for character in self.characters:
                character.follow()
        self.finish()

    def finish(self):
        for character in self.characters:
            character.request.resume()
        for scheduler in self.schedulers:
            while scheduler.stats()["n_live"]:
                scheduler.step()
        for character in self.characters:
            character.follow()
            character.check_logits()

    def any_character(self):
        return self.characters[self.rng.integers(len(self.characters))] if self.characters else None

    def any_n(self, least, most):
        return int(self.rng.integers(least, most + 1))

    def admit(self):
        if len(self.characters) >= 8:
            return
        prompt = self.rng.integers(3, 290, self.any_n(2, 20)).tolist()
        if self.rng.random() < 0.7:
            persona = PERSONAS[self.rng.integers(2)]
            prompt = persona[: self.any_n(1, len(persona))] + prompt
        self.n_born += 1
        i = self.any_n(0, 1)
        session, alone = (self.models[k].session(seed=self.n_born) for k in (i, 2))
        session.append(prompt)
        alone.feed(prompt)
        character = Character(session, alone)
        self.characters.append(character)
        character.submit(self.schedulers[i], self.any_n(1, 20), self.rng.random() < 0.3)

    def step(self):
        scheduler = self.schedulers[self.any_n(0, 1)]
        scheduler.step(float(self.rng.choice([0, 0.01, 0.03, 0.1, 0.5])))

    def scheduler_of(self, character):
        return self.schedulers[self.models.index(character.session.model)]

    def cancel(self):
        if character := self.any_character():
            character.request.cancel()
            self.scheduler_of(character).step(0)
            assert character.request.done
            if self.rng.random() < 0.5:
                self.characters.remove(character)
                character.check_logits()
            elif character.session.room:
                chooses = self.rng.random() < 0.3 and character.session.n_tokens > 1
                character.submit(self.scheduler_of(character), self.any_n(1, 9), chooses)

    def fork(self):
        character = self.any_character()
        if character and len(self.characters) < 8 and character.session.room:
            self.n_born += 1
            copies = [s.fork(self.n_born) for s in (character.session, character.alone)]
            self.characters.append(Character(*copies))
            self.characters[-1].submit(self.scheduler_of(character), self.any_n(1, 9))

    def rewind(self):
        if character := self.any_character():
            # Before its first word a text is spelt in another way than the choices were.
            n = self.any_n(min(2, character.session.n_tokens), character.session.n_tokens)
            character.session.rewind(n)
            character.alone.rewind(n)

    def append(self):
        character = self.any_character()
        if character and character.session.room > 30:
            tokens = self.rng.integers(3, 290, self.any_n(1, 5)).tolist()
            character.session.append(tokens)
            character.alone.append(tokens)

    def save_and_restore(self, to=None):
        if character := self.any_character():
            blob = character.request.save(cache=bool(self.any_n(0, 1)))
            character.request.cancel()
            scheduler = self.scheduler_of(character) if to is None else self.schedulers[to]
            character.request = scheduler.restore(blob)
            character.session = character.request.session

    def move(self):
        """To another number of threads."""
        self.save_and_restore(to=self.any_n(0, 1))

    def drop_cache(self):
        if character := self.any_character():
            character.session.drop_cache()

    def look(self):
        if character := self.any_character():
            character.check_logits()

    def pause(self):
        if character := self.any_character():
            request = character.request
            request.resume() if request.paused else request.pause()


@pytest.mark.parametrize("part", range(N_PARTS))
def test_random_schedules(models, part):
    for seed in range(part, N_SCHEDULES // 2, N_PARTS):  # as many for each format
        try:
            Schedule(models, seed).run()
        except Exception as error:
            raise AssertionError(f"in schedule {seed}") from error
