"""The embedded small world: toy cities and the toy base model, so that everything runs on a laptop without a network."""
