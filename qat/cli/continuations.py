"""What a checkpoint makes of the configured prompts, through the engine."""

from typing import Any

from hydra.utils import instantiate

from qat.engine.config import SamplingParams
from qat.engine.llm import LLM


def continuations(path: str, config: dict[str, Any]) -> dict[str, str]:
    """Greedy continuations of `prompts` by the packed model: prompt to text."""
    llm = LLM(path, instantiate(config["engine"], _convert_="all"))
    params = SamplingParams(temperature=0.0, **config["generate"])
    texts = [completion.text for completion in llm.generate(config["prompts"], params)]
    return dict(zip(config["prompts"], texts, strict=True))
