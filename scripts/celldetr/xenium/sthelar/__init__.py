"""Sections of STHELAR: labelled patches, made into patch stores like those of Xenium samples."""
