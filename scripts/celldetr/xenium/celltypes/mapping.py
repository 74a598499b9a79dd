"""Mapping of a reference's labels to the ten types: reading, and labels whose name or genes speak for another type."""

import csv
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from celldetr.config.classes import ST_TYPES
from celldetr.runtime.errors import ConfigError, InputError

log = logging.getLogger(__name__)

LEFT_OUT = "-"
"""In a mapping, instead of a type: leave the cells of this label out."""
CANONICAL_MARKERS: Mapping[str, tuple[str, ...]] = {
    "T": ("CD3D", "CD3E", "CD3G", "TRAC", "CD2", "CD5", "IL7R", "BCL11B", "CD6", "LCK"),
    "Myeloid": ("CD68", "CD163", "LYZ", "CD14", "FCGR3A", "MARCO", "C1QA", "C1QB", "CSF1R", "ITGAX", "MRC1", "FCER1G"),
    "NK": ("NKG7", "GNLY", "KLRD1", "KLRF1", "NCAM1", "PRF1", "KLRC1", "XCL1"),
    "Mast": ("KIT", "TPSAB1", "TPSB2", "CPA3", "MS4A2", "HPGDS", "GATA2", "HDC"),
    "Fibroblast": ("COL1A1", "COL1A2", "DCN", "LUM", "PDGFRA", "PDGFRB", "FBLN1", "COL3A1", "ACTA2", "MFAP5", "FAP"),
    "Epithelial": ("EPCAM", "KRT7", "KRT8", "KRT18", "KRT19", "CDH1"),
    "Endothelial": ("PECAM1", "VWF", "CDH5", "CLDN5", "KDR", "ENG", "CLEC14A", "EMCN", "RAMP2", "PLVAP"),
    "B": ("MS4A1", "CD19", "BANK1", "CD79A", "CD22", "PAX5", "TCL1A", "FCRL1"),
    "Plasma": ("MZB1", "JCHAIN", "IGHG1", "XBP1", "DERL3", "TNFRSF17", "PRDM1", "SDC1", "IGKC"),
}
"""Genes that tell a type from the others in any tissue; malignant cells have none, carcinomas those of epithelium."""

_NAMES: Sequence[tuple[str, tuple[str, ...]]] = (
    (
        r"\bt ?(cell|lymphocyte|helper|follicular)|^t( naive| memory| effector| prolif|$)|\bt ?reg|\bth\d|\bmait\b",
        ("T",),
    ),
    (r"\bcd[48](?!\d)( positive| alpha beta)*( ?t\b| ?t?(cm|em|emra|ex)\b| naive| memory| effector| ctl|$)", ("T",)),
    (r"\b(naive|memory|effector|cycling) t\b|\b(tfh|gdt)\b|\bgamma delta t\b|thymocyte|\bnkt", ("T",)),
    (r"\bnk(t|s|cells?)?\b|natural killer", ("NK",)),
    (r"\bb ?(cell|lymphocyte)|^b( naive| memory| intermediate|$)|\b(naive|memory|gc) b\b", ("B",)),
    (r"\bplasma(s|cells?)?\b|\bplasmocyte", ("Plasma",)),
    (r"plasmablast", ("Plasma", "B")),
    (r"\bmast(s|cells?|ocytes?)?\b", ("Mast",)),
    (r"\bmyeloid|macrophage|monocyt|\bmono\b|neutrophil|microglia", ("Myeloid",)),
    (r"(?<!follicular )\b(dendritic|c?dcs?\d?\b)", ("Myeloid",)),
    (r"granulocyte|basophil", ("Myeloid", "Mast")),
    (r"fibroblast|\w*ca(f|fs)\b", ("Fibroblast",)),
    (r"\bendotheli", ("Endothelial",)),
    (
        r"\bepitheli(al|um)|keratinocyt|pneumocyt|enterocyt|hepatocyt|cholangiocyt|\bciliated",
        ("Epithelial", "Malignant"),
    ),
)
"""Words of a label, in lower case with blanks for other signs, and the types that they may mean."""
_ALLOWED: Sequence[tuple[str, tuple[str, ...]]] = (
    (r"\bt\b|\bcd[48](?!\d)", ("T",)),
    (r"\bb\b", ("B",)),
    (r"\b(p|mo)dcs?\b", ("Myeloid",)),
    (r"\bilc", ("NK",)),
    (r"strom|mesenchym|mural|pericyt|smooth muscle|\bsmcs?\b|mesotheli", ("Fibroblast", "Endothelial")),
    (r"mesotheli", ("Epithelial",)),
)
"""Words that allow a type beside those that others name, and name none: "T/NK", "plasma/B", "mural/endothelial"."""
_TUMOUR = (
    r"malignan(t|cy)|tumou?rs?|cancers?|\w*carcinomas?|neoplas(m|tic)|glioblast\w*"
    r"|\w*(lymphoma|leuka?emi[ac]|melanoma|glioma|sarcoma|myeloma)s?"
)
_PLAIN = re.compile(rf"\b({_TUMOUR}|cells?|\w?\d+)\b")
"""What may stand in a label of malignant cells; with any other word it may mean what else lies in a tumour."""
_NOT = re.compile(
    rf"\b(non|not|pre) \w+|\b(?!nk)\w+ like\b|\b(non|pre)({_TUMOUR}|cancerous)\b|\b[bt] cell zone\b"
    rf"|\b({_TUMOUR}) (associated|adjacent|infiltrating)\b|\badjacent to ({_TUMOUR})\b"
)
"""Words that name what a label is not."""
_HEALTHY = re.compile(rf"\b(normal|healthy|benign)\b|\bnon ?({_TUMOUR})\b")
_PROGENITORS = re.compile(
    r"progenitor|precursor|\bprog\b|\bstem\b|\bhsp?cs?\b|\bcd34\b|erythro|\beryth|\b[bc]fu\b|colony|\bpre mast"
    r"|\b(cmp|gmp|mep|emp|mpp|lmpp|clp|mdp|memp|mkp|baeoma)s?\b"
)
"""Words of labels that genes do not judge: progenitors have the markers of several types (of mast cells, above all)."""

