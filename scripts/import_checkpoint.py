"""Turn a checkpoint of another code into a model file of this one.

python scripts/import_checkpoint.py --source authors CHECKPOINT OUT --mode parallel
python scripts/import_checkpoint.py --source coco CHECKPOINT OUT --mode baseline

Reads CHECKPOINT: of the CellDETR repository ({"model_state_dict": ...}), or of the Deformable DETR repository, trained
on COCO with a ResNet-50 and iterative box refinement ({"model": ...}). Writes OUT, a model file that `initial:` of an
experiment may name, and OUT.json: which tensor became which, which were not used and why, which start afresh and why.
"""

import argparse
import logging
import sys

from celldetr.model.imports import import_checkpoint
from celldetr.model.weights import save_model
from celldetr.runtime.errors import CellDETRError
from celldetr.runtime.provenance import write_provenance

log = logging.getLogger("import_checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="file to read")
    parser.add_argument("out", help="model file to write")
    parser.add_argument("--source", choices=["authors", "coco"], required=True, help="whose checkpoint it is")
    parser.add_argument(
        "--mode", choices=["baseline", "sequential", "parallel"], required=True, help="mode of the model"
    )
    parser.add_argument("--classes", help="class names in the order of the logits, with commas between them")
    parser.add_argument("--global-tokens", type=int, help="context tokens, parallel mode (default: authors 50, coco 0)")
    parser.add_argument("--heads", type=int, default=8, help="attention heads (default: 8)")
    told = parser.parse_args()
    imported = import_checkpoint(
        told.checkpoint,
        told.source,
        told.mode,
        classes=told.classes.split(",") if told.classes else None,
        global_tokens=told.global_tokens,
        heads=told.heads,
    )
    settings = imported.model.settings
    save_model(told.out, imported.model, settings, {"source": told.source})
    write_provenance(
        f"{told.out}.json",
        settings=settings.to_dict(),
        inputs=[told.checkpoint],
        used=imported.used,
        unused=imported.unused,
        fresh=imported.fresh,
    )
    log.info("%s: %d tensors used, %d not", told.checkpoint, len(imported.used), len(imported.unused))
    log.info("%s: model %s, classes %s; the list of tensors is beside it", told.out, settings.mode, settings.classes)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except CellDETRError as error:
        log.error("error: %s", error)
        sys.exit(1)
