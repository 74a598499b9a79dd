"""Systems of Table 1 that segment nuclei: Mask R-CNN, Micro-Net, HoVer-Net, CellViT, behind one interface."""
