"""The stages as commands: the loop, then the picture of what its judge did."""
from minimath.config.schema import RLAIFConfig
from minimath.core import dist
from minimath.report.judge_plot import write_judge_plot
from minimath.train.rlaif import rlaif as train_rlaif
from minimath.train.sft import sft

__all__ = ["rlaif", "sft"]


def rlaif(cfg: RLAIFConfig) -> dict:
    """Run stage 2, then draw judge.png; returns the stage's summary. Raises UserError."""
    summary = train_rlaif(cfg)
    if dist.is_main():
        write_judge_plot(summary["run_dir"], print)
    return summary
