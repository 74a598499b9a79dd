"""Synthetic tissue in the formats of the real raw data, for the example and the tests (numpy and scipy only).

`tissue` grows a scene: nuclei with a class, an outline in um and a place, among glands, fat and fibres.
`render` stains a scene with hematoxylin and eosin at any resolution.
`pannuke` cuts scenes into patches and writes them as an archive in the layout of a PanNuke fold.
"""
