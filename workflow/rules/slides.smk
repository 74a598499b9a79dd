"""Whole slides without cell types: downloads, nuclei, patches, the choice among them, figure 4."""

if CONFIG.example is not None:

    rule make_example_slide:
        output:
            slide="example-input/slides/{slide}.tif",
            nuclei="example-input/slides/{slide}.parquet",
            cells="example-input/slides/{slide}_cells.parquet",
        log:
            "results/logs/make_example_slide/{slide}.log",
        benchmark:
            "results/benchmarks/make_example_slide/{slide}.tsv"
        conda:
            "../../envs/spatial.yaml"
        resources:
            mem_mb=2000,
            runtime=15,
        params:
            size_um=lambda wildcards: list(CONFIG.example.slides[wildcards.slide]),
            number=lambda wildcards: list(CONFIG.example.slides).index(wildcards.slide),
            mpp=0.8 * CONFIG.patch.mpp,
            seed=CONFIG.example.seed,
            code=code("make_example_slide"),
        message:
            "Drawing the example's slide {wildcards.slide}"
        script:
            "../../scripts/make_example_slide.py"


rule download_slide:
    input:
        lambda wildcards: local_files(SLIDES[wildcards.slide].file),
    output:
        file="results/raw/slides/{slide}.tif",
    log:
        "results/logs/download_slide/{slide}.log",
    benchmark:
        "results/benchmarks/download_slide/{slide}.tsv"
    conda:
        "../../envs/data.yaml"
    resources:
        mem_mb=1000,
        runtime=480,
    params:
        source=lambda wildcards: slide_source(wildcards),
        given=lambda wildcards, input: slide_names(wildcards.slide),
    message:
        "Downloading the slide {wildcards.slide}"
    script:
        "../../scripts/download_slide.py"


rule download_slide_nuclei:
    input:
        lambda wildcards: local_files(outline_sources(wildcards)),
    output:
        nuclei="results/raw/slides/{slide}_nuclei",
    log:
        "results/logs/download_slide_nuclei/{slide}.log",
    benchmark:
        "results/benchmarks/download_slide_nuclei/{slide}.tsv"
    conda:
        "../../envs/data.yaml"
    resources:
        mem_mb=1000,
        runtime=120,
    params:
        source=lambda wildcards: {
            "urls": outline_sources(wildcards),
            "hest": "" if outline_sources(wildcards) else SLIDES[wildcards.slide].hest,
            "sha256": SLIDES[wildcards.slide].nuclei_sha256,
        },
        given=lambda wildcards, input: slide_names(wildcards.slide),
    message:
        "Downloading the outlines of the nuclei of {wildcards.slide}"
    script:
        "../../scripts/download_slide_nuclei.py"


rule detect_slide:
    input:
        file="results/raw/slides/{slide}.tif",
        model=as_it_is(
            initial_model(CONFIG.slides.detection.model, str(CONFIG.pannuke.splits[0]))
        ),
    output:
        "results/slides/{slide}/detected.parquet",
    log:
        "results/logs/detect_slide/{slide}.log",
    benchmark:
        "results/benchmarks/detect_slide/{slide}.tsv"
    conda:
        "../../envs/cells.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=16000,
        runtime=240,
    params:
        settings=CONFIG.slides.detection.to_dict(),
        on_damage=CONFIG.slides.on_damage,
        patch_size=CONFIG.patch.size,
        mpp=CONFIG.patch.mpp,
        slide_mpp=lambda wildcards: SLIDES[wildcards.slide].mpp,
        nucleus_threshold=CONFIG.inference.nucleus_threshold,
        precision=CONFIG.inference.precision,
        compile=CONFIG.inference.compile,
        given=lambda wildcards, input: slide_names(wildcards.slide),
        code=code("detect_slide"),
    message:
        "Detecting the nuclei of {wildcards.slide}"
    script:
        "../../scripts/detect_slide.py"


