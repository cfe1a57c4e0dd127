"""Options of earlier versions: what they are called now. Old recipes are answered with these."""

RENAMED = {
    "gate": "verifier", "slots": "max_num_seqs", "micro_tokens": "micro_batch_tokens", "loss_type": "loss",
    "beta": "kl_coef", "lam_judge": "judge_weight", "lam_length": "brevity_weight", "lam_format": "format_weight",
    "judge_plan": "judge_pairs", "suite_data": "data",
}
RENAMED_VALUES = {("judge", "rules"): "heuristic", ("judge_fallback", "rules"): "heuristic",
                  ("reward", "rules"): "paper"}
