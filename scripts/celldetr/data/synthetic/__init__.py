"""Synthetic tissue in the formats of the real raw data, for the example and the tests (numpy and scipy only).

`tissue` grows a scene: nuclei with a class, an outline in um and a place, among glands, fat and fibres.
`render` stains a scene with hematoxylin and eosin at any resolution; `textures` is what it draws with.
`pannuke` cuts scenes into patches and writes them as an archive in the layout of a PanNuke fold;
`defects` spoils the masks as those of the real data are.
"""
