"""Register the H&E image of a Xenium sample.

Inputs: ``outs`` (output folder), ``he`` (image), ``alignment`` (file of 10x: H&E px -> Xenium px; optional).
Outputs: ``json`` (matrix (3, 3) H&E level-0 px -> Xenium px, figures of the gate), ``picture`` (PNG), ``provenance``.
If no registration passes, the best attempt is drawn as ``registration_refused.png`` beside them: Snakemake removes the
outputs of a job that fails, and this one is not declared.
Params: settings, he_mpp (um per H&E px, or None: as in the file), sample (name), seed,
given (what the user calls the inputs).
"""

from dataclasses import replace
from pathlib import Path

from celldetr.config.xenium import RegistrationSettings
from celldetr.report.registration import registration_figure
from celldetr.report.style import PREVIEW_DPI, save
from celldetr.runtime.errors import InputError
from celldetr.runtime.provenance import write_provenance
from celldetr.runtime.rule import run_rule
from celldetr.slides.pyramid import open_pyramid
from celldetr.xenium.output import dapi_path, read_nuclei, read_pixel_size
from celldetr.xenium.registration.alignment import read_alignment
from celldetr.xenium.registration.messages import Refused
from celldetr.xenium.registration.register import register

REFUSED = "registration_refused.png"


def main(snakemake):
    source, params, output = snakemake.input, snakemake.params, snakemake.output
    settings = RegistrationSettings.from_dict(params.settings, "registration")
    files = list(source.get("alignment", []))
    alignment = read_alignment(files[0]) if files else None
    if alignment and (own := params.given["alignment"]["path"]):
        alignment = replace(alignment, name=f"alignment file {own}")
    nuclei = read_nuclei(source.outs).geometry.to_numpy()
    dapi = dapi_path(source.outs)
    refused = Path(output.picture).with_name(REFUSED)
    refused.unlink(missing_ok=True)
    with open_pyramid(source.he, params.he_mpp) as he, open_pyramid(dapi, plane=0) as image:
        try:
            registration = register(
                he,
                image,
                nuclei,
                read_pixel_size(source.outs),
                alignment,
                settings,
                name=params.sample,
                seed=params.seed,
                workers=snakemake.threads,
            )
        except Refused as error:
            text = str(error).replace(str(source.he), params.given["he"]["path"] or str(source.he))
            figure = registration_figure(error.best, he, nuclei, settings, name=params.sample, refusal=text)
            save(figure, refused, dpi=PREVIEW_DPI)
            raise InputError(f"{error} Look at {refused}: it shows that attempt.") from error
        figure = registration_figure(registration, he, nuclei, settings, name=params.sample)
        save(figure, output.picture, dpi=PREVIEW_DPI)
    registration.write(output.json, params.sample)
    write_provenance(
        output.provenance,
        settings={"registration": settings.to_dict(), "he_mpp": params.he_mpp, "sample": params.sample},
        inputs=[source.he, dapi, *files],
        seed=params.seed,
    )


if "snakemake" in globals():
    run_rule(main, snakemake)
