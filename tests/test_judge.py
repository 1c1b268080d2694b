"""Grading by another model, against an endpoint of our own that fails in every way."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tinyllama.errors import ArgumentError, FormatError
from tinyllama.evaluate import judge
from tinyllama.generation import Completion, Usage

openai = pytest.importorskip("openai", reason="a judge needs the extra eval")

MARKS = {
    "assessment": "Fine.",
    "grammar": 7,
    "creativity": 5,
    "consistency": 6,
    "plot": 4,
    "age_group": "C",
}
SECRET = "sk-never-to-be-seen"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr(judge, "RETRIES", 1)


@contextmanager
def endpoint(reply):
    """An endpoint at a free port. ``reply(n, request)``: what the n-th request gets, from 0: a
    string, marks, (status, body) or None for a connection that is dropped. Yields (its address,
    the requests)."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body["authorization"] = self.headers["Authorization"]
            requests.append(body)
            content = reply(len(requests) - 1, body)
            if content is None:
                self.connection.close()
                return
            status, payload = content if isinstance(content, tuple) else (200, chat(content))
            data = json.dumps(payload).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()


def chat(content):
    text = content if isinstance(content, str) else json.dumps(content)
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text},
            }
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    }


def questions(n_prompts=3, completions=2, repeats=1):
    groups = [
        [
            Completion(f" story {i}.{j}", (), None, "stop", Usage(1, 1), 0)
            for j in range(completions)
        ]
        for i in range(n_prompts)
    ]
    prompts = [f"Prompt {i}" for i in range(n_prompts)]
    return judge.questions_of(prompts, groups, "m", 0.5, 7, repeats)


def flat(groups):
    return [question for group in groups for question in group]


def asked(requests):
    """How often each story was sent."""
    return Counter(r["messages"][0]["content"].rpartition("***\n")[2] for r in requests)


def run(groups, answers, url):
    judge.ask(flat(groups), answers, url, {"model": "tiny.gguf", "rule": "whole"})
    return judge.grades(groups, answers)


def test_what_is_asked_and_what_is_kept(tmp_path):
    groups = questions()
    with endpoint(lambda n, _: {**MARKS, "plot": n}) as (url, requests):
        grades = run(groups, judge.Answers(tmp_path / "a.jsonl"), url)
    assert len(requests) == 6 and set(asked(requests).values()) == {1}
    first = requests[0]
    assert first["messages"][0]["content"].endswith("\n\nPrompt 0\n***\nstory 0.0")
    assert first["messages"][0]["content"].startswith(judge.INSTRUCTION)
    assert (first["model"], first["temperature"], first["seed"]) == ("m", 0.5, 7)
    assert first["response_format"]["json_schema"]["schema"] == judge.SCHEMA
    assert first["authorization"] == f"Bearer {SECRET}"
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    record = json.loads(lines[3])
    assert record["scores"] == {**MARKS, "plot": 3} and record["invalid"] is None
    assert (record["judge"], record["temperature"], record["rule"]) == ("m", 0.5, "whole")
    assert record["message"] == flat(groups)[3].message and record["model"] == "tiny.gguf"
    assert SECRET not in "".join(lines)
    # By hand: prompts have the means 0.5, 2.5 and 4.5.
    assert grades.scores["plot"].mean == pytest.approx(2.5)
    assert grades.scores["plot"].low < 1.5 and grades.scores["plot"].high > 3.5
    assert asdict(grades.scores["grammar"]) == {"mean": 7, "low": 7, "high": 7}
    assert grades.ages == {"A": 0, "B": 0, "C": 6, "D": 0, "E": 0, "F": 0}
    assert (grades.n_graded, grades.failed, grades.noise) == (6, (), None)
    assert (grades.prompt_tokens, grades.completion_tokens) == (600, 120)
    assert grades.cost(price_in=1.0, price_out=10.0) == pytest.approx((600 + 1200) / 1e6)


