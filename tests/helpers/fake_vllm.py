"""vLLM as far as minimath sees it, around a tiny model: its engine, the routes of its server, and its module."""

import contextlib
import http.server
import json
import random
import threading
import time
import types
from pathlib import Path
from types import SimpleNamespace

import torch
from engines import generate
from peft import PeftModel
from toy import load
from transformers import AutoModelForCausalLM

from minimath.rollout.transformers_engine import TransformersEngine

SAMPLES = 3


def prompts_of(tokenizer):
    return [tokenizer(text)["input_ids"] for text in ("Tom has 12 apples", "A box holds 6 pens. Each", "12 + 7 =")]


def asked(server, path="/v1/completions"):
    return [body for seen, body, _ in server.seen if seen == path]


class Engine:
    """What vLLM computes: completions of the base model or of a loaded adapter, one seed each."""

    def __init__(self, folder, tokenizer):
        self.base, _ = load(folder)
        self.tokenizer, self.lock, self.read = tokenizer, threading.Lock(), {}

    def adapter(self, path):
        with self.lock:
            if path not in self.read:
                if not Path(path, "adapter_model.safetensors").is_file():
                    raise FileNotFoundError(path)
                model = AutoModelForCausalLM.from_pretrained(self.base.name_or_path, dtype=torch.float32)
                self.read[path] = PeftModel.from_pretrained(model, path).eval()
            return self.read[path]

    def sample(self, model, prompt, seed, how, max_tokens, stop, processed=True):
        """(ids, log-probs) after temperature and truncation, or as raw_logprobs."""
        with self.lock:
            [[completion]] = generate(model, self.tokenizer, [prompt], kind=TransformersEngine, eos=stop, seed=seed,
                                      max_new_tokens=max_tokens, **how)
            if processed:
                return completion.ids, completion.logp
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
            picked = logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            return completion.ids, picked.tolist()


class Handler(http.server.BaseHTTPRequestHandler):
    """The routes of vLLM's server that are used, with its answers; `server.script` overrides the n-th of a path."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body):
        server = self.server
        with server.guard:
            server.seen.append((self.path, body, dict(self.headers)))
            script = server.script.get(self.path, [])
            step = script.pop(0) if script else None
        with contextlib.suppress(OSError):
            if step is not None and step(self, body) != "go on":
                return
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                return self.reply(401, {"error": "Unauthorized " + str(self.headers.get("Authorization"))})
            route = {"/v1/models": self.models, "/v1/completions": self.completions, "/tokenize": self.tokenize}
            if server.runtime_lora:
                route |= {"/v1/load_lora_adapter": self.load, "/v1/unload_lora_adapter": self.unload}
            route.get(self.path, lambda body: self.reply(404, {"detail": "Not Found"}))(body)

    def reply(self, status, content):
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def error(self, status, message):
        self.reply(status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}})

    def models(self, _):
        server = self.server
        cards = [{"id": server.name, "root": server.name, "parent": None, "max_model_len": server.max_model_len}]
        cards += [{"id": name, "root": path, "parent": server.name} for name, path in server.adapters.items()]
        self.reply(200, {"object": "list", "data": cards})

    def load(self, body):
        try:
            self.server.engine.adapter(body["lora_path"])
        except FileNotFoundError:
            message = f"Loading lora {body['lora_name']} failed: No adapter found for {body['lora_path']}"
            return self.error(404, message)
        if body["lora_name"] in self.server.adapters:
            return self.error(400, f"The lora adapter '{body['lora_name']}' has already been loaded.")
        self.server.adapters[body["lora_name"]] = body["lora_path"]
        self.reply(200, f"Success: LoRA adapter '{body['lora_name']}' added successfully.")

    def unload(self, body):
        if self.server.adapters.pop(body["lora_name"], None) is None:
            return self.error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        self.reply(200, "Success")

    def completions(self, body):
        server = self.server
        if body["model"] not in (server.name, *server.adapters):
            return self.error(404, f"The model `{body['model']}` does not exist.")
        if body["temperature"] > 2:
            return self.error(400, "temperature must be in [0, 2]")
        if "prompt_logprobs" in body:
            return self.prompt_logprobs(body)
        assert body["ignore_eos"] and body["n"] == 1 and body["add_special_tokens"] is False
        path = server.adapters.get(body["model"])
        model = server.engine.adapter(path) if path and server.applies else server.engine.base
        how = {"temperature": body["temperature"], "top_p": body["top_p"], "min_p": body["min_p"],
               "top_k": max(0, body["top_k"])}  # fmt: skip
        room = min(body["max_tokens"], server.max_model_len - len(body["prompt"]))
        ids, logp = server.engine.sample(model, body["prompt"], body["seed"], how, room, body["stop_token_ids"],
                                         server.processed)  # fmt: skip
        time.sleep(server.random.uniform(0, server.delay_s))
        choice = {"index": 0, "text": "", "finish_reason": "stop" if ids[-1] in body["stop_token_ids"] else "length",
                  "logprobs": {"token_logprobs": logp, "tokens": [""] * len(ids)},
                  "token_ids": ids, "prompt_token_ids": body["prompt"]}  # fmt: skip
        server.alter(choice)
        self.reply(200, {"object": "text_completion", "model": body["model"], "choices": [choice]})

    def tokenize(self, body):
        ids = self.server.engine.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
        self.reply(200, {"tokens": ids, "count": len(ids), "max_model_len": self.server.max_model_len})

    def prompt_logprobs(self, body):
        server, ids = self.server, body["prompt"]
        if len(ids) + body["max_tokens"] > server.max_model_len or body["max_tokens"] < 1:
            return self.error(400, f"This model's maximum context length is {server.max_model_len} tokens.")
        with server.engine.lock, torch.no_grad():
            logp = server.engine.base(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        time.sleep(server.random.uniform(0, server.delay_s))
        told = [{str(i): {"logprob": float(row[i]), "rank": int((row > row[i]).sum()) + 1, "decoded_token": "x"}}
                for i, row in zip(ids[1:], logp)]
        choice = {"index": 0, "text": "x", "finish_reason": "length", "logprobs": None, "token_ids": [5],
                  "prompt_logprobs": [None, *told], "prompt_token_ids": ids}  # fmt: skip
        server.alter(choice)
        self.reply(200, {"object": "text_completion", "model": body["model"], "choices": [choice]})


def start_server(engine, name):
    """A running server of vLLM's protocol for `engine`; its attributes are the switches of the tests."""
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    made.guard, made.seen, made.script, made.random = threading.Lock(), [], {}, random.Random(0)
    made.engine, made.name, made.adapters, made.max_model_len = engine, name, {}, 256
    made.processed, made.runtime_lora, made.applies, made.key, made.delay_s = True, True, True, "", 0.0
    made.alter, made.closing = lambda choice: None, threading.Event()
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return made


