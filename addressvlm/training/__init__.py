"""Tuning: which rows at which step, how they become tokens, and the step itself. No Ray; torch.distributed if it is up."""
