"""The model: backbone, deformable attention, decoders, and imports of weights."""
