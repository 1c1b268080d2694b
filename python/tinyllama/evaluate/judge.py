"""Stories graded by another model, through any endpoint that speaks OpenAI's chat protocol.

The axes are those of TinyStories (Eldan and Li 2023, arXiv 2305.07759): the judge sees the
beginning, a line of ``***`` and what the model wrote, assesses it in words, and then grades
grammar, creativity, consistency and plot from 0 to 10 and guesses the writer's age.
:data:`INSTRUCTION` is all it is told.

Every reply is on disk before the next question is asked, so that whatever is killed, asking again
asks only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, FormatError, MissingExtraError
from ..files import lock
from ..generation import Completion
from .intervals import Estimate, of_prompts

if TYPE_CHECKING:
    from openai import OpenAI

AXES = ("grammar", "creativity", "consistency", "plot")
AGE_GROUPS = {
    "A": "3 or younger",
    "B": "4 to 5",
    "C": "6 to 7",
    "D": "8 to 9",
    "E": "10 to 12",
    "F": "13 to 16",
}
ATTEMPTS = 3  # for an answer that is valid
RETRIES = 5  # of a request that failed on its way, with growing pauses
TIMEOUT = 300.0  # seconds

INSTRUCTION = f"""\
You mark a writing exercise. Somebody began a story for children, and a student went on with it.
You get the beginning, then a line that holds only ***, then the student's part. The beginning may
break off in the middle of a sentence, which the student then had to finish. Mark only the student's
part, in the light of the beginning.

First assess it in two to four sentences. Is the language right? Does the student's part take up
the beginning and finish its last sentence well? Does it contradict the beginning or itself? Does it
have ideas of its own? Does the story lead somewhere?

Then give whole numbers from 0, worst, to 10, best, for
- grammar: spelling, word forms, sentences;
- creativity: ideas of the student's own that fit the story;
- consistency: it agrees with the beginning and with itself;
- plot: what happens makes sense, one thing leads to the next, and there is an end.

Last, guess from the student's part alone how old the student is, as one letter:
{"; ".join(f"{letter}: {ages}" for letter, ages in AGE_GROUPS.items())}.

Answer with one JSON object and nothing else, with the keys assessment, {", ".join(AXES)},
age_group, in this order.

"""

_GRADE = {"type": "integer", "enum": list(range(11))}
SCHEMA = {
    "type": "object",
    "properties": {
        "assessment": {"type": "string"},
        **dict.fromkeys(AXES, _GRADE),
        "age_group": {"type": "string", "enum": list(AGE_GROUPS)},
    },
    "required": ["assessment", *AXES, "age_group"],
    "additionalProperties": False,
}

# OpenAI's form, that of llama-cpp-python, and none: the first that an endpoint takes is used.
_FORMS: tuple[dict[str, Any], ...] = (
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "marks", "strict": True, "schema": SCHEMA},
        }
    },
    {"response_format": {"type": "json_object", "schema": SCHEMA}},
    {},
)


_BEGIN = b'{"key": "'  # of every line of Answers


@dataclass(frozen=True)
class Question:
    """One completion to be graded once. ``judge``: the judging model; ``completion`` and
    ``repeat``: which completion of the prompt, and which grading of it, this is."""

    judge: str
    temperature: float
    seed: int
    prompt: str
    text: str
    completion: int
    repeat: int

    @property
    def message(self) -> str:
        """All that the judge is told."""
        return f"{INSTRUCTION}{self.prompt}\n***\n{self.text.strip()}"

    @property
    def key(self) -> str:
        """What the answer depends on, as a hash: not on where the judge runs."""
        asked = [self.judge, self.message, self.temperature, self.seed]
        text = json.dumps([*asked, self.completion, self.repeat])
        return hashlib.sha256(text.encode()).hexdigest()


def questions_of(
    prompts: Sequence[str],
    groups: Sequence[Sequence[Completion]],
    judge: str,
    temperature: float,
    seed: int,
    repeats: int,
) -> list[list[Question]]:
    """For each prompt, what to ask of its completions, each ``repeats`` times."""
    return [
        [
            Question(judge, temperature, seed, prompt, story.text, completion, repeat)
            for completion, story in enumerate(group)
            for repeat in range(repeats)
        ]
        for prompt, group in zip(prompts, groups, strict=True)
    ]


class Answers:
    """A file of replies, one JSON object a line, forced to disk one by one.

    A last line that a kill cut short counts as not written. Raises OSError, and FormatError for a
    file that holds anything else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._load(self.path.read_bytes() if self.path.exists() else b"")

    def _load(self, data: bytes) -> None:
        self._replies: dict[str, list[dict[str, Any]]] = {}
        *lines, torn = data.split(b"\n")
        if not _BEGIN.startswith(torn[: len(_BEGIN)]):  # somebody's file, not to be cut
            raise FormatError(f"{self.path}: line {len(lines) + 1}: not an answer of a judge")
        self._torn_at = len(data) - len(torn) if torn else None
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self._replies.setdefault(record["key"], []).append(record)
                record["scores"], record["usage"]
            except (ValueError, TypeError, KeyError) as error:
                raise FormatError(
                    f"{self.path}: line {number}: not an answer of a judge: {error!r}"
                ) from None

    def __len__(self) -> int:
        """Questions with a reply."""
        return len(self._replies)

    def of(self, question: Question) -> list[dict[str, Any]]:
        """The replies to a question so far, oldest first."""
        return self._replies.get(question.key, [])

    def settled(self, question: Question) -> bool:
        """Whether there is a valid answer, or no attempt left."""
        replies = self.of(question)
        return len(replies) >= ATTEMPTS or any(reply["scores"] for reply in replies)

    @contextmanager
    def open(self) -> Iterator[None]:
        """For adding to it: BlockingIOError where another process does."""
        with open(self.path, "a+b") as self._file:
            lock(self._file, self.path)
            self._file.seek(0)
            self._load(self._file.read())  # what others have added since
            yield

    def add(self, question: Question, record: dict[str, Any]) -> None:
        """Keep one reply, in an :meth:`open` file. It is on disk when this returns."""
        line = json.dumps({"key": question.key, **record}, ensure_ascii=False) + "\n"
        # Half a surrogate pair, which a judge may reply, is no UTF-8; so JSON spells it.
        data = line.encode(errors="backslashreplace")
        if self._torn_at is not None:
            self._file.truncate(self._torn_at)
            self._torn_at = None
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._replies.setdefault(question.key, []).append({"key": question.key, **record})


