"""From predictions to scores: matching, metrics, intervals, frozen features. Imports no torch."""
