"""A teacher behind a vLLM server: its log-probs in their place, and each fault one line, in bounded time."""

import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from minimath.config.rl_options import TeacherOptions
from minimath.config.schema import PromptOptions, RLAIFConfig
from minimath.core import interrupt
from minimath.core.errors import Interrupted, UserError
from minimath.data.examples import Example
from minimath.data.sample import Group, Sample
from minimath.rollout import vllm_client
from minimath.train import teacher_server
from minimath.train.batches import PolicyBatch
from minimath.train.teacher import CAP, open_teacher
from minimath.train.teacher_server import TeacherServer

pytest_plugins = ["vllm_fixtures"]
KEY = "secret-of-the-tests"
ROWS = [([5, 6, 7 + i], [20 + i, *range(30, 30 + i % 5)]) for i in range(40)]  # of several lengths


def answers(status, content):
    return lambda handler, body: handler.reply(status, content)


def hangs(handler, body):
    handler.server.closing.wait(60)


def url_of(server):
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


@pytest.fixture
def said():
    return []


@pytest.fixture
def teacher(server, tiny_tokenizer, said, monkeypatch):
    """teacher(**options) -> TeacherServer whose retries hardly wait. max_prompt_len, max_new_tokens: of the policy."""
    made = []
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)

    def make(max_prompt_len=64, max_new_tokens=12, **options):
        policy = SimpleNamespace(tokenizer=tiny_tokenizer, prompt=PromptOptions(max_prompt_len=max_prompt_len))
        made.append(TeacherServer(TeacherOptions(url_of(server), **options), policy, said.append, max_new_tokens))
        return made[-1]

    yield make
    for each in made:
        each.close()


def wanted(server, rows):
    """What a forward of the whole row tells."""
    told = []
    for prompt, completion in rows:
        with torch.no_grad():
            logits = server.engine.base(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        told.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].tolist())
    return told


def completions(server):
    return [body for path, body, _ in server.seen if path == "/v1/completions"]


def test_each_row_has_its_tokens_whatever_the_order_of_the_answers(server, teacher, said):
    server.delay_s = 0.05
    for told, want in zip(teacher().logps(ROWS), wanted(server, ROWS), strict=True):
        assert told == pytest.approx(want, abs=1e-5)
    assert len(completions(server)) == len(ROWS) and not said and teacher().logps([]) == []


def test_a_request_is_for_these_ids_and_leaves_no_setting_to_the_server(server, teacher):
    teacher().logps([([5, 6], [7, 8])])
    [body] = completions(server)
    assert body == {"model": server.name, "prompt": [5, 6, 7, 8], "max_tokens": 1, "prompt_logprobs": 0, "n": 1,
                    "temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": -1, "presence_penalty": 0.0,
                    "frequency_penalty": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "return_token_ids": True,
                    "add_special_tokens": False}  # fmt: skip


def test_no_more_than_a_few_requests_are_in_flight(server, teacher, monkeypatch):
    monkeypatch.setattr(teacher_server, "IN_FLIGHT", 3)
    guard, now, most = threading.Lock(), [0], [0]

    def counts(handler, body):
        with guard:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with guard:
            now[0] -= 1
        return "go on"

    server.script["/v1/completions"] = [counts] * len(ROWS)
    teacher().logps(ROWS)
    assert 1 < most[0] <= 3


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda c: c.pop("prompt_logprobs"), "no prompt_logprobs; is it a vLLM server"),
        (lambda c: c.update(prompt_logprobs=None), "no prompt_logprobs"),
        (lambda c: c["prompt_logprobs"].pop(), "3 log-probs for 4 tokens; start it with --no-enable-prefix-caching"),
        (lambda c: c["prompt_logprobs"].insert(1, None), "5 log-probs for 4 tokens"),
        (lambda c: c["prompt_logprobs"].__setitem__(3, None), "no log-prob of one of the tokens"),
        (lambda c: c["prompt_logprobs"].__setitem__(3, {"9": {"logprob": -1.0}}), "no log-prob of one of the tokens"),
        (lambda c: c["prompt_logprobs"].__setitem__(1, {"9": {"logprob": -1.0}}), "no log-prob of one of the tokens"),
        (lambda c: c["prompt_logprobs"].__setitem__(3, {"8": -1.0}), "no log-prob of one of the tokens"),
        (lambda c: c["prompt_logprobs"][3]["8"].update(logprob=None), "no log-prob of one of the tokens"),
        (lambda c: c["prompt_logprobs"][3]["8"].update(logprob=float("nan")), "log-probs that are none, or nan"),
        (lambda c: c["prompt_logprobs"][3]["8"].update(logprob=float("inf")), "log-probs that are none"),
        (lambda c: c["prompt_logprobs"][3]["8"].update(logprob=0.5), "log-probs that are none"),
        (lambda c: c["prompt_token_ids"].insert(0, 1), "changed the prompt's token ids"),
    ],
)
def test_an_answer_that_is_not_to_what_was_asked_is_refused(server, teacher, change, says):
    server.alter = change
    with pytest.raises(UserError, match=says) as caught:
        teacher().logps([([5, 6], [7, 8])])
    assert "\n" not in str(caught.value)


