"""Xenium samples with H&E images: downloads, registration, cell types, patches, splits, figure 5."""

if CONFIG.example is not None:

    rule make_example_xenium:
        output:
            outs="example-input/xenium/{sample}_outs.zip",
            he="example-input/xenium/{sample}_he_image.ome.tif",
            alignment="example-input/xenium/{sample}_he_imagealignment.csv",
        log:
            "results/logs/make_example_xenium/{sample}.log",
        benchmark:
            "results/benchmarks/make_example_xenium/{sample}.tsv"
        conda:
            "../../envs/spatial.yaml"
        resources:
            mem_mb=2000,
            runtime=15,
        params:
            sample=lambda wildcards: CONFIG.example.xenium[wildcards.sample].to_dict(),
            number=lambda wildcards: list(CONFIG.example.xenium).index(wildcards.sample),
            he_mpp=0.8 * CONFIG.patch.mpp,
            seed=CONFIG.example.seed,
            code=code("make_example_xenium"),
        message:
            "Drawing the example's Xenium sample {wildcards.sample}"
        script:
            "../../scripts/make_example_xenium.py"

    rule make_example_reference:
        output:
            "example-input/xenium/reference.h5ad",
        log:
            "results/logs/make_example_reference.log",
        benchmark:
            "results/benchmarks/make_example_reference.tsv"
        conda:
            "../../envs/spatial.yaml"
        resources:
            mem_mb=2000,
            runtime=15,
        params:
            cells=CONFIG.example.reference_cells,
            seed=CONFIG.example.seed,
            code=code("make_example_reference"),
        message:
            "Writing the example's scRNA-seq reference"
        script:
            "../../scripts/make_example_reference.py"


rule download_xenium:
    input:
        lambda wildcards: local_files(SAMPLES[wildcards.sample].outs),
    output:
        outs=directory("results/raw/xenium/{sample}/outs"),
    log:
        "results/logs/download_xenium/{sample}.log",
    benchmark:
        "results/benchmarks/download_xenium/{sample}.tsv"
    conda:
        "../../envs/spatial.yaml"
    resources:
        mem_mb=2000,
        runtime=480,
    params:
        source=lambda wildcards: sample_source(wildcards, "outs"),
        given=lambda wildcards, input: sample_names(wildcards.sample, "outs"),
    message:
        "Downloading the Xenium output of {wildcards.sample}"
    script:
        "../../scripts/download_xenium.py"


rule download_he:
    input:
        lambda wildcards: local_files(SAMPLES[wildcards.sample].he),
    output:
        he="results/raw/xenium/{sample}/he_image.tif",
    log:
        "results/logs/download_he/{sample}.log",
    benchmark:
        "results/benchmarks/download_he/{sample}.tsv"
    conda:
        "../../envs/data.yaml"
    resources:
        mem_mb=1000,
        runtime=240,
    params:
        source=lambda wildcards: sample_source(wildcards, "he"),
        given=lambda wildcards, input: sample_names(wildcards.sample, "he"),
    message:
        "Downloading the H&E image of {wildcards.sample}"
    script:
        "../../scripts/download.py"


rule download_alignment:
    input:
        lambda wildcards: local_files(SAMPLES[wildcards.sample].alignment),
    output:
        alignment="results/raw/xenium/{sample}/alignment.csv",
    log:
        "results/logs/download_alignment/{sample}.log",
    benchmark:
        "results/benchmarks/download_alignment/{sample}.tsv"
    conda:
        "../../envs/data.yaml"
    resources:
        mem_mb=500,
        runtime=30,
    params:
        source=lambda wildcards: sample_source(wildcards, "alignment"),
        given=lambda wildcards, input: sample_names(wildcards.sample, "alignment"),
    message:
        "Downloading the alignment of {wildcards.sample}"
    script:
        "../../scripts/download.py"


rule download_reference:
    input:
        lambda wildcards: local_files(REFERENCES[wildcards.reference].file),
    output:
        h5ad="results/raw/references/{reference}.h5ad",
    log:
        "results/logs/download_reference/{reference}.log",
    benchmark:
        "results/benchmarks/download_reference/{reference}.tsv"
    conda:
        "../../envs/data.yaml"
    resources:
        mem_mb=1000,
        runtime=480,
    params:
        row=lambda wildcards: REFERENCES[wildcards.reference].source(),
        given=lambda wildcards, input: reference_names(wildcards.reference),
    message:
        "Downloading the scRNA-seq reference {wildcards.reference}"
    script:
        "../../scripts/download_reference.py"