def ask(
    questions: Sequence[Question],
    answers: Answers,
    url: str,
    kept_with: dict[str, Any],
    on_done: Callable[[], object] = lambda: None,
) -> None:
    """Ask the endpoint at ``url`` (it ends in /v1 as a rule) whatever is not settled, in order.

    The key comes from OPENAI_API_KEY and is written nowhere. ``kept_with``: facts kept with every
    reply. An answer that is not valid is asked for again, twice at most, with another seed;
    ``on_done()`` follows each question. Raises ConnectionError when the endpoint stays silent or
    refuses, BlockingIOError when another process adds to ``answers``, and OSError; what was
    answered until then is kept. MissingExtraError without openai.
    """
    try:
        import jsonschema  # noqa: F401
        import openai
    except ImportError as error:
        raise MissingExtraError(error.name or "openai", "eval") from None
    if not url.startswith(("http://", "https://")):
        raise ArgumentError(f"--judge {url}: an address begins with http:// or https://")
    secret = os.environ.get("OPENAI_API_KEY") or "none"
    client = openai.OpenAI(base_url=url, api_key=secret, max_retries=RETRIES, timeout=TIMEOUT)
    forms = list(_FORMS)
    if not questions:
        return
    with answers.open():
        for question in questions:
            while not answers.settled(question):
                try:
                    reply, usage = _request(client, question, len(answers.of(question)), forms)
                except openai.APIError as error:
                    reason = str(error.__cause__ or error).replace(secret, "…")
                    raise ConnectionError(
                        f"the judge at {url}: {error.__class__.__name__}: {reason}"
                        + (f" ({answers.path} has its answers; run again to go on)" * bool(answers))
                    ) from None
                answers.add(question, {**kept_with, **_record(question, reply, usage)})
            on_done()


def _record(question: Question, reply: str, usage: dict[str, int]) -> dict[str, Any]:
    scores, invalid = _read(reply)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "judge": question.judge,
        "temperature": question.temperature,
        "seed": question.seed,
        "completion": question.completion,
        "repeat": question.repeat,
        "message": question.message,
        "reply": reply,
        "scores": scores,
        "invalid": invalid,
        "usage": usage,
    }


