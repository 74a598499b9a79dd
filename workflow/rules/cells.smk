"""Cells of whole slides with types and embeddings: found or given cells, and files of them for other tools."""

CELL_NAMES = "|".join(map(re.escape, CELLS)) or "none"

if CONFIG.cells.sheet is not None:

    rule download_cell_slide:
        input:
            lambda wildcards: local_files(CELLS[wildcards.slide].file),
        output:
            slide="results/raw/cells/{slide}.tif",
        log:
            "results/logs/download_cell_slide/{slide}.log",
        benchmark:
            "results/benchmarks/download_cell_slide/{slide}.tsv"
        wildcard_constraints:
            slide=CELL_NAMES,
        conda:
            "../../envs/data.yaml"
        resources:
            mem_mb=1000,
            runtime=480,
        params:
            source=lambda wildcards: {
                "urls": list(CELLS[wildcards.slide].file),
                "bytes": CELLS[wildcards.slide].bytes,
                "sha256": CELLS[wildcards.slide].sha256,
            },
            given=lambda wildcards, input: cell_names(wildcards.slide),
        message:
            "Downloading the slide {wildcards.slide}"
        script:
            "../../scripts/download.py"

    rule download_cell_outlines:
        input:
            lambda wildcards: local_files(CELLS[wildcards.slide].nuclei),
        output:
            nuclei="results/raw/cells/{slide}_nuclei",
        log:
            "results/logs/download_cell_outlines/{slide}.log",
        benchmark:
            "results/benchmarks/download_cell_outlines/{slide}.tsv"
        wildcard_constraints:
            slide=CELL_NAMES,
        conda:
            "../../envs/data.yaml"
        resources:
            mem_mb=1000,
            runtime=120,
        params:
            source=lambda wildcards: {
                "urls": list(CELLS[wildcards.slide].nuclei),
                "bytes": None,
                "sha256": CELLS[wildcards.slide].nuclei_sha256,
            },
            given=lambda wildcards, input: cell_names(wildcards.slide),
        message:
            "Downloading the given cells of {wildcards.slide}"
        script:
            "../../scripts/download.py"


rule find_cells:
    input:
        unpack(cell_inputs),
        model=as_it_is(initial_model(CONFIG.cells.model, str(CONFIG.cells.split))),
    output:
        directory("results/cells/parts/{slide}_{job}"),  # kept: another class_threshold needs no search
    log:
        "results/logs/find_cells/{slide}_{job}.log",
    benchmark:
        "results/benchmarks/find_cells/{slide}_{job}.tsv"
    wildcard_constraints:
        slide=CELL_NAMES,
        job="[0-9]+",
    conda:
        "../../envs/cells.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=16000,
        runtime=480,
        tiles=CONFIG.cells.batch_size,
    params:
        jobs=CONFIG.cells.jobs,
        margin_um=CONFIG.cells.margin_um,
        nucleus_threshold=CONFIG.cells.nucleus_threshold,
        on_damage=CONFIG.cells.on_damage,
        embeddings=CONFIG.cells.embeddings,
        patch_size=CONFIG.patch.size,
        mpp=CONFIG.patch.mpp,
        precision=CONFIG.inference.precision,
        compile=CONFIG.inference.compile,
        row=lambda wildcards: cell_settings(wildcards.slide),
        given=lambda wildcards, input: cell_names(wildcards.slide),
        code=code("find_cells"),
    message:
        "Finding the cells of {wildcards.slide} (job {wildcards.job})"
    script:
        "../../scripts/find_cells.py"


rule join_cells:
    input:
        expand(
            "results/cells/parts/{{slide}}_{job}", job=range(1, CONFIG.cells.jobs + 1)
        ),
    output:
        cells="results/cells/{slide}.parquet",
        provenance="results/cells/{slide}.provenance.json",
    log:
        "results/logs/join_cells/{slide}.log",
    benchmark:
        "results/benchmarks/join_cells/{slide}.tsv"
    wildcard_constraints:
        slide=CELL_NAMES,
    conda:
        "../../envs/spatial.yaml"
    resources:
        mem_mb=8000,
        runtime=60,
    params:
        class_threshold=CONFIG.cells.class_threshold,
        code=code("join_cells"),
    message:
        "Joining the cells of {wildcards.slide}"
    script:
        "../../scripts/join_cells.py"


