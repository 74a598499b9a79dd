"""How a rule runs: its log, errors, atomic outputs and provenance."""
