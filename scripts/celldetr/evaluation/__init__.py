"""From predictions to scores: matching, metrics, intervals, panoptic quality, frozen features. Imports no torch."""