rule register_xenium:
    input:
        outs="results/raw/xenium/{sample}/outs",
        he="results/raw/xenium/{sample}/he_image.tif",
        alignment=alignment_file,
    output:
        json="results/xenium/{sample}/registration.json",
        picture=report(
            "results/xenium/{sample}/registration.png",
            category="Data",
            caption="../report/registration.rst",
            labels={"sample": "{sample}", "what": "registration"},
        ),
        provenance="results/xenium/{sample}/registration.provenance.json",
    log:
        "results/logs/register_xenium/{sample}.log",
    benchmark:
        "results/benchmarks/register_xenium/{sample}.tsv"
    retries: 0  # what it refuses once, it refuses again; it needs little memory
    conda:
        "../../envs/spatial.yaml"
    threads: 2
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        settings=CONFIG.xenium.registration.to_dict(),
        he_mpp=lambda wildcards: SAMPLES[wildcards.sample].he_mpp,
        sample=lambda wildcards: wildcards.sample,
        seed=CONFIG.seed,
        given=lambda wildcards, input: sample_names(
            wildcards.sample, "outs", "he", "alignment"
        ),
        code=code("register_xenium"),
    message:
        "Registering the H&E image of {wildcards.sample} to its Xenium output"
    script:
        "../../scripts/register_xenium.py"


rule prepare_reference:
    input:
        h5ad="results/raw/references/{reference}.h5ad",
        mapping=lambda wildcards: own_file(REFERENCES[wildcards.reference].mapping),
    output:
        reference="results/references/{reference}.h5ad",
        summary="results/references/{reference}_summary.json",
    log:
        "results/logs/prepare_reference/{reference}.log",
    benchmark:
        "results/benchmarks/prepare_reference/{reference}.tsv"
    conda:
        "../../envs/spatial.yaml"
    resources:
        mem_mb=16000,
        runtime=60,
    params:
        label_column=lambda wildcards: REFERENCES[wildcards.reference].label_column,
        cells=lambda wildcards: REFERENCES[wildcards.reference].cells,
        cells_per_type=CONFIG.xenium.cells_per_type,
        seed=CONFIG.seed,
        given=lambda wildcards, input: reference_names(wildcards.reference),
        code=code("prepare_reference"),
    message:
        "Preparing the scRNA-seq reference {wildcards.reference}"
    script:
        "../../scripts/prepare_reference.py"


rule annotate_xenium:
    input:
        outs="results/raw/xenium/{sample}/outs",
        reference=lambda wildcards: f"results/references/{SAMPLES[wildcards.sample].reference}.h5ad",
    output:
        cells="results/xenium/{sample}/cells.parquet",
        qc_png=report(
            "results/xenium/{sample}/cell_types.png",
            category="Data",
            caption="../report/cell_types.rst",
            labels={"sample": "{sample}", "what": "cell types"},
        ),
        qc_json="results/xenium/{sample}/cell_types.json",
        provenance="results/xenium/{sample}/cells.provenance.json",
    log:
        "results/logs/annotate_xenium/{sample}.log",
    benchmark:
        "results/benchmarks/annotate_xenium/{sample}.tsv"
    conda:
        "../../envs/spatial.yaml"
    threads: 2
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        settings=CONFIG.xenium.cell_types.to_dict(),
        seed=CONFIG.seed,
        given=lambda wildcards, input: annotation_names(wildcards.sample),
        code=code("annotate_xenium"),
    message:
        "Assigning cell types to the cells of {wildcards.sample}"
    script:
        "../../scripts/annotate_xenium.py"


