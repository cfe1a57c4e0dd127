"""What a card must show, in tiny sizes: MINIMATH_TEST_CUDA=1 pytest tests/cuda. The full sizes: python -m bench.gpu.

With MINIMATH_TEST_CUDA=cpu the same runs on a CPU, so that these tests can be checked without a card."""
import pytest
import tiny
import torch
from engines import engine_of
from tiny import tiny_model
from toy import adapter, ending_model, even, load, make_config, metrics, same_tensors, wake_adapter, write_problems

from bench.gpu import decoding, exactness, steps
from bench.gpu.common import Found
from minimath.config.options import options_of
from minimath.config.schema import RLAIFConfig, SFTConfig
from minimath.data.batch import forward_args, micro_batches
from minimath.data.chat import Encoded
from minimath.models import fused, linears, nodes
from minimath.models import load as loading
from minimath.models.decoding import decoding_linears
from minimath.models.forward import base_causal_lm, hidden_states, inference
from minimath.models.fused import fused_layers
from minimath.rollout.transformers_engine import TransformersEngine
from minimath.train.rlaif import rlaif
from minimath.train.sft import sft

FAMILIES = ["llama", "llama-untied", "mistral", "qwen2", "qwen2-window", "qwen3", "gemma2", "gemma3_text", "phi3"]
PARTS = [exactness.kernels, steps.train, decoding.rollout, decoding.nf4, steps.resume]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_part_of_the_proof(device, part, tmp_path):
    """bench.gpu's own comparisons: with float64, with transformers, with `generate`, with an unbroken run."""
    found = Found({"device": device.partition(":")[0], "tiny": True, "found": str(tmp_path / "found.json")})
    part(found)
    assert found.all["checks"] and not found.all["failed"], found.all["failed"]


def attention_of(family: str) -> str:
    return "eager" if family == "gemma2" else "sdpa"  # its softcap


def gradient(model, device: str):
    """(hidden states of tokens that count, gradients by name), float64, of rows packed into one pass."""
    rows = [Encoded([(7 * i + n) % 300 for i in range(n)], [False] + [True] * (n - 1), False) for n in (70, 33, 1, 5)]
    [(_, batch)] = micro_batches(rows, packing=True, micro_batch_tokens=10**6, pad_id=0)
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    model.zero_grad()
    torch.manual_seed(3)  # dropout
    hidden = hidden_states(model, **forward_args(batch)).flatten(0, 1)[batch["target"] != -100]
    weight = torch.sin(torch.arange(hidden.numel(), dtype=torch.float64)).to(hidden).view_as(hidden)
    (hidden * weight).sum().backward()
    assert str(hidden.device) == device
    return hidden.detach().double(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def assert_near(one, other, tolerance=1e-4):
    (hidden, grads), (want, wanted) = one, other
    assert (hidden - want).norm() <= tolerance * want.norm()
    assert grads.keys() == wanted.keys() and grads
    for name, grad in wanted.items():
        assert (grads[name] - grad).norm() <= tolerance * grad.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"quant": "nf4"}, {"gradient_checkpointing": True}], ids=str)
def test_fused_layers_are_those_of_transformers_and_peft(device, family, options, tmp_path, monkeypatch):
    folder, seen = tiny_model(tmp_path, family), []
    for fuse in (loading.fuse, lambda model: "for the comparison"):
        monkeypatch.setattr(loading, "fuse", fuse)
        model, _ = load(folder, train=True, device=device, attn=attention_of(family), **options)
        wake_adapter(model)
        assert bool(fused_layers(base_causal_lm(model))) == (not seen)
        seen.append(gradient(model, device))
    assert_near(*seen)


