"""The model card of an export: `README.md` with the front matter that the Hugging Face hub reads.

Every number is the run's summary's, every word of the certificate `summary["export"]`'s; nothing is measured here.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qat.numerics.recipe import Recipe
from qat.report.launch import FILES
from qat.report.tables import export_lines, markdown, recovered_lines

COLUMNS = ("arm", "ppl", "Δ ppl", "Δ nll", "KL", "top-1", "bits/weight", "MB", "seed")
ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
STARTS = {
    "serve/vllm.yaml": "`vllm serve --config serve/vllm.yaml`",
    "serve/ray_serve.py": "`python serve/ray_serve.py` (Ray Serve LLM)",
    "serve/sglang.sh": "`sh serve/sglang.sh`",
}


def card(
    config: Mapping[str, Any],
    run: Mapping[str, Any],
    summary: Mapping[str, Any],
    arm: str,
    recipe: Recipe,
    export: Mapping[str, Any],
    served: Mapping[str, str | None],
    argv: Sequence[str] = (),
) -> str:
    """The card of an arm of a run.

    Args:
        config: The run's config.
        run: Its `run.json`.
        summary: Its `summary.json`.
        arm: Whose checkpoint this is.
        recipe: What its codes were found under.
        export: Its certificate in the summary's words.
        served: Engine to why it does not serve the checkpoint; None where nothing is known against it.
        argv: The command that exported it, if it was not the run itself.
    """
    model, name = config["model"]["name"], config["format"]["name"]
    parts = [
        *_head(model, f"{model}, quantized: {Path(config['choices']['recipe']).stem} by {arm}", name),
        *_scheme(recipe, name, config["export"]["dtype"]),
        *_numbers(summary, arm, run),
        *_data(config, run, arm),
        *_certificate(export),
        *_serving(served),
        *_command([run["argv"], argv], run.get("versions", {}), run.get("git")),
    ]
    return "\n".join(parts) + "\n"


def converted_card(
    certificate: Mapping[str, Any],
    argv: Sequence[str],
    recipe: Recipe,
    name: str,
    export: Mapping[str, Any],
    served: Mapping[str, str | None],
) -> str:
    """The card of a checkpoint that was converted from another.

    Args:
        certificate: The new one's certificate, which says where it is from.
        argv: The command.
        recipe: As the checkpoint that was read says it.
        name: The format that was written.
        export: The certificate in the summary's words.
        served: As for `card`.
    """
    model, origin = certificate.get("model", "unknown"), certificate["converted_from"]
    sha = origin["certificate"]
    proof = f"whose `verify.json` has the SHA-256 `{sha}`" if sha else "which had no certificate"
    parts = [
        *_head(model, f"{model}, quantized: {name}", name),
        f"Converted from a checkpoint in the format {origin['format']}, {proof}: codes, scales and zero points are",
        "the same bit for bit. How good they are was measured when they were found: see the card beside that one.",
        "",
        *_scheme(recipe, name, certificate.get("storage_dtype", "that of the checkpoint")),
        *_certificate(export),
        *_serving(served),
        *_command([argv], certificate["versions"], None),
    ]
    return "\n".join(parts) + "\n"


def _head(model: str, title: str, name: str) -> list[str]:
    front = [f"base_model: {json.dumps(model)}", "base_model_relation: quantized", "pipeline_tag: text-generation"]
    return ["---", *front, f"tags: [qat, {name}]", "---", "", f"# {title}", ""]


def _scheme(recipe: Recipe, name: str, dtype: str) -> list[str]:
    rows = [
        [key, f"`{rule.match.replace('|', chr(92) + '|')}`", str(rule.weight or "left alone"), str(rule.input or "")]
        for key, rule in recipe.rules.items()
    ]
    kv = "" if recipe.kv is None else f" Keys and values are cached as {recipe.kv}."
    table = markdown(["rule", "modules", "weight", "input"], rows)
    said = f"The last rule that matches a module wins. Format {name}; scales and all that is left alone: {dtype}.{kv}"
    return ["## Scheme", "", table, "", f"{said} `recipe.yaml` is the recipe: `qat run recipe=recipe.yaml`.", ""]


def number_rows(arms: Mapping[str, Mapping[str, Any]], arm: str) -> list[list[str]]:
    """One row for each arm, in the order of COLUMNS; the arm of the card is bold."""
    rows = []
    for name, row in arms.items():
        delta = [
            f"{row['ppl'] - arms['fp']['ppl']:+.3f}",
            f"{row['nll'] - arms['fp']['nll']:+.4f} ± {row['nll_se']:.4f}",
        ]
        quality = [f"{row['kl']:.4f}", f"{row['top1_agree']:.3f}"]
        size = [f"{row['bits_per_weight']:.2f}", f"{row['bytes'] / 1e6:.1f}", str(row["seed"])]
        change = ["", ""] if name == "fp" else delta
        rows.append([f"**{name}**" if name == arm else name, f"{row['ppl']:.3f}", *change, *quality, *size])
    return rows


def _numbers(summary: Mapping[str, Any], arm: str, run: Mapping[str, Any]) -> list[str]:
    arms = summary["arms"]
    lines = ["## Against full precision", "", markdown(list(COLUMNS), number_rows(arms, arm)), ""]
    lines += [
        f"On {arms['fp']['tokens']} held-out tokens, one seed, {run['device']}. KL is the mean over tokens of "
        f"KL(full precision ‖ arm) in nats;",
        "Δ nll is in nats per token, with its standard error over windows, paired with full precision; `fp` is the "
        "model as it came.",
    ]
    recovered = recovered_lines(summary.get("recovered", {})) if arm == "qat" else []
    notes = [f"- {line}" for line in (*recovered, *summary.get("warnings", []))]
    return [*lines, "", *notes, *([""] if notes else [])]


def _data(config: Mapping[str, Any], run: Mapping[str, Any], arm: str) -> list[str]:
    data, calibration = run["data"], config["calibration"]
    given, extra = config["data"]["path"], [Path(path).name for path in config["data"]["extra"]]
    name = Path(given).name if given else Path(config["choices"]["data"]).stem
    trained = config["verb"] != "ptq" and arm == "qat"
    more = f", trained on {', '.join(f'`{one}`' for one in extra)} too" if extra and trained else ""
    where = f"`{name}`{more}; tokens with the fingerprint `{data['fingerprint']}`."
    used = f"Calibration: {calibration['samples']} x {calibration['seq_len']} tokens of the train split"
    if trained:
        steps, batch = config["trainer"]["max_steps"], config["trainer"]["batch_size"]
        used += f"; training: {steps} steps, batches of {batch} x {config['data']['seq_len']}"
    return ["## Data", "", where, f"{used}.", ""]


def _certificate(export: Mapping[str, Any]) -> list[str]:
    return ["## Certificate", "", "```text", *export_lines(export), "```", "", "`qat verify .` checks it again.", ""]


def _serving(served: Mapping[str, str | None]) -> list[str]:
    lines = ["## Serving", "", "In this directory; only the first was run on it:", "", "- `qat serve .`, `qat chat .`"]
    for engine, reason in served.items():
        starts = " or ".join(STARTS[path] for path in FILES[engine])
        lines.append(f"- {ENGINES[engine]}: {starts if reason is None else f'not served. {reason}'}")
    return [*lines, ""]


def _command(
    commands: Sequence[Sequence[str]], versions: Mapping[str, str], git: Mapping[str, Any] | None
) -> list[str]:
    made = ", ".join(f"{package} {version}" for package, version in versions.items())
    commit = f" Commit {git['sha']}{' with changes' if git['dirty'] else ''}." if git else ""
    lines = [shlex.join(["qat", *argv[1:]]) for argv in commands if argv]
    return ["## How it was made", "", "```sh", *lines, "```", "", f"{made}.{commit}"]