def test_a_first_token_without_a_prompt_has_no_log_prob(server, teacher):
    with pytest.raises(UserError, match="log-probs that are none, or nan"):
        teacher().logps([([], [7, 8])])


@pytest.mark.parametrize("told", [-9999.0, float("-inf"), -12000.0])
def test_a_token_that_cannot_be_has_a_finite_log_prob(server, teacher, told):
    server.alter = lambda c: c["prompt_logprobs"][3]["8"].update(logprob=told)
    [[first, second]] = teacher().logps([([5, 6], [7, 8])])
    assert -50 < first < 0 and second == -9999.0


@pytest.mark.parametrize(
    "step, says",
    [
        (answers(200, {"choices": []}), "with one choice"),
        (answers(200, "<html>"), "with one choice; is it a vLLM server"),
        (answers(302, ""), "HTTP 302"),
        (answers(400, {"error": {"message": "maximum context length is 256"}}), "HTTP 400 .maximum context length"),
        (answers(404, {"error": {"message": "The model `x` does not exist."}}), "does not know .* was it restarted"),
    ],
)
def test_other_replies_are_one_line_that_says_what_to_do(server, teacher, step, says):
    server.script["/v1/completions"] = [step]
    with pytest.raises(UserError, match=says) as caught:
        teacher().logps(ROWS[:1])
    assert "\n" not in str(caught.value)


def test_passing_faults_are_tried_again_and_one_that_lasts_ends_the_others(server, teacher):
    each, begun = teacher(), time.monotonic()
    busy = answers(503, {"error": {"message": "busy"}})
    server.script["/v1/completions"] = [busy, lambda handler, body: handler.connection.close(), busy]
    assert each.logps(ROWS[:1])[0] == pytest.approx(wanted(server, ROWS[:1])[0], abs=1e-5)
    server.script["/v1/completions"] = [hangs, answers(400, {"error": {"message": "no"}}), hangs, hangs]
    with pytest.raises(UserError, match="HTTP 400"):
        each.logps(ROWS[:4])
    assert time.monotonic() - begun < 20
    assert each.logps(ROWS[:1])  # still of use


def test_after_a_fault_nothing_more_is_asked(server, teacher, monkeypatch):
    monkeypatch.setattr(teacher_server, "IN_FLIGHT", 1)
    server.script["/v1/completions"] = [answers(400, {"error": {"message": "no"}})]
    server.delay_s = 0.02
    with pytest.raises(UserError, match="HTTP 400"):
        teacher().logps(ROWS)
    time.sleep(0.2)
    asked = len(completions(server))
    time.sleep(0.2)
    assert asked == len(completions(server)) < len(ROWS)


def test_a_signal_is_heard_while_the_server_computes(server, teacher, said):
    server.script["/v1/completions"] = [hangs]
    each, begun = teacher(), time.monotonic()
    with interrupt.interruptible((), said.append), pytest.raises(Interrupted):
        threading.Timer(0.2, signal.raise_signal, [signal.SIGTERM]).start()
        each.logps(ROWS[:1])
    assert time.monotonic() - begun < 5


def test_a_server_that_never_answers_costs_one_timeout(server, teacher, monkeypatch):
    each = teacher()
    monkeypatch.setattr(vllm_client, "ANSWER_S", 0.3)
    server.script["/v1/completions"] = [hangs]
    with pytest.raises(UserError, match="teacher=http.* .no answer in 0.3 s.; start it, or correct teacher"):
        each.logps(ROWS[:1])


# ---- at the start


def test_the_model_is_the_one_that_is_served(server, teacher):
    assert teacher().model == server.name
    cards = [{"id": name, "root": f"/{name}", "parent": parent} for name, parent in
             (("a", None), ("b", None), ("lora", "a"))]  # fmt: skip
    server.script["/v1/models"] = [answers(200, {"data": cards[::2]}), answers(200, {"data": cards}),
                                   answers(200, {"data": []})]
    assert teacher().model == "a"
    with pytest.raises(UserError, match="serves a, b, lora: start one that serves the teacher alone"):
        teacher()
    with pytest.raises(UserError, match="serves no model"):
        teacher()


