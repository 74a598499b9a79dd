"""Gigapixel images: pixels, tissue, outlines of nuclei, and the patches cut from them."""
