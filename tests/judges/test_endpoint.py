"""The endpoint judge against a scripted OpenAI-compatible fault server on 127.0.0.1, in bounded time."""
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import threading
import time
from contextlib import closing

import pytest
from judge_server import dribbles, hangs_up, prefers_shorter, says, serve, sleeps, status
from judging import Fixed, judge_one

from minimath.config.schema import JudgeOptions, RLAIFConfig
from minimath.core.errors import Interrupted, UserError
from minimath.core.interrupt import interruptible
from minimath.judges.base import Pair
from minimath.judges.cache import ReplyCache
from minimath.judges.endpoint import BREAKER, RETRIES, ROUND, EndpointJudge, is_fault
from minimath.train.monitor import canary_watch
from minimath.train.trainer import Step

GOOD = Fixed(r"5*3=15. \boxed{15}", tokens=8)
LONG = Fixed(r"Let us restate the problem. 5*3=15. We check it. \boxed{15}", tokens=20)
PAIRS = [Pair("p", GOOD, LONG), Pair("p", LONG, GOOD)]
REFUSED = status(400, '{"error": "unknown field"}')
__all__ = ["serve"]  # a fixture, used by its name


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    """The SDK pauses 0.5 s before its first retry."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)


def quick(url, *, retries=2, breaker=BREAKER, round_s=None, cache=None, form="plain", **options):
    """A judge with short times; options: fields of JudgeOptions."""
    options = {"model": "judge-1", "timeout_s": 1.0, "concurrency": 4, **options}
    judge = EndpointJudge(JudgeOptions(url=url, **options), cache=cache)
    judge.retries, judge.breaker, judge.reply_form = retries, breaker, form
    judge.round_s = round_s or judge.round_s
    return judge


def votes(judge, *prompts):
    """The votes on these prompts."""
    judge.prompt = lambda rubric, pair: pair
    return judge.compare(list(prompts))


def logs(*words, text="A"):
    """Answers with these (token, probability) at the first position, as a server with log-probs does."""
    top = [{"token": token, "logprob": math.log(p)} for token, p in words]
    position = {"token": words[0][0], "logprob": top[0]["logprob"], "top_logprobs": top}
    choice = {"message": {"content": text}, "finish_reason": "stop", "logprobs": {"content": [position]}}
    return lambda h, body: h.reply(200, json.dumps({"choices": [choice]}))


def by_form(**steps):
    """One step for each form of request: logprobs, json_schema, plain."""
    def step(h, body):
        form = "logprobs" if "logprobs" in body else "json_schema" if "response_format" in body else "plain"
        steps[form](h, body)
    return step


# ---- asking

def test_the_endpoint_judge_asks_in_the_openai_form_and_reads_verdicts(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-key")
    url, server = serve(prefers_shorter)
    judge = quick(url, key_env="MY_KEY")
    assert judge.compare(PAIRS) == [1.0, 0.0]
    _, body, headers, path = server.seen[0]
    assert path == "/v1/chat/completions" and body["model"] == "judge-1" and body["temperature"] == 0
    assert set(body) == {"messages", "temperature", "max_tokens", "model", "stream"}
    assert {name.lower(): value for name, value in headers.items()}["authorization"] == "Bearer secret-key"
    assert body["stream"] is False                                               # some servers stream by default
    assert judge.counts["requests"] == 2 and judge.counts["prompt_tokens"] == 14 and not judge.counts["retries"]
    assert "secret-key" not in repr(vars(judge))
    assert judge_one(judge, [GOOD, LONG])[0] == [1.0, 0.0]
    assert quick(f"{url}/chat/completions").compare(PAIRS) == [1.0, 0.0]         # the whole address works too


def test_without_a_key_none_is_sent(serve):
    url, server = serve(says("A"))
    for name in ("", "NOT_SET"):
        assert quick(url, key_env=name).compare(PAIRS[:1]) == [1.0]
    assert not any(name.lower() == "authorization" for seen in server.seen for name in seen[2])


def test_it_can_be_asked_where_an_event_loop_runs_already(serve):
    url, _ = serve(says("A"))

    async def notebook():
        return quick(url).compare(PAIRS)

    assert asyncio.run(notebook()) == [1.0, 1.0]


def test_no_more_requests_are_in_flight_than_said(serve):
    now, most = [0], [0]

    def counts(h, body):
        with h.server.lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with h.server.lock:
            now[0] -= 1
        says("A")(h, body)

    url, _ = serve(counts)
    assert votes(quick(url, concurrency=3), *"abcdefghi") == [1.0] * 9 and most[0] == 3


def test_429_waits_as_long_as_retry_after_says(serve):
    url, server = serve(status(429, headers=[("Retry-After", "0.7")]), says("A"))
    judge = quick(url, concurrency=1)
    assert judge.compare(PAIRS[:1]) == [1.0]
    assert server.seen[1][0] - server.seen[0][0] >= 0.7
    assert judge.counts["http_429"] == 1 and judge.counts["retries"] == 1


@pytest.mark.parametrize("fault, kind", [
    (status(500), "http_500"), (status(502, "<html>Bad gateway</html>"), "http_502"), (sleeps, "timeout"),
    (hangs_up, "unreachable"), (status(200, "<html>welcome</html>"), "garbage"),
    (status(200, '{"choices": []}'), "garbage"), (status(200, "[1]"), "garbage"), (status(200, "null"), "garbage"),
    (status(200, '{"choices": [{"message": {"content": null}}]}'), "garbage"), (status(200, ""), "garbage")])
def test_a_passing_fault_is_retried_and_counted(serve, fault, kind):
    url, _ = serve(fault, says("A"))
    judge = quick(url, timeout_s=0.5, concurrency=1)
    start = time.monotonic()
    assert judge.compare(PAIRS[:1]) == [1.0]
    assert judge.counts[kind] == 1 and is_fault(kind) and time.monotonic() - start < 10


@pytest.mark.parametrize("fault", [status(500), sleeps, hangs_up, status(200, "<html></html>"), status(404)])
def test_a_lasting_fault_is_no_vote_and_never_raises(serve, fault):
    url, server = serve(fault)
    start = time.monotonic()
    assert quick(url, timeout_s=0.3, retries=1).compare(PAIRS) == [None, None]
    assert time.monotonic() - start < 6 and len(server.seen) <= 4


@pytest.mark.parametrize("reply", ["I prefer A because", "", "C", "Verdict:", "A " * 300_000])
def test_verdicts_that_cannot_be_read_are_no_vote_and_are_not_retried(serve, reply):
    url, server = serve(says(reply))
    judge = quick(url)
    assert judge.compare(PAIRS) == [None, None]
    assert len(server.seen) == 2 and judge.counts["unreadable"] == 2


@pytest.mark.parametrize("code", [302, 307])
def test_redirects_are_not_followed_with_the_key(serve, monkeypatch, code):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    thief_url, thief = serve(says("A"))
    url, _ = serve(status(code, headers=[("Location", thief_url + "/chat/completions")]))
    assert quick(url).compare(PAIRS[:1]) == [None]
    assert thief.seen == []


def test_requests_to_this_machine_go_around_a_proxy(serve, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    url, _ = serve(says("A"))
    assert quick(url, retries=0).compare(PAIRS[:1]) == [1.0]


def test_a_key_that_a_server_echoes_reaches_no_cache(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    url, _ = serve(says("A because of secret-key"))
    with closing(ReplyCache(tmp_path)) as cache:
        assert quick(url, cache=cache).compare(PAIRS) == [None] * 2
    assert all(b"secret-key" not in path.read_bytes() for path in tmp_path.iterdir())


def test_pauses_leave_the_global_random_state_alone(serve):
    url, server = serve(status(500), says("A"))
    random.seed(5)
    expected = random.Random(5).random()
    quick(url).compare(PAIRS[:1])
    assert random.random() == expected and len(server.seen) == 2


# ---- ping

@pytest.mark.parametrize("fault, hint", [
    (status(401, '{"error": "bad key secret-key"}'), "OPENAI_API_KEY"),
    (status(404, '{"error": "no model"}'), "judge_model"),
    (status(503), "HTTP 503"), (sleeps, "judge_timeout_s"),
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
    for bad in ("", "ftp://x/v1", "localhost:80", "http://", "http://127.0.0.1:99999/v1", "http://127.0.0.1:x/v1",
                "http://[::1/v1"):
        with pytest.raises(UserError, match="judge_url"):
            quick(bad)
    with pytest.raises(UserError, match="judge_model"):
        quick(url, model="")
    with pytest.raises(UserError, match="judge_url") as caught:
        quick("ftp://me:secret@host/v1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url, name, value", [
    ("http://h_\u00fc.example.invalid/v1", "NONE", ""), ("http://example.invalid/v1", "ALL_PROXY", "sock://me:secret@h:9"),
    ("http://example.invalid/v1", "HTTP_PROXY", "h:x"), ("https://example.invalid/v1", "SSL_CERT_FILE", "/nowhere")])
def test_an_address_a_proxy_or_certificates_that_the_client_cannot_take_get_one_line(monkeypatch, url, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="judge_url=.*; correct the address, or the proxy") as caught:
        quick(url).ping()
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_key_with_line_breaks_is_refused_without_being_shown(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\r\nX-Evil: 1")
    url, server = serve(says("A"))
    with pytest.raises(UserError, match="line breaks") as caught:
        quick(url).ping()
    assert "secret" not in str(caught.value) and server.seen == []


def test_a_server_with_logprobs_gives_soft_votes(serve):
    url, server = serve(logs(("A", 0.6), ("B", 0.15), ("I", 0.1), ("TIE", 0.05)))
    judge = quick(url)
    judge.ping()
    assert judge.soft and judge.reply_form == "logprobs" and votes(judge, "p") == [pytest.approx(0.625 / 0.8)]
    body = server.seen[-1][1]
    assert body["logprobs"] is True and body["top_logprobs"] == 20 and len(server.seen) == 2


@pytest.mark.parametrize("refusal", [REFUSED, status(422), status(500), status(501), says("A")])
def test_the_next_form_is_asked_once_and_remembered(serve, refusal):
    url, server = serve(by_form(logprobs=refusal, json_schema=says('{"verdict": "B"}'), plain=refusal))
    judge = quick(url)
    judge.ping()
    assert judge.reply_form == "json_schema" and not judge.soft
    assert votes(judge, "p", "q") == [0.0, 0.0] and len(server.seen) == 4
    wanted = server.seen[-1][1]["response_format"]["json_schema"]
    assert wanted["strict"] and wanted["schema"]["properties"]["verdict"]["enum"] == ["A", "B", "TIE"]


def test_a_server_without_both_is_asked_plainly(serve):
    url, server = serve(by_form(logprobs=REFUSED, json_schema=REFUSED, plain=says("TIE")))
    judge = quick(url)
    judge.ping()
    assert (judge.reply_form, judge.soft) == ("plain", False) and votes(judge, "p") == [0.5]
    assert set(server.seen[-1][1]) == {"messages", "temperature", "max_tokens", "model", "stream"}


@pytest.mark.parametrize("said", [
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    "Unsupported value: 'temperature' does not support 0 with this model."])
def test_newer_field_names_are_learned_at_ping(serve, said):
    url, server = serve(status(400, json.dumps({"error": {"message": said}})), logs(("A", 0.9), ("B", 0.1)))
    judge = quick(url, max_tokens=99)
    judge.ping()
    assert judge.reply_form == "logprobs" and votes(judge, "p") == [pytest.approx(0.9)]
    body = server.seen[-1][1]
    assert body["max_completion_tokens"] == 99 and "max_tokens" not in body and "temperature" not in body


def test_a_model_that_thinks_too_long_is_said_at_ping_and_is_no_vote_later(serve):
    url, server = serve(status(200, '{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}'))
    with pytest.raises(UserError, match="judge_max_tokens"):
        quick(url).ping()
    judge = quick(url)
    assert votes(judge, "p") == [None] and len(server.seen) == 2                 # not asked again
    assert judge.counts["cut_off"] == judge.counts["unreadable"] == 1


def completion(message, end="stop", **choice):
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": end, **choice}]})


def streamed(*deltas, end="stop"):
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": end}]},
               {"choices": [], "usage": {"prompt_tokens": 5}}]
    return ": a comment\n\n" + "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


@pytest.mark.parametrize("reply", [
    streamed({"role": "assistant", "content": ""}, {"content": "{\"verdict\": "}, {"content": "\"A\"}"}),
    streamed({"reasoning_content": "Is it B? "}, {"reasoning_content": "No."}, {"content": "A"}),
    completion({"content": "The first one, as far as I can tell, is not B.\n</think>\n\nA"}),
    completion({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "B"}]},
                            {"type": "text", "text": "A"}]}),
    completion({"content": "```json\n{\"verdict\": \"A\"}\n```", "reasoning": "B"})])
def test_streams_and_thoughts_are_read(serve, reply):
    url, server = serve(status(200, reply))
    judge = quick(url)
    judge.ping()
    assert votes(judge, "p") == [1.0] and not judge.counts["garbage"]


@pytest.mark.parametrize("reply, hint", [
    (completion({"content": None, "reasoning_content": "The first one. A"}), "reasoning_content"),
    (completion({"content": "", "reasoning": "The first one. A"}), "answers in reasoning"),
    (completion({"content": [{"type": "thinking", "thinking": "A"}]}), "answers in thinking"),
    (completion({"content": None, "refusal": "I can't judge"}), "refusal"),
    (completion({"content": "<think>\nThe first one"}, "length"), "raise judge_max_tokens=16"),
    (completion({"content": "<think>\nThe first one"}), "answers in thoughts"),
    (completion({"content": "The first one is cut before"}, "length"), "raise judge_max_tokens=16"),
    (streamed({"reasoning_content": "The first"}, end="length"), "raise judge_max_tokens=16"),
    ('{"error": {"message": "model overloaded", "code": 502}}', "HTTP 502 .*model overloaded"),
    ('{"error": {"message": "no such model", "code": 404}}', "HTTP 404 .*no such model"),
    ('{"error": "out of credits"}', "out of credits"),
    ('{"object": "error", "message": "bad", "code": 401}', "HTTP 401"),
    (completion({"content": ""}, "error", error={"message": "upstream died", "code": 503}), "HTTP 503 .*upstream died"),
    ('data: {"error": {"message": "upstream died"}}\n\n', "upstream died"),
    ('data: {"error": {"message": "no such model", "code": 404}}\n\n', "HTTP 404 .*no such model"),
    ('{"choices": [], "detail": "filtered"}', "filtered")])
def test_what_gives_no_verdict_is_told_at_ping_and_is_no_vote(serve, reply, hint):
    url, _ = serve(status(200, reply))
    with pytest.raises(UserError, match=hint) as caught:
        quick(url).ping()
    assert "\n" not in str(caught.value)
    assert votes(quick(url, retries=0), "p") == [None]


@pytest.mark.parametrize("busy", [429, 503])
def test_ping_waits_for_a_busy_server_as_long_as_it_says(serve, busy):
    url, server = serve(status(busy, headers=[("Retry-After", "0.3")]), logs(("A", 0.9), ("B", 0.1)))
    judge = quick(url)
    judge.ping()
    assert judge.reply_form == "logprobs" and len(server.seen) == 2 and server.seen[1][0] - server.seen[0][0] >= 0.3
    url, server = serve(status(429, '{"error": "slow down"}', headers=[("Retry-After", "0")]))
    with pytest.raises(UserError, match="HTTP 429 .*slow down"):
        quick(url).ping()
    assert len(server.seen) == 3  # two retries, as of any request


# ---- time and breaker

def test_a_round_gets_twenty_times_the_time_of_a_request_and_three_retries():
    judge = EndpointJudge(JudgeOptions(url="http://127.0.0.1:9/v1", model="m", timeout_s=7.0))
    assert (judge.round_s, judge.retries, judge.breaker) == (140.0, 3, 16) == (ROUND * 7.0, RETRIES, BREAKER)


def test_what_is_not_answered_within_the_round_is_no_vote(serve):
    url, server = serve(says("A"), sleeps)
    judge = quick(url, round_s=0.6, timeout_s=5.0, concurrency=1)
    start = time.monotonic()
    assert votes(judge, *["p"] * 50) == [1.0] + [None] * 49
    assert time.monotonic() - start < 3 and len(server.seen) == 2
    assert judge.counts["out_of_time"] == 49


def test_a_pause_does_not_outlast_the_round(serve):
    url, _ = serve(status(429, headers=[("Retry-After", "30")]))
    start = time.monotonic()
    assert votes(quick(url, round_s=0.4, timeout_s=60.0, retries=9), "p") == [None]
    assert time.monotonic() - start < 3


def drips_headers(h, body):
    h.wfile.write(b"HTTP/1.0 200 OK\r\n")
    for _ in range(50):
        h.wfile.write(b"X")
        h.wfile.flush()
        if h.server.closing.wait(0.1):
            return


@pytest.mark.parametrize("fault", [dribbles, drips_headers])
def test_a_server_that_dribbles_is_left(serve, fault):
    url, _ = serve(fault)
    judge = quick(url, timeout_s=0.4, retries=0)
    start = time.monotonic()
    assert votes(judge, "p") == [None] and judge.counts["timeout"] == 1
    assert time.monotonic() - start < 2.5


def test_a_dead_server_is_given_up_early():
    judge = quick("http://127.0.0.1:9", timeout_s=0.5, retries=1, concurrency=2)
    start = time.monotonic()
    assert judge.compare(PAIRS * 200) == [None] * 400
    assert time.monotonic() - start < 15 and judge.counts["requests"] < 60 and judge.counts["given_up"] > 300


def test_the_breaker_opens_after_n_failures_and_one_success_closes_it(serve):
    url, server = serve(*[hangs_up] * 6, says("A"))
    judge = quick(url, breaker=3, retries=1, concurrency=1)
    assert votes(judge, *["p"] * 20) == [None] * 20
    assert len(server.seen) == 6 and judge.counts["given_up"] == 17
    assert votes(judge, *["p"] * 20) == [1.0] * 20                               # asked again in the next round
    server.script = [hangs_up]
    assert votes(judge, *["p"] * 20) == [None] * 20 and len(server.seen) == 26 + 6


def test_a_dead_server_costs_one_request_per_later_round(serve):
    url, server = serve(hangs_up)
    judge = quick(url, breaker=3, retries=1, concurrency=1)
    votes(judge, *["p"] * 20)
    seen = len(server.seen)
    assert votes(judge, *["p"] * 20) == [None] * 20 and len(server.seen) == seen + 1


def test_refused_prompts_do_not_open_the_breaker(serve):
    url, server = serve(*[REFUSED] * 9, says("A"))
    assert votes(quick(url, breaker=3, concurrency=1), *["p"] * 10) == [None] * 9 + [1.0]
    assert len(server.seen) == 10                                                # nor are they tried again


def test_a_server_that_is_down_is_said_once_with_what_was_met(serve):
    url, _ = serve(hangs_up)
    judge, heard = quick(url, breaker=3, retries=0), []
    judge.say = heard.append
    for _ in range(2):
        judge_one(judge, [GOOD, LONG, Fixed("third")])
    assert len(heard) == 1 and "no vote on 100% of 6 questions" in heard[0] and "x unreachable" in heard[0]


# ---- tokens and replies that are kept

def test_tokens_and_seconds_are_counted(serve):
    url, _ = serve(says("A"), says("A"), status(200, '{"choices": [{"message": {"content": "A"}}]}'))
    judge = quick(url, concurrency=1)
    votes(judge, "p", "q", "r")
    assert judge.counts["requests"] == 3
    assert (judge.counts["prompt_tokens"], judge.counts["completion_tokens"]) == (14, 2)
    assert 0 < judge.counts["request_seconds"] < 5


def test_a_second_run_pays_nothing_and_votes_the_same(serve, tmp_path):
    url, server = serve(logs(("A", 0.6), ("B", 0.3)))
    both = []
    for _ in range(2):
        with closing(ReplyCache(tmp_path)) as cache:
            judge = quick(url, cache=cache)
            judge.ping()
            both.append(votes(judge, "p", "q"))
    assert both[0] == both[1] == [pytest.approx(2 / 3)] * 2
    assert judge.counts["cache_hits"] == 2 and judge.counts["requests"] == 1 and len(server.seen) == 4   # two pings


def test_neither_failures_nor_unreadable_replies_are_kept(serve, tmp_path):
    url, server = serve(status(404), says("neither"), says("A"))
    with closing(ReplyCache(tmp_path)) as cache:
        judge = quick(url, cache=cache)
        assert [votes(judge, "p") for _ in range(4)] == [[None], [None], [1.0], [1.0]]
        assert len(server.seen) == 3 and judge.counts["unreadable"] == judge.counts["cache_hits"] == 1


def test_an_unreadable_reply_that_an_earlier_version_kept_is_asked_for_again(serve, tmp_path, monkeypatch):
    url, server = serve(says("neither"), says("A"))
    with closing(ReplyCache(tmp_path)) as cache:
        with monkeypatch.context() as earlier:
            earlier.setattr("minimath.judges.endpoint.vote", lambda reply: 0.5)
            assert votes(quick(url, cache=cache), "p") == [0.5]
        assert [votes(quick(url, cache=cache), "p") for _ in range(2)] == [[1.0], [1.0]] and len(server.seen) == 2


def test_a_canary_of_a_later_step_or_another_run_asks_an_updated_endpoint_again_a_resumed_one_not(serve, tmp_path):
    cfg, seen = RLAIFConfig(judge_canary_every=2), []
    url, server = serve(says("A"))
    with closing(ReplyCache(tmp_path)) as cache:
        for number, verdict, run in ((2, "A", "runs/1"), (4, "B", "runs/1"), (4, "A", "runs/1"), (4, "A", "runs/2")):
            server.script = [says(verdict)]
            watch = canary_watch(cfg, quick(url, cache=cache), run)
            assert watch(Step(number - 1, None, 0.0), []) == {}
            seen.append((watch(Step(number, None, 0.0), [])["canary/position_bias"], len(server.seen)))
    assert seen == [(1.0, 48), (-1.0, 96), (-1.0, 96), (1.0, 144)]


@pytest.mark.parametrize("key", ["1", "a", "A", "null", "EMPTY"])
def test_a_dummy_key_of_a_local_server_spoils_no_reply(serve, monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    judge = quick(serve(says("A"))[0], key_env="MY_KEY")
    assert judge.compare(PAIRS) == [1.0, 1.0] and judge.counts["prompt_tokens"] == 14


def test_a_model_whose_log_probs_nobody_may_ask_for_is_asked_in_another_form(serve):
    refused = status(403, '{"error": {"message": "You are not allowed to request logprobs from this model"}}')
    judge = quick(serve(by_form(logprobs=refused, json_schema=says('{"verdict": "A"}')))[0])
    judge.ping()
    assert judge.reply_form == "json_schema" and not judge.soft
    url, server = serve(status(403, "no such key"))
    with pytest.raises(UserError, match="HTTP 403 no such key"):
        quick(url).ping()
    assert len(server.seen) == 1


@contextlib.contextmanager
def hears_ctrl_c(*_):
    """What a command in the foreground does; a shell starts one in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("within, raised", [(interruptible, Interrupted), (hears_ctrl_c, KeyboardInterrupt)],
                         ids=["a run", "a command"])
def test_a_stop_does_not_wait_for_a_server_that_hangs(serve, within, raised):
    judge = quick(serve(sleeps)[0], timeout_s=4.0, retries=0)
    with within((), lambda text: None):
        start = time.monotonic()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(raised):
            judge.compare(PAIRS)
        assert time.monotonic() - start < 3
