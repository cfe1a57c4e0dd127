"""minimath: SFT, then RLAIF, for mathematical language models on one GPU."""