def _request(
    client: OpenAI, question: Question, attempt: int, forms: list[dict[str, Any]]
) -> tuple[str, dict[str, int]]:
    """The reply to one attempt, and the tokens it took; drops ``forms`` that are refused."""
    import openai

    def send(retries: int) -> tuple[str, dict[str, int]]:
        completion = client.with_options(max_retries=retries).chat.completions.create(
            model=question.judge,
            messages=[{"role": "user", "content": question.message}],
            temperature=question.temperature,
            seed=question.seed + question.repeat * ATTEMPTS + attempt,
            **forms[0],
        )
        choices = getattr(completion, "choices", None)
        usage = getattr(completion, "usage", None)
        return (choices[0].message.content if choices else None) or "", {
            "prompt_tokens": usage.prompt_tokens if usage else 0,
            "completion_tokens": usage.completion_tokens if usage else 0,
        }

    retries = 0 if len(forms) > 1 else RETRIES
    while True:
        try:
            reply = send(retries)
        except openai.APIError as error:
            # llama-cpp-python says 500 of a form that it does not know.
            status = getattr(error, "status_code", None)
            refused = status in (400, 422) or "response_format" in str(error)
            if refused and len(forms) > 1:
                del forms[0]
            elif retries == RETRIES:
                raise
            else:
                retries = RETRIES
        else:
            del forms[1:]
            return reply


def _read(reply: str) -> tuple[dict[str, Any] | None, str | None]:
    """(the marks in a reply, None), or (None, what is wrong with it).

    Text around the object is passed over, because not every endpoint can be held to a schema, and
    so are bare line breaks in the assessment, which llama.cpp's grammar lets through.
    """
    import jsonschema

    try:
        marks = json.loads(reply[reply.find("{") : reply.rfind("}") + 1], strict=False)
        jsonschema.validate(marks, SCHEMA)
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    except jsonschema.ValidationError as error:
        return None, f"{error.json_path}: {error.message}"
    return marks, None


@dataclass(frozen=True)
class Grades:
    """What a judge made of the stories.

    ``scores``: per axis, 0 to 10, None where nothing was graded. ``ages``: how many gradings
    guessed each age group. ``noise``: per axis the standard deviation between gradings of one
    completion; None unless some were graded more than once. ``failed``: the gradings without a
    valid answer after three attempts, each with its reason. Tokens are those of all attempts, as
    the endpoint counts them.
    """

    scores: dict[str, Estimate | None]
    ages: dict[str, int]
    noise: dict[str, float] | None
    n_graded: int
    failed: tuple[str, ...]
    prompt_tokens: int
    completion_tokens: int

    def cost(self, price_in: float, price_out: float) -> float:
        """An estimate, by prices per million tokens in and out."""
        return (self.prompt_tokens * price_in + self.completion_tokens * price_out) / 1e6


def grades(groups: Sequence[Sequence[Question]], answers: Answers) -> Grades:
    """The scores of the questions that were answered: means over prompts, as :mod:`.intervals`."""
    replies = [reply for group in groups for question in group for reply in answers.of(question)]
    marks = [[_marks(question, answers) for question in group] for group in groups]
    valid = [mark for group in marks for mark in group if mark]
    ages = Counter(mark["age_group"] for mark in valid)
    return Grades(
        scores={axis: of_prompts([[m[axis] for m in g if m] for g in marks]) for axis in AXES},
        ages={letter: ages[letter] for letter in AGE_GROUPS},
        noise=_noise(groups, answers),
        n_graded=len(valid),
        failed=tuple(_failures(groups, answers)),
        prompt_tokens=sum(reply["usage"]["prompt_tokens"] for reply in replies),
        completion_tokens=sum(reply["usage"]["completion_tokens"] for reply in replies),
    )


def _marks(question: Question, answers: Answers) -> dict[str, Any] | None:
    return next((r["scores"] for r in answers.of(question) if r["scores"]), None)


def _failures(groups: Sequence[Sequence[Question]], answers: Answers) -> Iterator[str]:
    for number, group in enumerate(groups, 1):
        for question in group:
            replies = answers.of(question)
            if replies and not _marks(question, answers):
                yield (
                    f"prompt {number}, completion {question.completion + 1}, grading"
                    f" {question.repeat + 1}: {replies[-1]['invalid']}"
                )


def _noise(groups: Sequence[Sequence[Question]], answers: Answers) -> dict[str, float] | None:
    graded: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for number, group in enumerate(groups):
        for question in group:
            if mark := _marks(question, answers):
                graded.setdefault((number, question.completion), []).append(mark)
    several = [marks for marks in graded.values() if len(marks) > 1]
    if not several:
        return None
    return {
        axis: statistics.fmean(statistics.variance(m[axis] for m in marks) for marks in several)
        ** 0.5
        for axis in AXES
    }
