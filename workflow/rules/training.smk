"""Initial weights and the training runs."""


rule download_imagenet:
    input:
        as_it_is(local_files(CONFIG.imagenet.urls)),
    output:
        "results/raw/weights/resnet50.pth",
    log:
        "results/logs/download_imagenet.log",
    benchmark:
        "results/benchmarks/download_imagenet.tsv"
    conda:
        "../../envs/data.yaml"
    resources:
        mem_mb=1000,
        runtime=60,
    params:
        source=CONFIG.imagenet.to_dict(),
    message:
        "Downloading the ImageNet weights of the backbone"
    script:
        "../../scripts/download.py"


rule download_weights:
    input:
        lambda wildcards: local_files(CONFIG.weights[wildcards.weights].urls),
    output:
        "results/raw/weights/{weights}.pth",
    log:
        "results/logs/download_weights/{weights}.log",
    benchmark:
        "results/benchmarks/download_weights/{weights}.tsv"
    conda:
        "../../envs/data.yaml"
    resources:
        mem_mb=1000,
        runtime=60,
    params:
        source=lambda wildcards: CONFIG.weights[wildcards.weights].to_dict(),
    message:
        "Downloading the weights {wildcards.weights}"
    script:
        "../../scripts/download.py"


rule train:
    input:
        stores=train_stores,
        split=split_file,
        backbone=lambda wildcards: initial_weights(wildcards, "backbone"),
        initial=lambda wildcards: initial_weights(wildcards, "model"),
    output:
        model="results/models/{experiment}/split{split}/model.pt",
        log="results/models/{experiment}/split{split}/log.jsonl",
        provenance="results/models/{experiment}/split{split}/provenance.json",
    log:
        "results/logs/train/{experiment}_split{split}.log",
    benchmark:
        "results/benchmarks/train/{experiment}_split{split}.tsv"
    wildcard_constraints:
        experiment=one_of(OURS),
    conda:
        "../../envs/training.yaml"
    threads: 8
    resources:
        gpu=lambda wildcards: CONFIG.experiment(wildcards.experiment).training.gpus,
        mem_mb=32000,
        runtime=2880,
        workers=lambda wildcards: CONFIG.experiment(
            wildcards.experiment
        ).training.workers,
    params:
        experiment=lambda wildcards: run_settings(wildcards.experiment),
        scoring=CONFIG.scoring.to_dict(),
        trained_on=lambda wildcards: CONFIG.experiments[wildcards.experiment].trained_on,
        code=code("train"),
    message:
        "Training {wildcards.experiment} on split {wildcards.split}"
    script:
        "../../scripts/train.py"


rule train_segmentation:
    input:
        stores=train_stores,
        split=split_file,
        backbone=lambda wildcards: initial_weights(wildcards, "backbone"),
        initial=[],
    output:
        model="results/models/{experiment}/split{split}/model.pt",
        log="results/models/{experiment}/split{split}/log.jsonl",
        provenance="results/models/{experiment}/split{split}/provenance.json",
    log:
        "results/logs/train_segmentation/{experiment}_split{split}.log",
    benchmark:
        "results/benchmarks/train_segmentation/{experiment}_split{split}.tsv"
    wildcard_constraints:
        experiment=one_of(OTHERS),
    conda:
        "../../envs/baselines.yaml"
    threads: 8
    resources:
        gpu=lambda wildcards: CONFIG.experiment(wildcards.experiment).training.gpus,
        mem_mb=32000,
        runtime=2880,
        workers=lambda wildcards: CONFIG.experiment(
            wildcards.experiment
        ).training.workers,
    params:
        experiment=lambda wildcards: run_settings(wildcards.experiment),
        scoring=CONFIG.scoring.to_dict(),
        trained_on=None,
        code=code("train_segmentation"),
    message:
        "Training {wildcards.experiment} on split {wildcards.split}"
    script:
        "../../scripts/train_segmentation.py"