_FLOOR = 1e-5  # of a label's transcripts; damps the folds of rare genes
_MOST = 5.0  # largest fold of one gene that counts, log2
_BASE = 0.25  # quantile of the labels from which folds are measured: most labels lack the markers of a type
_FEWEST_GENES, _FEWEST_CELLS = 4, 20  # of a type, and of a label, to be judged by markers
# Mean fold of the markers of another type, and how far it exceeds that of the own type, log2. In eight sets of real
# labels (blood, marrow, pancreas, tumours, mouse) no right label is told, and each swap of two types whose markers are
# there is, from 250,000 transcripts a label on
_FOLD, _MORE = 2.5, 2.5
_GENES_SHOWN = 4


@dataclass(frozen=True)
class Doubt:
    """A label whose name or genes speak for another type than that of the mapping."""

    label: str
    type: str
    named: tuple[str, ...]  # types that its name means; empty if it speaks for none or for the type of the mapping
    marked: str = ""  # type whose markers its cells have
    high: float = 1.0  # mean fold of these markers against most labels
    low: float = 1.0  # of the markers of the type of the mapping
    genes: tuple[str, ...] = ()  # markers that its cells have most

    def text(self) -> str:
        """Say what speaks against the mapping."""
        reasons = [f"its name means {' or '.join(self.named)}"] if self.named else []
        if self.marked:
            reasons.append(
                f"its cells have the markers of {self.marked} ({', '.join(self.genes)}) {self.high:.0f} times as much "
                f"as most labels, those of {self.type} {self.low:.1f} times"
            )
        return f"the label {self.label!r} is mapped to {self.type}, but {', and '.join(reasons)}"


