"""qat verify: a checkpoint held to its certificate; exit 0 only if it is verified."""

import json
from pathlib import Path
from typing import Any

import torch

from qat.cli.exporting import outcome
from qat.cli.rundir import export_of
from qat.cli.workbench import pick_device, quiet
from qat.evaluation.verify import verify
from qat.report.tables import export_lines


def main(config: dict[str, Any]) -> int:
    """Prints the certificate in a few lines, or whole with `json=true`."""
    quiet()
    path = Path(config["path"]).expanduser() if config["path"] else export_of(config["runs"], config["run"])
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    device = pick_device(config["device"])
    certificate = verify(path, str(device))
    if config["json"]:
        shown = {key: value for key, value in certificate.items() if key != "sha256"}
        print(json.dumps(shown, indent=1))
    else:
        print(path)
        for line in [*export_lines(outcome(str(path), certificate)), *certificate["unchecked"]]:
            print(line)
    return 0 if certificate["verified"] else 1
