"""Stage 2 as a command: the loop, then the picture of what its judge did."""
from collections.abc import Callable
from pathlib import Path

from minimath.config.schema import RLAIFConfig
from minimath.core import dist
from minimath.report.page import JUDGE_PLOT, write_judge_plot
from minimath.train.rlaif import rlaif as train_rlaif


def rlaif(cfg: RLAIFConfig) -> dict:
    """Run stage 2, then draw judge.png; returns the stage's summary. Raises UserError."""
    summary = train_rlaif(cfg)
    if dist.is_main():
        draw(JUDGE_PLOT, lambda: write_judge_plot(Path(summary["run_dir"])), print)
    return summary


def draw(what: str, write: Callable[[], Path | None], say: Callable[[str], None]) -> None:
    """Write a picture or a page of a run, and say where it is.

    What fails is said, never raised: the run is complete without it.
    """
    try:
        if path := write():
            say(f"{what}: {path}")
    except Exception as error:
        say(f"{what} could not be written, everything else is saved ({type(error).__name__}: {error}); "
            "minimath report RUN tries again")
