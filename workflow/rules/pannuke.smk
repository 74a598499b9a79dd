"""PanNuke: archives, patch stores, splits."""

if CONFIG.example is not None:

    rule make_example:
        output:
            [local_files(CONFIG.pannuke.fold(fold).urls)[0] for fold in FOLDS],
        log:
            "results/logs/make_example.log",
        benchmark:
            "results/benchmarks/make_example.tsv"
        conda:
            "../../envs/spatial.yaml"
        threads: 2
        resources:
            mem_mb=2000,
            runtime=15,
        params:
            images=CONFIG.example.images,
            seed=CONFIG.example.seed,
            patch_size=CONFIG.patch.size,
            mpp=CONFIG.patch.mpp,
            code=code("make_example"),
        message:
            "Drawing the example's tissue and writing it as PanNuke archives"
        script:
            "../../scripts/make_example.py"


rule download_pannuke:
    input:
        lambda wildcards: local_files(CONFIG.pannuke.fold(int(wildcards.fold)).urls),
    output:
        "results/raw/pannuke/fold_{fold}.zip",
    log:
        "results/logs/download_pannuke/fold{fold}.log",
    benchmark:
        "results/benchmarks/download_pannuke/fold{fold}.tsv"
    conda:
        "../../envs/data.yaml"
    resources:
        mem_mb=1000,
        runtime=240,
    params:
        source=lambda wildcards: CONFIG.pannuke.fold(int(wildcards.fold)).to_dict(),
    message:
        "Downloading the archive of PanNuke fold {wildcards.fold}"
    script:
        "../../scripts/download.py"


rule convert_pannuke:
    input:
        archive="results/raw/pannuke/fold_{fold}.zip",
    output:
        store=directory("results/pannuke/fold{fold}.zarr"),
        summary_tsv="results/pannuke/fold{fold}_summary.tsv",
        summary_html=report(
            "results/pannuke/fold{fold}_summary.html",
            category="Data",
            caption="../report/pannuke_fold.rst",
            labels={"fold": "{fold}", "what": "conversion summary"},
        ),
    log:
        "results/logs/convert_pannuke/fold{fold}.log",
    benchmark:
        "results/benchmarks/convert_pannuke/fold{fold}.tsv"
    conda:
        "../../envs/data.yaml"
    threads: 2
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        fold=lambda wildcards: int(wildcards.fold),
        patch_size=CONFIG.patch.size,
        mpp=CONFIG.patch.mpp,
        code=code("convert_pannuke"),
    message:
        "Converting PanNuke fold {wildcards.fold} to a patch store"
    script:
        "../../scripts/convert_pannuke.py"


rule split_pannuke:
    input:
        stores=[fold_store(fold) for fold in FOLDS],
    output:
        "results/pannuke/split{split}.tsv",
    log:
        "results/logs/split_pannuke/split{split}.log",
    benchmark:
        "results/benchmarks/split_pannuke/split{split}.tsv"
    conda:
        "../../envs/data.yaml"
    params:
        split=lambda wildcards: int(wildcards.split),
        protocol=CONFIG.pannuke.protocol,
        train_share=CONFIG.pannuke.train_share,
        seed=CONFIG.seed,
        code=code("split_pannuke"),
    message:
        "Splitting the PanNuke patches into training, validation and test, split {wildcards.split}"
    script:
        "../../scripts/split_pannuke.py"
