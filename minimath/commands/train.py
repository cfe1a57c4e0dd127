"""The stages as commands: the loop, then the picture of what its judge did."""
from minimath.core import dist
from minimath.report.judge_plot import write_judge_plot


def train(stage: str, cfg) -> dict:
    """Run the stage sft or rlaif; returns its summary. Raises UserError."""
    if stage == "sft":
        from minimath.train.sft import sft
        return sft(cfg)
    from minimath.train.rlaif import rlaif
    summary = rlaif(cfg)
    if dist.is_main():
        write_judge_plot(summary["run_dir"], print)
    return summary
