"""Faults of a vLLM server: each is one line that says what to do, in bounded time, without the key."""

import time

import pytest
from fake_vllm import asked

from minimath.core.errors import UserError
from minimath.rollout import vllm_client

pytest_plugins = ["vllm_fixtures"]
KEY = "secret-of-the-tests"


def answers(status, content):
    return lambda handler, body: handler.reply(status, content)


def hangs(handler, body):
    handler.server.closing.wait(60)


def hangs_up(handler, body):
    handler.connection.close()


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda c: c.pop("token_ids"), "no token ids.*0.10.2"),
        (lambda c: c.update(token_ids=[]), "no token ids"),
        (lambda c: c.update(token_ids=["5"] * 6), "no token ids"),
        (lambda c: c.update(logprobs=None), "0 log-probs for 6 tokens"),
        (lambda c: c["logprobs"].update(token_logprobs=[None] * 6), "no numbers"),
        (lambda c: c["logprobs"]["token_logprobs"].pop(), "5 log-probs for 6 tokens"),
        (lambda c: (c["token_ids"].append(5), c["logprobs"]["token_logprobs"].append(-1.0)), "cut at 7 tokens"),
        (lambda c: (c["token_ids"].pop(), c["logprobs"]["token_logprobs"].pop()), "cut at 5 tokens .*max-model-len"),
        (lambda c: c.update(finish_reason="abort"), "cut at 6 tokens .abort"),
        (lambda c: c["prompt_token_ids"].insert(0, 1), "changed the prompt's token ids"),
    ],
)
def test_an_answer_that_is_not_to_what_was_asked_is_refused(server, opened, monkeypatch, change, says):
    engine = opened(max_new_tokens=6)
    monkeypatch.setattr(engine, "swap", lambda: None)
    server.alter = change
    with pytest.raises(UserError, match=says):
        engine.generate([[5, 6, 7]])


@pytest.mark.parametrize(
    "step, says",
    [
        (answers(200, {"choices": []}), "with one choice"),
        (answers(200, {"choices": [{}, {}]}), "with one choice"),
        (answers(200, "<html>"), "with one choice; is it a vLLM server"),
        (answers(200, "[1]"), "with one choice; is it a vLLM server"),
        (answers(200, "x" * 500_000), "with one choice; is it a vLLM server"),
        (answers(302, ""), "HTTP 302"),
        (answers(400, {"error": {"message": "max_tokens is too large"}}), "HTTP 400 .max_tokens is too large"),
        (answers(404, {"error": {"message": "The model `x` does not exist."}}), "does not know .* was it restarted"),
    ],
)
def test_other_replies_are_one_line_that_says_what_to_do(server, opened, monkeypatch, step, says):
    engine = opened(max_new_tokens=6)
    monkeypatch.setattr(engine, "swap", lambda: None)
    server.script["/v1/completions"] = [step]
    with pytest.raises(UserError, match=says) as caught:
        engine.generate([[5, 6, 7]])
    assert "\n" not in str(caught.value)


def test_a_server_out_of_reach_is_reported(opened, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="cannot be used .*; start it, or correct vllm_url"):
        opened()
    for url in ("127.0.0.1:8000", "ftp://x/v1", "http://", "http://x:port/v1"):
        with pytest.raises(UserError, match="cannot be used .*correct vllm_url"):
            opened(vllm_url=url)


def test_the_one_model_that_is_served_is_taken_and_too_short_a_limit_refused(server, opened, trained):
    trained.options.name = "other"
    assert opened().backend.model == server.name
    cards = [{"id": name, "root": name, "parent": None} for name in ("a", "b")]
    server.script["/v1/models"] = [answers(200, {"data": cards})]
    with pytest.raises(UserError, match="serves a, b, not other; start it with that model"):
        opened()
    with pytest.raises(UserError, match="takes 256 tokens.* --max-model-len 300"):
        opened(max_prompt_len=288)


