"""Sections of the results page: the insertion methods against each other."""

from __future__ import annotations

import json
from argparse import Namespace

import comparison

from inlay_bench import report
from inlay_bench.report import Summary
from inlay_config import config
from inlay_config.images import save

MAIN = ("addit", "addit_sd", "p2p", "sdedit", "flow_edit", "elsewhere", "twin")
RIVALS = ("p2p", "sdedit", "flow_edit", "addit_sd", "copy")
VARIANTS = ("addit", "addit_paste", "t2i")
ADDITING = ("addit", "t2i")
SHOWN = ("inclusion", "affordance", "affordance_all", "contact", "psnr", "ssim", "lpips")
COMPARED = ("inclusion", "affordance_all", "psnr", "clip_direction", "clip_out")
SHEET = {
    "input": "input",
    "Add-it": "addit",
    "Add-it, SD": "addit_sd",
    "P2P": "p2p",
    "SDEdit": "sdedit",
    "FlowEdit": "flow_edit",
}


def affordance(args: Namespace) -> str:
    """Insertion into rendered scenes, whose every right place is known."""
    summary = comparison.evaluate("toybox-affordance", MAIN, args.items)
    save(comparison.sheet(summary, SHEET), comparison.OUT / "insertion.png")
    lines = [*tables(summary), "", "*Add-it less the others, item by item*", ""]
    return "\n".join([*lines, *comparison.differences(summary, "addit", RIVALS, COMPARED)])


def variants(args: Namespace) -> str:
    """Add-it with more around it, and no picture at all, on fewer of the same items."""
    few = max(1, args.items * 2 // 5)
    summary = comparison.evaluate("toybox-affordance", VARIANTS, few, "variants")
    lines = comparison.means(summary, {name: name for name in VARIANTS}, SHOWN)
    return "\n".join([*lines, "", f"* The first {few} items."])


def additing(args: Namespace) -> str:
    """Insertion into pictures that the model draws itself; its inputs cost as much again."""
    few = max(1, args.items // 10)
    return "\n".join(tables(comparison.evaluate("toybox-additing", ADDITING, few)))


def tables(summary: Summary) -> list[str]:
    """The report's tables of means, and what a reader must know of them."""
    lines = []
    for title, columns in summary.groups.items():
        lines += [f"*{title}*", "", *report.group_table(summary, columns), ""]
    lines += [f"* {len(summary.evaluation.items)} items."]
    lines += [f"* {note}" for note in report.notes(summary)]
    plugins = config.load("addit").plugins
    plugins["subject_mask"].pop("subject")  # the item's own
    options = json.dumps({name: values for name, values in plugins.items() if values})
    return [*lines, f"* Options of `addit` other than the plugins' defaults: `{options}`."]
