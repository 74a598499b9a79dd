"""Cell types of Xenium cells from an annotated single-cell reference.

Readers of labels (`labels`) import neither scanpy nor TACCO; what annotates (`annotate`) does.
"""
