"""Xenium samples: output folders, registration, cell types, patches, splits, SpatialData."""