def test_every_answer_is_forced_to_disk(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    with endpoint(lambda *_: MARKS) as (url, _):
        run(questions(3, 1), judge.Answers(tmp_path / "a.jsonl"), url)
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    assert sizes == [len(b"".join(lines[:n])) for n in (1, 2, 3)]


def test_nothing_is_asked_twice(tmp_path):
    with endpoint(lambda *_: MARKS) as (url, requests):
        run(questions(n_prompts=2), judge.Answers(tmp_path / "a.jsonl"), url)
        before = (tmp_path / "a.jsonl").read_bytes()
        grades = run(questions(n_prompts=3), judge.Answers(tmp_path / "a.jsonl"), url)
    assert grades.n_graded == 6
    assert len(requests) == 6 and set(asked(requests).values()) == {1}
    assert (tmp_path / "a.jsonl").read_bytes().startswith(before)


@pytest.mark.parametrize(
    "change",
    [
        {"judge": "n"},
        {"temperature": 1.0},
        {"seed": 8},
        {"prompt": "P"},
        {"text": "t"},
        {"completion": 1},
        {"repeat": 1},
    ],
    ids=str,
)
def test_other_questions_have_other_keys(change):
    question = questions()[0][0]
    assert judge.Question(**{**asdict(question), **change}).key != question.key
    assert judge.Question(**asdict(question)).key == question.key


def test_repeats_tell_the_noise(tmp_path):
    groups = questions(n_prompts=2, completions=1, repeats=3)
    plots = [1, 2, 3, 4, 4, 7]  # variances 1 and 3
    with endpoint(lambda n, _: {**MARKS, "plot": plots[n]}) as (url, requests):
        grades = run(groups, judge.Answers(tmp_path / "a.jsonl"), url)
    assert len({r["seed"] for r in requests[:3]}) == 3
    assert grades.noise["plot"] == pytest.approx(2**0.5)
    assert grades.noise["grammar"] == 0
    assert grades.scores["plot"].mean == pytest.approx((2 + 5) / 2)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "not JSON"),
        ("I like it: 7 of 10", "not JSON"),
        ('{"grammar": ', "not JSON"),
        ({**MARKS, "plot": 11}, "plot"),
        ({**MARKS, "plot": 6.5}, "plot"),
        ({**MARKS, "plot": True}, "plot"),
        ({**MARKS, "age_group": "G"}, "age_group"),
        ({k: v for k, v in MARKS.items() if k != "creativity"}, "creativity"),
        ({**MARKS, "style": 3}, "style"),
        ([1, 2], "not JSON"),
    ],
    ids=str,
)
def test_what_is_not_valid_is_asked_again_and_named_in_the_end(tmp_path, reply, reason):
    groups = questions(n_prompts=2, completions=1)

    def bad_for_the_first(n, request):
        return reply if request["messages"][0]["content"].endswith("story 0.0") else MARKS

    with endpoint(bad_for_the_first) as (url, requests):
        grades = run(groups, judge.Answers(tmp_path / "a.jsonl"), url)
        again = run(groups, judge.Answers(tmp_path / "a.jsonl"), url)
    assert again == grades
    assert asked(requests) == {"story 0.0": judge.ATTEMPTS, "story 1.0": 1}
    assert len({r["seed"] for r in requests}) == 3
    assert grades.n_graded == 1 and grades.prompt_tokens == 400
    (failure,) = grades.failed
    assert failure.startswith("prompt 1, completion 1, grading 1: ") and reason in failure


def test_invalid_then_valid(tmp_path):
    fenced = f"My marks:\n```json\n{json.dumps(MARKS)}\n```"
    with endpoint(lambda n, _: "no" if n == 0 else fenced) as (url, requests):
        grades = run(questions(1, 1), judge.Answers(tmp_path / "a.jsonl"), url)
    assert len(requests) == 2
    assert (grades.n_graded, grades.failed) == (1, ())


def test_an_assessment_of_several_lines_is_valid(tmp_path):
    text = json.dumps(MARKS).replace("Fine.", "Fine.\nVery\tfine.")
    with endpoint(lambda *_: text) as (url, requests):
        grades = run(questions(1, 1), judge.Answers(tmp_path / "a.jsonl"), url)
    assert (len(requests), grades.n_graded) == (1, 1)


def test_all_invalid_gives_no_scores(tmp_path):
    with endpoint(lambda *_: "no") as (url, _):
        grades = run(questions(1, 1), judge.Answers(tmp_path / "a.jsonl"), url)
    assert grades.scores == dict.fromkeys(judge.AXES) and len(grades.failed) == 1


@pytest.mark.parametrize("fault", [(500, {}), (429, {}), None], ids=["500", "429", "dropped"])
def test_a_passing_fault_is_passed_over(tmp_path, fault):
    with endpoint(lambda n, _: fault if n in (1, 3) else MARKS) as (url, requests):
        grades = run(questions(2, 2), judge.Answers(tmp_path / "a.jsonl"), url)
    assert grades.n_graded == 4
    assert len(requests) == 6


@pytest.mark.parametrize(
    ("refusal", "n_refused"),
    [
        ((400, {"error": {"message": "unsupported"}}), 1),
        ((500, {"error": {"message": "body.response_format.type: no json_schema"}}), 1),
        ((422, {}), 2),
    ],
    ids=["400", "500", "422"],
)
def test_forms_that_an_endpoint_does_not_know(tmp_path, refusal, n_refused):
    with endpoint(lambda n, _: refusal if n < n_refused else MARKS) as (url, requests):
        grades = run(questions(2, 1), judge.Answers(tmp_path / "a.jsonl"), url)
    assert grades.n_graded == 2
    forms = [r.get("response_format") for r in requests[n_refused:]]
    expected = [{"type": "json_object", "schema": judge.SCHEMA}, None][n_refused - 1]
    assert forms == [expected] * 2


