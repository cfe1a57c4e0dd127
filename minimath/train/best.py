"""Which checkpoint of a run is the best, by its evaluations on held-out problems."""
from minimath.core.state import Kept


class Best(Kept):
    """Keeps the evaluation of the best checkpoint: step, accuracy, tokens, problems, highest (accuracy so far).

    Accuracy comes first, then tokens. With a margin the best is the shortest of those within one standard error of the
    highest accuracy, at most a tenth of it; else the shortest of those that have the highest. Of equals the newest."""
    kept = ("best", "newest", "highest")

    def __init__(self, margin: bool):
        self.margin, self.best, self.newest, self.highest = margin, None, None, 0.0

    def take(self, *, step: int, accuracy: float, tokens: float, problems: int) -> bool:
        """Take in an evaluation; tell whether its checkpoint is the best so far."""
        highest = self.highest = max(self.highest, accuracy)
        self.newest = {"step": step, "accuracy": accuracy, "tokens": tokens, "problems": problems, "highest": highest}
        least = highest - (standard_error(highest, problems) if self.margin else 0.0)
        is_best = accuracy >= least and (
            self.best is None or self.best["accuracy"] < least or tokens <= self.best["tokens"])
        if is_best:
            self.best = self.newest
        return is_best

    def newest_step(self) -> int:
        """Name the step of the newest evaluation; -1: none."""
        return self.newest["step"] if self.newest else -1


def standard_error(accuracy: float, problems: int) -> float:
    """Estimate that of an accuracy, with one problem more of each kind (Laplace), but at most a tenth of it."""
    p = (accuracy * problems + 1) / (problems + 2)
    return min((p * (1 - p) / problems) ** 0.5, accuracy / 10)
