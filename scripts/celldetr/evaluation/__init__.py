"""From predictions to tables and figures: matching, metrics, intervals. Never imports torch."""