def test_a_server_without_run_time_adapters_is_reported(server, opened):
    engine, server.runtime_lora = opened(), False
    with pytest.raises(UserError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        engine.swap()
    server.runtime_lora = True
    server.script["/v1/load_lora_adapter"] = [answers(404, {"error": {"message": "No adapter found for /x"}})]
    with pytest.raises(UserError, match="the run folder .out=. under the same path"):
        engine.swap()
    server.script["/v1/load_lora_adapter"] = [answers(400, {"error": {"message": "LoRA rank 64 is greater"}})]
    with pytest.raises(UserError, match="rank 64 is greater.*--max-lora-rank"):
        engine.swap()


def test_the_key_is_sent_and_never_shown(server, opened, monkeypatch):
    server.key = KEY
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    opened().generate([[5, 6]])
    assert all(f"Bearer {KEY}" in headers.values() for _, _, headers in server.seen)
    server.key = "another"
    with pytest.raises(UserError, match="refuses the key .*VLLM_API_KEY") as caught:
        opened()
    assert KEY not in str(caught.value) and "***" in str(caught.value)
    monkeypatch.setenv("VLLM_API_KEY", KEY + "\n\nx")
    with pytest.raises(UserError, match="VLLM_API_KEY has line breaks") as caught:
        opened()
    assert KEY not in str(caught.value)


def test_no_redirect_is_followed_with_the_key(server, opened, monkeypatch):
    engine = opened()
    monkeypatch.setattr(engine, "swap", lambda: None)

    def elsewhere(handler, body):
        handler.send_response(302)
        handler.send_header("Location", "/v1/elsewhere")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    server.script["/v1/completions"] = [elsewhere]
    with pytest.raises(UserError, match="HTTP 302"):
        engine.generate([[5, 6]])
    assert not any("elsewhere" in path for path, _, _ in server.seen)


def test_passing_faults_are_tried_again(server, opened, monkeypatch):
    engine = opened()
    busy = answers(503, {"error": {"message": "busy"}})
    server.script["/v1/completions"] = [busy, hangs_up, busy]
    assert len(engine.generate([[5, 6]])[0]) == 1
    server.script["/v1/completions"] = [busy] * 4
    with pytest.raises(UserError, match="HTTP 503 .busy"):
        engine.generate([[5, 6]])

    def loads_and_hangs_up(handler, body):
        server.adapters[body["lora_name"]] = body["lora_path"]
        handler.connection.close()

    server.script["/v1/load_lora_adapter"] = [loads_and_hangs_up]
    engine.swap()


def test_one_failure_ends_the_other_requests_at_once(server, opened, monkeypatch):
    engine, begun = opened(), time.monotonic()
    monkeypatch.setattr(engine, "swap", lambda: None)
    server.script["/v1/completions"] = [hangs, hangs, answers(400, {"error": {"message": "no"}}), hangs]
    with pytest.raises(UserError, match="HTTP 400"):
        engine.generate([[5, 6]], 4)
    server.script["/v1/completions"] = [hangs, hangs]
    stream = engine.stream([[5, 6]], 3)
    while not next(stream):
        pass
    stream.close()  # the caller asks for no more
    assert time.monotonic() - begun < 20
    assert engine.generate([[5, 6]])  # still of use


def test_a_caller_is_heard_while_a_server_computes(server, opened, monkeypatch):
    engine = opened()
    monkeypatch.setattr(engine, "swap", lambda: None)
    monkeypatch.setattr(vllm_client, "LOOK_S", 0.05)
    server.script["/v1/completions"] = [hangs]
    stream = engine.stream([[5, 6]])
    assert [next(stream) for _ in range(3)] == [[], [], []]
    stream.close()


def test_a_server_that_never_answers_costs_one_timeout(server, opened, monkeypatch):
    engine, begun = opened(), time.monotonic()
    monkeypatch.setattr(engine, "swap", lambda: None)
    monkeypatch.setattr(vllm_client, "ANSWER_S", 0.3)
    server.script["/v1/completions"] = [hangs] * 4
    with pytest.raises(UserError, match="no answer in 0.3 s"):
        engine.generate([[5, 6]])
    assert time.monotonic() - begun < 20 and asked(server)[-2:].count(asked(server)[-1]) == 1
