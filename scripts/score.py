"""Score the predictions of a test fold.

Input: ``predictions`` (Parquet of the predict rule), ``store`` (patch store of the same fold), ``model`` (the file that
made the predictions).
Output: ``scores`` (TSV, a row per metric and class: precision, recall, F1 with 95 % intervals, counts, panoptic
quality, settings), ``panoptic`` (TSV, a row per tissue and class: panoptic quality; the header alone if the predictions
or the store have no masks).
"""

import logging

from celldetr.config.evaluation import ScoringSettings
from celldetr.evaluation.panoptic import panoptic_quality, write_panoptic
from celldetr.evaluation.predictions import read_predictions
from celldetr.evaluation.scoring import score_fold, write_scores
from celldetr.runtime.errors import InputError
from celldetr.runtime.provenance import sha256
from celldetr.runtime.rule import run_rule
from celldetr.store import open_store
from celldetr.store.seen import refuse_seen_store

log = logging.getLogger("score")


def main(snakemake):
    params = snakemake.params
    store = open_store(snakemake.input.store)
    predictions = read_predictions(snakemake.input.predictions, patch_size=store.patch_size)
    expected = {
        "experiment": snakemake.wildcards.experiment,
        "split": int(snakemake.wildcards.split),
        "model_sha256": sha256(snakemake.input.model),
    }
    got = {key: predictions.metadata.get(key) for key in expected}
    if got != expected:
        raise InputError(
            f"{snakemake.input.predictions}: got predictions of {got}, expected {expected}; predict this split again"
        )
    refuse_seen_store(predictions.metadata["trained_on"], store, f"the model of {snakemake.input.predictions}")
    panoptic = panoptic_quality(predictions, store)
    scores = score_fold(
        predictions,
        store,
        ScoringSettings.from_dict(params.scoring),
        centres=params.centres,
        resamples=params.resamples,
        seed=params.seed,
        panoptic=panoptic,
    )
    origin = {"experiment": expected["experiment"], "split": expected["split"]}
    write_scores(snakemake.output.scores, scores, **origin, test_store=store.path.stem)
    write_panoptic(snakemake.output.panoptic, panoptic, **origin)
    found = scores[scores["class"] == "Detection"].set_index("metric")
    log.info("detection\n%s", found[["precision", "recall", "f1", "pq", "mpq", "n_truth", "n_predicted"]].to_string())


if "snakemake" in globals():
    run_rule(main, snakemake)
