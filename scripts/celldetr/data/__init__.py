"""Turning raw data (PanNuke archives, spatial transcriptomics, slides) into patch stores."""
