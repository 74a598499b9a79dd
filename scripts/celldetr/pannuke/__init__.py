"""PanNuke: archives, their conversion to patch stores, and the splits of the folds."""