rule extract_slide:
    input:
        file="results/raw/slides/{slide}.tif",
        nuclei=slide_nuclei,
    output:
        store=directory("results/slides/{slide}/{slide}.zarr"),
        picture=report(
            "results/slides/{slide}/patches.png",
            category="Data",
            caption="../report/slide_patches.rst",
            labels={"sample": "{slide}", "what": "patches"},
        ),
        summary_tsv="results/slides/{slide}/patches.tsv",
        summary_html="results/slides/{slide}/patches.html",
    log:
        "results/logs/extract_slide/{slide}.log",
    benchmark:
        "results/benchmarks/extract_slide/{slide}.tsv"
    conda:
        "../../envs/spatial.yaml"
    threads: 4
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        settings=CONFIG.slides.patches.to_dict(),
        on_damage=CONFIG.slides.on_damage,
        patch_size=CONFIG.patch.size,
        mpp=CONFIG.patch.mpp,
        slide_mpp=lambda wildcards: SLIDES[wildcards.slide].mpp,
        unit=lambda wildcards: SLIDES[wildcards.slide].nuclei_unit,
        cell_outlines=lambda wildcards: SLIDES[wildcards.slide].cell_outlines,
        # what our model finds is in the coordinates of the slide
        check_outlines=lambda wildcards: (
            SLIDES[wildcards.slide].check_outlines
            and not SLIDES[wildcards.slide].detect
        ),
        tissue=lambda wildcards: SLIDES[wildcards.slide].tissue,
        group=lambda wildcards: SLIDES[wildcards.slide].group,
        seed=CONFIG.seed,
        given=lambda wildcards, input: slide_names(wildcards.slide),
        code=code("extract_slide"),
    message:
        "Cutting {wildcards.slide} into patches"
    script:
        "../../scripts/extract_slide.py"


rule choose_slide_patches:
    input:
        stores=[slide_store(slide) for slide in SLIDES],
    output:
        split="results/slides/split.tsv",
        summary="results/slides/summary.tsv",
    log:
        "results/logs/choose_slide_patches.log",
    benchmark:
        "results/benchmarks/choose_slide_patches.tsv"
    conda:
        "../../envs/data.yaml"
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        slides=[{"tissue": row.tissue, "group": row.group} for row in SLIDES.values()],
        total=CONFIG.slides.total,
        val_share=CONFIG.slides.val_share,
        seed=CONFIG.seed,
        code=code("choose_slide_patches"),
    message:
        "Choosing the patches for pretraining"
    script:
        "../../scripts/choose_slide_patches.py"


if experiment_of("ssl") is not None:

    rule similarity:
        input:
            model=f"results/models/{experiment_of('ssl')}/split1/model.pt",
            store=fold_store(folds_of(str(CONFIG.pannuke.splits[0]), "test")[0]),
        output:
            matrices="results/similarity/matrices.npz",
            retrieval="results/similarity/retrieval.json",
        log:
            "results/logs/similarity.log",
        benchmark:
            "results/benchmarks/similarity.tsv"
        conda:
            "../../envs/training.yaml"
        threads: 4
        resources:
            gpu=1,
            mem_mb=16000,
            runtime=120,
        params:
            patches=CONFIG.figure4.patches,
            noise=CONFIG.experiment(experiment_of("ssl")).training.noise.to_dict(),
            batch_size=CONFIG.inference.batch_size,
            seed=CONFIG.seed,
            code=code("similarity"),
        message:
            "Measuring how well noised boxes retrieve their nuclei"
        script:
            "../../scripts/similarity.py"

    rule figure4b:
        input:
            log=f"results/models/{experiment_of('ssl')}/split1/log.jsonl",
        output:
            png=report(
                "results/figures/figure4b.png",
                category="Figures",
                caption="../report/figure4b.rst",
                labels={"figure": "4b"},
            ),
            svg="results/figures/figure4b.svg",
        log:
            "results/logs/figure4b.log",
        benchmark:
            "results/benchmarks/figure4b.tsv"
        conda:
            "../../envs/report.yaml"
        resources:
            mem_mb=1000,
            runtime=10,
        params:
            title=as_it_is(CONFIG.experiments[experiment_of("ssl")].title),
            code=code("figure4b"),
        message:
            "Drawing figure 4b"
        script:
            "../../scripts/figure4b.py"

    rule figure4c:
        input:
            matrices="results/similarity/matrices.npz",
            retrieval="results/similarity/retrieval.json",
            log=f"results/models/{experiment_of('ssl')}/split1/log.jsonl",
        output:
            png=report(
                "results/figures/figure4c.png",
                category="Figures",
                caption="../report/figure4c.rst",
                labels={"figure": "4c"},
            ),
            svg="results/figures/figure4c.svg",
        log:
            "results/logs/figure4c.log",
        benchmark:
            "results/benchmarks/figure4c.tsv"
        conda:
            "../../envs/report.yaml"
        resources:
            mem_mb=1000,
            runtime=10,
        params:
            title=as_it_is(CONFIG.experiments[experiment_of("ssl")].title),
            code=code("figure4c"),
        message:
            "Drawing figure 4c"
        script:
            "../../scripts/figure4c.py"
