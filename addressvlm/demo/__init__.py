"""Generated toy cities and the toy base model: everything runs on a laptop without a network."""
