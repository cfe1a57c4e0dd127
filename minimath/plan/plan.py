"""What a recipe needs and which cards hold it, before anything loads or downloads: minimath plan RECIPE.yaml

  minimath plan RECIPE.yaml [key=value ...] [card=24] [--apply [FILE]]

  card=24        the card's memory in GiB (or in bytes); default: that of the card here, else every card of the table
  --apply FILE   write the recipe with what makes it fit; default: RECIPE-24gb.yaml; no file is overwritten
  key=value      any option of the recipe, as in minimath run

Stages are planned for the worst case that the options allow: rows of full length that fill micro_batch_tokens and need
attention masks, every completion as long as it may be. How bytes are counted is in footprint.py; bench.plan measures
how right that is on a CPU. It has not been compared with a card: what a card needs beside the tensors, half a GiB and
6%, is an assumption.
"""
import dataclasses

import torch
import transformers
from rich.console import Console
from rich.table import Table

from minimath.plan import footprint
from minimath.config.load import load_config
from minimath.config.schema import EvalConfig, RLAIFConfig, SFTConfig
from minimath.core.errors import UserError
from minimath.plan.edit import apply, new_file
from minimath.plan.footprint import Passes
from minimath.plan.needs import (
    GIB,
    Subject,
    fits,
    largest,
    longest_row,
    margin,
    recommend,
    rollout_need,
    room_in,
    training_need,
)

CARDS = (8, 12, 16, 24, 32)  # GiB
MARGIN = "context and fragmentation (assumed)"


def plan(recipe: str | None, words: list[str]) -> dict:
    """Print what the stages of a recipe need and what fits where; returns it. Raises UserError."""
    card, target, words = parse(words)
    stages = {name: load_config(cls, recipe, words, allow_other=True)
              for name, cls in (("sft", SFTConfig), ("rlaif", RLAIFConfig), ("eval", EvalConfig))}
    if target is not None and not (recipe and card):
        raise UserError("--apply needs a recipe and a card: minimath plan RECIPE.yaml card=24 --apply")
    path = new_file(recipe, target, f"{round(card / GIB)}gb") if target is not None else None
    transformers.utils.logging.set_verbosity_error()
    device = stages["sft"].device
    if not card and device != "cpu" and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0).total_memory
    subject, console = Subject(stages["sft"].model, device), Console(width=max(100, Console().width))
    shown = card or next((c * GIB for c in CARDS if all(fits(subject, stages[n], room_in(c * GIB, subject.device))
                                                        for n in ("sft", "rlaif"))), CARDS[-1] * GIB)
    result = {"model": stages["sft"].model, "source": subject.source, "card": shown}
    result["stages"] = stage_table(subject, stages, shown, console)
    result["cards"] = card_table(subject, stages, [card] if card else [c * GIB for c in CARDS], console)
    if card:
        changes, said, possible = recommend(subject, stages, card)
        result |= {"changes": changes, "fits": possible}
        console.print(verdict(said, possible, card), soft_wrap=True, highlight=False)
        if path is not None and possible:
            apply(recipe, changes, path)
            result["written"] = str(path)
            console.print(f"written: {result['written']}", soft_wrap=True, highlight=False)
    return result


def parse(words: list[str]) -> tuple[int, str | None, list[str]]:
    """(bytes of the card or 0, where to write: "" for the default, None: nowhere; the other words)."""
    card, target, rest, words = 0, None, [], list(words)
    while words:
        name, equals, value = words.pop(0).removeprefix("--").partition("=")
        if name == "card":
            try:
                size = float(value.lower().removesuffix("gb"))
                card = int(size * GIB) if size < 4096 else int(size)
            except (ValueError, OverflowError):
                card = 0
            if card <= 0:
                raise UserError(f"card={value}: give a card's memory in GiB (card=24) or in bytes")
        elif name == "apply":
            target = value if equals else words.pop(0) if words and "=" not in words[0] and words[0][:2] != "--" else ""
        else:
            rest.append(name + equals + value)
    return card, target, rest


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def stage_table(subject: Subject, stages: dict, card: int, console: Console) -> dict:
    """The table of what each stage needs, in GiB."""
    sft, rlaif, room = stages["sft"], stages["rlaif"], room_in(card, subject.device)
    shared = {name: getattr(stages["eval"], name) for name in ("quant", "dtype", "double_quant")}
    columns, notes = {}, []
    for title, cfg in (("SFT", sft), ("RLAIF update", rlaif)):
        columns[title], most = training_need(subject, cfg)
        notes.append(training_notes(subject, cfg, title, most))
    for title, base, cfg, state in (("RLAIF rollout", rlaif, rlaif, True),
                                    ("eval", dataclasses.replace(sft, **shared), stages["eval"], False)):
        columns[title], slots = rollout_need(subject, base, cfg, room, state=state)
        notes.append(f"{title}: {slots} slots of {cfg.prompt.max_prompt_len + cfg.sampling.max_new_tokens} tokens side by side"
                     + ("" if cfg.engine.max_num_seqs else f", what {gib(card)} GiB hold"))
    for rows in columns.values():
        rows[MARGIN] = margin(sum(rows.values()), subject.device)
    names = list(dict.fromkeys(name for rows in columns.values() for name in rows))
    names.append(names.pop(names.index(MARGIN)))
    where = "CPU" if subject.device == "cpu" else f"{str(subject.dtype(sft)).removeprefix('torch.')} on a card"
    table = Table("GiB", *columns, title=f"{sft.model}, by {subject.source}; {where}")
    for name in names:
        table.add_row(name, *(gib(rows[name]) if name in rows else "" for rows in columns.values()))
    table.add_section()
    table.add_row("together", *(gib(sum(rows.values())) for rows in columns.values()))
    console.print(table)
    if sft.shard or rlaif.shard:
        notes.append("shard=true is not counted: of N processes each holds 1/N of the layers' weights, and one layer "
                     "whole while it computes")
    console.print("\n".join(notes), soft_wrap=True, highlight=False)
    return columns


