"""Where the hostile topics work: a folder with a canary, a tiny model, problems and a small finished run."""
import contextlib
import io
import json
import os
import pickle
import shutil
import sys
import warnings
from pathlib import Path
from unittest import mock

import torch
from harness import Tally
from tiny import write_tiny
from toy import make_config, write_problems

from minimath.cli import main
from minimath.config.schema import SFTConfig
from minimath.core.errors import UserError
from minimath.core.files import manifest_digest, sha256
from minimath.train.sft import sft

SMALL = {"lora_r": 2, "save_every": 1, "max_len": 64, "batch_size": 2, "warmup": 0.0}


class Place:
    """Where a topic works: the canary, a tiny model, problems, and a small finished run."""

    def __init__(self, folder: Path, full: bool):
        self.folder, self.canary, self.full = folder, folder / "canary", full
        self.model, self.data = str(write_tiny(folder / "model")), write_problems(folder / "problems.jsonl", n=12)
        self.run = folder / "run"
        self.train(self.run, steps=2)

    def train(self, out: Path, **options) -> dict:
        options = {"model": self.model, "data": self.data, "out": str(out), **SMALL, **options}
        cfg = make_config(SFTConfig, options.pop("model"), **options)
        with quiet():
            return sft(cfg)

    def copy(self, source: Path | str, name: str) -> Path:
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(source, target, symlinks=True))

    def refused(self, tally: Tally, words: str, action, says: str = "") -> None:
        """The action ends in a UserError that says `says`, and no code ran."""
        self.harmless(tally, words, action, says=says, refuse=True)

    def harmless(self, tally: Tally, words: str, action, says: str = "", refuse: bool = False) -> None:
        """No code ran; the action went through, or (refuse: it must) ended in a UserError."""
        message = ""
        try:
            with quiet():
                action()
        except UserError as error:
            message = str(error)
        except Exception as error:
            tally.add(False, f"{words}: {type(error).__name__}: {error}"[:300])
            return
        ran = self.canary.exists()
        self.canary.unlink(missing_ok=True)
        tally.add(not ran and (bool(message) or not refuse) and says in message,
                  f"{words}: " + ("CODE RAN" if ran else f"said {message!r}"))


@contextlib.contextmanager
def quiet():
    """Nothing on stdout, and no warnings."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def command(*words: str) -> tuple[int, str]:
    """(exit status, all that was printed) of the command line in this process."""
    said = io.StringIO()
    with (mock.patch.object(sys, "argv", ["minimath", *words]), contextlib.redirect_stdout(said),
          contextlib.redirect_stderr(said), warnings.catch_warnings()):
        warnings.simplefilter("ignore")
        try:
            status = main()
        except Exception as error:
            status, text = 1, f"{type(error).__name__}: {error}"
            said.write(text)
    return status, said.getvalue()


def everything(folder: Path) -> dict:
    """Each path under a folder, links not followed, and what a file holds."""
    return {str(path): path.read_bytes() if path.is_file() and not path.is_symlink() else os.path.islink(path)
            for path in folder.rglob("*")}


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def resign(folder: Path) -> None:
    """Make the manifest of a checkpoint or adapter folder agree with what lies there."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
                         for path in sorted(folder.iterdir()) if path.name != "manifest.json"}
    manifest.pop("sha256", None)
    manifest["sha256"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def bomb(place: Place, form: str) -> bytes:
    """A pickle that makes the canary when it is read: plain, or in the zip file of torch.save."""
    if form == "pickle":
        return pickle.dumps(Bomb(place.canary))
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "bomb": Bomb(place.canary)}, buffer)
    return buffer.getvalue()


FORMS = ("pickle", "torch.save")
