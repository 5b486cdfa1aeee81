"""From answers to a table with intervals and a report."""
