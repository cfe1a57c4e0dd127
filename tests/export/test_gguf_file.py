"""A GGUF file holds the merged model, llama.cpp runs it as it was trained, and the Modelfile asks as in training."""
import copy
import json
import shutil
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from awake import PLAIN, SMALL, awake_run, live, texts_of
from thinking import QWEN35, SMOLLM3, thinker
from tiny import CHATML, CORPUS, SPECIALS, tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from bench.llama_server import missing, serve
from minimath.config.schema import EngineOptions, PromptOptions, SamplingOptions
from minimath.core.errors import UserError
from minimath.data.chat import prompt_ids
from minimath.export.drift import completion_logits
from minimath.export.merge import export, merge
from minimath.export.modelfile import chatml_parts, modelfile
from minimath.models.policy import Policy
from minimath.rollout.open import open_engine

gguf = pytest.importorskip("gguf")
from minimath.export import gguf as gguf_file  # noqa: E402
from minimath.export.gguf import pre_tokenizer, rotated_in_pairs, round_as_gguf  # noqa: E402


@pytest.fixture(scope="module")
def run(tiny_dir, tmp_path_factory) -> Path:
    return awake_run(tmp_path_factory.mktemp("exported") / "run", tiny_dir)


# ---- GGUF

@pytest.mark.parametrize("family", ["llama", "llama-untied", "mistral", "qwen2", "qwen3"])
def test_a_gguf_file_read_back_gives_the_same_logits(tmp_path, family):
    run = awake_run(tmp_path / "run", tiny_model(tmp_path / "base", family))
    export([f"adapter={run}", f"out={tmp_path / 'new'}", "to=gguf", *SMALL])
    model, tokenizer = live(run)
    texts = texts_of(tokenizer)
    merged = merge(model)
    round_as_gguf(merged, "f16")
    known = {"config": merged.config} if family == "qwen3" else {}  # its head_dim is not read by transformers
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "new", gguf_file="new-f16.gguf", dtype=torch.float32,
                                                **known)
    for got, want in zip(completion_logits(back, texts), completion_logits(merged, texts)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, size", [("f16", 2.0), ("bf16", 2.0), ("q8_0", 34 / 32)])
def test_what_was_measured_is_what_the_file_holds(run, tmp_path, kind, size):
    model, tokenizer = live(run)
    merged = merge(model)
    round_as_gguf(merged, kind)
    gguf_file.write_gguf(merged, tokenizer, tmp_path / "m.gguf", kind=kind, name="m")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    weight = merged.model.embed_tokens.weight
    held = tensors["token_embd.weight"]
    assert held.n_bytes == weight.numel() * size
    back = torch.from_numpy(gguf.quants.dequantize(held.data, held.tensor_type).copy())
    assert torch.equal(back, weight)
    q = tensors["blk.0.attn_q.weight"]
    back = torch.from_numpy(gguf.quants.dequantize(q.data, q.tensor_type).copy())
    assert torch.equal(back, rotated_in_pairs(merged.model.layers[0].self_attn.q_proj.weight, 4))
    held = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert held["tokenizer.ggml.eos_token_id"].contents() == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert held["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert not torch.equal(back, merged.model.layers[0].self_attn.q_proj.weight)


def test_scaled_positions_of_llama_3_are_factors_that_give_its_frequencies_back(tmp_path):
    base = tiny_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_pretrained(base, config=AutoConfig.for_model("llama", **{
        key: value for key, value in config.items() if key != "model_type"}))
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert gguf_file.reason_against(model.config, tokenizer) == ""
    gguf_file.write_gguf(model, tokenizer, tmp_path / "m.gguf", kind="f16", name="m")
    [factors] = [t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "rope_freqs.weight"]
    plain = 500.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / torch.tensor(factors.copy()), model.model.rotary_emb.inv_freq)
    assert factors.max() > 2 and factors.min() == 1
    model.config.rope_parameters["rope_type"] = "yarn"
    assert "yarn" in gguf_file.reason_against(model.config, tokenizer)


def test_a_number_beyond_f16_is_refused_and_bf16_holds_it(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "base"))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(UserError, match="gguf_type=bf16"):
        round_as_gguf(model, "f16")
    round_as_gguf(model, "bf16")
    assert model.model.layers[0].mlp.up_proj.weight[0, 0].item() == pytest.approx(1e5, rel=0.01)


