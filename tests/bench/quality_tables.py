"""The lines of `quality run` as tables: for a terminal, as JSON, and as the documentation has them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from tests.bench.quality_variants import BUDGET, RECOMMENDED, RULES, THEIRS, VARIANTS

FIGURES = ("test_accuracy", "test_loss", "test_ece", "test_scaled_ece")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines so far; the last may have been cut off when a run was stopped."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the 95 % interval (Student's t)."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0
    return float(np.mean(values)), float(half)


def summarise(lines: list[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """A row per condition, backbone, variant and rule: test accuracy, its difference from the baseline's under the same
    rule over the pairs that both have, test loss and ECE, also after the temperature that fits `val`'s true labels.

    The ECE of a few hundred images is mostly the noise of its bins; `pooled_scaled_ece` is that of all pairs' images.
    """
    runs = {(line["condition"], line["model"], line["variant"], line["seed"], line["fold"]): line for line in lines}
    rows = []
    for condition, model, variant in dict.fromkeys(key[:3] for key in runs):
        pairs = [key[3:] for key in runs if key[:3] == (condition, model, variant)]
        pairs = [pair for pair in pairs if (condition, model, baseline, *pair) in runs]
        if not pairs:
            continue
        for rule, pick in RULES.items():
            mine, theirs = (
                [(line, pick(line)) for line in (runs[condition, model, name, *pair] for pair in pairs)]
                for name in (variant, baseline)
            )
            at = {f: [line[f][epoch] for line, epoch in mine] for f in FIGURES}
            gaps = np.sum([line["test_scaled_gaps"][epoch] for line, epoch in mine], axis=0)
            pooled = float(np.abs(gaps).sum() / sum(line["n_test"] for line, _ in mine))
            gains = [a - line["test_accuracy"][e] for a, (line, e) in zip(at["test_accuracy"], theirs, strict=True)]
            gain, half = interval(gains)
            rows.append(
                {"condition": condition, "model": model, "variant": variant, "rule": rule, "n": len(pairs)}
                | {name: round(float(np.mean(values)), 4) for name, values in at.items()}
                | {"pooled_scaled_ece": round(pooled, 4)}
                | {"epoch": round(float(np.mean([epoch for _, epoch in mine])) + 1, 1)}
                | {"baseline": baseline, "gain": round(gain, 3), "gain_half_interval": round(half, 3)}
            )
    return rows


LABELS = {
    "majority": "majority vote's labels",
    "dawid-skene": "Dawid-Skene's labels",
    "answers": "each answer as a label",
    "truth": "true labels",
}


def named(variant: str) -> str:
    """What a variant trains on and with, in the words of the settings."""
    if variant == THEIRS:
        return "peerannot's own class"
    options = VARIANTS[variant]
    words = [LABELS[options["labels"]] if "labels" in options else f"`{options.get('crowd_layer', 'matrix')}`"]
    if "crowd_start" in options:
        words.append(f"`{options['crowd_start']}`")
    if "lr_crowd" in options:
        words.append(f"`LR_CROWD` = {options['lr_crowd'] / BUDGET['lr']:g} · `LR`")
    words += [f"`{name.upper()}={options[name]:g}`" for name in ("mixup", "ema") if name in options]
    if "crowd_warmup" in options:
        held = options["crowd_warmup"] > BUDGET["n_epochs"]
        words.append("held" if held else f"`CROWD_WARMUP={options['crowd_warmup']}`")
    if "regularizer" in options:
        words.append(f"`{options['regularizer']}`, `SCALE={options['scale']:g}`")
    if "decay_crowd" in options:
        words.append("peerannot's loss and decay")
    return ", ".join(words) + (": **recommended**" if variant == RECOMMENDED else "")


def place(variant: str) -> tuple[bool, int]:
    """A sort key: as the variants are listed, and true labels last."""
    of_truth = VARIANTS.get(variant, {}).get("labels") == "truth"
    return of_truth, [*VARIANTS, THEIRS].index(variant)


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table as the documentation has it: test accuracy and gain by three rules; at `last` the log-loss and the ECE of
    all pairs' images after the temperature.
    """
    rules = ("loss", "calibrated_loss", "last")
    lines = [f"| trained on | pairs | {' | '.join(f'`{rule}`' for rule in rules)} | log-loss | ECE after |"]
    lines.append("| --- " * (len(rules) + 4) + "|")
    for variant in sorted({row["variant"] for row in rows}, key=place):
        cells = {row["rule"]: row for row in rows if row["variant"] == variant}
        figures = []
        for rule in rules:
            row = cells[rule]
            gain = f" ({row['gain']:+.1f} ± {row['gain_half_interval']:.1f})" if variant != row["baseline"] else ""
            figures.append(f"{row['test_accuracy']:.1f}{gain}")
        last = cells["last"]
        figures += [f"{last['test_loss']:.2f}", f"{last['pooled_scaled_ece']:.3f}"]
        lines.append(f"| {' | '.join([named(variant), str(last['n']), *figures])} |")
    return "\n".join(lines)


def table(arguments: argparse.Namespace) -> None:
    rows = summarise([line for path in arguments.runs for line in read(path)], arguments.baseline)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for condition in dict.fromkeys((row["condition"], row["model"]) for row in rows):
        here = [row for row in rows if (row["condition"], row["model"]) == condition]
        if arguments.markdown:
            print(f"\n{' '.join(condition)}:\n\n{markdown(here)}")
            continue
        print(f"\n{' '.join(condition)}: test accuracy in %, and the gain over {arguments.baseline} by the same rule")
        print(f"{'variant':24} {'n':>3}  " + "  ".join(f"{rule[-22:]:>22}" for rule in RULES))
        for variant in dict.fromkeys(row["variant"] for row in here):
            cells = {row["rule"]: row for row in here if row["variant"] == variant}
            text = (
                f"{cells[r]['test_accuracy']:5.1f} ({cells[r]['gain']:+5.1f} ± {cells[r]['gain_half_interval']:3.1f})"
                for r in RULES
            )
            print(f"{variant:24} {cells['loss']['n']:3}  " + "  ".join(f"{cell:>22}" for cell in text))
