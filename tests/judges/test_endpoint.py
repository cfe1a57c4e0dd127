"""The endpoint judge against a scripted OpenAI-compatible fault server on 127.0.0.1, in bounded time."""
import random
import time

import pytest
from judge_server import dribbles, hangs_up, prefers_shorter, says, serve, sleeps, status

from minimath.core.errors import UserError
from minimath.judges.endpoint_http import retry_after
from minimath.judges.judge import Candidate, Pair, StepCount, openai_judge, win_probabilities

GOOD = Candidate(r"5*3=15. \boxed{15}", True, StepCount(1, 1), 8)
LONG = Candidate(r"Let us restate the problem. 5*3=15. We check it. \boxed{15}", True, StepCount(1, 1), 20)
PAIRS = [Pair("p", GOOD, LONG), Pair("p", LONG, GOOD)]
__all__ = ["serve"]          # a fixture, used by its name


def quick(url, **changes):
    return openai_judge(url, "judge-1", **{"timeout_s": 1.0, "retries": 2, "concurrency": 4, **changes})


def test_endpoint_judge_asks_in_the_openai_form_and_reads_verdicts(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-key")
    url, server = serve(prefers_shorter)
    judge = quick(url, key_env="MY_KEY")
    assert judge.compare(PAIRS) == [1.0, 0.0]
    _, body, headers, path = server.seen[0]
    assert path == "/v1/chat/completions" and body["model"] == "judge-1" and body["temperature"] == 0
    assert headers["Authorization"] == "Bearer secret-key"
    assert judge.counts["requests"] == 2 and judge.counts["prompt_tokens"] == 14
    assert "secret-key" not in repr(judge)
    wins, _ = win_probabilities(judge, "p", [GOOD, LONG])
    assert wins == [1.0, 0.0]


def test_429_waits_as_long_as_retry_after_says(serve):
    url, server = serve(status(429, headers=[("Retry-After", "0.7")]), says("A"))
    judge = quick(url, concurrency=1)
    assert judge.compare(PAIRS[:1]) == [1.0]
    assert server.seen[1][0] - server.seen[0][0] >= 0.7
    assert judge.counts["http 429"] == 1 and judge.counts["retries"] == 1


def test_retry_after_is_capped_and_read_in_both_forms(serve):
    url, _ = serve(status(503, headers=[("Retry-After", "86400")]), says("B"))
    start = time.monotonic()
    assert quick(url).compare(PAIRS[:1]) == [0.0]
    assert time.monotonic() - start < 5
    assert retry_after("Wed, 21 Oct 2065 07:28:00 GMT") > 1e6
    assert retry_after("soon") == retry_after(None) == retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


@pytest.mark.parametrize("fault, kind", [
    (status(500), "http 500"), (status(502, "<html>Bad gateway</html>"), "http 502"), (sleeps, "timeout"),
    (dribbles, "timeout"), (hangs_up, "unreachable"), (status(200, "<html>welcome</html>"), "garbage"),
    (status(200, '{"choices": []}'), "garbage"), (status(200, "[1]"), "garbage"),
    (status(200, "null"), "garbage"),
    (status(200, '{"choices": [{"message": {"content": null}}]}'), "garbage"), (status(200, ""), "garbage")])
def test_a_passing_fault_is_retried_and_counted(serve, fault, kind):
    url, _ = serve(fault, says("A"))
    judge = quick(url, timeout_s=1.0, concurrency=1)
    start = time.monotonic()
    assert judge.compare(PAIRS[:1]) == [1.0]
    assert judge.counts[kind] == 1 and time.monotonic() - start < 10


@pytest.mark.parametrize("fault", [status(500), sleeps, hangs_up, status(200, "<html></html>"), status(404)])
def test_a_lasting_fault_is_no_vote_and_never_raises(serve, fault):
    url, server = serve(fault)
    start = time.monotonic()
    assert quick(url, timeout_s=0.3, retries=1).compare(PAIRS) == [None, None]
    assert time.monotonic() - start < 6 and len(server.seen) <= 4


@pytest.mark.parametrize("reply", ["I prefer A because", "", "C", "Verdict:"])
def test_verdicts_that_cannot_be_read_are_no_vote_and_are_not_retried(serve, reply):
    url, server = serve(says(reply))
    assert quick(url).compare(PAIRS) == [None, None]
    assert len(server.seen) == 2


def test_a_dead_server_is_given_up_early():
    judge = openai_judge("http://127.0.0.1:9", timeout_s=0.5, retries=1, concurrency=2)
    start = time.monotonic()
    assert judge.compare(PAIRS * 200) == [None] * 400
    assert time.monotonic() - start < 15 and judge.counts["requests"] < 60 and judge.counts["given up"] > 300


@pytest.mark.parametrize("code", [302, 307])
def test_redirects_are_not_followed_with_the_key(serve, monkeypatch, code):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    thief_url, thief = serve(says("A"))
    url, _ = serve(status(code, headers=[("Location", thief_url + "/chat/completions")]))
    assert quick(url).compare(PAIRS[:1]) == [None]
    assert thief.seen == []


@pytest.mark.parametrize("fault, hint", [
    (status(401, '{"error": "bad key secret-key"}'), "OPENAI_API_KEY"),
    (status(404, '{"error": "no model"}'), "judge_model"),
    (status(500), "HTTP 500"), (sleeps, "judge_timeout_s"),
    (status(200, "<html>login</html>"), "OpenAI-compatible")])
def test_ping_says_in_one_line_what_is_wrong(serve, monkeypatch, fault, hint):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    url, server = serve(fault)
    with pytest.raises(UserError) as caught:
        quick(url, timeout_s=0.3).ping()
    message = str(caught.value)
    assert hint in message and "\n" not in message and "secret-key" not in message and len(server.seen) == 1


def test_ping_passes_on_a_working_server_and_names_an_unreachable_one(serve):
    url, _ = serve(says("A"))
    quick(url).ping()
    with pytest.raises(UserError, match="judge_url"):
        quick("http://127.0.0.1:9/v1").ping()
    for bad in ("", "ftp://x/v1", "localhost:80", "http://"):
        with pytest.raises(UserError, match="judge_url"):
            openai_judge(bad)


def test_a_key_with_line_breaks_is_refused_without_being_shown(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\r\nX-Evil: 1")
    url, server = serve(says("A"))
    with pytest.raises(UserError, match="line breaks") as caught:
        quick(url).ping()
    assert "secret" not in str(caught.value) and server.seen == []


def test_pauses_leave_the_global_random_state_alone(serve):
    url, _ = serve(status(500), says("A"))
    random.seed(5)
    expected = random.Random(5).random()
    quick(url).compare(PAIRS[:1])
    assert random.random() == expected
