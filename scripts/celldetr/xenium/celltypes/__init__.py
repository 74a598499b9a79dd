"""Cell types of Xenium cells from an annotated single-cell reference."""
