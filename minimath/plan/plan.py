"""What a recipe needs and which cards hold it, before anything loads or downloads.

  minimath plan RECIPE.yaml [key=value ...] [card=24] [--apply [FILE]]

  card=24        the card's memory in GiB; default: that of the card here, else cards of 8 to 32 GiB
  --apply FILE   write the recipe with what makes it fit; default: RECIPE-24gb.yaml; no file is overwritten
  key=value      any option of the recipe, as in minimath run

adapter= and judge_adapter= count with the rank that they have; in a recipe with a section sft RLAIF goes on with the
adapter that SFT leaves, and a judge that the run trains has the rank of that.

Planned is the worst case: rows of full length that fill micro_batch_tokens, every completion as long as it may be.
A card is taken to be of sm_80 or later, where attention needs no masks. What offload=true moves to host memory is said
below the table. bench/plan.py measures how right that is on a CPU. What a card needs beside the tensors, half a GiB and
6%, is assumed."""
import re
from pathlib import Path

import torch
import transformers
import yaml
from rich.console import Console
from rich.table import Table

from minimath.config.load import find_recipe, load_config, read_recipe, read_words, words_of_own_judge
from minimath.config.schema import STAGES
from minimath.core.errors import UserError
from minimath.core.files import write_whole
from minimath.core.text import mask
from minimath.models.load import pick_device
from minimath.plan.needs import GIB, Planner, going_on

CARDS = (8, 12, 16, 24, 32)  # GiB


class AsWritten(yaml.SafeDumper):
    """Leaves texts as a recipe has them: YAML would take off for false."""
    yaml_implicit_resolvers = {}


def plan(recipe: str | None, words: list[str]) -> dict:
    """Print what the stages need and what fits where; returns it. Raises UserError."""
    card, path, given = parse(recipe, words)
    words = words_of_own_judge(recipe, given, "OUT/judge") + given
    stages = {name: load_config(cls, recipe, words, allow_other=True) for name, cls in STAGES.items()}
    sft = stages["sft"] = going_on(stages["sft"])
    both = "sft" in {*read_recipe(recipe), *read_words(words)}
    rlaif = stages["rlaif"] = going_on(stages["rlaif"], sft if both else None)
    model, gib = sft.model, lambda size: f"{size / GIB:.2f}"
    transformers.utils.logging.set_verbosity_error()
    if not card and model.device != "cpu" and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(pick_device(model.device)).total_memory
    planner, console = Planner(model.name, model.device), Console(width=max(100, Console().width))
    held = Table("GiB", "fits", "SFT", "RLAIF", "max_num_seqs", "set", title="largest micro_batch_tokens, max_num_seqs")
    cards = []
    for size in [card] if card else [c * GIB for c in CARDS]:
        changes = planner.changes(stages, size)
        cards.append({"card": size, "fits": changes == {}, "changes": changes,
                      "sft": planner.most_tokens(sft, size), "rlaif": planner.most_tokens(rlaif, size),
                      "max_num_seqs": planner.most_seqs(rlaif, rlaif.replace(max_num_seqs=0), size)})
        said = [f"{section}.{key}={value}" for section in changes or {} for key, value in changes[section].items()]
        held.add_row(gib(size), "if set" if said else "as it is" if changes == {} else "no",
                     *(str(cards[-1][name] or "-") for name in ("sft", "rlaif", "max_num_seqs")), " ".join(said))
    shown = next((each["card"] for each in cards if each["fits"]), cards[-1]["card"])
    needs = {"SFT": planner.training(sft), "RLAIF update": planner.training(rlaif)}
    evaluated = sft.replace(quant=stages["eval"].model.quant, dtype=stages["eval"].model.dtype)
    for name, base, cfg in (("RLAIF rollout", rlaif, rlaif), ("eval", evaluated, stages["eval"])):
        seqs = cfg.engine.max_num_seqs or max(1, planner.most_seqs(base, cfg, shown))
        needs[f"{name}\nmax_num_seqs={seqs}"] = planner.rollout(base, cfg, seqs, shown)
    table = Table("GiB", *needs, title=f"{model.name} on {gib(shown)} GiB")
    names = dict.fromkeys(name for rows in needs.values() for name in rows)
    for name in sorted(names, key=lambda name: "assumed" in name):
        table.add_row(name, *(gib(rows[name]) if name in rows else "" for rows in needs.values()))
    table.add_section()
    table.add_row("together", *(gib(sum(rows.values())) for rows in needs.values()))
    console.print(table, held)
    for name, cfg in (("SFT", sft), ("RLAIF update", rlaif)):
        if cfg.optimizer.offload:
            size = gib(planner.in_host_memory(cfg))
            console.print(f"{name}: offload=true takes {size} GiB of pinned host memory", soft_wrap=True)
    if any(cfg.model.shard for cfg in stages.values()):
        console.print("shard=true is not counted: of N processes each holds 1/N of the layers' weights", soft_wrap=True)
    if path and changes is not None:
        made = yaml.BaseLoader(find_recipe(recipe).read_text(encoding="utf-8")).get_single_data() or {}
        made |= {section: (made.get(section) or {}) | options for section, options in changes.items()}
        text = yaml.dump(made, Dumper=AsWritten, sort_keys=False)
        write_whole(path, f"# {recipe}, changed to fit {gib(card)} GiB\n{text}")
        same = f"; it is for minimath run with the same words: {mask(' '.join(given))}" if given else ""
        console.print(f"written: {path}{same}", soft_wrap=True, highlight=False, markup=False)
    return {"stages": needs, "cards": cards}


def parse(recipe: str | None, words: list[str]) -> tuple[int, Path | None, list[str]]:
    """Split into bytes of the card or 0, file or None, other words. Raises UserError."""
    found, rest, before = {"card": "0", "apply": None}, [], ""
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if name in found:
            found[name] = value
        elif before == "apply" and "=" not in word and not word.startswith("--"):
            found["apply"] = word
        else:
            rest.append(word)
        before = name
    card, target = found.values()
    if not re.fullmatch(r"\d+(\.\d+)?", card):
        raise UserError(f"card={card}: give a card's memory in GiB, as in card=24")
    if target is not None:
        if not (recipe and float(card)):
            raise UserError("--apply needs a recipe and a card: minimath plan RECIPE.yaml card=24 --apply")
        target = Path(target or Path(recipe).with_name(f"{find_recipe(recipe).stem}-{card}gb.yaml"))
        if target.exists():
            raise UserError(f"{target} is there already and is not overwritten; remove it, or --apply ANOTHER_FILE")
    return int(float(card) * GIB), target, rest