def fake_modules(engine):
    """(record, modules by name): what stands for vllm, and what was done with it."""
    made = SimpleNamespace(calls=[], options=None, error=None, alter=lambda output: None)

    class SamplingParams(SimpleNamespace):
        pass

    class LoRARequest:
        def __init__(self, lora_name, lora_int_id, lora_path):
            self.lora_name, self.lora_int_id, self.lora_path = lora_name, lora_int_id, lora_path

    class LLM:
        def __init__(self, **options):
            if made.error:
                raise made.error
            made.options = options
            torch.manual_seed(options["seed"])  # as vLLM does
            random.seed(options["seed"])
            self.llm_engine = SimpleNamespace(remove_lora=lambda number: made.calls.append(("remove", number)))

        def generate(self, prompts, params, *, use_tqdm, lora_request):
            made.calls.append(("generate", lora_request.lora_int_id if lora_request else 0, params))
            model = engine.adapter(lora_request.lora_path) if lora_request else engine.base
            outputs = []
            for prompt, p in zip(prompts, params, strict=True):
                how = {"temperature": p.temperature, "top_p": p.top_p, "min_p": p.min_p, "top_k": max(0, p.top_k)}
                ids, logp = engine.sample(model, prompt["prompt_token_ids"], p.seed, how, p.max_tokens,
                                          p.stop_token_ids)  # fmt: skip
                steps = [{t: SimpleNamespace(logprob=x)} for t, x in zip(ids, logp, strict=True)]
                reason = "stop" if ids[-1] in p.stop_token_ids else "length"
                outputs.append(SimpleNamespace(outputs=[SimpleNamespace(
                    token_ids=ids, logprobs=steps, finish_reason=reason)]))  # fmt: skip
                made.alter(outputs[-1])
            return outputs

        def sleep(self, level):
            made.calls.append(("sleep", level))

        def wake_up(self):
            made.calls.append(("wake",))

    fake = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams = LLM, SamplingParams
    fake_lora, fake_request = types.ModuleType("vllm.lora"), types.ModuleType("vllm.lora.request")
    fake_request.LoRARequest = LoRARequest
    return made, {"vllm": fake, "vllm.lora": fake_lora, "vllm.lora.request": fake_request}