@pytest.mark.parametrize("fault", [(503, {}), None], ids=["503", "dropped"])
def test_an_endpoint_that_comes_up_and_does_not_know_the_form(tmp_path, fault):
    replies = [fault, (400, {"error": {"message": "unsupported"}})]
    with endpoint(lambda n, _: replies[n] if n < 2 else MARKS) as (url, requests):
        grades = run(questions(2, 1), judge.Answers(tmp_path / "a.jsonl"), url)
    assert grades.n_graded == 2
    expected = {"type": "json_object", "schema": judge.SCHEMA}
    assert [r.get("response_format") for r in requests[2:]] == [expected] * 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((401, {"error": {"message": f"wrong key {SECRET}"}}), "AuthenticationError"),
        ((503, {}), "InternalServerError"),
        (None, "APIConnectionError"),
        ((400, {"error": {"message": "too long"}}), "too long"),
    ],
    ids=["key", "503", "dropped", "400"],
)
def test_a_lasting_fault_ends_the_run_and_keeps_what_there_is(tmp_path, fault, message):
    groups, path = questions(), tmp_path / "a.jsonl"
    with endpoint(lambda n, _: MARKS if n < 2 else fault) as (url, _):
        with pytest.raises(ConnectionError, match=message) as error:
            run(groups, judge.Answers(path), url)
        assert url in str(error.value) and str(path) in str(error.value)
        assert SECRET not in str(error.value)
    with endpoint(lambda *_: MARKS) as (url, requests):
        assert run(groups, judge.Answers(path), url).n_graded == 6
    assert len(requests) == 4


CLIENT = """
import sys
from test_judge import flat, judge, questions
judge.ask(flat(questions(4, 2)), judge.Answers(sys.argv[1]), sys.argv[2], {})
"""


def test_an_address_without_its_protocol_is_named(tmp_path):
    with pytest.raises(ArgumentError, match=r"--judge localhost:1/v1: an address begins with http"):
        judge.ask([], judge.Answers(tmp_path / "judge.jsonl"), "localhost:1/v1", {})


def test_two_clients_do_not_ask_the_same(tmp_path):
    path, held, stop = tmp_path / "a.jsonl", threading.Event(), threading.Event()
    late = judge.Answers(path)  # before the other had answers

    def reply(n, _):
        if n == 3:
            held.set()
            stop.wait(30)
        return MARKS

    with endpoint(reply) as (url, requests):
        command = [sys.executable, "-c", CLIENT, str(path), url]
        paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
        client = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
        assert held.wait(60)
        with pytest.raises(BlockingIOError, match=f"{path}: another process is at work"):
            run(questions(4, 2), judge.Answers(path), url)
        stop.set()
        assert client.wait(60) == 0 and len(requests) == 8
        assert run(questions(4, 2), late, url).n_graded == 8
    assert len(requests) == 8


def test_a_client_killed_in_the_middle_goes_on(tmp_path):
    path, held = tmp_path / "a.jsonl", threading.Event()

    def reply(n, _):
        if n == 3:
            held.set()
            stop.wait(30)
        return MARKS

    stop = threading.Event()
    with endpoint(reply) as (url, requests):
        command = [sys.executable, "-c", CLIENT, str(path), url]
        paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
        client = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
        assert held.wait(60)
        client.send_signal(signal.SIGKILL)
        client.wait()
        stop.set()
        assert len(path.read_text().splitlines()) == 3
        grades = run(questions(4, 2), judge.Answers(path), url)
    assert grades.n_graded == 8
    # The one whose answer never arrived is asked again, and no other.
    assert sorted(asked(requests).values()) == [1] * 7 + [2]


def test_an_answer_that_was_cut_short_counts_as_not_given(tmp_path):
    path = tmp_path / "a.jsonl"
    with endpoint(lambda *_: MARKS) as (url, requests):
        run(questions(), judge.Answers(path), url)
        whole = path.read_bytes()
        last = whole.rstrip(b"\n").rfind(b"\n") + 1
        for cut in (last, last + 1, len(whole) - 20, len(whole) - 1):
            path.write_bytes(whole[:cut])
            requests.clear()
            assert run(questions(), judge.Answers(path), url).n_graded == 6
            assert len(requests) == 1
            assert [json.loads(line)["scores"] for line in path.read_text().splitlines()] == [
                MARKS
            ] * 6


def test_half_a_character_in_a_reply_is_kept(tmp_path):
    half = {**MARKS, "assessment": "good \ud83d"}
    for reply in (half, "no \ud83d"):
        with endpoint(lambda *_, reply=reply: reply) as (url, _):
            path = tmp_path / f"{type(reply)}.jsonl"
            grades = run(questions(1, 1), judge.Answers(path), url)
        assert grades == run(questions(1, 1), judge.Answers(path), url)
        assert grades.n_graded == (reply is half)


@pytest.mark.parametrize(
    "line", ["{\n", "[]\n", "3\n", '{"key": "a"}\n', "\x00\n", "a note", '{"text": "a"}']
)
def test_a_file_of_something_else_is_refused(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(FormatError, match=r"a\.jsonl: line 1: not an answer of a judge"):
        judge.Answers(tmp_path / "a.jsonl")
