"""The verbs: one table. Nothing here imports what it names."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """A word of the command line, served by `qat.cli.<name>`.

    Attributes:
        name: The word.
        help: One line.
        detail: What it does, in a few sentences.
        examples: Two command lines.
        primary: Name of its primary config; None for a verb that reads plain arguments.
        usage: Its plain arguments.
        directory: Whether one bare argument stands for `path=<directory>`.
    """

    name: str
    help: str
    detail: str
    examples: tuple[str, str]
    primary: str | None = None
    usage: str = "[key=value ...]"
    directory: bool = False


VERBS = {
    verb.name: verb
    for verb in (
        Verb(
            "run",
            "the whole comparison: every PTQ arm, QAT, export, verify",
            "Evaluates the full-precision model, quantizes it with every PTQ method of `arms`, trains it with QAT\n"
            "under the same recipe on the same data, exports and verifies the result, and writes summary and report\n"
            "to one run directory. An interrupted run goes on where it stopped.",
            ("qat run experiment=quickstart", "qat run recipe=w3a16_g64 trainer.max_steps=500 '~arms.awq'"),
            "run",
        ),
        Verb(
            "train",
            "QAT alone, to an exported and verified checkpoint",
            "Prepares the model by the recipe, trains it, converts it, exports it and verifies the file.",
            ("qat train recipe=w3a16_g64", "qat train loss=ce optim.lr=5e-5 'trainer.max_steps={cpu:32,cuda:2000}'"),
            "train",
        ),
        Verb(
            "ptq",
            "one PTQ method, to an exported and verified checkpoint",
            "Quantizes the model with a method and calibration data, without training; exports and verifies it.",
            ("qat ptq method=gptq", "qat ptq method=awq model=hf model.name=HuggingFaceTB/SmolLM2-135M"),
            "ptq",
        ),
        Verb(
            "sensitivity",
            "what each layer loses at each width, and a recipe of mixed widths",
            "Quantizes one layer at a time at each width, measures what the model loses, and writes a recipe that\n"
            "spends a budget of bits where they matter most. An interrupted run goes on where it stopped.",
            ("qat sensitivity budget=3.25", "qat sensitivity unit=kind 'bits=[2,3,4]' recipe=w4a16_g128"),
            "sensitivity",
        ),
        Verb(
            "eval",
            "perplexity, KL and top-1 agreement of a checkpoint",
            "Evaluates a checkpoint directory, or a run's export, on held-out windows.",
            ("qat eval", "qat eval runs/latest/export/compressed_tensors evaluation.windows=20"),
            "eval",
            "[DIR] [key=value ...]",
            directory=True,
        ),
        Verb(
            "export",
            "an arm of a run, or a checkpoint, in another format",
            "Writes an arm of a finished run in a format, with a certificate of its own; or converts a checkpoint,\n"
            "where every code, scale and zero point survives bit for bit.",
            (
                "qat export run=runs/latest arm=gptq",
                "qat export from=runs/latest/export/compressed_tensors format=gptq",
            ),
            "export",
        ),
        Verb(
            "verify",
            "what can be proved of a checkpoint",
            "Holds a checkpoint to its certificate: codes, scales, other tensors, decoding and logits; says what it\n"
            "could not check.",
            ("qat verify", "qat verify runs/latest/export/compressed_tensors"),
            "verify",
            "[DIR] [key=value ...]",
            directory=True,
        ),
        Verb(
            "serve",
            "a checkpoint behind OpenAI's HTTP API",
            "Serves a checkpoint directory, or a run's export, with continuous batching and a paged KV cache.",
            ("qat serve", "qat serve runs/latest/export/compressed_tensors server.port=9000"),
            "serve",
            "[DIR] [key=value ...]",
            directory=True,
        ),
        Verb(
            "chat",
            "a checkpoint in the terminal",
            "Talks to a checkpoint directory, or to a run's export, in this process.",
            ("qat chat", "qat chat sampling.temperature=0 sampling.max_tokens=200"),
            "serve",
            "[DIR] [key=value ...]",
            directory=True,
        ),
        Verb(
            "compare",
            "runs side by side, from their run directories",
            "Prints the arms of several runs in one table, the keys in which the runs differ, and a warning where\n"
            "they cannot be compared.",
            ("qat compare latest", "qat compare runs/a/1 runs/b/2 --md"),
            usage="RUN... [--json] [--md]",
        ),
        Verb(
            "generate",
            "training text from the full-precision model itself",
            "Samples text with our own engine, drops duplicates and loops, and writes a directory of tokens for\n"
            "data.path=. The same command goes on with one that was interrupted.",
            ("qat generate out=generated", "qat generate out=generated tokens=10000000 sequences=4096 seed=1"),
            "generate",
        ),
        Verb(
            "configs",
            "list, show, copy or check configs",
            "`ls [group]` lists groups and options, `show [verb] [key=value ...]` prints a composed config,\n"
            "`cp group/option [DEST]` copies one to edit, `validate [verb] [key=value ...]` checks without running.",
            ("qat configs show run experiment=quickstart", "qat configs cp recipe/w4a16_g64"),
            usage="ls | show | cp | validate ...",
        ),
        Verb(
            "env",
            "versions, devices and directories",
            "Prints what a bug report needs.",
            ("qat env", "qat env --json"),
            usage="[--json]",
        ),
    )
}
