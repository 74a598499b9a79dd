"""Predictions on the test folds, scores, tables, figures and learning curves."""

PUBLISHED = {name: own_file(table.published) for name, table in CONFIG.tables.items()}


rule predict:
    input:
        model=lambda wildcards: model_file(wildcards.experiment, wildcards.split),
        store=test_store,
    output:
        "results/predictions/{experiment}/split{split}.parquet",
    log:
        "results/logs/predict/{experiment}_split{split}.log",
    benchmark:
        "results/benchmarks/predict/{experiment}_split{split}.tsv"
    wildcard_constraints:
        experiment=one_of(OURS),
    conda:
        "../../envs/training.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=16000,
        runtime=120,
    params:
        nucleus_threshold=CONFIG.inference.nucleus_threshold,
        batch_size=CONFIG.inference.batch_size,
        precision=CONFIG.inference.precision,
        compile=CONFIG.inference.compile,
        embeddings=CONFIG.inference.embeddings,
        class_map=lambda wildcards: class_map(wildcards.experiment),
        trained_on=lambda wildcards: CONFIG.experiments[wildcards.experiment].trained_on,
        code=code("predict"),
    message:
        "Predicting the test patches of split {wildcards.split} with {wildcards.experiment}"
    script:
        "../../scripts/predict.py"


rule predict_segmentation:
    input:
        model=lambda wildcards: model_file(wildcards.experiment, wildcards.split),
        store=test_store,
    output:
        "results/predictions/{experiment}/split{split}.parquet",
    log:
        "results/logs/predict_segmentation/{experiment}_split{split}.log",
    benchmark:
        "results/benchmarks/predict_segmentation/{experiment}_split{split}.tsv"
    wildcard_constraints:
        experiment=one_of(OTHERS),
    conda:
        "../../envs/baselines.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=16000,
        runtime=120,
    params:
        # What fits in training fits here; the batches of inference.batch_size are for CellDETR.
        batch_size=lambda wildcards: gpu_batch(wildcards.experiment),
        precision=CONFIG.inference.precision,
        code=code("predict_segmentation"),
    message:
        "Segmenting the test patches of split {wildcards.split} with {wildcards.experiment}"
    script:
        "../../scripts/predict_segmentation.py"


rule score:
    input:
        predictions="results/predictions/{experiment}/split{split}.parquet",
        store=test_store,
        model=lambda wildcards: model_file(wildcards.experiment, wildcards.split),
    output:
        scores="results/scores/{experiment}/split{split}.tsv",
        panoptic="results/scores/{experiment}/split{split}_panoptic.tsv",
    log:
        "results/logs/score/{experiment}_split{split}.log",
    benchmark:
        "results/benchmarks/score/{experiment}_split{split}.tsv"
    conda:
        "../../envs/report.yaml"
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        scoring=CONFIG.scoring.to_dict(),
        centres=CONFIG.evaluation.centres,
        resamples=CONFIG.evaluation.resamples,
        seed=CONFIG.seed,
        code=code("score"),
    message:
        "Scoring {wildcards.experiment} on split {wildcards.split}"
    script:
        "../../scripts/score.py"


rule frozen_features:
    input:
        model=lambda wildcards: initial_model(wildcards.experiment, wildcards.split),
        stores=lambda wildcards: [
            fold_store(fold) for fold in folds_of(wildcards.split, "train")
        ],
        split="results/pannuke/split{split}.tsv",
        test=lambda wildcards: fold_store(folds_of(wildcards.split, "test")[0]),
    output:
        tsv="results/frozen_features/{experiment}/split{split}.tsv",
        provenance="results/frozen_features/{experiment}/split{split}.provenance.json",
    log:
        "results/logs/frozen_features/{experiment}_split{split}.log",
    benchmark:
        "results/benchmarks/frozen_features/{experiment}_split{split}.tsv"
    conda:
        "../../envs/training.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=16000,
        runtime=120,
    params:
        k=CONFIG.frozen_features.k,
        max_nuclei=CONFIG.frozen_features.max_nuclei,
        batch_size=CONFIG.inference.batch_size,
        compile=CONFIG.inference.compile,
        seed=CONFIG.seed,
        code=code("frozen_features"),
    message:
        "Classifying nuclei by the frozen embeddings of {wildcards.experiment} on split {wildcards.split}"
    script:
        "../../scripts/frozen_features.py"


rule learning_curves:
    input:
        log="results/models/{experiment}/split{split}/log.jsonl",
        provenance="results/models/{experiment}/split{split}/provenance.json",
    output:
        report(
            "results/models/{experiment}/split{split}/curves.png",
            category="Training",
            caption="../report/curves.rst",
            labels={"experiment": "{experiment}", "split": "{split}"},
        ),
    log:
        "results/logs/learning_curves/{experiment}_split{split}.log",
    benchmark:
        "results/benchmarks/learning_curves/{experiment}_split{split}.tsv"
    conda:
        "../../envs/report.yaml"
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        code=code("learning_curves"),
    message:
        "Drawing the learning curves of {wildcards.experiment} on split {wildcards.split}"
    script:
        "../../scripts/learning_curves.py"


