"""What starts an engine on an export: files below `serve/` that lie beside it, as text.

Each finds the checkpoint from where it lies itself or from the directory that it is started in, so that the directory
can be moved. Values of the command line win over the file's, in all three.
"""

import json
import shlex
from dataclasses import dataclass

VLLM, RAY, SGLANG = "serve/vllm.yaml", "serve/ray_serve.py", "serve/sglang.sh"
FILES = {"vllm": (VLLM, RAY), "sglang": (SGLANG,)}  # engine to what starts it; Ray Serve LLM is vLLM behind Ray


@dataclass(frozen=True)
class Launch:
    """What an engine is told.

    Attributes:
        name: The model's name in its API.
        dtype: Storage dtype of the checkpoint.
        length: The longest sequence that the model was made for, in tokens.
    """

    name: str
    dtype: str
    length: int


def vllm_yaml(launch: Launch) -> str:
    """A file for `vllm serve --config`."""
    lines = (
        "# In the directory of the checkpoint: vllm serve --config serve/vllm.yaml",
        "model: .",
        f"served-model-name: {json.dumps(launch.name)}",
        f"dtype: {launch.dtype}",
        f"max-model-len: {launch.length}",
        "host: 127.0.0.1",
        "port: 8000",
    )
    return "\n".join(lines) + "\n"


def ray_serve_py(launch: Launch) -> str:
    """A Ray Serve application: OpenAI's API over replicas of vLLM."""
    return f'''"""pip install "ray[serve,llm]", then python serve/ray_serve.py; every node needs the checkpoint."""

from pathlib import Path

from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

checkpoint = str(Path(__file__).resolve().parents[1])
model = LLMConfig(
    model_loading_config={{"model_id": {json.dumps(launch.name)}, "model_source": checkpoint}},
    deployment_config={{"autoscaling_config": {{"min_replicas": 1, "max_replicas": 2}}}},
    engine_kwargs={{"dtype": "{launch.dtype}", "max_model_len": {launch.length}}},
)
app = build_openai_app({{"llm_configs": [model]}})

if __name__ == "__main__":
    serve.run(app, blocking=True)
'''


def sglang_sh(launch: Launch) -> str:
    """A shell script that takes more arguments of SGLang's server."""
    return f"""#!/bin/sh
# sh serve/sglang.sh [arguments of sglang.launch_server]
set -eu
model=$(cd "$(dirname "$0")/.." && pwd)
exec python -m sglang.launch_server --model-path "$model" --served-model-name {shlex.quote(launch.name)} \\
  --dtype {launch.dtype} --context-length {launch.length} --host 127.0.0.1 --port 30000 "$@"
"""


TEXTS = {VLLM: vllm_yaml, RAY: ray_serve_py, SGLANG: sglang_sh}


def files(launch: Launch, engines: list[str]) -> dict[str, str]:
    """Path below the checkpoint's directory to content, for some engines."""
    return {path: TEXTS[path](launch) for engine in engines for path in FILES[engine]}
