"""Verdict forms, budgets, breaker, costs and cache of the endpoint client, against a scripted server."""
import json
import math
import time
from dataclasses import replace

import pytest
from judge_server import dribbles, hangs_up, says, serve, sleeps, status

from minimath.config.schema import RLAIFConfig
from minimath.core.errors import UserError
from minimath.judges.endpoint import ChatClient, client_for
from minimath.judges.endpoint_verdict import VOTES, Reply, json_vote, read_reply, soft_vote, vote
from minimath.judges.cache import ReplyCache

__all__ = ["serve"]          # a fixture, used by its name
REFUSED = status(400, '{"error": "unknown field"}')


def client(url, **changes):
    return ChatClient(url, "m", **{"timeout_s": 1.0, "retries": 1, "concurrency": 2, "pause_s": 0.05, "form": "auto",
                                   **changes})


def read(text):
    return VOTES.get(text)


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


# ---- forms

def test_a_server_with_logprobs_gives_soft_votes(serve):
    url, server = serve(logs(("A", 0.6), ("B", 0.15), ("I", 0.1), ("TIE", 0.05)))
    asked = client(url)
    assert asked.ping() == "verdicts by logprobs"
    assert asked.verdicts(["p"], read) == [pytest.approx(0.625 / 0.8)]
    body = server.seen[-1][1]
    assert body["logprobs"] is True and body["top_logprobs"] == 20 and len(server.seen) == 2
    assert asked.counts["soft votes"] == 1


@pytest.mark.parametrize("refusal", [REFUSED, status(422), status(500), status(501), says("A")])
def test_the_next_form_is_asked_once_and_remembered(serve, refusal):
    schema = says('{"verdict": "B"}')
    url, server = serve(by_form(logprobs=refusal, json_schema=schema, plain=refusal))
    asked = client(url)
    assert asked.ping() == "verdicts by json_schema"
    assert asked.verdicts(["p", "q"], read) == [0.0, 0.0] and len(server.seen) == 4
    wanted = server.seen[-1][1]["response_format"]["json_schema"]
    assert wanted["strict"] and wanted["schema"]["properties"]["verdict"]["enum"] == ["A", "B", "TIE"]


def test_a_server_without_both_is_asked_plainly(serve):
    url, server = serve(by_form(logprobs=REFUSED, json_schema=REFUSED, plain=says("TIE")))
    asked = client(url)
    assert asked.ping() == "verdicts by plain"
    assert asked.verdicts(["p"], read) == [0.5]
    assert set(server.seen[-1][1]) == {"messages", "temperature", "max_tokens", "model"}


def test_a_form_that_is_named_but_missing_is_an_error(serve):
    url, _ = serve(says("A"))
    for form in ("logprobs", "json_schema"):
        with pytest.raises(UserError, match=f"{form}.*judge_verdict=auto"):
            client(url, form=form).ping()


def test_a_form_refused_later_is_left_but_not_for_a_prompt_that_is_too_long(serve):
    url, server = serve(logs(("A", 0.9), ("B", 0.1)), by_form(logprobs=REFUSED, json_schema=REFUSED, plain=REFUSED),
                        by_form(logprobs=REFUSED, json_schema=REFUSED, plain=REFUSED), logs(("A", 0.8), ("B", 0.2)),
                        by_form(logprobs=REFUSED, json_schema=REFUSED, plain=says("A")))
    asked = client(url, concurrency=1)
    asked.ping()
    assert asked.verdicts(["too long", "p"], read) == [None, pytest.approx(0.8)]     # the form stayed
    assert asked.verdicts(["p", "q", "r"], read) == [1.0, 1.0, 1.0]
    assert [("logprobs" in s[1], "response_format" in s[1]) for s in server.seen[4:]] == [
        (True, False), (False, False), (False, True), (False, False), (False, False)]


def test_newer_field_names_are_learned_at_ping(serve):
    url, server = serve(
        status(400, '{"error": {"message": "Unsupported parameter: \'max_tokens\' is not supported with this model. '
                    'Use \'max_completion_tokens\' instead."}}'),
        status(400, '{"error": {"message": "Unsupported value: \'temperature\' does not support 0 with this model."}}'),
        logs(("A", 0.9), ("B", 0.1)))
    asked = client(url, max_tokens=99)
    assert asked.ping() == "verdicts by logprobs" and asked.verdicts(["p"], read) == [pytest.approx(0.9)]
    body = server.seen[-1][1]
    assert body["max_completion_tokens"] == 99 and "max_tokens" not in body and "temperature" not in body


def test_a_model_that_thinks_too_long_is_said_at_ping_and_is_no_vote_later(serve):
    thinks = status(200, '{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}')
    url, server = serve(thinks)
    with pytest.raises(UserError, match="judge_max_tokens"):
        client(url).ping()
    asked = client(url)
    assert asked.verdicts(["p"], read) == [None] and len(server.seen) == 2           # not asked again
    assert asked.counts["cut off"] == asked.counts["unreadable"] == 1


