"""Answers of a model: generated freely, constrained to a city's addresses, or as probabilities of all addresses."""
