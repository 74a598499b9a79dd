"""Drawn tissue in the formats of the real raw data, for the example and the tests.

`tissue` grows a scene, nuclei of all classes among glands, fat and fibres, by the tables in `styles`; `drawing` stains
it. `pannuke` cuts scenes into an archive with the defects of PanNuke, `xenium` draws samples with planted affine and
expression, `slide` a whole slide with outlines of its nuclei.
"""