rule extract_xenium:
    input:
        outs="results/raw/xenium/{sample}/outs",
        he="results/raw/xenium/{sample}/he_image.tif",
        registration="results/xenium/{sample}/registration.json",
        cells="results/xenium/{sample}/cells.parquet",
    output:
        store=directory("results/xenium/{sample}/{sample}.zarr"),
        summary_tsv="results/xenium/{sample}/patches.tsv",
        summary_html=report(
            "results/xenium/{sample}/patches.html",
            category="Data",
            caption="../report/xenium_patches.rst",
            labels={"sample": "{sample}", "what": "patches"},
        ),
    log:
        "results/logs/extract_xenium/{sample}.log",
    benchmark:
        "results/benchmarks/extract_xenium/{sample}.tsv"
    conda:
        "../../envs/spatial.yaml"
    threads: 4
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        settings=CONFIG.xenium.patches.to_dict(),
        patch_size=CONFIG.patch.size,
        mpp=CONFIG.patch.mpp,
        tissue=lambda wildcards: SAMPLES[wildcards.sample].tissue,
        group=lambda wildcards: SAMPLES[wildcards.sample].group,
        seed=CONFIG.seed,
        given=lambda wildcards, input: sample_names(wildcards.sample, "outs", "he"),
        code=code("extract_xenium"),
    message:
        "Cutting {wildcards.sample} into patches"
    script:
        "../../scripts/extract_xenium.py"


rule split_xenium:
    input:
        stores=sample_stores(),
    output:
        split="results/xenium/split.tsv",
        test=directory("results/xenium/test.zarr"),
        summary_tsv="results/xenium/split_summary.tsv",
        summary_html=report(
            "results/xenium/split_summary.html",
            category="Data",
            caption="../report/xenium_split.rst",
            labels={"sample": "all", "what": "split"},
        ),
    log:
        "results/logs/split_xenium.log",
    benchmark:
        "results/benchmarks/split_xenium.tsv"
    conda:
        "../../envs/data.yaml"
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        settings=CONFIG.xenium.split.to_dict(),
        seed=CONFIG.seed,
        code=code("split_xenium"),
    message:
        "Splitting the Xenium patches into training, validation and test"
    script:
        "../../scripts/split_xenium.py"


rule save_spatialdata:
    input:
        outs="results/raw/xenium/{sample}/outs",
        he="results/raw/xenium/{sample}/he_image.tif",
        registration="results/xenium/{sample}/registration.json",
        cells="results/xenium/{sample}/cells.parquet",
    output:
        directory("results/xenium/{sample}/spatialdata.zarr"),
    log:
        "results/logs/save_spatialdata/{sample}.log",
    benchmark:
        "results/benchmarks/save_spatialdata/{sample}.tsv"
    conda:
        "../../envs/spatial.yaml"
    threads: 4
    resources:
        mem_mb=16000,
        runtime=240,
    params:
        given=lambda wildcards, input: sample_names(wildcards.sample, "outs", "he"),
        code=code("save_spatialdata"),
    message:
        "Writing {wildcards.sample} as one SpatialData object"
    script:
        "../../scripts/save_spatialdata.py"


rule figure5a:
    input:
        stores=sample_stores(),
    output:
        png=report(
            "results/figures/figure5a.png",
            category="Figures",
            caption="../report/figure5a.rst",
            labels={"figure": "5a"},
        ),
        svg="results/figures/figure5a.svg",
        tsv="results/figures/figure5a.tsv",
    log:
        "results/logs/figure5a.log",
    benchmark:
        "results/benchmarks/figure5a.tsv"
    conda:
        "../../envs/report.yaml"
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        titles={
            sample: f"{sample} ({row.tissue})"
            for sample, row in {**SAMPLES, **STHELAR}.items()
        },
        code=code("figure5a"),
    message:
        "Drawing figure 5a"
    script:
        "../../scripts/figure5a.py"


if experiment_of("st") is not None:

    rule figure5b:
        input:
            predictions=f"results/predictions/{experiment_of('st')}/split1.parquet",
            store="results/xenium/test.zarr",
        output:
            png=report(
                "results/figures/figure5b.png",
                category="Figures",
                caption="../report/figure5b.rst",
                labels={"figure": "5b"},
            ),
            svg="results/figures/figure5b.svg",
            tsv="results/figures/figure5b.tsv",
        log:
            "results/logs/figure5b.log",
        benchmark:
            "results/benchmarks/figure5b.tsv"
        conda:
            "../../envs/report.yaml"
        resources:
            mem_mb=2000,
            runtime=10,
        params:
            nucleus_threshold=CONFIG.inference.nucleus_threshold,
            radius_um=CONFIG.evaluation.radius_um,
            title=f"{experiment_of('st')} on the Xenium test patches",
            code=code("figure5b"),
        message:
            "Drawing figure 5b"
        script:
            "../../scripts/figure5b.py"