@pytest.mark.parametrize("top, chance", [
    ([("A", 0.5), ("B", 0.5)], 0.5), ([(" A", 0.3), ("**B", 0.1), ("A", 0.1)], 0.8), ([("\u0120B", 0.7)], 0.0),
    ([("T", 0.6), ("A", 0.2)], 0.625), ([("TI", 0.1), ("Tie", 0.1)], 0.5), ([("a", 0.9), ("b", 0.05)], None),
    ([("The", 0.9), ("A", 0.05), ("B", 0.04)], None), ([("A", 0.06), ("B", 0.06)], 0.5), ([], None)])
def test_soft_vote_is_the_share_of_a_in_the_closed_set(top, chance):
    logged = tuple((token, math.log(p)) for token, p in top)
    assert soft_vote(logged) == (None if chance is None else pytest.approx(chance))


def test_votes_fall_back_to_the_text_and_skip_marks_and_thoughts():
    first = {"token": "**", "top_logprobs": [{"token": "**", "logprob": 0.0}]}
    second = {"token": "B", "top_logprobs": [{"token": "B", "logprob": -0.1}, {"token": "A", "logprob": -3.0}]}
    choice = {"message": {"content": "**B**"}, "logprobs": {"content": [first, second]}}
    assert read_reply(choice, "logprobs").top == (("B", -0.1), ("A", -3.0))
    assert read_reply(choice, "plain").top == ()
    assert vote(Reply("A", "logprobs", top=(("The", -0.01), ("A", -9.0))), read) == 1.0
    assert vote(Reply("<think>B is\nwrong</think>\n\nA"), read) == 1.0
    assert vote(Reply('{"verdict": "A"}'), read) is None             # plain: the text alone counts
    for odd in (None, 3, [], {"content": 3}, {"content": ["A"]}, {"content": [{"token": None}]}, {"tokens": ["A"]},
                {"content": [{"token": "A", "top_logprobs": [{"token": "A", "logprob": "x"}]}]}):
        assert read_reply({"message": {"content": "A"}, "logprobs": odd}, "logprobs") == Reply("A", "logprobs")


@pytest.mark.parametrize("text", ['{"verdict": "C"}', '{"verdict": ["A"]}', '["A"]', '"A"', "A", "", '{"a": "A"}', "0"])
def test_json_that_is_no_verdict_is_no_vote(text):
    assert json_vote(text) is None and json_vote('{ "verdict":\n"TIE"}') == 0.5


# ---- budgets and breaker

def test_what_is_not_answered_within_the_step_is_no_vote(serve):
    url, server = serve(says("A"), sleeps)
    asked = client(url, step_s=0.6, timeout_s=5.0, concurrency=1)
    start = time.monotonic()
    assert asked.verdicts(["p"] * 50, read) == [1.0] + [None] * 49
    assert time.monotonic() - start < 3 and len(server.seen) == 2
    assert asked.counts["out of time"] == 49 and asked.counts["timeout"] == 1


def test_a_pause_does_not_outlast_the_step(serve):
    url, _ = serve(status(429, headers=[("Retry-After", "30")]))
    start = time.monotonic()
    assert client(url, step_s=0.4, timeout_s=60.0, retries=9).verdicts(["p"], read) == [None]
    assert time.monotonic() - start < 3


def drips_headers(h, body):
    h.wfile.write(b"HTTP/1.0 200 OK\r\n")
    for _ in range(50):
        h.wfile.write(b"X")
        h.wfile.flush()
        if h.server.closing.wait(0.1):
            return


@pytest.mark.parametrize("fault", [dribbles, drips_headers])
def test_a_server_that_dribbles_is_left_at_the_time_out(serve, fault):
    url, _ = serve(fault)
    asked = client(url, timeout_s=0.5, retries=0)
    start = time.monotonic()
    assert asked.verdicts(["p"], read) == [None] and asked.counts["timeout"] == 1
    assert time.monotonic() - start < 2.5


def test_the_breaker_opens_after_n_failures_and_one_success_closes_it(serve):
    url, server = serve(*[hangs_up] * 6, says("A"))
    asked = client(url, breaker=3, retries=1, concurrency=1)
    assert asked.verdicts(["p"] * 20, read) == [None] * 20
    assert len(server.seen) == 6 and asked.counts["given up"] == 17
    assert asked.verdicts(["p"] * 20, read) == [1.0] * 20            # asked again at the next step
    server.script = [hangs_up]
    assert asked.verdicts(["p"] * 20, read) == [None] * 20 and len(server.seen) == 26 + 6