rule table:
    input:
        scores=lambda wildcards: expand(
            "results/scores/{experiment}/split{split}.tsv",
            experiment=systems(wildcards.table),
            split=CONFIG.pannuke.splits,
        ),
        frozen_features=lambda wildcards: expand(
            "results/frozen_features/{experiment}/split{split}.tsv",
            experiment=CONFIG.tables[wildcards.table].frozen_features,
            split=CONFIG.pannuke.splits,
        ),
        published=lambda wildcards: PUBLISHED[wildcards.table],
    output:
        tsv="results/{table}.tsv",
        splits="results/{table}_splits.tsv",
        md="results/{table}.md",
        html=report(
            "results/{table}.html",
            category="Tables",
            caption="../report/table.rst",
            labels={"table": "{table}"},
        ),
        provenance="results/{table}.provenance.json",
    log:
        "results/logs/{table}.log",
    benchmark:
        "results/benchmarks/{table}.tsv"
    conda:
        "../../envs/report.yaml"
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        systems=lambda wildcards: [
            {
                "experiment": name,
                "title": CONFIG.experiments[name].title,
                "ours": name in CONFIG.tables[wildcards.table].ours,
                "others": name in CONFIG.tables[wildcards.table].others,
            }
            for name in systems(wildcards.table)
        ],
        splits=CONFIG.pannuke.splits,
        metric=CONFIG.evaluation.metric,
        protocol=CONFIG.pannuke.protocol,
        synthetic=CONFIG.example is not None,
        code=code("table"),
    message:
        "Writing {wildcards.table}"
    script:
        "../../scripts/table.py"


rule attention:
    input:
        model=lambda wildcards: model_file(wildcards.experiment, wildcards.split),
        store=test_store,
    output:
        points="results/attention/{experiment}/split{split}.npz",
        share="results/attention/{experiment}/split{split}.json",
    log:
        "results/logs/attention/{experiment}_split{split}.log",
    benchmark:
        "results/benchmarks/attention/{experiment}_split{split}.tsv"
    conda:
        "../../envs/training.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=16000,
        runtime=120,
    params:
        nuclei=CONFIG.figure3.nuclei if CONFIG.figure3 is not None else 4,
        nucleus_threshold=CONFIG.inference.nucleus_threshold,
        batch_size=CONFIG.inference.batch_size,
        precision=CONFIG.inference.precision,
        radius_um=CONFIG.evaluation.radius_um,
        seed=CONFIG.seed,
        code=code("attention"),
    message:
        "Measuring the attention of {wildcards.experiment} on split {wildcards.split}"
    script:
        "../../scripts/attention.py"


if CONFIG.figure3 is not None:

    rule figure3:
        input:
            points=expand(
                "results/attention/{experiment}/split{split}.npz",
                experiment=CONFIG.figure3.experiments,
                split=CONFIG.figure3.split,
            ),
            shares=expand(
                "results/attention/{experiment}/split{split}.json",
                experiment=CONFIG.figure3.experiments,
                split=CONFIG.figure3.split,
            ),
        output:
            png=report(
                "results/figures/figure3.png",
                category="Figures",
                caption="../report/figure3.rst",
                labels={"figure": "3"},
            ),
            svg="results/figures/figure3.svg",
        log:
            "results/logs/figure3.log",
        benchmark:
            "results/benchmarks/figure3.tsv"
        conda:
            "../../envs/report.yaml"
        resources:
            mem_mb=2000,
            runtime=10,
        params:
            titles=as_it_is(
                [CONFIG.experiments[name].title for name in CONFIG.figure3.experiments]
            ),
            code=code("figure3"),
        message:
            "Drawing figure 3"
        script:
            "../../scripts/figure3.py"


rule overlays:
    input:
        predictions="results/predictions/{experiment}/split{split}.parquet",
        store=test_store,
    output:
        report(
            "results/figures/overlays_{experiment}_split{split}.png",
            category="Figures",
            caption="../report/overlays.rst",
            labels={"experiment": "{experiment}", "split": "{split}"},
        ),
    log:
        "results/logs/overlays/{experiment}_split{split}.log",
    benchmark:
        "results/benchmarks/overlays/{experiment}_split{split}.tsv"
    conda:
        "../../envs/report.yaml"
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        patches=CONFIG.overlays.patches,
        seed=CONFIG.seed,
        code=code("overlays"),
    message:
        "Drawing predictions of {wildcards.experiment} beside the true nuclei"
    script:
        "../../scripts/overlays.py"