def training_notes(subject: Subject, cfg, title: str, most: Passes) -> str:
    """The passes, with and without checkpointing; the fused loss against full logits; what sdpa's masks cost."""
    shapes = footprint.sft_shapes(cfg) if isinstance(cfg, SFTConfig) else footprint.rlaif_shapes(cfg)
    shape = max(shapes, key=lambda each: max(subject.follow(cfg, each)))
    tokens, size = shape.rows * shape.length, subject.dtype(cfg).itemsize
    full = tokens * subject.config.get_text_config().vocab_size * (size + 4)
    other = cfg.replace(gradient_checkpointing=not cfg.optimizer.gradient_checkpointing)
    peaks = {c.gradient_checkpointing: training_need(subject, c, exact=c is cfg)[1].peak() for c in (cfg, other)}
    note = (f"{title}: {shape.kind}, {shape.rows} x {shape.length} tokens a pass; passes {gib(peaks[False])} without "
            f"and {gib(peaks[True])} with gradient_checkpointing; fused loss {gib(most.loss)}, logits and their fp32 "
            f"copy would be {gib(full)}")
    if cfg.model.attn == "sdpa" and subject.device != "cpu":
        flash = cfg.replace(attn="flash_attention_2")
        spared = max(subject.follow(cfg, shape)) - max(subject.follow(flash, shape._replace(kind="packed")))
        if spared > 0.1 * most.peak():
            note += f"; masks and repeated keys of sdpa {gib(spared)}, which attn=flash_attention_2 spares"
            note += " (and packing=false in part)" if shape.kind == "packed" else ""
    return note


def card_table(subject: Subject, stages: dict, cards: list[int], console: Console) -> list[dict]:
    """What fits on each card, and the largest setting that does; with quant=nf4 as well where the recipe does not."""
    table = Table("GiB", "quant", "as it is", "SFT", "checkpointed", "RLAIF", "checkpointed", "slots",
                  title="what fits: largest micro_batch_tokens (* rows must be cut to that), without and with checkpointing")
    found = []
    for card in cards:
        room = room_in(card, subject.device)
        whole = all(fits(subject, stages[name], room) for name in ("sft", "rlaif"))
        for quant in dict.fromkeys((stages["sft"].quant, stages["sft"].quant if whole else "nf4")):
            line, cells = {"card": card, "quant": quant, "fits": whole and quant == stages["sft"].quant}, []
            for name in ("sft", "rlaif"):
                for checkpointing in (False, True):
                    cfg = dataclasses.replace(stages[name], quant=quant, gradient_checkpointing=checkpointing)
                    line[f"{name}{'-checkpointed' * checkpointing}"] = most = largest(subject, cfg, room)
                    cells.append(f"{most}{'*' * (most < longest_row(cfg))}" if most else "-")
            base = dataclasses.replace(stages["rlaif"], quant=quant)
            rows, slots = rollout_need(subject, base, dataclasses.replace(base, slots=0), room, state=True)
            line["slots"] = slots if sum(rows.values()) <= room else 0
            table.add_row(gib(card), quant, "yes" if line["fits"] else "no", *cells, str(line["slots"] or "-"))
            found.append(line)
    console.print(table)
    return found


def verdict(words: list[str], possible: bool, card: int) -> str:
    if not possible:
        return f"On {gib(card)} GiB it does not fit with any setting: take a smaller model or a larger card."
    return f"On {gib(card)} GiB: " + ("it fits as it is." if not words else "set " + "; ".join(words) + ".")
