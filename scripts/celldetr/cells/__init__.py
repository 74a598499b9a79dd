"""Cells of a slide: where they are, their types and their embeddings; and files of them for other tools."""