def test_a_server_too_short_for_prompt_completion_and_the_token_it_adds_is_refused(server, teacher):
    server.max_model_len = 77
    assert len(teacher(64, 12).logps([(list(range(5, 69)), list(range(20, 32)))])[0]) == 12
    server.max_model_len = 76
    with pytest.raises(UserError, match="takes 76 tokens.* --max-model-len 77"):
        teacher(64, 12)
    with pytest.raises(UserError, match="takes 76 tokens, but a prompt .with teacher_system=. .*need 77; start it"):
        teacher(60, 12).logps([(list(range(5, 69)), list(range(20, 32)))])  # its own system message is longer


def test_another_tokenizer_is_one_line(server, teacher, tiny_tokenizer, said):
    def shifted(at):
        def tokenize(handler, body):
            ids = tiny_tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            handler.reply(200, {"tokens": [*ids[:at], *(i + 1 for i in ids[at:])] if at else ids[:-1]})

        return tokenize

    for at in (1, -1):
        server.script["/tokenize"] = [shifted(at)]
        with pytest.raises(UserError, match=r"another tokenizer .token '.*' is \d+ there, \d+ here.: take a") as caught:
            teacher()
        assert "\n" not in str(caught.value)
    server.script["/tokenize"] = [shifted(0)]  # the same to where it ends
    with pytest.raises(UserError, match="another tokenizer"):
        teacher()
    text = server.seen[-1][1]["prompt"]
    assert not said and "12 apples" in text and all(t in text for t in tiny_tokenizer.all_special_tokens)


@pytest.mark.parametrize("step", [answers(404, {"detail": "Not Found"}), answers(200, "<html>")])
def test_a_server_without_tokenize_is_said_once_and_used(server, teacher, said, step):
    server.script["/tokenize"] = [step]
    each = teacher()
    assert each.logps(ROWS[:2]) and each.logps(ROWS[:2])
    [line] = said
    assert "teacher=http" in line and "can't be checked" in line


def test_a_server_out_of_reach_is_one_line(server, teacher):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="cannot be used .*; start it, or correct teacher"):
        teacher()


def test_the_key_of_its_own_variable_is_sent_and_never_shown(server, teacher, said, monkeypatch):
    server.key = KEY
    with pytest.raises(UserError, match="refuses the key .*environment variable TEACHER_API_KEY"):
        teacher()
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    monkeypatch.setenv("VLLM_API_KEY", "of-another-server")
    teacher().logps(ROWS[:1])
    assert all(f"Bearer {KEY}" in headers.values() for _, _, headers in server.seen[1:])
    assert not any("of-another-server" in str(headers) for _, _, headers in server.seen)
    server.key = "another"
    with pytest.raises(UserError, match="refuses the key .*environment variable TEACHER_API_KEY") as caught:
        teacher()
    assert KEY not in str(caught.value) and "***" in str(caught.value)
    server.script["/v1/models"] = [answers(400, {"error": {"message": "x" * 290 + KEY}})]  # where it is cut
    with pytest.raises(UserError, match="HTTP 400") as caught:
        teacher()
    assert KEY[:4] not in str(caught.value) and KEY not in str(said)
    monkeypatch.setenv("TEACHER_API_KEY", KEY + "\n\nx")
    with pytest.raises(UserError, match="TEACHER_API_KEY has line breaks") as caught:
        teacher()
    assert KEY not in str(caught.value)


# ---- as a teacher


def test_a_served_teacher_moves_advantages_by_its_log_probs_less_the_policys(server, trained, said):
    cfg = RLAIFConfig(model=trained.options.name, teacher=url_of(server), teacher_weight=0.5,
                      max_prompt_len=64, max_new_tokens=12, device="cpu", dtype="fp32")  # fmt: skip
    trained.prompt = cfg.prompt
    prompt = trained.prompt_ids("12 + 7 =")
    samples = [Sample(ids, [-2.0] * len(ids), True) for ids in ([20, 21], [30, 31, 32])]
    group = Group(Example("12 + 7 ="), prompt, samples)
    taught = open_teacher(cfg, trained, said.append)
    batch = PolicyBatch(trained, cfg, [group])
    told = taught.teach(batch, [group], None)
    gaps = [torch.tensor(each) + 2.0 for each in wanted(server, [(prompt, s.ids) for s in samples])]
    for advantage, gap in zip(batch.advantage, gaps, strict=True):
        assert torch.allclose(advantage, 0.5 * gap.clamp(-CAP, CAP), atol=1e-5)
    assert told["teacher/kl"] == pytest.approx(-float(torch.cat(gaps).clamp(-CAP, CAP).mean()), abs=1e-4)
    taught.server.close()