def test_inputs_in_host_memory_and_mlps_by_pieces_change_nothing_on_a_card(device, tmp_path, monkeypatch):
    """The second pass writes the buffers of the first one again; by pieces the additions go in another order."""
    folder, seen = tiny_model(tmp_path, "qwen3"), []
    for offload, rows in ((False, nodes.PIECE), (True, nodes.PIECE), (True, 40)):
        for module in (nodes, fused):
            monkeypatch.setattr(module, "PIECE", rows)
        model, _ = load(folder, train=True, device=device, gradient_checkpointing=True, offload=offload)
        wake_adapter(model)
        seen.append([gradient(model, device) for _ in range(2)])
    plain, away, pieces = seen
    for one, other in zip(plain, away, strict=True):
        assert torch.equal(one[0], other[0])
        assert_near(other, one, 1e-6)  # attention on a card may add up in any order
    assert_near(pieces[1], plain[1])


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "gemma2", "granite"])
def test_greedy_tokens_are_those_of_generate(device, family, tmp_path):
    model, tokenizer = load(tiny_model(tmp_path, family), train=True, device=device, attn=attention_of(family))
    wake_adapter(model)
    prompts = [[9 + (5 * i + n) % 290 for i in range(n)] for n in (3, 40, 17)]  # no special tokens
    ids, metrics = [], {}
    for kind, sampled in (({}, 3), ({}, 3), ({"kind": TransformersEngine}, 1)):  # the second time graphs are kept
        engine = engine_of(model, tokenizer, eos=[], temperature=0.0, max_new_tokens=60, **kind)
        ids.append([group[0].ids for group in engine.generate(prompts, sampled)])
        metrics = metrics or engine.metrics()
    assert ids[0] == ids[1] == ids[2]
    if device != "cpu" and torch.version.hip is None:
        assert metrics["graph_replays"] > 0, metrics


@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize("copy", [True, False])
def test_nf4_weights_give_one_product_however_they_are_read(device, rows, copy, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.FAMILIES, "llama", {"hidden_size": 256, "intermediate_size": 512})
    model, _ = load(tiny_model(tmp_path), train=True, quant="nf4", device=device)
    wake_adapter(model)
    ids, before = torch.arange(5, 5 + rows, device=device)[:, None], gradient(model, device)
    with inference(model):
        want = hidden_states(model, ids).double()
        with decoding_linears(model, copy=copy, rows=rows):
            got = hidden_states(model, ids).double()
    ways = set(base_causal_lm(model).linear_ways)
    assert (got - want).norm() <= 1e-4 * want.norm(), ways
    if device != "cpu":
        assert (ways == {linears.FUSED}) == (rows <= linears.most_fused_rows(
            fused_layers(base_causal_lm(model)).layers[0].qkv.bases, torch.float32))
    assert_near(gradient(model, device), before, 1e-6)


@pytest.fixture
def run(device, tmp_path):
    """run(stage, name, **options) -> run folder of a tiny run on the device."""
    data, model = write_problems(tmp_path / "problems.jsonl", n=12), ending_model(tiny_model(tmp_path / "m"),
                                                                                  tmp_path / "ending")

    def start(stage, name, **options):
        cls, own = {"sft": (SFTConfig, {"steps": 2, "batch_size": 6}),
                    "rlaif": (RLAIFConfig, {"steps": 2, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 16,
                                            "judge": "heuristic", "verifier": even, "warmup": 0.0})}[stage]
        cfg = make_config(cls, model, data=data, out=str(tmp_path / name), lora_r=4, lr=1e-2, device=device,
                          **own | options)
        (sft if stage == "sft" else rlaif)(cfg)
        return tmp_path / name
    return start


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", ["sft", "rlaif"])
def test_a_step_of_each_stage_trains(run, stage, dtype):
    folder = run(stage, "run", dtype=dtype)
    records = [record for record in metrics(folder) if "loss" in record]
    assert len(records) == 2 and all(record["loss"] == record["loss"] for record in records)
    assert any(tensor.any() for name, tensor in adapter(folder).items() if "lora_B" in name)


@pytest.mark.parametrize("stage", ["sft", "rlaif"])
def test_deterministic_runs_end_in_the_same_bits(run, stage, device):
    more = {"deterministic": True} if "deterministic" in options_of(SFTConfig) else {}
    if not more and device != "cpu":
        pytest.skip("there is no option deterministic")
    one, two = (adapter(run(stage, name, lora_dropout=0.1, **more)) for name in ("one", "two"))
    assert same_tensors(one, two)
