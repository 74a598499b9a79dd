"""Drawn Xenium samples in the layout of the public ones: output folder, post-Xenium H&E and its alignment.

`sample` draws a sample and says what was planted, `expression` gives its cells types and transcripts, `files` writes
the output folder.
"""
