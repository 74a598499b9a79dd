"""Sections of STHELAR, labelled patches of Xenium sections: download, and patch stores like those of Xenium samples."""

if CONFIG.example is not None and CONFIG.example.sthelar:

    rule make_example_sthelar:
        output:
            directory("example-input/sthelar"),
        log:
            "results/logs/make_example_sthelar.log",
        benchmark:
            "results/benchmarks/make_example_sthelar.tsv"
        conda:
            "../../envs/spatial.yaml"
        resources:
            mem_mb=2000,
            runtime=15,
        params:
            sections={name: list(size) for name, size in CONFIG.example.sthelar.items()},
            seed=CONFIG.example.seed,
            code=code("make_example_sthelar"),
        message:
            "Drawing the example's sections in the layout of STHELAR"
        script:
            "../../scripts/make_example_sthelar.py"


rule download_sthelar:
    input:
        lambda wildcards: (
            [CONFIG.xenium.sthelar.folder] if CONFIG.xenium.sthelar.folder else []
        ),
    output:
        section=directory("results/raw/sthelar/{sample}"),
    log:
        "results/logs/download_sthelar/{sample}.log",
    benchmark:
        "results/benchmarks/download_sthelar/{sample}.tsv"
    wildcard_constraints:
        sample=one_of(map(re.escape, STHELAR)),
    conda:
        "../../envs/data.yaml"
    resources:
        mem_mb=2000,
        runtime=480,
    params:
        source=as_it_is(
            {
                key: getattr(CONFIG.xenium.sthelar, key)
                for key in ("repository", "revision", "folder")
            }
        ),
        given=lambda wildcards, input: section_names(wildcards.sample),
    message:
        "Downloading the patches of {wildcards.sample} of STHELAR"
    script:
        "../../scripts/download_sthelar.py"


rule extract_sthelar:
    input:
        section="results/raw/sthelar/{sample}",
        types=lambda wildcards: own_file(CONFIG.xenium.sthelar.types),
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
        "results/logs/extract_sthelar/{sample}.log",
    benchmark:
        "results/benchmarks/extract_sthelar/{sample}.tsv"
    wildcard_constraints:
        sample=one_of(map(re.escape, STHELAR)),
    retries: 0  # what it refuses once, it refuses again; it needs little memory
    conda:
        "../../envs/spatial.yaml"
    threads: 4
    resources:
        mem_mb=4000,
        runtime=120,
    params:
        settings={key: getattr(CONFIG.xenium.patches, key) for key in PATCH_KEYS},
        limits={
            "Dice": CONFIG.xenium.sthelar.min_dice,
            "Jaccard": CONFIG.xenium.sthelar.min_jaccard,
            "bPQ": CONFIG.xenium.sthelar.min_bpq,
        },
        patch_size=CONFIG.patch.size,
        mpp=CONFIG.patch.mpp,
        source_mpp=lambda wildcards: STHELAR[wildcards.sample].mpp,
        tissue=lambda wildcards: STHELAR[wildcards.sample].tissue,
        group=lambda wildcards: STHELAR[wildcards.sample].group,
        seed=CONFIG.seed,
        given=lambda wildcards, input: section_names(wildcards.sample),
        code=code("extract_sthelar"),
    message:
        "Making patches of {wildcards.sample} of STHELAR"
    script:
        "../../scripts/extract_sthelar.py"
