"""The Slurm profile without a cluster: it has each rule, each retry gets more, and it names no site."""

import re

import yaml
from programs import ROOT, RULES

PROFILE = ROOT / "workflow" / "profiles" / "slurm" / "config.yaml"
SITE = ("slurm_account", "slurm_partition", "gpu_model")


ONCE = {rule for rule, block in RULES.items() if re.search(r"^ +retries: 0\b", block, re.M)}


def asked_by_rules():
    """Memory (MB) and time (minutes) that stand in the rules, by rule and resource; none for a rule without."""
    return {name: dict(re.findall(r"^ +(mem_mb|runtime)=(\d+),", block, re.M)) for name, block in RULES.items()}


def test_each_attempt_of_each_rule_gets_more_than_the_one_before():
    """But for the time of a training run, which continues, and rules that have one attempt."""
    profile = yaml.safe_load(PROFILE.read_text(encoding="utf-8"))
    rules = {rule: asked for rule, asked in asked_by_rules().items() if asked}
    assert len(rules) > 30
    assert set(profile["set-resources"]) == set(rules)
    for rule, asked in rules.items():
        wanted = {name: int(amt) if rule in ONCE else f"attempt * {amt}" for name, amt in asked.items()}
        if rule in ("train", "train_segmentation"):
            wanted["runtime"] = int(asked["runtime"])
        given = profile["set-resources"][rule]
        assert {name: given.get(name) for name in ("mem_mb", "runtime")} == wanted, rule
    assert all(str(amount).startswith("attempt * ") for amount in profile["default-resources"].values())
    assert {line.split("=")[0] for line in profile["groups"]} <= set(rules) | set(asked_by_rules())


def test_a_refusal_is_not_repeated_and_a_lost_node_is():
    """A group of rules is submitted again if one of them may be, and `retries` of a rule goes before the profile's."""
    profile = yaml.safe_load(PROFILE.read_text(encoding="utf-8"))
    assert profile["retries"] > 0
    assert {"register_xenium", "extract_sthelar"} == ONCE
    assert not ONCE & {line.split("=")[0] for line in profile["groups"]}
    assert profile["slurm-requeue"]


def test_entries_are_explained_and_name_no_site():
    text = PROFILE.read_text(encoding="utf-8")
    assert not any(re.search(rf"^\s*{name}", text, re.M) for name in SITE)
    assert all(f"# {name}: " in text for name in SITE)
    for line in re.findall(r"^[a-z-]+: \S.*", text, re.M):
        assert " # " in line or line.startswith("executor"), f"{line} is not explained"