def read_mapping(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a mapping: TSV with the columns ``label`` and ``type`` (one of the ten, or "-" to leave the cells out).

    Lines that begin with # are comments. Raises ConfigError if there is no such file, other columns, duplicate labels
    or unknown types; it names the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        numbered = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line and line[0] != "#"]
        rows = list(csv.reader([line for _, line in numbered], delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a table (TSV) of labels and types") from error
    if not rows or rows[0] != ["label", "type"]:
        raise ConfigError(f"{path}: got the columns {rows[0] if rows else []}, expected label and type, tab-separated")
    mapping: dict[str, str] = {}
    for (number, _), row in zip(numbered[1:], rows[1:], strict=True):
        where = f"{path}, line {number}"
        if len(row) != 2 or not row[0]:
            raise ConfigError(f"{where}: got {row}, expected a label and a type, tab-separated")
        label, kind = row[0], row[1].strip()
        if label in mapping:
            raise ConfigError(f"{where}: got the label {label!r} a second time, expected each once")
        if kind not in (*ST_TYPES, LEFT_OUT):
            raise ConfigError(f"{where}: got the type {kind!r}, expected one of {', '.join(ST_TYPES)}, or {LEFT_OUT}")
        mapping[label] = kind
    return mapping


def check_mapping(reference: AnnData, mapping: Mapping[str, str], file: str | os.PathLike[str]) -> list[str]:
    """Tell the labels of a reference whose name or genes speak for another type; returns the warnings.

    `reference` holds raw counts, obs["label"], and gene symbols; `file` is what `mapping` was read from. Labels of
    malignant cells are judged by name alone: their genes are those of any tissue. Raises InputError if the names say
    that types are swapped: no grouping of labels by intent does that.
    """
    doubts = list(_doubts(reference, mapping))
    circles = _in_circles(doubts)
    swapped = [doubt for doubt in doubts if doubt.type in circles and circles.intersection(doubt.named)]
    if swapped:
        raise InputError(
            f"{file}: got swapped types: {'; '.join(doubt.text() for doubt in swapped)}; expected the type that each "
            f"label means: correct these rows ({LEFT_OUT!r} leaves the cells of a label out)"
        )
    remedy = f"correct its row ({LEFT_OUT!r} leaves its cells out) unless you mean it"
    texts = [f"{file}: {doubt.text()}: {remedy}" for doubt in doubts]
    for text in texts:
        log.warning("warning: %s", text)
    return texts


def _doubts(reference: AnnData, mapping: Mapping[str, str]) -> Iterator[Doubt]:
    """Labels of the reference of which something speaks against their type."""
    labels, numbers, folds = _folds(reference)
    means = {kind: values.mean(axis=1) for kind, (_, values) in folds.items()}
    for row, (label, number) in enumerate(zip(labels, numbers, strict=True)):
        kind = mapping[label]
        named = types_named(label)
        doubt = Doubt(label, kind, () if kind in named else named)
        one = kind not in named or len({*named} - {"Malignant"}) <= 1  # else the name allows several types
        judged = one and kind in means and number >= _FEWEST_CELLS and not _PROGENITORS.search(_words(label))
        own = means[kind][row] if judged else np.inf
        other = max(means, key=lambda name: means[name][row], default="")
        if other and means[other][row] >= max(_FOLD, own + _MORE):
            genes, values = folds[other]
            most = tuple(genes[place] for place in np.argsort(-values[row], kind="stable")[:_GENES_SHOWN])
            high, low = (float(2**value) for value in (means[other][row], own))
            doubt = replace(doubt, marked=other, high=high, low=low, genes=most)
        if doubt.named or doubt.marked:
            yield doubt


def types_named(label: str) -> tuple[str, ...]:
    """Types of the ten that the words of a label mean, in the order of `ST_TYPES`; empty if they mean none."""
    all_words = _words(label)
    words = _NOT.sub(" ", all_words)
    found, tumour = _meant(words, _NAMES), bool(re.search(rf"\b({_TUMOUR})\b", words))
    if found:
        found |= _meant(words, _ALLOWED) | ({"Malignant"} if tumour else set())
    elif tumour and not _PLAIN.sub("", words).strip():
        found = {"Malignant"}
    if _HEALTHY.search(all_words):
        found.discard("Malignant")
    return tuple(kind for kind in ST_TYPES if kind in found)


def _words(label: str) -> str:
    """Write a label in lower case, with blanks for all but letters and digits."""
    return re.sub(r"[^a-z0-9]+", " ", label.lower()).strip()


def _meant(words: str, patterns: Sequence[tuple[str, tuple[str, ...]]]) -> set[str]:
    return {kind for pattern, kinds in patterns if re.search(pattern, words) for kind in kinds}


def _folds(reference: AnnData) -> tuple[list[str], list[int], dict[str, tuple[list[str], NDArray[np.float64]]]]:
    """Labels (L), their cells, and of each type with enough of its markers: these (G), and log2 folds (L, G).

    Folds are those against most labels; where these have no transcripts of a gene, against one, as more may be chance.
    Symbols are compared without case: those of mouse genes differ by it.
    """
    labels, code, numbers = np.unique(reference.obs["label"].astype(str), return_inverse=True, return_counts=True)
    groups = sparse.csr_matrix((np.ones(len(code)), (code, np.arange(len(code)))))
    total = np.asarray(groups @ reference.X.sum(axis=1)).reshape(-1, 1)
    place = {str(name).upper(): column for column, name in enumerate(reference.var_names)}
    folds = {}
    for kind, markers in CANONICAL_MARKERS.items():
        genes = [gene for gene in markers if gene in place]
        if len(genes) >= _FEWEST_GENES:
            counts = (groups @ reference.X[:, [place[gene] for gene in genes]]).toarray()
            level, base = (np.log2((counts + one) / np.maximum(total, 1) + _FLOOR) for one in (0, 1))
            folds[kind] = genes, np.clip(level - np.quantile(base, _BASE, axis=0), -_MOST, _MOST)
    return labels.tolist(), numbers.tolist(), folds


def _in_circles(doubts: Sequence[Doubt]) -> set[str]:
    """Types in a circle of what labels are mapped to and what their names mean: B to Mast to B."""
    edges = [(doubt.type, kind) for doubt in doubts for kind in doubt.named]
    left = {kind for edge in edges for kind in edge}
    while True:
        inner = [edge for edge in edges if left.issuperset(edge)]
        kept = {start for start, _ in inner} & {end for _, end in inner}
        if kept == left:
            return left
        left = kept
