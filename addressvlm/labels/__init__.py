"""Alignment labels (paper 001, Sec. 3.2): texts that explain why a photo matches its address."""
