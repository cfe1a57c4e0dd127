"""Faults of a vLLM server: each is one line that says what to do, in bounded time, without the key."""

import time

import pytest

from minimath.core.errors import UserError
from minimath.rollout.vllm import open_vllm
from minimath.rollout.vllm_client import Server

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
        (lambda c: (c["token_ids"].append(5), c["logprobs"]["token_logprobs"].append(-1.0)), "7 tokens where 6"),
        (lambda c: (c["token_ids"].pop(), c["logprobs"]["token_logprobs"].pop()), "cut at 5 tokens .*max-model-len"),
        (lambda c: c.update(finish_reason="abort"), "cut at 6 tokens .abort"),
        (lambda c: c["prompt_token_ids"].insert(0, 1), "changed the prompt's token ids"),
    ],
)
def test_an_answer_that_is_not_to_what_was_asked_is_refused(server, opened, change, says):
    vllm, server.alter = opened(), change
    with pytest.raises(UserError, match=says):
        vllm.generate([[5, 6, 7]], max_new_tokens=6, eos=[])


@pytest.mark.parametrize(
    "step, says",
    [
        (answers(200, {"choices": []}), "0 choices where one"),
        (answers(200, {"choices": [{}, {}]}), "2 choices where one"),
        (answers(200, "<html>"), "something else than JSON"),
        (answers(200, "[1]"), "something else than JSON"),
        (answers(200, "x" * 500_000), "more than"),
        (answers(302, ""), "HTTP 302"),
        (answers(400, {"error": {"message": "max_tokens is too large"}}), "HTTP 400 .max_tokens is too large"),
        (answers(404, {"error": {"message": "The model `x` does not exist."}}), "does not know .* was it restarted"),
    ],
)
def test_other_replies_are_one_line_that_says_what_to_do(server, opened, step, says):
    vllm = opened()
    server.script["/v1/completions"] = [step]
    with pytest.raises(UserError, match=says) as caught:
        vllm.generate([[5, 6, 7]], max_new_tokens=6, eos=[])
    assert "\n" not in str(caught.value)


def test_a_server_out_of_reach_is_reported(config, trained, tmp_path, server, monkeypatch):
    monkeypatch.setattr(Server, "pause_s", 0.01)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="cannot be used .*refused.*; start it, correct vllm_url"):
        open_vllm(config(), *trained, tmp_path)
    for url in ("127.0.0.1:8000", "ftp://x/v1", "http://", "http://x:port/v1", "http://user:pw@x/v1"):
        with pytest.raises(UserError, match="vllm_url: give the base URL") as caught:
            open_vllm(config(vllm_url=url), *trained, tmp_path)
        assert "pw" not in str(caught.value)


def test_another_model_or_too_short_a_limit_is_refused(server, opened):
    with pytest.raises(UserError, match="serves .*llama, not other; start it with that model"):
        opened(model="other")
    assert opened(model="other", vllm_model=server.name).backend.base == server.name
    with pytest.raises(UserError, match="takes 256 tokens.* --max-model-len 300"):
        opened(max_prompt_len=276)


def test_a_server_without_run_time_adapters_is_reported(server, opened, trained):
    vllm, server.runtime_lora = opened(), False
    with pytest.raises(UserError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        vllm.swap(trained[0], 0)
    server.runtime_lora = True
    server.script["/v1/load_lora_adapter"] = [answers(404, {"error": {"message": "No adapter found for /x"}})]
    with pytest.raises(UserError, match="under the same path .vllm_adapter_dir"):
        vllm.swap(trained[0], 0)
    server.script["/v1/load_lora_adapter"] = [answers(400, {"error": {"message": "LoRA rank 64 is greater"}})]
    with pytest.raises(UserError, match="rank 64 is greater.*--max-lora-rank"):
        vllm.swap(trained[0], 0)


def test_the_key_is_sent_and_never_shown(server, opened, monkeypatch):
    server.key = KEY
    monkeypatch.setenv("TEST_KEY", KEY)
    opened(vllm_key_env="TEST_KEY").generate([[5, 6]], max_new_tokens=2, eos=[])
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, _, headers in server.seen)
    server.key = "another"
    with pytest.raises(UserError, match="refuses the key .*vllm_key_env") as caught:
        opened(vllm_key_env="TEST_KEY")
    assert KEY not in str(caught.value) and "***" in str(caught.value)
    monkeypatch.setenv("TEST_KEY", KEY + "\n\nx")
    with pytest.raises(UserError, match="TEST_KEY has line breaks") as caught:
        opened(vllm_key_env="TEST_KEY")
    assert KEY not in str(caught.value)


def test_passing_faults_are_tried_again(server, opened, trained):
    vllm = opened()
    busy = answers(503, {"error": {"message": "busy"}})
    server.script["/v1/completions"] = [busy, hangs_up, busy]
    assert len(vllm.generate([[5, 6]], max_new_tokens=2, eos=[])[0]) == 1
    server.script["/v1/completions"] = [busy] * 4
    with pytest.raises(UserError, match="HTTP 503 .busy"):
        vllm.generate([[5, 6]], max_new_tokens=2, eos=[])

    def loads_and_hangs_up(handler, body):
        server.adapters[body["lora_name"]] = body["lora_path"]
        handler.connection.close()

    server.script["/v1/load_lora_adapter"] = [loads_and_hangs_up]
    vllm.swap(trained[0], 0)


def test_one_failure_ends_the_other_requests_at_once(server, opened):
    vllm, begun = opened(), time.monotonic()
    server.script["/v1/completions"] = [hangs, hangs, answers(400, {"error": {"message": "no"}}), hangs]
    with pytest.raises(UserError, match="HTTP 400"):
        vllm.generate([[5, 6]], samples=4, max_new_tokens=2, eos=[])
    assert time.monotonic() - begun < 20
    server.script["/v1/completions"] = [hangs, hangs]
    with pytest.raises(KeyboardInterrupt):
        vllm.generate([[5, 6]], samples=3, max_new_tokens=2, eos=[], on_done=interrupts)
    assert time.monotonic() - begun < 40
    assert vllm.generate([[5, 6]], max_new_tokens=2, eos=[])  # still of use


def interrupts(*_):
    raise KeyboardInterrupt


def test_a_server_that_never_answers_costs_one_timeout(server, opened):
    vllm, begun = opened(), time.monotonic()
    vllm.backend.timeout_s = 0.3
    server.script["/v1/completions"] = [hangs]
    with pytest.raises(UserError, match="no answer in time.*vllm_timeout_s"):
        vllm.generate([[5, 6]], max_new_tokens=2, eos=[])
    assert time.monotonic() - begun < 20
