r"""Turn a checkpoint of another code into a model file of this one.

python scripts/import_checkpoint.py --source authors CHECKPOINT OUT --mode parallel --trained-on fold1 fold3 \
  --mpp 0.25 --patch-size 256
python scripts/import_checkpoint.py --source coco CHECKPOINT OUT --mode baseline --trained-on

Reads CHECKPOINT: of the CellDETR repository ({"model_state_dict": ...}), or of the Deformable DETR repository, trained
on COCO with a ResNet-50 and iterative box refinement ({"model": ...}). Writes OUT, a model file for the key `initial:`
of an experiment, and OUT.json: which tensor became which, which are not used and why, which are new and why.
"""

import argparse
import logging
import sys

from celldetr.config.pannuke import misspelt_folds
from celldetr.model.imports import import_checkpoint
from celldetr.model.weights import save_model
from celldetr.runtime.errors import CellDETRError, ConfigError
from celldetr.runtime.provenance import write_provenance

log = logging.getLogger("import_checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="file to read")
    parser.add_argument("out", help="model file to write")
    parser.add_argument("--source", choices=["authors", "coco"], required=True, help="code that wrote the checkpoint")
    parser.add_argument(
        "--mode", choices=["baseline", "sequential", "parallel"], required=True, help="mode of the model"
    )
    parser.add_argument(
        "--trained-on",
        nargs="*",
        required=True,
        help="folds of PanNuke (fold1 ...) and groups of slides and samples that it was trained or validated on",
    )
    parser.add_argument("--mpp", type=float, help="um per px of the patches that it was trained on")
    parser.add_argument("--patch-size", type=int, help="side of these patches, px")
    parser.add_argument("--classes", help="class names in the order of the logits, separated by commas")
    parser.add_argument(
        "--global-tokens", type=int, help="global tokens, parallel mode (default: as the code that wrote it)"
    )
    parser.add_argument("--heads", type=int, default=8, help="attention heads (default: 8)")
    args = parser.parse_args()
    if odd := misspelt_folds(args.trained_on):
        raise ConfigError(f"--trained-on: got {odd}, expected fold1, fold2, fold3 and groups of the sheets")
    imported = import_checkpoint(
        args.checkpoint,
        args.source,
        args.mode,
        classes=args.classes.split(",") if args.classes else None,
        global_tokens=args.global_tokens,
        heads=args.heads,
    )
    settings = imported.model.settings
    extra = {"source": args.source, "trained_on": args.trained_on, "mpp": args.mpp, "patch_size": args.patch_size}
    save_model(args.out, imported.model, settings, {name: value for name, value in extra.items() if value is not None})
    write_provenance(
        f"{args.out}.json",
        settings=settings.to_dict(),
        inputs=[args.checkpoint],
        used=imported.used,
        unused=imported.unused,
        fresh=imported.fresh,
    )
    log.info("%s: %d tensors used, %d not", args.checkpoint, len(imported.used), len(imported.unused))
    log.info("%s: model %s, classes %s; the list of tensors is beside it", args.out, settings.mode, settings.classes)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except CellDETRError as error:
        log.error("error: %s", error)
        sys.exit(1)
