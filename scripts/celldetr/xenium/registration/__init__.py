"""Registration of H&E images to Xenium samples.

A matrix (3, 3) always maps H&E level-0 px (x, y, 1) to Xenium px; um = Xenium px times `pixel_size`.
"""