rule cells_h5ad:
    input:
        "results/cells/{slide}.parquet",
    output:
        "results/cells/{slide}.h5ad",
    log:
        "results/logs/cells_h5ad/{slide}.log",
    benchmark:
        "results/benchmarks/cells_h5ad/{slide}.tsv"
    wildcard_constraints:
        slide=CELL_NAMES,
    conda:
        "../../envs/spatial.yaml"
    resources:
        mem_mb=8000,
        runtime=60,
    params:
        embeddings=CONFIG.cells.embeddings,
        code=code("cells_h5ad"),
    message:
        "Writing the cells of {wildcards.slide} as AnnData"
    script:
        "../../scripts/cells_h5ad.py"


rule cells_geojson:
    input:
        "results/cells/{slide}.parquet",
    output:
        "results/cells/{slide}.geojson.gz",
    log:
        "results/logs/cells_geojson/{slide}.log",
    benchmark:
        "results/benchmarks/cells_geojson/{slide}.tsv"
    wildcard_constraints:
        slide=CELL_NAMES,
    conda:
        "../../envs/spatial.yaml"
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        code=code("cells_geojson"),
    message:
        "Writing the cells of {wildcards.slide} for QuPath"
    script:
        "../../scripts/cells_geojson.py"


rule cells_cellvit:
    input:
        "results/cells/{slide}.parquet",
    output:
        "results/cells/{slide}.cellvit.geojson",
    log:
        "results/logs/cells_cellvit/{slide}.log",
    benchmark:
        "results/benchmarks/cells_cellvit/{slide}.tsv"
    wildcard_constraints:
        slide=CELL_NAMES,
    conda:
        "../../envs/spatial.yaml"
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        code=code("cells_cellvit"),
    message:
        "Writing the cells of {wildcards.slide} for the viewer of CellViT"
    script:
        "../../scripts/cells_cellvit.py"


rule cells_spatialdata:
    input:
        cells="results/cells/{slide}.parquet",
        image=cell_slide if CONFIG.cells.image != "none" else [],
    output:
        directory("results/cells/{slide}.zarr"),
    log:
        "results/logs/cells_spatialdata/{slide}.log",
    benchmark:
        "results/benchmarks/cells_spatialdata/{slide}.tsv"
    wildcard_constraints:
        slide=CELL_NAMES,
    conda:
        "../../envs/spatial.yaml"
    threads: 2
    resources:
        mem_mb=16000,
        runtime=240,
    params:
        embeddings=CONFIG.cells.embeddings,
        image=CONFIG.cells.image,
        given=lambda wildcards, input: cell_names(wildcards.slide),
        code=code("cells_spatialdata"),
    message:
        "Writing the cells of {wildcards.slide} as SpatialData"
    script:
        "../../scripts/cells_spatialdata.py"


rule cells_page:
    input:
        cells="results/cells/{slide}.parquet",
        file=cell_slide,
    output:
        report(
            "results/cells/{slide}.html",
            category="Cells",
            caption="../report/cells.rst",
            labels={"slide": "{slide}"},
        ),
    log:
        "results/logs/cells_page/{slide}.log",
    benchmark:
        "results/benchmarks/cells_page/{slide}.tsv"
    wildcard_constraints:
        slide=CELL_NAMES,
    conda:
        "../../envs/spatial.yaml"
    threads: 2
    resources:
        mem_mb=16000,
        runtime=60,
    params:
        synthetic=CONFIG.example is not None,
        given=lambda wildcards, input: cell_names(wildcards.slide),
        code=code("cells_page"),
    message:
        "Drawing the cells of {wildcards.slide}"
    script:
        "../../scripts/cells_page.py"