def test_another_family_is_sent_to_llama_cpps_script(tmp_path, here):
    run = awake_run(tmp_path / "run", tiny_model(tmp_path / "base", "phi3"), lora_targets="qkv_proj")
    status, _, err = here("export", f"adapter={run}", "out=new", "to=gguf", "gguf_type=q8_0", *SMALL)
    assert status == 2 and "not of phi3. Use to=safetensors" in err and "convert_hf_to_gguf.py FOLDER" in err
    assert "--outtype q8_0" in err and not (tmp_path / "new").exists()


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tiny_tokenizer):
    assert pre_tokenizer(tiny_tokenizer) == "smollm"

    class Other:
        def __init__(self, **changes):
            self.data = json.loads(tiny_tokenizer.backend_tokenizer.to_str()) | changes
            self.backend_tokenizer = self

        def to_str(self):
            return json.dumps(self.data)

    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    for regex, name in ((gguf_file.QWEN2_WORDS, "qwen2"),
                        (gguf_file.QWEN2_WORDS.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?"), "llama-bpe")):
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        assert pre_tokenizer(Other(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]})) == name
    split = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}
    for other in ({"type": "Sequence", "pretokenizers": [split, level]}, None, {"type": "Whitespace"}):
        assert pre_tokenizer(Other(pre_tokenizer=other)) == ""
    assert pre_tokenizer(Other(model={"type": "Unigram"})) == ""


def test_the_qwen2_tokenizer_of_transformers_is_known():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
    assert PRETOKENIZE_REGEX == gguf_file.QWEN2_WORDS


# ---- Ollama

def test_the_modelfile_asks_as_in_training(tiny_tokenizer):
    asked = {"system": "Be brief.", "prompt_template": "{problem}\nUse \\boxed{{}} {{{{x}}."}
    text = modelfile(tiny_tokenizer, "m.gguf", PromptOptions(**asked))
    assert text.startswith("FROM ./m.gguf\n")
    # rendered by hand: a Go template with .System and one message of the user
    template = text.split('TEMPLATE """')[1].split('"""')[0]
    body = template.split('{{ if eq .Role "user" }}')[1].split("{{ else")[0]
    assert '{{ "{{" }}x' in body  # {{x would be an action of Go's
    head = template.split("{{ end }}")[0].removeprefix("{{ if .System }}").replace("{{ .System }}", "Be brief.")
    body = body.replace("{{ .Content }}", "1 + 1?").replace('{{ "{{" }}', "{{")
    assert head + body == tiny_tokenizer.decode(prompt_ids(tiny_tokenizer, "1 + 1?", **asked))
    for line in ('SYSTEM """Be brief."""', 'PARAMETER stop "<|im_end|>"', "PARAMETER temperature 0",
                 "PARAMETER repeat_penalty 1.0"):
        assert line in text.splitlines()


@pytest.mark.parametrize("thinking, begun", [("off", "<think>\n\n</think>\n\n"), ("on", "<think>\n")])
def test_the_modelfile_begins_the_last_answer_as_the_run_did(thinking, begun):
    tokenizer, asked = thinker(QWEN35), {"prompt_template": PLAIN, "thinking": thinking}
    template = modelfile(tokenizer, "m.gguf", PromptOptions(**asked)).split('TEMPLATE """')[1].split('"""')[0]
    condition = "{{ if eq (len (slice $.Messages $i)) 1 }}"
    assert "{{ range $i, $_ := .Messages }}" in template and template.count(condition) == 1
    body = template.split('{{ if eq .Role "user" }}')[1].split("{{ else")[0]
    body = body.replace(condition, "").replace("{{ end }}", "").replace("{{ .Content }}", "1 + 1?")
    assert body == tokenizer.decode(prompt_ids(tokenizer, "1 + 1?", **asked)) and body.endswith("assistant\n" + begun)


