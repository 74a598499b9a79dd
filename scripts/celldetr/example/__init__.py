"""Synthetic tissue in the formats of the real raw data, for the example and the tests.

`tissue` grows a scene: nuclei with a class, an outline in um and a place, among glands, fat and fibres.
`render` stains a scene with hematoxylin and eosin at any resolution; `textures` is what it draws with.
`pannuke` cuts scenes into patches and writes them as an archive in the layout of a PanNuke fold;
`defects` spoils the masks as those of the real data are.
`xenium` cuts a scene as an H&E and writes it with a Xenium output folder of the same nuclei: `xenium_tissue` places
and segments them, `xenium_images` draws, `xenium_layout` and `xenium_files` know the folders of all versions.
`expression` gives cells types and transcripts, of the genes in `xenium_panel`, and writes the reference that fits them.
`slide` draws a whole slide with outlines of its nuclei.
"""