def test_a_dead_server_costs_one_request_per_later_step(serve):
    url, server = serve(hangs_up)
    asked = client(url, breaker=3, retries=1, concurrency=1)
    asked.verdicts(["p"] * 20, read)
    seen = len(server.seen)
    assert asked.verdicts(["p"] * 20, read) == [None] * 20 and len(server.seen) == seen + 1


def test_refused_prompts_do_not_open_the_breaker(serve):
    url, server = serve(*[REFUSED] * 9, says("A"))
    assert client(url, breaker=3, concurrency=1).verdicts(["p"] * 10, read) == [None] * 9 + [1.0]


def test_pauses_have_full_jitter_on_top_of_what_the_server_asks(monkeypatch):
    pauses = []
    monkeypatch.setattr("minimath.judges.endpoint.time.sleep", pauses.append)
    asked = client("http://127.0.0.1:9", retries=4, pause_s=0.5, timeout_s=3.0)
    for _ in range(50):
        asked._failed_in_a_row = 0
        asked.chat("p")
    for n in range(4):
        drawn = pauses[n::4]
        assert 0 <= min(drawn) < 0.2 * 0.5 * 2 ** n and 0.5 * 2 ** n * 0.7 < max(drawn) <= min(3.0, 0.5 * 2 ** n)


# ---- cost and cache

def test_tokens_seconds_and_cost_are_counted_and_a_missing_report_is_said(serve):
    url, _ = serve(says("A"), says("A"), status(200, '{"choices": [{"message": {"content": "A"}}]}'))
    asked = client(url, price_in=2.0, price_out=10.0, concurrency=1)
    asked.chat_many(["p", "q", "r"])
    assert asked.counts["requests"] == 3 and asked.counts["no usage"] == 1
    assert (asked.counts["prompt_tokens"], asked.counts["completion_tokens"]) == (14, 2)
    assert asked.counts["cost"] == pytest.approx((14 * 2 + 2 * 10) / 1e6)
    assert 0 < asked.counts["request seconds"] < 5
    assert "cost" not in client(url).counts


def test_a_second_run_pays_nothing_and_votes_the_same(serve, tmp_path):
    url, server = serve(logs(("A", 0.6), ("B", 0.3)))
    votes = []
    for _ in range(2):
        with ReplyCache(tmp_path) as cache:
            asked = client(url, cache=cache)
            asked.ping()
            votes.append(asked.verdicts(["p", "q"], read))
    assert votes[0] == votes[1] == [pytest.approx(2 / 3)] * 2
    assert asked.counts["cache hits"] == 2 and asked.counts["requests"] == 1 and len(server.seen) == 4     # two pings


def test_failures_are_not_kept_and_unreadable_replies_are(serve, tmp_path):
    url, server = serve(status(404), says("neither"), says("A"))
    with ReplyCache(tmp_path) as cache:
        asked = client(url, cache=cache)
        assert [asked.verdicts(["p"], read) for _ in range(3)] == [[None]] * 3
        assert len(server.seen) == 2 and asked.counts["unreadable"] == 2 and asked.counts["cache hits"] == 1
        other = ChatClient(url, "other model", cache=cache)
        assert other.verdicts(["p"], read) == [1.0]                  # another model is another question


def test_a_kept_reply_that_cannot_be_read_is_asked_again(serve, tmp_path):
    url, server = serve(says("A"))
    with ReplyCache(tmp_path) as cache:
        cache.get = lambda key: '{"text": "B"}'
        assert client(url, cache=cache).verdicts(["p"], read) == [1.0] and len(server.seen) == 1
    for text in ("", "null", "[]", '{"text": "A", "form": "plain", "cut": false, "top": [["A"]]}'):
        assert Reply.loads(text) is None
    reply = Reply("A", "logprobs", True, (("A", -0.5), ("B", -1.0)))
    assert Reply.loads(reply.dumps()) == reply


# ---- options

def test_every_judge_option_reaches_the_client(tmp_path):
    values = {"url": "http://127.0.0.1:9/v1", "model": "j", "key_env": "K", "timeout_s": 2.5, "retries": 7,
              "concurrency": 3, "max_tokens": 33, "step_s": 44.0, "breaker": 5, "price_in": 0.5, "price_out": 1.5}
    cfg = replace(RLAIFConfig(), judge_verdict="json_schema", judge_cache=str(tmp_path),
                  **{f"judge_{name}": value for name, value in values.items()})
    asked = client_for(cfg)
    assert {name: getattr(asked, name) for name in values} == values and asked.form == "json_schema"
    assert asked.cache.path.parent == tmp_path
    asked.cache.close()
    assert client_for(replace(cfg, judge_cache="none")).cache is None


def test_credentials_in_the_address_are_refused_without_being_shown():
    with pytest.raises(UserError, match="judge_key_env") as caught:
        ChatClient("http://me:secret@host/v1")
    assert "secret" not in str(caught.value)