def test_the_exported_template_asks_as_the_run_did_whoever_asks(tmp_path, tiny_dir, here):
    base = tmp_path / "base"
    shutil.copytree(tiny_dir, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = SMOLLM3
    tokenizer.save_pretrained(base)
    run = awake_run(tmp_path / "run", base, thinking="off", template_args="date=2027-03-04")
    for to in ("safetensors", "gguf"):
        status, out, err = here("export", f"adapter={run}", f"out={to}", f"to={to}", *SMALL)
        assert status == 0, err
        assert ("thinking=off" if to == "safetensors" else "--jinja --chat-template-kwargs '{\"enable_thinking\": false"
                ) in out
    asked = prompt_ids(tokenizer, "1 + 1?", prompt_template=PLAIN, thinking="off", template_args="date=2027-03-04")
    held = gguf.GGUFReader(next((tmp_path / "gguf").glob("*.gguf"))).fields["tokenizer.chat_template"].contents()
    question = [{"role": "user", "content": "1 + 1?"}]
    for template in (AutoTokenizer.from_pretrained(tmp_path / "safetensors").chat_template, held):
        text = tokenizer.apply_chat_template(question, chat_template=template, tokenize=False,
                                             add_generation_prompt=True)
        assert text == tokenizer.decode(asked) and "04 March 2027 /no_think" in text
        thinks = tokenizer.apply_chat_template(question, chat_template=template, tokenize=False, enable_thinking=True)
        assert "04 March 2027 /think" in thinks  # still a switch


def test_a_default_system_message_of_the_template_is_kept(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = ("{% if messages[0]['role'] != 'system' %}"
                               "{{ '<|im_start|>system\nYou are T.<|im_end|>\n' }}{% endif %}" + CHATML)
    assert chatml_parts(tiny_tokenizer, PromptOptions()) == ("", "")
    assert chatml_parts(tokenizer, PromptOptions()) == ("You are T.", "")
    text = modelfile(tokenizer, "m.gguf", PromptOptions("", PLAIN))
    assert 'SYSTEM """You are T."""' in text
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    text = modelfile(tokenizer, "m.gguf", PromptOptions("", PLAIN))
    assert "TEMPLATE \"\"\"" not in text and "SYSTEM" not in text and "GGUF file's own" in text
    with pytest.raises(UserError, match="three quotation marks"):
        modelfile(tokenizer, "m.gguf", PromptOptions('say """x"""', PLAIN))


# ---- a real runtime: llama.cpp's server, in the package xllamacpp

QUESTIONS = ["Tom has 12 apples and buys 7 more. How many?", "A box holds 6 pens, so 6 * 5 = 30.",
             "It's 1234567 naive cafes:  (a+b)^2, 3.5%\n\n  then\tleft?!",
             "\u00e9t\u00e9 \u4f60\u597d \U0001f600 \\boxed{22}"]
TIE = 0.1  # nats: llama.cpp rounds activations to f16 where the weights are


def ask(url: str, path: str, **body):
    request = urllib.request.Request(url.removesuffix("/v1") + path, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=120))


def assert_served_as_trained(run: Path, file: Path, questions, *, count: int, tie: float = TIE) -> tuple[int, int]:
    """llama.cpp's server reads the prompts' tokens and continues with the live adapter's greedy ones in fp32: where
    one differs both must be as good as equally likely, and it is asked again from there -> (tokens, ties)."""
    model, tokenizer = live(run)
    options = yaml.safe_load((run / "config.yaml").read_text())
    policy = Policy(model, tokenizer, None, PromptOptions(options["system"], options["prompt_template"]))
    prompts, ends, ties = [policy.prompt_ids(question) for question in questions], policy.eos, 0
    with open_engine(EngineOptions(), SamplingOptions(max_new_tokens=count, temperature=0.0), policy) as engine:
        groups = engine.generate(prompts)
    with serve("--parallel", "1", model=str(file)) as url:
        for prompt, [sample] in zip(prompts, groups):
            want = sample.ids
            text = tokenizer.decode(prompt)
            assert ask(url, "/tokenize", content=text, parse_special=True, add_special=True)["tokens"] == prompt
            done = 0
            while done < len(want):
                reply = ask(url, "/completion", prompt=prompt + want[:done], n_predict=len(want) - done, temperature=0,
                            return_tokens=True)
                got = reply["tokens"] + (ends[:1] if reply["stop_type"] == "eos" else [])  # which it leaves out
                same = next((i for i, pair in enumerate(zip(want[done:], got)) if pair[0] != pair[1]), len(got))
                done += same + 1
                if done <= len(want):
                    [logits] = completion_logits(model, [(prompt, want[:done])])
                    assert logits[-1, want[done - 1]] - logits[-1, got[same]] < tie
                    ties += 1
    return sum(len(group[0].ids) for group in groups), ties


@pytest.mark.parametrize("family", ["llama", "llama-untied", "mistral", "qwen2", "qwen3"])
def test_llama_cpp_continues_the_prompts_with_the_greedy_tokens_of_the_live_adapter(tmp_path, family):
    if missing("any"):
        pytest.skip(f"needs {missing('any')}")
    run = awake_run(tmp_path / "run", tiny_model(tmp_path / "base", family), system="Be brief.")
    export([f"adapter={run}", f"out={tmp_path / 'new'}", "to=gguf", *SMALL])
    tokens, ties = assert_served_as_trained(run, tmp_path / "new" / "new-f16.gguf", QUESTIONS, count=24)
    assert tokens > 40 and ties < tokens / 20


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_llama_cpp_cuts_text_into_the_tokens_of_the_training(tmp_path, name):
    if missing("any"):
        pytest.skip(f"needs {missing('any')}")
    base, split = tiny_model(tmp_path / "base"), pre_tokenizers.Digits(individual_digits=True)
    regex = {"qwen2": gguf_file.QWEN2_WORDS, "llama-bpe": gguf_file.LLAMA3_WORDS}.get(name)
    if regex:
        split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not regex)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = level if name == "gpt-2" else pre_tokenizers.Sequence([split, level])
    backend.decoder = decoders.ByteLevel()
    text = [*CORPUS, *QUESTIONS] * 3 + [str(n) for n in range(2000)]  # merges of digits, of blanks, of letters
    backend.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=384, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>")
    assert pre_tokenizer(tokenizer) == name
    model = AutoModelForCausalLM.from_pretrained(base)
    gguf_file.write_gguf(model, tokenizer, tmp_path / "m.gguf", kind="f16", name="m")
    with serve("--parallel", "1", model=str(tmp_path / "m.gguf")) as url:
        for text in [*QUESTIONS, *CORPUS, "1000+234=1234  ", "don't WON'T\r\n\r\n x2 3y"]:
            assert ask(url, "/tokenize", content=text)["tokens"] == tokenizer(text)["input_ids"]


@pytest.mark.slow  # 30 s
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_smollm2_with_an_adapter_is_the_same_model_in_llama_cpp(tmp_path, kind):
    base = Path.home() / ".cache" / "minimath" / "SmolLM2-135M-Instruct"
    if missing("any") or not base.is_dir():
        pytest.skip(f"needs {missing('any') or f'{base}, which minimath demo makes'}")
    run = awake_run(tmp_path / "run", base, size=0.01, system="Put the final answer in \\boxed{}.")
    export([f"adapter={run}", f"out={tmp_path / 'new'}", "to=gguf", f"gguf_type={kind}", *SMALL])
    tie, share = {"f16": (TIE, 0.05), "q8_0": (0.5, 0.2)}[kind]
    tokens, ties = assert_served_as_trained(run, tmp_path / "new" / f"new-{kind}.gguf", QUESTIONS, count=24, tie=tie)
    assert tokens > 60 and ties < share * tokens
