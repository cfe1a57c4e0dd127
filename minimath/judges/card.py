"""What a trained judge is, beside its adapter: judge.json, written by `minimath judge train`."""
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from minimath.config.schema import PromptOptions
from minimath.core.errors import UserError
from minimath.core.files import read_json, write_whole
from minimath.judges.calibrate import Calibration

JUDGE, CARD = "judge", "judge.json"  # the name of its adapter in the model, of its card in the adapter's folder


@dataclass
class JudgeCard:
    """The form that was trained, how it is asked, how far its probabilities go.

    rubric: the text, of form pair. problems: hashes of the problems it was trained on. figures: of its held-out
    solutions. pairs: held-out ones of the policy's own, (problem, right text, wrong text), for the canary."""
    form: str = ""
    system: str | None = None
    prompt_template: str = ""
    thinking: str = "auto"
    template_args: str = ""
    rubric: str = ""
    calibration: Calibration = Calibration()
    problems: list[str] = field(default_factory=list)
    pairs: list[list[str]] = field(default_factory=list)
    figures: dict = field(default_factory=dict)

    def form_of(self, wanted: str) -> str:
        """The form that an option asks for, or UserError where another was trained."""
        trained = self.form or "pair"
        if self.form and wanted != "auto" and (wanted == "pair") != (self.form == "pair"):
            raise UserError(f"judge_form={wanted}, but judge_adapter was trained for {self.form}: leave judge_form out")
        return trained if wanted == "auto" else wanted

    def prompt_options(self, policy: PromptOptions) -> PromptOptions:
        """How problems are put to the judge: as in its training."""
        return policy if self.system is None else replace(policy, **{name: getattr(self, name)
                                                                     for name in policy.asked()})


def write_card(folder: Path, card: JudgeCard) -> None:
    write_whole(Path(folder) / CARD, json.dumps(asdict(card), indent=1) + "\n")


def read_card(folder: Path) -> JudgeCard:
    """Read judge.json beside an adapter. Raises UserError."""
    try:
        values = read_json(Path(folder) / CARD)
        card = JudgeCard(**values | {"calibration": Calibration(*map(float, values["calibration"]))})
        if card.form not in ("pair", "single"):
            raise ValueError(f"form {card.form!r}")
        if not (all(map(math.isfinite, card.calibration)) and card.calibration.temperature > 0):
            raise ValueError(f"{card.calibration}")
        return card
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"judge_adapter: {folder} has no readable {CARD} ({error}); give the run folder of `minimath "
                        "judge train`, and let one that was stopped end, by resume=true") from None
